"""ScanNet: depth of every pixel of every frame; mean absolute relative error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from scaling4d import config
from scaling4d.mae.patches import unpatchify
from scaling4d.readout import metrics
from scaling4d.readout.heads import Head
from scaling4d.readout.tasks.task import Measure
from scaling4d.records import Sample

DECODING_PATCH = (2, 8, 8)  # one query a patch, as in the released depth demo


@config.configurable
@dataclass(frozen=True)
class Depth:
    """rate_hz: of the clip's frames. offset_m: what the head predicts the difference from. The loss is our choice: AbsRel."""

    rate_hz: float
    views: tuple[str, ...]
    offset_m: float

    primary: ClassVar = Measure("abs_rel", "ratio", False)
    test_views: ClassVar = (1, 1)

    def head(self, *, features_width: int, clip: tuple[int, int, int]) -> Head:
        values = math.prod(DECODING_PATCH)
        return config.build(
            Head,
            features_width=features_width,
            frames=clip[0],
            learned=math.prod(clip) // values,
            steps=clip[0] // DECODING_PATCH[0],
            out=values,
            coordinates=0,
            tiles=1,
        )

    def target(self, sample: Sample) -> dict[str, np.ndarray]:
        return {"depth_m": sample.labels["depth_m"], "valid": sample.valid["depth_m"]}

    def lesson(self, target: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return target

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """`B T H W` metres."""
        clip = tuple(target["depth_m"].shape[1:])
        return unpatchify(head(features), clip, DECODING_PATCH)[..., 0] + self.offset_m

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        valid, true = target["valid"], target["depth_m"]
        error = (predicted - true).abs() / true.where(valid, 1.0)
        return (error * valid).sum() / valid.sum().clamp(min=1)

    def measure(self, predicted: np.ndarray, target: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
        return metrics.depth_errors(predicted, target["depth_m"], target["valid"])
