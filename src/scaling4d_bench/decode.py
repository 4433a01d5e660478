"""`scaling4d bench decode`: clips a second from random places of videos, ours beside torchcodec, OpenCV and plain PyAV."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from scaling4d import seeds
from scaling4d_bench import measure, readers, videos
from scaling4d_bench.measure import Contestant

FRAMES, STRIDE = 16, 2
SIZES = ((360, 640), (720, 1280))  # height, width
GOPS = (12, 250)
SAME_BELOW = 6.0  # mean absolute difference of 255 to ours, at most: resizing differs, the pictures must not
OURS, ALONE = "ours", "FFmpeg alone"
LIBRARIES = ("av", "numpy", "opencv-python-headless", "pillow", "torch", "torchcodec")

Work = list[tuple[Path, list[int]]]  # a file, and the frame numbers wanted of it


def bench(
    out: Path,
    *,
    clips: int,
    repeats: int,
    seconds: float = 20.0,
    files: int = 2,
    sizes: Sequence[tuple[int, int]] = SIZES,
    gops: Sequence[int] = GOPS,
    seed: int = 0,
) -> Path:
    """Measure, print a table a kind of video, write `<out>/decode.json`.

    Args:
        clips: of 16 frames, every 2nd, that each contestant reads in each repeat, of each kind of video. files: of each kind.
    """
    makers = {
        OURS: readers.ours,
        "torchcodec": partial(readers.torchcodec, "approximate"),
        "torchcodec exact": partial(readers.torchcodec, "exact"),
        "torchcodec, torch resizes": readers.torchcodec_torch,
        "OpenCV": readers.opencv,
        "plain PyAV": readers.pyav,
    }
    load = measure.busy()
    raw: dict[str, Any] = {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, measure.threads(1):
        short = videos.make(Path(folder, "short.mp4"), seed, seconds=2, height_px=96, width_px=128, gop=12)
        made, missing = measure.available({name: partial(_tried, make, short) for name, make in makers.items()})
        for (height, width), gop in ((size, gop) for size in sizes for gop in gops):
            kind = f"{width}x{height} GOP {gop}"
            paths = [Path(folder, f"{width}x{height}-{gop}-{number}.mp4") for number in range(files)]
            for number, path in enumerate(paths):
                videos.make(path, seed + number, seconds=seconds, height_px=height, width_px=width, gop=gop)
            work = places(paths, clips=clips, frames=round(seconds * videos.RATE_HZ), seed=seed)
            raw[kind], found[kind] = _one_kind(made, work, repeats=repeats)
            found[kind]["kbit_per_s"] = sum(path.stat().st_size for path in paths) * 8 / 1000 / (files * seconds)
            _show(kind, found[kind])
    measure.show_missing(missing)
    settings = {"clips": clips, "repeats": repeats, "seconds": seconds, "files": files, "frames": FRAMES, "stride": STRIDE}
    settings |= {
        "side_px": readers.SIDE_PX,
        "threads": 1,
        "seed": seed,
        "load_before": load,
        "rate_hz": videos.RATE_HZ,
        "same_below": SAME_BELOW,
    }
    libraries = measure.versions(LIBRARIES) | measure.available(readers.FFMPEG)[0]
    return measure.write("decode", out, settings=settings, libraries=libraries, raw=raw, found=found, not_measured=missing)


def _tried(make: Callable[[], readers.Reader], path: Path) -> readers.Reader:
    """The reader, after it has read something: some libraries load the rest of themselves only then."""
    read = make()
    read(path, range(0, FRAMES * STRIDE, STRIDE))
    return read


def places(paths: Sequence[Path], *, clips: int, frames: int, seed: int) -> Work:
    """Clips at random places, each file as often as the others; ascending frame numbers."""
    last = frames - (FRAMES - 1) * STRIDE - 1  # one more frame follows, to see what being one off would look like
    starts = seeds.numpy(seed, "bench places").integers(0, last, clips)
    return [(paths[n % len(paths)], [int(start) + STRIDE * k for k in range(FRAMES)]) for n, start in enumerate(starts)]


def differences(read: readers.Reader, work: Work) -> float:
    """The largest mean absolute difference of a clip to ours, 0 to 255; 255 where the shape is another."""
    ours, worst = readers.ours(), 0.0
    for path, numbers in work:
        mine, other = ours(path, numbers), read(path, numbers)
        if other.shape != mine.shape or other.dtype != mine.dtype:
            return 255.0
        worst = max(worst, float(np.abs(mine.astype(np.int16) - other).mean()))
    return worst


def _one_kind(made: Mapping[str, readers.Reader], work: Work, *, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raw seconds, and what follows from them, for one kind of video."""
    alone = [Contestant(ALONE, measure.timed(partial(_all, readers.ffmpeg_alone, work)), len(work))]
    contestants = [Contestant(name, measure.timed(partial(_all, read, work)), len(work)) for name, read in made.items()] + alone
    raw = measure.race(contestants, repeats=repeats)
    found = measure.rows(contestants, raw, ours=OURS)
    for row in found:
        if row["name"] in made:
            row["difference"] = differences(made[row["name"]], work)
            row["same_frames"] = row["difference"] < SAME_BELOW
    one_off = differences(lambda path, numbers: readers.ours()(path, [number + 1 for number in numbers]), work)
    share = readers.ffmpeg_share(partial(_all, readers.ours(), work))
    raw_many, many = _many(work, repeats=repeats)
    return {"one process": measure.plain(raw), "processes": measure.plain(raw_many)}, {
        "rows": found,
        "processes": many,
        "ffmpeg_share_of_ours": share,
        "one_off": one_off,
    }


