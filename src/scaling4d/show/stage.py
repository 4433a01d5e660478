"""RESULT -> PICTURES: predictions of frozen readouts beside the truth, as a contact sheet and a video."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scaling4d import artifacts, benchmarks, config, seeds, video
from scaling4d.benchmarks.samples import ClipRequest
from scaling4d.encoders.features import features_at_depth
from scaling4d.provenance import atomic_new
from scaling4d.readout.protocols import EvaluationConfig
from scaling4d.records import Sample, UserError
from scaling4d.show import draw
from scaling4d.show.trained import TrainedReadout, load_trained_readout
from scaling4d.studies.words import encoder_words, measure

SHEET, MOVIE = "sheet.png", "clips.mp4"
NOTES = {
    "actions": (
        "bars: the likeliest classes with their probabilities; green: the true class",
        "right, wrong: the likeliest class is the true one, or not",
    ),
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


def show(folders: Sequence[Path], out: Path | None, *, clips: int | None = None, frames: int | None = None) -> Path:
    """Write `sheet.png`, `clips.mp4` and their provenance to the new folder `out` (None: in `shown/`); return it.

    Args:
        folders: frozen readouts of one task in artifacts/, or their result.json. All predict the same clips.
        clips: number of validation clips, drawn by the seed of the first result; None: `show.clips` of the settings.
        frames: of a clip on the sheet, evenly spaced from the first to the last; None: `show.frames`.
    Raises:
        UserError: no readout, a fine-tuned one, readouts of different tasks, data or clips, or `out` exists.
    """
    started, settings = time.time(), config.read()
    bound = config.bind(settings, [])
    torch.set_num_threads(1)  # bits depend on it
    readouts = [load_trained_readout(folder.parent if folder.name == "result.json" else folder) for folder in folders]
    first, task = readouts[0], readouts[0].result.task
    for other in readouts[1:]:
        if (other.model.task, other.data) != (first.model.task, first.data):
            raise UserError(f"{other.folder} and {first.folder} do not answer the same question; show them one by one")
    if len({readout.encoder.clip[:2] for readout in readouts}) > 1:
        raise UserError(f"{', '.join(map(str, folders))} are for clips of several sizes; show them one by one")
    names = [readout.result.encoder for readout in readouts]
    if len(set(names)) < len(names):
        names = [f"{readout.result.encoder} ({readout.bound.declared['profile']})" for readout in readouts]
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(names)}: the same readout twice; name each once")
    out = out or Path("shown") / "-".join([*names, task])
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_new(out) as partial:
        samples = choose_samples(first, clips or settings["show"]["clips"])
        partial.mkdir()
        by_words = dict(zip(map(encoder_words, names), readouts, strict=True))
        write_pictures(partial, samples, by_words, frames or settings["show"]["frames"])
        inputs = {"benchmark": artifacts.sha256(benchmarks.find_benchmark(task, first.data, "val").folder)}
        for name, readout in zip(names, readouts, strict=True):
            inputs[f"readout/{name}/{task}/frozen"] = artifacts.sha256(readout.folder)
            inputs[f"pretrain/{name}"] = artifacts.sha256(readout.checkpoint)
        provenance = artifacts.provenance_of("show", bound, code=artifacts.code_hash("show"), inputs=inputs)
        artifacts.write_provenance(partial, provenance, first.bound.operative)
    artifacts.write_run(f"show-{task}", artifacts.sha256(out), started=started)
    return out


def choose_samples(readout: TrainedReadout, clips: int) -> list[Sample]:
    """Readable validation samples in an order drawn by the result's seed."""
    name, task, (frames, side_px, _) = readout.result.task, readout.model.task, readout.encoder.clip
    windows = readout.bound[EvaluationConfig].windows
    request = ClipRequest(frames, task.rate_hz, side_px, queries=task.queries_at, windows=windows)
    read = partial(benchmarks.read_samples, name, readout.data, "val", request, skipped=[], max_bad_share=1.0)
    chosen: list[Sample] = []
    for index in seeds.numpy_rng(readout.result.seed, "show", name).permutation(read().count).tolist():
        if len(chosen) < clips:
            chosen += islice(read().part(slice(index, index + 1), []), 1)
    if not chosen:
        raise UserError(f"{readout.data}: no clip of {name} val can be read; look with `scaling4d data check`")
    return chosen


