"""`scaling4d bench curate`: files a second, memory at two sizes, a second run with 1 % more files, paper calculation.

The paper calculation multiplies the measured rates up to the papers' corpus (170 million videos, arXiv:2412.15212).
"""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scaling4d import seeds
from scaling4d.clips import curate
from scaling4d.clips.cluster import dask_client, run_jobs
from scaling4d.clips.duplicates import remove_near_duplicates
from scaling4d.clips.inspection import Clip, Inspection
from scaling4d.clips.settings import CurationConfig
from scaling4d.clips.sources import SourceFile
from scaling4d.records import UserError, Video, write_json
from scaling4d_bench import measure, videos
from scaling4d_bench.measure import SEED, Measurements

SIZE_PX, SECONDS = (240, 320), 8.0  # of the videos; height, width
SAMPLE_S = 0.1  # between two samples of the memory
FILES, MORE, EXTRA = 200, 2000, 20  # videos of the small and the large run, and of those added before the second run
HASHES = 32_768  # random ones, to measure the search for duplicates
TASKS = 2_000  # without work, to measure the scheduler
TASKS_PER_VIDEO = 2 + 1 / curate.HASHES_PER_JOB  # inspect, encode, and a share of one that hashes
LIBRARIES = ("av", "dask", "distributed", "imagehash", "numpy", "pyarrow", "scenedetect-headless")
VIDEOS, VIDEO_S, CORES = 170_000_000, 10.0, (1_000, 10_000)  # of the paper calculation
HASH_BYTES = 32  # of a clip: 4 frames of 64 bits
COLUMNS = {
    "": "{name}",
    "seconds": "{seconds:.1f}",
    "files/s": "{files_per_s:.2f}",
    "clips": "{clips}",
    "peak of main, MiB": "{main_mib:.0f}",
    "of a worker, MiB": "{worker_mib:.0f}",
}


def bench(out: Path) -> Path:
    """Make videos, curate FILES of them, then MORE, then EXTRA more; print tables, write `<out>/curate.json`."""
    curation = videos.curation()
    settings = {"files": FILES, "more": MORE, "extra": EXTRA, "seconds": SECONDS, "size_px": list(SIZE_PX)}
    settings |= {"hashes": HASHES, "tasks": TASKS, "curation": curation, "workers": measure.cores()}
    measurements = Measurements("curate", settings, LIBRARIES)
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch, "made", f"{number:06d}.mp4") for number in range(MORE + EXTRA)]
        with ProcessPoolExecutor(measure.cores(), get_context("spawn")) as pool:
            make = partial(videos.write, seconds=SECONDS, size_px=SIZE_PX)
            list(pool.map(make, paths, range(SEED, SEED + len(paths)), chunksize=8))
        small, large = Path(scratch, "small"), Path(scratch, "large")
        first = run_curation(small, paths[:FILES], curation, previous=None)
        second = run_curation(large, paths[:MORE], curation, previous=None)
        again = run_curation(Path(scratch, "again"), paths, curation, previous=large)
        tasks_per_s = measure_scheduler()
    rows = [first, second, again]
    search = measure_search(curation.hash_bits)
    new, grown = (second["files"] - first["files"]), {key: second[key] - first[key] for key in ("seconds", "clips", "peak_main")}
    rates = {  # from the difference of two sizes, so that starting the cluster does not count
        "core_s_per_video_s": grown["seconds"] * measure.cores() / (new * SECONDS),
        "clips_per_video_s": grown["clips"] / (new * SECONDS),
        "bytes_per_clip": second["clip_bytes"] / second["clips"],
        "tasks_per_video": TASKS_PER_VIDEO,
        "tasks_per_s": tasks_per_s,
        "dedupe_bytes_per_clip": search["bytes_per_clip"],
        "comparisons_per_s": search["comparisons_per_s"],
        "hash_bits": curation.hash_bits,
        "main_bytes_per_video": grown["peak_main"] / new,
    }
    paper = extrapolate(rates, videos=VIDEOS, video_s=VIDEO_S, cores=CORES)
    names = (f"{FILES} files", f"{MORE} files", f"{EXTRA} files added")
    measurements.raw["seconds"] = {name: [row["seconds"]] for name, row in zip(names, rows, strict=True)}
    share = again["seconds"] / second["seconds"]
    results = {"rows": rows, "second_run_of_first": share, "duplicates": search, "measured": rates, "paper": paper}
    measurements.results.update(results)
    lines = []
    for number, row in enumerate(rows):
        mib = {"main_mib": row["peak_main"] / 2**20, "worker_mib": row["peak_worker"] / 2**20}
        name = f"{row['files']} files" + (", all but the last 1 % known" if number == 2 else "")
        lines.append(row | mib | {"name": name, "files_per_s": row["files"] / row["seconds"]})
    measure.table(f"curation with {measure.cores()} workers", lines, COLUMNS)
    print(f"the second run took {share:.1%} of the first")
    lines = [{"name": name, "value": f"{value:,.0f}" if value >= 100 else f"{value:.3g}"} for name, value in paper.items()]
    title = f"paper calculation: {VIDEOS:,} videos of {VIDEO_S:g} s, at the rates above"
    measure.table(title, lines, {"": "{name}", "comes to": "{value}"})
    return measurements.write(out)


