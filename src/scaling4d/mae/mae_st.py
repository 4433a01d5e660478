"""MAE-ST: encode 10 % of the tokens, decode all of them with a light decoder, predict per-patch normalised pixels.

Source: arXiv:2205.09113 and its official code: separable learned positions, class tokens, exact GELU, loss on masked
tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from scaling4d.config import require_sizes
from scaling4d.mae.encoder import (
    LAYER_NORM_EPS,
    MOST_BLOCKS,
    Backbone,
    BackboneConfig,
    Block,
    Method,
    MethodConfig,
    copy_to_param_,
    sincos,
)
from scaling4d.mae.patches import patchify, unpatchify
from scaling4d.mae.resize import resize
from scaling4d.records import MaskedTokens

TARGET_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class MAESTEncoderConfig(BackboneConfig):
    """separable_positions (mae_st's sep_pos_embed): of time plus space; false: one table for space-time. class_token:
    cls_embed. Released: both true.
    """

    separable_positions: bool
    class_token: bool


@dataclass(frozen=True, kw_only=True)
class MAESTConfig(MAESTEncoderConfig, MethodConfig):
    """MAE-ST's method.

    decoder_width, decoder_depth, decoder_heads: the decoder's mlp has 4 decoder_width. predicted_frames (mae_st's
    pred_t_dim): evenly spaced. normalise_target (norm_pix_loss): predict pixels normalised per patch (mean, unbiased
    variance).
    """

    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    predicted_frames: int
    normalise_target: bool
    round_visible_down: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "decoder_width", "decoder_heads", "predicted_frames")
        require_sizes(self, "decoder_depth", most=MOST_BLOCKS)
        frames, tubelet = self.clip[0], self.patch[0]
        if tubelet * self.predicted_frames % frames:
            raise ValueError(
                f"predicted_frames = {self.predicted_frames} of {frames} is not a whole number of frames a patch of {tubelet}"
            )
        if self.decoder_width % self.decoder_heads:
            raise ValueError(f"decoder_width {self.decoder_width} does not divide into {self.decoder_heads} heads")


class Positions(nn.Module):
    """Learned positions, of time plus space (separable) or of every place in space-time, and of the class token."""

    def __init__(self, grid: tuple[int, int, int], width: int, *, separable: bool, class_token: bool) -> None:
        super().__init__()
        self.grid = grid
        if separable:
            self.temporal = nn.Parameter(torch.empty(grid[0], width))  # t D
            self.spatial = nn.Parameter(torch.empty(grid[1] * grid[2], width))  # h*w D
        else:
            self.pos_embed = nn.Parameter(torch.empty(math.prod(grid), width))  # N D
        if class_token:
            self.class_token = nn.Parameter(torch.empty(1, width))  # 1 D

    def table(self) -> Tensor:
        """`N D`."""
        if hasattr(self, "pos_embed"):
            return self.pos_embed
        return (self.temporal[:, None] + self.spatial[None]).flatten(0, 1)

    def init_sincos(self) -> None:
        t, h, w = self.grid
        width = (self.pos_embed if hasattr(self, "pos_embed") else self.temporal).shape[1]
        table = sincos(self.grid, width)
        if hasattr(self, "pos_embed"):
            copy_to_param_(self.pos_embed, table)
            return
        of_time = torch.arange(width) < 2 * (width // 2 - 2 * (width // 6))  # the channels that sincos gives to time
        table = table.reshape(t, h * w, width)
        copy_to_param_(self.temporal, torch.where(of_time, table[:, 0], 0.0))
        copy_to_param_(self.spatial, torch.where(of_time, 0.0, table[0]))

    @torch.no_grad()
    def resize(self, grid: tuple[int, int, int]) -> None:
        t, h, w = grid
        if hasattr(self, "pos_embed"):
            self.pos_embed = nn.Parameter(resize(self.pos_embed, self.grid, grid))
        else:
            self.temporal = nn.Parameter(resize(self.temporal, (self.grid[0], 1, 1), (t, 1, 1)))
            self.spatial = nn.Parameter(resize(self.spatial, (1, *self.grid[1:]), (1, h, w)))
        self.grid = grid


class MAESTEncoder(Backbone):
    """Backbone of MAE-ST: 4DS's with exact GELU, separable positions, a class token, the norm before the decoder."""

    config_class = MAESTEncoderConfig
    gelu = "none"

    def __init__(self, config: MAESTEncoderConfig) -> None:
        super().__init__(config)
        del self.positions  # 4DS's
        self.positions = Positions(self.grid, self.width, separable=config.separable_positions, class_token=config.class_token)
        self.prefix_tokens = int(config.class_token)
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(1, self.width))  # 1 D
        self.norm = nn.LayerNorm(self.width, LAYER_NORM_EPS)

    def position_table(self) -> Tensor:
        """`N D`."""
        return self.positions.table()

    def embed_tokens(self, pixels: Tensor, masked: MaskedTokens | None = None) -> Tensor:
        """`B T H W C` -> `B 1+K D`; the class token, if any, is first."""
        x = super().embed_tokens(pixels, masked)
        if not self.prefix_tokens:
            return x
        first = (self.class_token + self.positions.class_token).expand(x.shape[0], 1, -1)
        return torch.cat([first, x], dim=1)

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """Layers as 4DS counts them, each `B N D`, without the class token."""
        return [x[:, self.prefix_tokens :] for x in super().features(pixels, layers)]

    def resize_positions(self, grid: tuple[int, int, int]) -> None:
        self.positions.resize(grid)

    def init_sincos_positions(self) -> None:
        self.positions.init_sincos()


