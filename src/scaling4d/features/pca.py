"""TOKENS -> PICTURES: a video's tokens in three colours, their principal components, beside the frames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from scaling4d import video
from scaling4d.features.windows import WindowSettings, read_windows
from scaling4d.provenance import atomic_new
from scaling4d.video import VideoInput

CHUNK = 8  # windows in memory
SPREAD = 2.5  # standard deviations from the mean to black and to full colour (ours)
SIDE_PX = 192  # small pictures are enlarged to about this side, by a whole number (ours)
CRF, GOP = 16, 16


def write_pca_video(
    store: Path, layer: str, source: VideoInput, out: Path, *, windows: WindowSettings, grid: tuple[int, int, int]
) -> Path:
    """An mp4 of each frame as the encoder sees it and, at its right, the first three components of its tokens.

    All tokens of the video are centred and share one basis. Where windows overlap, each shows the frames before the
    next one's start, and the last all of its frames.

    Args:
        store: a file of `write_video_features` with all tokens. layer: its tensor, `W N D`. grid: t h w.
    Raises:
        UserError: `out` exists. VideoError: as read_windows.
    """
    mean, basis = principal_components(store, layer)
    colours = (window for chunk in _chunks(store, layer) for window in to_colours(chunk, mean, basis))  # N 3 each
    with safe_open(store, "pt") as file:
        count = file.get_slice(layer).get_shape()[0]
    with atomic_new(out) as partial:
        frames = _frames(colours, source, windows, grid, count)
        video.encode(partial, frames, rate_hz=windows.rate_hz, crf=CRF, gop=GOP)
    return out


def principal_components(store: Path, layer: str) -> tuple[Tensor, Tensor]:
    """The mean `D` of all tokens, and three axes `D 3` of largest variance, divided by the deviation along them.

    float64. Each axis points to where its largest entry is positive, so that equal tokens give equal colours.
    """
    count, total, products, origin = 0, 0.0, 0.0, None
    for chunk in _chunks(store, layer):
        x = chunk.flatten(0, 1).double()
        origin = x.mean(0) if origin is None else origin  # sums about it keep their digits
        count, total, products = count + len(x), total + (x - origin).sum(0), products + (x - origin).T @ (x - origin)
    shift = total / count
    variances, axes = torch.linalg.eigh(products / count - torch.outer(shift, shift))  # ascending
    variances, axes = variances[-3:].flip(0), axes[:, -3:].flip(1)
    axes = axes * torch.gather(axes, 0, axes.abs().argmax(0, keepdim=True)).sign()
    return origin + shift, axes / variances.clamp(min=1e-12).sqrt()


def to_colours(tokens: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """`W N D` -> `W N 3` in 0..1; 0.5 is the mean."""
    return ((tokens.double() - mean) @ basis / (2 * SPREAD) + 0.5).clamp(0, 1).float()


def _chunks(store: Path, layer: str) -> Iterator[Tensor]:
    with safe_open(store, "pt") as file:
        tensor = file.get_slice(layer)
        for start in range(0, tensor.get_shape()[0], CHUNK):
            yield tensor[start : start + CHUNK]  # W N D


def _frames(
    colours: Iterator[Tensor], source: VideoInput, settings: WindowSettings, grid: tuple[int, int, int], count: int
) -> Iterator[np.ndarray]:
    """uint8 `H 2*W 3`, enlarged. colours: `N 3` of each of `count` windows."""
    T, height, width = settings.clip
    t, h, w = grid
    enlarged = max(1, -(-SIDE_PX // min(height, width)))
    enlarged += enlarged * height % 2  # H.264 needs even sides
    shown = max(1, min(T, round(settings.stride_s * settings.rate_hz)))
    for number, (window, rgb) in enumerate(zip(read_windows(source, settings), colours, strict=True), start=1):
        picture = rgb.reshape(t, h, w, 3).movedim(-1, 1)  # t 3 h w
        picture = F.interpolate(picture, (height, width), mode="bilinear", align_corners=False).repeat_interleave(T // t, 0)
        picture = (255 * picture.movedim(1, -1)).round().to(torch.uint8)
        pair = torch.cat([window.pixels, picture], dim=2)  # T H 2*W 3
        for frame in pair[: None if number == count else shown].numpy():
            yield frame.repeat(enlarged, 0).repeat(enlarged, 1)
