"""Views of a labelled clip: plain or mirrored. Labels change with the pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from scaling4d.records import Sample

MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])  # of camera coordinates: x becomes -x


def mirrored(sample: Sample) -> Sample:
    """Swap left and right. The camera's path becomes that of a mirrored camera in a mirrored world."""
    flip: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "boxes": lambda boxes: np.stack([1 - boxes[..., 2], boxes[..., 1], 1 - boxes[..., 0], boxes[..., 3]], -1),
        "points": lambda points: np.stack([1 - points[..., 0], points[..., 1]], -1),
        "depth_m": lambda depth: depth[:, :, ::-1],
        "camera_to_world": lambda poses: MIRROR @ poses @ MIRROR,
    }
    labels = {name: flip[name](label) for name, label in sample.labels.items() if name in flip}
    if "action" in sample.labels:
        labels |= {"action": sample.labels["action_mirrored"], "action_mirrored": sample.labels["action"]}
    valid = {name: mask[:, :, ::-1] if name == "depth_m" else mask for name, mask in sample.valid.items()}
    return replace(sample, pixels=sample.pixels[:, :, ::-1], labels=labels, valid=valid)


VIEWS: dict[str, Callable[[Sample], Sample]] = {"plain": lambda s: s, "mirrored": mirrored}


def view_of(sample: Sample, name: str) -> Sample:
    """The sample in a view, with contiguous pixels."""
    view = VIEWS[name](sample)
    return replace(view, pixels=np.ascontiguousarray(view.pixels))