def run_curation(folder: Path, paths: Sequence[Path], curation: CurationConfig, *, previous: Path | None) -> dict[str, Any]:
    """One curation in a process of its own: seconds, files, clips, bytes of clips, and peaks of memory.

    Args:
        previous: folder of an earlier run, whose clips and cache it may reuse.
    """
    sources = folder / "videos"
    sources.mkdir(parents=True)
    for path in paths:
        (sources / path.name).hardlink_to(path)
    earlier, cache = (previous / "out", previous / "cache") if previous else (None, folder / "cache")
    process = get_context("spawn").Process(target=_curate, args=(folder, curation, earlier, cache))
    process.start()
    peaks: dict[int, int] = {}
    while process.is_alive():
        for pid, (_, peak) in measure.process_memory(process.pid).items():
            peaks[pid] = max(peaks.get(pid, 0), peak)
        process.join(SAMPLE_S)
    if process.exitcode:
        raise UserError(f"curation of {sources} ended with exit code {process.exitcode}; its message is above")
    peak_main = peaks.pop(process.pid)
    return json.loads((folder / "run.json").read_text()) | {"peak_main": peak_main, "peak_worker": max(peaks.values())}


def _curate(folder: Path, curation: CurationConfig, earlier: Path | None, cache: Path) -> None:
    import pyarrow.parquet as pq

    sources, out = folder / "videos", folder / "out"
    out.mkdir()
    start = time.perf_counter()
    curate.curate(sources, out, curation, videos.workers(), previous=earlier, cache=cache)
    seconds = time.perf_counter() - start
    sizes = pq.read_table(out / "clips.parquet", columns=["bytes"])["bytes"].to_pylist()
    files = len(list(sources.iterdir()))
    write_json(folder / "run.json", {"seconds": seconds, "files": files, "clips": len(sizes), "clip_bytes": sum(sizes)})


def extrapolate(rates: Mapping[str, float], *, videos: int, video_s: float, cores: Sequence[int]) -> dict[str, float]:
    """Products of the rates: twice as much takes twice as long (comparisons: four times).

    Args:
        rates: core_s_per_video_s: core-seconds to curate a second of video. clips_per_video_s, bytes_per_clip: of its
            output. tasks_per_video, tasks_per_s: of the scheduler. dedupe_bytes_per_clip: memory of the search for
            duplicates beside the hash. comparisons_per_s: of two hashes, one core. hash_bits: largest difference of two
            near duplicates. main_bytes_per_video: growth of the main process.
    """
    core_s, clips = videos * video_s * rates["core_s_per_video_s"], videos * video_s * rates["clips_per_video_s"]
    pairs = comparisons(clips, rates["hash_bits"])
    paper = {
        "core-hours": core_s / 3600,
        "clips": clips,
        "storage, TB": clips * rates["bytes_per_clip"] / 1e12,
        "hashes, GB": clips * HASH_BYTES / 1e9,
        "memory to find duplicates, GB": clips * (HASH_BYTES + rates["dedupe_bytes_per_clip"]) / 1e9,
        "memory of the main process, GB": videos * rates["main_bytes_per_video"] / 1e9,
        "comparisons of hashes": pairs,
        "core-hours of comparing": pairs / rates["comparisons_per_s"] / 3600,
        "scheduler: tasks/s it was seen to hand out": rates["tasks_per_s"],
    }
    for count in cores:
        paper[f"{count:,} cores: days"] = core_s / count / 86400
        paper[f"{count:,} cores: tasks/s"] = videos * rates["tasks_per_video"] / (core_s / count)
    return paper


def comparisons(clips: float, hash_bits: int) -> float:
    """Number of pairs that share one of hash_bits + 1 bands, for random hashes (see clips/duplicates.py)."""
    bands = hash_bits + 1
    return clips**2 / 2 * bands / 2 ** (8 * HASH_BYTES / bands)


def measure_search(bits: int) -> dict[str, float]:
    """Memory beside the hashes, and comparisons a second, of `remove_near_duplicates` with random hashes."""
    draw = seeds.numpy_rng(SEED, "bench hashes").bytes(HASHES * HASH_BYTES)
    source = Video(path="", sha256="", codec="", duration_s=1.0, rate_hz=1.0, height_px=1, width_px=1, rotation_deg=0)
    clips = [Clip(0.0, 0.0, (), draw[at : at + HASH_BYTES]) for at in range(0, len(draw), HASH_BYTES)]
    inspections = [Inspection(SourceFile(str(number)), "", source, (clip,), ()) for number, clip in enumerate(clips)]
    seconds = measure.timed(partial(remove_near_duplicates, inspections, bits))()
    tracemalloc.start()
    remove_near_duplicates(inspections, bits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rates = {"bytes_per_clip": peak / HASHES, "comparisons_per_s": comparisons(HASHES, bits) / seconds}
    return {"hashes": HASHES, "hash_bits": bits, "seconds": seconds, **rates}


def measure_scheduler() -> float:
    """Tasks without work a second, on a cluster of this machine."""
    workers = videos.workers()
    with dask_client(workers) as client:
        for _ in run_jobs(client, abs, [(0,)] * workers.processes, "starting", total=workers.processes):
            pass
        run = run_jobs(client, abs, ((number,) for number in range(TASKS)), "tasks without work", total=TASKS)
        return TASKS / measure.timed(lambda: [future.result() for _, future in run])()
