"""Perception Test (points): `videos/<video_id>.mp4` and `point_tracking_{train,valid}.json` or `all_{train,valid}.json`.

In the file, a track's `points` are `[2][N]`, y then x, in 0..1 of the height and width, for the N *visible* frames in
`frame_ids`. The README's `[N][2]` is read too; where both fit, `[2][N]` holds. Facts: the official README and baseline notebooks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d.benchmarks.frames import Crop, Samples, all_there, at_numbers, load_json, needed
from scaling4d.benchmarks.queries import asked
from scaling4d.benchmarks.skipped import LeftOut, Skipped
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "145 in all splits", "val": "145 in all splits"}
LISTS = {"train": "train", "val": "valid"}
KIND = "point_tracking"
MAX_FRAMES = 1_000_000  # of a video; more is no number of frames


def read(
    root: Path,
    split: str,
    *,
    frames: int,
    rate_hz: float,
    side_px: int,
    part: slice = slice(None),
    skipped: list[Skipped] | None = None,
    queries: str = "frame_0",
) -> Samples:
    """label points `Q T 2` with valid (visible): the tracks that are asked about in the clip's first frame; without any, no
    sample. queries: see `queries.asked`."""
    some = partial(_samples, root, list_of(root, split, KIND), frames=frames, rate_hz=rate_hz, side_px=side_px, how=queries)
    return Samples(list(tracked(root, split, KIND).items())[part], some, skipped, lambda item: item[0])


def count(root: Path, split: str) -> int:
    """Listed videos that have tracks.

    Raises:
        UserError: another layout, no tracks, or videos that are not there.
    """
    return count_tracked(root, split, KIND)


def layout(root: Path, split: str) -> str:
    """The list that is read."""
    return list_of(root, split, KIND).name


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
        entries[sample.id] = {"metadata": metadata(sample, split, rate_hz=rate_hz), KIND: tracks}
    write_list(root, split, KIND, entries)


def _samples(
    root: Path, listed: Path, item: tuple[str, dict], *, frames: int, rate_hz: float, side_px: int, how: str
) -> list[Sample]:
    name, entry = item
    after, crop = shown(listed, name, entry, frames=frames, rate_hz=rate_hz, side_px=side_px)
    numbers = np.arange(max(entry["metadata"]["num_frames"], after[-1] + 1))
    tracks = [_track(listed, name, track, numbers) for track in entry[KIND]]
    points, visible = (np.stack(some) for some in zip(*tracks, strict=True))
    points = crop.points(points)
    clips = asked(name, points, visible & ((points >= 0) & (points < 1)).all(-1), after, how)
    if not clips:
        raise LeftOut(f"{listed}: no track of {name} is visible in the square where queries = {how!r} asks")
    shown_in_any = np.unique([clip.numbers for clip in clips])
    seen = pixels(root, name, shown_in_any, side_px=side_px)
    return [
        Sample(
            id=clip.id,
            video=name,
            pixels=seen[np.searchsorted(shown_in_any, clip.numbers)],
            labels={"points": clip.points},
            valid={"points": clip.visible},
        )
        for clip in clips
    ]


def list_of(root: Path, split: str, kind: str) -> Path:
    """Annotations of one kind, or of all kinds together.

    Raises:
        UserError: neither is there.
    """
    everything = root / f"all_{LISTS[split]}.json"
    one = root / f"{kind}_{LISTS[split]}.json"
    return everything if everything.is_file() and not one.is_file() else needed(root, one, "tracks by video_id")


def tracked(root: Path, split: str, kind: str) -> dict[str, dict]:
    """Entries by video_id; those that have tracks of this kind. Where there are none, the key may be there or not.

    Raises:
        UserError: another layout, an entry without metadata, or a strange video_id.
    """
    path = list_of(root, split, kind)
    entries = load_json(path, dict)
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("metadata"), dict):
            raise UserError(f"{path}: {name} has no metadata")
        if not name.replace("_", "").isalnum():
            raise UserError(f"{path}: {name!r} is not the name of a video")
    return {name: entry for name, entry in entries.items() if entry.get(kind)}


def count_tracked(root: Path, split: str, kind: str) -> int:
    names = tracked(root, split, kind)
    if not names:
        raise UserError(f"{list_of(root, split, kind)} has no {kind.replace('_', ' ')}")
    folder = needed(root, root / "videos", "videos <video_id>.mp4")
    return all_there(folder, [f"{name}.mp4" for name in names], f"videos of {split}")


def shown(listed: Path, name: str, entry: dict, *, frames: int, rate_hz: float, side_px: int) -> tuple[np.ndarray, Crop]:
    """Numbers `T` of the frames that a clip shows, and the crop of what is placed in 0..1 of the picture."""
    known = entry["metadata"]
    stored_hz, size = known.get("frame_rate"), known.get("resolution")
    if not isinstance(stored_hz, int | float) or stored_hz <= 0 or not isinstance(size, list) or len(size) != 2:
        raise UserError(f"{listed}: the metadata of {name} needs a frame_rate above 0 and a resolution [height, width]")
    if not isinstance(known.get("num_frames"), int) or not 0 < known["num_frames"] <= MAX_FRAMES:
        raise UserError(f"{listed}: the metadata of {name} needs num_frames in 1 .. {MAX_FRAMES}")
    return np.round(np.arange(frames) * stored_hz / rate_hz).astype(int), Crop(*size, side_px)


def pixels(root: Path, name: str, numbers: np.ndarray, *, side_px: int) -> np.ndarray:
    """uint8 `T side side 3`: the frames of these ascending numbers."""
    pictures = at_numbers(needed(root, root / "videos" / f"{name}.mp4", "listed in the tracks"), numbers)
    first = next(pictures)
    return Crop(*first.shape[:2], side_px).pixels(chain([first], pictures))


def metadata(sample: Sample, split: str, *, rate_hz: float) -> dict:
    frames, height, width, _ = sample.pixels.shape
    return {
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


def write_list(root: Path, split: str, kind: str, entries: dict[str, dict]) -> None:
    text = json.dumps(entries, sort_keys=True, allow_nan=False)  # on one line, as the authors' files are
    (root / f"{kind}_{LISTS[split]}.json").write_text(text)


def _track(listed: Path, name: str, track: dict, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """points `T 2`, x y, and visible `T` at the wanted frame numbers."""
    try:
        ids, points = np.asarray(track["frame_ids"], int), np.asarray(track["points"], float)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{listed}: a track of {name} needs frame_ids and points as numbers: {error!r}") from error
    if not len(ids):
        return np.zeros((len(numbers), 2)), np.zeros(len(numbers), bool)
    if points.shape == (2, len(ids)):
        yx = points.T
    elif points.shape == (len(ids), 2):
        yx = points
    else:
        raise UserError(
            f"{listed}: track {track.get('id')} of {name} has points {points.shape} for {len(ids)} frames; needed 2 x {len(ids)}"
        )
    where = {int(frame): n for n, frame in enumerate(ids)}
    at = np.array([where.get(int(number), -1) for number in numbers])
    visible = at >= 0
    xy = np.zeros((len(numbers), 2))
    xy[visible] = yx[at[visible], ::-1]
    return xy, visible
