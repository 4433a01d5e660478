"""Linear probes: ridge regression in closed form on a frozen encoder's features, without steps and without a seed.

The field's usual probe, beside the attention readouts of the papers (ours). Sums over the training clips are enough: of
all ranks they are added up, and the penalty is chosen on them by generalised cross-validation (Golub, Heath and Wahba,
1979).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

PENALTIES = tuple(10.0**power for power in range(-5, 3))  # of the mean variance of a feature; ours
CLIP_GRID = (4, 2, 2)  # steps, rows and columns of means that stand for a clip; ours
CONSTANT = 1e-12  # a feature with a smaller variance is left out


class RegressionSums:
    """Sums over samples of P places each: features `B P d`, targets `B P o`, and which count, bool `B P`."""

    def __init__(self, places: int, features: int, targets: int) -> None:
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64)  # noqa: E731
        self.count, self.x, self.y = zeros(places, 1), zeros(places, features), zeros(places, targets)
        self.xx, self.xy, self.yy = zeros(features, features), zeros(features, targets), zeros(targets)

    def add(self, x: Tensor, y: Tensor, counts: Tensor) -> None:
        mask = counts[..., None]
        x, y = torch.where(mask, x, 0.0), torch.where(mask, y, 0.0)
        self.count += mask.sum(0)
        self.x += x.sum(0)
        self.y += y.sum(0)
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum(0)

    def over_ranks(self) -> RegressionSums:
        """The sums of all ranks, added up."""
        total = copy.deepcopy(self)
        for value in vars(total).values():
            dist.all_reduce(value)
        return total

    def means(self) -> LinearProbe:
        """The trivial answer: the mean of the targets at each place, whatever the features are."""
        return LinearProbe(self.xy.new_zeros(self.xy.shape).float(), (self.y / self.count.clamp(min=1)).float())

    def solve(self) -> LinearProbe:
        """The ridge regression of deviations from each place's means, with the best of PENALTIES."""
        count = self.count.clamp(min=1)
        mean_x, mean_y = self.x / count, self.y / count
        xx, xy = self.xx - self.x.T @ mean_x, self.xy - self.x.T @ mean_y
        yy = self.yy - (self.y * mean_y).sum(0)
        samples, degrees = self.count.sum(), (self.count > 0).sum()
        variance = xx.diagonal() / samples
        scale = torch.where(variance > CONSTANT, variance, torch.inf).rsqrt()
        values, vectors = torch.linalg.eigh(xx * scale[:, None] * scale)
        values, projected = values.clamp(min=0), vectors.T @ (scale[:, None] * xy)  # d, d o
        best, least = values.new_zeros(projected.shape), math.inf
        for penalty in PENALTIES:
            shrunk = values + penalty * samples
            weight = projected / shrunk[:, None]
            residual = yy - 2 * (weight * projected).sum(0) + (values[:, None] * weight.square()).sum(0)
            freedom = samples - degrees - len(values) + (penalty * samples / shrunk).sum()  # exact where it is small
            score = (residual.sum() / freedom.square()).item()
            if score < least:
                best, least = weight, score
        weight = scale[:, None] * (vectors @ best)
        return LinearProbe(weight.float(), (mean_y - mean_x @ weight).float())


class LinearProbe(nn.Module):
    """features `B P d` -> `B P o`. weight `d o`; offset `P o`."""

    def __init__(self, weight: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.offset


def pooled(features: Tensor) -> Tensor:
    """Features of a clip `B t h*w D` -> `B 1 d`: the means of a grid of at most CLIP_GRID cells, one after another."""
    side = math.isqrt(features.shape[2])  # clips are square
    grid = [min(cells, size) for cells, size in zip(CLIP_GRID, (features.shape[1], side, side), strict=True)]
    volume = features.unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)  # B D t h w
    return F.adaptive_avg_pool3d(volume, grid).flatten(1)[:, None]


def fit_probes(groups: Iterable[Iterable[tuple[Tensor, Tensor, Tensor]]]) -> tuple[LinearProbe, list[LinearProbe]]:
    """Probes of batches of features, targets and which count, see RegressionSums, over all ranks.

    Returns the trivial answer of all batches, and a ridge regression after each group of batches.
    """
    sums, probes = None, []
    for batches in groups:
        for x, y, counts in batches:
            sums = sums or RegressionSums(x.shape[1], x.shape[2], y.shape[2])
            sums.add(x, y, counts)
        probes.append(sums.over_ranks().solve())
    return sums.over_ranks().means(), probes
