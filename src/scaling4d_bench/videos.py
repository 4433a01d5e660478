"""Made-up videos to measure with: a camera pans over a textured world in which things move, and adds its noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scaling4d import seeds, video

RATE_HZ = 25.0
CRF = 23  # x264's own default
NOISE_LEVEL = 2.0  # standard deviation, of 255
THINGS = 5


def pictures(seed: int, *, frames: int, height_px: int, width_px: int) -> np.ndarray:
    """uint8 T H W 3; the same seed, the same pictures."""
    rng = seeds.numpy(seed, "bench video", height_px, width_px)
    world = _texture(rng, 2 * height_px, 2 * width_px)
    things = [_texture(rng, height_px // 4, width_px // 4) for _ in range(THINGS)]
    noise = rng.normal(0, NOISE_LEVEL, (3, height_px, width_px, 3)).round().astype(np.int16)
    (py, px), turns = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.5, 1.5, 2)
    starts, ways = rng.uniform(0, 1, (THINGS, 2)), rng.normal(0, 0.012, (THINGS, 2))
    out = np.empty((frames, height_px, width_px, 3), np.uint8)
    for t in range(frames):
        top = round(height_px * (0.5 + 0.5 * np.sin(py + turns[0] * t / RATE_HZ)))
        left = round(width_px * (0.5 + 0.5 * np.sin(px + turns[1] * t / RATE_HZ)))
        picture = world[top : top + height_px, left : left + width_px].copy()
        for thing, start, way in zip(things, starts, ways, strict=True):
            y, x = (abs((start + way * t) % 2 - 1) * (1 - 0.25) * (height_px, width_px)).astype(int)
            picture[y : y + thing.shape[0], x : x + thing.shape[1]] = thing
        grain = np.roll(noise[t % 3], tuple(rng.integers(0, (height_px, width_px))), (0, 1))
        out[t] = np.clip(picture + grain, 0, 255)
    return out


def make(path: Path, seed: int, *, seconds: float, height_px: int, width_px: int, gop: int) -> Path:
    """Encode one: H.264, preset medium with its B-frames, 25 Hz."""
    found = pictures(seed, frames=round(seconds * RATE_HZ), height_px=height_px, width_px=width_px)
    video.write(path, found, rate_hz=RATE_HZ, codec="libx264", crf=CRF, gop=gop)
    return path


def _texture(rng: np.random.Generator, height_px: int, width_px: int) -> np.ndarray:
    """int16 H W 3: noise of every size, coarse strong and fine weak, as in most pictures."""
    from PIL import Image

    total = np.full((height_px, width_px, 3), rng.uniform(80, 176, 3))
    for cells, level in ((3, 40), (8, 25), (20, 20), (60, 15), (180, 8)):
        grey = rng.normal(0, level, (cells, 2 * cells, 1))
        small = (grey + rng.normal(0, level / 3, (cells, 2 * cells, 3))).astype(np.float32)
        layers = [Image.fromarray(np.ascontiguousarray(small[..., c])) for c in range(3)]
        total += np.stack([np.asarray(layer.resize((width_px, height_px), Image.Resampling.BICUBIC)) for layer in layers], -1)
    return np.clip(total, 0, 255).astype(np.int16)
