"""Motions of objects and cameras. Only time tells the two actions of a pair apart."""

from functools import partial

import numpy as np
import pytest

from scaling4d import seeds
from scaling4d.scenes import raycast, scene

TIME = np.arange(8) / 7
CLIP = {"frames": 8, "rate_hz": 4.0, "height_px": 64, "width_px": 64}
TO_WORLD = partial(scene.view_to_world, np.eye(4), 0.577)


def paths(motion: int, *, count: int) -> np.ndarray:
    """`n T 3` view coordinates from the start."""
    segments = [scene.motion_segment(seeds.numpy_rng(0, "leg", motion, n), motion) for n in range(count)]
    return np.stack([scene.chain([segment], TIME) for segment in segments])


@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [(0, 0, 1), (1, 0, -1), (2, 1, -1), (3, 1, 1), (4, 2, -1), (5, 2, 1)], ids=scene.MOTIONS[:6]
)
def test_straight_motions_go_where_their_name_says(motion, axis, sign):
    moved = sign * paths(motion, count=50)[:, -1, axis]
    assert (moved >= 0.5).all()  # x and y: a quarter of the picture at least; depth: by a factor of 1.6
    assert (np.abs(np.delete(paths(motion, count=50)[:, -1], axis, axis=1)) <= 0.11).all()


@pytest.mark.parametrize(("motion", "sign"), [(6, 1), (7, -1)], ids=scene.MOTIONS[6:])
def test_circles_turn_as_their_name_says(motion, sign):
    for path in paths(motion, count=50):
        step = np.diff(path[:, :2], axis=0)
        turn = step[:-1, 0] * step[1:, 1] - step[:-1, 1] * step[1:, 0]  # positive is clockwise where y points down
        assert (sign * turn > 0).all()
        assert 0.45 < np.ptp(path[:, 0]) < 0.95


@pytest.mark.integration
@pytest.mark.parametrize("pair", range(4))
def test_a_motion_run_backwards_looks_like_the_other_of_its_pair(pair):
    forth = paths(2 * pair, count=1500)
    back = paths(2 * pair + 1, count=1500)[:, ::-1]
    back = back - back[:, :1]
    for statistic in (lambda p: p[:, 2], lambda p: p[:, 5], lambda p: p[:, 7], lambda p: np.ptp(p, axis=1)):
        a, b = statistic(forth), statistic(back)
        standard_error = a.std(0) / np.sqrt(1500) + 1e-9
        assert (np.abs(a.mean(0) - b.mean(0)) < 6 * standard_error).all()
        assert np.allclose(np.quantile(a, [0.1, 0.5, 0.9], axis=0), np.quantile(b, [0.1, 0.5, 0.9], axis=0), atol=0.09)


@pytest.mark.integration
def test_the_first_frame_alone_hardly_tells_the_motion():
    """A nearest-neighbour classifier of the object's true place and size, which no encoder is given."""
    count = 1600
    features, labels = [], np.arange(count) % 8
    for n, motion in enumerate(labels):
        item = scene.action_object(seeds.numpy_rng(0, "hero", n), TO_WORLD, TIME, int(motion))
        x, y, z = item.poses[:, :3, 3].T
        features.append(np.stack([x / z, y / z, np.log(item.radius_m / z)], -1))
    accuracies = []
    for frames in ([0], [0, -1]):
        points = np.stack(features)[:, frames].reshape(count, -1)
        points /= points.std(0)
        near = np.argsort(((points[1200:, None] - points[:1200]) ** 2).sum(-1), axis=1)[:, :15]
        votes = np.array([np.bincount(labels[row], minlength=8).argmax() for row in near])
        accuracies.append((votes == labels[1200:]).mean())
    assert accuracies[0] < 0.42 and accuracies[1] > 0.75


@pytest.mark.parametrize("kind", scene.KINDS)
def test_longer_scenes_go_on_without_a_jump(kind):
    drawn = scene.draw_scene(seeds.numpy_rng(0, "long", kind), kind, frames=24, rate_hz=4.0, height_px=64, width_px=64)
    for poses in (drawn.camera_to_world, *(item.poses for item in drawn.objects)):
        assert np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).max() < 0.6


@pytest.mark.parametrize("kind", ["room", "walk", "drive"])  # trajectories of the others are centred over their frames
def test_a_scene_at_twice_the_rate_shows_the_same_places_in_between(kind):
    slow, fast = (
        scene.draw_scene(seeds.numpy_rng(0, "rate", kind), kind, **CLIP | {"frames": frames, "rate_hz": rate_hz})
        for frames, rate_hz in ((8, 4.0), (15, 8.0))
    )
    assert np.allclose(slow.camera_to_world, fast.camera_to_world[::2])
    for few, many in zip(slow.objects, fast.objects, strict=True):
        assert np.allclose(few.poses, many.poses[::2])


def test_boxes_of_a_drive_move_so_far_that_the_first_box_is_soon_wrong():
    overlaps = []
    for n in range(40):
        drive = scene.draw_scene(seeds.numpy_rng(0, "drive", n), "drive", **CLIP)
        boxes, present = raycast.bounding_boxes(drive, frames=[0, 7])
        low, high = np.maximum(boxes[:, 0, :2], boxes[:, 1, :2]), np.minimum(boxes[:, 0, 2:], boxes[:, 1, 2:])
        shared = np.clip(high - low, 0, None).prod(-1)
        areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sum(1)
        overlaps.extend((shared / (areas - shared))[present.all(1)])
    assert len(overlaps) > 20 and np.mean(overlaps) < 0.3


def test_walks_differ_so_much_that_a_constant_pose_is_wrong():
    walks = [scene.draw_scene(seeds.numpy_rng(0, "walk", n), "walk", **CLIP) for n in range(60)]
    moved = np.stack([np.linalg.inv(walk.camera_to_world[0]) @ walk.camera_to_world[-1] for walk in walks])
    assert np.linalg.norm(moved[:, :3, 3], axis=1).mean() > 0.5
    assert np.degrees(np.arctan2(moved[:, 0, 2], moved[:, 2, 2])).std() > 10
