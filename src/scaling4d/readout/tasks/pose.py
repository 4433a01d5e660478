"""RealEstate10K: how the camera moved from the first frame to the last; mean end point error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from scaling4d import config
from scaling4d.readout import metrics
from scaling4d.readout.heads import Head
from scaling4d.readout.tasks.task import Measure
from scaling4d.records import Sample


@config.configurable
@dataclass(frozen=True)
class Pose:
    """rate_hz: of the clip's frames. unit_translation: learn and measure its direction alone, since a clip's scale is its own.

    Loss: mean squared error of the 3 x 4 matrix's twelve numbers.
    """

    rate_hz: float
    views: tuple[str, ...]
    unit_translation: bool

    primary: ClassVar = Measure("epe", "scene units", False)
    test_views: ClassVar = (1, 1)

    def head(self, *, features_width: int, clip: tuple[int, int, int]) -> Head:
        return config.build(Head, features_width=features_width, frames=clip[0], learned=1, out=12, coordinates=0, tiles=1)

    def target(self, sample: Sample) -> dict[str, np.ndarray]:
        relative = metrics.relative_pose(sample.labels["camera_to_world"], source=0, target=-1)
        return {"pose": (metrics.unit_translation(relative) if self.unit_translation else relative).astype(np.float32)}

    def lesson(self, target: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return target

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """`B 3 4`."""
        return head(features)[:, 0].unflatten(-1, (3, 4))

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        return (predicted - target["pose"]).square().sum((-1, -2)).mean()

    def measure(self, predicted: np.ndarray, target: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
        pose, true = predicted.astype(np.float64), target["pose"].astype(np.float64)
        still = np.eye(3, 4)
        return {
            "epe": (metrics.pose_end_point_error(pose, true), 1.0),
            "epe_so3": (metrics.pose_end_point_error(metrics.nearest_rotation(pose), true), 1.0),
            "rotation_error_deg": (metrics.rotation_error_deg(pose, true), 1.0),
            "translation_error": (metrics.translation_error(pose, true), 1.0),
            "epe_standing_still": (metrics.pose_end_point_error(still, true), 1.0),
        }
