"""Whitening: a fixed linear map of features, fitted to the training clips.

Ours: released readouts take the features as they are. There the mean of a token's place, and the few directions of
largest variance, outweigh the rest by far, and a short training sees only those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

CONSTANT_STD = 1e-9  # a channel with a smaller deviation is constant, and divided by 1
BATCH = 16


class Whitening(nn.Module):
    """x -> x @ matrix + offset. matrix `D D`; offset `t n D`, or any shape that broadcasts."""

    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("offset", offset)

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.matrix + self.offset

    @classmethod
    def identity(cls, width: int) -> Whitening:
        return cls(torch.eye(width), torch.zeros(width))

    @classmethod
    @torch.no_grad()
    def fit(cls, batch: Callable[[range], Tensor], clips: int, *, shrinkage: float, position_std: float) -> Whitening:
        """Whiten the training features of all clips of all ranks.

        The mean at each token's place is subtracted. A direction of variance v gets the weight 1 / sqrt(v + shrinkage x
        the mean variance): 0 makes all directions equal, a large value keeps their proportions. Then every channel is
        scaled to deviation 1. The mean of the place is added again, mapped alike, with deviation `position_std`.

        Args:
            batch: indices -> features `B t n D`. clips: of this rank.
        """
        first = batch(range(1))[0]
        count = torch.tensor(float(clips), dtype=torch.float64)
        total = torch.zeros(first.shape, dtype=torch.float64)
        for index in range(clips):
            total += batch(range(index, index + 1))[0]
        dist.all_reduce(count)
        dist.all_reduce(total)
        mean = total / count  # t n D
        width = first.shape[-1]
        squares = torch.zeros(width, width, dtype=torch.float64)
        for start in range(0, clips, BATCH):
            centred = (batch(range(start, min(start + BATCH, clips))) - mean.float()).flatten(0, 2)
            squares += (centred.T @ centred).double()
        dist.all_reduce(squares)
        covariance = squares / (count * mean[..., 0].numel())
        variance, direction = torch.linalg.eigh(covariance)
        floor = shrinkage * variance.mean() + torch.finfo(torch.float32).eps * variance.max()
        matrix = direction / (variance.clamp(min=0) + floor).sqrt() @ direction.T
        std = (matrix.T @ covariance @ matrix).diagonal().sqrt()
        matrix = matrix / std.where(std > CONSTANT_STD, 1.0)
        place = (mean - mean.mean((0, 1))) @ matrix
        std = place.std((0, 1), correction=0)
        place = position_std * place / std.where(std > CONSTANT_STD, 1.0)
        return cls(matrix.float(), (place - mean @ matrix).float())
