"""Kinetics-400, 600, 700 (actions): the official lists `{train,val}.csv`, beside the videos or in `annotations/`, and the videos
`{train,val}/<youtube id>_<start:06d>_<end:06d>.mp4`, right there or in a folder a class.

A list's columns: label, youtube_id, time_start, time_end, split. A YouTube id has 11 characters and may hold `_` and start with
`-`. What lies below `replacement/` (CVDF's mends for broken files) goes before the file of the same stretch, also by a bare id. A
class is the place of its label among the sorted labels of the training list. Facts: cvdfoundation/kinetics-dataset and its
arrange_by_classes.py.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d.benchmarks.frames import Samples, needed, views_of
from scaling4d.benchmarks.skipped import Missing, Skipped
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "246,534 in Kinetics-400", "val": "19,906 in Kinetics-400"}
NAMES = {"train": ("train",), "val": ("val", "validate", "validation")}  # of lists and of folders
REPLACEMENT = "replacement"
ID = 11  # characters of a YouTube id
VIDEOS = (".mp4", ".mkv", ".webm")


@dataclass(frozen=True)
class Entry:
    """A line of a list. name: of its file, without the ending."""

    youtube: str
    name: str
    label: str
    line: int


def read(
    root: Path,
    split: str,
    *,
    frames: int,
    rate_hz: float,
    side_px: int,
    part: slice = slice(None),
    skipped: list[Skipped] | None = None,
    views: tuple[int, int] = (1, 1),
) -> Samples:
    """labels action `()`, and action_mirrored `()`, which is the same. A short video goes on with its last frame.

    views: clips over the time of a video, and squares cut out of each; so many samples follow one another.
    """
    numbers = {name: number for number, name in enumerate(classes(root))}
    asked = {"frames": frames, "rate_hz": rate_hz, "side_px": side_px, "views": views}
    one = partial(_sample, root, split, numbers, _files(root, split), **asked)
    return Samples(_entries(root, split)[part], one, skipped, lambda entry: entry.name)


def classes(root: Path) -> list[str]:
    """Class names by index."""
    return sorted({entry.label for entry in _entries(root, "train")})


def count(root: Path, split: str) -> int:
    """Listed videos.

    Raises:
        UserError: another layout, no entries, or listed videos that are not there.
    """
    entries, files = _entries(root, split), _files(root, split)
    if missing := [f"{entry.name}.mp4" for entry in entries if _file(files, entry) is None]:
        raise Missing(_folder(root, split), missing, listed=len(entries), what=f"videos of {split}")
    return len(entries)


def layout(root: Path, split: str) -> str:
    in_classes = any(path.parent.parent == _folder(root, split) for path in _files(root, split).values())
    return f"{_list(root, split).relative_to(root)}, videos in {'a folder a class' if in_classes else 'one folder'}"


def write(
    root: Path, split: str, samples: Iterable[Sample], *, labels: Sequence[str], rate_hz: float, crf: int, gop: int
) -> None:
    """Samples with label action, an index into the sorted labels, and a YouTube id as their video; all in one folder."""
    names = sorted(labels)
    (root / NAMES[split][0]).mkdir(parents=True, exist_ok=True)
    rows = []
    for sample in samples:
        end_s = -(-len(sample.pixels) // round(rate_hz))
        path = root / NAMES[split][0] / f"{_name(sample.video, 0, end_s)}.mp4"
        video.write(path, sample.pixels, rate_hz=rate_hz, codec="libx264", crf=crf, gop=gop)
        rows.append([names[int(sample.labels["action"])], sample.video, 0, end_s, split])
    with (root / f"{NAMES[split][0]}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([["label", "youtube_id", "time_start", "time_end", "split"], *rows])


def _sample(
    root: Path,
    split: str,
    numbers: dict[str, int],
    files: dict[str, Path],
    entry: Entry,
    *,
    frames: int,
    rate_hz: float,
    side_px: int,
    views: tuple[int, int],
) -> list[Sample]:
    where = f"{_list(root, split)}, line {entry.line}"
    if entry.label not in numbers:
        raise UserError(f"{where}: {entry.label!r} is no label of the training list")
    path = _file(files, entry)
    if path is None:
        raise UserError(f"{where}: no file {entry.name}.mp4 below {_folder(root, split)}")
    action = np.int64(numbers[entry.label])
    labels = {"action": action, "action_mirrored": action}
    seen = views_of(path, frames=frames, rate_hz=rate_hz, side_px=side_px, views=views)
    return [Sample(id=entry.name, video=entry.youtube, pixels=pixels, labels=labels) for pixels in seen]


def _name(youtube: str, start_s: int, end_s: int) -> str:
    return f"{youtube}_{start_s:06d}_{end_s:06d}"


def _list(root: Path, split: str) -> Path:
    for folder in (root, root / "annotations"):
        for name in NAMES[split]:
            if (folder / f"{name}.csv").is_file():
                return folder / f"{name}.csv"
    return needed(root, root / f"{NAMES[split][0]}.csv", "the official list of labels, youtube ids and times")


def _folder(root: Path, split: str) -> Path:
    for name in NAMES[split]:
        if (root / name).is_dir():
            return root / name
    return needed(root, root / NAMES[split][0], "videos <youtube id>_<start>_<end>.mp4")


def _files(root: Path, split: str) -> dict[str, Path]:
    """By name, which says the stretch of a video; replacements, which may have a bare id, go before the split's own files."""
    files: dict[str, Path] = {}
    for folder in (root / REPLACEMENT, _folder(root, split)):
        for path in sorted(folder.rglob("*")):
            if path.suffix in VIDEOS and (folder == root / REPLACEMENT or len(path.stem) > ID):
                files.setdefault(path.stem, path)
    return files


def _file(files: dict[str, Path], entry: Entry) -> Path | None:
    """Of the listed stretch, and of no other one of the same video."""
    return files.get(entry.youtube) or files.get(entry.name)


def _entries(root: Path, split: str) -> list[Entry]:
    path = _list(root, split)
    entries = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            if lacking := [
                name for name in ("label", "youtube_id", "time_start", "time_end") if name not in (rows.fieldnames or ())
            ]:
                raise UserError(f"{path} has no column {lacking[0]}; needed label, youtube_id, time_start, time_end (and split)")
            for row in rows:
                entries.append(_entry(path, rows.line_num, row))
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not entries:
        raise UserError(f"{path} lists nothing")
    return entries


def _entry(path: Path, line: int, row: dict[str, str | None]) -> Entry:
    label, youtube = ((row[column] or "").strip().strip('"') for column in ("label", "youtube_id"))
    try:
        start_s, end_s = (int(float(row[column] or "")) for column in ("time_start", "time_end"))
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}, line {line}: time_start and time_end must be seconds: {error}") from error
    if not label or len(youtube) != ID:
        raise UserError(f"{path}, line {line}: needed a label and a YouTube id of {ID} characters, found {label!r}, {youtube!r}")
    return Entry(youtube, _name(youtube, start_s, end_s), label, line)
