"""Distillation: a small encoder learns to say from 5 % of the tokens what a large one says of them, seeing the whole clip.

The released 4DS-B was distilled from 4DS-e; how is not published. So this recipe is ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d import config
from scaling4d.mae.encoder import Encoder, initialise, put, scale_branches, sincos
from scaling4d.mae.masking import keep, kept_tokens
from scaling4d.records import MaskedTokens, UserError


@config.configurable
class Distilled(nn.Module):
    """A student encoder with a linear layer that predicts its teacher's features.

    Args:
        teacher: name of the pretrained point that teaches. teacher_width: of its features; teacher_layer: which entry of its
          feature list is to be predicted.
        width, depth, heads, mlp: of the student. clip: T H W. patch: pt ph pw, the teacher's too.
        masking, mask_ratio: what of the clip the student sees, see mae.masking.keep.
        position_init, branch_init: as in SimpleMAE.
        taught_by: the teacher itself; only training needs it, and it is no part of the model.
    """

    def __init__(
        self,
        *,
        teacher: str,
        teacher_width: int,
        teacher_layer: int,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        clip: tuple[int, int, int],
        patch: tuple[int, int, int],
        masking: str,
        mask_ratio: float,
        position_init: str,
        branch_init: str,
        pixel_mean: float,
        pixel_scale: float,
        taught_by: nn.Module | None = None,
    ) -> None:
        super().__init__()
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
        if taught_by is not None:
            found = (taught_by.width, taught_by.grid, taught_by.depth + 1 > teacher_layer)
            if found != (teacher_width, self.encoder.grid, True):
                raise UserError(
                    f"teacher {teacher} has width {taught_by.width}, grid {taught_by.grid}, {taught_by.depth + 1} layers; needed "
                    f"width {teacher_width}, grid {self.encoder.grid} and a layer {teacher_layer}"
                )
            taught_by.requires_grad_(False)
        self.taught_by = (taught_by,)  # in a tuple torch does not take it for a part of this model
        self.teacher, self.teacher_layer = teacher, teacher_layer
        self.masking, self.mask_ratio = masking, mask_ratio
        self.position_init, self.branch_init = position_init, branch_init
        self.decoder = nn.Linear(width, teacher_width)

    def initialise(self, seed: int) -> None:
        """Draw all weights; equal seeds give equal weights."""
        initialise(self, seed=seed)
        if self.branch_init == "by_depth":
            scale_branches(self.encoder.blocks)
        if self.position_init == "sincos":
            put(self.encoder.positions, sincos(self.encoder.grid, self.encoder.width))

    def choose(self, batch: int, rng: torch.Generator) -> MaskedTokens:
        return keep(self.masking, batch=batch, grid=self.encoder.grid, mask_ratio=self.mask_ratio, rng=rng)

    def predict(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """`B K teacher_width`."""
        x = self.encoder.tokens(pixels, masked)
        for block in self.encoder.blocks:
            x = block(x)
        return self.decoder(x)

    @torch.no_grad()
    def target(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """`B K teacher_width`: the teacher's features of the kept tokens, in sight of all; each with mean 0, deviation 1."""
        (teacher,) = self.taught_by
        x = teacher.features(pixels, self.teacher_layer + 1)[self.teacher_layer]  # B N D
        x = x.gather(1, masked.kept[..., None].expand(-1, -1, x.shape[-1]))  # B K D
        return F.layer_norm(x.float(), x.shape[-1:])

    def forward(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """Mean squared error of the predicted features (a scalar)."""
        return F.mse_loss(self.predict(pixels, masked), self.target(pixels, masked))

    def flops_per_clip(self) -> int:
        """Of one training step: a backward pass counted as two forward passes, and the teacher's forward pass."""
        kept = kept_tokens(self.masking, self.encoder.grid, self.mask_ratio)
        matrices = self.encoder.patch_embedding.weight.numel() + self.decoder.weight.numel()
        student = 2 * kept * matrices + sum(block.flops(kept) for block in self.encoder.blocks)
        (teacher,) = self.taught_by
        if teacher is None:
            return 3 * student
        tokens = math.prod(teacher.grid)
        seen = 2 * tokens * teacher.patch_embedding.weight.numel()
        return 3 * student + seen + sum(block.flops(tokens) for block in teacher.blocks[: max(self.teacher_layer - 1, 0)])
