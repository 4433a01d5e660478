"""The video transformer of 4DS, and the parts that MAE-ST shares: patches, learned positions, pre-norm blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d import seeds
from scaling4d.config import require_positive, require_sizes, require_words
from scaling4d.mae.attention import attention, rotary
from scaling4d.mae.masking import random_masking, visible_token_count
from scaling4d.mae.patches import gather_patches, grid_of, patchify
from scaling4d.mae.resize import resize
from scaling4d.records import MaskedTokens

MOST_BLOCKS = 1000
LAYER_NORM_EPS = 1e-6  # released code of 4DS, and mae_st
LECUN_STD = 0.87962566103423978  # of a unit normal cut off at two sigma


@dataclass(frozen=True, kw_only=True)
class PixelTokensConfig:
    """clip: T H W. patch: pt ph pw. Pixels in 0..1 become (x - pixel_mean) * pixel_scale (4DS: 0 and 1)."""

    clip: tuple[int, int, int]
    patch: tuple[int, int, int]
    pixel_mean: float
    pixel_scale: float

    def __post_init__(self) -> None:
        require_sizes(self, "clip", "patch")
        require_positive(self, "pixel_scale")
        grid_of(self.clip, self.patch)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(PixelTokensConfig):
    """A backbone.

    width: D. depth: number of blocks. mlp: hidden width of a block's mlp. qk_norm: see Block; of the encoder's blocks.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    qk_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "width", "heads", "mlp")
        require_sizes(self, "depth", most=MOST_BLOCKS)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")


@dataclass(frozen=True, kw_only=True)
class MethodConfig(BackboneConfig):
    """A pretraining method on a backbone.

    masking, mask_ratio, round_visible_down (of the method, no setting): see mae.masking.random_masking.
    position_init: "normal" N(0, 0.02), as released, or "sincos" (ours: learns in short schedules).
    branch_init: "released", or "by_depth": smaller residual branches at the start of deep stacks (ours: likewise).
    """

    masking: str
    mask_ratio: float
    position_init: str
    branch_init: str
    round_visible_down: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_words(self, {"position_init": ("normal", "sincos"), "branch_init": ("released", "by_depth")})
        self.visible_token_count(grid_of(self.clip, self.patch))

    def visible_token_count(self, grid: tuple[int, int, int]) -> int:
        """K of `random_masking`."""
        return visible_token_count(self.masking, grid, self.mask_ratio, round_down=self.round_visible_down)


