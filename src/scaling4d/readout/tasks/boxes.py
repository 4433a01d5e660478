"""Waymo Open: follow boxes given in the first frame; mean IoU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from scaling4d import config
from scaling4d.readout import metrics
from scaling4d.readout.heads import Head
from scaling4d.readout.tasks.task import Measure, first, in_parts, pad
from scaling4d.records import Sample


@config.configurable
@dataclass(frozen=True)
class Boxes:
    """objects: at most so many a clip are learned, and so many are asked about at a time.

    rate_hz: of the clip's frames. beta: where the smooth L1 loss bends (our choice).

    relative: predict what is added to the given box (ours), not the box itself (released).
    """

    objects: int
    rate_hz: float
    views: tuple[str, ...]
    beta: float
    relative: bool

    primary: ClassVar = Measure("mean_iou", "share", True)
    test_views: ClassVar = (1, 1)

    def head(self, *, features_width: int, clip: tuple[int, int, int]) -> Head:
        return config.build(
            Head, features_width=features_width, frames=clip[0], learned=0, out=clip[0] * 4, coordinates=4, tiles=1
        )

    def target(self, sample: Sample) -> dict[str, np.ndarray]:
        present = sample.valid["boxes"].copy()
        present[:, 0] = False  # given, so neither learned nor measured
        return {"boxes": pad(sample.labels["boxes"], self.objects), "present": pad(present, self.objects)}

    def lesson(self, target: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return first(target, self.objects)

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """`B Q T 4`."""
        given = target["boxes"][:, :, 0]
        boxes = in_parts(head, features, given, self.objects)
        return boxes + given[:, :, None] if self.relative else boxes

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        present = target["present"]
        error = F.smooth_l1_loss(predicted, target["boxes"], reduction="none", beta=self.beta).mean(-1)
        return (error * present).sum() / present.sum().clamp(min=1)

    def measure(self, predicted: np.ndarray, target: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
        given = np.broadcast_to(target["boxes"][:, :1], predicted.shape)
        first = metrics.box_overlaps(given, target["boxes"], target["present"])
        return {
            **metrics.box_overlaps(predicted, target["boxes"], target["present"]),
            "mean_iou_first_box_repeated": first["mean_iou"],
        }
