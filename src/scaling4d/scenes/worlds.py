"""SEED -> WORLD: a textured room, things on their paths and a camera on its own, of one of five kinds.

World frame: metres, z up, the room centred on the origin. Camera frame: x right, y down, z forward (OpenCV).
A *leg* is the motion of one clip, 16 frames; a longer world strings legs together, so speed never depends on length.
View coordinates of a thing: x y in half shorter sides of the picture from its centre (y down), and the log of metres of depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scaling4d.scenes.things import PATTERNS, SHAPES, Room, Texture, Thing

KINDS = ("action", "room", "walk", "track", "drive")
LEG = 16  # frames
HALL = ((6.5, 6.5, 4.5), (8.0, 8.0, 5.5))
SPACES = {
    "action": HALL,
    "track": HALL,
    "room": ((5.5, 6.5, 2.9), (7.0, 8.0, 3.4)),
    "drive": ((8.0, 28.0, 4.0), (10.0, 30.0, 5.0)),
}
VIEW = np.array([[-0.8, -0.8, np.log(1.7)], [0.8, 0.8, np.log(3.4)]])  # where the hero moves, in view coordinates

# Eight motions in four pairs; the members of a pair are each other run backwards, so a frame of unknown time cannot tell
# them apart, and as they happen anywhere in view, neither can the first frame well.
# The wording follows Something-Something's templates; the set is our own.
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

Leg = Callable[[np.ndarray], np.ndarray]  # progress `n` in 0..1 -> offsets from the start `n d`


@dataclass(frozen=True)
class World:
    """Everything that is needed to draw it.

    intrinsics: `3 3`, in units of the picture's width and height, corner at (0, 0). camera_to_world: `T 4 4`. lamp: `3` metres.
    motion: index into MOTIONS of what things[0] does, or -1.
    """

    kind: str
    height_px: int
    width_px: int
    intrinsics: np.ndarray
    camera_to_world: np.ndarray
    room: Room
    things: tuple[Thing, ...]
    lamp: np.ndarray
    ambient: float
    motion: int

    @property
    def frames(self) -> int:
        return len(self.camera_to_world)


def draw(
    rng: np.random.Generator,
    kind: str,
    *,
    frames: int,
    height_px: int,
    width_px: int,
    contrast: float,
    motion: int | None = None,
) -> World:
    """Draw a world.

    contrast: of the room's pattern, 0 to 1. motion: for kind `action` in one leg, the class of the hero's motion; None draws one.
    """
    legs = -(-(frames - 1) // (LEG - 1))
    s = np.arange(frames) / (LEG - 1)  # in legs
    tan = np.tan(np.radians(rng.uniform(56, 64)) / 2)
    shorter = min(height_px, width_px)
    intrinsics = np.array([[shorter / width_px / tan / 2, 0, 0.5], [0, shorter / height_px / tan / 2, 0.5], [0, 0, 1]])
    room = _room(rng, *SPACES.get(kind, SPACES["room"]), contrast=contrast)
    if kind == "action":
        motion = int(rng.integers(len(MOTIONS))) if motion is None else motion
        camera, base = _handheld(rng, room, s)
        things = (_hero(rng, base, tan, s, legs, motion), *_bystanders(rng, base, tan, s, legs))
    elif kind == "track":
        camera, base = _handheld(rng, room, s)
        things = _wanderers(rng, base, tan, s, legs)
    elif kind == "drive":
        camera, things = _street(rng, room, tan, s, legs)
    else:
        camera, things = _walk(rng, room, s, legs)
    return World(
        kind=kind,
        height_px=height_px,
        width_px=width_px,
        intrinsics=intrinsics,
        camera_to_world=camera,
        room=room,
        things=things,
        lamp=rng.uniform([-0.35, -0.4, 0.3], [0.35, 0.1, 0.45]) * room.size,
        ambient=rng.uniform(0.45, 0.6),
        motion=motion if kind == "action" else -1,
    )


def poses(position: np.ndarray, yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Camera to world `T 4 4` from position `T 3` and angles in radians `T`: yaw 0 looks along +y and grows to the right (+x),
    pitch grows upwards, roll turns the camera clockwise."""
    zero = np.zeros_like(yaw)
    forward = np.stack([np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), np.sin(pitch)], -1)
    level = np.stack([np.cos(yaw), -np.sin(yaw), zero], -1)
    down = np.cross(forward, level)
    right = np.cos(roll)[:, None] * level + np.sin(roll)[:, None] * down
    result = np.tile(np.eye(4), (len(yaw), 1, 1))
    result[:, :3, :3] = np.stack([right, np.cross(forward, right), forward], -1)
    result[:, :3, 3] = position
    return result


