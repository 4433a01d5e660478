"""`scaling4d bench pretrain`: clips a second of whole training steps, beside VideoMAE of transformers and the official MAE-ST."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scaling4d_bench import device as devices
from scaling4d_bench import measure, parts, peers, steps
from scaling4d_bench.measure import Contestant
from scaling4d_bench.steps import Step

WORTH = 1.02  # times the clips a second that a batch twice as large must bring to be tried further
LIBRARIES = ("torch", "numpy", "transformers", "timm", "xformers")
OFFICIAL = "official MAE-ST B, 90 %"


@dataclass(frozen=True)
class Row:
    """A point of experiments/point with another share of hidden tokens, and some of its settings changed."""

    name: str
    point: str
    mask_ratio: float
    changes: Mapping[str, Any] = field(default_factory=dict)


COARSE = {"coarse_patch": [4, 32, 32]}  # 196 coarse tokens instead of 784; neither is published
SIMPLE = (
    Row("SimpleMAE S, 95 %", "S", 0.95),
    Row("SimpleMAE B, 95 %", "B", 0.95),
    Row("SimpleMAE B, 90 %", "B", 0.9),
    Row("SimpleMAE B, 95 %, 196 coarse tokens", "B", 0.95, COARSE),
    Row("SimpleMAE B, 90 %, 196 coarse tokens", "B", 0.9, COARSE),
)
VIDEOMAE = "VideoMAE base, 90 %"  # its own share
MAE_ST = (Row("MAE-ST B, 90 %", "mae_st_B", 0.9), Row("MAE-ST L, 90 %", "mae_st_L", 0.9))
ON_A_GPU = (
    *(Row(f"SimpleMAE {point}, 95 %", point, 0.95) for point in ("S", "B", "L", "H")),
    *(Row(f"MAE-ST {point}, 90 %", f"mae_st_{point}", 0.9) for point in ("B", "L")),
)


@dataclass(frozen=True)
class Group:
    """Rows that take turns with one another and with the peers beside them, and the pairs whose ratio is told.

    best_batch: each row has the batch at which it makes most clips a second, instead of everyone's.
    """

    rows: Sequence[Row]
    beside: Mapping[str, Callable[..., Step]] = field(default_factory=dict)
    pairs: Sequence[tuple[str, str]] = ()
    best_batch: bool = False


def bench(
    out: Path,
    *,
    clips: int,
    repeats: int,
    precisions: Sequence[str],
    mae_st: Path | None,
    groups: Mapping[str, Group] | None = None,
    seed: int = 0,
) -> Path:
    """Measure, print a table a group and precision, write `<out>/pretrain.json` (on a GPU with its name).

    Args:
        clips: a step. mae_st: a checkout of facebookresearch/mae_st, whose code is then run.
    """
    load, device = measure.busy(), devices.best()
    raw: dict[str, Any] = {}
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    with measure.threads(measure.cores()):
        for name, group in (groups or standard(mae_st, device)).items():
            for precision in precisions:
                given = {"clips": clips, "precision": precision, "device": device, "seed": seed}
                raw[f"{name}, {precision}"], one, gone = race(group, given, repeats=repeats)
                found[f"{name}, {precision}"] = one
                missing |= gone
                if one["rows"]:
                    _show(f"{name}, {precision}", one)
        settings = devices.settings(device)
    measure.show_missing(missing)
    settings |= {"clips": clips, "repeats": repeats, "precisions": list(precisions), "seed": seed, "load_before": load}
    name, libraries = devices.file_name("pretrain", device), measure.versions(LIBRARIES)
    return measure.write(name, out, settings=settings, libraries=libraries, raw=raw, found=found, not_measured=missing)


def standard(mae_st: Path | None, device: torch.device) -> dict[str, Group]:
    """What the command measures: ours beside VideoMAE, ours beside MAE-ST; on a GPU every point at its best batch, too."""
    pairs = [(row.name, VIDEOMAE) for row in SIMPLE if row.point == "B"]
    found = {
        "beside VideoMAE": Group(SIMPLE, {VIDEOMAE: partial(peers.videomae, mask_ratio=0.9)}, pairs),
        "beside MAE-ST": Group(MAE_ST, {OFFICIAL: partial(_official, mae_st)}, [(MAE_ST[0].name, OFFICIAL)]),
    }
    if device.type == "cuda":
        found["at the best batch"] = Group(ON_A_GPU, best_batch=True)
    return found


def _official(folder: Path | None, *, clips: int, precision: str, device: torch.device, seed: int) -> Step:
    """Its own model, after ours has said the same loss with its weights."""
    if folder is None:
        raise ImportError("no checkout of facebookresearch/mae_st was given: --mae-st FOLDER")
    if precision != "fp32":
        raise ImportError("its pretraining computes in fp32")
    _, settings = steps.settings_of("mae_st_B")
    theirs = peers.official_mae_st(folder, settings)
    difference = peers.loss_difference(
        steps.model("mae_st_B", {}, device=torch.device("cpu"), seed=seed), theirs, settings, seed=seed
    )
    print(f"{OFFICIAL}: its loss of one clip and ours differ by {difference:.0e} of it")
    if difference > peers.SAME_LOSS:
        raise RuntimeError(f"its loss differs from ours by {difference:.1e} of it")
    return peers.official_step(theirs, clips=clips, clip=settings["clip"], mask_ratio=settings["mask_ratio"], device=device)


def race(group: Group, given: Mapping[str, Any], *, repeats: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Raw seconds of a group, what follows from them, and who could not take part."""
    device, precision = given["device"], given["precision"]
    makers = {row.name: partial(_ours, row, given, best_batch=group.best_batch) for row in group.rows}
    makers |= {name: partial(make, **given) for name, make in group.beside.items()}
    made, missing = measure.available(makers)
    contestants = [Contestant(name, devices.clocked(one.run, device), one.clips) for name, one in made.items()]
    contestants += devices.peaks([precision], device)
    raw = measure.race(contestants, repeats=repeats)
    limits = devices.limits(contestants, raw)
    rows = measure.rows(contestants, raw, ours=contestants[0].name)[: len(made)]
    for row in rows:
        one = made[row["name"]]
        share = row["per_s"] * one.flops / limits[devices.peak_of(precision)]
        row |= {"clips": one.clips, "flops_per_clip": one.flops, "share_of_peak": share, "parts": parts.where(one.run, device)}
    pairs = [pair for pair in group.pairs if set(pair) <= set(made)]
    ratios = [{"of": a, "over": b, **measure.times_as_fast(raw, a, b)} for a, b in pairs]
    missing = {f"{name}, {precision}": why for name, why in missing.items()}
    return measure.plain(raw), {"rows": rows, "limits": limits, "ratios": ratios}, missing