class Block(nn.Module):
    """Sequential pre-norm block with biases: x + attention(norm x), then x + mlp(norm x).

    Args:
        gelu: "tanh" in 4DS, "none" (exact) in MAE-ST; torch's names.
        qk_norm: a LayerNorm without bias of each head's queries and keys, which bounds the attention's logits: the
            one of 22 B parameters in arXiv:2302.05442, as flax's `normalize_qk`. Neither paper states one.
    Attributes:
        drop_path: share of clips that skip a residual branch in training (MAE-ST's fine-tuning; initially 0).
        packed: see mae.attention (initially false).
    """

    def __init__(self, *, width: int, heads: int, mlp: int, gelu: str, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.gelu, self.drop_path, self.packed = heads, gelu, 0.0, False
        self.attention_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(width // heads, LAYER_NORM_EPS, bias=False) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.mlp_in = nn.Linear(width, mlp)
        self.mlp_out = nn.Linear(mlp, width)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """`B N D` -> `B N D`. angles: `N P` of rotary positions, see mae.attention.rotary."""
        B, N, D = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).reshape(B, N, 3, self.heads, D // self.heads).unbind(2)  # B N heads d
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotary(q, angles), rotary(k, angles)
        x = x + self._drop_path(self.out(attention(q, k, v, packed=self.packed).reshape(B, N, D)))
        return x + self._drop_path(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate=self.gelu)))

    def _drop_path(self, branch: Tensor) -> Tensor:
        """Stochastic depth. Draws from torch's global state, which training.fit seeds for every step."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class Backbone(nn.Module):
    """Backbone of 4DS: patch projection, learned 3-D positions, blocks; no class token, no final norm."""

    config_class = BackboneConfig
    gelu = "tanh"
    prefix_tokens = 0  # before those of the patches: MAE-ST's class token

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.width, self.depth, self.clip, self.patch = config.width, config.depth, tuple(config.clip), tuple(config.patch)
        self.grid = grid_of(self.clip, self.patch)
        self.pixel_mean, self.pixel_scale = config.pixel_mean, config.pixel_scale
        self.patch_embedding = nn.Linear(math.prod(self.patch) * 3, config.width)
        self.positions = nn.Parameter(torch.empty(math.prod(self.grid), config.width))  # N D
        self.blocks = nn.ModuleList(
            Block(width=config.width, heads=config.heads, mlp=config.mlp, gelu=self.gelu, qk_norm=config.qk_norm)
            for _ in range(config.depth)
        )

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 0..255 or float 0..1 -> the float values that the model computes with."""
        x = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.clone()
        return x.sub_(self.pixel_mean).mul_(self.pixel_scale)

    def position_table(self) -> Tensor:
        """`N D`."""
        return self.positions

    def embed_tokens(self, pixels: Tensor, masked: MaskedTokens | None = None) -> Tensor:
        """`B T H W C` -> `B K D`: the visible tokens (all without a mask), projected, with their positions."""
        if masked is None:
            return self.embed(patchify(pixels, self.patch)) + self.position_table()
        return self.embed(gather_patches(pixels, masked.ids_keep, self.patch)) + self.position_table()[masked.ids_keep]

    def embed(self, patches: Tensor) -> Tensor:
        """`B K P` -> `B K D`, in the dtype of the weights."""
        return self.patch_embedding(self.normalise(patches).to(self.patch_embedding.weight.dtype))

    def resize(self, clip: tuple[int, int, int]) -> None:
        """Take clips of another T H W from now on: cubic interpolation of the positions, as in the official demo.

        Raises UserError: the clip does not divide into patches.
        """
        grid = grid_of(clip, self.patch)
        if grid != self.grid:
            self.resize_positions(grid)
        self.clip, self.grid = tuple(clip), grid

    def resize_positions(self, grid: tuple[int, int, int]) -> None:
        self.positions = nn.Parameter(resize(self.positions.detach(), self.grid, grid))

    def init_sincos_positions(self) -> None:
        """Sine-cosine positions in place of random ones."""
        copy_to_param_(self.positions, sincos(self.grid, self.width))

    def last_tokens(self, pixels: Tensor, masked: MaskedTokens | None = None) -> Tensor:
        """Output of the last block, prefix tokens included. `features` ends before it."""
        x = self.embed_tokens(pixels, masked)
        for block in self.blocks:
            x = block(x)
        return x

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """Layers as the official code returns them: the tokens, then the INPUT of every block, each `B N D`.

        So [0] equals [1], and the output of the last block is not among them. layers: stop after so many entries.
        Source: GeneralizedTransformer of the released 4DS code.
        """
        x = self.embed_tokens(pixels)
        out = [x]
        for number in range(self.depth if layers is None else layers - 1):
            x = self.blocks[number - 1](x) if number else x
            out.append(x)
        return out


class PixelTokens(nn.Module):
    """The baseline without learning: a token is its patch's normalised pixels."""

    config_class = PixelTokensConfig
    normalise = Backbone.normalise

    def __init__(self, config: PixelTokensConfig) -> None:
        super().__init__()
        self.clip, self.patch, self.depth = tuple(config.clip), tuple(config.patch), 0
        self.grid = grid_of(self.clip, self.patch)
        self.pixel_mean, self.pixel_scale = config.pixel_mean, config.pixel_scale
        self.width = math.prod(self.patch) * 3

    def resize(self, clip: tuple[int, int, int]) -> None:
        """Take clips of another T H W from now on. Raises UserError: the clip does not divide into patches."""
        self.grid, self.clip = grid_of(clip, self.patch), tuple(clip)

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """One layer: `B N P`."""
        return [self.normalise(patchify(pixels, self.patch))]


