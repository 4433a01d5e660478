"""MAE-ST: encode 10 % of the tokens, decode all of them with a light decoder, predict per-patch normalised pixels.

Source: arXiv:2205.09113 and its official code: separable learned positions, class tokens, exact GELU, loss on masked tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scaling4d import config, seeds
from scaling4d.mae.encoder import LAYER_NORM_EPS, Block, Encoder, put, scale_branches, sincos
from scaling4d.mae.masking import keep, kept_tokens
from scaling4d.mae.patches import grid_of, patchify, take, unpatchify
from scaling4d.mae.resize import resize
from scaling4d.records import MaskedTokens, UserError

TARGET_EPS = 1e-6


class Positions(nn.Module):
    """Learned positions, of time plus of space (separable) or of every place in space-time, and one of the class token."""

    def __init__(self, grid: tuple[int, int, int], width: int, *, separable: bool, class_token: bool) -> None:
        super().__init__()
        self.grid = grid
        if separable:
            self.temporal = nn.Parameter(torch.empty(grid[0], width))  # t D
            self.spatial = nn.Parameter(torch.empty(grid[1] * grid[2], width))  # h*w D
        else:
            self.whole = nn.Parameter(torch.empty(math.prod(grid), width))  # N D
        if class_token:
            self.class_token = nn.Parameter(torch.empty(1, width))  # 1 D

    def table(self) -> Tensor:
        """`N D`."""
        if hasattr(self, "whole"):
            return self.whole
        return (self.temporal[:, None] + self.spatial[None]).flatten(0, 1)

    def set_sincos(self) -> None:
        t, h, w = self.grid
        width = (self.whole if hasattr(self, "whole") else self.temporal).shape[1]
        table = sincos(self.grid, width)
        if hasattr(self, "whole"):
            put(self.whole, table)
            return
        at_time = torch.arange(width) < 2 * (width // 2 - 2 * (width // 6))  # the channels that sincos gives to time
        table = table.reshape(t, h * w, width)
        put(self.temporal, torch.where(at_time, table[:, 0], 0.0))
        put(self.spatial, torch.where(at_time, 0.0, table[0]))

    @torch.no_grad()
    def resize(self, grid: tuple[int, int, int]) -> None:
        t, h, w = grid
        if hasattr(self, "whole"):
            self.whole = nn.Parameter(resize(self.whole, self.grid, grid))
        else:
            self.temporal = nn.Parameter(resize(self.temporal, (self.grid[0], 1, 1), (t, 1, 1)))
            self.spatial = nn.Parameter(resize(self.spatial, (1, *self.grid[1:]), (1, h, w)))
        self.grid = grid


class MAESTEncoder(Encoder):
    """Encoder of MAE-ST: as 4DS's, with a final norm and, as released, separable positions and a class token."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        clip: tuple[int, int, int],
        patch: tuple[int, int, int],
        separable_positions: bool,
        class_token: bool,
        pixel_mean: float,
        pixel_scale: float,
    ) -> None:
        super().__init__(
            width=width,
            depth=depth,
            heads=heads,
            mlp=mlp,
            clip=clip,
            patch=patch,
            gelu="none",
            pixel_mean=pixel_mean,
            pixel_scale=pixel_scale,
        )
        del self.positions  # 4DS's
        self.positions = Positions(self.grid, width, separable=separable_positions, class_token=class_token)
        self.first = int(class_token)  # where the tokens of patches begin
        if class_token:
            self.class_token = nn.Parameter(torch.empty(1, width))  # 1 D
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS)

    def tokens(self, pixels: Tensor, masked: MaskedTokens | None = None) -> Tensor:
        """`B T H W C` -> `B 1+K D`, the class token, if there is one, first."""
        table = self.positions.table()
        if masked is None:
            x = self.embed(patchify(pixels, self.patch)) + table
        else:
            x = self.embed(take(pixels, masked.kept, self.patch)) + table[masked.kept]
        if not self.first:
            return x
        first = (self.class_token + self.positions.class_token).expand(x.shape[0], 1, -1)
        return torch.cat([first, x], dim=1)

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """Layers as 4DS counts them, each `B N D`, without the class token."""
        return [x[:, self.first :] for x in super().features(pixels, layers)]

    def resize_positions(self, grid: tuple[int, int, int]) -> None:
        self.positions.resize(grid)


