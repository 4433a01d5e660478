"""Frames and ground truth of one scene agree: depth, projection, occlusion, boxes, tracks and textures."""

from dataclasses import replace

import numpy as np
import pytest

from scaling4d import seeds
from scaling4d.scenes import raycast
from scaling4d.scenes.objects import PATTERNS, SceneObject, Texture, mesh
from scaling4d.scenes.scene import KINDS, Scene, camera_poses, draw_scene


def draw(kind: str, index: int, *, frames: int = 4) -> Scene:
    return draw_scene(seeds.numpy_rng(3, "test", kind, index), kind, frames=frames, rate_hz=4.0, height_px=48, width_px=64)


@pytest.mark.parametrize("kind", KINDS)
def test_camera_poses_are_rigid_and_the_camera_is_inside_the_room(kind):
    scene = draw(kind, 0, frames=8)
    rotation = scene.camera_to_world[:, :3, :3]
    assert np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(rotation), 1)
    assert (np.abs(scene.camera_to_world[:, :3, 3]) < scene.room.size / 2).all()


def test_the_camera_has_x_to_the_right_y_down_and_z_forward():
    camera = camera_poses(np.zeros((1, 3)), np.zeros(1), np.zeros(1), np.zeros(1))
    assert np.allclose(camera[0, :3, :3], [[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # columns: right +x, down -z, forward +y


@pytest.mark.parametrize("index", range(3))
def test_depth_of_one_frame_lands_on_the_surfaces_of_another(index):
    scene = draw("walk", index, frames=8)
    origin, directions = raycast.pixel_rays(scene, 0, height=24, width=32)
    hits = raycast.RayCaster(scene, 0).cast(origin, directions)
    points, z = raycast.project(scene, 7, origin + hits.depth[:, None] * directions)
    inside = (z > 0) & (points > 0).all(1) & (points < 1).all(1)
    first = raycast.RayCaster(scene, 7).cast(*raycast.rays_through(scene, 7, points[inside])).depth
    assert inside.sum() > 50
    assert (first <= z[inside] * (1 + 1e-5)).all()  # no ray passes through a known surface
    assert np.isclose(first, z[inside], rtol=1e-5).mean() > 0.6  # and most surfaces are not occluded


def test_depth_is_z_and_ends_at_the_nearest_wall_of_an_empty_room():
    scene = replace(draw("room", 1), objects=())
    depth = raycast.depth_maps(scene, height=12, width=16)
    origin, directions = raycast.pixel_rays(scene, 2, height=12, width=16)
    _, z = raycast.project(scene, 2, origin + depth[2].reshape(-1, 1) * directions)
    assert np.allclose(z, depth[2].ravel(), rtol=1e-12)
    assert np.allclose(z, ((np.copysign(scene.room.size / 2, directions) - origin) / directions).min(1))


def test_rays_hit_an_object_where_the_first_of_all_triangles_lies():
    """Against Moller-Trumbore over every triangle."""
    scene = draw("track", 0)
    origin, directions = raycast.pixel_rays(scene, 1, height=12, width=16)
    nearest = raycast.RayCaster(scene, 1, object_ids=[]).cast(origin, directions).depth.copy()
    object_id = np.zeros(len(directions), int)
    for number, item in enumerate(scene.objects, start=1):
        a, b, c = raycast.world_vertices(scene, number, 1)[mesh(item.shape)[1]].transpose(1, 0, 2)  # F 3 each
        for r, ray in enumerate(directions):
            p, q = np.cross(ray, c - a), np.cross(origin - a, b - a)
            det = ((b - a) * p).sum(1)
            with np.errstate(divide="ignore", invalid="ignore"):
                u, v, t = ((origin - a) * p).sum(1) / det, (q @ ray) / det, ((c - a) * q).sum(1) / det
            t = t[(u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0)].min(initial=np.inf)
            if t < nearest[r]:
                nearest[r], object_id[r] = t, number
    hits = raycast.RayCaster(scene, 1).cast(origin, directions)
    assert (object_id > 0).sum() > 10
    assert np.allclose(hits.depth, nearest, rtol=1e-6)
    assert (hits.object_id == object_id).all()


@pytest.mark.parametrize("index", range(3))
def test_a_tracked_point_is_visible_exactly_while_nothing_is_in_front_of_it(index):
    scene = draw("track", index, frames=8)
    points, visible = raycast.track_points(scene, count=12, on_room=3, rng=seeds.numpy_rng(0, "tracks", index))
    assert points.shape == (12, 8, 2)
    assert visible[:, 0].all()
    assert (np.linalg.norm(points[:, -1] - points[:, 0], axis=-1) > 0.1).sum() >= 3  # objects do move
    start = raycast.RayCaster(scene, 0).cast(*raycast.rays_through(scene, 0, points[:, 0]))
    assert (start.object_id[:9] > 0).all() and (start.object_id[9:] == raycast.ROOM).all()
    for t in (3, 7):
        hits = raycast.RayCaster(scene, t).cast(*raycast.rays_through(scene, t, points[:, t]))
        for q, (object_id, position) in enumerate(zip(start.object_id, start.position, strict=True)):
            poses = scene.objects[object_id - 1].poses if object_id else [np.eye(4)] * 8
            now = (poses[t] @ np.linalg.inv(poses[0]) @ np.append(position, 1))[:3]
            depth = raycast.project(scene, t, now[None])[1][0]
            inside = ((points[q, t] >= 0) & (points[q, t] < 1)).all()
            assert not visible[q, t] or (inside and hits.object_id[q] == object_id)
            assert visible[q, t] or not inside or hits.depth[q] < depth


@pytest.mark.integration
@pytest.mark.parametrize("index", range(4))
def test_a_box_encloses_its_object_with_occluded_parts_to_a_pixel(index):
    scene = draw("drive", index, frames=3)
    boxes, present = raycast.bounding_boxes(scene, frames=range(3))
    assert present.any()
    for q, t in zip(*np.nonzero(present), strict=True):
        x1, y1, x2, y2 = boxes[q, t] * [64, 48, 64, 48]
        visible = raycast.RayCaster(scene, t).cast(*raycast.pixel_rays(scene, t, height=48, width=64)).object_id
        i, j = np.nonzero(visible.reshape(48, 64) == q + 1)
        assert (j + 0.5 >= x1).all() and (j + 0.5 <= x2).all() and (i + 0.5 >= y1).all() and (i + 0.5 <= y2).all()
        fine = raycast.pixel_rays(scene, t, height=480, width=640)
        alone = raycast.RayCaster(scene, t, object_ids=[q + 1]).cast(*fine).object_id == q + 1
        i, j = np.nonzero(alone.reshape(480, 640))
        assert np.allclose([j.min() / 10, i.min() / 10, (j.max() + 1) / 10, (i.max() + 1) / 10], [x1, y1, x2, y2], atol=1)


def test_an_object_behind_another_has_no_box():
    scene = draw("drive", 1, frames=2)
    objects = []
    for distance, size in ((3, 1.0), (6, 0.4)):
        poses = np.tile(np.eye(4), (2, 1, 1))
        poses[:, :, 3] = scene.camera_to_world[0] @ np.array([0, 0, distance, 1.0])
        objects.append(SceneObject("ball", np.full(3, size), scene.objects[0].texture, poses))
    _, present = raycast.bounding_boxes(replace(scene, objects=tuple(objects)), frames=[0])
    assert present.tolist() == [[True], [False]]


def test_a_texture_moves_with_its_object():
    """A ball straight ahead keeps its colours when ball and camera turn together."""
    scene = draw("track", 2, frames=2)
    cameras = camera_poses(np.zeros((2, 3)), np.array([0, 0.7]), np.array([0, 0.3]), np.zeros(2))
    straight_ahead = np.eye(4)
    straight_ahead[2, 3] = 2
    ball = SceneObject("ball", np.ones(3), scene.objects[0].texture, cameras @ straight_ahead)
    together = replace(scene, objects=(ball,), camera_to_world=cameras, ambient=1.0)
    first, second = raycast.render_frames(together)[:, 20:28, 28:36].astype(int)
    assert np.abs(first - second).max() <= 1 and first.std() > 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_shows_at_least_two_colours(pattern):
    texture = Texture.draw(seeds.numpy_rng(0, pattern), pattern=pattern, per_m=2.0, contrast=1.0, saturation=1.0)
    colors = texture.color(seeds.numpy_rng(1, pattern).uniform(-1, 1, (200, 3)))
    assert colors.min() >= 0 and colors.max() <= 1
    assert len(np.unique(colors.round(3), axis=0)) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_neither_flat_nor_still(kind):
    pixels = raycast.render_frames(draw(kind, 5, frames=8))[[0, -1]].astype(float)
    assert pixels.shape == (2, 48, 64, 3)
    assert pixels.std(axis=(1, 2)).mean() > 12
    assert np.abs(pixels[1] - pixels[0]).mean() > 1.5
