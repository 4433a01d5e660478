"""SCENE -> FRAMES AND GROUND TRUTH by ray casting: objects with embree, the room in closed form.

Embree finds in float32 the triangle that a ray hits. The length up to its plane is then computed in float64, so labels
are exact. Pictures are shaded in float32. Camera rays have z = 1 in the camera's frame, so the length along a ray
equals the z-depth.
Pixel (i, j) covers [j, j+1) x [i, i+1). Its centre is (j + 0.5, i + 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from scaling4d.scenes.objects import mesh
from scaling4d.scenes.scene import Scene

ROOM = 0  # the room's id; objects have ids from 1
OCCLUSION_TOLERANCE = 1e-3  # share of a point's depth: a nearer first hit occludes the point
MIN_VISIBLE = 0.2  # an object has no box where a smaller share of its pixels is visible
MIN_BOX_PX = 4.0
NEAR_M = 0.05  # an object with a vertex nearer to the camera's plane has no box
TRACK_CANDIDATES = 4096


@dataclass(frozen=True)
class RayHits:
    """First hits of R rays.

    object_id: `R`, ROOM or from 1. depth: `R`, in lengths of the direction. position: `R 3`, in the world.
    normal: `R 3`, facing the ray. wall: `R`, index of the wall where the ray leaves the room.
    """

    object_id: np.ndarray
    depth: np.ndarray
    position: np.ndarray
    normal: np.ndarray
    wall: np.ndarray


class RayCaster:
    """The scene at one frame, built for ray casting."""

    def __init__(self, scene: Scene, frame: int, *, object_ids: Sequence[int] | None = None) -> None:
        """object_ids: the objects in it, by default all; the room is always in it."""
        self.half = scene.room.size / 2
        self.object_ids = np.arange(1, len(scene.objects) + 1) if object_ids is None else np.array(object_ids, int)
        self.embree, triangles = EmbreeScene(), [np.empty((0, 3, 3))]
        for object_id in self.object_ids:
            vertices, faces = world_vertices(scene, object_id, frame), mesh(scene.objects[object_id - 1].shape)[1]
            TriangleMesh(self.embree, vertices.astype(np.float32), faces)
            triangles.append(vertices[faces])
        self.first_face = np.cumsum([len(faces) for faces in triangles])  # of each object
        self.triangles = np.concatenate(triangles)  # F 3 3

    def cast(self, origin: np.ndarray, directions: np.ndarray) -> RayHits:
        """origin: `3`, inside the room. directions: `R 3`, of any length; the hits have their dtype."""
        origin, towards = origin.astype(directions.dtype), directions > 0
        half = self.half.astype(directions.dtype)
        with np.errstate(divide="ignore"):
            x, y, z = ((half - np.where(towards, origin, -origin)) / np.abs(directions)).T  # lengths up to the walls
        axis = np.where(x <= y, np.where(x <= z, 0, 2), np.where(y <= z, 1, 2))
        rays, depth = np.arange(len(directions)), np.minimum(np.minimum(x, y), z)
        positive = towards[rays, axis]
        normal = np.zeros_like(directions)
        normal[rays, axis] = np.where(positive, -1, 1)
        object_id = np.full(len(directions), ROOM)
        origins = np.broadcast_to(origin.astype(np.float32), directions.shape).copy()
        first = self.embree.run(origins, directions.astype(np.float32), output=1)
        (hit,) = np.nonzero(first["geomID"] >= 0)
        index = first["geomID"][hit]
        a, b, c = self.triangles[self.first_face[index] + first["primID"][hit]].transpose(1, 0, 2)
        n, ray = np.cross(b - a, c - a), directions[hit].astype(float)
        n /= np.linalg.norm(n, axis=1, keepdims=True)
        cosine = np.einsum("rd,rd->r", n, ray)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.einsum("rd,rd->r", n, a - origin) / cosine
        nearer = (t > 0) & (t < depth[hit])
        hit = hit[nearer]
        depth[hit], object_id[hit] = t[nearer], self.object_ids[index[nearer]]
        normal[hit] = n[nearer] * -np.sign(cosine[nearer])[:, None]
        return RayHits(object_id, depth, origin + depth[:, None] * directions, normal, 2 * axis + positive)


def world_vertices(scene: Scene, object_id: int, frame: int) -> np.ndarray:
    """`V 3` vertices of an object, in the world."""
    item = scene.objects[object_id - 1]
    pose = item.poses[frame]
    return item.vertices @ pose[:3, :3].T + pose[:3, 3]


def pixel_rays(scene: Scene, frame: int, *, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rays through the centres of a grid over the frame: origin `3`, directions `height*width 3` with z = 1."""
    return rays_through(scene, frame, _centres(height, width))


