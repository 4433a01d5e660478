"""Something-Something v2 (actions): `20bn-something-something-v2/<id>.webm` and `labels/{labels,train,validation,test}.json`.

Also read under the older names `something-something-v2-<...>.json`. Facts: the mmaction2 reader and the official README.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d.benchmarks.frames import Samples, all_there, load_json, needed, views_of
from scaling4d.benchmarks.skipped import Skipped
from scaling4d.records import Sample, UserError, write_json

VIDEOS = "20bn-something-something-v2"
MIRRORED = {"left": "right", "right": "left", "anticlockwise": "clockwise", "clockwise": "anticlockwise"}
OFFICIAL = {"train": "168,913", "val": "24,777"}
LISTS = {"train": "train", "val": "validation"}


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
    """labels action `()`, and action_mirrored `()`: what it is in a mirror. A short video goes on with its last frame.

    views: clips over the time of a video, and squares cut out of each; so many samples follow one another.
    """
    asked = {"frames": frames, "rate_hz": rate_hz, "side_px": side_px, "views": views}
    one = partial(_sample, root, _list(root, LISTS[split]), _labels(root), **asked)
    return Samples(_entries(root, split)[part], one, skipped, lambda entry: entry["id"])


def classes(root: Path) -> list[str]:
    """Class names by index."""
    numbers = _labels(root)
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise UserError(f"{root}: the numbers in labels.json are not 0 .. {len(numbers) - 1}")
    return sorted(numbers, key=numbers.__getitem__)


def count(root: Path, split: str) -> int:
    """Listed videos.

    Raises:
        UserError: another layout, no entries, or listed videos that are not there.
    """
    entries = _entries(root, split)
    classes(root)
    folder = needed(root, root / VIDEOS, "videos <id>.webm")
    return all_there(folder, [f"{entry['id']}.webm" for entry in entries], f"videos of {split}")


def layout(root: Path, split: str) -> str:
    """The list that is read."""
    return str(_list(root, LISTS[split]).relative_to(root))


def write(
    root: Path, split: str, samples: Iterable[Sample], *, templates: Sequence[str], rate_hz: float, crf: int, gop: int
) -> None:
    """Samples with label action, an index into the sorted templates without brackets, as in the original."""
    names = sorted(_class_name(template) for template in templates)
    of_name = {_class_name(template): template for template in templates}
    (root / VIDEOS).mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    entries = []
    for sample in samples:
        video.write(root / VIDEOS / f"{sample.id}.webm", sample.pixels, rate_hz=rate_hz, codec="libvpx-vp9", crf=crf, gop=gop)
        template = of_name[names[int(sample.labels["action"])]]
        label = template.replace("[something]", "a thing").replace("[Something]", "A thing")
        placeholders = ["a thing"] * template.lower().count("[something]")
        entries.append({"id": sample.id, "label": label.lower(), "template": template, "placeholders": placeholders})
    write_json(root / "labels" / f"{LISTS[split]}.json", entries)
    write_json(root / "labels/labels.json", {name: str(number) for number, name in enumerate(names)})
    write_json(root / "labels/test.json", [])
    (root / "labels/test-answers.csv").write_text("")


def _sample(
    root: Path,
    listed: Path,
    numbers: dict[str, int],
    entry: dict,
    *,
    frames: int,
    rate_hz: float,
    side_px: int,
    views: tuple[int, int],
) -> list[Sample]:
    template = _class_name(entry["template"])
    if template not in numbers:
        raise UserError(f"{listed}: {entry['id']} is {template!r}, which labels.json does not list")
    path = needed(root, root / VIDEOS / f"{entry['id']}.webm", "listed in the labels")
    labels = {
        "action": np.int64(numbers[template]),
        "action_mirrored": np.int64(numbers.get(_mirrored(template), numbers[template])),
    }
    seen = views_of(path, frames=frames, rate_hz=rate_hz, side_px=side_px, views=views)
    return [Sample(id=entry["id"], video=entry["id"], pixels=pixels, labels=labels) for pixels in seen]


def _mirrored(name: str) -> str:
    """How a class would be called in a mirror: "left to right" is "right to left" there."""
    return re.sub(rf"\b({'|'.join(MIRRORED)})\b", lambda found: MIRRORED[found[0]], name)


def _class_name(template: str) -> str:
    """Only the brackets go; case and commas stay."""
    return template.replace("[", "").replace("]", "")


def _list(root: Path, name: str) -> Path:
    for path in (
        root / "labels" / f"{name}.json",
        root / f"something-something-v2-{name}.json",
        root / f"labels/something-something-v2-{name}.json",
    ):
        if path.is_file():
            return path
    return needed(root, root / "labels" / f"{name}.json", f"or something-something-v2-{name}.json")


def _labels(root: Path) -> dict[str, int]:
    """Class name -> index; the file holds the indices as strings."""
    path = _list(root, "labels")
    try:
        return {name: int(number) for name, number in load_json(path, dict).items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: needed class names with whole numbers: {error}") from error


def _entries(root: Path, split: str) -> list[dict]:
    path = _list(root, LISTS[split])
    entries = load_json(path, list)
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str) or not isinstance(entry.get("template"), str):
            raise UserError(f"{path}, entry {number}: needed id and template as strings, found {str(entry)[:80]}")
        if not entry["id"].isalnum():
            raise UserError(f"{path}, entry {number}: id {entry['id']!r} is not the name of a video")
    if not entries:
        raise UserError(f"{path} lists nothing")
    return entries
