"""Which layer a readout sees, and how its time axis becomes the clip's."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn


def layer_index(*, depth: int, fraction: float) -> int:
    """Entry of the encoder's feature list at a fraction of its depth; the list has depth + 1 entries.

    Source: the released EncoderToReadout, int(len * fraction) - 1; so 0.95 of 12 blocks is the state after 10.
    """
    return max(int((depth + 1) * fraction) - 1, 0)


def at_depth(encoder: nn.Module, pixels: Tensor, fraction: float) -> Tensor:
    """uint8 `B T H W C` -> features `B t h*w D` at a fraction of the encoder's depth."""
    index = layer_index(depth=encoder.depth, fraction=fraction)
    x = encoder.features(pixels, index + 1)[index]  # B N D
    t, h, w = encoder.grid
    return x.reshape(x.shape[0], t, h * w, x.shape[-1])  # B t n D


@cache
def cubic_weights(wanted: int, given: int) -> Tensor:
    """`wanted given` float32 matrix that resizes an axis as jax.image.resize does with CUBIC.

    Keys kernel with a = -0.5, half-pixel centres, widened when shrinking; taps outside are dropped and rows sum to one.
    """
    scale = max(given / wanted, 1.0)
    centre = (torch.arange(wanted, dtype=torch.float64) + 0.5) * given / wanted - 0.5
    x = ((torch.arange(given, dtype=torch.float64)[None] - centre[:, None]) / scale).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def stretch(features: Tensor, frames: int) -> Tensor:
    """`B t n D` -> `B T n D`, cubic in time."""
    if features.shape[1] == frames:
        return features
    return torch.einsum("Tt,btnd->bTnd", cubic_weights(frames, features.shape[1]).to(features), features)
