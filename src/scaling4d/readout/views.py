"""A labelled clip seen otherwise, mirrored or run backwards; the labels go with the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from scaling4d.records import Sample, UserError

MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])  # of camera coordinates: x is minus x


def mirrored(sample: Sample) -> Sample:
    """Left and right exchanged; a camera's path is that of a mirrored camera in a mirrored world."""
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


def backwards(sample: Sample) -> Sample:
    """The last frame first. Points and boxes that the last frame does not show are left out, since they could not be asked.

    Not for actions: which one an action is backwards is not known.
    """
    assert "action" not in sample.labels

    def turned(name: str, values: np.ndarray) -> np.ndarray:
        if name in ("boxes", "points"):
            return values[sample.valid[name][:, -1], ::-1]  # Q T
        return values[::-1]

    labels = {name: turned(name, label) for name, label in sample.labels.items()}
    valid = {name: turned(name, mask) for name, mask in sample.valid.items()}
    return replace(sample, pixels=sample.pixels[::-1], labels=labels, valid=valid)


VIEWS: dict[str, Callable[[Sample], Sample]] = {
    "plain": lambda sample: sample,
    "mirrored": mirrored,
    "backwards": backwards,
}


def check(task: str, names: tuple[str, ...], test_views: tuple[int, ...]) -> None:
    """Raises UserError: a view that there is not, or that a task cannot have; test views that are not two numbers above 0."""
    known = [name for name in VIEWS if (task, name) != ("actions", "backwards")]
    if not names or not set(names) <= set(known):
        raise UserError(f"readout.tasks.{task}: views = {list(names)}; needed some of {', '.join(known)}")
    if len(test_views) != 2 or any(not isinstance(count, int) or count < 1 for count in test_views):
        raise UserError(
            f"readout.tasks.{task}: test_views = {list(test_views)}; needed two whole numbers of at least 1: clips over "
            "the time of a video, and squares cut out of each"
        )


def views(sample: Sample, names: tuple[str, ...]) -> Iterator[Sample]:
    """The sample in every wanted view."""
    for name in names:
        seen = VIEWS[name](sample)
        yield replace(seen, pixels=np.ascontiguousarray(seen.pixels))
