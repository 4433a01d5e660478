"""The video transformer of both papers: patches + learned positions + pre-norm blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d import seeds
from scaling4d.mae.attention import attention
from scaling4d.mae.patches import grid_of, patchify, take
from scaling4d.mae.resize import resize
from scaling4d.records import MaskedTokens, UserError

LAYER_NORM_EPS = 1e-6  # both papers' code
LECUN_STD = 0.87962566103423978  # of a unit normal cut off at two sigma


class Block(nn.Module):
    """Sequential pre-norm block with biases: x + attention(norm x), then x + mlp(norm x).

    gelu: "tanh" in 4DS, "none" (exact) in MAE-ST, torch's names. drop_path: an attribute, the share of clips for which a
    residual branch is left out in training (MAE-ST's fine-tuning; 0 at first). packed: another, see mae.attention.
    """

    def __init__(self, *, width: int, heads: int, mlp: int, gelu: str) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} does not divide into {heads} heads")
        self.heads, self.gelu, self.drop_path, self.packed = heads, gelu, 0.0, False
        self.attention_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.mlp_in = nn.Linear(width, mlp)
        self.mlp_out = nn.Linear(mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        """`B N D` -> `B N D`."""
        B, N, D = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).reshape(B, N, 3, self.heads, D // self.heads).unbind(2)  # B N heads d
        x = x + self._dropped(self.out(attention(q, k, v, packed=self.packed).reshape(B, N, D)))
        return x + self._dropped(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate=self.gelu)))

    def _dropped(self, branch: Tensor) -> Tensor:
        """Stochastic depth, drawn from torch's global state (see readout.classifier, which seeds it)."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of a forward pass over one sequence (multiply and add count as two)."""
        matrices = sum(linear.weight.numel() for linear in (self.qkv, self.out, self.mlp_in, self.mlp_out))
        return 2 * tokens * matrices + 4 * tokens * tokens * self.out.in_features


class Encoder(nn.Module):
    """Backbone of 4DS: patch projection, learned 3-D positions, blocks; no class token, no final norm.

    clip: T H W. patch: pt ph pw. pixel_mean, pixel_scale: pixels in 0..1 become (x - mean) * scale (4DS: 0 and 1).
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
        gelu: str,
        pixel_mean: float,
        pixel_scale: float,
    ) -> None:
        super().__init__()
        self.width, self.depth, self.clip, self.patch = width, depth, tuple(clip), tuple(patch)
        self.grid = grid_of(self.clip, self.patch)
        self.pixel_mean, self.pixel_scale = pixel_mean, pixel_scale
        self.patch_embedding = nn.Linear(math.prod(patch) * 3, width)
        self.positions = nn.Parameter(torch.empty(math.prod(self.grid), width))  # N D
        self.blocks = nn.ModuleList(Block(width=width, heads=heads, mlp=mlp, gelu=gelu) for _ in range(depth))

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 0..255 or float 0..1 -> what the model computes with."""
        x = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.clone()
        return x.sub_(self.pixel_mean).mul_(self.pixel_scale)

    def tokens(self, pixels: Tensor, masked: MaskedTokens | None = None) -> Tensor:
        """`B T H W C` -> `B K D`: the kept tokens (all without a mask), projected, with their positions."""
        if masked is None:
            return self.embed(patchify(pixels, self.patch)) + self.positions
        return self.embed(take(pixels, masked.kept, self.patch)) + self.positions[masked.kept]

    def embed(self, patches: Tensor) -> Tensor:
        """`B K P` -> `B K D`, in the type of the weights."""
        return self.patch_embedding(self.normalise(patches).to(self.patch_embedding.weight.dtype))

    def resize(self, clip: tuple[int, int, int]) -> None:
        """Take clips of another T H W from now on: positions are resized by cubic interpolation, as the official demo does.

        Raises:
            UserError: the clip does not divide into patches.
        """
        grid = grid_of(clip, self.patch)
        if grid != self.grid:
            self.resize_positions(grid)
        self.clip, self.grid = tuple(clip), grid

    def resize_positions(self, grid: tuple[int, int, int]) -> None:
        self.positions = nn.Parameter(resize(self.positions.detach(), self.grid, grid))

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """Layers as the official code returns them: the tokens, then the INPUT of every block, each `B N D`.

        So [0] equals [1], and the output of the last block is not among them; `layers` stops after so many entries.
        Source: FACTS of the released 4DS code (GeneralizedTransformer).
        """
        x = self.tokens(pixels)
        out = [x]
        for number in range(self.depth if layers is None else layers - 1):
            x = self.blocks[number - 1](x) if number else x
            out.append(x)
        return out


class PixelTokens(nn.Module):
    """The baseline without any learning: a token is its patch's normalised pixels."""

    def __init__(self, *, clip: tuple[int, int, int], patch: tuple[int, int, int], pixel_mean: float, pixel_scale: float) -> None:
        super().__init__()
        self.clip, self.patch, self.depth = tuple(clip), tuple(patch), 0
        self.grid = grid_of(self.clip, self.patch)
        self.pixel_mean, self.pixel_scale = pixel_mean, pixel_scale
        self.width = math.prod(self.patch) * 3

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """One layer: `B N P`."""
        x = patchify(pixels, self.patch)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return [(x - self.pixel_mean) * self.pixel_scale]


def sincos(grid: tuple[int, int, int], width: int, step: tuple[float, float, float] = (1, 1, 1)) -> Tensor:
    """Sine-cosine table `N D` over the cells of a t h w grid, `step` fine cells apart and centred in each cell.

    A third of the channels (rounded to sine-cosine pairs) goes to each axis, what is left over to time.
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
def initialise(module: nn.Module, *, seed: int) -> None:
    """Draw every weight from the stream of its own name.

    Truncated lecun-normal for projections and attention, xavier-uniform for the blocks' mlp, zero biases, unit norms,
    N(0, 0.02) for learned tokens and positions: as the released 4DS code.
    """
    for name, weight in module.named_parameters():
        rng, value = seeds.stream(seed, "init", name), torch.empty(weight.shape)
        if name.endswith("bias"):
            value.zero_()
        elif "norm" in name.split(".")[-2:][0]:
            value.fill_(1)
        elif not name.endswith("weight"):
            nn.init.normal_(value, std=0.02, generator=rng)
        elif "mlp_" in name:
            nn.init.xavier_uniform_(value, generator=rng)
        else:
            std = math.sqrt(1 / value.shape[1]) / LECUN_STD
            nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=rng)
        put(weight, value)


@torch.no_grad()
def put(weight: Tensor, value: Tensor) -> None:
    """Give a parameter, which may be sharded, its value; every rank has the whole value and keeps its part."""
    if hasattr(weight, "placements"):
        from torch.distributed.tensor import distribute_tensor  # half a second to import, which only sharded models need

        value = distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(value)


@torch.no_grad()
def scale_branches(blocks: nn.ModuleList) -> None:
    """Divide the last layers of all residual branches by sqrt(number of branches), so that depth does not add up at the start.

    Source: GPT-2 (section 2.3 of its paper). Neither 4DS nor MAE-ST does so.
    """
    for block in blocks:
        for last in (block.out, block.mlp_out):
            last.weight.div_(math.sqrt(2 * len(blocks)))
