"""Which layer a readout sees, and how its time axis becomes the clip's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
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


TINY = 1e-6  # keeps a channel that never changes from dividing by zero


@dataclass(frozen=True)
class Standard:
    """A fixed shift and scale of features, the same for all: shift `t n D`, deviation `D`.

    Ours: released readouts see the features as they are. There, what a token's place adds to all clips alike is several times
    what differs between clips, and a short training sees only the former.
    """

    shift: Tensor
    deviation: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, features: Tensor, place_deviation: float) -> Standard:
        """From the training features `B t n D` of all ranks.

        In every channel the deviation about the mean of a token's place becomes 1, and that of these means `place_deviation`.
        """
        count = torch.tensor(float(len(features)), dtype=torch.float64)
        total = features.double().sum(0)
        dist.all_reduce(count)
        dist.all_reduce(total)
        mean = (total / count).float()
        squares = (features - mean).double().square().sum((0, 1, 2))
        dist.all_reduce(squares)
        deviation = (squares / (count * mean[..., 0].numel())).sqrt().float() + TINY  # D
        centre = mean.mean((0, 1))
        place = (mean - centre) / (mean.std((0, 1), correction=0) + TINY)  # t n D
        return cls(mean - place_deviation * deviation * place, deviation)

    @classmethod
    def none(cls) -> Standard:
        """Changes nothing."""
        return cls(torch.zeros(1), torch.ones(1))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.shift) / self.deviation


def stretch(features: Tensor, frames: int) -> Tensor:
    """`B t n D` -> `B T n D`, cubic in time."""
    if features.shape[1] == frames:
        return features
    return torch.einsum("Tt,btnd->bTnd", cubic_weights(frames, features.shape[1]).to(features), features)
