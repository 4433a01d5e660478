"""RANDOM STREAM -> SCENE of one of five kinds: a textured room, objects on trajectories, a moving camera.

World frame: metres, z up, the room centred on the origin. Camera frame: x right, y down, z forward (OpenCV).
A trajectory is a chain of *segments* of SEGMENT_S seconds, the motion of one clip, so speed does not depend on the
length of a scene. Time is counted in segments.
View coordinates: x, y from the frame's centre in half shorter sides of the frame (y down), and the log of the depth in
metres.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from scaling4d.scenes.objects import PATTERNS, SHAPES, Room, SceneObject, Texture

CONTRAST = {"action": 0.15, "room": 0.3, "walk": 0.5, "track": 0.3, "drive": 0.7}  # of a room's texture; objects: 1
KINDS = tuple(CONTRAST)
SEGMENT_S = 1.75  # from the first to the last frame of a clip: 8 frames at 4 Hz
HALL = ((6.5, 6.5, 4.5), (8.0, 8.0, 5.5))
CHAMBER = ((5.5, 6.5, 2.9), (7.0, 8.0, 3.4))
STREET = ((8.0, 28.0, 4.0), (10.0, 30.0, 5.0))
ROOM_SIZES = {"action": HALL, "room": CHAMBER, "walk": CHAMBER, "track": HALL, "drive": STREET}  # from, to: metres
ACTION_VIEW = np.array([[-0.8, -0.8, np.log(1.7)], [0.8, 0.8, np.log(3.4)]])  # view coordinates of a labelled motion
ACTION_DEPTH = (np.log(1.4), np.log(4.6))

# Four pairs of motions. The members of a pair are each other's time reversal, and motions start anywhere in view, so
# neither a frame at an unknown time nor the first frame identifies the class.
# The wording follows Something-Something's templates; the set is ours.
MOTIONS = (
    "Moving [something] from left to right",
    "Moving [something] from right to left",
    "Moving [something] up",
    "Moving [something] down",
    "Moving [something] towards the camera",
    "Moving [something] away from the camera",
    "Moving [something] clockwise in a circle",
    "Moving [something] anticlockwise in a circle",
)

Segment = Callable[[np.ndarray], np.ndarray]  # time `n` in 0..1 -> offsets from the segment's start `n d`
ToWorld = Callable[[np.ndarray], np.ndarray]  # view coordinates `T 3` -> world `T 3`


@dataclass(frozen=True)
class Scene:
    """Complete input of the renderer.

    intrinsics: `3 3`, in units of the frame's width and height, corner at (0, 0). camera_to_world: `T 4 4`.
    light: `3` metres, a point light. ambient: share of ambient light, 0 to 1.
    motion: of objects[0] in kind action, index into MOTIONS; -1 in other kinds.
    """

    height_px: int
    width_px: int
    intrinsics: np.ndarray
    camera_to_world: np.ndarray
    room: Room
    objects: tuple[SceneObject, ...]
    light: np.ndarray
    ambient: float
    motion: int

    @property
    def frames(self) -> int:
        return len(self.camera_to_world)


def draw_scene(
    rng: np.random.Generator,
    kind: str,
    *,
    frames: int,
    rate_hz: float,
    height_px: int,
    width_px: int,
    motion: int | None = None,
) -> Scene:
    """A random scene of one of KINDS. motion: the class of kind action, of the first segment; None draws one."""
    time = np.arange(frames) / (rate_hz * SEGMENT_S)
    tan = np.tan(np.radians(rng.uniform(56, 64)) / 2)  # of half the field of view of the shorter side
    shorter = min(height_px, width_px)
    intrinsics = np.array([[shorter / width_px / tan / 2, 0, 0.5], [0, shorter / height_px / tan / 2, 0.5], [0, 0, 1]])
    room = _random_room(rng, kind)
    if kind == "action":
        motion = int(rng.integers(len(MOTIONS))) if motion is None else motion
        cameras, to_world = _handheld_camera(rng, room, tan, time)
        objects = [action_object(rng, to_world, time, motion), *_distractors(rng, to_world, time)]
    elif kind == "track":
        cameras, to_world = _handheld_camera(rng, room, tan, time)
        objects = _crossing_objects(rng, to_world, time)
    elif kind == "drive":
        cameras, objects = _drive(rng, room, tan, time)
    else:
        cameras, objects = _walk(rng, room, time)
    return Scene(
        height_px=height_px,
        width_px=width_px,
        intrinsics=intrinsics,
        camera_to_world=cameras,
        room=room,
        objects=tuple(objects),
        light=rng.uniform([-0.35, -0.4, 0.3], [0.35, 0.1, 0.45]) * room.size,
        ambient=rng.uniform(0.45, 0.6),
        motion=motion if kind == "action" else -1,
    )


# ---- trajectories ----


def camera_poses(position: np.ndarray, yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Camera to world `T 4 4` from position `T 3` and angles `T` in radians.

    At yaw 0 the camera looks along +y. Yaw grows to the right (+x), pitch upwards. Roll turns the camera clockwise.
    """
    forward = np.stack([np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), np.sin(pitch)], -1)
    level = np.stack([np.cos(yaw), -np.sin(yaw), np.zeros_like(yaw)], -1)
    right = np.cos(roll)[:, None] * level + np.sin(roll)[:, None] * np.cross(forward, level)
    poses = np.tile(np.eye(4), (len(yaw), 1, 1))
    poses[:, :3, :3] = np.stack([right, np.cross(forward, right), forward], -1)
    poses[:, :3, 3] = position
    return poses


