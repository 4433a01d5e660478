"""Which tokens the encoder sees."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scaling4d.records import MaskedTokens, UserError

Grid = tuple[int, int, int]
BLOCK_SHARE = (0.02, 0.08)  # of all tokens, in one block; ours


def keep(strategy: str, *, batch: int, grid: Grid, mask_ratio: float, rng: torch.Generator, down: bool = False) -> MaskedTokens:
    """Choose what the encoder sees, independently for every clip.

    Args:
        strategy: random (blind to space and time), tube (the same places in every frame), frame (whole frames) or
          block (what is hidden are space-time blocks).
        mask_ratio: fraction hidden, in (0, 1).
        down: round the number of kept things down, as mae_st's code does, instead of to the nearest.
        rng: the only source of randomness; same state, same choice.
    Returns:
        The same number of tokens for every clip, see `kept_tokens`, ascending.
    Raises:
        UserError: an unknown strategy, mask_ratio outside (0, 1), so high that no token is left, or so low that none is hidden.
    Source: arXiv:2412.15212 (random, 95 %), arXiv:2205.09113 (random, 90 %, and the other three compared with it; how it draws
      its blocks is not published: ours).
    """
    unit = _unit(strategy, grid)
    count = kept_tokens(strategy, grid, mask_ratio, down=down) // unit
    return MaskedTokens(STRATEGIES[strategy](batch, grid, count, rng), grid)


def kept_tokens(strategy: str, grid: Grid, mask_ratio: float, *, down: bool = False) -> int:
    """How many of the N tokens are kept: a whole number of tokens, of places (tube) or of frames (frame)."""
    if strategy not in STRATEGIES:
        raise UserError(f"masking = {strategy!r}; needed one of {', '.join(STRATEGIES)}")
    unit = _unit(strategy, grid)
    whole = math.prod(grid) // unit
    exact = whole * (1 - mask_ratio)
    count = int(exact) if down else round(exact)
    if not 0 < mask_ratio < 1 or not 0 < count < whole:
        things = {"tube": "places", "frame": "frames"}.get(strategy, "tokens")
        raise UserError(
            f"mask_ratio = {mask_ratio} keeps {count} of {whole} {things}; set it in (0, 1) so that some are kept and some hidden"
        )
    return count * unit


def _unit(strategy: str, grid: Grid) -> int:
    """Tokens that are kept or hidden together."""
    return {"tube": grid[0], "frame": grid[1] * grid[2]}.get(strategy, 1)


def _random(batch: int, grid: Grid, count: int, rng: torch.Generator) -> Tensor:
    return _some(batch, math.prod(grid), count, rng)


def _tube(batch: int, grid: Grid, count: int, rng: torch.Generator) -> Tensor:
    places = grid[1] * grid[2]
    kept = _some(batch, places, count, rng)
    return (torch.arange(grid[0])[:, None] * places + kept[:, None]).flatten(1)


def _frame(batch: int, grid: Grid, count: int, rng: torch.Generator) -> Tensor:
    places = grid[1] * grid[2]
    kept = _some(batch, grid[0], count, rng)
    return (kept[:, :, None] * places + torch.arange(places)).flatten(1)


def _block(batch: int, grid: Grid, count: int, rng: torch.Generator) -> Tensor:
    """Blocks of random size and place, one over the other, until enough is hidden; the last one shows a random part of itself."""
    wanted = math.prod(grid) - count
    rows = []
    for _ in range(batch):
        hidden = torch.zeros(grid, dtype=torch.bool)
        while True:
            share = BLOCK_SHARE[0] + (BLOCK_SHARE[1] - BLOCK_SHARE[0]) * torch.rand((), generator=rng).item()
            size = [max(1, round(share ** (1 / 3) * n)) for n in grid]
            reach = [n + k - 1 for n, k in zip(grid, size, strict=True)]  # may stick out, or the middle would be hidden most
            at = [int(torch.randint(r, (), generator=rng)) - k + 1 for r, k in zip(reach, size, strict=True)]
            before = hidden.clone()
            hidden[tuple(slice(max(a, 0), a + k) for a, k in zip(at, size, strict=True))] = True
            over = int(hidden.sum()) - wanted
            if over >= 0:
                new = (hidden & ~before).flatten().nonzero()[:, 0]
                hidden.view(-1)[new[torch.randperm(len(new), generator=rng)[:over]]] = False
                break
        rows.append((~hidden).flatten().nonzero()[:, 0])
    return torch.stack(rows)


def _some(batch: int, things: int, count: int, rng: torch.Generator) -> Tensor:
    """`batch` times `count` of `things`, ascending."""
    return torch.rand(batch, things, generator=rng).argsort(dim=1)[:, :count].sort(dim=1).values


STRATEGIES: dict[str, Callable[[int, Grid, int, torch.Generator], Tensor]] = {
    "random": _random,
    "tube": _tube,
    "frame": _frame,
    "block": _block,
}
