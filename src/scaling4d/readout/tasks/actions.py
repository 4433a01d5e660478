"""SSv2, Kinetics: classify the action; top-1 accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling4d import benchmarks
from scaling4d.config import require_sizes
from scaling4d.readout.heads import Head, Queries
from scaling4d.readout.linear import LinearProbe, pooled
from scaling4d.readout.tasks.task import Metric, MetricSums, Target, Task
from scaling4d.records import Sample, UserError


@dataclass(frozen=True, kw_only=True)
class Actions(Task):
    """classes: of the benchmark (SSv2: 174)."""

    classes: int

    metric: ClassVar = Metric("top1", "share", True)
    pools: ClassVar = True
    linear: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "classes")

    def check_benchmark(self, root: Path) -> None:
        names = benchmarks.class_names(root)
        if len(names) != self.classes:
            folder = benchmarks.find_benchmark("actions", root).folder
            raise UserError(f"{folder} has {len(names)} classes, and Actions.classes is {self.classes}; set it to {len(names)}")

    def queries(self, clip: tuple[int, int, int]) -> Queries:
        return Queries(learned=1, out=self.classes)

    def target(self, sample: Sample) -> Target:
        return {"action": sample.labels["action"]}

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """`B classes` logits."""
        return head(features)[:, 0]

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(predicted, target["action"])

    def regression(self, features: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        classes = F.one_hot(target["action"], self.classes).float()[:, None]
        return pooled(features), classes, torch.ones(classes.shape[:2], dtype=torch.bool)

    def predict_linear(self, probe: LinearProbe, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        return probe(pooled(features))[:, 0]

    def pool(self, predicted: np.ndarray) -> np.ndarray:
        """`V classes` logits -> `classes`: mean probabilities. Source: num_test_clips of the released evaluation."""
        return torch.from_numpy(predicted).softmax(-1).mean(0).numpy()

    def measure(self, predicted: np.ndarray, target: Target) -> MetricSums:
        return {"top1": (float(predicted.argmax() == target["action"]), 1.0)}
