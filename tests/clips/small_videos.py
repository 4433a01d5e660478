"""Small made-up videos, and the settings that suit them."""

from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d.clips.inspection import Inspection, hash_sources, inspect_video
from scaling4d.clips.settings import CurationConfig, WorkersConfig
from scaling4d.clips.sources import SourceFile

SETTINGS = {"frames": 16, "max_frames": 16, "rate_hz": 8.0, "side_px": 32, "encode": True, "listed": "", "crf": 12}
SETTINGS |= {"hash_bits": 24, "val_share": 0.3, "cut_at_shots": True}
SETTINGS |= {"shard_bytes": 20_000}
WORKERS = WorkersConfig(processes=2, cluster="")


def world(seed: int, frames: int, height: int = 64, width: int = 80) -> np.ndarray:
    """uint8 T H W 3: coloured waves that drift, and a square that moves over them."""
    draw = np.random.default_rng(seed)
    y, x, t = np.meshgrid(np.arange(height) / height, np.arange(width) / width, np.arange(frames), indexing="ij")
    phase, pitch, speed = draw.uniform(0, 6, (3, 3)), draw.normal(0, 6, (3, 2)), draw.normal(0, 0.06, 3)
    waves = [np.sin(pitch[i, 0] * y + pitch[i, 1] * x + speed[i] * t) for i in range(3)]
    base = draw.uniform(70, 180, 3)
    picture = np.stack([base[c] + 20 * sum(np.cos(phase[i, c]) * waves[i] for i in range(3)) for c in range(3)], -1)  # H W T 3
    left, top, right, down = *draw.uniform(0.1, 0.6, 2), *draw.normal(0, 0.01, 2)
    inside = (abs(x - (left + right * t) % 1) < 0.12) & (abs(y - (top + down * t) % 1) < 0.15)
    picture[inside] = draw.uniform(0, 255, 3)
    return np.clip(picture, 0, 255).astype(np.uint8).transpose(2, 0, 1, 3)


def save(path: Path, pixels: np.ndarray, rate_hz: float = 16, crf: int = 18, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    video.encode(path, pixels, rate_hz=rate_hz, crf=crf, gop=12, **more)
    return path


def inspect(videos: Path, source: SourceFile, config: CurationConfig) -> Inspection:
    """The inspection of a readable source with its own hash."""
    (sha256,) = hash_sources(videos, [source])
    return inspect_video(videos, source, sha256, config)
