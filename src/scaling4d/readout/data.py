"""BENCHMARK -> TRAINING BATCHES AND METRIC SUMS, on each rank's part of a split.

With random windows, epoch e of a training sees window e of every video, which is drawn by seed, video and e. A frozen
encoder's features are stored of the first n windows; epoch e takes window e modulo n there.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, repeat
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scaling4d import benchmarks, seeds
from scaling4d.benchmarks.samples import ClipRequest, Samples, SkippedItem
from scaling4d.encoders.features import MemoryFeatures
from scaling4d.readout.tasks.task import MetricSums, Target, Task, collate
from scaling4d.readout.views import view_of
from scaling4d.records import Sample, UserError
from scaling4d.training.distributed import gather_round_robin, heartbeat

Encode = Callable[[list[Tensor]], Tensor]  # clips, uint8 `T H W C` -> inputs of Predict, features or pixels
HELD_OUT_SHARE = 0.1  # share of the training videos that choose weights and penalties; ours
Predict = Callable[[Tensor, dict[str, Tensor]], Tensor]  # inputs and targets of a batch -> predictions


@dataclass(frozen=True)
class RankSplit:
    """Every `ranks`-th item of a benchmark's split, from `rank` on.

    items: number of items to use, evenly spread over the split; 0: all. clip: T H W of the encoder. max_bad_share: of a
    split's samples, damaged or missing. windows_seed: of the windows in time of a training video; None: the first
    frames alone. may_be_empty: whether a rank may have no sample. skipped: samples left out on this rank; filled while
    the split is read.
    """

    name: str
    split: str
    items: int
    task: Task
    root: Path
    max_bad_share: float
    clip: tuple[int, int, int]
    rank: int
    ranks: int
    windows_seed: int | None = None
    may_be_empty: bool = False
    skipped: list[SkippedItem] = field(default_factory=list)

    def samples(self) -> Samples:
        """For validation in the task's test views and with its point queries."""
        (frames, side_px, _), task = self.clip, self.task
        views, queries = ((1, 1), "frame_0") if self.split == "train" else (tuple(task.test_views), task.queries_at)
        windows = "first" if self.windows_seed is None else "random"
        request = ClipRequest(frames, task.rate_hz, side_px, views, queries, windows)
        samples = benchmarks.read_samples(
            self.name, self.root, self.split, request, skipped=self.skipped, max_bad_share=self.max_bad_share
        )
        if not 0 < self.items < samples.count:
            return samples.part(slice(self.rank, None, self.ranks), self.skipped)
        spread = [number * samples.count // self.items for number in range(self.items)]
        return samples.part(spread[self.rank :: self.ranks], self.skipped)

    def by_index(self, samples: Samples) -> Iterator[tuple[int, list[Sample]]]:
        """Items that give samples, each with its index. `check_read` follows the last one."""
        for index, clips in samples.by_index():
            heartbeat(f"item {index + 1} of {self.name} {self.split}")
            yield index, clips

    def check_read(self, read: int) -> None:
        """Check that few enough items are damaged or missing. Every rank takes part.

        read: items of this rank that gave samples.
        Raises UserError: fewer samples than ranks, unless `may_be_empty`, or more than `max_bad_share` of the items of
            all ranks give none.
        """
        skipped, total = gather_round_robin(self.skipped), sum(gather_round_robin([read]))
        benchmarks.check_bad_share(skipped, len(skipped) + total, self.max_bad_share, f"{self.name} {self.split}")
        if not read and not self.may_be_empty:
            raise UserError(
                f"{self.name}: too few samples in split {self.split} for {self.ranks} ranks; lower readout.Evaluation.ranks"
            )

    def position(self, item: str, draw: int) -> float:
        """Position in 0..1 of a training item's window, the same on any rank. draw: number of the window."""
        return 0.0 if self.windows_seed is None else float(seeds.numpy_rng(self.windows_seed, "window", item, draw).random())


class FeatureDataset:
    """Training clips of a frozen encoder: features of `task.train_windows` windows of each, computed once, and targets.

    A clip is a video in one view.
    Attributes:
        held_out: indices of the clips of `held_out_videos`. trained_on: of the others.
    Raises UserError: as RankSplit.check_read, or no clip of a rank is left to train on.
    """

    def __init__(self, split: RankSplit, source: MemoryFeatures) -> None:
        draws, videos = range(split.task.train_windows), []
        self.source, self.windows = source, []  # key and target of each window of each clip
        samples = replace(split.samples(), positions=lambda item: [split.position(item, draw) for draw in draws])
        for _, plain in split.by_index(samples):
            for view in split.task.views:
                clips = [view_of(sample, view) for sample in plain]
                keys = [source.add(torch.from_numpy(clip.pixels)) for clip in clips]
                self.windows.append(list(zip(keys, map(split.task.train_target, clips), strict=True)))
                videos.append(plain[0].video)
        source.flush()
        split.check_read(len(videos) // len(split.task.views))
        held_out = held_out_videos(videos)
        self.held_out = [index for index, video in enumerate(videos) if video in held_out]
        self.trained_on = [index for index, video in enumerate(videos) if video not in held_out]
        if not self.trained_on and not split.may_be_empty:
            raise UserError(f"{split.name}: all training clips of a rank are held out; lower readout.Evaluation.ranks")

    def __len__(self) -> int:
        return len(self.windows)

    def features(self, indices: Sequence[int]) -> Tensor:
        """`B t n D` on the CPU, of the first window of each clip."""
        return self.source.stack([self.windows[index][0][0] for index in indices])

    def batch(self, indices: Sequence[int], epochs: Iterable[int] = repeat(0)) -> tuple[Tensor, dict[str, Tensor]]:
        """Features `B t n D` and targets of clips, each in its window for an epoch, on the CPU."""
        stored = map(self.windows.__getitem__, indices)
        keys, targets = zip(*(windows[epoch % len(windows)] for windows, epoch in zip(stored, epochs, strict=False)), strict=True)
        return self.source.stack(keys), collate(targets)


def held_out_videos(videos: Iterable[str]) -> set[str]:
    """A share HELD_OUT_SHARE of the videos of all ranks, at least one, by their names' sha256; alike on any ranks."""
    names = sorted({*gather_round_robin(list(videos))}, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(names[: max(round(HELD_OUT_SHARE * len(names)), 1)])


class ClipDataset:
    """Training clips as pixels, read again for each batch. Of first frames, `cached_clips` clips stay in memory.

    The constructor reads the whole split, to know which samples are usable: of random windows the last one of each
    video, since damage before it mostly shows on the way. Raises UserError: as RankSplit.check_read.
    """

    def __init__(self, split: RankSplit, cached_clips: int) -> None:
        self.split, self.task, self.samples = split, split.task, split.samples()
        self.places: list[tuple[int, str, str]] = []  # item, its id, view
        self.kept: list[tuple[np.ndarray, Target]] = []
        random = split.windows_seed is not None
        for item, (plain,) in split.by_index(replace(self.samples, positions=lambda _: [float(random)])):
            for view in self.task.views:
                self.places.append((item, plain.id, view))
                if len(self.kept) < cached_clips and not random:
                    self.kept.append(self._clip_and_target(plain, view))
        split.check_read(len(self.places) // len(self.task.views))

    def __len__(self) -> int:
        return len(self.places)

    def _clip_and_target(self, plain: Sample, view: str) -> tuple[np.ndarray, Target]:
        sample = view_of(plain, view)
        return sample.pixels, self.task.train_target(sample)

    def _read(self, index: int, epochs: Sequence[int]) -> list[tuple[np.ndarray, Target]]:
        if index < len(self.kept):
            return [self.kept[index]] * len(epochs)
        item, name, view = self.places[index]
        windows = self.samples.at_index(item, [self.split.position(name, epoch) for epoch in epochs])
        return [self._clip_and_target(plain, view) for plain in windows]

    def batch(self, indices: Sequence[int], epochs: Iterable[int] = repeat(0)) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels `B T H W C` and targets of clips, each in its window for an epoch. Equal neighbours share a pass."""
        clips = []
        for index, places in groupby(zip(indices, epochs, strict=False), key=itemgetter(0)):
            clips += self._read(index, [epoch for _, epoch in places])
        pixels, targets = zip(*clips, strict=True)
        return torch.from_numpy(np.stack(pixels)), collate(targets)


def shuffled_batch(step: int, size: int, length: int, seed: int, rank: int) -> list[int]:
    """`size` indices of an endless sequence of shuffled passes over `length` samples; the same for equal arguments."""
    first, last = step * size // length, ((step + 1) * size - 1) // length
    epochs = [seeds.numpy_rng(seed, "readout_order", rank, epoch).permutation(length) for epoch in range(first, last + 1)]
    start = step * size - first * length
    return np.concatenate(epochs)[start : start + size].tolist()


def epochs_of(step: int, size: int, length: int) -> list[int]:
    """The pass, from 0, that each index of `shuffled_batch` belongs to."""
    return [place // length for place in range(step * size, (step + 1) * size)]


@torch.no_grad()
def evaluate(
    split: RankSplit,
    encode: Encode,
    predict: Predict,
    *,
    size: int,
    probes: Mapping[str, Predict] | None = None,
    flush: Callable[[], object] = lambda: None,
) -> tuple[list[str], list[MetricSums], float]:
    """Evaluate a split in batches of `size`. The test views of a video follow one another; a task may pool them.

    probes: further ways to predict, by name. Of each the task's own metric is measured, as `<metric>_<name>`. flush:
    called after the last batch, for an `encode` in which other ranks take part.
    Returns video ids, metric sums of each clip, and the seconds of `predict` and metrics. Raises as
    RankSplit.check_read.
    """
    task, per_clip = split.task, math.prod(split.task.test_views) if split.task.pools else 1
    read = 0

    def samples() -> Iterator[Sample]:
        nonlocal read
        for _, clips in split.by_index(split.samples()):
            read += 1
            yield from clips

    waiting = samples()
    predictors = {"": predict} | dict(probes or {})
    videos, sums, views, seconds = [], [], [], 0.0
    while batch := list(islice(waiting, size)):
        inputs = encode([torch.from_numpy(sample.pixels) for sample in batch])
        videos += [sample.video for sample in batch]
        target = collate([task.target(sample) for sample in batch])
        started = time.monotonic()
        on_device = {name: value.to(inputs.device) for name, value in target.items()}
        predicted = [run(inputs, on_device).cpu().numpy() for run in predictors.values()]
        for row in range(len(batch)):
            views.append([values[row] for values in predicted])
            if len(views) == per_clip:
                truth = {name: value[row].numpy() for name, value in target.items()}
                pooled = [view[0] if per_clip == 1 else task.pool(np.stack(view)) for view in zip(*views, strict=True)]
                measured = task.measure(pooled[0], truth)
                for name, values in zip([*predictors][1:], pooled[1:], strict=True):
                    measured[f"{task.metric.name}_{name}"] = task.measure(values, truth)[task.metric.name]
                sums.append(measured)
                views = []
        seconds += time.monotonic() - started
    flush()
    split.check_read(read)
    return videos[::per_clip], sums, seconds
