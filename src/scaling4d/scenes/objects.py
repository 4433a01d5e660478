"""The content of a scene: triangle meshes, solid textures, rigid objects that carry both, and the room."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

SHAPES = ("ball", "box", "cylinder", "torus", "capsule", "cone")
PATTERNS = ("checker", "stripes", "blobs", "waves")


@cache
def mesh(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """A shape about the origin with a bounding radius of 1: vertices `V 3` float64, faces `F 3` int32."""
    import trimesh  # 0.8 s, which `compose` does without

    made = {
        "ball": lambda: trimesh.creation.icosphere(subdivisions=2),
        "box": lambda: trimesh.creation.box((1.2, 1.0, 0.8)),
        "cylinder": lambda: trimesh.creation.cylinder(radius=0.6, height=1.3, sections=24),
        "torus": lambda: trimesh.creation.torus(major_radius=0.7, minor_radius=0.3, major_sections=24, minor_sections=10),
        "capsule": lambda: trimesh.creation.capsule(radius=0.45, height=1.0, count=(12, 12)),
        "cone": lambda: trimesh.creation.cone(radius=0.7, height=1.4, sections=24),
    }[shape]()
    vertices = np.asarray(made.vertices, np.float64)
    vertices = vertices - (vertices.min(0) + vertices.max(0)) / 2
    return vertices / np.linalg.norm(vertices, axis=1).max(), np.asarray(made.faces, np.int32)


@dataclass(frozen=True)
class Texture:
    """Solid texture: colour as a function of the 3-D position, so it needs no unwrapping and moves with its object.

    colors: `n 3` in 0..1. per_m: pattern periods a metre. axis: unit `3`. phase: `3` and centres: `m 3`, in periods.
    """

    pattern: str
    colors: np.ndarray
    per_m: float
    axis: np.ndarray
    phase: np.ndarray
    centres: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, *, per_m: float, pattern: str, contrast: float, saturation: float) -> Texture:
        """A random texture. contrast: 0 to 1; 0 gives all colours their mean. saturation: 0 to 1; 0 gives greys."""
        axis = rng.normal(size=3)
        colors = _palette(rng, 6)
        colors = contrast * colors + (1 - contrast) * colors.mean(0)
        grey = colors.mean(1, keepdims=True)
        return cls(
            pattern=pattern,
            colors=grey + saturation * (colors - grey),
            per_m=per_m,
            axis=axis / np.linalg.norm(axis),
            phase=rng.uniform(0, 1, 3),
            centres=rng.uniform(0, 3, (10, 3)),
        )

    def color(self, positions: np.ndarray) -> np.ndarray:
        """Colour `R 3` in 0..1 at positions `R 3`, metres in the object's own frame."""
        dtype = positions.dtype
        colors, p = self.colors.astype(dtype), positions * dtype.type(self.per_m) + self.phase.astype(dtype)
        if self.pattern == "checker":
            return colors[np.floor(p).sum(-1).astype(np.int64) % 2]
        if self.pattern == "stripes":
            return colors[np.floor(2 * (p @ self.axis.astype(dtype))).astype(np.int64) % 3]
        if self.pattern == "blobs":  # Voronoi cells of random centres, repeated every 3 periods
            return colors[_nearest(p % 3, self.centres.astype(dtype)) % len(colors)]
        angle = dtype.type(2 * np.pi) * p  # waves: a smooth mixture of three colours
        weights = 1 + np.sin(angle + np.sin(angle[:, [2, 0, 1]]))
        return (weights / (weights.sum(-1, keepdims=True) + 1e-9)) @ colors[:3]


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index `R` of the centre nearest to each point `R 3`, in a cube of side 3 that repeats itself."""
    nearest, least = np.zeros(len(points), np.int64), np.full(len(points), np.inf, points.dtype)
    for index, centre in enumerate(centres):
        offset = np.abs(points - centre)
        offset = np.minimum(offset, 3 - offset)
        squared = np.einsum("rd,rd->r", offset, offset)
        nearer = squared < least
        nearest[nearer], least = index, np.minimum(squared, least)
    return nearest


def _palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random colours, `count 3`. Neighbours differ in hue, and light and dark alternate."""
    hue = (rng.uniform() + np.arange(count) * 0.382 + rng.uniform(-0.08, 0.08, count)) % 1
    saturation = rng.uniform(0.3, 0.9, count)
    value = np.where(np.arange(count) % 2 == 0, rng.uniform(0.75, 1.0, count), rng.uniform(0.25, 0.6, count))
    k = (np.array([5, 3, 1]) + hue[:, None] * 6) % 6
    return value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))


@dataclass(frozen=True)
class SceneObject:
    """A rigid textured mesh. scale: `3` metres, applied to the mesh. poses: `T 4 4`, object to world."""

    shape: str
    scale: np.ndarray
    texture: Texture
    poses: np.ndarray

    @property
    def vertices(self) -> np.ndarray:
        """`V 3` metres, in the object's own frame."""
        return mesh(self.shape)[0] * self.scale

    @property
    def radius_m(self) -> float:
        return float(np.linalg.norm(self.vertices, axis=1).max())


@dataclass(frozen=True)
class Room:
    """A box seen from inside, centred on the origin. size: `3` metres. tints: `6 3`, of the walls -x +x -y +y -z +z."""

    size: np.ndarray
    texture: Texture
    tints: np.ndarray

    def color(self, positions: np.ndarray, walls: np.ndarray) -> np.ndarray:
        """Colour `R 3` in 0..1 at positions `R 3` on the walls `R`, indices into tints."""
        return self.texture.color(positions) * self.tints[walls]
