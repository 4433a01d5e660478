"""Waymo Open, Perception Test: track boxes given in the first frame; mean IoU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from scaling4d.config import require_minima, require_sizes
from scaling4d.encoders.propagation import propagated_boxes
from scaling4d.readout import metrics
from scaling4d.readout.heads import Head, Queries
from scaling4d.readout.tasks.task import Metric, MetricSums, Target, Task, first_objects, pad, predict_in_chunks
from scaling4d.records import Sample

SMOOTH_L1_BETA = 0.05  # ours, of the picture's side


@dataclass(frozen=True, kw_only=True)
class Boxes(Task):
    """Loss: smooth L1 + giou_weight x (1 - generalised IoU) (ours; InternVideo-Next, A.4: 0.5, its own choice).

    objects: boxes of a clip to train on at most, and boxes of a query chunk. relative: predict the change of the given
    box (ours), not the box itself (released).
    """

    objects: int
    relative: bool
    giou_weight: float

    metric: ClassVar = Metric("mean_iou", "share", True)
    propagates: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "objects")
        require_minima(self, {"giou_weight": 0})

    def queries(self, clip: tuple[int, int, int]) -> Queries:
        return Queries(coordinates=4, out=clip[0] * 4)

    def target(self, sample: Sample) -> Target:
        present = sample.valid["boxes"].copy()
        present[:, 0] = False  # given, so neither learned nor measured
        return {"boxes": pad(sample.labels["boxes"], self.objects), "present": pad(present, self.objects)}

    def train_target(self, sample: Sample) -> Target:
        return first_objects(self.target(sample), self.objects)

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """`B Q T 4`."""
        given = target["boxes"][:, :, 0]
        boxes = predict_in_chunks(head, features, given, self.objects)
        return boxes + given[:, :, None] if self.relative else boxes

    def predict_propagated(self, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        boxes = target["boxes"]
        return propagated_boxes(features, boxes[:, :, 0], boxes.shape[2])

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        present = target["present"]
        error = F.smooth_l1_loss(predicted, target["boxes"], reduction="none", beta=SMOOTH_L1_BETA).mean(-1)
        if self.giou_weight:
            error = error + self.giou_weight * (1 - metrics.box_ious(predicted, target["boxes"])[1])
        return (error * present).sum() / present.sum().clamp(min=1)

    def measure(self, predicted: np.ndarray, target: Target) -> MetricSums:
        boxes, present = target["boxes"], target["present"]
        trivial = metrics.box_overlaps(np.broadcast_to(boxes[:, :1], boxes.shape), boxes, present)
        return metrics.box_overlaps(predicted, boxes, present) | {"mean_iou_first_box_repeated": trivial["mean_iou"]}
