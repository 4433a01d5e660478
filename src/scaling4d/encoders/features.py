"""Which layer a readout sees, and how its time axis becomes the clip's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling4d.mae.resize import cubic_weights

TINY = 1e-9  # a channel whose deviation is less never changes


def layer_index(*, depth: int, fraction: float) -> int:
    """Entry of the encoder's feature list at a fraction of its depth; the list has depth + 1 entries.

    Source: the released EncoderToReadout, int(len * fraction) - 1; so 0.95 of 12 blocks is the state after 10.
    """
    return max(int((depth + 1) * fraction) - 1, 0)


def at_depth(encoder: nn.Module, pixels: Tensor, fraction: float) -> Tensor:
    """uint8 `B T H W C` -> features `B t h*w D` at a fraction of the encoder's depth, float32 whatever it computes in."""
    index = layer_index(depth=encoder.depth, fraction=fraction)
    return in_time(encoder.features(pixels, index + 1)[index], encoder.grid).float()


def in_time(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """`B N D` -> `B t n D`."""
    t, h, w = grid
    return x.reshape(x.shape[0], t, h * w, x.shape[-1])


class Inputs(Protocol):
    """What becomes of a split's clips before a readout is trained on them."""

    def add(self, pixels: Tensor) -> Any:
        """Take one clip, uint8 `T H W C`; returns something that stands for it."""
        ...

    def ready(self, added: list[Any]) -> Sequence[Tensor]:
        """One tensor for each that was added."""
        ...

    def flush(self) -> None:
        """No more will be added for now."""
        ...


class Pixels:
    """The clips as they are."""

    def add(self, pixels: Tensor) -> Tensor:
        return pixels

    def ready(self, added: list[Tensor]) -> list[Tensor]:
        return added

    def flush(self) -> None: ...


@dataclass(frozen=True)
class Features:
    """Features `t n D` at a fraction of an encoder's depth, in memory. device: cpu or cuda, where the encoder is."""

    encoder: nn.Module
    fraction: float
    device: str = "cpu"

    @torch.no_grad()
    def add(self, pixels: Tensor) -> Tensor:
        return at_depth(self.encoder, pixels[None].to(self.device), self.fraction)[0]

    def ready(self, added: list[Tensor]) -> list[Tensor]:
        return added

    def flush(self) -> None: ...


def together(inputs: Sequence[Tensor], chosen: Iterable[int]) -> Tensor:
    """Some of the inputs as a batch; features in float32, however they are kept."""
    batch = torch.stack([inputs[index] for index in chosen])
    return batch.float() if batch.is_floating_point() else batch


@dataclass(frozen=True)
class Standard:
    """A fixed linear change of features, the same for all tokens, and what is then added at each place.

    matrix `D D`, offset `t n D` (or anything that broadcasts). Ours: released readouts see the features as they are. There, what
    a token's place adds to all clips alike, and the few directions in which tokens differ most, outweigh the rest by far, and a
    short training sees only those.
    """

    matrix: Tensor
    offset: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, features: Sequence[Tensor], *, flattening: float, place_deviation: float) -> Standard:
        """Whiten the training features `t n D` of all clips of all ranks.

        The mean of a token's place is taken off. About it, directions of variance v get the weight
        1 / sqrt(v + flattening x the mean variance): 0 makes all alike, a large flattening leaves their proportions. Then every
        channel's deviation becomes 1. The mean of the place comes back, changed alike, with deviation `place_deviation`.
        """
        width = features[0].shape[-1]
        count = torch.tensor(float(len(features)), dtype=torch.float64)
        total = torch.zeros(features[0].shape, dtype=torch.float64)
        for one in features:
            total += one
        dist.all_reduce(count)
        dist.all_reduce(total)
        mean = total / count  # t n D
        squares = torch.zeros(width, width, dtype=torch.float64)
        for at in range(0, len(features), 16):
            some = together(features, range(at, min(at + 16, len(features))))
            centred = (some - mean.float()).flatten(0, 2)
            squares += (centred.T @ centred).double()
        dist.all_reduce(squares)
        covariance = squares / (count * mean[..., 0].numel())
        variance, direction = torch.linalg.eigh(covariance)
        floor = flattening * variance.mean() + torch.finfo(torch.float32).eps * variance.max()
        matrix = direction / (variance.clamp(min=0) + floor).sqrt() @ direction.T
        matrix = matrix / _deviation((matrix.T @ covariance @ matrix).diagonal().sqrt())
        place = (mean - mean.mean((0, 1))) @ matrix
        place = place_deviation * place / _deviation(place.std((0, 1), correction=0))
        return cls(matrix.float(), (place - mean @ matrix).float())

    @classmethod
    def none(cls, width: int) -> Standard:
        """Changes nothing."""
        return cls(torch.eye(width), torch.zeros(width))

    def to(self, device: str) -> Standard:
        return Standard(self.matrix.to(device), self.offset.to(device))

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.matrix + self.offset


def _deviation(found: Tensor) -> Tensor:
    """To divide by: 1 where a channel never changes."""
    return found.where(found > TINY, 1.0)


def stretch(features: Tensor, frames: int) -> Tensor:
    """`B t n D` -> `B T n D`, cubic in time."""
    if features.shape[1] == frames:
        return features
    return torch.einsum("Tt,btnd->bTnd", cubic_weights(frames, features.shape[1]).to(features), features)
