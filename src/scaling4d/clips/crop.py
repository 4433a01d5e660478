"""Random resized crop of clips, for pretraining and fine-tuning."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

TRIES = 10  # of a crop that fits into the picture: mae_st's


def check_crop(area: tuple[float, float], aspect: tuple[float, float]) -> None:
    """Raises ValueError: `area` or `aspect` of `draw_rectangle` out of range."""
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"crop = {list(area)}; needed 0 < smallest <= largest <= 1")
    if not 0 < aspect[0] <= aspect[1]:
        raise ValueError(f"aspect = {list(aspect)}; needed 0 < smallest <= largest")


def draw_rectangle(
    side: int, *, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random rectangle in a square picture.

    area: share of the picture that the rectangle covers, uniform between the two. aspect: its width by its height,
    uniform between the two on a logarithmic scale. Of rectangles that do not fit, another is drawn; at last everything.
    Source: random resized crop of MAE-ST's code (there of the whole picture, not of the square in its middle).
    """
    for _ in range(TRIES):
        size = side * rng.uniform(*area) ** 0.5
        stretch = 1.0 if aspect == (1.0, 1.0) else math.exp(rng.uniform(*np.log(aspect)) / 2)
        height, width = max(round(size / stretch), 1), max(round(size * stretch), 1)
        if max(height, width) <= side:
            break
    else:
        height = width = side
    top, left = rng.integers((side - height, side - width), endpoint=True).tolist()
    return top, left, height, width


def resized_crop(pixels: Tensor, rectangle: tuple[int, int, int, int]) -> Tensor:
    """A rectangle of a clip, the same in all its frames, resized to the clip's own side: uint8 `T H W C`, H = W."""
    (top, left, height, width), side = rectangle, pixels.shape[1]
    crop = pixels[:, top : top + height, left : left + width].permute(0, 3, 1, 2).float()  # T C H W
    resized = functional.interpolate(crop, size=(side, side), mode="bilinear")  # never smaller: no antialiasing
    return resized.round_().to(torch.uint8).permute(0, 2, 3, 1)  # T H W C
