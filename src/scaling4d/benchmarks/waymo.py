"""Waymo Open, perception v2 (boxes): `{training,validation}/{camera_image,camera_box}/<context>.parquet`, camera FRONT.

Boxes are in pixels of the full picture: centre x y, size x y. An object's id is stable within one camera. The camera's name is a
number or, in the authors' test data, a string. Facts: the v2 tutorial and its column types.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from scaling4d.benchmarks.frames import Crop, needed
from scaling4d.records import Sample, UserError

FOLDERS = {"train": "training", "val": "validation"}
FRONT = (1, "FRONT")
VEHICLE = 1
MIN_AREA = 0.005  # of the square: smaller boxes in frame 0 are dropped (InternVideo-Next's account of the protocol)
KEYS = ("key.segment_context_name", "key.frame_timestamp_micros", "key.camera_name")
OBJECT = "key.camera_object_id"
IMAGE, POSE = "[CameraImageComponent].image", "[CameraImageComponent].pose.transform"
BOX = tuple(f"[CameraBoxComponent].box.{part}" for part in ("center.x", "center.y", "size.x", "size.y"))
TYPE = "[CameraBoxComponent].type"
LEVELS = tuple(f"[CameraBoxComponent].difficulty_level.{kind}" for kind in ("detection", "tracking"))


def read(root: Path, split: str, *, frames: int, rate_hz: float, side_px: int, part: slice = slice(None)) -> Iterator[Sample]:
    """label boxes `Q T 4` with valid (the object is labelled there): the objects of frame 0; without any, no sample."""
    for context in _contexts(root, split)[part]:
        folder = root / FOLDERS[split]
        images = _front(folder / "camera_image" / f"{context}.parquet", [*KEYS[1:], IMAGE])
        if not images:
            raise UserError(f"{folder / 'camera_image' / context}.parquet has no picture of camera FRONT")
        pictures_of = {row[KEYS[1]]: row[IMAGE] for row in images}
        stamps = np.array(sorted(pictures_of))
        wanted = stamps[0] + np.arange(frames) / rate_hz * 1e6
        if wanted[-1] > stamps[-1] + np.diff(stamps).max(initial=0):
            raise UserError(
                f"{folder / 'camera_image' / context}.parquet ends after {(stamps[-1] - stamps[0]) / 1e6:.2f} s, "
                f"too early for {frames} frames at {rate_hz} Hz; lower clip.frames or raise rate_hz"
            )
        stamps = stamps[np.abs(stamps[:, None] - wanted).argmin(0)]  # T
        pictures = [_decode(folder, context, pictures_of[stamp]) for stamp in stamps]
        crop = Crop(*pictures[0].shape[:2], side_px)
        rows = _front(folder / "camera_box" / f"{context}.parquet", [*KEYS[1:], OBJECT, *BOX])
        boxes, valid = _tracks(rows, stamps, crop)
        if len(boxes):
            yield Sample(id=context, video=context, pixels=crop.pixels(pictures), labels={"boxes": boxes}, valid={"boxes": valid})


def count(root: Path, split: str) -> int:
    """Segments.

    Raises:
        UserError: another layout, no segments, or pictures without boxes.
    """
    contexts = _contexts(root, split)
    folder = needed(root, root / FOLDERS[split] / "camera_box", "boxes <context>.parquet")
    missing = [context for context in contexts if not (folder / f"{context}.parquet").is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(contexts)} segments, the first is {missing[0]}.parquet")
    return len(contexts)


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, jpeg_quality: int) -> None:
    """Samples with label boxes `Q T 4` and valid `Q T`; every object is written as a vehicle."""
    import pyarrow as pa

    folder = root / FOLDERS[split]
    for name in ("camera_image", "camera_box"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for sample in samples:
        frames, height, width, _ = sample.pixels.shape
        stamps = [round(t / rate_hz * 1e6) for t in range(frames)]
        jpegs = []
        for picture in sample.pixels:
            jpeg = io.BytesIO()
            Image.fromarray(picture).save(jpeg, "JPEG", quality=jpeg_quality, optimize=True)
            jpegs.append(jpeg.getvalue())
        images = {
            KEYS[0]: [sample.id] * frames,
            KEYS[1]: pa.array(stamps, pa.int64()),
            KEYS[2]: pa.array([FRONT[0]] * frames, pa.int8()),
            IMAGE: pa.array(jpegs, pa.binary()),
            POSE: pa.array([np.eye(4).ravel().tolist()] * frames, pa.list_(pa.float64(), 16)),
        }
        _write(folder / "camera_image" / f"{sample.id}.parquet", images)
        t, q = np.nonzero(sample.valid["boxes"].T)
        box = sample.labels["boxes"][q, t].astype(float) * [width, height, width, height]  # n 4
        columns = np.concatenate([(box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]], 1).T
        labels = {
            KEYS[0]: [sample.id] * len(t),
            KEYS[1]: pa.array([stamps[i] for i in t], pa.int64()),
            KEYS[2]: pa.array([FRONT[0]] * len(t), pa.int8()),
            OBJECT: [f"{sample.id}-{i}" for i in q],
            **{name: pa.array(column, pa.float64()) for name, column in zip(BOX, columns, strict=True)},
            TYPE: pa.array([VEHICLE] * len(t), pa.int8()),
            **{name: pa.array([None] * len(t), pa.int8()) for name in LEVELS},
        }
        _write(folder / "camera_box" / f"{sample.id}.parquet", labels)


def _write(path: Path, columns: dict) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False)


def _contexts(root: Path, split: str) -> list[str]:
    folder = needed(root, root / FOLDERS[split] / "camera_image", "pictures <context>.parquet")
    if not (contexts := sorted(path.stem for path in folder.glob("*.parquet"))):
        raise UserError(f"{folder} holds no <context>.parquet")
    return contexts


def _front(path: Path, columns: list[str]) -> list[dict]:
    """The rows of camera FRONT."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"no {path}; needed one beside the segment's pictures")
    try:
        rows = pq.ParquetFile(path).read(columns=columns).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if rows and set(rows[0]) != set(columns):
        raise UserError(f"{path} lacks the columns {', '.join(sorted(set(columns) - set(rows[0])))}")
    return [row for row in rows if row[KEYS[2]] in FRONT]


def _decode(folder: Path, context: str, jpeg: bytes) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{folder / 'camera_image' / context}.parquet: a picture is damaged: {error}") from error


def _tracks(rows: list[dict], stamps: np.ndarray, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """boxes `Q T 4` float32 of the square and valid `Q T`; objects in order of their ids."""
    of_object: dict[str, dict[int, np.ndarray]] = {}
    for row in rows:
        x, y, width, height = (row[name] for name in BOX)
        box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        of_object.setdefault(row[OBJECT], {})[row[KEYS[1]]] = box / [crop.width, crop.height, crop.width, crop.height]
    boxes, valid = [], []
    for _, track in sorted(of_object.items()):
        there = np.array([stamp in track for stamp in stamps])
        inside = crop.boxes(np.stack([track.get(stamp, np.zeros(4)) for stamp in stamps]))  # T 4
        area = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
        there &= area > 0
        if there[0] and area[0] >= MIN_AREA:
            boxes.append(np.where(there[:, None], inside, 0).astype(np.float32))
            valid.append(there)
    if not boxes:
        return np.zeros((0, len(stamps), 4), np.float32), np.zeros((0, len(stamps)), bool)
    return np.stack(boxes), np.stack(valid)
