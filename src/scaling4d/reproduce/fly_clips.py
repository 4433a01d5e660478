"""Fly vs. Fly as scivid distributes it: `<split>_fly_split_ids_shuffle.array_record-<n>-of-<N>`.

A record is a SequenceExample. Its context holds `clip/label/index`, the classes of the clip's middle frame; its lists
hold `image/encoded`, a PNG or JPEG a frame.

Facts: scivid's data/readers/flyvsfly.py, data/readers/base.py and data/readers/utils.py; example.proto of TensorFlow.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np

from scaling4d.benchmarks import tfrecord
from scaling4d.benchmarks.frames import missing_files, open_picture
from scaling4d.benchmarks.movi import PICTURES, inner_messages, open_shard, read_sequence_example
from scaling4d.benchmarks.samples import content_of
from scaling4d.records import UserError, json_text

CLASSES = ("lunging", "wing_threat", "tussling", "wing_extension", "circling", "copulation", "not_interacting")
SHARD = "_fly_split_ids_shuffle.array_record-"
LABELS = "clip/label/index"
CONTEXT = 1  # field of a SequenceExample
INT64_LIST = 3  # field of a Feature


class FlyClips:
    """The clips of a split, in the order of its shards. Readers stay open; any thread may read.

    Args:
        root: folder with the shards. frames: of a clip.
    Raises UserError: no shards, some are missing or damaged, or no package array_record.
    """

    def __init__(self, root: Path, split: str, frames: int) -> None:
        self.split, self.frames = split, frames
        self.shards = require_shards(root, split)
        self.readers = [open_shard(path) for path in self.shards]
        self.ends = list(accumulate(reader.num_records() for reader in self.readers))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 `T H W 3` in the stored size, and classes, float32 `7` of zeros and ones.

        Frames are the first ones, at the stored rate; the last frame is repeated where a record has fewer.
        Raises UserError: the record is damaged.
        """
        shard = bisect_right(self.ends, index)
        path, number = self.shards[shard], index - (self.ends[shard - 1] if shard else 0)
        where = f"{path}, record {number}"
        try:
            (record,) = self.readers[shard].read([number])
        except RuntimeError as error:
            raise UserError(f"{where} is damaged: {' '.join(str(error).split())[:200]}") from error
        with content_of(where):
            stored = read_sequence_example(memoryview(record))[PICTURES]
            if not stored:
                raise ValueError("it has no frames")
            pictures = [open_picture(bytes(one), f"{where}: a picture", ["PNG", "JPEG"]) for one in stored[: self.frames]]
            pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
            padded = np.minimum(np.arange(self.frames), len(pixels) - 1)
            return pixels[padded], one_hot(read_labels(memoryview(record)))


def listing_of(root: Path, split: str) -> dict[str, int | str]:
    """Number of a split's shards, their bytes, and a hash of their names and sizes.

    Raises UserError: as require_shards.
    """
    sizes = {path.name: path.stat().st_size for path in require_shards(root, split)}
    digest = hashlib.sha256(json_text(sizes).encode()).hexdigest()
    return {"shards": len(sizes), "bytes": sum(sizes.values()), "names_and_sizes_sha256": digest}


def require_shards(root: Path, split: str) -> list[Path]:
    """The shards of a split in their order. Raises UserError: none, or not all that their names count."""
    shards = sorted(root.glob(f"{split}{SHARD}*-of-*"))
    if not shards:
        raise UserError(f"{root} has no {split}{SHARD}00000-of-00100; needed the shards of full/fly_vs_fly in scivid's bucket")
    (count, *others) = sorted({re.sub(".*-of-", "", path.name) for path in shards})
    if others or not re.fullmatch("[0-9]{1,5}", count):
        raise UserError(f"{root} holds shards of several sets of {split}, of {', '.join([count, *others])}; keep one set there")
    names = [f"{split}{SHARD}{n:05d}-of-{count}" for n in range(int(count))]
    if missing := missing_files(root, names, f"shards of {split}"):
        raise missing
    return [root / name for name in names]


def read_labels(record: memoryview) -> list[int]:
    """The classes of a SequenceExample; none where it names none, as TensorFlow reads it.

    Raises ValueError: a number that is not of CLASSES, or no such message.
    """
    labels: list[int] = []
    for features in inner_messages(record, CONTEXT):
        for entry in inner_messages(features, 1):
            (name,), (feature,) = inner_messages(entry, 1), inner_messages(entry, 2)
            if bytes(name).decode() == LABELS:
                values = [value for numbers in inner_messages(feature, INT64_LIST) for _, value in tfrecord.fields(numbers)]
                for value in values:  # packed or not; a class is one byte, and a larger number has a byte above 6
                    labels += value if isinstance(value, memoryview) else [value]
    if any(label >= len(CLASSES) for label in labels):
        raise ValueError(f"{LABELS} = {labels}; needed numbers of {len(CLASSES)} classes")
    return labels


def one_hot(labels: list[int]) -> np.ndarray:
    """float32 `7`: 1 at each class, however often it is named."""
    values = np.zeros(len(CLASSES), np.float32)
    values[labels] = 1
    return values
