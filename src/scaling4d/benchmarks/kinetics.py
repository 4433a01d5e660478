"""Kinetics-400, 600, 700 (actions): `{train,val}.csv` and `{train,val}/<youtube id>_<start:06d>_<end:06d>.mp4`.

The official lists lie beside the videos or in `annotations/`; the videos of a split in one folder or in a folder per
class. Columns of a list: label, youtube_id, time_start, time_end, split. A YouTube id has 11 characters, may contain
`_` and may start with `-`. Files below `replacement/` (CVDF's repairs of broken files, also named by a bare id) win
over the file of the same segment. A class index is the place of a label among the sorted labels of the training list.
Facts: cvdfoundation/kinetics-dataset and its arrange_by_classes.py.
"""

from __future__ import annotations

import csv
from collections import namedtuple
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np

from scaling4d.benchmarks.frames import read_views, require_path
from scaling4d.benchmarks.samples import ClipRequest, MissingFiles, Samples
from scaling4d.records import Sample, UserError, files_below

OFFICIAL = {"train": "246,534 in Kinetics-400", "val": "19,906 in Kinetics-400"}
NAMES = {"train": ("train",), "val": ("val", "validate", "validation")}  # of lists and of folders
REPLACEMENT = "replacement"
ID_LENGTH = 11  # characters of a YouTube id
SUFFIXES = (".mp4", ".mkv", ".webm")
COLUMNS = ("label", "youtube_id", "time_start", "time_end")


Entry = namedtuple("Entry", "youtube_id name label line")  # of a list; name: of its file, without the suffix


def open_split(root: Path, split: str, request: ClipRequest) -> Samples:
    """Samples with the labels action `()` and action_mirrored `()`, which is the same."""
    list_path, entries = _list_path(root, split), _entries(root, split)
    folders = [root / name for name in NAMES[split]]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    require_path(root, folder, "videos <youtube id>_<start>_<end>.mp4")
    indices = {name: index for index, name in enumerate(class_names(root))}
    files: dict[str, Path] = {}  # videos by name
    for place in (root / REPLACEMENT, folder):
        for path in files_below(place):
            if path.suffix in SUFFIXES and (place != folder or len(path.stem) > ID_LENGTH):
                files.setdefault(path.stem, path)

    # of the listed segment; never of another segment of the same YouTube video
    videos = {entry.name: files.get(entry.youtube_id) or files.get(entry.name) for entry in entries}

    def load(entry: Entry, positions: Sequence[float] = request.positions) -> list[Sample]:
        where = f"{list_path}, line {entry.line}"
        if entry.label not in indices:
            raise UserError(f"{where}: {entry.label!r} is no label of the training list")
        if (path := videos[entry.name]) is None:
            raise UserError(f"{where}: no file {entry.name}.mp4 below {folder}")
        action = np.int64(indices[entry.label])
        labels = {"action": action, "action_mirrored": action}
        return [Sample(entry.name, entry.youtube_id, pixels, labels) for pixels in read_views(path, request, positions)]

    names = [f"{entry.name}.mp4" for entry in entries if videos[entry.name] is None]
    missing = MissingFiles(folder, names, listed=len(entries), what=f"videos of {split}") if names else None
    sorted_by = "a folder a class" if any(path.parent.parent == folder for path in files.values()) else "one folder"
    layout = f"{list_path.relative_to(root)}, videos in {sorted_by}"
    return Samples(entries, load, attrgetter("name"), len(entries), layout, missing)


def class_names(root: Path) -> list[str]:
    """Class names by index."""
    return sorted({entry.label for entry in _entries(root, "train")})


def _list_path(root: Path, split: str) -> Path:
    paths = [folder / f"{name}.csv" for folder in (root, root / "annotations") for name in NAMES[split]]
    path = next((path for path in paths if path.is_file()), paths[0])
    return require_path(root, path, "the official list of labels, youtube ids and times")


def _entries(root: Path, split: str) -> list[Entry]:
    path, entries = _list_path(root, split), []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            if lacking := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise UserError(f"{path} has no column {lacking[0]}; needed {', '.join(COLUMNS)} (and split)")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                label, youtube_id = ((row[column] or "").strip().strip('"') for column in COLUMNS[:2])
                try:
                    start_s, end_s = (int(float(row[column] or "")) for column in COLUMNS[2:])
                except (ValueError, OverflowError) as error:
                    raise UserError(f"{where}: time_start and time_end must be seconds: {error}") from error
                if not label or len(youtube_id) != ID_LENGTH:
                    needed = f"a label and a YouTube id of {ID_LENGTH} characters"
                    raise UserError(f"{where}: needed {needed}, found {label!r}, {youtube_id!r}")
                entries.append(Entry(youtube_id, f"{youtube_id}_{start_s:06d}_{end_s:06d}", label, rows.line_num))
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not entries:
        raise UserError(f"{path} lists nothing")
    return entries
