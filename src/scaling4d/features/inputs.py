"""FILE -> CLIPS: a video's first clip, or an array of clips or other numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scaling4d.encoders.arrays import DAMAGE, read_header
from scaling4d.features.windows import WindowSettings, read_windows
from scaling4d.records import UserError
from scaling4d.video import VideoError


def read_clips(path: Path) -> Tensor:
    """A `.npy` of clips `B T H W 3`, uint8 or float in 0..1 -> the same, uint8 or float32.

    Raises UserError: not clips, or values outside 0..1.
    """
    pixels = read_array(path, axes=5)
    if pixels.shape[-1] != 3 or not pixels.size or pixels.dtype not in (np.uint8, np.float16, np.float32, np.float64):
        raise UserError(f"{path} is {pixels.dtype} {pixels.shape}; needed B T H W 3, float in 0..1 or uint8")
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # also refuses nan
            raise UserError(f"{path}: values from {pixels.min()} to {pixels.max()}; needed floats in 0..1, or uint8")
    return torch.from_numpy(pixels)


def first_clip(source: Path, settings: WindowSettings) -> Tensor:
    """The first window of a video, uint8 `1 T H W 3`. Raises UserError: a video that is damaged or too short."""
    if not source.is_file():
        raise UserError(f"no file {source}")
    try:
        for window in read_windows(source, settings):
            return window.pixels[None]
    except VideoError as error:
        raise UserError(f"{source}: {error}") from error
    raise UserError(f"{source} is too short; needed {settings.clip[0]} frames at {settings.rate_hz:g} Hz")


def read_array(path: Path, *, axes: int) -> np.ndarray:
    """A `.npy` of numbers. Raises UserError: not a `.npy`, Python objects, not numbers, or another number of axes."""
    try:
        with path.open("rb") as file:
            shape, dtype = read_header(file)
            size = path.stat().st_size - file.tell()
        if dtype.kind not in "uif":
            raise ValueError(f"it holds {dtype}")
        if any(axis < 0 for axis in shape) or size != dtype.itemsize * math.prod(shape):
            raise ValueError(f"it has {size} bytes; needed those of {dtype} {shape}")
        array = np.load(path, allow_pickle=False)
    except DAMAGE as error:
        raise UserError(f"{path} is not a .npy of numbers: {error}") from error
    if array.ndim != axes:
        raise UserError(f"{path} holds {dtype} numbers {shape}; needed numbers in {axes} axes")
    return array
