"""The interface of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d.config import require_minima, require_positive
from scaling4d.readout.heads import Head, Queries
from scaling4d.readout.linear import LinearProbe
from scaling4d.readout.views import VIEWS
from scaling4d.records import Sample, UserError

Target = dict[str, np.ndarray]
MetricSums = dict[str, tuple[float, float]]  # metric -> sum and count


@dataclass(frozen=True)
class Metric:
    """A metric's name, unit and direction."""

    name: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class Task:
    """Turns samples into targets, defines queries and loss, and sums up metrics sample by sample.

    rate_hz: of a clip's frames. views: of a training clip, names of readout.views.VIEWS. train_windows: windows in time
    of a training video of which a frozen readout stores the features, see readout.data. test_views: windows over the
    time of a validation video, and squares cut out of each, of a task that pools alone.
    """

    rate_hz: float
    views: tuple[str, ...]
    train_windows: int = 1
    test_views: tuple[int, int] = (1, 1)

    metric: ClassVar[Metric]
    pools: ClassVar[bool] = False  # whether the predictions of a video's test views become one; else each is measured
    queries_at: ClassVar[str] = "frame_0"  # frames of a validation video in which points are given
    answer_patch: ClassVar[tuple[int, int, int]] = (1, 1, 1)  # T H W of which clips are multiples
    linear: ClassVar[bool] = False  # whether a linear probe is fitted beside a frozen readout
    propagates: ClassVar[bool] = False  # whether labels of the first frame are propagated beside a frozen readout

    def __post_init__(self) -> None:
        require_positive(self, "rate_hz")
        if not self.views or not set(self.views) <= set(VIEWS):
            raise ValueError(f"views = {list(self.views)}; needed some of {', '.join(VIEWS)}")
        require_minima(self, {"train_windows": 1})
        if len(self.test_views) != 2 or any(not isinstance(count, int) or count < 1 for count in self.test_views):
            raise ValueError(
                f"test_views = {list(self.test_views)}; needed two whole numbers of at least 1: clips over the time of a video, "
                "and squares cut out of each"
            )
        if not self.pools and self.test_views[1] > 1:
            raise ValueError(f"test_views = {list(self.test_views)}; needed one square, since their answers are not pooled")

    def check_benchmark(self, root: Path) -> None:
        """Raises UserError: the benchmark below `root` does not fit the settings."""

    def check_clip(self, clip: tuple[int, int, int]) -> None:
        """Raises UserError: the task has no answer of the size of clips T H W."""
        patch = self.answer_patch
        if any(side % part for side, part in zip(clip, patch, strict=True)):
            fix = "set readout.Evaluation.frames and side_px to multiples"
            raise UserError(f"clips T H W = {tuple(clip)} do not divide into answers of {type(self).__name__}, {patch}; {fix}")

    def queries(self, clip: tuple[int, int, int]) -> Queries:
        """Queries of a clip T H W."""
        raise NotImplementedError

    def target(self, sample: Sample) -> Target:
        """Targets of evaluation: arrays of one shape for all samples, except along the number of tracked objects."""
        raise NotImplementedError

    def train_target(self, sample: Sample) -> Target:
        """Targets of training: arrays of one shape for all samples."""
        return self.target(sample)

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def regression(self, features: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a linear probe: features `B P d`, targets `B P o`, and valid `B P` (bool), places that enter the fit."""
        raise NotImplementedError

    def suits_probe(self, encoder: nn.Module) -> bool:
        """Whether a linear probe suits an encoder's tokens."""
        return True

    def predict_linear(self, probe: LinearProbe, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Predictions of a linear probe, as those of `predict`."""
        raise NotImplementedError

    def predict_propagated(self, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Predictions of label propagation, as those of `predict`, see encoders.propagation. features: `B t h*w D`."""
        raise NotImplementedError

    def pool(self, predicted: np.ndarray) -> np.ndarray:
        """Predictions `V ...` of a video's test views -> one prediction, of a task that pools."""
        raise NotImplementedError

    def measure(self, predicted: np.ndarray, target: Target) -> MetricSums:
        """Sum and count of each metric for one sample."""
        raise NotImplementedError


def pad(values: np.ndarray, length: int) -> np.ndarray:
    """`Q ...` -> at least `length ...`, zeros behind."""
    return np.concatenate([values, np.zeros((max(length - len(values), 0), *values.shape[1:]), values.dtype)])


def first_objects(target: Target, count: int) -> Target:
    """The target of the first objects; scalars stay."""
    return {name: value[:count] if value.ndim else value for name, value in target.items()}


def predict_in_chunks(head: Head, features: Tensor, queries: Tensor, size: int) -> Tensor:
    """Predictions for given queries `B Q n`, `size` of them at a time, as in training."""
    chunks = F.pad(queries, (0, 0, 0, -queries.shape[1] % size)).split(size, 1)
    return torch.cat([head(features, chunk) for chunk in chunks], 1)[:, : queries.shape[1]]


def collate(targets: Sequence[Target]) -> dict[str, Tensor]:
    """A batch of targets. Zeros fill up where clips differ in the number of tracked objects; zeros are not valid."""
    batch = {}
    for name in targets[0]:
        values = [np.asarray(target[name]) for target in targets]
        if values[0].ndim:
            values = [pad(value, max(map(len, values))) for value in values]
        batch[name] = torch.from_numpy(np.stack(values))
    return batch
