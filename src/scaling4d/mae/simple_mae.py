"""SimpleMAE, the pretraining model of 4DS: drop 95 % of the tokens, decode coarse learned tokens in the last blocks.

Visible tokens go through all but the last `decode_blocks` blocks; then coarse learned tokens join them, both go through the
last blocks, and one linear layer turns every coarse token into a space-time patch of pixels larger than an input patch.
Source: arXiv:2412.15212 (method figure). The coarse grid and the tokens that the loss covers are not published: settings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d import config
from scaling4d.mae.encoder import Encoder, initialise, put, scale_branches, sincos
from scaling4d.mae.masking import keep, kept_tokens
from scaling4d.mae.patches import grid_of, patchify, unpatchify
from scaling4d.records import MaskedTokens, UserError


@config.configurable
class SimpleMAE(nn.Module):
    """Masked autoencoder of video with coarse-token decoding.

    Args:
        width, depth, heads, mlp: of the encoder's blocks.
        clip: T H W. patch: pt ph pw of input tokens. coarse_patch: of decoded tokens, a multiple of the patch in each axis.
        decode_blocks: how many of the last blocks see the coarse tokens.
        masking: which tokens are hidden, see mae.masking.keep (4DS: random). mask_ratio: fraction of them.
        loss_on: "all" pixels, or only "masked" ones (those outside the visible patches).
        position_init: "normal" N(0, 0.02) as released, or "sincos" (ours: learns in short schedules).
        branch_init: "released", or "by_depth": residual branches start smaller in deep stacks (ours: learns in short schedules).
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        clip: tuple[int, int, int],
        patch: tuple[int, int, int],
        coarse_patch: tuple[int, int, int],
        decode_blocks: int,
        masking: str,
        mask_ratio: float,
        loss_on: str,
        position_init: str,
        branch_init: str,
        pixel_mean: float,
        pixel_scale: float,
    ) -> None:
        super().__init__()
        if not 0 < decode_blocks <= depth:
            raise UserError(f"decode_blocks = {decode_blocks}; needed 1 to {depth}, the depth")
        if loss_on not in ("all", "masked"):
            raise UserError(f"loss_on = {loss_on!r}; needed 'all' or 'masked'")
        if position_init not in ("normal", "sincos"):
            raise UserError(f"position_init = {position_init!r}; needed 'normal' or 'sincos'")
        if branch_init not in ("released", "by_depth"):
            raise UserError(f"branch_init = {branch_init!r}; needed 'released' or 'by_depth'")
        self.encoder = Encoder(
            width=width,
            depth=depth,
            heads=heads,
            mlp=mlp,
            clip=clip,
            patch=patch,
            gelu="tanh",
            pixel_mean=pixel_mean,
            pixel_scale=pixel_scale,
        )
        self.coarse_patch, self.coarse_grid = tuple(coarse_patch), grid_of(clip, coarse_patch)
        self.decode_blocks, self.loss_on = decode_blocks, loss_on
        self.masking, self.mask_ratio = masking, mask_ratio
        self.position_init, self.branch_init = position_init, branch_init
        self.coarse_tokens = nn.Parameter(torch.empty(math.prod(self.coarse_grid), width))  # M D
        self.decoder = nn.Linear(width, math.prod(coarse_patch) * 3)

    def initialise(self, seed: int) -> None:
        """Draw all weights; equal seeds give equal weights."""
        initialise(self, seed=seed)
        if self.branch_init == "by_depth":
            scale_branches(self.encoder.blocks)
        if self.position_init == "sincos":
            ratio = tuple(c / p for c, p in zip(self.coarse_patch, self.encoder.patch, strict=True))
            put(self.encoder.positions, sincos(self.encoder.grid, self.encoder.width))
            put(self.coarse_tokens, sincos(self.coarse_grid, self.encoder.width, ratio))

    def choose(self, batch: int, rng: torch.Generator) -> MaskedTokens:
        return keep(self.masking, batch=batch, grid=self.encoder.grid, mask_ratio=self.mask_ratio, rng=rng)

    def decode(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """uint8 `B T H W C` -> `B M P`, the coarse patches of the whole clip in normalised pixels."""
        encoder = self.encoder
        x = encoder.tokens(pixels, masked)  # B K D
        for block in encoder.blocks[: -self.decode_blocks]:
            x = block(x)
        x = torch.cat([x, self.coarse_tokens.expand(x.shape[0], -1, -1)], dim=1)  # B K+M D
        for block in encoder.blocks[-self.decode_blocks :]:
            x = block(x)
        return self.decoder(x[:, masked.kept.shape[1] :])  # B M P

    def forward(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """Mean squared error of normalised pixels (a scalar), over all pixels or over the masked ones."""
        found, true = self.decode(pixels, masked), self.encoder.normalise(patchify(pixels, self.coarse_patch))
        if self.loss_on == "masked":
            error = (found - true).square()
            hidden = patchify(hidden_pixels(masked, self.encoder.clip, self.encoder.patch), self.coarse_patch)  # B M P/3
            return (error.unflatten(-1, (-1, 3)).mean(-1) * hidden).sum() / hidden.sum()
        return F.mse_loss(found, true)

    def reconstruct(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """float `B T H W C` in 0..1: every pixel as predicted."""
        x = unpatchify(self.decode(pixels, masked), self.encoder.clip, self.coarse_patch)
        return (x / self.encoder.pixel_scale + self.encoder.pixel_mean).clamp(0, 1)

    def flops_per_clip(self) -> int:
        """Of one training step, a backward pass counted as two forward passes."""
        encoder, coarse = self.encoder, self.coarse_tokens.shape[0]
        kept = kept_tokens(self.masking, encoder.grid, self.mask_ratio)
        forward = 2 * kept * encoder.patch_embedding.weight.numel() + 2 * coarse * self.decoder.weight.numel()
        forward += sum(block.flops(kept) for block in encoder.blocks[: -self.decode_blocks])
        forward += sum(block.flops(kept + coarse) for block in encoder.blocks[-self.decode_blocks :])
        return 3 * forward


def hidden_pixels(masked: MaskedTokens, clip: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """float `B T H W 1`: 1 where the encoder saw nothing."""
    hidden = torch.ones(masked.kept.shape[0], masked.tokens, device=masked.kept.device).scatter(1, masked.kept, 0.0)  # B N
    return unpatchify(hidden[..., None].expand(-1, -1, math.prod(patch)), clip, patch)
