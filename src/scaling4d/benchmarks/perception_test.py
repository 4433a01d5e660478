"""Perception Test (points): `videos/<video_id>.mp4`, `point_tracking_{train,valid}.json` or `all_{train,valid}.json`.

In the file, a track's `points` are `[2][N]`, y then x, in 0..1 of the height and width, for the N *visible* frames in
`frame_ids`. The README's `[N][2]` is read too; where both fit, `[2][N]` holds. Facts: the official README and baseline
notebooks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d.benchmarks.frames import Crop, load_json, missing_files, require_path, squares_by_number
from scaling4d.benchmarks.queries import query_clips
from scaling4d.benchmarks.samples import ClipRequest, ExcludedItem, MissingFiles, Samples
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "at most 145 (all splits)", "val": "at most 145 (all splits)"}  # README; no count by split is at hand
LISTS = {"train": "train", "val": "valid"}
KIND = "point_tracking"
MAX_FRAMES, MAX_RATE_HZ = 100_000, 1000  # of a video; a larger num_frames or frame_rate is an error in the file


def open_split(root: Path, split: str, request: ClipRequest) -> Samples:
    """Samples with the label points `Q T 2` and valid (visible): the tracks visible in a clip's query frame.

    See `queries`. A video without any is excluded.
    """
    path, items, missing = read_tracks(root, split, KIND)

    def load(item: tuple[str, dict], positions: Sequence[float] = request.positions) -> list[Sample]:
        name, entry = item
        offsets, crop = clip_frames(path, name, entry, KIND, request)
        total = max(entry["metadata"]["num_frames"], offsets[-1] + 1)
        tracks = [_track(path, name, track, total) for track in entry[KIND]]
        points, visible = (np.stack(arrays) for arrays in zip(*tracks, strict=True))
        clips = query_clips(name, crop.points(points), visible, offsets, request, positions)
        if not clips:
            raise ExcludedItem(f"{path}: {name} has no visible track in the square at queries = {request.queries!r}")
        numbers = np.unique([clip.frame_numbers for clip in clips])
        pixels = read_pixels(root, name, numbers, request)
        shown = [pixels[np.searchsorted(numbers, clip.frame_numbers)] for clip in clips]
        clips = zip(clips, shown, strict=True)
        return [Sample(c.id, name, frames, {"points": c.points}, {"points": c.visible}) for c, frames in clips]

    return Samples(items, load, itemgetter(0), len(items), path.name, missing)


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, crf: int, gop: int) -> None:
    """Write samples with label points `Q T 2` and valid `Q T`."""
    (root / "videos").mkdir(parents=True, exist_ok=True)
    entries = {}
    for sample in samples:
        video.encode(root / "videos" / f"{sample.id}.mp4", sample.pixels, rate_hz=rate_hz, crf=crf, gop=gop)
        frames, height, width, _ = sample.pixels.shape
        metadata = dict.fromkeys(("audio_samples", "audio_sample_rate", "is_cup_game", "is_camera_moving"), 0)
        metadata |= {"split": LISTS[split], "video_id": sample.id, "frame_rate": float(rate_hz)}
        metadata |= {"num_frames": frames, "resolution": [height, width]}
        tracks = []
        for q, (points, visible) in enumerate(zip(sample.labels["points"], sample.valid["points"], strict=True)):
            yx = np.round(points[visible][:, ::-1].T.astype(float), 5)  # 2 N
            ids = np.nonzero(visible)[0].tolist()
            tracks.append({"id": q, "label": "point", "parent_objects": [], "frame_ids": ids, "points": yx.tolist()})
        entries[sample.id] = {"metadata": metadata, KIND: tracks}
    text = json.dumps(entries, sort_keys=True, allow_nan=False)  # on one line, as the authors' files are
    (root / f"{KIND}_{LISTS[split]}.json").write_text(text)


# ---- shared with the objects ----


def read_tracks(root: Path, split: str, kind: str) -> tuple[Path, list[tuple[str, dict]], MissingFiles | None]:
    """The list, its (video_id, entry) with tracks of this kind, and the error of missing videos.

    A list has tracks of one kind, or all annotations; there, an entry without a kind lacks its key or has no tracks.
    Raises UserError: another layout, no tracks, or a video_id that is no file name.
    """
    path, all_kinds = (root / f"{prefix}_{LISTS[split]}.json" for prefix in (kind, "all"))
    path = all_kinds if all_kinds.is_file() and not path.is_file() else require_path(root, path, "tracks by video_id")
    entries = load_json(path, dict)
    for name in entries:
        if not name.replace("_", "").isalnum():
            raise UserError(f"{path}: {name!r} is not the name of a video")
    items = [(name, entry) for name, entry in entries.items() if not isinstance(entry, dict) or entry.get(kind)]
    if not items:
        raise UserError(f"{path} has no {kind.replace('_', ' ')}")
    folder = require_path(root, root / "videos", "videos <video_id>.mp4")
    return path, items, missing_files(folder, [f"{name}.mp4" for name, _ in items], f"videos of {split}")


def clip_frames(path: Path, name: str, entry: dict, kind: str, request: ClipRequest) -> tuple[np.ndarray, Crop]:
    """Frame numbers `T` of a clip, counted from its first, and the crop for labels in 0..1 of the picture.

    Raises UserError: the entry has no metadata, or tracks that are no list of dicts.
    """
    metadata, tracks = (entry.get(key) for key in ("metadata", kind)) if isinstance(entry, dict) else (None, None)
    if not isinstance(metadata, dict) or not isinstance(tracks, list) or not all(isinstance(track, dict) for track in tracks):
        raise UserError(f"{path}: {name} has no metadata, or no list of tracks; needed a dict with metadata and {kind}")
    stored_hz, size = metadata.get("frame_rate"), metadata.get("resolution")
    usable = isinstance(stored_hz, int | float) and 0 < stored_hz <= MAX_RATE_HZ
    if not usable or not isinstance(size, list) or len(size) != 2:
        needs = f"a frame_rate in 0 .. {MAX_RATE_HZ} and a resolution [height, width]"
        raise UserError(f"{path}: the metadata of {name} needs {needs}")
    if not isinstance(metadata.get("num_frames"), int) or not 0 < metadata["num_frames"] <= MAX_FRAMES:
        raise UserError(f"{path}: the metadata of {name} needs num_frames in 1 .. {MAX_FRAMES}")
    return request.frame_numbers(stored_hz), Crop(*size, request.side_px)


def read_pixels(root: Path, name: str, numbers: np.ndarray, request: ClipRequest) -> np.ndarray:
    """uint8 `T side side 3`: the frames of these ascending numbers."""
    path = require_path(root, root / "videos" / f"{name}.mp4", "listed in the tracks")
    return squares_by_number(path, numbers, request.side_px)


def _track(path: Path, name: str, track: dict, total: int) -> tuple[np.ndarray, np.ndarray]:
    """points `F 2`, x y, and visible `F`, in the first `total` frames of the video."""
    try:
        ids, points = np.asarray(track["frame_ids"], int), np.asarray(track["points"], float)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: a track of {name} needs frame_ids and points as numbers: {error!r}") from error
    if ids.ndim != 1:
        raise UserError(f"{path}: a track of {name} needs a list of frame_ids, found {ids.shape}")
    xy, visible = np.zeros((total, 2)), np.zeros(total, bool)
    if not len(ids):
        return xy, visible
    if points.shape not in ((2, len(ids)), (len(ids), 2)):
        has = f"has points {points.shape} for {len(ids)} frames; needed 2 x {len(ids)}"
        raise UserError(f"{path}: track {track.get('id')} of {name} {has}")
    yx = points.T if points.shape == (2, len(ids)) else points
    inside = (ids >= 0) & (ids < total)
    xy[ids[inside]] = yx[inside, ::-1]
    visible[ids[inside]] = True
    return xy, visible
