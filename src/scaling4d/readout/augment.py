"""Augmentation of labelled clips for MAE-ST's fine-tuning: RandAugment, random resized crop, random erasing.

One draw holds for all frames of a clip. The operations of torchvision draw from torch's global state.

Source: arXiv:1909.13719 (RandAugment), arXiv:1708.04896 (random erasing); operations, ranges and order of
facebookresearch/mae_st (`rand-m7-mstd0.5-inc1`; erasing in mode `pixel`). There RandAugment sees the whole picture,
here the square in its middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling4d.clips.crop import draw_rectangle, resized_crop

OPERATIONS_PER_CLIP, PROBABILITY = 2, 0.5  # of RandAugment; each of the two is used or left out
MAGNITUDE_STD, LARGEST_MAGNITUDE = 0.5, 10.0
FILL = 128.0  # of what a rotated, sheared or shifted picture leaves free
GREY = (0.299, 0.587, 0.114)
SMOOTH = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13  # Pillow's
ERASED_AREA, ERASED_ASPECT, ERASE_TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 100
NOISE_MEAN, NOISE_STD = 0.45, 0.225  # of erased pixels in 0..1: those by which mae_st normalises


def augment_clip(
    pixels: Tensor,
    rng: np.random.Generator,
    *,
    randaugment: float,
    crop: tuple[float, float],
    aspect: tuple[float, float],
    erasing: float,
) -> Tensor:
    """uint8 `T H W C` -> uint8, or float32 in 0..255 with noise beyond both ends where `erasing` is above 0.

    Args:
        randaugment: mean magnitude, 0..10; 0: none. crop, aspect: of `draw_rectangle`; crop = (1, 1): none.
        erasing: probability of an erased rectangle.
    """
    if randaugment:
        pixels = rand_augment(pixels, randaugment, rng)
    if crop != (1.0, 1.0):
        pixels = resized_crop(pixels, draw_rectangle(pixels.shape[1:3], area=crop, aspect=aspect, rng=rng))
    return random_erasing(pixels, erasing, rng) if erasing else pixels


# ---- RandAugment ----


def rand_augment(pixels: Tensor, magnitude: float, rng: np.random.Generator) -> Tensor:
    """Two operations, drawn with replacement, whose strength deviates by MAGNITUDE_STD: uint8 `T H W C`."""
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=OPERATIONS_PER_CLIP):
        used, drawn, sign = rng.random() < PROBABILITY, rng.normal(magnitude, MAGNITUDE_STD), rng.choice((-1.0, 1.0))
        if used:
            level = min(max(drawn, 0.0), LARGEST_MAGNITUDE) / LARGEST_MAGNITUDE
            pixels = OPERATIONS[names[number]](pixels, level, sign).round().clamp(0, 255).to(torch.uint8)
    return pixels


def auto_contrast(pixels: Tensor) -> Tensor:
    """Stretch each channel of each frame to 0..255; one of a single value stays."""
    low, high = pixels.amin((1, 2), keepdim=True).float(), pixels.amax((1, 2), keepdim=True).float()
    return torch.where(high > low, (pixels - low) * 255 / (high - low).clamp(min=1), pixels.float())


def equalize(pixels: Tensor) -> Tensor:
    """Spread the values of each channel of each frame evenly, as Pillow does."""
    T, H, W, C = pixels.shape
    planes = pixels.permute(0, 3, 1, 2).reshape(T * C, H * W).long()
    counts = torch.zeros(T * C, 256, dtype=torch.long).scatter_add_(1, planes, torch.ones_like(planes))
    step = (H * W - counts.gather(1, planes.amax(1, keepdim=True))) // 255
    table = (counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)
    values = torch.where(step > 0, table.clamp(max=255).gather(1, planes), planes)
    return values.reshape(T, C, H, W).permute(0, 2, 3, 1).float()


def blend(pixels: Tensor, plain: Tensor | float, factor: float) -> Tensor:
    """factor: 1 gives the pixels, 0 `plain`, above 1 what lies beyond the pixels."""
    return plain + factor * (pixels.float() - plain)


def grey_of(pixels: Tensor) -> Tensor:
    """`T H W 1`."""
    return (pixels.float() @ torch.tensor(GREY))[..., None].round()


def smooth(pixels: Tensor) -> Tensor:
    """Each pixel with its neighbours; those at the edge stay."""
    x = pixels.float()
    inner = F.conv2d(x.permute(0, 3, 1, 2).flatten(0, 1)[:, None], SMOOTH[None, None])  # TC 1 H-2 W-2
    smoothed = x.clone()
    smoothed[:, 1:-1, 1:-1] = inner.unflatten(0, (x.shape[0], x.shape[3]))[:, :, 0].permute(0, 2, 3, 1).round()
    return smoothed


def warp(pixels: Tensor, *rows: tuple[float, float, float]) -> Tensor:
    """Cubic interpolation at x' = a x + b y + c, and so y'. rows: (a, b, c) of x' and y', in pixels from the corner."""
    T, H, W, _ = pixels.shape
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    grid = torch.stack([2 * (a * x + b * y + c) / side - 1 for (a, b, c), side in zip(rows, (W, H), strict=True)], -1)
    planes = pixels.permute(0, 3, 1, 2).float() - FILL
    warped = F.grid_sample(planes, grid.expand(T, H, W, 2), mode="bicubic", align_corners=False)
    return warped.permute(0, 2, 3, 1) + FILL


def rotate(pixels: Tensor, degrees: float) -> Tensor:
    """About the middle."""
    _, H, W, _ = pixels.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return warp(pixels, (cos, -sin, (W - cos * W + sin * H) / 2), (sin, cos, (H - sin * W - cos * H) / 2))


def solarize(pixels: Tensor, threshold: int) -> Tensor:
    return torch.where(pixels.int() < threshold, pixels.float(), 255.0 - pixels)


OPERATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {  # of clip `T H W C`, level 0..1, sign
    "auto_contrast": lambda x, level, sign: auto_contrast(x),
    "equalize": lambda x, level, sign: equalize(x),
    "invert": lambda x, level, sign: 255.0 - x,
    "rotate": lambda x, level, sign: rotate(x, sign * 30 * level),
    "posterize": lambda x, level, sign: (x.int() >> (4 + int(4 * level)) << (4 + int(4 * level))).float(),
    "solarize": lambda x, level, sign: solarize(x, 256 - int(256 * level)),
    "solarize_add": lambda x, level, sign: torch.where(x < 128, x.float() + int(110 * level), x.float()),
    "color": lambda x, level, sign: blend(x, grey_of(x), 1 + sign * 0.9 * level),
    "contrast": lambda x, level, sign: blend(x, grey_of(x).mean((1, 2, 3), keepdim=True).round(), 1 + sign * 0.9 * level),
    "brightness": lambda x, level, sign: blend(x, 0.0, 1 + sign * 0.9 * level),
    "sharpness": lambda x, level, sign: blend(x, smooth(x), 1 + sign * 0.9 * level),
    "shear_x": lambda x, level, sign: warp(x, (1, sign * 0.3 * level, 0), (0, 1, 0)),
    "shear_y": lambda x, level, sign: warp(x, (1, 0, 0), (sign * 0.3 * level, 1, 0)),
    "translate_x": lambda x, level, sign: warp(x, (1, 0, sign * 0.45 * level * x.shape[2]), (0, 1, 0)),
    "translate_y": lambda x, level, sign: warp(x, (1, 0, 0), (0, 1, sign * 0.45 * level * x.shape[1])),
}


# ---- random erasing ----


def random_erasing(pixels: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """With a probability, fill a rectangle of all frames with noise, drawn for each pixel: float32 `T H W C`."""
    erased = pixels.float()
    T, H, W, C = erased.shape
    if rng.random() >= probability:
        return erased
    for _ in range(ERASE_TRIES):
        area, stretch = H * W * rng.uniform(*ERASED_AREA), math.exp(rng.uniform(*np.log(ERASED_ASPECT)) / 2)
        height, width = round(area**0.5 * stretch), round(area**0.5 / stretch)
        if height < H and width < W:
            top, left = rng.integers((H - height, W - width), endpoint=True)
            noise = rng.standard_normal((T, height, width, C), dtype=np.float32)
            erased[:, top : top + height, left : left + width] = torch.from_numpy(255 * (NOISE_MEAN + NOISE_STD * noise))
            break
    return erased
