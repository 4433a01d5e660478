"""Mirrored clips: the labels still say what the picture shows."""

import re
from dataclasses import replace

import numpy as np
import pytest
from benchmarks.numbered import poses
from small_tasks import TASK

from scaling4d.readout.views import VIEWS, view_of
from scaling4d.records import Sample

T, H, W = 4, 8, 8


def sample() -> Sample:
    """A red square moves right and down; its box, its centre and its depth go with it."""
    pixels, depth = np.zeros((T, H, W, 3), np.uint8), np.full((T, H, W), 5, np.float32)
    boxes, points = np.zeros((2, T, 4), np.float32), np.zeros((2, T, 2), np.float32)
    for t in range(T):
        pixels[t, t : t + 2, t + 1 : t + 3, 0] = 255
        depth[t, t : t + 2, t + 1 : t + 3] = 2
        boxes[0, t] = np.array([t + 1, t, t + 3, t + 2]) / W
        points[0, t] = np.array([t + 2, t + 1]) / W
    seen = np.ones((2, T), bool)
    seen[1, -1] = False
    return Sample(
        id="s",
        video="v",
        pixels=pixels,
        labels={"boxes": boxes, "points": points, "depth_m": depth, "camera_to_world": poses(T)},
        valid={"boxes": seen, "points": seen, "depth_m": depth > 0, "camera_to_world": np.ones(T, bool)},
    )


@pytest.mark.parametrize("name", list(VIEWS))
def test_labels_say_what_the_picture_shows(name: str) -> None:
    view = view_of(sample(), name)
    for t in range(T):
        red = np.argwhere(view.pixels[t, :, :, 0])
        (top, left), (bottom, right) = red.min(0), red.max(0) + 1
        assert np.allclose(view.labels["boxes"][0, t] * W, [left, top, right, bottom])
        assert np.allclose(view.labels["points"][0, t] * W, [(left + right) / 2, (top + bottom) / 2])
        assert np.array_equal(view.labels["depth_m"][t] == 2, view.pixels[t, :, :, 0] > 0)


@pytest.mark.parametrize("name", list(VIEWS))
def test_a_view_of_a_view_is_the_clip_itself(name: str) -> None:
    plain = sample()
    twice = VIEWS[name](VIEWS[name](plain))
    assert np.array_equal(twice.pixels, plain.pixels)
    assert np.allclose(twice.labels["camera_to_world"], plain.labels["camera_to_world"])
    assert np.allclose(twice.labels["boxes"][0], plain.labels["boxes"][0])


def test_a_point_of_the_world_is_seen_mirrored_by_the_mirrored_camera() -> None:
    plain, mirror = sample(), VIEWS["mirrored"](sample())
    point = np.array([0.3, -0.2, 4.0, 1.0])
    for t in range(T):
        x, y, z, _ = np.linalg.inv(plain.labels["camera_to_world"][t]) @ point
        mirrored = np.linalg.inv(mirror.labels["camera_to_world"][t]) @ (point * [-1, 1, 1, 1])
        assert np.allclose(mirrored[:3], [-x, y, z])


def test_a_mirrored_action_is_another() -> None:
    action = Sample("s", "v", np.zeros((T, H, W, 3), np.uint8), {"action": np.int64(1), "action_mirrored": np.int64(2)})
    assert VIEWS["mirrored"](action).labels == {"action": 2, "action_mirrored": 1}


@pytest.mark.parametrize(("task", "settings", "message"), [
    ("depth", {"views": ("upside_down",)}, "views = ['upside_down']; needed some of plain, mirrored"),
    ("pose", {"views": ()}, "views = []; needed some of plain, mirrored"),
    ("points", {"test_views": (1, 3)}, "test_views = [1, 3]; needed one square, since their answers are not pooled"),
    ("points", {"test_views": (2, 1), "queries_at": "first"}, "test_views = [2, 1]; needed [1, 1] at queries_at = 'first', all"),
    *(
        ("actions", {"test_views": views}, f"test_views = {list(views)}; needed two whole numbers of at least 1: clips over")
        for views in ((1, 0), (-1, 1), (2,), (1, 1.5))
    ),
])  # fmt: skip
def test_views_that_a_task_cannot_have_are_refused(task: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        replace(TASK[task], **settings)
