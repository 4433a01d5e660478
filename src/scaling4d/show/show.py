"""RESULT -> PICTURES: what frozen readouts say beside the truth, on validation clips, as a contact sheet and a video."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scaling4d import artifacts, benchmarks, config, seeds, video
from scaling4d.encoders.arrays import new
from scaling4d.encoders.features import at_depth
from scaling4d.readout.tasks.points import Points
from scaling4d.records import Result, Sample, UserError
from scaling4d.show import draw, trained
from scaling4d.show.trained import Trained

SHEET, MOVIE = "sheet.png", "clips.mp4"
NOTES = {
    "actions": ("bars: the likeliest classes with their probabilities; green: the true class",),
    "boxes": ("solid: predicted; dashed: true, where labelled; the box of the first frame is given",),
    "depth": ("grey: not measured",),
    "points": (
        "disc: visible, with its trail; ring: predicted to be hidden; white line: to the true place",
        "the place in the first frame is given; the truth shows a point only where it is visible",
    ),
    "pose": (
        "black: true path and last camera; grey: the first camera; coloured and dashed: the predicted last camera",
        "lengths in the units of the readout's answer, both views alike",
    ),
}


@dataclass(frozen=True)
class Spoken:
    """What one readout says of the chosen clips: predictions and the metric's (sum, count), clip by clip."""

    readout: Trained
    predicted: list[np.ndarray]
    measured: list[tuple[float, float]]


def show(folders: Sequence[Path], out: Path | None, *, clips: int, ids: Sequence[str], frames: int) -> Path:
    """Write `sheet.png`, `clips.mp4` and what they rest on to the new folder `out`, or to one in `shown/`; return it.

    Args:
        folders: of frozen readouts of one task in artifacts/, or their result.json; all are shown on the same clips.
        clips: how many of the validation split, drawn by the seed of the first result. ids: these instead, in this order.
        frames: of a clip on the sheet, evenly spaced from the first to the last.
    Raises:
        UserError: no or a fine-tuned readout, readouts that do not go together, an id that is not in the split, or `out` exists.
    """
    started = time.time()
    torch.set_num_threads(1)  # bits depend on it
    readouts = [trained.read(folder.parent if folder.name == "result.json" else folder) for folder in folders]
    first = readouts[0]
    for other in readouts[1:]:
        if (other.result.task, other.asked, other.evaluation.data) != (first.result.task, first.asked, first.evaluation.data):
            raise UserError(f"{other.folder} and {first.folder} do not answer the same question; show them one by one")
    T, side, _ = first.encoder.clip
    if any(readout.encoder.clip[:2] != (T, side) for readout in readouts):
        raise UserError(f"{', '.join(map(str, folders))} are for clips of several sizes; show them one by one")
    names = _names(readouts)
    out = out or Path("shown") / "-".join([*names, first.result.task])
    out.parent.mkdir(parents=True, exist_ok=True)
    with new(out) as partial:
        samples = _chosen(first, T, side, clips, ids)
        spoken = {name: _speak(readout, samples) for name, readout in zip(names, readouts, strict=True)}
        partial.mkdir()
        _write(partial, samples, spoken, frames)
        inputs = {"benchmark": artifacts.sha256(benchmarks.folder(first.result.task, Path(first.evaluation.data), "val"))}
        for name, readout in zip(names, readouts, strict=True):
            inputs |= {f"readout/{name}/{first.result.task}/frozen": artifacts.sha256(readout.folder)}
            inputs |= {f"pretrain/{name}": artifacts.sha256(readout.checkpoint)}
        artifacts.write_provenance(partial, stage="show", settings=config.read(), keys=[], room="show", inputs=inputs)
    artifacts.write_run(f"show-{first.result.task}", artifacts.sha256(out), started=started)
    return out


def _chosen(readout: Trained, frames: int, side_px: int, clips: int, ids: Sequence[str]) -> list[Sample]:
    """Samples of the validation split."""
    task, data = readout.result.task, Path(readout.evaluation.data)
    where = {"frames": frames, "rate_hz": readout.asked.rate_hz, "side_px": side_px, "skipped": [], "max_bad_share": 1.0}
    if isinstance(readout.asked, Points):
        where["queries"] = readout.asked.queries
    if ids:
        return _named(task, benchmarks.read(task, data, "val", **where), ids)
    found: list[Sample] = []
    order = seeds.numpy(readout.result.seed, "show", task).permutation(benchmarks.listed(task, data, "val"))
    for at in order.tolist():
        if len(found) == clips:
            break
        found += islice(benchmarks.read(task, data, "val", **where, part=slice(at, at + 1)), 1)
    if not found:
        raise UserError(f"{data}: no clip of {task} val can be read; look with `scaling4d data check`")
    return found


def _named(task: str, samples: Iterable[Sample], ids: Sequence[str]) -> list[Sample]:
    found, seen = {}, []
    for sample in samples:
        seen.append(sample.id)
        if sample.id in ids:
            found[sample.id] = sample
        if len(found) == len(set(ids)):
            return [found[name] for name in ids]
    missing = next(name for name in ids if name not in found)
    raise UserError(f"no clip {missing!r} in {task} val; there are {len(seen)}, such as {', '.join(seen[:3])}")


