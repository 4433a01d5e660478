"""What lies in a folder of videos: files, members of tar archives, and what a list names of them."""

from __future__ import annotations

import csv
import math
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from scaling4d.records import UserError
from scaling4d.video import Member, VideoError

AFTER = 2**20  # bytes behind an archive's end that are looked at; what pads it is 10 KiB
MAX_HEADER = 2**20  # bytes of a long name or of pax records
KINETICS = ("youtube_id", "time_start", "time_end")  # columns of the official lists


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a file, or a span of it when start_s is given, is not used."""

    reason: str
    detail: str
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """One thing that may be a video.

    path: below the folder; of a member of a tar, the tar's path, a slash, and its own. member: tar's path, offset, bytes.
    stretches: (from, to) in seconds, all that a list wants of it; empty: everything. refused: known to be unusable unread.
    """

    path: str
    member: tuple[str, int, int] | None = None
    stretches: tuple[tuple[float, float], ...] = ()
    refused: Rejection | None = None

    def source(self, videos: Path) -> Path | Member:
        """Where to read it."""
        if self.member is None:
            return videos / self.path
        tar, offset, size = self.member
        return Member(videos / tar, offset, size)


def walk(videos: Path, listed: str = "") -> list[Input]:
    """Everything below `videos` that is not a folder, hidden files too, in the order of its path; a tar counts as its members.

    Args:
        listed: a csv below `videos`, of which see `_named`; what it does not name is refused, and so is what is not there.
    Raises:
        UserError: no such folder, nothing in it, or a list that cannot be read.
    """
    if not videos.is_dir():
        raise UserError(f"no folder {videos}; run `dvc repro data.dvc`, or name your own data with `scaling4d data use PATH`")
    found: list[Input] = []

    def closed(error: OSError) -> None:
        path = Path(error.filename).relative_to(videos).as_posix()
        found.append(Input(path, refused=Rejection("cannot be read", error.strerror or str(error))))

    listed = PurePosixPath(listed).as_posix() if listed else ""
    for folder, inner, files in os.walk(videos, onerror=closed):
        links = [name for name in inner if os.path.islink(os.path.join(folder, name))]
        for name in files + links:
            path = Path(folder, name).relative_to(videos).as_posix()
            if path != listed:
                found += _members(videos, path) if path.endswith(".tar") else [Input(path)]
    if not found:
        raise UserError(f"{videos} holds no files; put videos there, or name your own data with `scaling4d data use PATH`")
    return sorted(_listed(videos, listed, found) if listed else found, key=lambda item: item.path)


def regular(videos: Path, path: str) -> None:
    """Raises VideoError: not a plain file, or a link that leads out of the folder, to nothing, or to a folder."""
    file = videos / path
    if file.is_symlink():
        try:
            target = file.resolve()
        except (RuntimeError, OSError) as error:
            raise VideoError("link: it leads to itself") from error
        if not target.is_relative_to(videos.resolve()):
            raise VideoError("link: it leads out of the folder; copy the file to its place")
        if not target.exists():
            raise VideoError("link: it leads to nothing")
        if target.is_dir():
            raise VideoError("link: it leads to a folder; links to folders are not followed")
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise VideoError("not a file: a pipe, socket or device")


def _members(videos: Path, path: str) -> list[Input]:
    """What a tar holds; nothing is extracted. A tar that cannot be read to its end is one refused input more."""
    found: dict[str, Input] = {}
    damaged: list[Input] = []
    try:
        regular(videos, path)
        with tarfile.open(videos / path, "r:") as tar:
            for member in _headers(tar):
                name = f"{path}/{member.name}"
                while name in found:  # a tar may hold a name twice
                    name += f"@{member.offset}"
                if not member.isdir():
                    place = (path, member.offset_data, member.size)
                    found[name] = Input(name, place, refused=_unsafe(member))
            end = tar.offset
        with (videos / path).open("rb") as file:  # tarfile stops without a word at a header that it cannot read
            file.seek(end)
            if file.read(AFTER).strip(b"\0"):
                raise tarfile.ReadError("unreadable header, or an archive behind this one")
    except VideoError as error:
        reason, _, detail = str(error).partition(": ")
        return [Input(path, refused=Rejection(reason, detail))]
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # tarfile lets int() of a header fail
        why = f"{' '.join(str(error).split())}, after {len(found)} members"
        damaged = [Input(path, refused=Rejection("damaged archive", why))]
    size = os.path.getsize(videos / path)
    over = [name for name, item in found.items() if item.refused is None and item.member[1] + item.member[2] > size]
    for name in over:
        found[name] = replace(found[name], refused=Rejection("damaged archive", f"{path} ends before this member does"))
    return [*found.values(), *damaged] or [Input(path, refused=Rejection("empty archive", "it holds no file"))]


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members one after the other; tarfile itself would follow sizes backwards for ever, and read a name of any length.

    Raises:
        tarfile.ReadError: a header leads backwards, or one says more of its member than any path needs.
    """
    end, size = 0, os.fstat(tar.fileobj.fileno()).st_size
    while True:
        at = tar.offset
        if at > size:
            raise tarfile.ReadError("it ends inside a member")
        tar.fileobj.seek(at)
        header = tar.fileobj.read(tarfile.BLOCKSIZE)
        if header[156:157] in (b"L", b"K", b"x", b"g") and tarfile.nti(header[124:136]) not in range(min(MAX_HEADER, size)):
            raise tarfile.ReadError(f"a header of {tarfile.nti(header[124:136])} bytes at {at}")
        tar.fileobj.seek(at)
        member = tar.next()
        if member is None:
            return
        if member.size < 0 or member.offset_data <= end:
            raise tarfile.ReadError(f"a header leads backwards at {at}")
        end = member.offset_data
        yield member
        tar.members = []  # it keeps them all