class Method(nn.Module):
    """A masked autoencoder, or a student: an encoder, its masking, and `forward(pixels, masked)`, the loss."""

    xavier = False  # see initialise
    true_patch_statistics = False  # whether `reconstruct` takes each patch's mean and deviation from the true pixels
    encoder: Backbone

    def __init__(self, config: MethodConfig) -> None:
        super().__init__()
        self.config = config

    def initialise(self, seed: int) -> None:
        """Draw all weights; equal seeds give equal weights."""
        initialise(self, seed=seed, xavier=self.xavier)
        if self.config.branch_init == "by_depth":
            for module in self.modules():
                if isinstance(module, nn.ModuleList):
                    scale_branches(module)
        if self.config.position_init == "sincos":
            self.encoder.init_sincos_positions()

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """The encoder's features, as a method of the model: training.parallelize gathers or casts weights for it."""
        return self.encoder.features(pixels, layers)

    @property
    def visible_token_count(self) -> int:
        """K of `random_masking`."""
        return self.config.visible_token_count(self.encoder.grid)

    def draw_mask(self, batch: int, rng: torch.Generator) -> MaskedTokens:
        """Draw the visible tokens of a batch."""
        return self.mask_generator()(batch=batch, rng=rng)

    def mask_generator(self) -> partial[MaskedTokens]:
        """`random_masking` with the model's settings and without its weights, for the processes that decode clips."""
        config = self.config
        settings = {"grid": self.encoder.grid, "mask_ratio": config.mask_ratio, "round_down": config.round_visible_down}
        return partial(random_masking, config.masking, **settings)


def sincos(grid: tuple[int, int, int], width: int, step: tuple[float, float, float] = (1, 1, 1)) -> Tensor:
    """Sine-cosine table `N D` over the cells of a t h w grid, `step` fine cells apart and centred in each cell.

    A third of the channels (rounded to sine-cosine pairs) goes to each axis, the rest to time.
    """
    pairs = [width // 2 - 2 * (width // 6), width // 6, width // 6]
    tables = []
    for axis, (cells, count) in enumerate(zip(grid, pairs, strict=True)):
        at = (torch.arange(cells, dtype=torch.float64) + 0.5) * step[axis]
        angle = at[:, None] * 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
        table = torch.cat([angle.sin(), angle.cos()], dim=1)  # cells 2*count
        shape = [1, 1, 1, 2 * count]
        shape[axis] = cells
        tables.append(table.reshape(shape).expand(*grid, 2 * count))
    table = torch.cat(tables, dim=-1).reshape(math.prod(grid), -1).float()
    return F.pad(table, (0, width - table.shape[1]))


@torch.no_grad()
def initialise(module: nn.Module, *, seed: int, xavier: bool = False) -> None:
    """Draw every weight from the random stream of its own name, as the released 4DS code does.

    Truncated lecun-normal for projections and attention, xavier-uniform for layers named mlp (readout heads' too), zero
    biases, unit norms, N(0, 0.02) for learned tokens and positions. xavier: for all matrices, as mae_st (q, k and v
    each their own).
    """
    for name, weight in module.named_parameters():
        rng, value = seeds.torch_rng(seed, "init", name), torch.empty(weight.shape)
        if name.endswith("bias"):
            value.zero_()
        elif "norm" in name.split(".")[-2:][0]:
            value.fill_(1)
        elif not name.endswith("weight"):
            nn.init.normal_(value, std=0.02, generator=rng)
        elif xavier or "mlp_" in name:
            for part in value.chunk(3 if "qkv" in name else 1):
                nn.init.xavier_uniform_(part, generator=rng)
        else:
            std = math.sqrt(1 / value.shape[1]) / LECUN_STD
            nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=rng)
        copy_to_param_(weight, value)


@torch.no_grad()
def copy_to_param_(weight: Tensor, value: Tensor) -> None:
    """Set a parameter, plain or sharded. Every rank passes the whole value."""
    if hasattr(weight, "placements"):
        from torch.distributed.tensor import distribute_tensor  # half a second to import, which only sharded models need

        value = distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(value)


@torch.no_grad()
def scale_branches(blocks: nn.ModuleList) -> None:
    """Divide the last layer of every residual branch by sqrt(number of branches). Source: GPT-2, section 2.3."""
    for block in blocks:
        for last in (block.out, block.mlp_out):
            last.weight.div_(math.sqrt(2 * len(blocks)))
