"""A folder of any videos in; shards of clips, and a table of what was rejected and why, out.

Workers look at one file at a time (`examine`); what needs all of them at once (duplicates, the split, the order of the shards)
happens here, in an order that depends on the files alone, so that any number of workers writes the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling4d.clips.examine import HASHED, Clip, Curation, Finding, Rejection, cut, examine
from scaling4d.records import UserError, write_json

SPLITS = ("train", "val")
CONNECT_S = 5  # to a running scheduler


@dataclass(frozen=True)
class Chosen:
    """One clip that will be written."""

    id: str
    split: str
    source: Finding
    clip: Clip


def curate(videos: Path, out: Path, curation: Curation) -> str:
    """Fill the folder `out` with `shards/*.tar`, `clips.parquet`, `rejected.parquet` and `datasheet.json`.

    Returns:
        sha256 over the names and contents of all files found.
    Raises:
        UserError: there is no such folder, it is empty, nothing in it can be used, or the cluster does not answer.
    """
    paths = walk(videos)
    parts = (out / "parts").resolve()
    parts.mkdir()
    with workers(curation) as client:
        findings = _examine_all(client, videos, paths, curation)
        chosen, rejected = choose(findings, curation)
        _usable(chosen, videos, rejected)
        by_source: dict[str, dict[str, tuple[int, ...]]] = {}
        for item in chosen:
            by_source.setdefault(item.source.path, {})[item.id] = item.clip.frames
        jobs = [(videos.resolve(), path, clips, curation, parts) for path, clips in sorted(by_source.items())]
        for _, future in _finish(client, cut, jobs, "cutting clips"):
            future.result()
    rows = _shards(chosen, parts, out / "shards", curation)
    parts.rmdir()
    _write_clips(rows, out / "clips.parquet")
    _write_rejected(rejected, out / "rejected.parquet")
    write_json(out / "datasheet.json", datasheet(findings, chosen, rejected, curation))
    return hashlib.sha256("".join(f"{_text(f.path)}\0{f.sha256}\n" for f in findings).encode()).hexdigest()


def dry(videos: Path, curation: Curation) -> None:
    """Print what `curate` would use, and why not the rest; write nothing."""
    paths = walk(videos)
    with workers(curation) as client:
        findings = _examine_all(client, videos, paths, curation)
    chosen, rejected = choose(findings, curation)
    counts = Counter((item.source.path, item.split) for item in chosen)
    for (path, split), clips in sorted(counts.items()):
        print(f"use     {_text(path)}: {clips} clips for {split}")
    for path, why in rejected:
        where = "reject " if why.start_s is None else f"  not   {why.start_s:.2f} to {why.end_s:.2f} s of"
        print(f"{where} {_text(path)}: {why.reason}{why.detail and f' ({why.detail})'}")
    used = len({item.source.path for item in chosen})
    print(f"{len(findings)} files: {used} used for {len(chosen)} clips, {len(findings) - used} rejected")
    _usable(chosen, videos, rejected)


def walk(videos: Path) -> list[str]:
    """Every entry below `videos` that is not a folder, hidden ones too, as sorted relative paths."""
    if not videos.is_dir():
        raise UserError(f"no folder {videos}; run `dvc repro data.dvc`, or name your own data with `scaling4d data use PATH`")
    found = []
    for folder, inner, files in os.walk(videos):
        links = [name for name in inner if os.path.islink(os.path.join(folder, name))]
        found += [Path(folder, name).relative_to(videos).as_posix() for name in files + links]
    if not found:
        raise UserError(f"{videos} holds no files; put videos there, or name your own data with `scaling4d data use PATH`")
    return sorted(found)


@contextmanager
def workers(curation: Curation) -> Iterator[Any]:
    """A Dask client of the running scheduler `cluster`, or of as many one-thread processes as `workers` says."""
    from distributed import Client, LocalCluster

    if curation.cluster:
        try:
            running = Client(curation.cluster, timeout=CONNECT_S)
        except (OSError, ValueError) as error:
            raise UserError(f"no Dask scheduler answers at {curation.cluster!r} ({error}); set clips.Curation.cluster") from error
        with running as client:
            yield client
        return
    local = LocalCluster(
        n_workers=curation.workers,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address=None,
        worker_dashboard_address=None,
        memory_limit=0,
        silence_logs=logging.CRITICAL,
    )
    with local, Client(local) as client:
        yield client


def _finish(client: Any, work: Callable, jobs: list[tuple], title: str) -> Iterator[tuple[int, Any]]:
    """(index of the job, its future) as they end, with a progress bar on stderr."""
    from distributed import as_completed
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task(title, total=len(jobs))
        futures = {client.submit(work, *job, pure=False): index for index, job in enumerate(jobs)}
        for future in as_completed(list(futures)):
            yield futures[future], future
            progress.advance(bar)


def _examine_all(client: Any, videos: Path, paths: list[str], curation: Curation) -> list[Finding]:
    """In the order of `paths`. A file that ends its worker process again and again is rejected, not fatal."""
    findings: list[Any] = [None] * len(paths)
    for index, future in _finish(client, examine, [(videos.resolve(), path, curation) for path in paths], "looking at videos"):
        error = future.exception()
        if error is None:
            findings[index] = future.result()
        else:
            why = Rejection("decoding crashes", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            findings[index] = Finding(paths[index], "", None, (), (why,))
    return findings


def choose(findings: list[Finding], curation: Curation) -> tuple[list[Chosen], list[tuple[str, Rejection]]]:
    """Remove duplicates and assign splits by source.

    Returns:
        the clips, sorted by id; (path, why not) sorted by path, whole files first. Every file is in exactly one: a file
        without a clip has one row for the whole of it.
    """
    rejected = [(finding.path, why) for finding in findings for why in finding.rejected]
    first: dict[str, Finding] = {}
    for finding in findings:
        if finding.clips and finding.sha256 in first:
            rejected.append((finding.path, Rejection("duplicate", f"the same bytes as {_text(first[finding.sha256].path)}")))
        elif finding.clips:
            first[finding.sha256] = finding
    kept, like = distinct(list(first.values()), curation.hash_bits)
    for finding, clip, other, twin in like:
        detail = f"like {_text(other.path)} from {twin.start_s:.2f} s"
        rejected.append((finding.path, Rejection("near duplicate", detail, clip.start_s, clip.end_s)))
    split = splits(list(first.values()), [(finding.sha256, other.sha256) for finding, _, other, _ in like], curation.val_share)
    chosen = [
        Chosen(f"{finding.sha256[:16]}-{finding.clips.index(clip):05d}", split[finding.sha256], finding, clip)
        for finding, clip in kept
    ]
    used = {item.source.path for item in chosen}
    used, whole = {item.source.path for item in chosen}, {path for path, why in rejected if why.start_s is None}
    for path in sorted({finding.path for finding in findings} - used - whole):
        spans = [why for other, why in rejected if other == path]
        if len(spans) == 1:
            rejected.remove((path, spans[0]))
        rejected.append((path, _overall(spans)))
    rejected.sort(key=lambda row: (row[0], row[1].start_s is not None, row[1].start_s or 0.0, row[1].reason))
    whole_files = {path for path, why in rejected if why.start_s is None}
    assert used.isdisjoint(whole_files) and used | whole_files == {finding.path for finding in findings}
    return sorted(chosen, key=lambda item: item.id), rejected


def _overall(spans: list[Rejection]) -> Rejection:
    """Why a file as a whole is not used: the reason that takes most of its time."""
    seconds: Counter[str] = Counter()
    for span in spans:
        seconds[span.reason] += span.end_s - span.start_s
    reason = max(sorted(seconds), key=seconds.__getitem__)
    if len(spans) == 1:
        return Rejection(reason, spans[0].detail or f"{spans[0].start_s:.2f} to {spans[0].end_s:.2f} s")
    return Rejection(reason, f"{len(spans)} spans, see their rows")


def distinct(
    findings: Iterable[Finding], bits: int
) -> tuple[list[tuple[Finding, Clip]], list[tuple[Finding, Clip, Finding, Clip]]]:
    """Keep one of every set of clips whose hashes differ in at most `bits` bits; the largest picture, then the first path.

    A hash is cut into bits + 1 bands: two hashes that close agree in one band at least, so only clips that share a band are
    compared, and none is missed.
    Returns:
        (source, clip) kept; (source, clip, the source and clip it is like) removed.
    """
    order = sorted(
        ((finding, clip) for finding in findings for clip in finding.clips),
        key=lambda item: (-min(item[0].video.height_px, item[0].video.width_px), item[0].path, item[1].start_s),
    )
    edges = np.linspace(0, 64 * HASHED, bits + 2).astype(int)
    buckets: dict[tuple[int, bytes], list[int]] = {}
    kept, removed = [], []
    hashes: list[np.ndarray] = []
    for finding, clip in order:
        mine = np.unpackbits(np.frombuffer(clip.phash, dtype=np.uint8))
        bands = [(band, mine[start:end].tobytes()) for band, (start, end) in enumerate(zip(edges, edges[1:], strict=False))]
        near = sorted({index for band in bands for index in buckets.get(band, ())})
        distance = (np.stack([hashes[index] for index in near]) != mine).sum(1) if near else np.empty(0)
        if (distance <= bits).any():
            removed.append((finding, clip, *kept[near[int(np.argmax(distance <= bits))]]))
            continue
        for band in bands:
            buckets.setdefault(band, []).append(len(kept))
        kept.append((finding, clip))
        hashes.append(mine)
    return kept, removed


def splits(findings: list[Finding], linked: list[tuple[str, str]], val_share: float) -> dict[str, str]:
    """`train` or `val` by source sha256. Sources that share a near duplicate go together; the hash of the content decides.

    If chance leaves a side empty, the group next to the border crosses it, so that two groups or more always give both.
    """
    group = {finding.sha256: finding.sha256 for finding in findings}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for one, other in linked:
        low, high = sorted((root(one), root(other)))
        group[high] = low
    place = {name: int(hashlib.sha256(f"split {name}".encode()).hexdigest()[:13], 16) / 16**13 for name in map(root, group)}
    val = {name for name, at in place.items() if at < val_share}
    if len(place) > 1 and not val:
        val = {min(place, key=place.__getitem__)}
    if len(place) > 1 and len(val) == len(place):
        val.remove(max(place, key=place.__getitem__))
    return {name: "val" if root(name) in val else "train" for name in group}


def _usable(chosen: list[Chosen], videos: Path, rejected: list[tuple[str, Rejection]]) -> None:
    if not chosen:
        reasons = Counter(why.reason for _, why in rejected if why.start_s is None)
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
        raise UserError(f"none of the {reasons.total()} files in {videos} can be used ({why}); see `scaling4d clips --dry`")
    if len({item.split for item in chosen}) < len(SPLITS):
        raise UserError(f"{videos} holds one usable video or copies of one; needed two different ones, to train and to validate")


def _shards(chosen: list[Chosen], parts: Path, out: Path, curation: Curation) -> list[dict[str, Any]]:
    """Write `<split>-00000.tar ...` (WebDataset: `<id>.mp4`, `<id>.json`), the clips in order of their ids; the parts go."""
    out.mkdir()
    rows = []
    for split in SPLITS:
        mine = [item for item in chosen if item.split == split]
        number = 0
        while mine:
            name = f"{split}-{number:05d}.tar"
            with tarfile.open(out / name, "w", format=tarfile.USTAR_FORMAT) as tar:
                while mine and tar.offset < curation.shard_bytes:
                    item = mine.pop(0)
                    row = _row(item, curation) | {"shard": name}
                    part = parts / f"{item.id}.mp4"
                    row |= {"offset": tar.offset + tarfile.BLOCKSIZE, "bytes": part.stat().st_size}
                    _add(tar, f"{item.id}.mp4", part.read_bytes())
                    told = {key: row[key] for key in ("id", "source", "source_sha256", "start_s", "rate_hz", "frames")}
                    _add(tar, f"{item.id}.json", json.dumps(told, sort_keys=True).encode())
                    part.unlink()
                    rows.append(row)
            number += 1
    return rows


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # time 0, owner 0
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _row(item: Chosen, curation: Curation) -> dict[str, Any]:
    source = item.source.video
    return {
        "id": item.id,
        "split": item.split,
        "source": _text(item.source.path),
        "source_sha256": item.source.sha256,
        "start_s": item.clip.start_s,
        "rate_hz": float(curation.rate_hz),
        "frames": curation.frames,
        "codec": source.codec,
        "source_height_px": source.height_px,
        "source_width_px": source.width_px,
        "source_rate_hz": source.rate_hz,
        "source_duration_s": source.duration_s,
        "source_rotation_deg": source.rotation_deg,
        "phash": item.clip.phash.hex(),
    }


def _write_clips(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def _write_rejected(rejected: list[tuple[str, Rejection]], path: Path) -> None:
    """One row a file (`scope` file) or a span of it (`scope` span, its start and end first in `detail`)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for file, why in rejected:
        span = why.start_s is not None
        where = f"{why.start_s:.3f} to {why.end_s:.3f} s" if span else ""
        detail = ": ".join(filter(None, [where, why.detail]))
        rows.append({"path": _text(file), "reason": why.reason, "detail": detail, "scope": "span" if span else "file"})
    schema = pa.schema([(name, pa.string()) for name in ("path", "reason", "detail", "scope")])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def datasheet(
    findings: list[Finding], chosen: list[Chosen], rejected: list[tuple[str, Rejection]], curation: Curation
) -> dict[str, Any]:
    """What the corpus is, in numbers: found = used + rejected."""
    used = {item.source.path: item.source.video for item in chosen}
    clips = Counter(item.split for item in chosen)
    clip_s = curation.frames / curation.rate_hz
    whole = Counter(why.reason for _, why in rejected if why.start_s is None)
    assert len(findings) == len(used) + whole.total()
    return {
        "files": {"found": len(findings), "used": len(used), "rejected": whole.total()},
        "rejected_files": dict(whole),
        "rejected_spans": dict(Counter(why.reason for _, why in rejected if why.start_s is not None)),
        "clips": dict(clips),
        "hours": {split: clips[split] * clip_s / 3600 for split in SPLITS},
        "sources": {split: len({item.source.path for item in chosen if item.split == split}) for split in SPLITS},
        "histograms": {
            "codec": dict(Counter(video.codec for video in used.values())),
            "rotation_deg": dict(Counter(str(video.rotation_deg) for video in used.values())),
            "shorter_side_px": _histogram(
                (min(v.height_px, v.width_px) for v in used.values()), (0, 64, 128, 240, 360, 720, 1080)
            ),
            "rate_hz": _histogram((v.rate_hz for v in used.values()), (0, 8, 12, 16, 24, 30, 60)),
            "duration_s": _histogram((v.duration_s for v in used.values()), (0, 1, 2, 5, 10, 30, 60, 300, 3600)),
            "clips_per_source": _histogram(Counter(i.source.path for i in chosen).values(), (1, 2, 3, 5, 10, 100, 1000)),
        },
    }


def _histogram(values: Iterable[float], edges: tuple[float, ...]) -> dict[str, int]:
    """How many values lie in each range [edge, next edge), the last one open."""
    places = Counter(np.searchsorted(edges, list(values), side="right").tolist())
    names = [f"{low} to {high}" for low, high in zip(edges, edges[1:], strict=False)] + [f"{edges[-1]} and more"]
    return {name: places[place + 1] for place, name in enumerate(names)}


def _text(path: str) -> str:
    """A file name as text; bytes that are not Unicode are spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
