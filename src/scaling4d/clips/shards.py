"""The files of the corpus: shards/*.tar, clips.parquet and rejected.parquet, the same bytes for the same clips."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

from scaling4d import video
from scaling4d.clips.duplicates import SPLITS, RejectedFile, SelectedClip
from scaling4d.clips.settings import CurationConfig
from scaling4d.clips.sources import printable_path
from scaling4d.records import UserError
from scaling4d.video import FileSlice

MOST_BYTES = 2**30  # of an encoded clip
ROWS = 2**12  # of clips.parquet that are in memory
SOURCE_COLUMNS = ("height_px", "width_px", "rate_hz", "duration_s", "rotation_deg")  # of the source's header


def write_shards(clips: list[SelectedClip], videos: Path, encoded: Path, out: Path, config: CurationConfig) -> Iterator[dict]:
    """Write `<split>-00000.tar ...` in WebDataset's layout, in order of the ids. Yields rows of clips.parquet.

    `config.encode`: `<id>.mp4` of each clip, from the folder `encoded`, and `<id>.json`. Otherwise each source as it is
    and once, however many clips it gives: `<start of its sha256>.<suffix>` and `.json`.

    Raises UserError: a source changed since its inspection.
    """
    for split in SPLITS:
        groups: dict[str, list[SelectedClip]] = {}  # clips that share a file
        for clip in clips:
            if clip.split == split:
                groups.setdefault(clip.id if config.encode else clip.inspection.sha256, []).append(clip)
        with ExitStack() as open_tar:
            numbers, tar = count(), None
            for group in groups.values():
                if tar is None or tar.offset >= config.shard_bytes:
                    open_tar.close()
                    path = out / f"{split}-{next(numbers):05d}.tar"
                    tar = open_tar.enter_context(tarfile.open(path, "w", format=tarfile.GNU_FORMAT))
                inspected = group[0].inspection
                if config.encode:
                    name, suffix, file = group[0].id, ".mp4", encoded / f"{group[0].id}.mp4"
                else:
                    name, suffix = inspected.sha256[:16], os.path.splitext(inspected.path)[1].lower()
                    if not (suffix[1:].isascii() and suffix[1:].isalnum()) or suffix == ".json":  # the sidecar's
                        suffix = ""
                    file = inspected.source.location(videos)
                    if video.sha256(file) != inspected.sha256:
                        raise UserError(f"{inspected.path} changed while it was read; run again")
                part = file if isinstance(file, FileSlice) else FileSlice(file, 0, file.stat().st_size)
                place = {"shard": path.name, "offset": tar.offset + tarfile.BLOCKSIZE, "bytes": part.bytes}
                with part.path.open("rb") as content:
                    content.seek(part.offset)
                    _add(tar, f"{name}{suffix}", content, part.bytes)
                rows = [_row(clip, config) | place for clip in group]
                keys = ("id", "source", *(["source_sha256"] if config.encode else []), "start_s", "rate_hz", "frames")
                sidecar = [{key: row[key] for key in keys} for row in rows]
                text = json.dumps(sidecar[0] if config.encode else sidecar, sort_keys=True).encode()
                _add(tar, f"{name}.json", io.BytesIO(text), len(text))
                if config.encode:
                    file.unlink()
                yield from rows


def _add(tar: tarfile.TarFile, name: str, content: BinaryIO, size: int) -> None:
    info = tarfile.TarInfo(name)  # time 0, owner 0
    info.size = size
    tar.addfile(info, content)


def _row(item: SelectedClip, config: CurationConfig) -> dict[str, Any]:
    """A row of clips.parquet without the clip's place in the shards; `datasheet.COLUMNS` describes it."""
    source, clip, header = item.inspection, item.clip, item.inspection.video
    row = {"id": item.id, "split": item.split, "source": printable_path(source.path), "source_sha256": source.sha256}
    row |= {"start_s": clip.start_s, "rate_hz": float(config.rate_hz), "frames": len(clip.frames), "side_px": config.side_px}
    row |= {"encoded": config.encode, "origin_s": 0.0 if config.encode else source.origin_s, "codec": header.codec}
    row |= {f"source_{name}": getattr(header, name) for name in SOURCE_COLUMNS}
    return row | {"phash": clip.phash.hex()}


def write_tables(rows: Iterable[dict[str, Any]], rejected: list[RejectedFile], out: Path) -> None:
    """clips.parquet: a row a clip. rejected.parquet: a row a file or a span (`scope`), whose times begin `detail`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = iter(rows)
    group = pa.Table.from_pylist(list(islice(rows, ROWS)))
    with pq.ParquetWriter(out / "clips.parquet", group.schema) as table:
        while group.num_rows:
            table.write_table(group)
            group = pa.Table.from_pylist(list(islice(rows, ROWS)), group.schema)
    rejections = []
    for path, why in rejected:
        scope, times = ("file", []) if why.start_s is None else ("span", [f"{why.start_s:.3f} to {why.end_s:.3f} s"])
        detail = ": ".join(filter(None, [*times, why.detail]))
        rejections.append({"path": printable_path(path), "reason": why.reason, "detail": detail, "scope": scope})
    schema = pa.schema([(name, pa.string()) for name in ("path", "reason", "detail", "scope")])
    pq.write_table(pa.Table.from_pylist(rejections, schema), out / "rejected.parquet")


def read_previous(out: Path) -> dict[str, FileSlice]:
    """Places of an earlier run's encoded clips by id; none where its table is missing, damaged or of another kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(out / "clips.parquet", columns=["id", "encoded", "shard", "offset", "bytes"])
        types = {"id": pa.string(), "encoded": pa.bool_(), "shard": pa.string(), "offset": pa.int64(), "bytes": pa.int64()}
        rows = table.select(list(types)).cast(pa.schema(types)).drop_null().to_pylist()
    except (pa.ArrowException, OSError, KeyError, ValueError):  # ValueError: other columns, or not UTF-8
        return {}
    rows = [row for row in rows if row["encoded"] and row["offset"] >= 0 and 0 <= row["bytes"] < MOST_BYTES]
    return {row["id"]: FileSlice(out / "shards" / row["shard"], row["offset"], row["bytes"]) for row in rows}