def rays_through(scene: Scene, frame: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `pixel_rays`, through points `R 2`, x y in 0..1 of the frame."""
    pose = scene.camera_to_world[frame]
    return pose[:3, 3], _in_camera(scene, points) @ pose[:3, :3].T


def _centres(height: int, width: int) -> np.ndarray:
    """Centres of a grid over the frame, x y in 0..1: `height*width 2`."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], -1)


def _in_camera(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Directions `R 3` in the camera's frame, with z = 1, through points `R 2`."""
    k = scene.intrinsics
    return np.column_stack([(points - [k[0, 2], k[1, 2]]) / [k[0, 0], k[1, 1]], np.ones(len(points))])


def project(scene: Scene, frame: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World positions `R 3` -> x y in 0..1 of the frame `R 2`, z-depth in metres `R`."""
    pose = scene.camera_to_world[frame]
    in_camera = (positions - pose[:3, 3]) @ pose[:3, :3]
    z = in_camera[:, 2]
    k = scene.intrinsics
    with np.errstate(divide="ignore", invalid="ignore"):
        return in_camera[:, :2] / z[:, None] * [k[0, 0], k[1, 1]] + [k[0, 2], k[1, 2]], z


def render_frames(scene: Scene) -> np.ndarray:
    """uint8 `T H W 3`: 2 x 2 rays a pixel, Lambert shading by one point light plus ambient light, in float32."""
    height, width = scene.height_px, scene.width_px
    in_camera = _in_camera(scene, _centres(2 * height, 2 * width)).astype(np.float32)
    frames = []
    for t in range(scene.frames):
        camera = scene.camera_to_world[t].astype(np.float32)
        hits = RayCaster(scene, t).cast(camera[:3, 3], in_camera @ camera[:3, :3].T)
        color = np.empty_like(hits.position)
        on_room = hits.object_id == ROOM
        color[on_room] = scene.room.color(hits.position[on_room], hits.wall[on_room])
        for object_id, item in enumerate(scene.objects, start=1):
            on_object = hits.object_id == object_id
            if on_object.any():
                pose = item.poses[t].astype(np.float32)
                color[on_object] = item.texture.color((hits.position[on_object] - pose[:3, 3]) @ pose[:3, :3])
        to_light = scene.light.astype(np.float32) - hits.position
        along, length = (np.einsum("rd,rd->r", to_light, other) for other in (hits.normal, to_light))
        color *= (scene.ambient + (1 - scene.ambient) * np.clip(along / np.sqrt(length), 0, 1))[:, None]
        rows = color.reshape(height, 2, width, 2, 3)
        mean = (rows[:, 0, :, 0] + rows[:, 0, :, 1] + rows[:, 1, :, 0] + rows[:, 1, :, 1]) / 4
        frames.append(np.clip(np.rint(255 * mean), 0, 255).astype(np.uint8))
    return np.stack(frames)


def depth_maps(scene: Scene, *, height: int, width: int) -> np.ndarray:
    """Exact z-depth in metres, `T height width`, at pixel centres."""
    hits = [RayCaster(scene, t).cast(*pixel_rays(scene, t, height=height, width=width)) for t in range(scene.frames)]
    return np.stack([h.depth for h in hits]).reshape(scene.frames, height, width)


def track_points(scene: Scene, *, count: int, on_room: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Follow random surface points that are visible in frame 0: `count` of them, `on_room` of those on the room.

    Returns:
        points `Q T 2`, x y in 0..1 of the frame; visible `Q T`: inside the frame and not occluded. Q is below `count`
        where the frame shows too little of the objects or of the room.
    """
    candidates = rng.uniform(0.02, 0.98, (TRACK_CANDIDATES, 2))
    hits = RayCaster(scene, 0).cast(*rays_through(scene, 0, candidates))
    on_objects, on_walls = np.nonzero(hits.object_id != ROOM)[0], np.nonzero(hits.object_id == ROOM)[0]
    chosen = np.concatenate([on_objects[: count - on_room], on_walls[:on_room]])
    room_poses = np.tile(np.eye(4), (scene.frames, 1, 1))
    poses = np.stack([room_poses, *(item.poses for item in scene.objects)])[hits.object_id[chosen]]  # Q T 4 4
    local = [(x - pose[0, :3, 3]) @ pose[0, :3, :3] for x, pose in zip(hits.position[chosen], poses, strict=True)]
    points, visible = [], []
    for t in range(scene.frames):
        now = np.stack([pose[t, :3, :3] @ x + pose[t, :3, 3] for x, pose in zip(local, poses, strict=True)])
        xy, z = project(scene, t, now)
        inside = (z > 0) & (xy >= 0).all(-1) & (xy < 1).all(-1)
        first = RayCaster(scene, t).cast(*rays_through(scene, t, np.where(inside[:, None], xy, 0.5))).depth
        points.append(xy)
        visible.append(inside & (first > z * (1 - OCCLUSION_TOLERANCE)))
    return np.stack(points, 1), np.stack(visible, 1)


def bounding_boxes(scene: Scene, *, frames: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes about the projections of whole objects, occluded parts included, clipped to the frame.

    Returns:
        boxes `Q T 4`, x1 y1 x2 y2 in 0..1 of the frame; present `Q T`: false where the object crosses the camera's
        plane, where the clipped box has a side under MIN_BOX_PX, or where under MIN_VISIBLE of its pixels are visible.
    """
    height, width, count = scene.height_px, scene.width_px, len(scene.objects)
    boxes, present = np.zeros((count, len(frames), 4)), np.zeros((count, len(frames)), bool)
    for n, t in enumerate(frames):
        rays = pixel_rays(scene, t, height=height, width=width)
        visible = RayCaster(scene, t).cast(*rays).object_id
        for q in range(count):
            xy, z = project(scene, t, world_vertices(scene, q + 1, t))
            box = np.clip(np.concatenate([xy.min(0), xy.max(0)]), 0, 1)
            if z.min() < NEAR_M or ((box[2:] - box[:2]) * [width, height]).min() < MIN_BOX_PX:
                continue
            unoccluded = (RayCaster(scene, t, object_ids=[q + 1]).cast(*rays).object_id == q + 1).sum()
            present[q, n] = unoccluded > 0 and (visible == q + 1).sum() >= MIN_VISIBLE * unoccluded
            boxes[q, n] = box * present[q, n]
    return boxes, present
