"""MOVi-E of Kubric, with the point tracks that scivid distributes (training alone): `train.array_record-<n>-of-<N>`.

A record is a SequenceExample. Its lists hold a value a frame, FRAMES in all: `image/encoded`, PNG or JPEG; `tracks/2d`,
a TensorProto of float32 `Q 2`, x y in 0..1 of the picture; `tracks/visibility`, one of float32 `Q`. Tracks begin in any
frame: of some 2,048, those that are hidden in a window's first frame are no queries. The position of a pixel's centre
is not stated; 0 is taken as the picture's edge (ours).

Facts: scivid's readers, its datasets.md and its configuration of STIR; tensor.proto and example.proto of TensorFlow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scaling4d import seeds
from scaling4d.benchmarks import tfrecord
from scaling4d.benchmarks.frames import Crop, missing_files, open_picture, require_path
from scaling4d.benchmarks.queries import query_clips
from scaling4d.benchmarks.samples import ClipRequest, ExcludedItem, Samples, content_of
from scaling4d.records import Sample, UserError, pip_install

OFFICIAL = {"train": "9,749 in MOVi-E 1.0.0"}
RATE_HZ, FRAMES, WINDOW_STEP = 12.0, 24, 1
PICTURES, TRACKS, VISIBLE = "image/encoded", "tracks/2d", "tracks/visibility"
LISTS = 2  # field of a SequenceExample
FLOAT = 1  # a TensorProto's dtype
DTYPE, SHAPE, CONTENT = 1, 2, 4  # of its fields


def open_split(root: Path, split: str, request: ClipRequest) -> Samples:
    """Samples with the label points `Q T 2`, shuffled tracks visible in a window's first frame, and valid (visible).

    The order is drawn by video and window, so that training on the first ones sees others in other windows (scivid
    draws 64 of all). A window without any is excluded.
    Raises UserError: another layout, missing shards, or no package array_record.
    """
    if split != "train":
        raise UserError(f"{root}: MOVi-E has no split {split!r}, it is for training alone; measure points on perception_test")
    shards = require_shards(root)
    items = [(path, number) for path in shards for number in range(open_shard(path).num_records())]

    def load(item: tuple[Path, int], positions: Sequence[float] = request.positions) -> list[Sample]:
        path, number = item
        name = _name(item)
        with content_of(f"{path}, record {number}"):
            lists = read_sequence_example(memoryview(_read(path, number)))
            stored, (points, visible) = lists[PICTURES], (_stack(lists[key]) for key in (TRACKS, VISIBLE))
        if points.shape != (*visible.shape, 2) or visible.ndim != 2 or len(visible) != len(stored):
            raise UserError(f"{path}, record {number}: {TRACKS} {points.shape} do not fit {VISIBLE} {visible.shape}")
        visible = visible.T > 0  # Q F
        if not np.isfinite(points[visible.T]).all():
            raise UserError(f"{path}, record {number}: points that are visible must be numbers")
        offsets = request.frame_numbers(RATE_HZ)
        if offsets[-1] >= len(stored):
            raise UserError(f"{path}: {len(stored)} frames, needed frame {offsets[-1]}; lower frames or raise rate_hz")
        picture = partial(open_picture, where=f"{path}, record {number}: a picture", formats=["PNG", "JPEG"])
        width, height = picture(bytes(stored[0])).size
        crop = Crop(height, width, request.side_px)
        inside = crop.points(points.transpose(1, 0, 2).astype(float))  # Q F 2
        clips = query_clips(name, inside, visible, offsets, request, positions)
        if not clips:
            raise ExcludedItem(f"{path}, record {number}: no track is visible in the square in a window's first frame")
        samples = []
        for clip in clips:
            pictures = [np.asarray(picture(bytes(stored[frame])).convert("RGB")) for frame in clip.frame_numbers]
            order = seeds.numpy_rng(0, "movi", name, int(clip.frame_numbers[0])).permutation(len(clip.points))
            labels, valid = {"points": clip.points[order]}, {"points": clip.visible[order]}
            samples.append(Sample(clip.id, name, crop.pixels(pictures), labels, valid))
        return samples

    return Samples(items, load, _name, len(items), f"{len(shards)} shards")


def require_shards(root: Path) -> list[Path]:
    """The shards of the training split in their order. Raises UserError: none, or not all that their names count."""
    shards = sorted(root.glob("train.array_record-*-of-*"))
    if not shards:
        require_path(root, root / "train.array_record-00000-of-00100", "shards of full/movi in scivid's bucket")
    counts = {re.sub(".*-of-", "", path.name) for path in shards}
    (count, *others) = sorted(counts)
    if others or not count.isdigit():
        raise UserError(f"{root} holds shards of several sets, of {', '.join(sorted(counts))} each; keep one set there")
    names = [f"train.array_record-{n:05d}-of-{count}" for n in range(min(int(count), 100_000))]
    if missing := missing_files(root, names, "shards of train"):
        raise missing
    return shards


def read_sequence_example(record: memoryview) -> dict[str, list[memoryview]]:
    """The bytes, a value a frame, of the lists of a SequenceExample by name. Raises ValueError: no such message."""
    lists: dict[str, list[memoryview]] = {}
    for feature_lists in inner_messages(record, LISTS):
        for entry in inner_messages(feature_lists, 1):
            (name,), (value,) = inner_messages(entry, 1), inner_messages(entry, 2)
            bytes_lists = (bytes_list for feature in inner_messages(value, 1) for bytes_list in inner_messages(feature, 1))
            lists[bytes(name).decode()] = [value for bytes_list in bytes_lists for value in inner_messages(bytes_list, 1)]
    return lists


def parse_tensor(message: memoryview) -> np.ndarray:
    """float32 array of a TensorProto that holds its content as bytes. Raises ValueError: another type or size."""
    fields = dict(tfrecord.fields(message))
    if fields.get(DTYPE) != FLOAT or CONTENT not in fields:
        raise ValueError(f"a tensor of type {fields.get(DTYPE)}; needed float32, type {FLOAT}, with tensor_content")
    shape = [dict(tfrecord.fields(size)).get(1, 0) for size in inner_messages(fields[SHAPE], 2)]
    return np.frombuffer(fields[CONTENT], "<f4").reshape(shape)


def inner_messages(message: Any, number: int) -> list[memoryview]:
    """The inner messages of this field."""
    if not isinstance(message, memoryview):
        raise ValueError(f"field {number} lies in a number")
    return [value for key, value in tfrecord.fields(message) if key == number]


def _stack(tensors: Sequence[memoryview]) -> np.ndarray:
    return np.stack([parse_tensor(tensor) for tensor in tensors])


def _name(item: tuple[Path, int]) -> str:
    path, number = item
    return f"{path.name.removeprefix('train.array_record-')}-{number:04d}"


def open_shard(path: Path) -> Any:
    """An open reader. Raises UserError: the shard is damaged, or package array_record is missing."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise UserError(f"{path} needs package array_record; install it with: {pip_install('movi')}") from error
    reader = ArrayRecordReader(str(path))
    if not reader.ok():
        raise UserError(f"{path} is damaged, or no ArrayRecord file")
    return reader


def _read(path: Path, number: int) -> bytes:
    """Raises UserError: the record is damaged."""
    try:
        (record,) = open_shard(path).read([number])
    except RuntimeError as error:
        raise UserError(f"{path} is damaged in record {number}: {' '.join(str(error).split())[:200]}") from error
    return record