# ---------------------------------------------------------------- paths


def _pace(rng: np.random.Generator) -> Leg:
    """Progress that speeds up or slows down, from 0 to 1. Run backwards it is as likely as forwards."""
    middle, lean = rng.uniform(-0.5, 0.5), rng.uniform(-0.45, 0.45)
    return lambda u: u + middle * np.sin(2 * np.pi * u) / (2 * np.pi) + lean * u * (1 - u)


def line(rng: np.random.Generator, delta: np.ndarray, bend: np.ndarray) -> Leg:
    """By delta, with a detour of up to bend on the way."""
    pace, detour = _pace(rng), rng.uniform(-1, 1, len(bend)) * bend
    return lambda u: np.outer(pace(u), delta) + np.outer(np.sin(np.pi * u), detour)


def circle(rng: np.random.Generator, radius: float, sweep: float) -> Leg:
    """About a centre in the x y of the view; positive sweeps (radians) are clockwise as y points down."""
    pace, start = _pace(rng), rng.uniform(0, 2 * np.pi)

    def offsets(u: np.ndarray) -> np.ndarray:
        angle = start + sweep * pace(u)
        return np.stack(
            [radius * (np.cos(angle) - np.cos(start)), radius * (np.sin(angle) - np.sin(start)), np.zeros_like(angle)], -1
        )

    return offsets


def string(legs: list[Leg], s: np.ndarray) -> np.ndarray:
    """`T d` offsets from the start, one leg after the other; s: `T`, in legs."""
    result, base = [], 0.0
    for k, leg in enumerate(legs):
        inside = (s >= k) & ((s < k + 1) | (k == len(legs) - 1))
        result.append(base + leg(s[inside] - k))
        base = base + leg(np.ones(1))[0]
    return np.concatenate(result)


def motion_leg(rng: np.random.Generator, motion: int) -> Leg:
    """A leg in view coordinates of one of the MOTIONS. Backwards, it has the distribution of its pair's other member."""
    pair, sign = motion // 2, 1 if motion % 2 == 0 else -1
    aside = rng.uniform(-0.1, 0.1, 3)
    if pair == 3:
        return circle(rng, rng.uniform(0.3, 0.45), sign * np.radians(rng.uniform(270, 400)))
    size = rng.uniform(0.65, 1.0) if pair < 2 else rng.uniform(0.5, 0.75)
    aside[pair] = sign * size * (1, -1, -1)[pair]  # rightwards; upwards is -y; towards the camera is less depth
    return line(rng, aside, np.array([0.1, 0.1, 0.06]))


def _in_view(rng: np.random.Generator, legs: list[Leg], s: np.ndarray, *, middle: np.ndarray) -> np.ndarray:
    """`T 3` view coordinates: the legs in a row, shifted so that the middle of their extent is at `middle`."""
    offsets = string(legs, s)
    return offsets - (offsets.min(0) + offsets.max(0)) / 2 + middle


def _thing(rng: np.random.Generator, position: np.ndarray, s: np.ndarray, *, radius_m: float, spin: float) -> Thing:
    """A random thing along position `T 3`, turning at up to `spin` radians a leg about a random axis."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    axis = rng.normal(size=3)
    start, rate = _rotation(rng.normal(size=3), rng.uniform(0, 2 * np.pi)), rng.uniform(-spin, spin)
    turned = np.tile(np.eye(4), (len(s), 1, 1))
    turned[:, :3, :3] = np.stack([_rotation(axis, rate * x) @ start for x in s])
    turned[:, :3, 3] = position
    texture = Texture.draw(
        rng, pattern=PATTERNS[rng.integers(len(PATTERNS))], per_m=rng.uniform(0.55, 0.95) / radius_m, contrast=1.0, saturation=1.0
    )
    return Thing(shape=shape, scale=radius_m * rng.uniform(0.8, 1.15, 3), texture=texture, poses=turned)


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """`3 3` by Rodrigues' formula."""
    x, y, z = axis / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def _to_world(base: np.ndarray, tan: float, view: np.ndarray) -> np.ndarray:
    """View coordinates `T 3` about the camera pose `4 4` -> world `T 3`."""
    z = np.exp(view[:, 2])
    in_camera = np.stack([view[:, 0] * z * tan, view[:, 1] * z * tan, z], -1)
    return in_camera @ base[:3, :3].T + base[:3, 3]


