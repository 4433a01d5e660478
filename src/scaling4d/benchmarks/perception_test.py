"""Perception Test (points): `videos/<video_id>.mp4` and `point_tracking_{train,valid}.json`.

In the file, a track's `points` are `[2][N]`, y then x, in 0..1 of the height and width, for the N *visible* frames in
`frame_ids`. The README's `[N][2]` is read too; where both fit, `[2][N]` holds. Facts: the official README and baseline notebooks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d.benchmarks.frames import Crop, LeftOut, Skipped, all_there, at_numbers, each, load_json, needed
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "145 in all splits", "val": "145 in all splits"}
LISTS = {"train": "train", "val": "valid"}


def read(
    root: Path,
    split: str,
    *,
    frames: int,
    rate_hz: float,
    side_px: int,
    part: slice = slice(None),
    skipped: list[Skipped] | None = None,
) -> Iterator[Sample]:
    """label points `Q T 2` with valid (visible): the tracks that are visible in frame 0; without any, no sample."""
    one = partial(_sample, root, frames=frames, rate_hz=rate_hz, side_px=side_px)
    tracked = [item for item in _entries(root, split).items() if item[1].get("point_tracking")]
    return each(tracked[part], one, skipped, lambda item: item[0])


def count(root: Path, split: str) -> int:
    """Listed videos that have tracks.

    Raises:
        UserError: another layout, no tracks, or videos that are not there.
    """
    tracked = [name for name, entry in _entries(root, split).items() if entry.get("point_tracking")]
    if not tracked:
        raise UserError(f"{_list(root, split)} has no point tracks")
    folder = needed(root, root / "videos", "videos <video_id>.mp4")
    return all_there(folder, [f"{name}.mp4" for name in tracked], f"videos of {split}")


def layout(root: Path, split: str) -> str:
    """The list that is read."""
    return _list(root, split).name


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, crf: int, gop: int) -> None:
    """Samples with label points `Q T 2` and valid `Q T`."""
    (root / "videos").mkdir(parents=True, exist_ok=True)
    entries = {}
    for sample in samples:
        video.write(root / "videos" / f"{sample.id}.mp4", sample.pixels, rate_hz=rate_hz, codec="libx264", crf=crf, gop=gop)
        tracks = []
        for q, (points, visible) in enumerate(zip(sample.labels["points"], sample.valid["points"], strict=True)):
            yx = np.round(points[visible][:, ::-1].T.astype(float), 5)  # 2 N
            ids = np.nonzero(visible)[0].tolist()
            tracks.append({"id": q, "label": "point", "parent_objects": [], "frame_ids": ids, "points": yx.tolist()})
        frames, height, width, _ = sample.pixels.shape
        metadata = {
            "split": LISTS[split],
            "video_id": sample.id,
            "frame_rate": float(rate_hz),
            "num_frames": frames,
            "resolution": [height, width],
            "audio_samples": 0,
            "audio_sample_rate": 0,
            "is_cup_game": 0,
            "is_camera_moving": 0,
        }
        entries[sample.id] = {"metadata": metadata, "point_tracking": tracks}
    text = json.dumps(entries, sort_keys=True, allow_nan=False)  # on one line, as the authors' files are
    (root / f"point_tracking_{LISTS[split]}.json").write_text(text)


def _sample(root: Path, item: tuple[str, dict], *, frames: int, rate_hz: float, side_px: int) -> Sample:
    name, entry = item
    numbers = np.round(np.arange(frames) * _rate_hz(root, name, entry) / rate_hz).astype(int)
    height, width = entry["metadata"]["resolution"]
    crop = Crop(height, width, side_px)
    tracks, seen = [], []
    for track in entry["point_tracking"]:
        points, visible = _track(root, name, track, numbers)
        points = crop.points(points)
        visible &= ((points >= 0) & (points < 1)).all(-1)
        if visible[0]:
            tracks.append(np.where(visible[:, None], points, 0).astype(np.float32))
            seen.append(visible)
    if not tracks:
        raise LeftOut(f"{root}: no track of {name} is visible in the first frame's square")
    pictures = at_numbers(needed(root, root / "videos" / f"{name}.mp4", "listed in the tracks"), numbers)
    return Sample(
        id=name,
        video=name,
        pixels=Crop(*pictures.shape[1:3], side_px).pixels(pictures),
        labels={"points": np.stack(tracks)},
        valid={"points": np.stack(seen)},
    )


def _list(root: Path, split: str) -> Path:
    return needed(root, root / f"point_tracking_{LISTS[split]}.json", "tracks by video_id")


def _entries(root: Path, split: str) -> dict[str, dict]:
    path = _list(root, split)
    entries = load_json(path, dict)
    for name, entry in entries.items():
        if not isinstance(entry, dict) or "metadata" not in entry:
            raise UserError(f"{path}: {name} has no metadata")
        if not name.replace("_", "").isalnum():
            raise UserError(f"{path}: {name!r} is not the name of a video")
    return entries


def _rate_hz(root: Path, name: str, entry: dict) -> float:
    rate_hz = entry["metadata"].get("frame_rate")
    if not isinstance(rate_hz, int | float) or rate_hz <= 0 or len(entry["metadata"].get("resolution", ())) != 2:
        raise UserError(f"{root}: the metadata of {name} needs a frame_rate above 0 and a resolution [height, width]")
    return float(rate_hz)


def _track(root: Path, name: str, track: dict, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """points `T 2`, x y, and visible `T` at the wanted frame numbers."""
    try:
        ids, points = np.asarray(track["frame_ids"], int), np.asarray(track["points"], float)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{root}: a track of {name} needs frame_ids and points as numbers: {error!r}") from error
    if not len(ids):
        return np.zeros((len(numbers), 2)), np.zeros(len(numbers), bool)
    if points.shape == (2, len(ids)):
        yx = points.T
    elif points.shape == (len(ids), 2):
        yx = points
    else:
        raise UserError(
            f"{root}: track {track.get('id')} of {name} has points {points.shape} for {len(ids)} frames; needed 2 x {len(ids)}"
        )
    where = {int(frame): n for n, frame in enumerate(ids)}
    at = np.array([where.get(int(number), -1) for number in numbers])
    visible = at >= 0
    xy = np.zeros((len(numbers), 2))
    xy[visible] = yx[at[visible], ::-1]
    return xy, visible
