"""`scaling4d bench curate`: files a second, memory at two sizes, a second run with 1 % more files, and the paper calculation."""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from scaling4d import config, seeds
from scaling4d.clips import curate
from scaling4d.clips.cluster import finish, workers
from scaling4d.clips.duplicates import distinct
from scaling4d.clips.examine import Clip, Curation, Finding
from scaling4d.records import UserError, Video, write_json
from scaling4d_bench import measure, videos
from scaling4d_bench.extrapolate import HASH_BYTES, Measured, comparisons, extrapolate

SIZE_PX = (240, 320)  # height, width
SECONDS = 8.0
GOP = 250
EVERY_S = 0.1  # between looks at the memory
MORE_SHARE = 0.01  # files added before the second run
HASHED = 32_768  # random hashes to measure the search for duplicates with
TASKS = 2_000  # that do nothing, to measure the scheduler with
TASKS_PER_VIDEO = 2 + 1 / curate.HASHED_TOGETHER  # examine, cut, and a share of one that hashes
LIBRARIES = ("av", "dask", "distributed", "imagehash", "numpy", "pyarrow", "scenedetect-headless")


def curation(**other: Any) -> Curation:
    """The settings of profile paper, but for those that are named."""
    values = config.section(config.compose(["profile=paper"]), "clips.Curation")
    return Curation(**values | other)


def bench(
    out: Path,
    *,
    files: int,
    more: int,
    repeats: int,
    seconds: float = SECONDS,
    size_px: tuple[int, int] = SIZE_PX,
    hashes: int = HASHED,
    tasks: int = TASKS,
    seed: int = 0,
) -> Path:
    """Make videos, curate `files` of them, then `more`, then 1 % more again; print tables, write `<out>/curate.json`."""
    if not 2 <= files < more:
        raise UserError(f"files is {files} and more is {more}; needed 2 or more files, and more than that")
    load = measure.busy()
    settings = curation(workers=measure.cores())
    extra = max(1, round(more * MORE_SHARE))
    with tempfile.TemporaryDirectory() as scratch:
        made = _make(Path(scratch, "made"), more + extra, seconds=seconds, size_px=size_px, seed=seed)
        runs: dict[str, list[dict[str, Any]]] = {}
        for repeat in range(repeats):
            for name, found in _runs(Path(scratch, f"repeat{repeat}"), made, files, more, settings).items():
                runs.setdefault(name, []).append(found)
        tasks_per_s = tasks / _do_nothing(settings, tasks)
    search = search_for_duplicates(hashes, bits=settings.hash_bits, seed=seed)
    first, second, again = (summary(found) for found in runs.values())
    measured = rates(first, second, search, seconds=seconds, tasks_per_s=tasks_per_s, settings=settings)
    found = {
        "rows": [first, second, again],
        "second_run_of_first": again["seconds"] / second["seconds"],
        "duplicates": search,
        "measured": asdict(measured),
        "paper": extrapolate(measured),
    }
    _show(found)
    told = {"files": files, "more": more, "extra": extra, "repeats": repeats, "seconds": seconds, "size_px": list(size_px)}
    told |= {"seed": seed, "load_before": load, "hashes": hashes, "tasks": tasks, "curation": measure.plain(settings)}
    raw = {"seconds": {name: [one["seconds"] for one in several] for name, several in runs.items()}}
    libraries = measure.versions(LIBRARIES)
    return measure.write("curate", out, settings=told, libraries=libraries, raw=raw, found=found, not_measured={})


def _make(folder: Path, count: int, *, seconds: float, size_px: tuple[int, int], seed: int) -> list[Path]:
    """Different videos, made on all cores."""
    folder.mkdir()
    make = partial(videos.make, seconds=seconds, height_px=size_px[0], width_px=size_px[1], gop=GOP)
    with ProcessPoolExecutor(measure.cores(), get_context("spawn")) as pool:
        paths = [folder / f"{number:06d}.mp4" for number in range(count)]
        return list(pool.map(make, paths, range(seed, seed + count), chunksize=8))


def _runs(scratch: Path, made: Sequence[Path], files: int, more: int, settings: Curation) -> dict[str, dict[str, Any]]:
    """Two sizes from nothing, and the larger one again after some files came."""
    scratch.mkdir()
    few, many = _linked(scratch / "few", made[:files]), _linked(scratch / "many", made[:more])
    found = {
        f"{files} files": _curate(few, scratch / "out few", settings, before=None, memory=scratch / "memory few"),
        f"{more} files": _curate(many, scratch / "out many", settings, before=None, memory=scratch / "memory many"),
    }
    _linked(many, made[more:])
    again = _curate(many, scratch / "out again", settings, before=scratch / "out many", memory=scratch / "memory many")
    return found | {f"{len(made) - more} files added": again}


def _linked(folder: Path, paths: Sequence[Path]) -> Path:
    folder.mkdir(exist_ok=True)
    for path in paths:
        (folder / path.name).hardlink_to(path)
    return folder


