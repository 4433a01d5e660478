"""Cubic resizing of an axis, as jax.image.resize does it: of features in time, of positions in time and space."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def cubic_weights(wanted: int, given: int) -> Tensor:
    """`wanted given` float32 matrix that resizes an axis as jax.image.resize does with CUBIC.

    Keys kernel with a = -0.5, half-pixel centres, widened when shrinking; taps outside are dropped and rows sum to one.
    """
    scale = torch.sym_max(given / wanted, 1.0)  # in an exported graph `wanted` is a symbol
    centre = (torch.arange(wanted, dtype=torch.float64) + 0.5) * given / wanted - 0.5
    x = ((torch.arange(given, dtype=torch.float64)[None] - centre[:, None]) / scale).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def resize(table: Tensor, given: tuple[int, int, int], wanted: tuple[int, int, int]) -> Tensor:
    """Positions `N D` of the grid `given` t h w -> of the grid `wanted`; an axis that stays is left as it is.

    The official demo resizes height and width; that time is resized alike is ours.
    """
    x = table.reshape(*given, -1)  # t h w D
    for axis, (old, new) in enumerate(zip(given, wanted, strict=True)):
        if old != new:
            x = torch.tensordot(cubic_weights(new, old).to(x), x, dims=([1], [axis])).movedim(0, axis)
    return x.reshape(-1, table.shape[1])
