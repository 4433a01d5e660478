"""`scaling4d bench loader`: clips a second with 0, 1, 2, 4 workers beside decoding alone, and memory as time goes by."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scaling4d.clips import curate, loader
from scaling4d_bench import measure, videos
from scaling4d_bench.curate import curation
from scaling4d_bench.measure import Contestant

BATCH = 8
WORKERS = (0, 1, 2, 4)
ALONE = "one core, decoding alone"
EVERY_S = 0.5  # between looks at the memory
LIBRARIES = ("av", "numpy", "pyarrow", "torch", "torchdata")


def bench(
    out: Path,
    *,
    steps: int,
    repeats: int,
    minutes: float,
    files: int = 8,
    seconds: float = 20.0,
    size_px: tuple[int, int] = (360, 640),
    workers: Sequence[int] = WORKERS,
    seed: int = 0,
) -> Path:
    """Curate made-up videos into clips of the paper's size, measure, print a table a kind of shard, write `<out>/loader.json`.

    Args:
        steps: batches timed in each repeat. minutes: how long memory is watched, with the most workers. size_px: height, width.
    """
    load = measure.busy()
    raw: dict[str, Any] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, measure.threads(1):
        for number in range(files):
            path = Path(scratch, "videos", f"{number}.mp4")
            path.parent.mkdir(exist_ok=True)
            videos.make(path, seed + number, seconds=seconds, height_px=size_px[0], width_px=size_px[1], gop=250)
        folders = {"encoded clips": Path(scratch, "encoded"), "whole sources": Path(scratch, "whole")}
        for kind, folder in folders.items():
            folder.mkdir()
            encode = kind == "encoded clips"
            curate.curate(Path(scratch, "videos"), folder, curation(encode=encode, workers=measure.cores()))
            raw[kind], rows = _race(folder, steps=steps, repeats=repeats, workers=workers, seed=seed)
            found[kind] = {"rows": rows, "clips": loader.count(folder, "train")}
            _show(kind, found[kind])
        for kind, folder in folders.items():
            found[kind]["memory"] = _memory(folder, minutes=minutes, workers=max(workers), seed=seed)
            _show_memory(kind, found[kind]["memory"])
    settings = {"batch": BATCH, "steps": steps, "repeats": repeats, "minutes": minutes, "files": files, "seconds": seconds}
    settings |= {"size_px": list(size_px), "seed": seed, "load_before": load, "curation": measure.plain(curation())}
    libraries = measure.versions(LIBRARIES)
    return measure.write("loader", out, settings=settings, libraries=libraries, raw=raw, found=found, not_measured={})


def _race(
    folder: Path, *, steps: int, repeats: int, workers: Sequence[int], seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    alone = Contestant(ALONE, partial(_decode, folder, steps, seed), steps * BATCH)
    contestants = [
        alone,
        *(Contestant(f"workers: {count}", partial(load, folder, steps, count, seed), steps * BATCH) for count in workers),
    ]
    raw = measure.race(contestants, repeats=repeats)
    rows = measure.rows(contestants, raw, ours=ALONE)
    for row in rows:
        row["over_all_cores"] = row["over_ours"] / measure.cores()
    return measure.plain(raw), rows


def _batches(folder: Path, *, steps: int, workers: int, seed: int) -> loader.Batches:
    """As a training takes them; the crop is left out, so that every contestant does nothing but decode and stack."""
    return loader.batches(
        folder,
        split="train",
        batch=BATCH,
        repeats=1,
        seed=seed,
        start=0,
        steps=steps,
        flip=False,
        crop=(1.0, 1.0),
        window_shards=0,
        rank=0,
        ranks=1,
        kept=0,
        workers=workers,
    )


def load(folder: Path, steps: int, workers: int, seed: int) -> float:
    """Seconds of `steps` batches, after as many as wait ready once the workers have started."""
    ready = workers * loader.PREFETCH + 1
    stream = _batches(folder, steps=ready + steps, workers=workers, seed=seed)
    for _ in range(ready):
        next(stream)
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
    return time.perf_counter() - start


def _decode(folder: Path, steps: int, seed: int) -> float:
    """Seconds to decode the clips of as many batches, one after the other in this process."""
    reader = loader.Reader(folder, kept=0)
    rows = [draw.row for draws in _batches(folder, steps=steps, workers=0, seed=seed).steps for draw in draws]
    start = time.perf_counter()
    for row in rows:
        reader.pixels(row)
    return time.perf_counter() - start


def _memory(folder: Path, *, minutes: float, workers: int, seed: int) -> dict[str, Any]:
    """Of this process and its workers, from the first batches on."""
    stream = _batches(folder, steps=10**9, workers=workers, seed=seed)
    for _ in range(4 * (workers + 1)):
        next(stream)
    end = time.perf_counter() + 60 * minutes
    batches = 0
    with measure.memory(os.getpid(), every_s=EVERY_S) as samples:
        while time.perf_counter() < end or len(samples) < 3:
            next(stream)
            batches += 1
    totals = [sample.total for sample in samples]
    return {
        "workers": workers,
        "minutes": (samples[-1].time_s - samples[0].time_s) / 60,
        "batches": batches,
        "bytes": totals,
        "first": totals[0],
        "last": totals[-1],
        "peak": max(totals),
        "slope_per_minute": measure.slope_per_minute(samples),
        "slope_per_minute_second_half": measure.slope_per_minute(samples[len(samples) // 2 :]),
    }


def _show(kind: str, found: dict[str, Any]) -> None:
    lines = [(row["name"], *measure.speed(row), f"{row['over_all_cores']:.0%}") for row in found["rows"]]
    columns = ("", "clips/s", "quartiles", "times one core", f"of {measure.cores()} x one core")
    measure.show(f"{kind}: batches of {BATCH} from {found['clips']} clips", columns, lines)


def _show_memory(kind: str, memory: dict[str, Any]) -> None:
    print(
        f"{kind}: memory with {memory['workers']} workers over {memory['minutes']:.1f} min, {memory['batches']} batches: "
        f"{memory['first'] / 2**20:.0f} to {memory['last'] / 2**20:.0f} MiB, peak {memory['peak'] / 2**20:.0f} MiB, "
        f"{memory['slope_per_minute'] / 2**20:+.2f} MiB/min (second half {memory['slope_per_minute_second_half'] / 2**20:+.2f})"
    )
