"""RealEstate10K: the camera's motion from the first frame to the last; mean end point error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from scaling4d.readout import metrics
from scaling4d.readout.heads import Head, Queries
from scaling4d.readout.tasks.task import Metric, MetricSums, Target, Task
from scaling4d.records import Sample


@dataclass(frozen=True, kw_only=True)
class Pose(Task):
    """Loss: squared error of the 3 x 4 matrix, summed over its entries. The translation keeps its scale (ours)."""

    metric: ClassVar = Metric("epe", "scene units", False)

    def queries(self, clip: tuple[int, int, int]) -> Queries:
        return Queries(learned=1, out=12)

    def target(self, sample: Sample) -> Target:
        pose = metrics.relative_pose(sample.labels["camera_to_world"], source=0, target=-1)
        return {"pose": pose.astype(np.float32)}

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """`B 3 4`."""
        return head(features)[:, 0].unflatten(-1, (3, 4))

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        return (predicted - target["pose"]).square().sum((-1, -2)).mean()

    def measure(self, predicted: np.ndarray, target: Target) -> MetricSums:
        pose, true = predicted.astype(np.float64), target["pose"].astype(np.float64)
        return {
            "epe": (metrics.pose_end_point_error(pose, true), 1.0),
            "epe_so3": (metrics.pose_end_point_error(metrics.nearest_rotation(pose), true), 1.0),
            "rotation_error_deg": (metrics.rotation_error_deg(pose, true), 1.0),
            "translation_error": (float(np.linalg.norm(pose[:, 3] - true[:, 3])), 1.0),
            "epe_standing_still": (metrics.pose_end_point_error(np.eye(3, 4), true), 1.0),
        }
