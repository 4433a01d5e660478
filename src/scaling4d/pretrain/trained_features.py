"""Features of the encoder that is being trained, and their effective rank.

Features are those at DEPTH_FRACTION, as readouts read them. The weights stay where they are: every rank encodes its
share of the clips. Untested on a GPU.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling4d.encoders.features import layer_index, split_time


class TrainedFeatures:
    """encoders.features.FeatureEncoder for an encoder inside a wrapped model, which gathers or casts the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.encoder = model, model.encoder

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 `B T H W C` on the model's device -> float32 `B t h*w D`."""
        layer = layer_index(depth=self.encoder.depth)
        return split_time(self.model.features(pixels, layer + 1)[layer], self.encoder.grid).float()


class RankMe:
    """Effective rank of the mean features of clips (arXiv:2210.02885), from sums over clips of their products `D D`."""

    def __init__(self, width: int) -> None:
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Features `B t n D`, on any device."""
        mean = features.mean((1, 2)).double().cpu()  # B D
        self.products += mean.T @ mean

    def effective_rank(self) -> float:
        """Over all ranks: exp of the entropy of the singular values, divided by their sum. At most D.

        A mean over the tokens of a clip stands for the paper's embedding (ours).
        """
        products = self.products.clone()
        dist.all_reduce(products)
        singular = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
        return torch.special.entr(singular / singular.sum()).sum().exp().item()
