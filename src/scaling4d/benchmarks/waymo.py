"""Waymo Open, perception (boxes), camera FRONT. In `{training,validation}/`, found in this order:

v2: `{camera_image,camera_box}/<context>.parquet`. The camera's name is a number or, in the authors' test data, a string.
v1: `segment-<context>_with_camera_labels.tfrecord`. Pictures and labels come in no order of cameras; of a box, `length` is its
extent in x and `width` in y.

Boxes are in pixels of the full picture: centre x y, size x y. An object's id is stable within one camera. Facts: the v2 tutorial
and its column types; dataset.proto, label.proto and the v1 tutorial.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from scaling4d.benchmarks import tfrecord
from scaling4d.benchmarks.frames import Crop, Samples, all_there, each, needed
from scaling4d.benchmarks.skipped import LeftOut, Skipped
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "798", "val": "202"}
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
RECORD = ("segment-", "_with_camera_labels.tfrecord")
CONTEXT, STAMP, PICTURES, LABELS = 1, 2, 4, 8  # fields of a Frame
CAMERA, CONTENT = 1, 2  # of its CameraImage and CameraLabels
LABEL_BOX, LABEL_TYPE, LABEL_ID = 1, 3, 4
CENTRE_X, CENTRE_Y, WIDTH, LENGTH = 1, 2, 4, 5  # of a Label's Box


@dataclass(frozen=True)
class Segment:
    """The start of a segment as camera FRONT saw it: picture by time stamp in microseconds; of every object, its box
    (centre x y, size x y, px of the whole picture) by time stamp."""

    path: Path
    jpegs: dict[int, bytes]
    boxes: dict[str, dict[int, tuple[float, float, float, float]]]


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
    """label boxes `Q T 4` with valid (the object is labelled there): the objects of frame 0; without any, no sample."""
    one = partial(_sample, root / FOLDERS[split], frames=frames, rate_hz=rate_hz, side_px=side_px)
    return each(_contexts(root, split)[part], one, skipped)


def layout(root: Path, split: str) -> str:
    """Raises UserError: neither of the two."""
    return "v2, parquet" if _is_v2(root / FOLDERS[split], _contexts(root, split)[0]) else "v1, tfrecord"


def _sample(folder: Path, context: str, *, frames: int, rate_hz: float, side_px: int) -> Sample:
    after_us = np.arange(frames) / rate_hz * 1e6
    segment = (_parquet if _is_v2(folder, context) else _records)(folder, context, after_us[-1])
    if not segment.jpegs:
        raise UserError(f"{segment.path} has no picture of camera FRONT")
    stamps = np.array(sorted(segment.jpegs))
    wanted = stamps[0] + after_us
    if wanted[-1] > stamps[-1] + np.diff(stamps).max(initial=0):
        raise UserError(
            f"{segment.path} ends after {(stamps[-1] - stamps[0]) / 1e6:.2f} s, "
            f"too early for {frames} frames at {rate_hz} Hz; lower clip.frames or raise rate_hz"
        )
    stamps = stamps[np.abs(stamps[:, None] - wanted).argmin(0)]  # T
    pictures = [_decode(segment.path, segment.jpegs[stamp]) for stamp in stamps]
    crop = Crop(*pictures[0].shape[:2], side_px)
    boxes, valid = _tracks(segment.boxes, stamps, crop)
    if not len(boxes):
        raise LeftOut(f"{segment.path}: no object covers {MIN_AREA} of the square in the first frame")
    return Sample(id=context, video=context, pixels=crop.pixels(pictures), labels={"boxes": boxes}, valid={"boxes": valid})


def count(root: Path, split: str) -> int:
    """Segments.

    Raises:
        UserError: another layout, no segments, or pictures without boxes.
    """
    contexts = _contexts(root, split)
    if not _is_v2(root / FOLDERS[split], contexts[0]):
        return len(contexts)
    folder = needed(root, root / FOLDERS[split] / "camera_box", "boxes <context>.parquet")
    return all_there(folder, [f"{context}.parquet" for context in contexts], f"segments of {split}")


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, jpeg_quality: int) -> None:
    """Samples with label boxes `Q T 4` and valid `Q T`; every object is written as a vehicle."""
    import pyarrow as pa

    folder = root / FOLDERS[split]
    for name in ("camera_image", "camera_box"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for sample in samples:
        frames, height, width, _ = sample.pixels.shape
        stamps = [round(t / rate_hz * 1e6) for t in range(frames)]
        jpegs = [_encode(picture, jpeg_quality) for picture in sample.pixels]
        images = {
            KEYS[0]: [sample.id] * frames,
            KEYS[1]: pa.array(stamps, pa.int64()),
            KEYS[2]: pa.array([FRONT[0]] * frames, pa.int8()),
            IMAGE: pa.array(jpegs, pa.binary()),
            POSE: pa.array([np.eye(4).ravel().tolist()] * frames, pa.list_(pa.float64(), 16)),
        }
        _write(folder / "camera_image" / f"{sample.id}.parquet", images)
        t, q = np.nonzero(sample.valid["boxes"].T)
        columns = _centres_and_sizes(sample)[q, t].T
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


def write_records(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, jpeg_quality: int) -> None:
    """The same in the format of v1."""
    (root / FOLDERS[split]).mkdir(parents=True, exist_ok=True)
    for sample in samples:
        boxes, there = _centres_and_sizes(sample), sample.valid["boxes"]
        frames = []
        for t, picture in enumerate(sample.pixels):
            shown = [(CONTENT, _label(f"{sample.id}-{q}", boxes[q, t])) for q in np.nonzero(there[:, t])[0]]
            image = [(CAMERA, FRONT[0]), (CONTENT, _encode(picture, jpeg_quality))]
            frame = [
                (CONTEXT, tfrecord.message([(1, sample.id.encode())])),
                (STAMP, round(t / rate_hz * 1e6)),
                (PICTURES, tfrecord.message(image)),
                (LABELS, tfrecord.message([(CAMERA, FRONT[0]), *shown])),
            ]
            frames.append(tfrecord.message(frame))
        tfrecord.write(root / FOLDERS[split] / sample.id.join(RECORD), frames)


def _label(name: str, box: np.ndarray) -> bytes:
    x, y, width, height = map(float, box)
    inner = tfrecord.message([(CENTRE_X, x), (CENTRE_Y, y), (WIDTH, height), (LENGTH, width)])
    return tfrecord.message([(LABEL_BOX, inner), (LABEL_TYPE, VEHICLE), (LABEL_ID, name.encode())])


def _centres_and_sizes(sample: Sample) -> np.ndarray:
    """`Q T 4`: centre x y, size x y in px of the whole picture."""
    height, width = sample.pixels.shape[1:3]
    boxes = sample.labels["boxes"].astype(float) * [width, height, width, height]
    return np.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def _encode(picture: np.ndarray, quality: int) -> bytes:
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=quality, optimize=True)
    return jpeg.getvalue()


def _write(path: Path, columns: dict) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False)


def _contexts(root: Path, split: str) -> list[str]:
    folder = root / FOLDERS[split]
    first, last = RECORD
    contexts = sorted(path.stem for path in (folder / "camera_image").glob("*.parquet")) or sorted(
        path.name.removeprefix(first).removesuffix(last) for path in folder.glob(f"{first}*{last}")
    )
    if not contexts:
        needed(root, folder / "camera_image", f"pictures <context>.parquet, or {folder.name}/{first}<context>{last}")
        raise UserError(f"{folder / 'camera_image'} holds no <context>.parquet")
    return contexts


def _is_v2(folder: Path, context: str) -> bool:
    return (folder / "camera_image" / f"{context}.parquet").is_file()


def _parquet(folder: Path, context: str, until_us: float) -> Segment:
    path = folder / "camera_image" / f"{context}.parquet"
    jpegs = {row[KEYS[1]]: row[IMAGE] for row in _front(path, [*KEYS[1:], IMAGE])}
    boxes: dict[str, dict] = {}
    for row in _front(folder / "camera_box" / f"{context}.parquet", [*KEYS[1:], OBJECT, *BOX]):
        boxes.setdefault(row[OBJECT], {})[row[KEYS[1]]] = tuple(row[name] for name in BOX)
    return Segment(path, jpegs, boxes)


def _records(folder: Path, context: str, until_us: float) -> Segment:
    """Reading stops after the first frame that is `until_us` behind the first one."""
    path = folder / context.join(RECORD)
    jpegs: dict[int, bytes] = {}
    boxes: dict[str, dict] = {}
    for number, record in enumerate(tfrecord.records(path)):
        try:
            stamp, jpeg, labels = _frame(record)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: record {number} is no Frame of Waymo Open: {error}") from error
        if jpeg is None:
            continue
        jpegs[stamp] = jpeg
        for name, box in labels:
            boxes.setdefault(name, {})[stamp] = box
        if stamp >= min(jpegs) + until_us:
            break
    return Segment(path, jpegs, boxes)


def _frame(record: memoryview) -> tuple[int, bytes | None, list[tuple[str, tuple]]]:
    """Time stamp in microseconds; of camera FRONT, the picture if there is one, and the labels: id, centre x y, size x y."""
    stamp, jpeg, labels = 0, None, []
    for field, value in tfrecord.fields(record):
        if field == STAMP:
            stamp = int(value)
        elif field in (PICTURES, LABELS):
            inner = list(tfrecord.fields(value))
            if dict(inner).get(CAMERA) != FRONT[0]:
                continue
            if field == PICTURES:
                jpeg = bytes(dict(inner)[CONTENT])
            else:
                labels = [_labelled(dict(tfrecord.fields(label))) for name, label in inner if name == CONTENT]
    return stamp, jpeg, labels


def _labelled(label: dict) -> tuple[str, tuple[float, float, float, float]]:
    box = dict(tfrecord.fields(label[LABEL_BOX]))
    return str(label[LABEL_ID], "utf-8"), tuple(box.get(part, 0.0) for part in (CENTRE_X, CENTRE_Y, LENGTH, WIDTH))


def _front(path: Path, columns: list[str]) -> list[dict]:
    """The rows of camera FRONT."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"no {path}; needed one beside the segment's pictures")
    try:
        schema = pq.read_schema(path)
        if lacking := sorted(set(columns) - set(schema.names)):
            raise UserError(f"{path} lacks the columns {', '.join(lacking)}")
        front = FRONT[not pa.types.is_integer(schema.field(KEYS[2]).type)]
        return pq.read_table(path, columns=columns, filters=[(KEYS[2], "==", front)], partitioning=None).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _decode(path: Path, jpeg: bytes) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: a picture is damaged: {error}") from error


def _tracks(objects: dict[str, dict[int, tuple]], stamps: np.ndarray, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """boxes `Q T 4` float32 of the square and valid `Q T`; objects in order of their ids. Outside the square is not valid."""
    boxes, valid = [np.zeros((0, len(stamps), 4), np.float32)], [np.zeros((0, len(stamps)), bool)]
    for _, track in sorted(objects.items()):
        there = np.array([stamp in track for stamp in stamps])
        x, y, width, height = np.array([track.get(stamp, np.zeros(4)) for stamp in stamps], float).T
        there &= np.isfinite([x, y, width, height]).all(0) & (width > 0) & (height > 0)
        corners = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)  # T 4
        inside = crop.boxes(corners / [crop.width, crop.height, crop.width, crop.height])
        area = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
        there &= area > 0
        if there[0] and area[0] >= MIN_AREA:
            boxes.append(np.where(there[:, None], inside, 0).astype(np.float32)[None])
            valid.append(there[None])
    return np.concatenate(boxes), np.concatenate(valid)
