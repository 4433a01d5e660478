"""Which tokens the encoder sees."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scaling4d.records import MaskedTokens, UserError

Grid = tuple[int, int, int]
BLOCK_SHARE = (0.1, 0.4)  # of the hidden tokens, in one block; ours


def keep(strategy: str, *, batch: int, grid: Grid, mask_ratio: float, rng: torch.Generator) -> MaskedTokens:
    """Choose what the encoder sees, independently for every clip.

    Args:
        strategy: random (blind to space and time), tube (the same places in every frame), frame (whole frames) or
          block (what is hidden are space-time blocks).
        mask_ratio: fraction hidden, in (0, 1).
        rng: the only source of randomness; same state, same choice.
    Returns:
        The same number of tokens for every clip, see `kept_tokens`, ascending.
    Raises:
        UserError: an unknown strategy, mask_ratio outside (0, 1), or so high that no token is left.
    Source: arXiv:2412.15212 (random, 95 %), arXiv:2205.09113 (random, 90 %, and the other three compared with it; how it draws
      its blocks is not published: ours).
    """
    kept_tokens(strategy, grid, mask_ratio)
    return MaskedTokens(STRATEGIES[strategy](batch, grid, mask_ratio, rng), grid)


def kept_tokens(strategy: str, grid: Grid, mask_ratio: float) -> int:
    """How many of the N tokens are kept: the nearest whole number of tokens, of places (tube) or of frames (frame)."""
    if strategy not in STRATEGIES:
        raise UserError(f"masking = {strategy!r}; needed one of {', '.join(STRATEGIES)}")
    t, h, w = grid
    whole, unit, things = {"tube": (h * w, t, "places"), "frame": (t, h * w, "frames")}.get(strategy, (t * h * w, 1, "tokens"))
    count = round(whole * (1 - mask_ratio))
    if not 0 < mask_ratio < 1 or count < 1:
        raise UserError(
            f"mask_ratio = {mask_ratio} keeps {count} of {whole} {things}; set mask_ratio in (0, 1), low enough to keep one"
        )
    return count * unit


def _random(batch: int, grid: Grid, mask_ratio: float, rng: torch.Generator) -> Tensor:
    return _some(batch, math.prod(grid), mask_ratio, rng)


def _tube(batch: int, grid: Grid, mask_ratio: float, rng: torch.Generator) -> Tensor:
    places = grid[1] * grid[2]
    kept = _some(batch, places, mask_ratio, rng)
    return (torch.arange(grid[0])[:, None] * places + kept[:, None]).flatten(1)


def _frame(batch: int, grid: Grid, mask_ratio: float, rng: torch.Generator) -> Tensor:
    places = grid[1] * grid[2]
    kept = _some(batch, grid[0], mask_ratio, rng)
    return (kept[:, :, None] * places + torch.arange(places)).flatten(1)


def _block(batch: int, grid: Grid, mask_ratio: float, rng: torch.Generator) -> Tensor:
    """Blocks of random size and place, one over the other, until enough is hidden; the last one shows a random part of itself."""
    tokens = math.prod(grid)
    wanted = tokens - kept_tokens("block", grid, mask_ratio)
    rows = []
    for _ in range(batch):
        hidden = torch.zeros(grid, dtype=torch.bool)
        while True:
            share = BLOCK_SHARE[0] + (BLOCK_SHARE[1] - BLOCK_SHARE[0]) * torch.rand((), generator=rng).item()
            edge = (share * wanted / tokens) ** (1 / 3)  # of the whole, in each axis
            size = [max(1, round(edge * n)) for n in grid]
            at = [int(torch.randint(n - k + 1, (), generator=rng)) for n, k in zip(grid, size, strict=True)]
            before = hidden.clone()
            hidden[tuple(slice(a, a + k) for a, k in zip(at, size, strict=True))] = True
            over = int(hidden.sum()) - wanted
            if over >= 0:
                new = (hidden & ~before).flatten().nonzero()[:, 0]
                hidden.view(-1)[new[torch.randperm(len(new), generator=rng)[:over]]] = False
                break
        rows.append((~hidden).flatten().nonzero()[:, 0])
    return torch.stack(rows)


def _some(batch: int, things: int, mask_ratio: float, rng: torch.Generator) -> Tensor:
    """`batch` times round(things * (1 - mask_ratio)) of `things`, ascending."""
    noise = torch.rand(batch, things, generator=rng)
    return noise.argsort(dim=1)[:, : round(things * (1 - mask_ratio))].sort(dim=1).values


STRATEGIES: dict[str, Callable[[int, Grid, float, torch.Generator], Tensor]] = {
    "random": _random,
    "tube": _tube,
    "frame": _frame,
    "block": _block,
}