def _easing(rng: np.random.Generator) -> Segment:
    """Progress from 0 to 1 that accelerates or brakes. Its distribution is symmetric under time reversal."""
    middle, lean = rng.uniform(-0.5, 0.5), rng.uniform(-0.45, 0.45)
    return lambda u: u + middle * np.sin(2 * np.pi * u) / (2 * np.pi) + lean * u * (1 - u)


def line(rng: np.random.Generator, delta: np.ndarray, bend: np.ndarray) -> Segment:
    """A move by delta (of each axis) on a path that bends sideways by up to `bend` (of each axis)."""
    ease, detour = _easing(rng), rng.uniform(-1, 1, len(bend)) * bend
    return lambda u: np.outer(ease(u), delta) + np.outer(np.sin(np.pi * u), detour)


def circle(rng: np.random.Generator, radius: float, sweep: float) -> Segment:
    """An arc of a circle in the view's x y. sweep: radians; positive is clockwise, as y points down."""
    ease, start = _easing(rng), rng.uniform(0, 2 * np.pi)

    def offsets(u: np.ndarray) -> np.ndarray:
        angle = start + sweep * ease(u)
        x, y = radius * (np.cos(angle) - np.cos(start)), radius * (np.sin(angle) - np.sin(start))
        return np.stack([x, y, np.zeros_like(angle)], -1)

    return offsets


def segments_in(time: np.ndarray) -> range:
    """One number for every segment that times `T` reach."""
    return range(max(1, int(np.ceil(time[-1] - 1e-9))))


def chain(segments: list[Segment], time: np.ndarray) -> np.ndarray:
    """Offsets `T d` from the start of the first segment at times `T`, counted in segments."""
    offsets, base = [], 0.0
    for k, segment in enumerate(segments):
        inside = (time >= k) & ((time < k + 1) | (k == len(segments) - 1))
        offsets.append(base + segment(time[inside] - k))
        base = base + segment(np.ones(1))[0]
    return np.concatenate(offsets)


def motion_segment(rng: np.random.Generator, motion: int) -> Segment:
    """A segment of one of the MOTIONS in view coordinates. Reversed in time, it is the pair's other motion."""
    pair, sign = motion // 2, 1 if motion % 2 == 0 else -1
    delta = rng.uniform(-0.1, 0.1, 3)
    if pair == 3:
        return circle(rng, rng.uniform(0.3, 0.45), sign * np.radians(rng.uniform(270, 400)))
    length = rng.uniform(0.65, 1.0) if pair < 2 else rng.uniform(0.5, 0.75)
    delta[pair] = sign * length * (1, -1, -1)[pair]  # right is +x, up is -y, towards the camera is less depth
    return line(rng, delta, np.array([0.1, 0.1, 0.06]))


def _centred(offsets: np.ndarray, middle: list[float]) -> np.ndarray:
    """View coordinates `T 3`: the trajectory, shifted so that `middle` is the centre of its extent."""
    return offsets - (offsets.min(0) + offsets.max(0)) / 2 + np.array(middle)


def view_to_world(base: np.ndarray, tan: float, view: np.ndarray) -> np.ndarray:
    """View coordinates `T 3` of a camera with pose base `4 4` -> world `T 3`. tan: of half its field of view."""
    z = np.exp(view[:, 2])
    in_camera = np.stack([view[:, 0] * z * tan, view[:, 1] * z * tan, z], -1)
    return in_camera @ base[:3, :3].T + base[:3, 3]


# ---- random objects, rooms and cameras ----


