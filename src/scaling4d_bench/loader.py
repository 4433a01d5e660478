"""`scaling4d bench loader`: clips a second with 0, 1, 2, 4 workers beside decoding alone, and memory over time.

Also with crops and flips, and four windows of a long clip beside four copies of a short one, from whole sources.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling4d.clips import loader
from scaling4d.records import ClipBatch
from scaling4d_bench import measure, videos
from scaling4d_bench.measure import SEED, Measurements

BATCH, STEPS = 8, 40  # clips of a batch, batches of a turn
WORKERS = (0, 1, 2, 4)
FILES, SECONDS, SIZE_PX = 8, 20.0, (360, 640)  # made-up videos; height, width
ALONE, CROPPED = "one core, decoding alone", "workers: 0, cropped and mirrored"
REPEATS, MAX_FRAMES = 4, 125  # copies of a clip; frames of a long clip, at the paper's rate 10 s
SAMPLE_S = 0.5  # between two samples of the memory
LIBRARIES = ("av", "numpy", "pyarrow", "torch", "torchdata")


def bench(out: Path, *, repeats: int, minutes: float) -> Path:
    """Curate made-up videos at the paper's size, measure, print a table for each kind, write `<out>/loader.json`."""
    settings = {"batch": BATCH, "steps": STEPS, "repeats": repeats, "minutes": minutes, "files": FILES, "seconds": SECONDS}
    settings |= {"size_px": SIZE_PX, "curation": videos.curation()}
    measurements = Measurements("loader", settings, LIBRARIES)
    torch.set_num_threads(1)
    columns = {name.replace("ours", "one core"): text for name, text in measure.SPEED.items()}
    columns[f"of {measure.cores()} x one core"] = "{over_all_cores:.0%}"
    with tempfile.TemporaryDirectory() as scratch:
        made = partial(videos.curated, Path(scratch), files=FILES, seconds=SECONDS, size_px=SIZE_PX)
        folders = {"encoded clips": made(encode=True), "whole sources": made(encode=False)}
        for kind, folder in folders.items():
            runs = {ALONE: partial(decode, folder, STEPS)}
            runs |= {f"workers: {count}": partial(load, folder, STEPS, count) for count in WORKERS}
            runs[CROPPED] = partial(load, folder, STEPS, 0, crop=(0.5, 1.0))
            timings, clips = measure.take_turns(runs, repeats=repeats), loader.count_clips(folder, "train")
            rows = measure.throughput(timings, dict.fromkeys(runs, STEPS * BATCH))
            rows = [row | {"over_all_cores": row["over_ours"] / measure.cores()} for row in rows]
            measurements.raw[kind], measurements.results[kind] = timings, {"rows": rows, "clips": clips}
            measure.table(f"{kind}: batches of {BATCH} from {clips} clips", rows, columns)
        kind, long = "repeated sampling", made(encode=False, max_frames=MAX_FRAMES)
        runs = {
            "4 copies of a clip": partial(load, folders["whole sources"], STEPS, 0, REPEATS),
            "4 windows of a long clip": partial(load, long, STEPS, 0, REPEATS),
            "windows of long clips, one by one": partial(load, long, STEPS, 0),
        }
        timings, clips = measure.take_turns(runs, repeats=repeats), loader.count_clips(long, "train")
        rows = measure.throughput(timings, dict.fromkeys(runs, STEPS * BATCH))
        measurements.raw[kind], measurements.results[kind] = timings, {"rows": rows, "clips": clips}
        columns = {name.replace("ours", "copies"): text for name, text in measure.SPEED.items()}
        measure.table(f"{kind}: batches of {BATCH} from {clips} clips of up to {MAX_FRAMES} frames, one core", rows, columns)
        for kind, folder in folders.items():
            measurements.results[kind]["memory"] = memory = watch_memory(folder, minutes=minutes, workers=max(WORKERS))
            mib = {name: value / 2**20 for name, value in memory.items() if name != "bytes"}
            print(
                f"{kind}: memory with {memory['workers']} workers over {memory['minutes']:.1f} min, {memory['batches']} batches: "
                f"{mib['first']:.0f} to {mib['last']:.0f} MiB, peak {mib['peak']:.0f} MiB, "
                f"{mib['slope_per_minute']:+.2f} MiB/min (second half {mib['slope_per_minute_second_half']:+.2f})"
            )
    return measurements.write(out)


def batches(
    folder: Path, *, steps: int, workers: int, repeats: int = 1, crop: tuple[float, float] = (1.0, 1.0)
) -> Iterator[ClipBatch]:
    """The batches of a training. crop: as in `train_batches`; a cropped clip is mirrored at random, too."""
    order = {"repeats": repeats, "seed": SEED, "start": 0, "steps": steps, "window_shards": 0, "rank": 0, "ranks": 1}
    views = {"frames": videos.curation().frames, "flip": crop != (1.0, 1.0), "reverse": False, "crop": crop, "aspect": (1.0, 1.0)}
    views |= {"cached_clips": 0, "workers": workers, "short_side_px": 0, "on_device": False}
    return loader.train_batches(folder, batch=BATCH, **order, **views)


def load(folder: Path, steps: int, workers: int, repeats: int = 1, crop: tuple[float, float] = (1.0, 1.0)) -> float:
    """Seconds of `steps` batches, after as many as are prefetched once the workers have started."""
    ready = workers * loader.PREFETCH + 1
    stream = batches(folder, steps=ready + steps, workers=workers, repeats=repeats, crop=crop)
    for _ in range(ready):
        next(stream)
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
    return time.perf_counter() - start


def decode(folder: Path, steps: int) -> float:
    """Seconds to decode the clips of `steps` batches, one after the other in this process."""
    clips = loader.ClipTable(folder, "train")
    order = loader.WindowedShuffle(clips, seed=SEED, window_shards=0)
    records = [clips[order(*divmod(number, len(clips)))] for number in range(steps * BATCH)]
    start = time.perf_counter()
    for record in records:
        loader.decode_clip(folder, record)
    return time.perf_counter() - start


def watch_memory(folder: Path, *, minutes: float, workers: int) -> dict[str, Any]:
    """Of this process and its workers, from the first batches on."""
    stream, totals, times_s, count = batches(folder, steps=10**9, workers=workers), [], [], 0
    for _ in range(4 * (workers + 1)):
        next(stream)
    start = time.perf_counter()
    while time.perf_counter() < start + 60 * minutes or len(totals) < 3:
        next(stream)
        count += 1
        if not times_s or time.perf_counter() - times_s[-1] > SAMPLE_S:
            times_s.append(time.perf_counter())
            totals.append(sum(now for now, _ in measure.process_memory(os.getpid()).values()))
    watched = {"workers": workers, "minutes": (times_s[-1] - times_s[0]) / 60, "batches": count, "bytes": totals}
    for name, first in {"slope_per_minute": 0, "slope_per_minute_second_half": len(totals) // 2}.items():
        watched[name] = float(np.polyfit(np.array(times_s[first:]) / 60, totals[first:], 1)[0])
    return watched | {"first": totals[0], "last": totals[-1], "peak": max(totals)}
