"""Source files in a folder of videos: plain files and members of tar archives, all or those that a csv names."""

from __future__ import annotations

import csv
import errno
import math
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from scaling4d.records import UserError, is_of_finder, on_one_line
from scaling4d.video import FileSlice, VideoError

EXTENDED_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
DVC_NAMES = (".dvc", ".dvcignore", ".git", ".hg")  # that DVC passes over, with what is in them
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")  # of the official lists
UNREADABLE = "cannot be read"  # the reason of a failure that another run may not see


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a file, or a span of it where start_s is given, is not used."""

    reason: str
    detail: str = ""
    start_s: float | None = None
    end_s: float | None = None

    @classmethod
    def from_error(cls, error: VideoError | OSError) -> Rejection:
        """The reason and the detail that an error states."""
        if isinstance(error, OSError):
            return cls(UNREADABLE, error.strerror or str(error))
        reason, _, detail = str(error).partition(": ")
        return cls(reason, detail)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file, or a member of a tar, that may be a video.

    path: below the folder; a member's is the tar's path, a slash, and its own. member: path of the tar, offset, bytes.
    stretches: (start, end) in seconds that the list names; empty: all. refused: known to be unusable without a look.
    """

    path: str
    member: tuple[str, int, int] | None = None
    stretches: tuple[tuple[float, float], ...] = ()
    refused: Rejection | None = None

    def location(self, videos: Path) -> Path | FileSlice:
        """Its bytes on disk, for `scaling4d.video`."""
        return videos / self.path if self.member is None else FileSlice(videos / self.member[0], *self.member[1:])


def list_sources(videos: Path, listed: str = "") -> list[SourceFile]:
    """The files of `walk_files`, ascending by path; a tar counts as its members.

    listed: path below `videos` of a csv, see `_listed_names`. Files without a name in it and names without a file are
    refused. Raises UserError: no such folder, nothing in it, or a list that cannot be read.
    """
    if not videos.is_dir():
        raise UserError(f"no folder {videos}; run `dvc repro data.dvc`, or name your own data with `scaling4d data use PATH`")
    sources: list[SourceFile] = []
    listed = PurePosixPath(listed).as_posix() if listed else ""
    for file in walk_files(videos):
        if file.path != listed:
            tar = file.refused is None and file.path.endswith(".tar")
            sources += _tar_members(videos, file.path) if tar else [SourceFile(file.path, refused=file.refused)]
    if not sources:
        raise UserError(f"{videos} holds no files; put videos there, or name your own data with `scaling4d data use PATH`")
    return sorted(_apply_list(videos, listed, sources) if listed else sources, key=lambda source: source.path)


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A file below a folder, or what cannot be read as one. linked: a link, or in a linked folder."""

    path: str
    linked: bool
    refused: Rejection | None = None


def walk_files(folder: Path) -> Iterator[FolderFile]:
    """Everything below a folder that is not a folder, hidden files too. Links to files and folders are followed.

    Files that macOS leaves in folders are passed over. Refused: pipes, sockets, devices, links to nothing or to a
    folder around them, names that DVC cannot track, and files or folders that cannot be read. A refused folder counts
    as one file.
    """
    parents = [os.stat(parent) for parent in folder.resolve().parents]
    yield from _walk(folder, "", linked=False, around=tuple((parent.st_dev, parent.st_ino) for parent in parents))


def _walk(folder: Path, below: str, *, linked: bool, around: tuple[tuple[int, int], ...]) -> Iterator[FolderFile]:
    """around: device and inode of the folders above this one."""
    try:
        here = os.stat(folder / below)
        if (here.st_dev, here.st_ino) in around:
            yield FolderFile(below, linked, Rejection("link", "it leads to a folder around it"))
            return
        with os.scandir(folder / below) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        yield FolderFile(below or ".", linked, Rejection.from_error(error))
        return
    for entry in (entry for entry in entries if not is_of_finder(entry.name)):
        path, entry_linked = (f"{below}/{entry.name}" if below else entry.name), linked or entry.is_symlink()
        try:
            check_name(entry.name)
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from _walk(folder, path, linked=entry_linked, around=(*around, (here.st_dev, here.st_ino)))
                continue
            if not entry.is_file(follow_symlinks=False):
                check_regular(folder, path)
            if not os.access(entry.path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            yield FolderFile(path, entry_linked)
        except (VideoError, OSError) as error:
            yield FolderFile(path, entry_linked, Rejection.from_error(error))


def check_name(name: str) -> None:
    """Raises VideoError: DVC stops at this name of a file or folder, or passes over it."""
    if name in DVC_NAMES:
        raise VideoError(f"name: DVC does not track {name}")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise VideoError("name: it is not UTF-8, as DVC needs; rename it") from error


def check_regular(folder: Path, path: str) -> None:
    """Raises VideoError: not a plain file, nor a link to one."""
    try:
        mode = os.stat(folder / path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise VideoError("link: it leads to itself") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and os.path.islink(folder / path):
            raise VideoError("link: it leads to nothing") from error
        raise
    if not stat.S_ISREG(mode):
        raise VideoError("not a file: a pipe, socket or device")


def _tar_members(videos: Path, path: str) -> list[SourceFile]:
    """Members of a tar; nothing is extracted. A tar that cannot be read to its end is one more refused source."""
    members: dict[str, SourceFile] = {}
    try:
        check_regular(videos, path)
        size = os.path.getsize(videos / path)
        with tarfile.open(videos / path, "r:", tarinfo=_TarHeader) as tar:
            previous = 0
            while tar.offset <= size and (info := tar.next()) is not None:
                if info.size < 0 or info.offset_data <= previous:  # tarfile alone would go backwards for ever
                    raise tarfile.ReadError(f"a header leads backwards at {info.offset}")
                previous = info.offset_data
                name = f"{path}/{info.name}"
                while name in members:  # a tar may hold a name twice
                    name += f"@{info.offset}"
                if not info.isdir():
                    refused = _member_refusal(info)
                    if refused is None and info.offset_data + info.size > size:
                        refused = Rejection("damaged archive", f"{path} ends before this member does")
                    members[name] = SourceFile(name, (path, info.offset_data, info.size), refused=refused)
                tar.members = []  # tarfile stores all of them
            if tar.offset > size:
                raise tarfile.ReadError("it ends inside a member")
        with (videos / path).open("rb") as file:  # tarfile takes a header that it cannot read for the end
            file.seek(tar.offset)
            if file.read(2**20).strip(b"\0"):  # tar pads with 10 KiB of zeros
                raise tarfile.ReadError("unreadable header, or an archive behind this one")
    except VideoError as error:
        members[path] = SourceFile(path, refused=Rejection.from_error(error))
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # tarfile lets int() of a header fail
        detail = f"{' '.join(str(error).split())}, after {len(members)} members"
        members[path] = SourceFile(path, refused=Rejection("damaged archive", detail))
    return list(members.values()) or [SourceFile(path, refused=Rejection("empty archive", "it holds no file"))]


class _TarHeader(tarfile.TarInfo):
    """Refuses a long name or pax records larger than any path needs, which tarfile would read into memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.type in EXTENDED_HEADERS and not 0 <= info.size < 2**20:
            raise tarfile.ReadError(f"a header of {info.size} bytes")
        return info


