"""Perception Test (boxes): `videos/<video_id>.mp4` and `object_tracking_{train,valid}.json` or `all_{train,valid}.json`.

It lies in the folder of the points, `perception_test`. 4DS reads boxes out on Waymo Open; here they come from Perception Test
where that is not there (ours). In the file, an object has `bounding_boxes` `[n][4]`, x1 y1 x2 y2 in 0..1 of the width and
height, for the frames in `frame_ids`, about one a second; `initial_tracking_box` marks by a 1 the box that tracking starts from.
Facts: the official README and baseline notebook, which ignores `is_masked` and measures the boxes after the first one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d.benchmarks import perception_test
from scaling4d.benchmarks.frames import Crop, Samples, each
from scaling4d.benchmarks.skipped import LeftOut, Skipped
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "11,609 in all splits", "val": "11,609 in all splits"}
KIND = "object_tracking"
LISTED = f"{KIND}_*.json or all_*.json"


def listed(root: Path) -> bool:
    """Whether the folder has lists of objects, and not of points alone."""
    return any(path for pattern in LISTED.split(" or ") for path in root.glob(pattern))


def read(
    root: Path,
    split: str,
    *,
    frames: int,
    rate_hz: float,
    side_px: int,
    part: slice = slice(None),
    skipped: list[Skipped] | None = None,
) -> Samples:
    """label boxes `Q T 4` with valid (the object is labelled in that very frame): those whose tracking starts in frame 0.

    Without any, or without a label in a later frame, no sample. At most rates only a few of a clip's frames are labelled.
    """
    one = partial(_sample, root, perception_test.list_of(root, split, KIND), frames=frames, rate_hz=rate_hz, side_px=side_px)
    return each(list(perception_test.tracked(root, split, KIND).items())[part], one, skipped, lambda item: item[0])


def count(root: Path, split: str) -> int:
    """Listed videos that have objects.

    Raises:
        UserError: another layout, no objects, or videos that are not there.
    """
    return perception_test.count_tracked(root, split, KIND)


def layout(root: Path, split: str) -> str:
    """The list that is read."""
    return perception_test.list_of(root, split, KIND).name


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, crf: int, gop: int) -> None:
    """Samples with label boxes `Q T 4` and valid `Q T`; tracking starts from an object's first box."""
    (root / "videos").mkdir(parents=True, exist_ok=True)
    entries = {}
    for sample in samples:
        video.write(root / "videos" / f"{sample.id}.mp4", sample.pixels, rate_hz=rate_hz, codec="libx264", crf=crf, gop=gop)
        objects = []
        for q, (boxes, there) in enumerate(zip(sample.labels["boxes"], sample.valid["boxes"], strict=True)):
            ids = np.nonzero(there)[0].tolist()
            objects.append(
                {
                    "id": q,
                    "label": "object",
                    "is_occluder": 0,
                    "bounding_boxes": np.round(boxes[there].astype(float), 5).tolist(),
                    "initial_tracking_box": [int(n == 0) for n in range(len(ids))],
                    "frame_ids": ids,
                    "timestamps": [round(number / rate_hz * 1e6) for number in ids],
                    "is_masked": [0] * len(ids),
                }
            )
        entries[sample.id] = {"metadata": perception_test.metadata(sample, split, rate_hz=rate_hz), KIND: objects}
    perception_test.write_list(root, split, KIND, entries)


def _sample(root: Path, listed: Path, item: tuple[str, dict], *, frames: int, rate_hz: float, side_px: int) -> Sample:
    name, entry = item
    numbers, crop = perception_test.shown(listed, name, entry, frames=frames, rate_hz=rate_hz, side_px=side_px)
    tracks = [_track(listed, name, one, numbers, crop) for one in entry[KIND]]
    asked = [(boxes, there) for boxes, there in tracks if there[0]]
    if not asked:
        raise LeftOut(f"{listed}: no object of {name} starts in the first frame's square")
    boxes, there = (np.stack(some) for some in zip(*asked, strict=True))
    if not there[:, 1:].any():
        raise LeftOut(f"{listed}: no object of {name} is labelled in a later frame of the clip")
    return Sample(
        id=name,
        video=name,
        pixels=perception_test.pixels(root, name, numbers, side_px=side_px),
        labels={"boxes": boxes},
        valid={"boxes": there},
    )


def _track(listed: Path, name: str, track: dict, numbers: np.ndarray, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """boxes `T 4` float32 of the square and there `T`, at the wanted frames from the one on that tracking starts in."""
    try:
        ids, stored = np.asarray(track["frame_ids"], int), np.asarray(track["bounding_boxes"], float)
        starts = np.asarray(track.get("initial_tracking_box", [1]), int)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{listed}: an object of {name} needs frame_ids and bounding_boxes as numbers: {error!r}") from error
    if stored.shape != (len(ids), 4) and len(ids):
        raise UserError(
            f"{listed}: object {track.get('id')} of {name} has boxes {stored.shape} for {len(ids)} frames; needed {len(ids)} x 4"
        )
    boxes, there = np.zeros((len(numbers), 4), np.float32), np.zeros(len(numbers), bool)
    start = ids[starts.argmax()] if len(ids) and starts.any() and starts.argmax() < len(ids) else np.inf
    where = {int(number): n for n, number in enumerate(ids) if number >= start}
    for t, number in enumerate(numbers):
        box = stored[where[int(number)]] if int(number) in where else np.full(4, np.nan)
        inside = crop.boxes(box)
        if np.isfinite(box).all() and (inside[2:] > inside[:2]).all():
            boxes[t], there[t] = inside, True
    return boxes, there