def _random_object(
    rng: np.random.Generator, position: np.ndarray, time: np.ndarray, *, radius_m: float, spin: float
) -> SceneObject:
    """A random object at world position `T 3`. It turns about a random axis by up to `spin` radians a segment."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    axis = rng.normal(size=3)
    start, rate = _rotation(rng.normal(size=3), rng.uniform(0, 2 * np.pi)), rng.uniform(-spin, spin)
    poses = np.tile(np.eye(4), (len(time), 1, 1))
    poses[:, :3, :3] = np.stack([_rotation(axis, rate * t) @ start for t in time])
    poses[:, :3, 3] = position
    pattern, per_m = PATTERNS[rng.integers(len(PATTERNS))], rng.uniform(0.55, 0.95) / radius_m
    texture = Texture.draw(rng, pattern=pattern, per_m=per_m, contrast=1.0, saturation=1.0)
    return SceneObject(shape=shape, scale=radius_m * rng.uniform(0.8, 1.15, 3), texture=texture, poses=poses)


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """`3 3` by Rodrigues' formula."""
    x, y, z = axis / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def _random_room(rng: np.random.Generator, kind: str) -> Room:
    low, high = ROOM_SIZES[kind]
    pattern, per_m = PATTERNS[rng.integers(len(PATTERNS))], rng.uniform(0.5, 1.1) * 3 / low[2]
    tints = rng.uniform(0.8, 1.0, (6, 3))
    texture = Texture.draw(rng, pattern=pattern, per_m=per_m, contrast=CONTRAST[kind], saturation=0.5)
    return Room(size=rng.uniform(low, high), texture=texture, tints=tints)


def _handheld_camera(rng: np.random.Generator, room: Room, tan: float, time: np.ndarray) -> tuple[np.ndarray, ToWorld]:
    """A handheld camera near one wall that looks at the opposite one: poses `T 4 4`, its view coordinates."""
    position = np.array([rng.uniform(-0.5, 0.5), -room.size[1] / 2 + rng.uniform(0.4, 0.8), rng.uniform(-0.2, 0.2)])
    angles = np.radians([rng.uniform(-8, 8), rng.uniform(-4, 4), 0])
    rate, phase = rng.uniform(0.5, 1.6, (6, 1)), rng.uniform(0, 2 * np.pi, (6, 1))
    amplitude = np.concatenate([np.full(3, 0.025), np.radians([0.8, 0.8, 0.5])])[:, None]
    shake = amplitude * np.sin(2 * np.pi * rate * time + phase)
    centre = camera_poses(position[None], *(angles[:, None]))[0]
    return camera_poses(position + shake[:3].T, *(angles[:, None] + shake[3:])), partial(view_to_world, centre, tan)


def action_object(rng: np.random.Generator, to_world: ToWorld, time: np.ndarray, motion: int) -> SceneObject:
    """The object whose motion is the label. In later segments it makes other motions."""
    motions = [motion, *(int(m) for m in rng.permutation(len(MOTIONS))[: len(segments_in(time)) - 1])]
    trajectory = [motion_segment(rng, m) for m in motions]
    offsets = chain(trajectory, time)
    low, high = ACTION_VIEW[0] - offsets.min(0), ACTION_VIEW[1] - offsets.max(0)  # starts that stay in view
    view = offsets + rng.uniform(np.minimum(low, high), np.maximum(low, high))
    view[:, 2] = np.clip(view[:, 2], *ACTION_DEPTH)
    return _random_object(rng, to_world(view), time, radius_m=rng.uniform(0.6, 0.9), spin=0.8)


def _distractors(rng: np.random.Generator, to_world: ToWorld, time: np.ndarray) -> list[SceneObject]:
    """No object or one, which hardly moves."""
    objects = []
    for _ in range(rng.integers(0, 2)):
        moves = rng.uniform() >= 0.5
        trajectory = [line(rng, rng.uniform(-0.12, 0.12, 3) * moves, np.full(3, 0.05) * moves) for _ in segments_in(time)]
        middle = [rng.uniform(-0.9, 0.9), rng.uniform(-0.8, 0.8), np.log(rng.uniform(3.2, 5.0))]
        position = to_world(_centred(chain(trajectory, time), middle))
        objects.append(_random_object(rng, position, time, radius_m=rng.uniform(0.3, 0.55), spin=0.7 * moves))
    return objects


def _crossing_objects(rng: np.random.Generator, to_world: ToWorld, time: np.ndarray) -> list[SceneObject]:
    """One or two large objects that move far on curved trajectories at different depths, and may hide each other."""
    count = int(rng.integers(1, 3))
    depths = np.sort(rng.uniform(1.9, 2.6, count) + np.linspace(0, 1.2, count))
    objects = []
    for depth in depths:
        trajectory = []
        for _ in segments_in(time):
            if rng.uniform() < 0.2:
                trajectory.append(circle(rng, rng.uniform(0.25, 0.4), rng.choice([-1, 1]) * rng.uniform(3, 6)))
            else:
                heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.1)
                delta = np.array([length * np.cos(heading), length * np.sin(heading), rng.uniform(-0.12, 0.12)])
                trajectory.append(line(rng, delta, np.array([0.12, 0.12, 0.03])))
        view = _centred(chain(trajectory, time), [rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25), np.log(depth)])
        objects.append(_random_object(rng, to_world(view), time, radius_m=rng.uniform(0.6, 0.85), spin=0.4))
    return objects