def _member_refusal(info: tarfile.TarInfo) -> Rejection | None:
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts:
        return Rejection("unsafe path", "it leads out of its archive; pack it again with plain relative names")
    if info.issym() or info.islnk():
        return Rejection("link", "a link inside an archive; pack the file itself")
    if not info.isfile() or info.issparse():
        return Rejection("not a file", "a device, pipe or sparse file inside an archive")
    return None


def _apply_list(videos: Path, listed: str, sources: list[SourceFile]) -> Iterator[SourceFile]:
    """The listed sources with their stretches; the others, refused; a refused source for each name without a file."""
    by_name: dict[str, list[SourceFile]] = {}
    for source in sources:
        for name in {source.path, PurePosixPath(source.path).stem}:
            by_name.setdefault(name, []).append(source)
    stretches: dict[str, set[tuple[float, float]]] = {}  # by path
    missing: dict[str, SourceFile] = {}
    for names in _listed_names(videos, listed):
        name, stretch = next(((name, stretch) for name, stretch in names if name in by_name), names[0])
        if name not in by_name:
            missing[name] = SourceFile(name, refused=Rejection("missing", f"{listed} names it; no such file is here"))
        for source in by_name.get(name, ()):
            stretches.setdefault(source.path, set()).update([] if stretch is None else [stretch])
    unlisted = Rejection("not listed", f"{listed} does not name it")
    for source in sources:
        refused = source.refused or (None if source.path in stretches else unlisted)
        yield replace(source, stretches=tuple(sorted(stretches.get(source.path, ()))), refused=refused)
    yield from missing.values()


def _listed_names(videos: Path, listed: str) -> Iterator[list[tuple[str, tuple[float, float] | None]]]:
    """For each row of a list: names that its video may have, each with the stretch meant under that name (None: all).

    Kinetics' columns (youtube_id, time_start, time_end) mean a trimmed file `<id>_<start>_<end>.*` of six digits,
    as its downloaders write them, or else that stretch of a whole file `<id>.*`. A column `path` means that file.
    """
    try:
        check_regular(videos, listed)
        with (videos / listed).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = tuple(rows.fieldnames or ())
            if "path" not in columns and not set(KINETICS_COLUMNS) <= set(columns):
                has = f"has columns {on_one_line(', '.join(columns[:8])) or 'none'}"
                raise UserError(f"clips.Curation.listed = {listed!r} {has}; needed path, or {', '.join(KINETICS_COLUMNS)}")
            for number, row in enumerate(rows, 2):
                if "path" in columns:
                    yield [(PurePosixPath(row["path"] or "").as_posix(), None)]
                    continue
                try:
                    start_s, end_s = float(row["time_start"]), float(row["time_end"])
                    if not 0 <= start_s < end_s < math.inf:
                        raise ValueError
                except (TypeError, ValueError) as error:
                    times = f"time_start {row['time_start']!r} and time_end {row['time_end']!r}"
                    raise UserError(f"{listed} line {number}: {times}; needed seconds, 0 or more, in order") from error
                name = row["youtube_id"]
                yield [(f"{name}_{int(start_s):06d}_{int(end_s):06d}", None), (name, (start_s, end_s))]
    except (OSError, UnicodeError, csv.Error, VideoError) as error:
        raise UserError(f"clips.Curation.listed = {listed!r} cannot be read in {videos}: {error}") from error


def printable_path(path: str) -> str:
    """A path as text; bytes that are not Unicode are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
