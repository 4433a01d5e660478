"""RVM, the recurrent encoder of representations4d. A ViT encodes each frame; a gated core carries a state on.

Source: arXiv:2512.13684, and the inference demo of google-deepmind/representations4d. Its decoder is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d.config import require_sizes
from scaling4d.mae.attention import attention
from scaling4d.mae.encoder import LAYER_NORM_EPS, MOST_BLOCKS, Block
from scaling4d.mae.patches import grid_of, patchify
from scaling4d.mae.resize import resize
from scaling4d.mae.vit import sinusoid

BASE_GRID = (16, 16)  # h w of the positions, which other grids interpolate
STATE_NORM_EPS = 1e-4


@dataclass(frozen=True, kw_only=True)
class RVMConfig:
    """clip: T H W. patch: 1 ph pw. width: D. depth, heads, mlp: of the frame encoder. core_*: the same of the core."""

    clip: tuple[int, int, int]
    patch: tuple[int, int, int]
    width: int
    depth: int
    heads: int
    mlp: int
    core_depth: int
    core_heads: int
    core_mlp: int

    def __post_init__(self) -> None:
        require_sizes(self, "clip", "patch", "width", "heads", "mlp", "core_heads", "core_mlp")
        require_sizes(self, "depth", "core_depth", most=MOST_BLOCKS)
        grid_of(self.clip, self.patch)
        if self.width % self.heads or self.width % self.core_heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} and {self.core_heads} heads")


class CrossBlock(nn.Module):
    """Block of the core: x + attention(norm x, memory), then x + mlp(norm x), then x + attention(norm x)."""

    def __init__(self, *, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.cross_norm, self.mlp_norm, self.attention_norm = (nn.LayerNorm(width, LAYER_NORM_EPS) for _ in range(3))
        self.q, self.kv, self.cross_out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """`B N D`, `B M D` -> `B N D`."""
        heads = (self.heads, -1)
        q, kv = self.q(self.cross_norm(x)).unflatten(-1, heads), self.kv(memory)
        k, v = (y.unflatten(-1, heads) for y in kv.chunk(2, dim=-1))  # B M heads d
        x = x + self.cross_out(attention(q, k, v).flatten(2))
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))
        q, k, v = (y.unflatten(-1, heads) for y in self.qkv(self.attention_norm(x)).chunk(3, dim=-1))  # B N heads d
        return x + self.out(attention(q, k, v).flatten(2))


class RVM(nn.Module):
    """Frame encoder and gated core. Features of a frame depend on it and on the frames before it.

    Attributes:
        depth: blocks of the frame encoder and of the core.
    """

    config_class = RVMConfig

    def __init__(self, config: RVMConfig) -> None:
        super().__init__()
        width = config.width
        self.width, self.depth = width, config.depth + config.core_depth
        self.clip, self.patch, self.grid = tuple(config.clip), tuple(config.patch), grid_of(config.clip, config.patch)
        self.pixel_mean, self.pixel_scale = 0.0, 1.0
        self.patch_embedding = nn.Linear(math.prod(self.patch) * 3, width)
        self.class_token = nn.Parameter(torch.empty(1, width))
        self.register_buffer("positions", torch.empty(math.prod(self.grid[1:]), width))  # h*w D
        self.frame_blocks = nn.ModuleList(
            Block(width=width, heads=config.heads, mlp=config.mlp, gelu="tanh") for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.input_gates, self.state_gates = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))  # update, reset
        self.state_norm = nn.LayerNorm(width, STATE_NORM_EPS, bias=False)
        self.core_blocks = nn.ModuleList(
            CrossBlock(width=width, heads=config.core_heads, mlp=config.core_mlp) for _ in range(config.core_depth)
        )
        self.core_norm = nn.LayerNorm(width, LAYER_NORM_EPS)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """In the order of the forward pass of a frame."""
        return (*self.frame_blocks, *self.core_blocks)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 0..255 -> float 0..1; floats stay. The official demo does no more."""
        return pixels.float().div(255) if pixels.dtype == torch.uint8 else pixels

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """The tokens, then the output of each block, each `B N D`, of all frames of a clip that starts without a state.

        Blocks of the frame encoder come first, then those of the core. The last entry is the state, which the official
        demo takes as features. Class tokens are left out. layers: number of entries.
        """
        B, T = pixels.shape[:2]
        frames = [x.unflatten(0, (B, T)) for x in self._encode(pixels.flatten(0, 1), layers)]  # each B T 1+n D
        if layers is None or layers > len(self.frame_blocks) + 1:
            encoded, state, steps = self.norm(frames[-1]), None, []
            for t in range(T):
                steps.append(self._advance(encoded[:, t], state))
                state = steps[-1][-1]
            frames += [torch.stack(block, dim=1) for block in zip(*steps, strict=True)]
        return [x[:, :, 1:].flatten(1, 2) for x in frames[:layers]]

    def step(self, frame: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One frame of a stream: `B H W C` and the state after the frame before -> features `B n D`, state `B 1+n D`.

        state: None before the first frame.
        """
        state = self._advance(self.norm(self._encode(frame)[-1]), state)[-1]
        return state[:, 1:], state

    def _encode(self, frames: Tensor, layers: int | None = None) -> list[Tensor]:
        """Frames `B H W C` -> the tokens, then the output of each block of the frame encoder, `B 1+n D`."""
        patches = patchify(self.normalise(frames[:, None]), self.patch).to(self.patch_embedding.weight.dtype)  # B n P
        x = self.patch_embedding(patches) + self.positions
        out = [torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)]
        for block in self.frame_blocks[: None if layers is None else layers - 1]:
            out.append(block(out[-1]))
        return out

    def _advance(self, x: Tensor, state: Tensor | None) -> list[Tensor]:
        """An encoded frame and the state -> the output of each block of the core but the last, then the new state."""
        state = torch.zeros_like(x) if state is None else state
        update, reset = (self.input_gates(x) + self.state_gates(state)).sigmoid().chunk(2, dim=-1)
        memory, out = reset * self.state_norm(state), [x]
        for block in self.core_blocks:
            out.append(block(out[-1], memory))
        return [*out[1:-1], (1 - update) * state + update * self.core_norm(out[-1])]

    def resize(self, clip: tuple[int, int, int]) -> None:
        """Take clips of another T H W from now on: cubic interpolation of the positions, as in the official demo.

        Raises UserError: the clip does not divide into patches.
        """
        grid = grid_of(clip, self.patch)
        if grid[1:] != self.grid[1:]:
            self.positions = frame_positions(grid, self.width).to(self.positions)
        self.clip, self.grid = tuple(clip), grid


def frame_positions(grid: tuple[int, int, int], width: int) -> Tensor:
    """Table `n D` of a frame's places."""
    return resize(sinusoid(math.prod(BASE_GRID), width), (1, *BASE_GRID), (1, *grid[1:]))