class MAEST(Method):
    """Masked autoencoder of MAE-ST, arXiv:2205.09113, as mae_st's code has it."""

    config_class = MAESTConfig
    xavier = True

    def __init__(self, config: MAESTConfig) -> None:
        super().__init__(config)
        self.encoder = MAESTEncoder(config)
        width, patch, class_token = config.decoder_width, self.encoder.patch, config.class_token
        self.predicted_patch = (patch[0] * config.predicted_frames // config.clip[0], *patch[1:])
        self.decoder_embedding = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        if class_token:
            self.decoder_class_token = nn.Parameter(torch.empty(1, width))
        grid, separable = self.encoder.grid, config.separable_positions
        self.decoder_positions = Positions(grid, width, separable=separable, class_token=class_token)
        self.decoder_blocks = nn.ModuleList(
            Block(width=width, heads=config.decoder_heads, mlp=4 * width, gelu="none") for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.decoder = nn.Linear(width, math.prod(self.predicted_patch) * 3)

    @property
    def true_patch_statistics(self) -> bool:
        return self.config.normalise_target

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights, as the official code does; equal seeds give equal weights."""
        super().initialise(seed)
        if self.config.class_token:
            self.decoder_class_token.zero_()
        if self.config.position_init == "sincos":
            self.decoder_positions.init_sincos()

    def encode(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """`B 1+K D`, normed; the class token, if any, is first."""
        return self.encoder.norm(self.encoder.last_tokens(pixels, masked))

    def predict_patches(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """`B N P`: the prediction for every token's patch."""
        prefix = self.encoder.prefix_tokens
        x = self.decoder_embedding(self.encode(pixels, masked)[:, prefix:])  # B K D
        B, _, D = x.shape
        at = masked.ids_keep[..., None].expand(-1, -1, D)
        x = (
            self.mask_token.to(x.dtype).expand(B, masked.token_count, D).scatter(1, at, x) + self.decoder_positions.table()
        )  # B N D
        if prefix:
            x = torch.cat([(self.decoder_class_token + self.decoder_positions.class_token).expand(B, 1, D), x], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder(self.decoder_norm(x))[:, prefix:]

    def predicted_frames(self, pixels: Tensor) -> Tensor:
        """Indices of the predicted frames among the T frames, ascending from 0, evenly spaced and rounded down."""
        count = self.config.predicted_frames
        return torch.arange(count, device=pixels.device) * (pixels.shape[1] - 1) // max(count - 1, 1)

    def target(self, pixels: Tensor) -> Tensor:
        """`B N P`: the predicted frames' pixels, normalised per patch if so configured."""
        x = patchify(self.encoder.normalise(pixels[:, self.predicted_frames(pixels)]), self.predicted_patch)
        if self.config.normalise_target:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + TARGET_EPS).sqrt()
        return x

    def forward(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """Mean squared error over the masked tokens (a scalar)."""
        error = (self.predict_patches(pixels, masked) - self.target(pixels)).square().mean(-1)  # B N
        hidden = torch.ones_like(error).scatter(1, masked.ids_keep, 0.0)
        return (error * hidden).sum() / hidden.sum()

    def reconstruct(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """float `B T H W C` in 0..1: every pixel as predicted.

        A normalised prediction takes its patch's true mean and deviation, as in the official visualisation. A frame
        without a prediction shows the nearest predicted frame before it.
        """
        x = self.predict_patches(pixels, masked)
        frames = self.predicted_frames(pixels)
        if self.config.normalise_target:
            true = patchify(self.encoder.normalise(pixels[:, frames]), self.predicted_patch)
            x = x * (true.var(-1, keepdim=True) + TARGET_EPS).sqrt() + true.mean(-1, keepdim=True)
        x = unpatchify(x, (self.config.predicted_frames, *self.encoder.clip[1:]), self.predicted_patch)
        x = x[:, torch.searchsorted(frames, torch.arange(pixels.shape[1], device=frames.device), right=True) - 1]
        return (x / self.encoder.pixel_scale + self.encoder.pixel_mean).clamp(0, 1)
