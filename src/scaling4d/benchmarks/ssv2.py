"""Something-Something v2 (actions): `20bn-something-something-v2/<id>.webm`, `labels/{labels,train,validation}.json`.

The older names `something-something-v2-<...>.json` are read too. Facts: the mmaction2 reader and the official README.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d.benchmarks.frames import load_json, missing_files, read_views, require_path
from scaling4d.benchmarks.samples import ClipRequest, Samples
from scaling4d.records import Sample, UserError, write_json

VIDEOS = "20bn-something-something-v2"
MIRRORED = {"left": "right", "right": "left", "anticlockwise": "clockwise", "clockwise": "anticlockwise"}
OFFICIAL = {"train": "168,913", "val": "24,777"}
LISTS = {"train": "train", "val": "validation"}


def open_split(root: Path, split: str, request: ClipRequest) -> Samples:
    """Samples with the labels action `()` and action_mirrored `()`.

    The second is of the mirrored video, where "left to right" is "right to left".
    """
    path = _list_path(root, LISTS[split])
    entries = load_json(path, list)
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("id", "template")):
            raise UserError(f"{path}, entry {number}: needed id and template as strings, found {str(entry)[:80]}")
        if not entry["id"].isalnum():
            raise UserError(f"{path}, entry {number}: id {entry['id']!r} is not the name of a video")
    if not entries:
        raise UserError(f"{path} lists nothing")
    indices = {name: index for index, name in enumerate(class_names(root))}
    folder = require_path(root, root / VIDEOS, "videos <id>.webm")

    def load(entry: dict, positions: Sequence[float] = request.positions) -> list[Sample]:
        name, video_id = _class_name(entry["template"]), entry["id"]
        if name not in indices:
            raise UserError(f"{path}: {video_id} is {name!r}, which labels.json does not list")
        mirrored = re.sub(rf"\b({'|'.join(MIRRORED)})\b", lambda word: MIRRORED[word[0]], name)
        labels = {"action": np.int64(indices[name]), "action_mirrored": np.int64(indices.get(mirrored, indices[name]))}
        views = read_views(require_path(root, folder / f"{video_id}.webm", "listed in the labels"), request, positions)
        return [Sample(video_id, video_id, pixels, labels) for pixels in views]

    missing = missing_files(folder, [f"{entry['id']}.webm" for entry in entries], f"videos of {split}")
    return Samples(entries, load, itemgetter("id"), len(entries), str(path.relative_to(root)), missing)


def class_names(root: Path) -> list[str]:
    """Class names by index. Raises UserError: labels.json does not map names to 0, 1, ..., as strings."""
    path = _list_path(root, "labels")
    try:
        indices = {name: int(index) for name, index in load_json(path, dict).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: needed class names with whole numbers: {error}") from error
    if sorted(indices.values()) != list(range(len(indices))):
        raise UserError(f"{root}: the numbers in labels.json are not 0 .. {len(indices) - 1}")
    return sorted(indices, key=indices.__getitem__)


def write(
    root: Path, split: str, samples: Iterable[Sample], *, templates: Sequence[str], rate_hz: float, crf: int, gop: int
) -> None:
    """Write samples with label action, an index into the sorted templates without brackets, as in the original."""
    template_of = {_class_name(template): template for template in templates}
    names = sorted(template_of)
    (root / VIDEOS).mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    entries = []
    for sample in samples:
        video.encode(root / VIDEOS / f"{sample.id}.webm", sample.pixels, rate_hz=rate_hz, crf=crf, gop=gop)
        template = template_of[names[int(sample.labels["action"])]]
        label = template.replace("[something]", "a thing").replace("[Something]", "A thing")
        placeholders = ["a thing"] * template.lower().count("[something]")
        entries.append({"id": sample.id, "label": label.lower(), "template": template, "placeholders": placeholders})
    write_json(root / "labels" / f"{LISTS[split]}.json", entries)
    write_json(root / "labels/labels.json", {name: str(index) for index, name in enumerate(names)})
    write_json(root / "labels/test.json", [])
    (root / "labels/test-answers.csv").write_text("")


def _class_name(template: str) -> str:
    """The template without brackets; case and commas stay."""
    return template.replace("[", "").replace("]", "")


def _list_path(root: Path, name: str) -> Path:
    old_name = f"something-something-v2-{name}.json"
    paths = (root / "labels" / f"{name}.json", root / old_name, root / "labels" / old_name)
    return require_path(root, next((path for path in paths if path.is_file()), paths[0]), f"or {old_name}")
