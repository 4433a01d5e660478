"""WORLD -> PICTURES AND TRUTH, by casting rays: things with embree, the room in closed form.

A ray is cast in float32 to learn which triangle it meets; where it meets it is then computed in float64. Camera rays
have a z of 1 in the camera's frame, so the distance along a ray *is* the z-depth.
Pixel (i, j) covers [j, j+1) x [i, i+1): its centre is at (j + 0.5, i + 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from scaling4d.scenes.things import mesh
from scaling4d.scenes.worlds import World

ROOM = 0  # the number of the room in `Hits.thing`; things count from 1
VISIBLE_WITHIN = 1e-3  # a point is seen when what the ray meets first is no nearer than this share of its depth
MIN_VISIBLE = 0.2  # a thing of which a smaller share of its pixels shows has no box
MIN_BOX_PX = 4.0


@dataclass(frozen=True)
class Hits:
    """What each of R rays meets first.

    thing: `R`, 0 is the room. depth: `R`, in lengths of the direction. position and normal: `R 3` in the world, the normal facing
    the ray. wall: `R`, where it leaves the room.
    """

    thing: np.ndarray
    depth: np.ndarray
    position: np.ndarray
    normal: np.ndarray
    wall: np.ndarray


class Instant:
    """The world at one frame, ready for rays."""

    def __init__(self, world: World, frame: int, *, only: int | None = None) -> None:
        """only: the number of the single thing to keep."""
        self.half = world.room.size / 2
        self.scene, self.triangles, self.numbers = EmbreeScene(), [], []
        for number, thing in enumerate(world.things, start=1):
            if only in (None, number):
                vertices, faces = placed(world, number, frame), mesh(thing.shape)[1]
                TriangleMesh(self.scene, vertices.astype(np.float32), faces)
                self.triangles.append(vertices[faces])  # F 3 3
                self.numbers.append(number)

    def cast(self, origin: np.ndarray, directions: np.ndarray) -> Hits:
        """origin `3`, inside the room; directions `R 3`, any length."""
        with np.errstate(divide="ignore"):
            exits = (np.sign(directions) * self.half - origin) / directions  # R 3
        axis = np.nanargmin(np.where(np.isfinite(exits), exits, np.inf), axis=1)
        rows = np.arange(len(directions))
        depth = exits[rows, axis]
        side = np.sign(directions[rows, axis])
        normal = np.zeros_like(directions)
        normal[rows, axis] = -side
        thing = np.full(len(directions), ROOM)
        origins = np.broadcast_to(origin.astype(np.float32), directions.shape).copy()
        met = self.scene.run(origins, directions.astype(np.float32), output=1)
        for index, (number, triangles) in enumerate(zip(self.numbers, self.triangles, strict=True)):
            (hit,) = np.nonzero(met["geomID"] == index)
            a, b, c = triangles[met["primID"][hit]].transpose(1, 0, 2)
            n = np.cross(b - a, c - a)
            n /= np.linalg.norm(n, axis=1, keepdims=True)
            towards = (n * directions[hit]).sum(-1)
            with np.errstate(divide="ignore", invalid="ignore"):
                t = (n * (a - origin)).sum(-1) / towards
            nearer = (t > 0) & (t < depth[hit])
            hit, n, t, towards = hit[nearer], n[nearer], t[nearer], towards[nearer]
            depth[hit], thing[hit], normal[hit] = t, number, n * -np.sign(towards)[:, None]
        return Hits(thing, depth, origin + depth[:, None] * directions, normal, 2 * axis + (side > 0))


def placed(world: World, number: int, frame: int) -> np.ndarray:
    """`V 3` vertices of a thing in the world at a frame."""
    thing = world.things[number - 1]
    pose = thing.poses[frame]
    return thing.vertices @ pose[:3, :3].T + pose[:3, 3]


def pixel_rays(world: World, frame: int, *, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Origin `3` and directions `height*width 3` through the centres of a grid over the whole picture, z = 1 in the camera."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return rays_through(world, frame, np.stack([x.ravel(), y.ravel()], -1))


def rays_through(world: World, frame: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `pixel_rays`, through points `R 2`, x y in 0..1 of the picture."""
    k = world.intrinsics
    in_camera = np.column_stack([(points - [k[0, 2], k[1, 2]]) / [k[0, 0], k[1, 1]], np.ones(len(points))])
    pose = world.camera_to_world[frame]
    return pose[:3, 3], in_camera @ pose[:3, :3].T