def _unsafe(member: tarfile.TarInfo) -> Rejection | None:
    inside = PurePosixPath(member.name)
    if inside.is_absolute() or ".." in inside.parts:
        return Rejection("unsafe path", "it leads out of its archive; pack it again with plain relative names")
    if member.issym() or member.islnk():
        return Rejection("link", "a link inside an archive; pack the file itself")
    if not member.isfile() or member.issparse():
        return Rejection("not a file", "a device, pipe or sparse file inside an archive")
    return None


def _listed(videos: Path, listed: str, found: list[Input]) -> list[Input]:
    """The inputs that a list names, with their stretches; the others refused; and a refused one for each name without a file."""
    by_name: dict[str, list[Input]] = {}
    for item in found:
        for name in {item.path, PurePosixPath(item.path).stem}:
            by_name.setdefault(name, []).append(item)
    wanted: dict[str, list[tuple[float, float]]] = {}
    missing: dict[str, Input] = {}
    for names in _named(videos, listed):
        name, stretch = next(((name, stretch) for name, stretch in names if name in by_name), names[0])
        if name not in by_name:
            missing[name] = Input(name, refused=Rejection("missing", f"{listed} names it; no such file is here"))
        for item in by_name.get(name, ()):
            wanted.setdefault(item.path, []).extend([] if stretch is None else [stretch])
    other = Rejection("not listed", f"{listed} does not name it")
    kept = [replace(item, stretches=tuple(sorted(set(wanted[item.path])))) for item in found if item.path in wanted]
    return [*kept, *(replace(i, refused=i.refused or other) for i in found if i.path not in wanted), *missing.values()]


def _named(videos: Path, listed: str) -> Iterator[list[tuple[str, tuple[float, float] | None]]]:
    """For each row of a list, the names that its video may have, and the stretch that is meant if it has that name.

    Kinetics' own columns (youtube_id, time_start, time_end) mean a trimmed file `<id>_<start>_<end>.*` with six digits each, as
    its downloaders write them, or else that stretch of a whole file `<id>.*`; a column `path` means that file.
    """
    try:
        regular(videos, listed)
        with (videos / listed).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = tuple(rows.fieldnames or ())
            if "path" not in columns and not set(KINETICS) <= set(columns):
                raise UserError(
                    f"clips.Curation.listed = {listed!r} has columns {', '.join(columns[:8]) or 'none'}; needed path, or "
                    f"{', '.join(KINETICS)}"
                )
            for number, row in enumerate(rows, 2):
                if "path" in columns:
                    yield [(PurePosixPath(row["path"] or "").as_posix(), None)]
                    continue
                try:
                    start_s, end_s = float(row["time_start"]), float(row["time_end"])
                    if not 0 <= start_s < end_s < math.inf:
                        raise ValueError
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"{listed} line {number}: time_start {row['time_start']!r} and time_end {row['time_end']!r}; needed "
                        "seconds, 0 or more, in order"
                    ) from error
                name = row["youtube_id"]
                yield [(f"{name}_{int(start_s):06d}_{int(end_s):06d}", None), (name, (start_s, end_s))]
    except (OSError, UnicodeError, csv.Error, VideoError) as error:
        raise UserError(f"clips.Curation.listed = {listed!r} cannot be read in {videos}: {error}") from error
