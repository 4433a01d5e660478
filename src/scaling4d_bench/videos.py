"""Made-up videos to measure with: a camera pans over a textured world of moving objects, and adds its noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scaling4d import config, seeds, video
from scaling4d.clips import curate
from scaling4d.clips.settings import CurationConfig, WorkersConfig
from scaling4d_bench import measure

RATE_HZ = 25.0
CRF = 23  # x264's own default
NOISE_LEVEL = 2.0  # standard deviation, of 255
OBJECTS = 5
GOP = 250  # x264's own default


def render(seed: int, *, frames: int, height_px: int, width_px: int) -> np.ndarray:
    """uint8 T H W 3; the same seed, the same video."""
    rng = seeds.numpy_rng(seed, "bench video", height_px, width_px)
    world = _texture(rng, 2 * height_px, 2 * width_px)
    objects = [_texture(rng, height_px // 4, width_px // 4) for _ in range(OBJECTS)]
    noise = rng.normal(0, NOISE_LEVEL, (3, height_px, width_px, 3)).round().astype(np.int16)
    (phase_y, phase_x), turns = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.5, 1.5, 2)
    starts, velocities = rng.uniform(0, 1, (OBJECTS, 2)), rng.normal(0, 0.012, (OBJECTS, 2))
    out = np.empty((frames, height_px, width_px, 3), np.uint8)
    for t in range(frames):
        top = round(height_px * (0.5 + 0.5 * np.sin(phase_y + turns[0] * t / RATE_HZ)))
        left = round(width_px * (0.5 + 0.5 * np.sin(phase_x + turns[1] * t / RATE_HZ)))
        frame = world[top : top + height_px, left : left + width_px].copy()
        for texture, start, velocity in zip(objects, starts, velocities, strict=True):
            y, x = (abs((start + velocity * t) % 2 - 1) * (1 - 0.25) * (height_px, width_px)).astype(int)
            frame[y : y + texture.shape[0], x : x + texture.shape[1]] = texture
        grain = np.roll(noise[t % 3], tuple(rng.integers(0, (height_px, width_px))), (0, 1))
        out[t] = np.clip(frame + grain, 0, 255)
    return out


def _texture(rng: np.random.Generator, height_px: int, width_px: int) -> np.ndarray:
    """int16 H W 3: noise of every size, coarse strong and fine weak, as in most pictures."""
    total = np.full((height_px, width_px, 3), rng.uniform(80, 176, 3))
    for cells, level in ((3, 40), (8, 25), (20, 20), (60, 15), (180, 8)):
        grey = rng.normal(0, level, (cells, 2 * cells, 1))
        small = (grey + rng.normal(0, level / 3, (cells, 2 * cells, 3))).astype(np.float32)
        layers = [Image.fromarray(np.ascontiguousarray(small[..., c])) for c in range(3)]
        total += np.stack([np.asarray(layer.resize((width_px, height_px), Image.Resampling.BICUBIC)) for layer in layers], -1)
    return np.clip(total, 0, 255).astype(np.int16)


def write(path: Path, seed: int, *, seconds: float, size_px: tuple[int, int], gop: int = GOP) -> Path:
    """Encode one: H.264, preset medium with its B-frames, 25 Hz. size_px: height, width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = render(seed, frames=round(seconds * RATE_HZ), height_px=size_px[0], width_px=size_px[1])
    video.encode(path, pixels, rate_hz=RATE_HZ, crf=CRF, gop=gop)
    return path


def curation(**changes: Any) -> CurationConfig:
    """The curation of profile paper with changed settings."""
    return CurationConfig(**config.section(config.compose(["profile=paper"]), "clips.Curation") | changes)


def workers() -> WorkersConfig:
    """One process for each core."""
    return WorkersConfig(processes=measure.cores(), cluster="")


def curated(
    folder: Path, *, files: int, seconds: float, size_px: tuple[int, int], encode: bool = True, max_frames: int | None = None
) -> Path:
    """Write videos below a folder, unless they are there, and curate them into clips of the paper's size, or longer."""
    sources, clips = folder / "videos", folder / f"{'encoded' if encode else 'sources'}{max_frames or ''}"
    longer = {"max_frames": max_frames} if max_frames else {}
    for number in range(0 if sources.is_dir() else files):
        write(sources / f"{number}.mp4", measure.SEED + number, seconds=seconds, size_px=size_px)
    clips.mkdir()
    curate.curate(sources, clips, curation(encode=encode, **longer), workers())
    return clips
