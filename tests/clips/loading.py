"""Batches of clips to train with: the loader's arguments, and whether two runs give the same."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from scaling4d.clips import loader
from scaling4d.records import ClipBatch

ARGUMENTS = {"frames": 4, "batch": 4, "repeats": 1, "seed": 0, "start": 0, "steps": 12, "flip": True, "crop": (1.0, 1.0)}
ARGUMENTS |= {"reverse": True, "aspect": (1.0, 1.0), "window_shards": 0, "rank": 0, "ranks": 1, "cached_clips": 0, "workers": 0}
ARGUMENTS |= {"short_side_px": 0, "on_device": False}


def batches_of(folder: Path, **changes: object) -> Iterator[ClipBatch]:
    return loader.train_batches(folder, **ARGUMENTS | changes)


def same(some: Sequence[ClipBatch], others: Sequence[ClipBatch]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(a.ids == b.ids and a.start_s == b.start_s and torch.equal(a.pixels, b.pixels) for a, b in pairs)
