"""Perception Test (boxes): `videos/<video_id>.mp4`, `object_tracking_{train,valid}.json` or `all_{train,valid}.json`.

It shares the folder `perception_test` with the points. 4DS reads boxes out on Waymo Open; without Waymo Open they come
from here (ours). In the file, an object has `bounding_boxes` `[n][4]`, x1 y1 x2 y2 in 0..1 of the width and height, for
the frames in `frame_ids`, about one a second; a 1 in `initial_tracking_box` marks the box in which tracking starts.
Facts: the official README and baseline notebook, which ignores `is_masked` and measures the boxes after the first one.
"""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

import numpy as np

from scaling4d.benchmarks import perception_test
from scaling4d.benchmarks.frames import Crop
from scaling4d.benchmarks.samples import ClipRequest, ExcludedItem, Samples
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "11,609 in all splits", "val": "11,609 in all splits"}
KIND = "object_tracking"
LIST_PATTERNS = (f"{KIND}_*.json", "all_*.json")


def has_lists(root: Path) -> bool:
    """Whether the folder has lists of objects, and not of points alone."""
    return any(path for pattern in LIST_PATTERNS for path in root.glob(pattern))


def open_split(root: Path, split: str, request: ClipRequest) -> Samples:
    """Label boxes `Q T 4` with valid (labelled in that very frame): the objects whose tracking starts in frame 0.

    A video without any, or without a label in a later frame, is excluded. At most rates few frames are labelled.
    """
    path, items, missing = perception_test.read_tracks(root, split, KIND)

    def load(item: tuple[str, dict]) -> list[Sample]:
        name, entry = item
        numbers, crop = perception_test.clip_frames(path, name, entry, KIND, request)
        tracks = [_track(path, name, track, numbers, crop) for track in entry[KIND]]
        started = [(boxes, valid) for boxes, valid in tracks if valid[0]]
        if not started:
            raise ExcludedItem(f"{path}: no object of {name} starts in the first frame's square")
        boxes, valid = (np.stack(arrays) for arrays in zip(*started, strict=True))
        if not valid[:, 1:].any():
            raise ExcludedItem(f"{path}: no object of {name} is labelled in a later frame of the clip")
        pixels = perception_test.read_pixels(root, name, numbers, request)
        return [Sample(name, name, pixels, {"boxes": boxes}, {"boxes": valid})]

    return Samples(items, load, itemgetter(0), len(items), path.name, missing)


def _track(path: Path, name: str, track: dict, numbers: np.ndarray, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """boxes `T 4` float32 of the square and valid `T`, at these frames, none before tracking starts."""
    try:
        ids, stored = np.asarray(track["frame_ids"], int), np.asarray(track["bounding_boxes"], float)
        starts = np.asarray(track.get("initial_tracking_box", [1]), int)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: an object of {name} needs frame_ids and bounding_boxes as numbers: {error!r}") from error
    if ids.ndim != 1:
        raise UserError(f"{path}: an object of {name} needs a list of frame_ids, found {ids.shape}")
    if stored.shape != (len(ids), 4) and len(ids):
        has = f"has boxes {stored.shape} for {len(ids)} frames; needed {len(ids)} x 4"
        raise UserError(f"{path}: object {track.get('id')} of {name} {has}")
    start = ids[starts.argmax()] if len(ids) and starts.any() and starts.argmax() < len(ids) else np.inf
    box_of = {int(number): stored[n] for n, number in enumerate(ids) if number >= start}
    picture = np.array([box_of.get(int(number), np.full(4, np.nan)) for number in numbers])  # T 4
    square = crop.boxes(picture)
    valid = np.isfinite(picture).all(-1) & (square[:, 2:] > square[:, :2]).all(-1)
    return np.where(valid[:, None], square, 0).astype(np.float32), valid
