"""Clips whose frames can be told by their shade, and cameras to go with them."""

import numpy as np

from scaling4d import seeds

T, SIDE = 6, 32
CLIP = {"frames": T, "rate_hz": 8.0, "side_px": SIDE}
H264 = {"rate_hz": 8.0, "crf": 5, "gop": 4}


def pictures(frames: int = T, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """uint8 `T H W 3`: grey, and brighter by 8 each frame, so that the number of a frame can be read off."""
    shade = 20 + 8 * np.arange(frames)
    return np.broadcast_to(shade[:, None, None, None], (frames, height, width, 3)).astype(np.uint8)


def numbers(pixels: np.ndarray) -> list[int]:
    return np.rint((pixels.mean((1, 2, 3)) - 20) / 8).astype(int).tolist()


def poses(frames: int, *, seed: int = 0) -> np.ndarray:
    rng = seeds.numpy(seed, "poses")
    result = np.tile(np.eye(4), (frames, 1, 1))
    result[:, :3, :3] = np.linalg.qr(rng.normal(size=(frames, 3, 3)))[0]
    result[:, :3, :3] *= np.linalg.det(result[:, :3, :3])[:, None, None]
    result[:, :3, 3] = rng.normal(size=(frames, 3))
    return result


INTRINSICS = np.array([[0.9, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]])