def _ours(row: Row, given: Mapping[str, Any], *, best_batch: bool) -> Step:
    def make(clips: int) -> Step:
        fresh = steps.model(row.point, row.changes, device=given["device"], seed=given["seed"])
        return steps.ours(fresh, steps.updated(fresh), mask_ratio=row.mask_ratio, **given | {"clips": clips})

    return make(best_clips(make, given["clips"], given["device"]) if best_batch else given["clips"])


def best_clips(make: Callable[[int], Step], start: int, device: torch.device) -> int:
    """The batch, `start` times a power of two, beyond which a GPU does not get faster or has no memory."""
    best, clips, most_per_s = start, start, 0.0
    while True:
        try:
            seconds = _seconds(make(clips), device)
        except torch.cuda.OutOfMemoryError:
            return best
        finally:
            torch.cuda.empty_cache()
        if clips / seconds < WORTH * most_per_s:
            return best
        best, clips, most_per_s = clips, 2 * clips, clips / seconds


def _seconds(step: Step, device: torch.device) -> float:
    work = devices.clocked(step.run, device)
    work()
    return min(work() for _ in range(3))


def _show(name: str, found: Mapping[str, Any]) -> None:
    lines = [
        (
            row["name"],
            str(row["clips"]),
            f"{row['per_s']:.2f}",
            f"{row['per_s_low']:.2f} to {row['per_s_high']:.2f}",
            f"{row['flops_per_clip'] / 1e9:.0f}",
            f"{row['share_of_peak']:.0%}",
        )
        for row in found["rows"]
    ]
    measure.show(name, ("", "batch", "clips/s", "quartiles", "GFLOP a clip", "of the peak"), lines)
    print(devices.told(found["limits"]))
    for ratio in found["ratios"]:
        spread = f"quartiles {ratio['low']:.2f} to {ratio['high']:.2f}"
        print(f"{ratio['of']}: {ratio['median']:.2f} times the clips/s of {ratio['over']} ({spread})")
    kinds = [kind for kind in (*parts.KINDS, parts.REST) if any(kind in row["parts"] for row in found["rows"])]
    lines = [(row["name"], *(f"{row['parts'].get(kind, 0):.0%}" for kind in kinds)) for row in found["rows"]]
    measure.show("where a step's time goes", ("", *kinds), lines)
