"""Linear probes: ridge regression in closed form on a frozen encoder's features, without steps and without a seed.

The field's usual probe, beside the attention readouts of the papers (ours). Sums over the training clips are enough: of
all ranks they are added up. Held-out clips choose the penalty.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d.mae.device import to_device
from scaling4d.training.distributed import gather_round_robin

RegressionBatch = tuple[Tensor, Tensor, Tensor]  # features `B P d`, targets `B P o`, valid `B P` (bool)
Batches = Iterable[RegressionBatch]
PENALTIES = tuple(10.0**power for power in range(-5, 3))  # of the mean variance of a feature; ours
# Steps, rows and columns of means that stand for a clip: the first grid of at most MOST_FEATURES numbers; sums of their
# products take 2 GB (ours).
CLIP_GRIDS, MOST_FEATURES = ((4, 2, 2), (4, 1, 1), (1, 1, 1)), 16_384
CONSTANT = 1e-12  # a feature with a smaller variance is left out


class RegressionSums:
    """Sums over samples of P places each: features `B P d`, targets `B P o`, and valid `B P` (bool)."""

    def __init__(self, places: int, features: int, targets: int, device: str = "cpu") -> None:
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)  # noqa: E731
        self.count, self.x, self.y = zeros(places, 1), zeros(places, features), zeros(places, targets)
        self.xx, self.xy = zeros(features, features), zeros(features, targets)

    def add(self, *batch: Tensor) -> None:
        x, y, counts = (to_device(value, self.count.device.type) for value in batch)
        mask = counts[..., None]
        x, y = torch.where(mask, x, 0.0), torch.where(mask, y, 0.0)
        self.count += mask.sum(0)
        self.x += x.sum(0)
        self.y += y.sum(0)
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def over_ranks(self) -> RegressionSums:
        """The sums of all ranks, added up."""
        total = copy.deepcopy(self)
        for value in vars(total).values():
            dist.all_reduce(value)
        return total

    def means(self) -> LinearProbe:
        """The trivial answer: the mean of the targets at each place, whatever the features are."""
        return LinearProbe(self.xy.new_zeros(self.xy.shape).float(), (self.y / self.count.clamp(min=1)).float())

    def solve(self) -> list[LinearProbe]:
        """The ridge regression of deviations from each place's means, with each of PENALTIES."""
        count = self.count.clamp(min=1)
        mean_x, mean_y = self.x / count, self.y / count
        xx, xy, samples = self.xx - self.x.T @ mean_x, self.xy - self.x.T @ mean_y, self.count.sum()
        variance = xx.diagonal() / samples
        scale = torch.where(variance > CONSTANT, variance, torch.inf).rsqrt()
        values, vectors = torch.linalg.eigh(xx * scale[:, None] * scale)
        projected = vectors.T @ (scale[:, None] * xy)  # d o
        probes = []
        for penalty in PENALTIES:
            weight = scale[:, None] * (vectors @ (projected / (values.clamp(min=0) + penalty * samples)[:, None]))
            probes.append(LinearProbe(weight.float(), (mean_y - mean_x @ weight).float()))
        return probes


class LinearProbe(nn.Module):
    """features `B P d` -> `B P o`. weight `d o`; offset `P o`."""

    def __init__(self, weight: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.offset


def pooled(features: Tensor) -> Tensor:
    """Features of a clip `B t h*w D` -> `B 1 d`: the means of the cells of one of CLIP_GRIDS."""
    side = math.isqrt(features.shape[2])  # clips are square
    sizes = (features.shape[1], side, side)
    grids = [tuple(map(min, cells, sizes)) for cells in CLIP_GRIDS]
    grid = next((grid for grid in grids if math.prod(grid) * features.shape[3] <= MOST_FEATURES), grids[-1])
    volume = features.unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)  # B D t h w
    return F.adaptive_avg_pool3d(volume, grid).flatten(1)[:, None]


def fit_probes(groups: Iterable[tuple[Batches, Batches]], device: str) -> tuple[LinearProbe, list[LinearProbe]]:
    """Probes over all ranks.

    Args:
        groups: batches to fit, in addition to those before, and all batches that choose the penalty.
        device: of the sums and the probes; one CPU thread takes 93 s for the eigenvectors of 6,144 features (measured).
    Returns:
        the trivial answer of all fitted batches, and a ridge regression after each group.
    """
    sums, probes = None, []
    for fitted, held_out in groups:
        for x, y, counts in fitted:
            sums = sums or RegressionSums(x.shape[1], x.shape[2], y.shape[2], device)
            sums.add(x, y, counts)
        probes.append(_best_on(held_out, sums.over_ranks().solve()))
    return sums.over_ranks().means(), probes


def fit_probe(fitted: Sequence[RegressionBatch], held_out: Batches, device: str) -> LinearProbe:
    """One ridge regression over all ranks, of which some may have no samples. At least one has.

    It is the last one of `fit_probes`, up to rounding. With one place a clip and fewer clips than features it is solved
    in its dual form: a few hundred clips of a wide encoder have tens of thousands of features.
    """
    shapes = gather_round_robin([(*x.shape, y.shape[2]) for x, y, _ in fitted])
    clips, (_, places, features, targets) = sum(shape[0] for shape in shapes), shapes[0]
    if places == 1 and clips < features:
        rows = gather_round_robin([(x[counts], y[counts]) for x, y, counts in fitted])
        return _best_on(held_out, solve_dual(*(to_device(torch.cat(part), device) for part in zip(*rows, strict=True))))
    sums = RegressionSums(places, features, targets, device)
    for batch in fitted:
        sums.add(*batch)
    return _best_on(held_out, sums.over_ranks().solve())


def solve_dual(x: Tensor, y: Tensor) -> list[LinearProbe]:
    """`RegressionSums.solve` for one place, by products of samples: features `n d`, targets `n o`."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    variance = (x - mean_x).square().mean(0)
    scale = torch.where(variance > CONSTANT, variance, torch.inf).rsqrt()
    scaled = (x - mean_x) * scale
    values, vectors = torch.linalg.eigh(scaled @ scaled.T)  # n n
    projected = vectors.T @ (y - mean_y)  # n o
    probes = []
    for penalty in PENALTIES:
        weight = scale[:, None] * (scaled.T @ (vectors @ (projected / (values.clamp(min=0) + penalty * len(x))[:, None])))
        probes.append(LinearProbe(weight.float(), (mean_y - mean_x @ weight)[None].float()))
    return probes


def _best_on(held_out: Batches, candidates: Sequence[LinearProbe]) -> LinearProbe:
    """The candidate with the least squared error on held-out batches of all ranks."""
    device = candidates[0].weight.device
    errors = torch.zeros(len(candidates), dtype=torch.float64, device=device)
    for batch in held_out:
        x, y, counts = (to_device(value, device.type) for value in batch)
        for number, probe in enumerate(candidates):
            errors[number] += torch.where(counts[..., None], probe(x) - y, 0.0).square().sum()
    dist.all_reduce(errors)
    return candidates[int(errors.argmin())]