@torch.no_grad()
def predict(readout: TrainedReadout, sample: Sample) -> tuple[np.ndarray, tuple[float, float]]:
    """The prediction for a sample, and (sum, count) of the readout's metric."""
    model, target = readout.model, readout.model.task.target(sample)
    features = features_at_depth(readout.encoder, torch.from_numpy(sample.pixels)[None])
    batch = {name: torch.from_numpy(np.asarray(value)[None]) for name, value in target.items()}
    predicted = model.predict(features, batch)[0].numpy()
    return predicted, model.task.measure(predicted, target)[readout.result.metric]


def write_pictures(out: Path, samples: Sequence[Sample], readouts: Mapping[str, TrainedReadout], frames: int) -> None:
    """Write the sheet and the video: the same page with other frames. readouts: by the encoder's words."""
    first, T = next(iter(readouts.values())), len(samples[0].pixels)
    result, rate_hz = first.result, first.model.task.rate_hz
    metric = f"{measure(result.metric, '↑' if result.higher_is_better else '↓')}, {result.unit}"
    clips = f"{len(samples)} validation clips drawn by the seed"
    title, lines = f"{result.task}: frozen readouts on {clips}; {metric}", []
    for name, r in ((name, readout.result) for name, readout in readouts.items()):
        value = f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}] over all {r.examples} clips"
        lines.append(f"{name}: {value}, {r.parameters / 1e6:.2f} M parameters")
    headings, predictions = [], []
    for number, sample in enumerate(samples, 1):
        heading, predicted = [f"clip {number}"], {}
        for name, readout in readouts.items():
            predicted[name], (total, count) = predict(readout, sample)
            value = f"{total / count:.3f}" if count else "nothing to measure"
            if result.task == "actions":
                value = "right" if total else "wrong"
            heading.append(f"{name} {value}")
        headings.append("   ".join(heading))
        predictions.append(predicted)
    panels, keys = draw_panels(first, samples, predictions)

    def page(rows: list[list[list[draw.Cell]]]) -> np.ndarray:
        blocks = [draw.block(heading, row) for heading, row in zip(headings, rows, strict=True)]
        return draw.page(title, lines, blocks, NOTES[result.task], keys)

    chosen = np.linspace(0, T - 1, frames).round().astype(int).tolist()
    Image.fromarray(page([draw.sheet_rows(panel, chosen, rate_hz) for panel in panels])).save(out / SHEET, optimize=True)
    pictures = np.stack([page([[draw.movie_row(panel, t)] for panel in panels]) for t in range(T)])
    video.encode(out / MOVIE, pictures, rate_hz=rate_hz, crf=18, gop=T)


def draw_panels(
    readout: TrainedReadout, samples: Sequence[Sample], predictions: Sequence[Mapping[str, np.ndarray]]
) -> tuple[list[list[draw.Panel]], list[draw.Cell]]:
    """The panels of every clip, and keys to their colours. predictions: of each sample, by encoder."""
    name, task, pairs = readout.result.task, readout.model.task, list(zip(samples, predictions, strict=True))
    if name == "actions":
        classes = benchmarks.class_names(readout.data)
        return [draw.actions(sample, predicted, classes=classes) for sample, predicted in pairs], []
    if name == "boxes":
        return [draw.boxes(sample, predicted) for sample, predicted in pairs], []
    if name == "depth":
        true = np.concatenate([sample.labels["depth_m"][sample.valid["depth_m"]] for sample in samples])
        near_m, far_m = np.quantile(true, [0.01, 0.99]).tolist() if len(true) else (0.0, 1.0)
        scale = {"near_m": near_m, "far_m": max(far_m, 1.01 * near_m)}
        return [draw.depth(sample, predicted, **scale) for sample, predicted in pairs], draw.depth_scales(**scale)
    if name == "points":
        tracks = [{encoder: (raw[..., :2], task.visible(raw)) for encoder, raw in predicted.items()} for _, predicted in pairs]
        return [draw.points(sample, each) for sample, each in zip(samples, tracks, strict=True)], []
    return [draw.pose(sample, predicted) for sample, predicted in pairs], []