@torch.no_grad()
def _speak(readout: Trained, samples: Sequence[Sample]) -> Spoken:
    predicted, measured = [], []
    for sample in samples:
        target = readout.asked.target(sample)
        features = at_depth(readout.encoder, torch.from_numpy(sample.pixels)[None], readout.evaluation.depth_fraction)
        batch = {name: torch.from_numpy(np.asarray(value)[None]) for name, value in target.items()}
        predicted.append(readout.probe.predict(features, batch)[0].numpy())
        measured.append(readout.asked.measure(predicted[-1], target)[readout.result.metric])
    return Spoken(readout, predicted, measured)


def _write(out: Path, samples: Sequence[Sample], spoken: Mapping[str, Spoken], frames: int) -> None:
    """The sheet and the video, which are the same page with other frames."""
    readout = next(iter(spoken.values())).readout
    result, rate_hz, T = readout.result, readout.asked.rate_hz, len(samples[0].pixels)
    panels, keys = _panels(samples, spoken)
    way = "higher" if result.higher_is_better else "lower"
    title = (
        f"{result.task}: frozen readouts on {len(samples)} validation clips; {result.metric} in {result.unit}, {way} is better"
    )
    lines = [f"{name}: {_whole(one.readout.result)}" for name, one in spoken.items()]
    headings = [
        "   ".join([sample.id, *(f"{name} {_value(one.measured[at])}" for name, one in spoken.items())])
        for at, sample in enumerate(samples)
    ]

    def page(rows: list[list[list[draw.Cell]]]) -> np.ndarray:
        blocks = [draw.block(heading, row) for heading, row in zip(headings, rows, strict=True)]
        return draw.page(title, lines, blocks, NOTES[result.task], keys)

    chosen = np.linspace(0, T - 1, frames).round().astype(int).tolist()
    Image.fromarray(page([draw.sheet_rows(panel, chosen, rate_hz) for panel in panels])).save(out / SHEET, optimize=True)
    pictures = np.stack([page([[draw.movie_row(panel, t)] for panel in panels]) for t in range(T)])
    video.write(out / MOVIE, pictures, rate_hz=rate_hz, codec="libx264", crf=18, gop=T)


def _panels(samples: Sequence[Sample], spoken: Mapping[str, Spoken]) -> tuple[list[list[draw.Panel]], list[draw.Cell]]:
    """The panels of every clip, and the keys to their colours."""
    readout = next(iter(spoken.values())).readout
    said = [{name: one.predicted[at] for name, one in spoken.items()} for at in range(len(samples))]
    pairs = list(zip(samples, said, strict=True))
    match readout.result.task:
        case "actions":
            classes = benchmarks.classes(Path(readout.evaluation.data))
            return [draw.actions(sample, one, classes=classes) for sample, one in pairs], []
        case "boxes":
            return [draw.boxes(sample, one) for sample, one in pairs], []
        case "depth":
            true = np.concatenate([sample.labels["depth_m"][sample.valid["depth_m"]] for sample in samples])
            near_m, far_m = np.quantile(true, [0.01, 0.99]).tolist() if len(true) else (0.0, 1.0)
            far_m = max(far_m, 1.01 * near_m)
            scale = {"near_m": near_m, "far_m": far_m}
            return [draw.depth(sample, one, **scale) for sample, one in pairs], draw.depth_scales(**scale)
        case "points":
            certain = readout.asked.certain
            tracks = [{name: (raw[..., :2], _seen(raw, certain=certain)) for name, raw in one.items()} for one in said]
            return [draw.points(sample, one) for sample, one in zip(samples, tracks, strict=True)], []
    truth = [readout.asked.target(sample)["pose"] for sample in samples]
    return [draw.pose(sample, one, true=true) for (sample, one), true in zip(pairs, truth, strict=True)], []


def _seen(raw: np.ndarray, *, certain: bool) -> np.ndarray:
    """bool `Q T`: what Points.measure takes for visible in `Q T 4`."""
    likely = 1 / (1 + np.exp(-raw[..., 2:].astype(np.float64)))
    return (likely.prod(-1) if certain else likely[..., 0]) > 0.5


def _names(readouts: Sequence[Trained]) -> list[str]:
    """The encoders; with their profiles, where one comes twice."""
    names = [readout.result.encoder for readout in readouts]
    if len(set(names)) == len(names):
        return names
    names = [f"{readout.result.encoder} ({readout.settings['profile']})" for readout in readouts]
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(names)}: the same readout twice; name each once")
    return names


def _whole(result: Result) -> str:
    value = f"{result.metric} {result.value:.3f} [{result.low:.3f}, {result.high:.3f}]"
    return f"{value} over all {result.examples} clips, {result.parameters / 1e6:.2f} M parameters"


def _value(measured: tuple[float, float]) -> str:
    total, count = measured
    return f"{total / count:.3f}" if count else "nothing to measure"
