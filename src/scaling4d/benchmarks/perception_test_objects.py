"""Perception Test (boxes): `videos/<video_id>.mp4`, `object_tracking_{train,valid}.json` or `all_{train,valid}.json`.

It shares the folder `perception_test` with the points. 4DS reads boxes out on Waymo Open; without Waymo Open they come
from here (ours). In the file, an object has `bounding_boxes` `[n][4]`, x1 y1 x2 y2 in 0..1 of the width and height, for
the frames in `frame_ids`, about one a second; a 1 in `initial_tracking_box` marks the box in which tracking starts.
Facts: the official README and baseline notebook, which ignores `is_masked` and measures the boxes after the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

from scaling4d.benchmarks import perception_test
from scaling4d.benchmarks.frames import Crop
from scaling4d.benchmarks.samples import ClipRequest, ExcludedItem, Samples, at_positions
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "at most 11,609 (all splits)", "val": "at most 11,609 (all splits)"}  # README
KIND = "object_tracking"
LIST_PATTERNS = (f"{KIND}_*.json", "all_*.json")


def has_lists(root: Path) -> bool:
    """Whether the folder has lists of objects, and not of points alone."""
    return any(path for pattern in LIST_PATTERNS for path in root.glob(pattern))


def open_split(root: Path, split: str, request: ClipRequest) -> Samples:
    """Samples with the label boxes `Q T 4`, objects tracked from frame 0 on, and valid (labelled in that very frame).

    A video without any, or without a label in a later frame, is excluded. At most rates few frames are labelled. A
    window that may lie anywhere starts in a labelled frame, with the objects that are tracked by then.
    """
    path, items, missing = perception_test.read_tracks(root, split, KIND)

    def load(item: tuple[str, dict], positions: Sequence[float] = request.positions) -> list[Sample]:
        name, entry = item
        offsets, crop = perception_test.clip_frames(path, name, entry, KIND, request)
        tracks = [_track(path, name, track, crop) for track in entry[KIND]]
        labelled = set().union(*tracks) if request.anywhere else {0}
        starts = [start for start in request.start_frames(offsets, entry["metadata"]["num_frames"]) if start in labelled]
        given = [(start + offsets, [boxes for boxes in tracks if start in boxes]) for start in starts]
        given = [(numbers, objects) for numbers, objects in given if objects]
        if not given:
            raise ExcludedItem(f"{path}: no object of {name} starts in the first frame's square")
        later = [window for window in given if any(n in boxes for n in window[0][1:].tolist() for boxes in window[1])]
        if not later:
            raise ExcludedItem(f"{path}: no object of {name} is labelled in a later frame of the clip")
        windows = at_positions(later, positions)
        read = np.unique([numbers for numbers, _ in windows])
        pixels, samples = perception_test.read_pixels(root, name, read, request), []
        for numbers, objects in windows:
            valid = np.array([[n in boxes for n in numbers.tolist()] for boxes in objects])  # Q T
            boxes = [[boxes.get(n, np.zeros(4)) for n in numbers.tolist()] for boxes in objects]
            labels = {"boxes": np.array(boxes, np.float32)}
            samples.append(Sample(name, name, pixels[np.searchsorted(read, numbers)], labels, {"boxes": valid}))
        return samples

    return Samples(items, load, itemgetter(0), len(items), path.name, missing)


def _track(path: Path, name: str, track: dict, crop: Crop) -> dict[int, np.ndarray]:
    """An object's boxes of the square, float `4` each, by frame. None before tracking starts, or outside of it."""
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
    boxes = stored if len(ids) else np.zeros((0, 4))
    square = crop.boxes(boxes)
    valid = np.isfinite(boxes).all(-1) & (square[:, 2:] > square[:, :2]).all(-1)
    box_of = {int(number): n for n, number in enumerate(ids) if number >= start}  # the last one of a number
    return {number: square[n] for number, n in box_of.items() if valid[n]}
