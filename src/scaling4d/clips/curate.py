"""Curation: a folder of any videos in; shards of clips, and a table of what was rejected and why, out.

Workers inspect one source at a time (`inspection`). This process does what needs all of them (duplicates, splits, order
of the shards), in an order that depends on the files alone: any number of workers writes the same bytes. With a cache,
a run with more videos, or after a crash, works on the new ones alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from scaling4d import video
from scaling4d.clips.cluster import dask_client, run_jobs
from scaling4d.clips.datasheet import croissant, datasheet, datasheet_svg
from scaling4d.clips.duplicates import SPLITS, RejectedFile, SelectedClip, rejection_order, select_clips
from scaling4d.clips.inspection import Frames, Inspection, encode_clips, hash_sources, inspect_video
from scaling4d.clips.settings import CurationConfig, WorkersConfig
from scaling4d.clips.shards import read_previous, write_shards, write_tables
from scaling4d.clips.sources import UNREADABLE, Rejection, SourceFile, list_sources, printable_path
from scaling4d.records import UserError, on_one_line, write_json

LIBRARIES = ("av", "imagehash", "numpy", "pillow", "scenedetect-headless")  # that an inspection depends on
TIMEOUT_S = 60.0  # while another run writes into the same cache
HASHES_PER_JOB = 32  # sources in one job: a hash is little work
# Settings on which the inspection of a video does not depend.
NOT_OF_INSPECTION = ("side_px", "crf", "encode", "listed", "hash_bits", "val_share", "shard_bytes")


def curate(
    videos: Path,
    out: Path,
    config: CurationConfig,
    workers: WorkersConfig,
    *,
    previous: Path | None = None,
    cache: Path | None = None,
) -> str:
    """Write shards/*.tar, clips.parquet, rejected.parquet, datasheet.json and .svg, croissant.json into a folder.

    previous: output of an earlier run; clips that would be encoded again from the same frames are copied from it.
    cache: folder that keeps the inspection of each video for the next run. Neither changes the result.
    Returns sha256 over the names and contents of all sources.
    Raises UserError: no such folder, nothing in it, nothing usable in it, or no answer from the cluster.
    """
    sources = list_sources(videos, config.listed)
    encoded, shards = (out / "parts").resolve(), out / "shards"
    encoded.mkdir()
    with dask_client(workers) as client:
        inspections = _inspect_all(client, videos, sources, config, cache)
        clips, rejected = select_clips(inspections, config)
        _check_usable(clips, rejected, videos)
        if config.encode:
            crashed = _encode_all(client, videos, clips, config, encoded, previous, cache)
            clips = [clip for clip in clips if clip.inspection.path not in crashed]
            rejected = sorted([*rejected, *crashed.items()], key=rejection_order)
            _check_usable(clips, rejected, videos)
    shards.mkdir()
    write_tables(write_shards(clips, videos, encoded, shards, config), rejected, out)
    shutil.rmtree(encoded)  # with parts of workers that were killed
    sheet = datasheet(out)
    write_json(out / "datasheet.json", sheet)
    (out / "datasheet.svg").write_text(datasheet_svg(sheet))
    write_json(out / "croissant.json", croissant(out, sheet, encoded=config.encode))
    names = (f"{printable_path(inspection.path)}\0{inspection.sha256}\n" for inspection in inspections)
    return hashlib.sha256("".join(names).encode()).hexdigest()


def dry_run(
    videos: Path, config: CurationConfig, workers: WorkersConfig, *, cache: Path | None = None, list_files: bool = False
) -> None:
    """Print how many sources `curate` would use, and the rest by reason; write to `cache` alone.

    list_files: print each source before.
    """
    sources = list_sources(videos, config.listed)
    with dask_client(workers) as client:
        inspections = _inspect_all(client, videos, sources, config, cache)
    clips, rejected = select_clips(inspections, config)
    if list_files:
        counts = Counter((clip.inspection.path, clip.split) for clip in clips)
        for (path, split), number in sorted(counts.items()):
            print(f"use     {on_one_line(path)}: {number} clips for {split}")
        for path, why in rejected:
            where = "reject " if why.start_s is None else f"  not   {why.start_s:.2f} to {why.end_s:.2f} s of"
            print(f"{where} {on_one_line(path)}: {on_one_line(why.reason + (why.detail and f' ({why.detail})'))}")
    used = len({clip.inspection.path for clip in clips})
    where = on_one_line(videos)
    print(f"{len(inspections)} files in {where}: {used} used for {len(clips)} clips, {len(inspections) - used} rejected")
    for kind, spans in (("files", False), ("stretches of videos", True)):
        for reason, number in Counter(why.reason for _, why in rejected if (why.start_s is not None) == spans).most_common():
            print(f"rejected {kind}: {number} {reason}")
    _check_usable(clips, rejected, videos)


def _inspect_all(
    client: Any, videos: Path, sources: list[SourceFile], config: CurationConfig, cache: Path | None
) -> list[Inspection]:
    """In the order of `sources`. A source whose worker process dies again and again is rejected."""
    folder = videos.resolve()
    hashes: dict[SourceFile, str | Rejection | None] = {source: source.refused for source in sources}
    readable = [source for source in sources if source.refused is None]
    groups = [readable[start : start + HASHES_PER_JOB] for start in range(0, len(readable), HASHES_PER_JOB)]
    jobs = ((folder, group) for group in groups)
    for number, future in run_jobs(client, hash_sources, jobs, "reading files", total=len(groups)):
        hashes.update(zip(groups[number], future.result(), strict=True))
    keys = {source: f"{sha256} {source.stretches}" for source, sha256 in hashes.items() if isinstance(sha256, str)}

    settings = {name: value for name, value in asdict(config).items() if name not in NOT_OF_INSPECTION}
    with open_cache(cache, "inspections", settings) as known:
        unknown: dict[str, SourceFile] = {}  # the first source of each key
        for source, key in keys.items():
            if known.get(key) is None:
                unknown.setdefault(key, source)
        unknown_keys, failed = list(unknown), {}  # failures are not cached: another run may succeed
        jobs = ((folder, source, hashes[source], config) for source in unknown.values())
        for number, future in run_jobs(client, inspect_video, jobs, "looking at videos", total=len(unknown)):
            key, error = unknown_keys[number], future.exception()
            rejected = (Rejection("decoding crashes", _one_line(error)),) if error else future.result().rejected
            if error or any(why.reason == UNREADABLE for why in rejected):
                failed[key] = rejected
            else:
                known.set(key, asdict(future.result()))
        inspections = []
        for source, sha256 in hashes.items():
            if isinstance(sha256, Rejection):
                inspections.append(Inspection(source, "", None, (), (sha256,)))
            elif (key := keys[source]) in failed:
                inspections.append(Inspection(source, sha256, None, (), failed[key]))
            else:
                inspections.append(Inspection.from_json(known.get(key), source))
        return inspections


def _encode_all(
    client: Any, videos: Path, clips: list[SelectedClip], config: CurationConfig, out: Path, old: Path | None, cache: Path | None
) -> dict[str, Rejection]:
    """Write every clip to `out/<id>.mp4`, as a copy of an earlier run's, in `old`, where that has the same bytes.

    Returns why not, by path: of sources whose worker process dies again and again.
    """
    crashed: dict[str, Rejection] = {}
    settings = {"side_px": config.side_px, "crf": config.crf, "rate_hz": config.rate_hz}
    with open_cache(cache, "clips", settings) as known:
        places = read_previous(old) if old is not None else {}
        remaining: dict[SourceFile, dict[str, Frames]] = {}  # frames by clip id
        keys: dict[str, str] = {}  # by clip id
        for clip in clips:
            key = f"{clip.inspection.sha256} {' '.join(map(str, clip.clip.frames))}"
            content, sha256 = None, known.get(key)
            if clip.id in places and sha256 is not None:
                with suppress(OSError, ValueError), places[clip.id].path.open("rb") as shard:
                    shard.seek(places[clip.id].offset)
                    content = shard.read(places[clip.id].bytes)
            if content is not None and hashlib.sha256(content).hexdigest() == sha256:
                (out / f"{clip.id}.mp4").write_bytes(content)
            else:
                remaining.setdefault(clip.inspection.source, {})[clip.id] = clip.clip.frames
                keys[clip.id] = key
        sources = sorted(remaining, key=lambda source: source.path)
        jobs = ((videos.resolve(), source, remaining[source], config, out) for source in sources)
        for number, future in run_jobs(client, encode_clips, jobs, "cutting clips", total=len(sources)):
            path, error = sources[number].path, future.exception()
            if isinstance(error, OSError):
                raise UserError(f"cutting {printable_path(path)}: {error}; run again when this is mended, finished work is kept")
            if isinstance(error, UserError):
                raise error
            if error is not None:
                crashed[path] = Rejection("cutting crashes", _one_line(error))
            else:
                for name, sha256 in future.result().items():
                    known.set(keys[name], sha256)
    return crashed


def _check_usable(clips: list[SelectedClip], rejected: list[RejectedFile], videos: Path) -> None:
    if not clips:
        reasons = Counter(why.reason for _, why in rejected if why.start_s is None)
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
        raise UserError(f"none of the {reasons.total()} files in {videos} can be used ({why}); see `scaling4d clips --dry --all`")
    if len({clip.split for clip in clips}) < len(SPLITS):
        raise UserError(f"{videos} holds one usable video or copies of one; needed two different ones, to train and to validate")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# ---- results of earlier runs ----


class Cache:
    """A table of JSON values by name, in an SQLite file. An entry survives a later crash of the process."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database

    def get(self, name: str) -> Any:
        """None: no such entry."""
        row = self.database.execute("SELECT value FROM entries WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set(self, name: str, value: Any) -> None:
        """Bytes become hexadecimal digits."""
        with self.database:
            self.database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (name, json.dumps(value, default=bytes.hex)))


@contextmanager
def open_cache(folder: Path | None, kind: str, settings: Mapping[str, Any]) -> Iterator[Cache]:
    """Open the cache of `kind` in a folder. A damaged one is begun anew.

    folder: None: a temporary cache. settings: that an entry depends on, beside its name, the code and the libraries.
    Raises UserError: another process holds the file, the disk is full, or its file system cannot lock files.
    """
    path = ""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        libraries = {name: metadata.version(name) for name in LIBRARIES}
        depends_on = {"settings": settings, "ffmpeg": video.VERSIONS, "libraries": libraries}
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        path = folder / f"{kind}-{key}.sqlite"
    try:
        with closing(_connect(path)) as database:
            yield Cache(database)
    except sqlite3.OperationalError as error:
        needed = "needed a folder on a disk with room, and no other run at work there"
        raise UserError(f"{path or 'a temporary database'}: {error}; {needed}") from error


def _connect(path: Path | str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=TIMEOUT_S)
    try:
        if (problem := database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(problem)
        database.execute("PRAGMA synchronous = OFF")  # entries that a crash of the machine loses are computed anew
        database.execute("CREATE TABLE IF NOT EXISTS entries (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        return database
    except sqlite3.DatabaseError as error:
        database.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        warnings.warn(f"{path} is damaged ({' '.join(str(error).split())}); its entries are computed anew", stacklevel=5)
    Path(path).unlink()
    return _connect(path)
