"""SSv2: which action is shown; top-1 accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling4d import benchmarks, config
from scaling4d.readout import metrics
from scaling4d.readout.heads import Head
from scaling4d.readout.tasks.task import Measure
from scaling4d.records import Sample, UserError


@config.configurable
@dataclass(frozen=True)
class Actions:
    """classes: of the benchmark (SSv2: 174). rate_hz: of the clip's frames. test_views: see Task."""

    classes: int
    rate_hz: float
    views: tuple[str, ...]
    test_views: tuple[int, int]

    primary: ClassVar = Measure("top1", "share", True)

    def head(self, *, features_width: int, clip: tuple[int, int, int]) -> Head:
        return config.build(
            Head, features_width=features_width, frames=clip[0], learned=1, out=self.classes, coordinates=0, tiles=1
        )

    def target(self, sample: Sample) -> dict[str, np.ndarray]:
        return {"action": sample.labels["action"]}

    def lesson(self, target: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return target

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """`B classes` logits."""
        return head(features)[:, 0]

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(predicted, target["action"])

    def pooled(self, predicted: np.ndarray) -> np.ndarray:
        """`V classes` logits -> `classes`: probabilities, averaged. Source: num_test_clips of the released evaluation."""
        return torch.from_numpy(predicted).softmax(-1).mean(0).numpy()

    def measure(self, predicted: np.ndarray, target: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
        return {"top1": metrics.top1(predicted[None], target["action"][None])}


def check(asked: Actions, benchmarks_root: Path) -> None:
    """Raises UserError: the benchmark has another number of classes."""
    found = benchmarks.classes(benchmarks_root)
    if len(found) != asked.classes:
        folder = benchmarks.folder("actions", benchmarks_root)
        raise UserError(f"{folder} has {len(found)} classes; set readout.tasks.actions.Actions.classes = {asked.classes} to that")
