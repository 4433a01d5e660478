"""Fly vs. Fly in scivid's layout, and small weights in that of the released 4DS."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import small_encoder
from benchmarks.writers import _feature, _png, message, write_array_records

from scaling4d import seeds
from scaling4d.benchmarks import movi
from scaling4d.readout.released_heads import to_4ds
from scaling4d.reproduce.fly_clips import CLASSES, CONTEXT, INT64_LIST, LABELS

SHAPE = {"clip": (4, 32, 32), "pixel_mean": 0.0, "pixel_scale": 1.0}


def fly_record(pixels: np.ndarray, labels: Sequence[int], *, packed: bool = True) -> bytes:
    """A SequenceExample of pixels `T H W 3` and classes."""
    numbers = message([(1, bytes(labels))] if packed else [(1, label) for label in labels])  # an Int64List
    feature = message([(INT64_LIST, numbers)])
    context = b"".join(
        message([(1, message([(1, name), (2, value)]))]) for name, value in ((b"clip/key", b""), (LABELS.encode(), feature))
    )
    pictures = message([(1, movi.PICTURES.encode()), (2, b"".join(_feature(_png(one)) for one in pixels))])
    return message([(CONTEXT, context), (movi.LISTS, message([(1, pictures)]))])


def write_shards(root: Path, split: str, records: Sequence[bytes], *, shards: int = 2) -> None:
    write_array_records(root / f"{split}_fly_split_ids_shuffle", records, shards=shards)


def bright_flies(count: int, name: str) -> list[bytes]:
    """Clips whose class is a stripe of its own; every seventh clip has two classes. Sizes differ."""
    records = []
    for n in range(count):
        rng, side = seeds.numpy_rng(0, name, n), 24 + 8 * (n % 2)
        pixels = rng.integers(0, 60, (4, side, side, 3)).astype(np.uint8)
        labels = [n % len(CLASSES)] + ([(n + 1) % len(CLASSES)] if n % 7 == 0 else [])
        for label in labels:
            pixels[:, side * label // 7 : side * (label + 1) // 7] += 190
        records.append(fly_record(pixels, labels))
    return records


def write_weights(folder: Path) -> Path:
    """A small 4DS encoder as a released `.npz`."""
    return to_4ds(small_encoder.checkpoint(folder / "small", "Backbone", **SHAPE), folder / "small.npz")