def _many(work: Work, *, repeats: int) -> tuple[measure.Raw, list[dict[str, Any]]]:
    """Ours in 1, 2, 4, ... processes up to the cores; each process reads all the clips."""
    counts = sorted({min(2**n, measure.cores()) for n in range(measure.cores().bit_length() + 1)})
    context = get_context("spawn")
    pools = {count: ProcessPoolExecutor(count, context) for count in counts}
    try:
        contestants = [
            Contestant(f"processes: {count}", measure.timed(partial(_together, pool, count, work)), count * len(work))
            for count, pool in pools.items()
        ]
        raw = measure.race(contestants, repeats=repeats)
    finally:
        for pool in pools.values():
            pool.shutdown()
    return raw, measure.rows(contestants, raw, ours=f"processes: {counts[0]}")


def _together(pool: ProcessPoolExecutor, count: int, work: Work) -> None:
    for future in [pool.submit(_ours, work) for _ in range(count)]:
        future.result()


def _ours(work: Work) -> None:
    _all(readers.ours(), work)


def _all(read: readers.Reader, work: Work) -> None:
    for path, numbers in work:
        read(path, numbers)


def _show(kind: str, found: Mapping[str, Any]) -> None:
    lines = []
    for row in found["rows"]:
        same = "decodes only" if row["name"] == ALONE else f"{row['difference']:.2f}" if row["same_frames"] else "OTHER FRAMES"
        lines.append((row["name"], *measure.speed(row), f"{1000 * row['cpu_s']:.1f}", same))
    for row in found["processes"]:
        lines.append((f"ours, {row['name']}", *measure.speed(row), "", ""))
    columns = ("", "clips/s", "quartiles", "times ours", "CPU ms a clip", "difference")
    share = found["ffmpeg_share_of_ours"]
    measure.show(
        f"{kind}, {found['kbit_per_s']:.0f} kbit/s; of our time {share['decoder']:.0%} is FFmpeg's decoder and "
        f"{share['swscale']:.0%} swscale; same frames differ by < {SAME_BELOW:g} (one off: {found['one_off']:.1f})",
        columns,
        lines,
    )
