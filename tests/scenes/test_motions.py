"""The eight actions: what each looks like, and that only time tells the two of a pair apart."""

import numpy as np
import pytest

from scaling4d import seeds
from scaling4d.scenes import worlds

S = np.arange(16) / 15


def paths(motion: int, *, count: int) -> np.ndarray:
    """`n T 3` view coordinates from the start."""
    return np.stack([worlds.string([worlds.motion_leg(seeds.numpy(0, "leg", motion, n), motion)], S) for n in range(count)])


@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [(0, 0, 1), (1, 0, -1), (2, 1, -1), (3, 1, 1), (4, 2, -1), (5, 2, 1)], ids=worlds.MOTIONS[:6]
)
def test_straight_motions_go_where_their_name_says(motion, axis, sign):
    moved = sign * paths(motion, count=50)[:, -1, axis]
    assert (moved >= 0.5).all()  # x and y: a quarter of the picture at least; depth: by a factor of 1.6
    assert (np.abs(np.delete(paths(motion, count=50)[:, -1], axis, axis=1)) <= 0.11).all()


@pytest.mark.parametrize(("motion", "sign"), [(6, 1), (7, -1)], ids=worlds.MOTIONS[6:])
def test_circles_turn_as_their_name_says(motion, sign):
    for path in paths(motion, count=50):
        step = np.diff(path[:, :2], axis=0)
        turn = step[:-1, 0] * step[1:, 1] - step[:-1, 1] * step[1:, 0]  # positive is clockwise where y points down
        assert (sign * turn > 0).all()
        assert 0.45 < np.ptp(path[:, 0]) < 0.95


@pytest.mark.parametrize("pair", range(4))
def test_a_motion_run_backwards_looks_like_the_other_of_its_pair(pair):
    forth = paths(2 * pair, count=1500)
    back = paths(2 * pair + 1, count=1500)[:, ::-1]
    back = back - back[:, :1]
    for statistic in (lambda p: p[:, 5], lambda p: p[:, 10], lambda p: p[:, 15], lambda p: np.ptp(p, axis=1)):
        a, b = statistic(forth), statistic(back)
        spread = a.std(0) / np.sqrt(1500) + 1e-9
        assert (np.abs(a.mean(0) - b.mean(0)) < 6 * spread).all()
        assert np.allclose(np.quantile(a, [0.1, 0.5, 0.9], axis=0), np.quantile(b, [0.1, 0.5, 0.9], axis=0), atol=0.09)


def test_the_two_frames_of_a_token_show_the_hero_in_one_pose_and_the_next_token_in_another():
    hero = worlds._hero(seeds.numpy(0, "twos"), np.eye(4), 0.577, S, 1, 0)
    assert np.array_equal(hero.poses[0::2], hero.poses[1::2])
    assert np.linalg.norm(np.diff(hero.poses[0::2, :3, 3], axis=0), axis=1).min() > 0.01


def test_the_first_frame_alone_hardly_tells_the_motion():
    """A nearest-neighbour classifier that is given the hero's true place and size, which no encoder is."""
    count, base = 1600, np.eye(4)
    features, labels = [], np.arange(count) % 8
    for n, motion in enumerate(labels):
        hero = worlds._hero(seeds.numpy(0, "hero", n), base, 0.577, S, 1, int(motion))
        where = hero.poses[:, :3, 3]
        features.append(np.stack([where[:, 0] / where[:, 2], where[:, 1] / where[:, 2], np.log(hero.radius_m / where[:, 2])], -1))
    path = np.stack(features)  # n T 3
    first, both = path[:, 0], path[:, [0, -1]].reshape(count, -1)
    assert _accuracy(first, labels) < 0.42
    assert _accuracy(both, labels) > 0.75


def _accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    features = features / features.std(0)
    train, test = features[:1200], features[1200:]
    near = np.argsort(((test[:, None] - train) ** 2).sum(-1), axis=1)[:, :15]
    votes = np.array([np.bincount(labels[row], minlength=8).argmax() for row in near])
    return float((votes == labels[1200:]).mean())


def test_longer_worlds_go_on_without_a_jump():
    for kind in worlds.KINDS:
        world = worlds.draw(seeds.numpy(0, "long", kind), kind, frames=48, height_px=64, width_px=64, contrast=0.3)
        for positions in [world.camera_to_world[:, :3, 3], *(thing.poses[:, :3, 3] for thing in world.things)]:
            steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
            assert steps.max() < 0.6


def test_walks_differ_so_much_that_a_constant_pose_is_wrong():
    relative = []
    for n in range(60):
        world = worlds.draw(seeds.numpy(0, "walk", n), "walk", frames=16, height_px=64, width_px=64, contrast=0.3)
        relative.append(np.linalg.inv(world.camera_to_world[0]) @ world.camera_to_world[-1])
    moved = np.stack(relative)
    assert np.linalg.norm(moved[:, :3, 3], axis=1).mean() > 0.5
    assert np.degrees(np.arctan2(moved[:, 0, 2], moved[:, 2, 2])).std() > 10
