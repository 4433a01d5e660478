"""SimpleMAE, the pretraining model of 4DS: hide 95 % of the tokens, decode coarse learned tokens in the last blocks.

Visible tokens go through all but the last `decode_blocks` blocks. Then coarse learned tokens join them, and both go
through the last blocks. A linear layer turns each coarse token into a patch of pixels, larger than an input patch.
Source: arXiv:2412.15212 (method figure). The coarse grid is not published: a setting, inferred from the parameter
counts for the points of the paper. The tokens of the loss are not published: all of them (ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d.config import require_sizes
from scaling4d.mae.encoder import Backbone, Method, MethodConfig, copy_to_param_, sincos
from scaling4d.mae.patches import grid_of, patchify, unpatchify
from scaling4d.records import MaskedTokens


@dataclass(frozen=True, kw_only=True)
class SimpleMAEConfig(MethodConfig):
    """4DS's method.

    coarse_patch: pt ph pw of decoded tokens. decode_blocks: number of last blocks that see the coarse tokens.
    """

    coarse_patch: tuple[int, int, int]
    decode_blocks: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decode_blocks <= self.depth:
            raise ValueError(f"decode_blocks = {self.decode_blocks}; needed 1 to {self.depth}, the depth")
        require_sizes(self, "coarse_patch")
        grid_of(self.clip, self.coarse_patch)


class SimpleMAE(Method):
    """Masked autoencoder of video with coarse-token decoding: the method figure of 4DS, arXiv:2412.15212."""

    config_class = SimpleMAEConfig

    def __init__(self, config: SimpleMAEConfig) -> None:
        super().__init__(config)
        self.encoder = Backbone(config)
        self.coarse_patch, self.coarse_grid = tuple(config.coarse_patch), grid_of(config.clip, config.coarse_patch)
        self.coarse_tokens = nn.Parameter(torch.empty(math.prod(self.coarse_grid), config.width))  # M D
        self.decoder = nn.Linear(config.width, math.prod(config.coarse_patch) * 3)

    def initialise(self, seed: int) -> None:
        super().initialise(seed)
        if self.config.position_init == "sincos":
            ratio = tuple(c / p for c, p in zip(self.coarse_patch, self.encoder.patch, strict=True))
            copy_to_param_(self.coarse_tokens, sincos(self.coarse_grid, self.encoder.width, ratio))

    def predict_patches(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """uint8 `B T H W C` -> `B M P`, the coarse patches of the whole clip in normalised pixels."""
        encoder, decode_blocks = self.encoder, self.config.decode_blocks
        x = encoder.embed_tokens(pixels, masked)  # B K D
        for block in encoder.blocks[:-decode_blocks]:
            x = block(x)
        x = torch.cat([x, self.coarse_tokens.expand(x.shape[0], -1, -1)], dim=1)  # B K+M D
        for block in encoder.blocks[-decode_blocks:]:
            x = block(x)
        return self.decoder(x[:, masked.ids_keep.shape[1] :])  # B M P

    def forward(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """Mean squared error of all normalised pixels, visible ones included (a scalar)."""
        predicted = self.predict_patches(pixels, masked).float()  # torch 2.10 has no backward pass of mixed types
        return F.mse_loss(predicted, self.encoder.normalise(patchify(pixels, self.coarse_patch)))

    def reconstruct(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """float `B T H W C` in 0..1: every pixel as predicted."""
        x = unpatchify(self.predict_patches(pixels, masked), self.encoder.clip, self.coarse_patch)
        return (x / self.encoder.pixel_scale + self.encoder.pixel_mean).clamp(0, 1)