@config.configurable
class MAEST(nn.Module):
    """Masked autoencoder of MAE-ST.

    Args:
        width, depth, heads, mlp: of the encoder. decoder_width, decoder_depth, decoder_heads: of the decoder (mlp 4x).
        clip: T H W. patch: pt ph pw.
        separable_positions, class_token: as the released models have them; false: one table for space-time, no class token.
        predicted_frames: `pred_t_dim`, how many of the T frames are predicted, evenly spaced.
        masking: which tokens are hidden, see mae.masking.keep. mask_ratio: fraction of them.
        normalise_target: predict pixels normalised per patch (mean and unbiased variance).
        position_init: "normal" N(0, 0.02), or "sincos" (ours: learns in short schedules).
        branch_init: "released", or "by_depth": residual branches start smaller in deep stacks (ours: learns in short schedules).
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        clip: tuple[int, int, int],
        patch: tuple[int, int, int],
        separable_positions: bool,
        class_token: bool,
        predicted_frames: int,
        masking: str,
        mask_ratio: float,
        normalise_target: bool,
        position_init: str,
        branch_init: str,
        pixel_mean: float,
        pixel_scale: float,
    ) -> None:
        super().__init__()
        if position_init not in ("normal", "sincos"):
            raise UserError(f"position_init = {position_init!r}; needed 'normal' or 'sincos'")
        if branch_init not in ("released", "by_depth"):
            raise UserError(f"branch_init = {branch_init!r}; needed 'released' or 'by_depth'")
        if patch[0] * predicted_frames % clip[0]:
            raise UserError(
                f"predicted_frames = {predicted_frames} of {clip[0]} is not a whole number of frames a patch of {patch[0]}"
            )
        self.encoder = MAESTEncoder(
            width=width,
            depth=depth,
            heads=heads,
            mlp=mlp,
            clip=clip,
            patch=patch,
            separable_positions=separable_positions,
            class_token=class_token,
            pixel_mean=pixel_mean,
            pixel_scale=pixel_scale,
        )
        self.masking, self.mask_ratio, self.normalise_target = masking, mask_ratio, normalise_target
        self.position_init, self.branch_init = position_init, branch_init
        self.predicted_frames = predicted_frames
        self.predicted_patch = (patch[0] * predicted_frames // clip[0], *patch[1:])
        self.decoder_embedding = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_width))
        if class_token:
            self.decoder_class_token = nn.Parameter(torch.empty(1, decoder_width))
        self.decoder_positions = Positions(
            grid_of(clip, patch), decoder_width, separable=separable_positions, class_token=class_token
        )
        self.decoder_blocks = nn.ModuleList(
            Block(width=decoder_width, heads=decoder_heads, mlp=4 * decoder_width, gelu="none") for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, LAYER_NORM_EPS)
        self.decoder = nn.Linear(decoder_width, math.prod(self.predicted_patch) * 3)

    def initialise(self, seed: int) -> None:
        """Draw all weights, as the official code does; equal seeds give equal weights.

        Xavier-uniform for every matrix, query, key and value apart; N(0, 0.02) for positions and tokens, zero for the decoder's
        class token; zero biases, unit norms.
        """
        for name, weight in self.named_parameters():
            rng, value = seeds.stream(seed, "init", name), torch.empty(weight.shape)
            if name.endswith("bias") or name == "decoder_class_token":
                value.zero_()
            elif "norm" in name.split(".")[-2:][0]:
                value.fill_(1)
            elif not name.endswith("weight"):
                nn.init.normal_(value, std=0.02, generator=rng)
            else:
                for part in value.chunk(3 if "qkv" in name else 1):
                    nn.init.xavier_uniform_(part, generator=rng)
            put(weight, value)
        if self.branch_init == "by_depth":
            scale_branches(self.encoder.blocks)
            scale_branches(self.decoder_blocks)
        if self.position_init == "sincos":
            self.encoder.positions.set_sincos()
            self.decoder_positions.set_sincos()

    def choose(self, batch: int, rng: torch.Generator) -> MaskedTokens:
        return keep(self.masking, batch=batch, grid=self.encoder.grid, mask_ratio=self.mask_ratio, rng=rng, down=True)

    def encode(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """`B 1+K D`, normed; the class token, if there is one, first."""
        x = self.encoder.tokens(pixels, masked)
        for block in self.encoder.blocks:
            x = block(x)
        return self.encoder.norm(x)

    def decode(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """`B N P`: what is predicted of every token's patch."""
        first = self.encoder.first
        x = self.decoder_embedding(self.encode(pixels, masked)[:, first:])  # B K D
        B, _, D = x.shape
        at = masked.kept[..., None].expand(-1, -1, D)
        x = self.mask_token.to(x.dtype).expand(B, masked.tokens, D).scatter(1, at, x) + self.decoder_positions.table()  # B N D
        if first:
            x = torch.cat([(self.decoder_class_token + self.decoder_positions.class_token).expand(B, 1, D), x], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder(self.decoder_norm(x))[:, first:]

    def frames(self, pixels: Tensor) -> Tensor:
        """Which of the T frames are predicted, ascending; the first is."""
        return torch.linspace(0, pixels.shape[1] - 1, self.predicted_frames).long()

    def target(self, pixels: Tensor) -> Tensor:
        """`B N P`: the predicted frames' pixels, normalised per patch if so set."""
        x = patchify(self.encoder.normalise(pixels[:, self.frames(pixels)]), self.predicted_patch)
        if self.normalise_target:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + TARGET_EPS).sqrt()
        return x

    def forward(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """Mean squared error over the masked tokens (a scalar)."""
        error = (self.decode(pixels, masked) - self.target(pixels)).square().mean(-1)  # B N
        hidden = torch.ones_like(error).scatter(1, masked.kept, 0.0)
        return (error * hidden).sum() / hidden.sum()

    def reconstruct(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """float `B T H W C` in 0..1: every pixel as predicted.

        A normalised prediction takes its patch's true mean and deviation, as the official visualisation does; a frame that
        is not predicted shows the nearest predicted one before it.
        """
        x = self.decode(pixels, masked)
        frames = self.frames(pixels)
        if self.normalise_target:
            true = patchify(self.encoder.normalise(pixels[:, frames]), self.predicted_patch)
            x = x * (true.var(-1, keepdim=True) + TARGET_EPS).sqrt() + true.mean(-1, keepdim=True)
        x = unpatchify(x, (self.predicted_frames, *self.encoder.clip[1:]), self.predicted_patch)
        x = x[:, torch.searchsorted(frames, torch.arange(pixels.shape[1]), right=True) - 1]
        return (x / self.encoder.pixel_scale + self.encoder.pixel_mean).clamp(0, 1)

    def flops_per_clip(self) -> int:
        """Of one training step, a backward pass counted as two forward passes."""
        tokens = math.prod(self.encoder.grid)
        kept, first = kept_tokens(self.masking, self.encoder.grid, self.mask_ratio, down=True), self.encoder.first
        forward = 2 * kept * (self.encoder.patch_embedding.weight.numel() + self.decoder_embedding.weight.numel())
        forward += sum(block.flops(kept + first) for block in self.encoder.blocks)
        forward += sum(block.flops(tokens + first) for block in self.decoder_blocks)
        return 3 * (forward + 2 * tokens * self.decoder.weight.numel())
