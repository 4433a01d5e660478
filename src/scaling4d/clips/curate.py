"""A folder of any videos in; shards of clips, and a table of what was rejected and why, out.

Workers look at one input at a time (`examine`); what needs all of them at once (duplicates, the split, the order of the shards)
happens here, in an order that depends on the files alone, so that any number of workers writes the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from scaling4d import artifacts, video
from scaling4d.clips.cluster import finish, workers
from scaling4d.clips.describe import croissant, datasheet, datasheet_svg
from scaling4d.clips.duplicates import SPLITS, distinct, splits
from scaling4d.clips.examine import UNREADABLE, Clip, Curation, Finding, cut, examine, fingerprint
from scaling4d.clips.inputs import Input, Rejection, walk
from scaling4d.clips.remembered import from_json, name_of, remembered, to_json
from scaling4d.records import UserError, write_json
from scaling4d.video import Member

LIBRARIES = ("av", "imagehash", "numpy", "pillow", "scenedetect-headless")  # that findings depend on
ROWS = 2**12  # of clips.parquet that are in memory
HASHED_TOGETHER = 32  # inputs in one job: a hash is little work
CUT = ("side_px", "crf", "gop", "rate_hz")  # settings that the encoded clip depends on, beside its frames
LATER = (
    "side_px",
    "crf",
    "gop",
    "encode",
    "listed",
    "hash_bits",
    "val_share",
    "shard_bytes",
    "workers",
    "cluster",
)  # what no finding depends on


@dataclass(frozen=True, slots=True)
class Chosen:
    """One clip that will be written."""

    id: str
    split: str
    source: Finding
    clip: Clip


def curate(videos: Path, out: Path, curation: Curation, *, before: Path | None = None, memory: Path | None = None) -> str:
    """Fill the folder `out` with shards/*.tar, clips.parquet, rejected.parquet, datasheet.json and .svg, croissant.json.

    Args:
        before: what an earlier run wrote; clips in it that would be cut again the same are taken over.
        memory: folder that keeps what was found out about each video, for the next run. Neither changes the result.
    Returns:
        sha256 over the names and contents of all inputs found.
    Raises:
        UserError: there is no such folder, it is empty, nothing in it can be used, or the cluster does not answer.
    """
    items = walk(videos, curation.listed)
    parts = (out / "parts").resolve()
    parts.mkdir()
    with workers(curation) as client:
        findings = _examine_all(client, videos.resolve(), items, curation, memory)
        chosen, rejected = choose(findings, curation)
        _usable(chosen, videos, rejected)
        found = {item.path: item for item in items}
        if curation.encode:
            crashed = _cut_all(client, videos.resolve(), found, chosen, curation, parts, before, memory)
            chosen = [item for item in chosen if item.source.path not in crashed]
            rejected = sorted([*rejected, *crashed.items()], key=_order)
            _usable(chosen, videos, rejected)
    (out / "shards").mkdir()
    shards = _encoded if curation.encode else _whole
    rows = shards(chosen, {path: item.source(videos) for path, item in found.items()}, parts, out / "shards", curation)
    _write_tables(rows, rejected, out)
    for part in parts.iterdir():  # of a worker that was killed
        part.unlink()
    parts.rmdir()
    sheet = datasheet(findings, chosen, rejected, curation)
    _describe(sheet, out, encoded=curation.encode)
    return hashlib.sha256("".join(f"{_text(f.path)}\0{f.sha256}\n" for f in findings).encode()).hexdigest()


def dry(videos: Path, curation: Curation, *, memory: Path | None = None) -> None:
    """Print what `curate` would use, and why not the rest; write nothing but `memory`."""
    items = walk(videos, curation.listed)
    with workers(curation) as client:
        findings = _examine_all(client, videos.resolve(), items, curation, memory)
    chosen, rejected = choose(findings, curation)
    counts = Counter((item.source.path, item.split) for item in chosen)
    for (path, split), clips in sorted(counts.items()):
        print(f"use     {_line(path)}: {clips} clips for {split}")
    for path, why in rejected:
        where = "reject " if why.start_s is None else f"  not   {why.start_s:.2f} to {why.end_s:.2f} s of"
        print(f"{where} {_line(path)}: {why.reason}{why.detail and f' ({why.detail})'}")
    used = len({item.source.path for item in chosen})
    print(f"{len(findings)} files: {used} used for {len(chosen)} clips, {len(findings) - used} rejected")
    _usable(chosen, videos, rejected)


def _examine_all(client: Any, videos: Path, items: list[Input], curation: Curation, memory: Path | None) -> list[Finding]:
    """In the order of `items`. An input that ends its worker process again and again is rejected, not fatal."""
    hashes = _hash_all(client, videos, items)
    circumstances = _circumstances({name: value for name, value in asdict(curation).items() if name not in LATER})
    with remembered(memory, "looked", circumstances) as known:
        unknown: dict[str, tuple[Input, str]] = {}
        for item, sha256 in zip(items, hashes, strict=True):
            if isinstance(sha256, str) and name_of(sha256, item) not in known:
                unknown.setdefault(name_of(sha256, item), (item, sha256))
        names, jobs = list(unknown), ((videos, item, sha256, curation) for item, sha256 in unknown.values())
        fleeting: dict[str, tuple[Rejection, ...]] = {}  # not remembered: another time it may work
        for index, future in finish(client, examine, jobs, "looking at videos", total=len(names)):
            error = future.exception()
            if error is not None:
                fleeting[names[index]] = (Rejection("decoding crashes", _told(error)),)
            elif any(why.reason == UNREADABLE for why in future.result().rejected):
                fleeting[names[index]] = future.result().rejected
            else:
                known.put(names[index], to_json(future.result()))

        def finding(item: Input, sha256: str | Rejection) -> Finding:
            if not isinstance(sha256, str):
                return Finding(item.path, "", None, (), (sha256,))
            name = name_of(sha256, item)
            if name in fleeting:
                return Finding(item.path, sha256, None, (), fleeting[name])
            return from_json(known.get(name), item.path)

        return [finding(item, sha256) for item, sha256 in zip(items, hashes, strict=True)]


def _hash_all(client: Any, videos: Path, items: list[Input]) -> list[str | Rejection]:
    """sha256 of every input, or why it is refused unread."""
    hashes: list[Any] = [item.refused for item in items]
    open_ = [index for index, refused in enumerate(hashes) if refused is None]
    groups = [open_[at : at + HASHED_TOGETHER] for at in range(0, len(open_), HASHED_TOGETHER)]
    jobs = ((videos, [items[i] for i in group]) for group in groups)
    for number, future in finish(client, fingerprint, jobs, "reading files", total=len(groups)):
        for index, found in zip(groups[number], future.result(), strict=True):
            hashes[index] = found
    return hashes


def _cut_all(
    client: Any,
    videos: Path,
    items: dict[str, Input],
    chosen: list[Chosen],
    curation: Curation,
    parts: Path,
    before: Path | None,
    memory: Path | None,
) -> dict[str, Rejection]:
    """Every chosen clip as `parts/<id>.mp4`, from what an earlier run wrote where that is the very same.

    Returns:
        why not, by path: of inputs that end their worker process again and again.
    """
    circumstances = _circumstances({name: value for name, value in asdict(curation).items() if name in CUT})
    crashed: dict[str, Rejection] = {}
    with remembered(memory, "cut", circumstances) as known:
        old = dict(_old_clips(before)) if before is not None else {}
        by_source: dict[str, dict[str, Chosen]] = {}
        for item in chosen:
            if not _taken_over(old.get(item.id), known.get(_frames_of(item)), parts / f"{item.id}.mp4"):
                by_source.setdefault(item.source.path, {})[item.id] = item
        paths = sorted(by_source)
        jobs = (
            (videos, items[path], {name: item.clip.frames for name, item in by_source[path].items()}, curation, parts)
            for path in paths
        )
        for number, future in finish(client, cut, jobs, "cutting clips", total=len(paths)):
            path, error = paths[number], future.exception()
            if isinstance(error, OSError):
                raise UserError(f"cutting {_text(path)}: {error}; run again when this is mended, finished work is kept")
            if isinstance(error, UserError):
                raise error
            if error is not None:
                crashed[path] = Rejection("cutting crashes", _told(error))
                continue
            for name, sha256 in future.result().items():
                known.put(_frames_of(by_source[path][name]), sha256)
    return crashed


def _circumstances(settings: dict[str, Any]) -> dict[str, Any]:
    """All that a result about a video depends on, beside its bytes."""
    libraries = {name: metadata.version(name) for name in LIBRARIES}
    return {"settings": settings, "code": _code(), "ffmpeg": video.VERSIONS, "libraries": libraries}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _frames_of(item: Chosen) -> str:
    """What an encoded clip depends on: its source's bytes, and the frames it takes of them."""
    return f"{item.source.sha256} {' '.join(map(str, item.clip.frames))}"


def _old_clips(before: Path) -> Iterator[tuple[str, Member]]:
    """Where an earlier run's encoded clips lie, by id."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = before / "clips.parquet"
    if not path.is_file():
        return
    try:
        rows = pq.read_table(path, columns=["id", "encoded", "shard", "offset", "bytes"]).to_pylist()
    except (pa.ArrowException, OSError, KeyError):  # damaged, or of another version: nothing is taken over
        return
    for row in rows:
        if row["encoded"]:
            yield row["id"], Member(before / "shards" / row["shard"], row["offset"], row["bytes"])


def _taken_over(old: Member | None, sha256: str | None, part: Path) -> bool:
    """Copy an old clip to its part, if it holds the bytes that cutting it gave."""
    if old is None or sha256 is None or not old.path.is_file():
        return False
    content = _read(old)
    if hashlib.sha256(content).hexdigest() != sha256:
        return False
    part.write_bytes(content)
    return True


def _read(member: Member) -> bytes:
    with member.path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.bytes)


def _code() -> str | None:
    """Hash of what this stage's code means, from the `code` stage; without it (as in a test) None."""
    path = Path("artifacts/code/clips.json")
    return json.loads(path.read_text())["sha256"] if path.is_file() else None


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
    place = {(finding.sha256, clip.start_s): at for finding in first.values() for at, clip in enumerate(finding.clips)}
    chosen = [
        Chosen(f"{finding.sha256[:16]}-{place[finding.sha256, clip.start_s]:05d}", split[finding.sha256], finding, clip)
        for finding, clip in kept
    ]
    used, whole = {item.source.path for item in chosen}, {path for path, why in rejected if why.start_s is None}
    spans: dict[str, list[Rejection]] = {}
    for path, why in rejected:
        if why.start_s is not None:
            spans.setdefault(path, []).append(why)
    unused = sorted({finding.path for finding in findings} - used - whole)
    alone = {path for path in unused if len(spans[path]) == 1}  # said once, of the file
    rejected = [(path, why) for path, why in rejected if path not in alone]
    rejected += [(path, _overall(spans[path])) for path in unused]
    rejected.sort(key=_order)
    whole_files = {path for path, why in rejected if why.start_s is None}
    assert used.isdisjoint(whole_files) and used | whole_files == {finding.path for finding in findings}
    return sorted(chosen, key=lambda item: item.id), rejected


def _order(row: tuple[str, Rejection]) -> tuple[str, bool, float, str]:
    """By path, the whole file before its spans."""
    path, why = row
    return path, why.start_s is not None, why.start_s or 0.0, why.reason


def _overall(spans: list[Rejection]) -> Rejection:
    """Why a file as a whole is not used: the reason that takes most of its time."""
    seconds: Counter[str] = Counter()
    for span in spans:
        seconds[span.reason] += span.end_s - span.start_s
    reason = max(sorted(seconds), key=seconds.__getitem__)
    if len(spans) == 1:
        return Rejection(reason, spans[0].detail or f"{spans[0].start_s:.2f} to {spans[0].end_s:.2f} s")
    return Rejection(reason, f"{len(spans)} spans, see their rows")


def _usable(chosen: list[Chosen], videos: Path, rejected: list[tuple[str, Rejection]]) -> None:
    if not chosen:
        reasons = Counter(why.reason for _, why in rejected if why.start_s is None)
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
        raise UserError(f"none of the {reasons.total()} files in {videos} can be used ({why}); see `scaling4d clips --dry`")
    if len({item.split for item in chosen}) < len(SPLITS):
        raise UserError(f"{videos} holds one usable video or copies of one; needed two different ones, to train and to validate")


def _encoded(
    chosen: list[Chosen], sources: dict[str, Path | Member], parts: Path, out: Path, curation: Curation
) -> Iterator[dict[str, Any]]:
    """Write `<split>-00000.tar ...` (WebDataset: `<id>.mp4`, `<id>.json`), the clips in order of their ids; the parts go."""
    for split in SPLITS:
        with _Shards(out, split, curation.shard_bytes) as shards:
            for item in (item for item in chosen if item.split == split):
                part, row = parts / f"{item.id}.mp4", _row(item, curation)
                row |= shards.add(f"{item.id}.mp4", *_file(part.read_bytes()))
                told = {key: row[key] for key in ("id", "source", "source_sha256", "start_s", "rate_hz", "frames")}
                shards.add(f"{item.id}.json", *_file(json.dumps(told, sort_keys=True).encode()), beside=True)
                part.unlink()
                yield row


def _whole(
    chosen: list[Chosen], sources: dict[str, Path | Member], parts: Path, out: Path, curation: Curation
) -> Iterator[dict[str, Any]]:
    """The same with the sources as they are (`<start of their sha256>.<ending>`), each once, however many clips it gives."""
    for split in SPLITS:
        by_source: dict[str, list[Chosen]] = {}
        for item in (item for item in chosen if item.split == split):
            by_source.setdefault(item.source.sha256, []).append(item)
        with _Shards(out, split, curation.shard_bytes) as shards:
            for sha256, items in by_source.items():
                path = items[0].source.path
                source = sources[path]
                if video.sha256(source) != sha256:
                    raise UserError(f"{path} changed while it was read; run again")
                ending = os.path.splitext(path)[1].lower()
                plain = ending[1:].isascii() and ending[1:].isalnum() and ending != ".json"  # that is what lies beside it
                name = f"{sha256[:16]}{ending if plain else ''}"
                with (source.path if isinstance(source, Member) else source).open("rb") as file:
                    file.seek(source.offset if isinstance(source, Member) else 0)
                    size = source.bytes if isinstance(source, Member) else source.stat().st_size
                    place = shards.add(name, file, size)
                mine = [_row(item, curation) | place for item in items]
                told = [{key: row[key] for key in ("id", "source", "start_s", "rate_hz", "frames")} for row in mine]
                shards.add(f"{sha256[:16]}.json", *_file(json.dumps(told, sort_keys=True).encode()), beside=True)
                yield from mine


def _file(content: bytes) -> tuple[BinaryIO, int]:
    return io.BytesIO(content), len(content)


class _Shards:
    """Tars `<split>-00000.tar ...`; one is closed when it is as large as it should be."""

    def __init__(self, folder: Path, split: str, size: int) -> None:
        self.folder, self.split, self.size, self.number, self.tar = folder, split, size, 0, None

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *error: object) -> None:
        if self.tar is not None:
            self.tar.close()

    def add(self, name: str, file: BinaryIO, size: int, *, beside: bool = False) -> dict[str, Any]:
        """Where it lies: shard, offset, bytes. beside: in the shard of what was added before."""
        if self.tar is not None and not beside and self.tar.offset >= self.size:
            self.tar.close()
            self.tar, self.number = None, self.number + 1
        shard = f"{self.split}-{self.number:05d}.tar"
        if self.tar is None:
            self.tar = tarfile.open(self.folder / shard, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115  closed in __exit__
        info = tarfile.TarInfo(name)  # time 0, owner 0
        info.size = size
        place = {"shard": shard, "offset": self.tar.offset + tarfile.BLOCKSIZE, "bytes": size}
        self.tar.addfile(info, file)
        return place


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
        "side_px": curation.side_px,
        "encoded": curation.encode,
        "origin_s": 0.0 if curation.encode else item.source.origin_s,
        "codec": source.codec,
        "source_height_px": source.height_px,
        "source_width_px": source.width_px,
        "source_rate_hz": source.rate_hz,
        "source_duration_s": source.duration_s,
        "source_rotation_deg": source.rotation_deg,
        "phash": item.clip.phash.hex(),
    }


def _write_tables(rows: Iterator[dict[str, Any]], rejected: list[tuple[str, Rejection]], out: Path) -> None:
    """clips.parquet: a row a clip. rejected.parquet: a row a file (`scope` file) or a span of it, its times first in `detail`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    some = pa.Table.from_pylist(list(islice(rows, ROWS)))
    with pq.ParquetWriter(out / "clips.parquet", some.schema) as table:
        while some.num_rows:
            table.write_table(some)
            some = pa.Table.from_pylist(list(islice(rows, ROWS)), some.schema)
    refused = []
    for file, why in rejected:
        span = why.start_s is not None
        where = f"{why.start_s:.3f} to {why.end_s:.3f} s" if span else ""
        detail = ": ".join(filter(None, [where, why.detail]))
        refused.append({"path": _text(file), "reason": why.reason, "detail": detail, "scope": "span" if span else "file"})
    schema = pa.schema([(name, pa.string()) for name in ("path", "reason", "detail", "scope")])
    pq.write_table(pa.Table.from_pylist(refused, schema), out / "rejected.parquet")


def _describe(sheet: dict[str, Any], out: Path, *, encoded: bool) -> None:
    """The data sheet, its figure, and what data catalogues read."""
    import pyarrow.parquet as pq

    write_json(out / "datasheet.json", sheet)
    (out / "datasheet.svg").write_text(datasheet_svg(sheet))
    shards = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": artifacts.sha256(path)}
        for path in sorted((out / "shards").iterdir())
    ]
    table = out / "clips.parquet"
    known = {"clips_bytes": table.stat().st_size, "clips_sha256": artifacts.sha256(table), "columns": pq.read_schema(table)}
    write_json(out / "croissant.json", croissant(sheet, shards, encoded=encoded, **known))


def _text(path: str) -> str:
    """A file name as text; bytes that are not Unicode are spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _line(path: str) -> str:
    """The same on one line of a terminal, whatever is in the name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _text(path))
