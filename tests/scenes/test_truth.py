"""The truths of one world against each other: depth, projection, occlusion, boxes and tracks."""

import numpy as np
import pytest

from scaling4d import seeds
from scaling4d.scenes import rays, worlds


def draw(kind: str, index: int, *, frames: int = 4) -> worlds.World:
    return worlds.draw(seeds.numpy(3, "test", kind, index), kind, frames=frames, height_px=48, width_px=64, contrast=0.3)


@pytest.mark.parametrize("kind", worlds.KINDS)
def test_camera_poses_are_rigid_and_the_camera_is_inside_the_room(kind):
    world = draw(kind, 0, frames=16)
    rotation = world.camera_to_world[:, :3, :3]
    assert np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(rotation), 1)
    assert (np.abs(world.camera_to_world[:, :3, 3]) < world.room.size / 2).all()


def test_the_camera_has_x_to_the_right_y_down_and_z_forward():
    camera = worlds.poses(np.zeros((1, 3)), np.zeros(1), np.zeros(1), np.zeros(1))
    assert np.allclose(camera[0, :3, :3], [[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # columns: right is +x, down is -z, forward is +y


@pytest.mark.parametrize("index", range(3))
def test_depth_of_one_frame_lands_on_the_surfaces_of_another(index):
    world = draw("walk", index, frames=16)
    origin, directions = rays.pixel_rays(world, 0, height=24, width=32)
    seen = rays.Instant(world, 0).cast(origin, directions)
    points, z = rays.project(world, 15, origin + seen.depth[:, None] * directions)
    inside = (z > 0) & (points > 0).all(1) & (points < 1).all(1)
    first = rays.Instant(world, 15).cast(*rays.rays_through(world, 15, points[inside])).depth
    assert inside.sum() > 50
    assert (first <= z[inside] * (1 + 1e-5)).all()  # nothing is seen behind a surface that is known to be there
    assert np.isclose(first, z[inside], rtol=1e-5).mean() > 0.6  # and most of it is not hidden


def test_depth_is_z_and_not_the_length_of_the_ray():
    world = draw("room", 1)
    depth, _ = rays.depth_and_things(world, height=12, width=16)
    origin, directions = rays.pixel_rays(world, 2, height=12, width=16)
    _, z = rays.project(world, 2, origin + depth[2].reshape(-1, 1) * directions)
    assert np.allclose(z, depth[2].ravel(), rtol=1e-12)


def test_the_empty_room_has_the_depth_of_its_nearest_wall_plane():
    world = draw("room", 0)
    origin, directions = rays.pixel_rays(world, 0, height=12, width=16)
    room_only = rays.Instant(world, 0, only=-1).cast(origin, directions)
    half = world.room.size / 2
    for ray, depth in zip(directions, room_only.depth, strict=True):
        exits = [(np.copysign(half[a], ray[a]) - origin[a]) / ray[a] for a in range(3)]
        assert depth == pytest.approx(min(exits))


def test_rays_meet_a_thing_where_all_its_triangles_say_so():
    world = draw("track", 0)
    origin, directions = rays.pixel_rays(world, 1, height=12, width=16)
    hits = rays.Instant(world, 1).cast(origin, directions)
    nearest = rays.Instant(world, 1, only=-1).cast(origin, directions).depth.copy()
    number = np.zeros(len(directions), int)
    for n, thing in enumerate(world.things, start=1):
        triangles = rays.placed(world, n, 1)[rays.mesh(thing.shape)[1]]
        for r, ray in enumerate(directions):
            t = _first_crossing(triangles, origin, ray)
            if t < nearest[r]:
                nearest[r], number[r] = t, n
    assert (number > 0).sum() > 10
    assert np.allclose(hits.depth, nearest, rtol=1e-6)
    assert (hits.thing == number).all()


def _first_crossing(triangles: np.ndarray, origin: np.ndarray, ray: np.ndarray) -> float:
    """Moller-Trumbore over all triangles `F 3 3`."""
    a, e1, e2 = triangles[:, 0], triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    p = np.cross(ray, e2)
    det = (e1 * p).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        u = ((origin - a) * p).sum(1) / det
        q = np.cross(origin - a, e1)
        v, t = (q @ ray) / det, (e2 * q).sum(1) / det
    hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0)
    return t[hit].min(initial=np.inf)


@pytest.mark.parametrize("index", range(3))
def test_a_track_is_at_the_depth_that_is_seen_there_exactly_while_it_is_visible(index):
    world = draw("track", index, frames=16)
    points, visible = rays.tracks(world, count=12, on_room=3, rng=seeds.numpy(0, "tracks", index))
    assert points.shape == (12, 16, 2)
    assert visible[:, 0].all()
    assert (np.linalg.norm(points[:, -1] - points[:, 0], axis=-1) > 0.1).sum() >= 3  # things do move
    start = rays.Instant(world, 0).cast(*rays.rays_through(world, 0, points[:, 0]))
    assert (start.thing[:9] > 0).all() and (start.thing[9:] == rays.ROOM).all()
    for t in (5, 15):
        hits = rays.Instant(world, t).cast(*rays.rays_through(world, t, points[:, t]))
        for q, number in enumerate(start.thing):
            inside = ((points[q, t] >= 0) & (points[q, t] < 1)).all()
            assert not visible[q, t] or (inside and hits.thing[q] == number)
            assert visible[q, t] or not inside or hits.depth[q] < _depth_of(world, number, start.position[q], t)


def _depth_of(world: worlds.World, number: int, position: np.ndarray, t: int) -> float:
    if number:
        poses = world.things[number - 1].poses
        position = (poses[t] @ np.linalg.inv(poses[0]) @ np.append(position, 1))[:3]
    return float(rays.project(world, t, position[None])[1][0])


@pytest.mark.parametrize("index", range(4))
def test_a_box_encloses_every_pixel_of_its_thing_and_no_more_than_a_pixel_beyond_the_whole_of_it(index):
    world = draw("drive", index, frames=3)
    boxes, present = rays.boxes(world, frames=range(3))
    _, things = rays.depth_and_things(world, height=48, width=64)
    assert present.any()
    for q, t in zip(*np.nonzero(present), strict=True):
        x1, y1, x2, y2 = boxes[q, t] * [64, 48, 64, 48]
        i, j = np.nonzero(things[t] == q + 1)
        assert (j + 0.5 >= x1).all() and (j + 0.5 <= x2).all() and (i + 0.5 >= y1).all() and (i + 0.5 <= y2).all()
        alone = rays.Instant(world, t, only=q + 1).cast(*rays.pixel_rays(world, t, height=480, width=640)).thing == q + 1
        i, j = np.nonzero(alone.reshape(480, 640))
        assert np.allclose([j.min() / 10, i.min() / 10, (j.max() + 1) / 10, (i.max() + 1) / 10], [x1, y1, x2, y2], atol=1)


def test_a_thing_behind_another_has_no_box():
    world = draw("drive", 1, frames=2)
    ahead = world.camera_to_world[0] @ np.array([0, 0, 3, 1.0])
    beyond = world.camera_to_world[0] @ np.array([0, 0, 6, 1.0])
    shown = []
    for where, size in ((ahead, 1.0), (beyond, 0.4)):
        poses = np.tile(np.eye(4), (2, 1, 1))
        poses[:, :3, 3] = where[:3]
        shown.append(worlds.Thing("ball", np.full(3, size), world.things[0].texture, poses))
    pair = worlds.World(**{**vars(world), "things": tuple(shown)})
    assert rays.boxes(pair, frames=[0])[1].tolist() == [[True], [False]]


def test_a_texture_moves_with_its_thing():
    world = draw("track", 2, frames=2)
    thing = world.things[0]
    local = thing.vertices[::7]
    turn = thing.poses[1]
    placed = local @ turn[:3, :3].T + turn[:3, 3]
    back = (placed - turn[:3, 3]) @ turn[:3, :3]
    smooth = worlds.Texture(**{**vars(thing.texture), "pattern": "waves"})
    assert np.allclose(smooth.color(local), smooth.color(back), atol=1e-6)
    assert smooth.color(local).min() >= 0 and smooth.color(local).max() <= 1


@pytest.mark.parametrize("pattern", worlds.PATTERNS)
def test_every_pattern_shows_at_least_two_colours(pattern):
    texture = worlds.Texture.draw(seeds.numpy(0, pattern), pattern=pattern, per_m=2.0, contrast=1.0, saturation=1.0)
    colors = texture.color(seeds.numpy(1, pattern).uniform(-1, 1, (200, 3)))
    assert len(np.unique(colors.round(3), axis=0)) >= 2


@pytest.mark.parametrize("kind", worlds.KINDS)
def test_pictures_are_neither_flat_nor_still(kind):
    pixels = rays.pixels(draw(kind, 5, frames=16))[[0, -1]].astype(float)
    assert pixels.shape == (2, 48, 64, 3)
    assert pixels.std(axis=(1, 2)).mean() > 12
    assert np.abs(pixels[1] - pixels[0]).mean() > 1.5