def project(world: World, frame: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World positions `R 3` -> x y in 0..1 of the picture `R 2`, z-depth in metres `R`."""
    pose = world.camera_to_world[frame]
    in_camera = (positions - pose[:3, 3]) @ pose[:3, :3]
    z = in_camera[:, 2]
    k = world.intrinsics
    with np.errstate(divide="ignore", invalid="ignore"):
        return in_camera[:, :2] / z[:, None] * [k[0, 0], k[1, 1]] + [k[0, 2], k[1, 2]], z


def picture(world: World, frame: int, instant: Instant) -> np.ndarray:
    """uint8 `H W 3`: 2 x 2 rays a pixel, Lambert shading by one lamp plus ambient light."""
    height, width = world.height_px, world.width_px
    origin, directions = pixel_rays(world, frame, height=2 * height, width=2 * width)
    hits = instant.cast(origin, directions)
    color = np.empty_like(directions)
    room = hits.thing == ROOM
    color[room] = world.room.color(hits.position[room], hits.wall[room])
    for number, thing in enumerate(world.things, start=1):
        mine = hits.thing == number
        if mine.any():
            pose = thing.poses[frame]
            color[mine] = thing.texture.color((hits.position[mine] - pose[:3, 3]) @ pose[:3, :3])
    lamp = world.lamp - hits.position
    lambert = np.clip((hits.normal * lamp).sum(-1) / np.linalg.norm(lamp, axis=1), 0, 1)
    color *= (world.ambient + (1 - world.ambient) * lambert)[:, None]
    mean = color.reshape(height, 2, width, 2, 3).mean((1, 3))
    return np.clip(np.rint(255 * mean), 0, 255).astype(np.uint8)


def pixels(world: World) -> np.ndarray:
    """uint8 `T H W 3`."""
    return np.stack([picture(world, t, Instant(world, t)) for t in range(world.frames)])


def depth_and_things(world: World, *, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact z-depth in metres and the number of the thing seen (0: room), both `T height width`, at pixel centres."""
    depth, thing = [], []
    for t in range(world.frames):
        hits = Instant(world, t).cast(*pixel_rays(world, t, height=height, width=width))
        depth.append(hits.depth.reshape(height, width))
        thing.append(hits.thing.reshape(height, width))
    return np.stack(depth), np.stack(thing)


def tracks(world: World, *, count: int, on_room: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points on surfaces that are visible at frame 0, followed through time.

    Returns points `Q T 2`, x y in 0..1 of the picture, and visible `Q T`: in the picture and nothing in front of that very point.
    """
    candidates = rng.uniform(0.02, 0.98, (4096, 2))
    hits = Instant(world, 0).cast(*rays_through(world, 0, candidates))
    things, walls = np.nonzero(hits.thing != ROOM)[0], np.nonzero(hits.thing == ROOM)[0]
    wanted = np.concatenate([things[: count - on_room], walls[:on_room]])
    number, positions = hits.thing[wanted], hits.position[wanted]
    local = positions.copy()
    for q, n in enumerate(number):
        if n != ROOM:
            pose = world.things[n - 1].poses[0]
            local[q] = (positions[q] - pose[:3, 3]) @ pose[:3, :3]
    points, visible = [], []
    for t in range(world.frames):
        now = local.copy()
        for q, n in enumerate(number):
            if n != ROOM:
                pose = world.things[n - 1].poses[t]
                now[q] = pose[:3, :3] @ local[q] + pose[:3, 3]
        xy, z = project(world, t, now)
        inside = (z > 0) & (xy >= 0).all(-1) & (xy < 1).all(-1)
        first = Instant(world, t).cast(*rays_through(world, t, np.where(inside[:, None], xy, 0.5))).depth
        points.append(xy)
        visible.append(inside & (first > z * (1 - VISIBLE_WITHIN)))
    return np.stack(points, 1), np.stack(visible, 1)


def boxes(world: World, *, frames: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The box about the projection of a whole thing, hidden parts included, clipped to the picture.

    Returns boxes `Q T 4`, x1 y1 x2 y2 in 0..1 of the picture, and present `Q T`: not where the thing crosses the camera's plane,
    where the clipped box has a side under MIN_BOX_PX, or where under MIN_VISIBLE of its pixels in the picture shows.
    """
    size = np.array([world.width_px, world.height_px])
    result = np.zeros((len(world.things), len(frames), 4))
    present = np.zeros((len(world.things), len(frames)), bool)
    for n, t in enumerate(frames):
        rays = pixel_rays(world, t, height=world.height_px, width=world.width_px)
        seen = Instant(world, t).cast(*rays).thing
        for q in range(len(world.things)):
            xy, z = project(world, t, placed(world, q + 1, t))
            if z.min() < 0.05:
                continue
            box = np.clip(np.concatenate([xy.min(0), xy.max(0)]), 0, 1)
            if ((box[2:] - box[:2]) * size).min() < MIN_BOX_PX:
                continue
            alone = (Instant(world, t, only=q + 1).cast(*rays).thing == q + 1).sum()
            present[q, n] = alone > 0 and (seen == q + 1).sum() >= MIN_VISIBLE * alone
            result[q, n] = box * present[q, n]
    return result, present
