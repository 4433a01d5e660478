"""`scaling4d bench masking`: what hiding tokens saves, decoded as MAE-ST does and as SimpleMAE does, beside loading the clips."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scaling4d.clips import curate
from scaling4d_bench import device as devices
from scaling4d_bench import loader, measure, steps, videos
from scaling4d_bench.curate import curation
from scaling4d_bench.measure import Contestant, Raw
from scaling4d_bench.steps import Step

POINTS = {"B": {"MAE-ST": "mae_st_B", "SimpleMAE": "B"}, "L": {"MAE-ST": "mae_st_L", "SimpleMAE": "L"}}
RATIOS = (0.0, 0.75, 0.9, 0.95)
FILES, SECONDS, SIZE_PX = 4, 12.0, (360, 640)  # made-up videos to load from
BATCHES = 4  # of loader.BATCH clips, that loading is timed with in each turn
LIBRARIES = ("torch", "numpy", "av", "torchdata", "xformers")
LOADING = "loading"


@dataclass(frozen=True)
class Run:
    """A method's step with a share of its tokens hidden."""

    method: str
    ratio: float
    step: Step

    @property
    def name(self) -> str:
        return f"{self.method}, {self.ratio:.0%}"


def bench(
    out: Path,
    *,
    clips: int,
    repeats: int,
    precision: str,
    workers: int,
    shards: Path | None,
    points: Mapping[str, Mapping[str, str]] = POINTS,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
) -> Path:
    """Measure, print a table a size, write `<out>/masking-<precision>.json` (on a GPU with its name).

    Args:
        clips: a step. workers: processes that load. shards: a `clips` folder to load from, made up where there is none.
        points: size -> method -> file of experiments/point. changes: of the points' settings, by point. ratios: shares of hidden
          tokens; each method's times are set against its own with the first, and the first method's.
    """
    load, device = measure.busy(), devices.best()
    raw: dict[str, Any] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, measure.threads(measure.cores()):
        folder = shards or made_up(Path(scratch), seed=seed)
        loading = Contestant(LOADING, partial(loader.load, folder, BATCHES, workers, seed), BATCHES * loader.BATCH)
        for size, methods in points.items():
            given = {"clips": clips, "precision": precision, "device": device, "seed": seed}
            runs = [
                run
                for method, point in methods.items()
                for run in _runs(method, point, (changes or {}).get(point, {}), ratios, given)
            ]
            contestants = [Contestant(run.name, devices.clocked(run.step.run, device), clips) for run in runs]
            contestants += [loading, *devices.peaks([precision], device)]
            seconds = measure.race(contestants, repeats=repeats)
            raw[size], found[size] = measure.plain(seconds), _found(runs, contestants, seconds, precision)
            _show(f"{size}, {precision}, batches of {clips}; {workers} processes load", found[size])
        settings = devices.settings(device)
    settings |= {"clips": clips, "repeats": repeats, "precision": precision, "workers": workers, "seed": seed}
    settings |= {"load_before": load, "shards": "given" if shards else f"made up: {FILES} x {SECONDS:g} s of {SIZE_PX} px"}
    name, libraries = devices.file_name(f"masking-{precision}", device), measure.versions(LIBRARIES)
    return measure.write(name, out, settings=settings, libraries=libraries, raw=raw, found=found, not_measured={})


def _runs(method: str, point: str, changes: Mapping[str, Any], ratios: Sequence[float], given: Mapping[str, Any]) -> list[Run]:
    """One model, hidden more or less of."""
    model = steps.model(point, changes, device=given["device"], seed=given["seed"])
    update = steps.updated(model)
    return [Run(method, ratio, steps.ours(model, update, mask_ratio=ratio, **given)) for ratio in ratios]


def made_up(scratch: Path, *, seed: int) -> Path:
    """Clips of the paper's size, curated from made-up videos."""
    sources, folder = scratch / "videos", scratch / "clips"
    sources.mkdir()
    folder.mkdir()
    for number in range(FILES):
        path = sources / f"{number}.mp4"
        videos.make(path, seed + number, seconds=SECONDS, height_px=SIZE_PX[0], width_px=SIZE_PX[1], gop=250)
    curate.curate(sources, folder, curation(workers=measure.cores()))
    return folder


def _found(runs: Sequence[Run], contestants: Sequence[Contestant], raw: Raw, precision: str) -> dict[str, Any]:
    """Of every run: clips a second, and how many times as fast it is as without hiding, alone and after loading its clips."""
    limits = devices.limits(contestants, raw)
    rows = {row["name"]: row for row in measure.rows(contestants, raw, ours=runs[0].name)}
    loading_s = 1 / rows[LOADING]["per_s"]
    first = {run.method: run for run in reversed(runs)}  # of each method, with the least hidden

    def row(run: Run) -> dict[str, Any]:
        mine, base = rows[run.name], rows[first[run.method].name]
        return mine | {
            "method": run.method,
            "mask_ratio": run.ratio,
            "flops_per_clip": run.step.flops,
            "share_of_peak": mine["per_s"] * run.step.flops / limits[devices.peak_of(precision)],
            "times_as_fast": measure.times_as_fast(raw, run.name, base["name"]),
            "times_as_fast_by_arithmetic": first[run.method].step.flops / run.step.flops,
            "times_as_fast_with_loading": (1 / base["per_s"] + loading_s) / (1 / mine["per_s"] + loading_s),
            "times_first_method_unhidden": measure.times_as_fast(raw, run.name, runs[0].name),
        }

    return {"rows": [row(run) for run in runs], "loading": rows[LOADING], "limits": limits}


def _show(title: str, found: Mapping[str, Any]) -> None:
    lines = [
        (
            row["name"],
            f"{row['per_s']:.2f}",
            f"{row['per_s_low']:.2f} to {row['per_s_high']:.2f}",
            f"{row['times_as_fast']['median']:.2f}",
            f"{row['times_as_fast_by_arithmetic']:.2f}",
            f"{row['times_as_fast_with_loading']:.2f}",
            f"{row['times_first_method_unhidden']['median']:.2f}",
            f"{row['share_of_peak']:.0%}",
        )
        for row in found["rows"]
    ]
    loading = found["loading"]
    quartiles = f"{loading['per_s_low']:.2f} to {loading['per_s_high']:.2f}"
    lines.append((LOADING, f"{loading['per_s']:.2f}", quartiles, "", "", "", "", ""))
    first = found["rows"][0]["name"]
    columns = ("hidden", "clips/s", "quartiles", "times as fast", "by FLOPs", "with loading", f"times {first}", "of the peak")
    measure.show(title, columns, lines)
    print(devices.told(found["limits"]) + "; with loading: first a batch is loaded, then the step runs")