def _walk(rng: np.random.Generator, room: Room, time: np.ndarray) -> tuple[np.ndarray, list[SceneObject]]:
    """A camera that walks through a room with four to six static objects."""
    half = room.size / 2 - [0.5, 0.5, 0.7]
    while True:
        start = np.array([rng.uniform(-0.5, 0.5) * half[0], rng.uniform(-0.9, -0.1) * half[1], rng.uniform(-0.3, 0.3)])
        trajectory = []
        for _ in segments_in(time):
            heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 1.4)
            move = [length * np.cos(heading), length * np.sin(heading), rng.uniform(-0.2, 0.2)]
            turn = np.radians(rng.uniform([-26, -6, -3], [26, 6, 3]))
            trajectory.append(line(rng, np.concatenate([move, turn]), np.array([0.12, 0.12, 0.04, 0.03, 0.02, 0.01])))
        angles = np.radians(rng.uniform([-20, -10, -2], [20, 4, 2]))
        path = chain(trajectory, time) + np.concatenate([start, angles])  # T 6
        if (np.abs(path[:, :3]) <= half).all() and np.abs(path[:, 3]).max() < np.radians(50):
            break
    objects: list[SceneObject] = []
    count = int(rng.integers(4, 7))
    while len(objects) < count:
        radius = rng.uniform(0.35, 0.65)
        position = rng.uniform([-0.95, -0.6, -0.9], [0.95, 0.95, 0.6]) * room.size / 2
        off_camera = np.linalg.norm(path[:, :3] - position, axis=1).min() > 1.2 * radius + 0.6
        apart = all(np.linalg.norm(other.poses[0, :3, 3] - position) > other.radius_m + 0.6 * radius for other in objects)
        if off_camera and apart:
            objects.append(_random_object(rng, position[None].repeat(len(time), 0), time, radius_m=radius, spin=0.0))
    return camera_poses(path[:, :3], *path[:, 3:].T), objects


def _drive(rng: np.random.Generator, room: Room, tan: float, time: np.ndarray) -> tuple[np.ndarray, list[SceneObject]]:
    """A camera that drives down a street with one or two near objects that cross it fast."""
    floor = -room.size[2] / 2
    start = np.array([rng.uniform(-0.6, 0.6), -room.size[1] / 2 + 1, floor + rng.uniform(1.1, 1.5)])
    ahead = rng.uniform(0.4, 1.2)
    trajectory, bend = [], np.array([0.05, 0.1, 0.03, 0.01, 0.01, 0.005])
    for _ in segments_in(time):
        drift, turn = rng.uniform(-0.2, 0.2), np.radians(rng.uniform([-4, -1, -0.5], [4, 1, 0.5]))
        trajectory.append(line(rng, np.array([drift, ahead, 0, *turn]), bend))
    path = chain(trajectory, time) + np.concatenate([start, np.zeros(3)])  # T 6
    objects: list[SceneObject] = []
    count = int(rng.integers(1, 3))
    while len(objects) < count:
        radius, distance = rng.uniform(0.6, 0.95), rng.uniform(2.6, 4.2)
        side = rng.choice([-1, 1])
        first = start + np.array([-side * rng.uniform(0.1, 0.8) * distance * tan, distance, 0])
        first[2] = floor + 0.75 * radius + (rng.uniform(0, 1.2) if rng.uniform() < 0.3 else 0.0)
        speed = np.array([side * rng.uniform(0.8, 2.2), ahead + rng.uniform(-0.8, 1.1), 0])  # metres a segment
        trajectory = [line(rng, speed, np.array([0.25, 0.25, 0.0])) for _ in segments_in(time)]
        position = chain(trajectory, time) + first
        aside = room.size[0] / 2 - radius
        position[:, 0] = np.clip(position[:, 0], -aside, aside)
        gap = np.linalg.norm(position - path[:, :3], axis=1)[time <= 1].min()
        apart = all(np.linalg.norm(other.poses[0, :3, 3] - first) > other.radius_m + radius for other in objects)
        if gap > 1.2 * radius + 0.6 and apart and abs(first[0]) < aside:
            objects.append(_random_object(rng, position, time, radius_m=radius, spin=0.5))
    return camera_poses(path[:, :3], *path[:, 3:].T), objects