# ---------------------------------------------------------------- the five kinds


def _room(rng: np.random.Generator, low: tuple, high: tuple, *, contrast: float) -> Room:
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    per_m = rng.uniform(0.5, 1.1) * 3 / low[2]
    tints = rng.uniform(0.8, 1.0, (6, 3))
    texture = Texture.draw(rng, pattern=pattern, per_m=per_m, contrast=contrast, saturation=0.5)
    return Room(size=rng.uniform(low, high), texture=texture, tints=tints)


def _handheld(rng: np.random.Generator, room: Room, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A camera that someone tries to hold still near one wall, looking at the other: its poses and their centre `4 4`."""
    where = np.array([rng.uniform(-0.5, 0.5), -room.size[1] / 2 + rng.uniform(0.4, 0.8), rng.uniform(-0.2, 0.2)])
    aim = np.radians([rng.uniform(-8, 8), rng.uniform(-4, 4), 0])
    rate, phase = rng.uniform(0.5, 1.6, (6, 1)), rng.uniform(0, 2 * np.pi, (6, 1))
    amplitude = np.concatenate([np.full(3, 0.025), np.radians([0.8, 0.8, 0.5])])[:, None]
    sway = amplitude * np.sin(2 * np.pi * rate * s + phase)
    still = poses(where[None], *(aim[:, None]))[0]
    return poses(where + sway[:3].T, *(aim[:, None] + sway[3:])), still


def _hero(rng: np.random.Generator, base: np.ndarray, tan: float, s: np.ndarray, legs: int, motion: int) -> Thing:
    """The thing whose motion is the label. Over several legs it strings other motions after the first.

    It is animated "on twos": every pose is held for two frames, so that the two frames of a token do not tell the motion.
    """
    motions = [motion, *(int(m) for m in rng.permutation(len(MOTIONS))[: legs - 1])]
    path = [motion_leg(rng, m) for m in motions]
    on_twos = (np.arange(len(s)) // 2 * 2 + 0.5) / (LEG - 1)
    offsets = string(path, on_twos)
    low, high = VIEW[0] - offsets.min(0), VIEW[1] - offsets.max(0)  # starts that stay within VIEW all the way
    view = offsets + rng.uniform(np.minimum(low, high), np.maximum(low, high))
    view[:, 2] = np.clip(view[:, 2], np.log(1.4), np.log(4.6))
    return _thing(rng, _to_world(base, tan, view), on_twos, radius_m=rng.uniform(0.6, 0.9), spin=0.8)


def _bystanders(rng: np.random.Generator, base: np.ndarray, tan: float, s: np.ndarray, legs: int) -> list[Thing]:
    """At most one thing, which stays about where it is."""
    things = []
    for _ in range(rng.integers(0, 2)):
        still = rng.uniform() < 0.5
        path = [line(rng, rng.uniform(-0.12, 0.12, 3) * (not still), np.full(3, 0.05) * (not still)) for _ in range(legs)]
        middle = np.array([rng.uniform(-0.9, 0.9), rng.uniform(-0.8, 0.8), np.log(rng.uniform(3.2, 5.0))])
        view = _in_view(rng, path, s, middle=middle)
        things.append(_thing(rng, _to_world(base, tan, view), s, radius_m=rng.uniform(0.3, 0.55), spin=0.0 if still else 0.7))
    return things


def _wanderers(rng: np.random.Generator, base: np.ndarray, tan: float, s: np.ndarray, legs: int) -> tuple[Thing, ...]:
    """Two or three things on curved paths at different depths, which hide each other, and one that stays."""
    count = int(rng.integers(2, 4))
    depths = np.sort(rng.uniform(1.9, 3.0, count) + np.linspace(0, 1.4, count))
    things = []
    for depth in depths:
        path = []
        for _ in range(legs):
            if rng.uniform() < 0.3:
                path.append(circle(rng, rng.uniform(0.1, 0.2), rng.choice([-1, 1]) * rng.uniform(3, 6)))
            else:
                heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.6)
                delta = np.array([length * np.cos(heading), length * np.sin(heading), rng.uniform(-0.12, 0.12)])
                path.append(line(rng, delta, np.array([0.12, 0.12, 0.03])))
        view = _in_view(rng, path, s, middle=np.array([rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4), np.log(depth)]))
        things.append(_thing(rng, _to_world(base, tan, view), s, radius_m=rng.uniform(0.55, 0.8), spin=0.6))
    stay = np.array([[rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8), np.log(4.6)]]).repeat(len(s), 0)
    things.append(_thing(rng, _to_world(base, tan, stay), s, radius_m=rng.uniform(0.4, 0.6), spin=0.0))
    return tuple(things)


def _walk(rng: np.random.Generator, room: Room, s: np.ndarray, legs: int) -> tuple[np.ndarray, tuple[Thing, ...]]:
    """A camera that walks through a room in which nothing else moves."""
    half = room.size / 2 - [0.5, 0.5, 0.7]
    while True:
        start = np.array([rng.uniform(-0.5, 0.5) * half[0], rng.uniform(-0.9, -0.1) * half[1], rng.uniform(-0.3, 0.3)])
        path = []
        for _ in range(legs):
            heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 1.4)
            move = [length * np.cos(heading), length * np.sin(heading), rng.uniform(-0.2, 0.2)]
            turn = np.radians(rng.uniform([-26, -6, -3], [26, 6, 3]))
            path.append(line(rng, np.concatenate([move, turn]), np.array([0.12, 0.12, 0.04, 0.03, 0.02, 0.01])))
        aim = np.radians(rng.uniform([-20, -10, -2], [20, 4, 2]))
        steps = string(path, s) + np.concatenate([start, aim])
        if (np.abs(steps[:, :3]) <= half).all() and np.abs(steps[:, 3]).max() < np.radians(50):
            break
    camera = poses(steps[:, :3], *steps[:, 3:].T)
    things: list[Thing] = []
    wanted = int(rng.integers(4, 7))
    while len(things) < wanted:
        radius = rng.uniform(0.35, 0.65)
        where = rng.uniform([-0.95, -0.6, -0.9], [0.95, 0.95, 0.6]) * room.size / 2
        clear = np.linalg.norm(camera[:, :3, 3] - where, axis=1).min() > 1.2 * radius + 0.6
        apart = all(np.linalg.norm(t.poses[0, :3, 3] - where) > t.radius_m + 0.6 * radius for t in things)
        if clear and apart:
            things.append(_thing(rng, where[None].repeat(len(s), 0), s, radius_m=radius, spin=0.0))
    return camera, tuple(things)


def _street(rng: np.random.Generator, room: Room, tan: float, s: np.ndarray, legs: int) -> tuple[np.ndarray, tuple[Thing, ...]]:
    """A camera that drives down a street on which two to four things also move."""
    floor = -room.size[2] / 2
    start = np.array([rng.uniform(-0.6, 0.6), -room.size[1] / 2 + 1, floor + rng.uniform(1.1, 1.5)])
    ahead = rng.uniform(0.4, 1.2)
    path = [
        line(
            rng,
            np.array([rng.uniform(-0.2, 0.2), ahead, 0, *np.radians(rng.uniform([-4, -1, -0.5], [4, 1, 0.5]))]),
            np.array([0.05, 0.1, 0.03, 0.01, 0.01, 0.005]),
        )
        for _ in range(legs)
    ]
    steps = string(path, s) + np.concatenate([start, np.zeros(3)])
    camera = poses(steps[:, :3], *steps[:, 3:].T)
    things: list[Thing] = []
    wanted = int(rng.integers(2, 5))
    while len(things) < wanted:
        radius, distance = rng.uniform(0.6, 0.95), rng.uniform(3.2, 7.0)
        aside = rng.uniform(-0.8, 0.8) * distance * tan
        where = start + np.array([aside, distance, 0])
        where[2] = floor + 0.75 * radius + (rng.uniform(0, 1.2) if rng.uniform() < 0.3 else 0.0)
        speed = np.array([rng.uniform(-0.9, 0.9), ahead + rng.uniform(-0.8, 1.1), 0])
        moving = rng.uniform() < 0.8
        legs_of = [line(rng, speed * moving, np.array([0.25, 0.25, 0.0]) * moving) for _ in range(legs)]
        position = string(legs_of, s) + where
        position[:, 0] = np.clip(position[:, 0], -room.size[0] / 2 + radius, room.size[0] / 2 - radius)
        clear = np.linalg.norm(position[:LEG] - steps[:LEG, :3], axis=1).min() > 1.2 * radius + 1.0
        apart = all(np.linalg.norm(t.poses[0, :3, 3] - where) > t.radius_m + radius for t in things)
        if clear and apart and abs(where[0]) < room.size[0] / 2 - radius:
            things.append(_thing(rng, position, s, radius_m=radius, spin=0.5))
    return camera, tuple(things)
