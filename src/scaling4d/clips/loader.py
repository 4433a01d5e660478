"""CLIPS -> BATCHES: the order is a pure function of (seed, position), so a resumed run sees what an unbroken one would.

Starts no threads and no processes: the ranks that call it are one-thread processes already.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from scaling4d import seeds, video
from scaling4d.records import ClipBatch, UserError

Item = tuple[Tensor, str, float]


class Clips(Dataset):
    """The clips of one split: item i is (pixels uint8 `T H W 3`, id, start_s), read from its shard where it lies."""

    def __init__(self, folder: Path, split: str, *, kept: int = 0) -> None:
        """kept: how many decoded clips stay in memory.

        Raises:
            UserError: `folder` is not what the clips stage writes, or holds no clip of this split.
        """
        self.folder = folder
        self.rows = [row for row in _table(folder) if row["split"] == split]
        if not self.rows:
            raise UserError(f"{folder} holds no clips of split {split!r}; raise clips.Curation.val_share, or add videos")
        self.shards: dict[str, int] = {}  # open files
        self.decoded = lru_cache(maxsize=kept)(self._decode)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        """Raises UserError: the clip does not decode to what the table says."""
        return self.decoded(index)

    def _decode(self, index: int) -> Item:
        row = self.rows[index]
        try:
            _, pixels = video.read(io.BytesIO(self._bytes(row)))
        except (video.VideoError, OSError) as error:
            raise UserError(
                f"clip {row['id']} of {self.folder / 'shards' / row['shard']}: {error}; run the clips stage again"
            ) from error
        if len(pixels) != row["frames"]:
            raise UserError(f"clip {row['id']}: {len(pixels)} frames, needed {row['frames']}; run the clips stage again")
        return torch.from_numpy(pixels), row["id"], row["start_s"]

    def _bytes(self, row: dict[str, Any]) -> bytes:
        if row["shard"] not in self.shards:
            self.shards[row["shard"]] = os.open(self.folder / "shards" / row["shard"], os.O_RDONLY)
        return os.pread(self.shards[row["shard"]], row["bytes"], row["offset"])

    def __del__(self) -> None:
        for descriptor in getattr(self, "shards", {}).values():
            os.close(descriptor)


class _Flipped(Dataset):
    """Clips by (epoch, index, copy): mirrored, and run backwards, each for half of them, chosen anew for every epoch and copy."""

    def __init__(self, clips: Clips, *, seed: int, flip: bool) -> None:
        self.clips, self.seed, self.flip = clips, seed, flip

    def __getitem__(self, drawn: tuple[int, int, int]) -> Item:
        epoch, index, copy = drawn
        pixels, name, start_s = self.clips[index]
        if self.flip:
            mirror, backwards = seeds.numpy(self.seed, "flip", epoch, index).random((copy + 1, 2))[copy] < 0.5
            pixels = pixels.flip([axis for axis, wanted in ((0, backwards), (2, mirror)) if wanted])
        return pixels, name, start_s


class _Order(Sampler):
    """Lists of (epoch, index, copy), one a step: this rank's part of each global batch."""

    def __init__(self, clips: int, *, batch: int, repeats: int, seed: int, start: int, steps: int, rank: int, ranks: int) -> None:
        self.clips, self.batch, self.repeats, self.seed, self.start, self.steps = clips, batch, repeats, seed, start, steps
        self.rank, self.part = rank, batch // ranks

    def __len__(self) -> int:
        return max(self.steps - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        known: tuple[int, np.ndarray] = (-1, np.empty(0))
        for step in range(self.start, self.steps):
            drawn = []
            for position in range(step * self.batch + self.rank * self.part, step * self.batch + (self.rank + 1) * self.part):
                loaded, copy = divmod(position, self.repeats)
                epoch, place = divmod(loaded, self.clips)
                if epoch != known[0]:
                    known = (epoch, seeds.numpy(self.seed, "order", epoch).permutation(self.clips))
                drawn.append((epoch, int(known[1][place]), copy))
            yield drawn


def batches(
    folder: Path,
    *,
    split: str,
    batch: int,
    repeats: int,
    seed: int,
    start: int,
    steps: int,
    flip: bool,
    rank: int,
    ranks: int,
    kept: int = 0,
) -> Iterator[ClipBatch]:
    """This rank's part of the global batches `start` ... `steps - 1` of an endless sequence of epochs.

    Position p of the sequence is clip q % n of the order of epoch q // n, q = p // repeats; batch s holds positions s * batch ...
    and rank r its r-th part, so batches follow one another across epochs and every epoch covers every clip `repeats` times.

    Args:
        batch: clips a step over all ranks, copies counted. repeats: copies of a clip in a row, each flipped (and later masked) on
          its own; it is decoded once. start: step to begin at, to resume. flip: mirror and time-reverse at random.
        kept: how many decoded clips stay in memory; the batches do not depend on it.
    Raises:
        UserError: batch does not divide by ranks and repeats; no clips; a clip that cannot be decoded.
    """
    if repeats < 1 or batch % (ranks * repeats):
        raise UserError(
            f"a batch of {batch} clips does not divide among {ranks} ranks, each clip {repeats} times; set batch to a multiple"
        )
    clips = Clips(folder, split, kept=max(kept, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
        loader = StatefulDataLoader(
            _Flipped(clips, seed=seed, flip=flip),
            batch_sampler=_Order(
                len(clips), batch=batch, repeats=repeats, seed=seed, start=start, steps=steps, rank=rank, ranks=ranks
            ),
            num_workers=0,
            collate_fn=_together,
            generator=seeds.stream(seed, "loader"),
        )
    yield from loader


def every(folder: Path, *, split: str, batch: int, rank: int, ranks: int) -> Iterator[ClipBatch]:
    """Every clip of a split once over all ranks, in a fixed order: clip i goes to rank i % ranks. The last batch may be small."""
    clips = Clips(folder, split)
    mine = range(rank, len(clips), ranks)
    for first in range(0, len(mine), batch):
        yield _together([clips[index] for index in mine[first : first + batch]])


def count(folder: Path, split: str) -> int:
    """How many clips a split holds; UserError if none."""
    return len(Clips(folder, split))


def _together(items: list[Item]) -> ClipBatch:
    pixels, ids, starts = zip(*items, strict=True)
    return ClipBatch(torch.stack(pixels), ids, starts)


def _table(folder: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "clips.parquet"
    if not path.is_file():
        raise UserError(f"no {path}; run `dvc repro clips`")
    columns = ["id", "split", "start_s", "frames", "shard", "offset", "bytes"]
    try:
        file = pq.ParquetFile(pa.BufferReader(path.read_bytes()))  # opened by its path, it would start a thread
        return file.read(columns=columns, use_threads=False).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is damaged: {error}; run the clips stage again") from error