def _curate(videos_: Path, out: Path, settings: Curation, *, before: Path | None, memory: Path) -> dict[str, Any]:
    """One curation in a process of its own: seconds, files, clips, bytes of clips, and peaks of memory."""
    out.mkdir()
    told = out.with_suffix(".json")
    process = get_context("spawn").Process(target=_child, args=(videos_, out, settings, before, memory, told))
    process.start()
    with measure.memory(process.pid, every_s=EVERY_S) as samples:
        process.join()
    if process.exitcode:
        raise UserError(f"curation of {videos_} ended with exit code {process.exitcode}; its message is above")
    peaks = {"peak_main": max(s.peak_main for s in samples), "peak_worker": max(s.peak_below for s in samples)}
    return json.loads(told.read_text()) | peaks


def _child(videos_: Path, out: Path, settings: Curation, before: Path | None, memory: Path, told: Path) -> None:
    import pyarrow.parquet as pq

    start = time.perf_counter()
    curate.curate(videos_, out, settings, before=before, memory=memory)
    seconds = time.perf_counter() - start
    table = pq.read_table(out / "clips.parquet", columns=["bytes"])
    files, clips, size = len(list(videos_.iterdir())), table.num_rows, sum(table["bytes"].to_pylist())
    write_json(told, {"seconds": seconds, "files": files, "clips": clips, "clip_bytes": size})


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median time of equal runs and their largest peaks."""
    return runs[0] | {
        "seconds": float(np.median([run["seconds"] for run in runs])),
        "peak_main": max(run["peak_main"] for run in runs),
        "peak_worker": max(run["peak_worker"] for run in runs),
    }


def rates(
    first: dict[str, Any],
    second: dict[str, Any],
    search: dict[str, float],
    *,
    seconds: float,
    tasks_per_s: float,
    settings: Curation,
) -> Measured:
    """From the difference of the two sizes, so that starting the cluster does not count."""
    more = second["files"] - first["files"]
    return Measured(
        core_s_per_video_s=(second["seconds"] - first["seconds"]) * settings.workers / (more * seconds),
        clips_per_video_s=(second["clips"] - first["clips"]) / (more * seconds),
        bytes_per_clip=second["clip_bytes"] / second["clips"],
        tasks_per_video=TASKS_PER_VIDEO,
        tasks_per_s=tasks_per_s,
        dedupe_bytes_per_clip=search["bytes_per_clip"],
        comparisons_per_s=search["comparisons_per_s"],
        hash_bits=settings.hash_bits,
        main_bytes_per_video=(second["peak_main"] - first["peak_main"]) / more,
    )


def search_for_duplicates(count: int, *, bits: int, seed: int) -> dict[str, float]:
    """Memory beside the hashes, and comparisons a second, of `distinct` with random hashes."""
    draw = seeds.numpy(seed, "bench hashes").bytes(count * HASH_BYTES)
    source = Video(path="", sha256="", codec="", duration_s=1.0, rate_hz=1.0, height_px=1, width_px=1, rotation_deg=0)
    clips = [Clip(0.0, 0.0, (), draw[at : at + HASH_BYTES]) for at in range(0, len(draw), HASH_BYTES)]
    findings = [Finding(str(number), "", source, (clip,), ()) for number, clip in enumerate(clips)]
    start = time.perf_counter()
    kept, _ = distinct(findings, bits)
    seconds = time.perf_counter() - start
    del kept
    tracemalloc.start()
    distinct(findings, bits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "hashes": count,
        "hash_bits": bits,
        "seconds": seconds,
        "bytes_per_clip": peak / count,
        "comparisons_per_s": comparisons(count, bits) / seconds,
    }


def _do_nothing(settings: Curation, tasks: int) -> float:
    """Seconds that a cluster on this machine takes to hand out as many tasks."""
    with workers(replace(settings, cluster="")) as client:
        for _ in finish(client, _nothing, [(0,)] * settings.workers, "starting", total=settings.workers):
            pass
        start = time.perf_counter()
        for _, future in finish(client, _nothing, ((number,) for number in range(tasks)), "doing nothing", total=tasks):
            future.result()
        return time.perf_counter() - start


def _nothing(number: int) -> int:
    return number


def _show(found: dict[str, Any]) -> None:
    lines = [
        (
            f"{row['files']} files" + (", all but the last 1 % known" if number == 2 else ""),
            f"{row['seconds']:.1f}",
            f"{row['files'] / row['seconds']:.2f}",
            str(row["clips"]),
            f"{row['peak_main'] / 2**20:.0f}",
            f"{row['peak_worker'] / 2**20:.0f}",
        )
        for number, row in enumerate(found["rows"])
    ]
    columns = ("", "seconds", "files/s", "clips", "peak of main, MiB", "of a worker, MiB")
    measure.show(f"curation with {measure.cores()} workers", columns, lines)
    print(f"the second run took {found['second_run_of_first']:.1%} of the first")
    paper = [(name, f"{value:,.0f}" if value >= 100 else f"{value:.3g}") for name, value in found["paper"].items()]
    measure.show("paper calculation: 170,000,000 videos of 10 s, at the rates above", ("", "comes to"), paper)
