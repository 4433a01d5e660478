"""Clips whose frames can be told by their shade, cameras to go with them, and one way to read a split."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from scaling4d import seeds
from scaling4d.benchmarks.samples import ClipRequest, SkippedItem
from scaling4d.records import Sample, UserError

T, SIDE = 6, 32
CLIP = ClipRequest(frames=T, rate_hz=8.0, side_px=SIDE)
H264 = {"rate_hz": 8.0, "crf": 5, "gop": 4}
INTRINSICS = np.array([[0.9, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]])


def read(benchmark: ModuleType, root: Path, split: str, clip: ClipRequest = CLIP, skipped: list | None = None) -> list[Sample]:
    return list(benchmark.open_split(root, split, clip).part(skipped=skipped))


def refused(expected: str, *split: object) -> None:
    """Reading this split raises an error that matches."""
    with pytest.raises(UserError, match=expected):
        read(*split)


def left_out(*split: object) -> list[tuple[str, bool, str]]:
    """Id, badness and reason of the items without a sample."""
    skipped: list[SkippedItem] = []
    read(*split, skipped=skipped)
    return [(item.id, item.bad, item.why) for item in skipped]


def missing(benchmark: ModuleType, root: Path, split: str) -> str:
    """The message about missing files."""
    return str(benchmark.open_split(root, split, CLIP).missing)


def pictures(frames: int = T, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """uint8 `T H W 3`: grey, and brighter by 8 each frame, so that the number of a frame can be read off."""
    shade = 20 + 8 * np.arange(frames)
    return np.broadcast_to(shade[:, None, None, None], (frames, height, width, 3)).astype(np.uint8)


def numbers(pixels: np.ndarray) -> list[int]:
    return np.rint((pixels.mean((1, 2, 3)) - 20) / 8).astype(int).tolist()


def three_boxes(name: str, frames: int = T) -> Sample:
    """Three objects in 32 x 48 pixels: one in all frames, one in the first three, one from the second on."""
    rng = seeds.numpy_rng(0, "boxes")
    corner = rng.uniform(0.3, 0.5, (3, frames, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.2, (3, frames, 2))], -1).astype(np.float32)
    valid = np.ones((3, frames), bool)
    valid[1, 3:] = valid[2, 0] = False
    return Sample(name, name, pictures(frames, height=32, width=48), {"boxes": boxes}, {"boxes": valid})


def in_square(xy: np.ndarray) -> np.ndarray:
    """In the central square of 32 x 48: points, or corners of boxes."""
    return (xy.reshape(*xy.shape[:-1], -1, 2) * [1.5, 1] - [0.25, 0]).reshape(xy.shape)


def poses(frames: int, *, seed: int = 0) -> np.ndarray:
    rng = seeds.numpy_rng(seed, "poses")
    result = np.tile(np.eye(4), (frames, 1, 1))
    result[:, :3, :3] = np.linalg.qr(rng.normal(size=(frames, 3, 3)))[0]
    result[:, :3, :3] *= np.linalg.det(result[:, :3, :3])[:, None, None]
    result[:, :3, 3] = rng.normal(size=(frames, 3))
    return result
