"""ScanNet: depth of every pixel of every frame; mean absolute relative error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from scaling4d.mae.patches import patchify, unpatchify
from scaling4d.readout import metrics
from scaling4d.readout.heads import Head, Queries
from scaling4d.readout.linear import LinearProbe
from scaling4d.readout.tasks.task import Metric, MetricSums, Target, Task
from scaling4d.records import Sample

DECODING_PATCH = (2, 8, 8)  # one query a patch, as in the released depth demo


@dataclass(frozen=True, kw_only=True)
class Depth(Task):
    """The loss is AbsRel of a batch (ours), without the eps of the metric, see readout.metrics.depth_errors.

    offset_m: in metres; the head predicts the difference from it (ours; released: 0).
    """

    offset_m: float

    metric: ClassVar = Metric("abs_rel", "ratio", False)
    answer_patch: ClassVar = DECODING_PATCH
    linear: ClassVar = True

    def queries(self, clip: tuple[int, int, int]) -> Queries:
        values = math.prod(DECODING_PATCH)
        return Queries(learned=math.prod(clip) // values, steps=clip[0] // DECODING_PATCH[0], out=values)

    def target(self, sample: Sample) -> Target:
        return {"depth_m": sample.labels["depth_m"], "valid": sample.valid["depth_m"]}

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """`B T H W` metres."""
        return unpatchify(head(features), tuple(target["depth_m"].shape[1:]), DECODING_PATCH)[..., 0] + self.offset_m

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        valid, true = target["valid"], target["depth_m"]
        error = (predicted - true).abs() / true.where(valid, 1.0)
        return (error * valid).sum() / valid.sum().clamp(min=1)

    def suits_probe(self, encoder: nn.Module) -> bool:
        """Whether tokens divide the clip: each answers for its own pixels."""
        return all(size % count == 0 for size, count in zip(encoder.clip, encoder.grid, strict=True))

    def regression(self, features: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A place is a token. Its targets are the depths of its own patch; it counts where all of them are valid."""
        patch = _patch_of(features, target["depth_m"])
        depth, valid = (patchify(target[name][..., None], patch) for name in ("depth_m", "valid"))  # B N P
        return features.flatten(1, 2), depth, valid.all(-1)

    def predict_linear(self, probe: LinearProbe, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        clip = tuple(target["depth_m"].shape[1:])
        return unpatchify(probe(features.flatten(1, 2)), clip, _patch_of(features, target["depth_m"]))[..., 0]

    def measure(self, predicted: np.ndarray, target: Target) -> MetricSums:
        return metrics.depth_errors(predicted, target["depth_m"], target["valid"])


def _patch_of(features: Tensor, depth: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of the patch of a token: features `B t h*w D`, depth `B T H W`."""
    cells = (features.shape[1], math.isqrt(features.shape[2]), math.isqrt(features.shape[2]))
    return tuple(size // count for size, count in zip(depth.shape[1:], cells, strict=True))
