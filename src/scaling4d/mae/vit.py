"""The ViT over space-time patches that others published as VideoMAE v2, V-JEPA and V-JEPA 2.1.

All have pre-norm blocks with exact GELU, fixed positions, and no class token. Sources: arXiv:2303.16727 and
OpenGVLab/VideoMAEv2; arXiv:2404.08471 and facebookresearch/jepa; facebookresearch/vjepa2, `app/vjepa_2_1` (MIT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d.config import require_sizes
from scaling4d.mae.encoder import MOST_BLOCKS, Block
from scaling4d.mae.patches import grid_of, patchify

VJEPA21_SIDE_PX = 256  # of most of its pretraining, also in the encoders released for 384 px


@dataclass(frozen=True, kw_only=True)
class VideoViTConfig:
    """A published ViT.

    clip: T H W. patch: pt ph pw. width: D. depth: number of blocks. mlp: hidden width of a block's mlp.
    mean, std: of each channel of pixels in 0..1, with which the official code normalises.
    """

    clip: tuple[int, int, int]
    patch: tuple[int, int, int]
    width: int
    depth: int
    heads: int
    mlp: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        require_sizes(self, "clip", "patch", "width", "heads", "mlp")
        require_sizes(self, "depth", most=MOST_BLOCKS)
        grid_of(self.clip, self.patch)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if min(self.std) <= 0:
            raise ValueError(f"std = {self.std}; needed numbers above 0")


class VideoViT(nn.Module):
    """Patch projection and blocks; no final norm. A subclass adds positions."""

    config_class = VideoViTConfig

    def __init__(self, config: VideoViTConfig) -> None:
        super().__init__()
        self.width, self.depth, self.clip, self.patch = config.width, config.depth, tuple(config.clip), tuple(config.patch)
        self.grid = grid_of(self.clip, self.patch)
        self.pixel_mean, self.pixel_scale = tuple(config.mean), tuple(1 / value for value in config.std)
        self.patch_embedding = nn.Linear(math.prod(self.patch) * 3, config.width)
        self.blocks = nn.ModuleList(
            Block(width=config.width, heads=config.heads, mlp=config.mlp, gelu="none") for _ in range(config.depth)
        )

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 0..255 or float 0..1, channels last -> the float values that the model computes with."""
        x = pixels.float().div(255) if pixels.dtype == torch.uint8 else pixels
        mean, scale = (torch.tensor(values, device=x.device) for values in (self.pixel_mean, self.pixel_scale))
        return (x - mean) * scale

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """The tokens, then the output of each block, each `B N D`. layers: number of entries."""
        patches = patchify(self.normalise(pixels), self.patch)  # B N P
        x, angles = self.place(self.patch_embedding(patches.to(self.patch_embedding.weight.dtype)))
        out = [x]
        for block in self.blocks[: self.depth if layers is None else layers - 1]:
            x = block(x, angles)
            out.append(x)
        return out

    def place(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Projected patches `B N D` -> tokens, and the angles `N P` by which the blocks turn queries and keys."""
        raise NotImplementedError

    def resize(self, clip: tuple[int, int, int]) -> None:
        """Take clips of another T H W from now on. Raises UserError: the clip does not divide into patches."""
        self.grid = grid_of(clip, self.patch)
        self.clip = tuple(clip)


class SinusoidViT(VideoViT):
    """Adds a table of sines and cosines to the tokens. Subclasses define the step to another grid."""

    def __init__(self, config: VideoViTConfig) -> None:
        super().__init__(config)
        self.register_buffer("positions", torch.empty(math.prod(self.grid), config.width))  # N D

    def place(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.positions, None

    def resize(self, clip: tuple[int, int, int]) -> None:
        grid = grid_of(clip, self.patch)
        if grid != self.grid:
            self.positions = self.resized_positions(grid).to(self.positions)
        super().resize(clip)

    def resized_positions(self, grid: tuple[int, int, int]) -> Tensor:
        """`N D` of another grid t h w."""
        raise NotImplementedError


class VideoMAE2(SinusoidViT):
    """Encoder of VideoMAE v2. Its positions are sines and cosines of a token's number, made anew for another grid."""

    def resized_positions(self, grid: tuple[int, int, int]) -> Tensor:
        return sinusoid(math.prod(grid), self.width)


class VJEPA(SinusoidViT):
    """Encoder of V-JEPA, first version. Its positions are interpolated trilinearly for another grid."""

    def resized_positions(self, grid: tuple[int, int, int]) -> Tensor:
        table = self.positions.float().reshape(1, *self.grid, -1).movedim(-1, 1)  # 1 D t h w
        return F.interpolate(table, grid, mode="trilinear")[0].flatten(1).T.contiguous()


class VJEPA21(VideoViT):
    """Encoder of V-JEPA 2.1 for videos. Positions are rotary; those in space span the pretraining's grid at any size.

    The bias of the patch projection includes the embedding of videos. The second patch projection, for images, and the
    norms of four layers' outputs are left out.
    """

    def place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        head_width = self.width // self.blocks[0].heads
        return x, vjepa21_angles(self.grid, self.patch[1], head_width, x.device)


def sinusoid(tokens: int, width: int) -> Tensor:
    """Table `N D` of token numbers: sines in even channels, cosines in odd ones. Source: arXiv:1706.03762, 3.5."""
    at = torch.arange(tokens, dtype=torch.float64)[:, None]
    angle = at * 10000.0 ** (-2.0 * torch.arange((width + 1) // 2, dtype=torch.float64) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width].float()


def vjepa_positions(grid: tuple[int, int, int], width: int) -> Tensor:
    """V-JEPA's table `N D`: a third of the channels, rounded up to even, for each of time, height and width.

    Each third has sines, then cosines. The last channels that are too many are left out.
    """
    third = 2 * math.ceil(width / 6)
    rates = 10000.0 ** (-2.0 * torch.arange(third // 2, dtype=torch.float64) / third)
    angles = torch.cartesian_prod(*(torch.arange(cells, dtype=torch.float64) for cells in grid))[..., None] * rates  # N 3 d
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].float()


def vjepa21_angles(grid: tuple[int, int, int], patch_px: int, head_width: int, device: torch.device) -> Tensor:
    """V-JEPA 2.1's rotary angles `N P`, float32: P/3 rates for each of time, height and width.

    Time counts tokens. Height and width run from 0 to the last place of the pretraining's grid, whatever h and w are. A
    side of one token, where the official code divides by zero, is at 0.
    """
    last = VJEPA21_SIDE_PX // patch_px - 1
    steps = (1.0, *(last / max(cells - 1, 1) for cells in grid[1:]))
    exact = {"dtype": torch.float64, "device": device}
    places = (step * torch.arange(cells, **exact) for step, cells in zip(steps, grid, strict=True))
    count = head_width // 6
    rates = 10000.0 ** (-torch.arange(count, **exact) / count)
    return (torch.cartesian_prod(*places)[..., None] * rates).flatten(1).float()  # N 3*count
