"""Waymo Open, perception (boxes), camera FRONT. In `{training,validation}/`, the first version that exists.

v2: `{camera_image,camera_box}/<context>.parquet`. The camera is a number or, in the authors' test data, a string.
v1: `segment-<context>_with_camera_labels.tfrecord`. Pictures and labels come in no order of cameras; of a box, `length`
is its extent in x and `width` in y.

Boxes are in pixels of the full picture: centre x y, size x y. An object's id is stable within one camera. Facts: the v2
tutorial and its column types; dataset.proto, label.proto and the v1 tutorial.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling4d.benchmarks import tfrecord
from scaling4d.benchmarks.frames import Crop, encode_jpeg, missing_files, nearest_rows, open_picture, require_path, start_rows
from scaling4d.benchmarks.samples import ClipRequest, ExcludedItem, Samples, at_positions, content_of
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "798", "val": "202"}
FOLDERS = {"train": "training", "val": "validation"}
FRONT = (1, "FRONT")
VEHICLE = 1
# InternVideo-Next's account of the protocol (arXiv:2512.01342, A.4). Of an object: the smallest area in frame 0 as a
# share of the square, the smallest share of a window's frames, and the largest gap. A gap is counted from one frame
# with the object to the next, or to the window's end (our reading): a gap of 5 passes, and 5 frames in a row without
# the object do not. Were these the gap, 5 would pass. In windows of 16 frames both are one: MIN_PRESENCE leaves 4 such.
MIN_AREA, MIN_PRESENCE, MAX_GAP = 0.005, 0.7, 5
# Of a window: the most objects in its first frame, and the smallest share of its frames that show all of them together,
# 10 of 16 there. Objects that MIN_PRESENCE and MAX_GAP drop count, too (our reading).
MAX_OBJECTS, MIN_SHARED = 25, 10 / 16
RATE_HZ, FRAMES = 10.0, 199  # of the authors' sample segment, 20 s
WINDOW_STEP = 3  # stored frames from a window's start to the next one's (ours)
KEYS = ("key.segment_context_name", "key.frame_timestamp_micros", "key.camera_name")
OBJECT = "key.camera_object_id"
IMAGE, POSE = "[CameraImageComponent].image", "[CameraImageComponent].pose.transform"
BOX = tuple(f"[CameraBoxComponent].box.{part}" for part in ("center.x", "center.y", "size.x", "size.y"))
TYPE = "[CameraBoxComponent].type"
LEVELS = tuple(f"[CameraBoxComponent].difficulty_level.{kind}" for kind in ("detection", "tracking"))
RECORD = ("segment-", "_with_camera_labels.tfrecord")
STAMP, PICTURES, LABELS = 2, 4, 8  # fields of a Frame
CAMERA, CONTENT = 1, 2  # of its CameraImage and CameraLabels
LABEL_BOX, LABEL_ID = 1, 4
CENTRE_X, CENTRE_Y, WIDTH, LENGTH = 1, 2, 4, 5  # of a Label's Box

BoxPx = tuple[float, float, float, float]  # centre x y, size x y in px of the full picture
Segment = tuple[Path, dict[int, bytes], dict[str, dict[int, BoxPx]]]  # jpegs, and boxes of each object: by time stamp in us


def open_split(root: Path, split: str, request: ClipRequest) -> Samples:
    """Samples with the label boxes `Q T 4`, the objects of frame 0, and valid (labelled in that frame). None: excluded.

    A window that may lie anywhere starts in one of every WINDOW_STEP frames. It is left out where its first frame has
    more than MAX_OBJECTS objects or where they share less than MIN_SHARED of its frames. Of its objects, those that
    meet MIN_PRESENCE and MAX_GAP are in the sample; without any, it is left out, too.
    """
    folder, (prefix, suffix) = root / FOLDERS[split], RECORD
    v2 = sorted(path.stem for path in (folder / "camera_image").glob("[!.]*.parquet"))
    v1 = sorted(path.name.removeprefix(prefix).removesuffix(suffix) for path in folder.glob(f"{prefix}*{suffix}"))
    if not v1 and not v2:
        alternative = f"{folder.name}/{prefix}<context>{suffix}"
        images = require_path(root, folder / "camera_image", f"pictures <context>.parquet, or {alternative}")
        raise UserError(f"{images} holds no <context>.parquet")
    missing = None
    if v2:
        boxes_folder = require_path(root, folder / "camera_box", "boxes <context>.parquet")
        missing = missing_files(boxes_folder, [f"{context}.parquet" for context in v2], f"segments of {split}")

    def load(context: str, positions: Sequence[float] = request.positions) -> list[Sample]:
        path, jpegs, boxes_of = (_read_v2 if v2 else _read_v1)(folder, context, request)
        if not jpegs:
            raise UserError(f"{path} has no picture of camera FRONT")
        stamps = np.array(sorted(jpegs))
        starts = start_rows(stamps / 1e6, request)[::WINDOW_STEP]
        windows = [nearest_rows(path, stamps, request, start) for start in starts]
        picture = lambda row: open_picture(jpegs[stamps[row]], f"{path}: a picture", ["JPEG"]).convert("RGB")  # noqa: E731
        crop = Crop(*picture(0).size[::-1], request.side_px)
        tracks = [_track(boxes, stamps, crop) for _, boxes in sorted(boxes_of.items())]  # of all stored frames
        objects = [_objects_of(tracks, rows, request) for rows in windows]
        usable = [(rows, numbers) for rows, numbers in zip(windows, objects, strict=True) if numbers]
        if not usable:
            where = "the first frame"
            if request.anywhere:
                where += f" of a window that has 1 to {MAX_OBJECTS} such objects and goes on with them"
            raise ExcludedItem(f"{path}: no object covers {MIN_AREA} of the square in {where}")
        samples = []
        for rows, numbers in at_positions(usable, positions):
            boxes, valid = (np.stack([tracks[n][part][rows] for n in numbers]) for part in (0, 1))  # Q T 4, Q T
            pixels = crop.pixels([np.asarray(picture(row)) for row in rows])
            samples.append(Sample(context, context, pixels, {"boxes": boxes.astype(np.float32)}, {"boxes": valid}))
        return samples

    contexts = v2 or v1
    return Samples(contexts, load, str, len(contexts), "v2, parquet" if v2 else "v1, tfrecord", missing)


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, jpeg_quality: int) -> None:
    """Write samples with label boxes `Q T 4` and valid `Q T` as v2. Every object is a vehicle."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = root / FOLDERS[split]
    for name in ("camera_image", "camera_box"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for sample in samples:
        stamps = np.array([round(t / rate_hz * 1e6) for t in range(len(sample.pixels))])
        images = _keys(sample.id, stamps)
        images[IMAGE] = pa.array([encode_jpeg(picture, jpeg_quality) for picture in sample.pixels], pa.binary())
        images[POSE] = pa.array([np.eye(4).ravel().tolist()] * len(stamps), pa.list_(pa.float64(), 16))
        t, q = np.nonzero(sample.valid["boxes"].T)
        labels = _keys(sample.id, stamps[t]) | {OBJECT: [f"{sample.id}-{i}" for i in q]}
        labels |= zip(BOX, centres_and_sizes(sample)[q, t].T, strict=True)
        labels[TYPE] = np.full(len(t), VEHICLE, np.int8)
        labels |= {name: pa.array([None] * len(t), pa.int8()) for name in LEVELS}
        for name, table in (("camera_image", images), ("camera_box", labels)):
            path = folder / name / f"{sample.id}.parquet"
            options = {"use_dictionary": False, "write_statistics": False, "store_schema": False}
            pq.write_table(pa.table(table), path, compression="zstd", **options)


def _keys(context: str, stamps: np.ndarray) -> dict[str, Any]:
    return dict(zip(KEYS, ([context] * len(stamps), stamps, np.full(len(stamps), FRONT[0], np.int8)), strict=True))


def centres_and_sizes(sample: Sample) -> np.ndarray:
    """Boxes as they are stored: `Q T 4`, centre x y, size x y in px of the full picture."""
    height, width = sample.pixels.shape[1:3]
    boxes = sample.labels["boxes"].astype(float) * [width, height, width, height]
    return np.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def _read_v2(folder: Path, context: str, request: ClipRequest) -> Segment:
    path = folder / "camera_image" / f"{context}.parquet"
    jpegs = {row[KEYS[1]]: row[IMAGE] for row in _front_rows(path, [*KEYS[1:], IMAGE])}
    boxes: dict[str, dict[int, BoxPx]] = {}
    for row in _front_rows(folder / "camera_box" / f"{context}.parquet", [*KEYS[1:], OBJECT, *BOX]):
        boxes.setdefault(row[OBJECT], {})[row[KEYS[1]]] = tuple(row[name] for name in BOX)
    return path, jpegs, boxes


def _front_rows(path: Path, columns: list[str]) -> list[dict]:
    """The rows of camera FRONT."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"no {path}; needed one beside the segment's pictures")
    try:
        with content_of(path), pq.ParquetFile(path) as file:  # opened once: with pq.read_table a clip takes twice as long
            if lacking := sorted(set(columns) - set(file.schema_arrow.names)):
                raise UserError(f"{path} lacks the columns {', '.join(lacking)}")
            table = file.read(columns=columns, use_threads=False)
        front = FRONT[not pa.types.is_integer(table.field(KEYS[2]).type)]
        with content_of(path):
            return table.filter(pc.equal(table[KEYS[2]], front)).to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _read_v1(folder: Path, context: str, request: ClipRequest) -> Segment:
    """Read a file, for a clip at its start until the first frame at or behind the clip's end."""
    path, jpegs, boxes = folder / context.join(RECORD), {}, {}
    for number, record in enumerate(tfrecord.read_records(path)):
        try:
            stamp, jpeg, labelled = _parse_frame(record)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise UserError(f"{path}: record {number} is no Frame of Waymo Open: {error}") from error
        if jpeg is None:
            continue
        jpegs[stamp] = jpeg
        for object_id, box in labelled:
            boxes.setdefault(object_id, {})[stamp] = box
        if not request.anywhere and stamp >= min(jpegs) + request.times_s[-1] * 1e6:
            break
    return path, jpegs, boxes


def _parse_frame(record: memoryview) -> tuple[int, bytes | None, list[tuple[str, BoxPx]]]:
    """Time stamp in microseconds; of camera FRONT, the picture if there is one, and (object id, box) of its labels."""
    stamp, jpeg, boxes = 0, None, []
    for field, value in tfrecord.fields(record):
        if field == STAMP:
            stamp = int(value)
        elif field in (PICTURES, LABELS):
            inner = list(tfrecord.fields(value))
            if dict(inner).get(CAMERA) != FRONT[0]:
                continue
            if field == PICTURES:
                jpeg = dict(inner)[CONTENT]
                if not isinstance(jpeg, memoryview):
                    raise TypeError(f"a picture is a {type(jpeg).__name__}")
                jpeg = bytes(jpeg)
                continue
            boxes = []
            for label in (dict(tfrecord.fields(content)) for name, content in inner if name == CONTENT):
                box = dict(tfrecord.fields(label[LABEL_BOX]))
                sides = tuple(box.get(part, 0.0) for part in (CENTRE_X, CENTRE_Y, LENGTH, WIDTH))
                boxes.append((str(label[LABEL_ID], "utf-8"), sides))
    return stamp, jpeg, boxes


def _objects_of(tracks: list[tuple[np.ndarray, np.ndarray]], rows: np.ndarray, request: ClipRequest) -> list[int]:
    """Numbers of the objects of a window: given in its first frame, and measured. None: it is left out.

    Args:
        tracks: boxes `F 4` and valid `F` of each object. rows: `T` stored frames of the window.
    """
    starts = [(*boxes[rows[0]], valid[rows[0]]) for boxes, valid in tracks]
    given = [n for n, (x1, y1, x2, y2, there) in enumerate(starts) if there and (x2 - x1) * (y2 - y1) >= MIN_AREA]
    if not given or not request.anywhere:
        return given
    valid = np.stack([tracks[n][1][rows] for n in given])  # Q T
    if len(given) > MAX_OBJECTS or valid.all(0).mean() < MIN_SHARED:
        return []
    return [n for n, there in zip(given, valid, strict=True) if there.mean() >= MIN_PRESENCE and _longest_gap(there) <= MAX_GAP]


def _longest_gap(valid: np.ndarray) -> int:
    """Frames from one with the object to the next, or to the end, at most. valid: `T`, from a frame with it on."""
    return np.diff(np.append(np.nonzero(valid)[0], len(valid))).max()


def _track(box_of: dict[int, BoxPx], stamps: np.ndarray, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """boxes `F 4` of the square and valid `F` of an object, of F stored frames. A box outside it is not valid."""
    labelled = np.array([stamp in box_of for stamp in stamps])
    x, y, width, height = np.array([box_of.get(stamp, np.zeros(4)) for stamp in stamps], float).T
    corners = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)  # T 4
    square = crop.boxes(corners / [crop.width, crop.height, crop.width, crop.height])
    valid = labelled & np.isfinite([x, y, width, height]).all(0) & (width > 0) & (height > 0)
    valid &= (square[:, 2:] - square[:, :2]).prod(-1) > 0
    return np.where(valid[:, None], square, 0), valid
