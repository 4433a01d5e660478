"""What every task provides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling4d.readout.heads import Head
from scaling4d.records import Sample


@dataclass(frozen=True)
class Measure:
    """A metric's name and how to read it."""

    metric: str
    unit: str
    higher_is_better: bool


class Task(Protocol):
    """A task turns samples into targets of one shape, predicts them, and sums its metrics up, sample by sample.

    rate_hz: of a clip's frames. views: in which a training clip is shown, names of readout.views.VIEWS.
    test_views: clips over the time of a validation video, and squares cut out of each, that are judged together.
    """

    primary: ClassVar[Measure]
    rate_hz: float
    views: tuple[str, ...]
    test_views: tuple[int, int]

    def head(self, *, features_width: int, clip: tuple[int, int, int]) -> Head: ...

    def target(self, sample: Sample) -> dict[str, np.ndarray]:
        """What the sample is judged by: arrays of one shape for all samples, but for how many things are followed."""
        ...

    def lesson(self, target: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What of it is learned: arrays of one shape for all samples."""
        ...

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor: ...

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor: ...

    def pooled(self, predicted: np.ndarray) -> np.ndarray:
        """What the predictions of several views of a video, `V ...`, say of it; of no use where there is one."""
        ...

    def measure(self, predicted: np.ndarray, target: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
        """Of one sample: metric -> (sum, count)."""
        ...


def pad(values: np.ndarray, length: int) -> np.ndarray:
    """`Q ...` -> at least `length ...`, zeros behind."""
    return np.concatenate([values, np.zeros((max(length - len(values), 0), *values.shape[1:]), values.dtype)])


def first(target: dict[str, np.ndarray], things: int) -> dict[str, np.ndarray]:
    """The target of so many of the things that are followed; numbers that all of them share stay."""
    return {name: value[:things] if value.ndim else value for name, value in target.items()}


def in_parts(head: Head, features: Tensor, given: Tensor, size: int) -> Tensor:
    """What a head says of given queries `B Q n`, asked `size` of them at a time, as it was trained."""
    said = []
    for part in given.split(size, 1):
        asked = F.pad(part, (0, 0, 0, size - part.shape[1]))
        said.append(head(features, asked)[:, : part.shape[1]])
    return torch.cat(said, 1)
