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
    size: tuple[int, int], *, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random rectangle in a picture.

    size: height and width of the picture. area: share of it that the rectangle covers, uniform between the two. aspect:
    the rectangle's width by its height, uniform between the two on a logarithmic scale. Of rectangles that do not fit,
    another is drawn; after TRIES it is the largest in the middle, of all or of the nearest aspect.
    Source: random resized crop of MAE-ST's code.
    """
    picture_height, picture_width = size
    for _ in range(TRIES):
        side = math.sqrt(picture_height * picture_width) * rng.uniform(*area) ** 0.5
        stretch = 1.0 if aspect == (1.0, 1.0) else math.exp(rng.uniform(*np.log(aspect)) / 2)
        height, width = max(round(side / stretch), 1), max(round(side * stretch), 1)
        if height <= picture_height and width <= picture_width:
            top, left = rng.integers((picture_height - height, picture_width - width), endpoint=True).tolist()
            return top, left, height, width
    height = min(picture_height, round(picture_width / aspect[0]))
    width = min(picture_width, round(picture_height * aspect[1]))
    return (picture_height - height) // 2, (picture_width - width) // 2, height, width


def resized_crop(pixels: Tensor, rectangle: tuple[int, int, int, int], *, side: int = 0) -> Tensor:
    """A rectangle of a clip, the same in all its frames, resized: uint8 `T H W C` -> `T side side C`; side 0: its H."""
    (top, left, height, width), side = rectangle, side or pixels.shape[1]
    crop = pixels[:, top : top + height, left : left + width].permute(0, 3, 1, 2).float()  # T C H W
    resized = functional.interpolate(crop, size=(side, side), mode="bilinear")  # not antialiased, as mae_st's
    return resized.round_().to(torch.uint8).permute(0, 2, 3, 1)  # T H W C
