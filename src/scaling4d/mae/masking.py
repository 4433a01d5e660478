"""Random masks: the tokens that stay visible, by one of four strategies (random, tube, frame, block)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scaling4d import seeds
from scaling4d.mae.patches import unpatchify
from scaling4d.records import MaskedTokens, UserError, did_you_mean

Grid = tuple[int, int, int]
STRATEGIES = ("random", "tube", "frame", "block")
BLOCK_SHARE = (0.02, 0.08)  # of all tokens, in one block; ours
MASK_GROUP = 8  # clips whose masks are one draw: a clip's mask is the same on any number of ranks


def draw_masks(draw: Callable[..., MaskedTokens], seed: int, step: int, *, first: int, count: int) -> MaskedTokens:
    """Masks of the clips `first` ... `first + count - 1` of a step's batch, each of seed, step and place alone.

    draw: batch and rng -> masks, a model's `mask_generator`.
    """
    groups = range(first // MASK_GROUP, -(-(first + count) // MASK_GROUP))
    drawn = [draw(batch=MASK_GROUP, rng=seeds.torch_rng(seed, "mask", step, group)) for group in groups]
    skipped = first - groups[0] * MASK_GROUP
    return MaskedTokens(torch.cat([masked.ids_keep for masked in drawn])[skipped : skipped + count], drawn[0].grid)


def random_masking(
    strategy: str, *, batch: int, grid: Grid, mask_ratio: float, rng: torch.Generator, round_down: bool = False
) -> MaskedTokens:
    """Draw the visible tokens, independently for every clip. `Method.draw_mask` calls it, and `reconstruct`.

    Args:
        strategy: random (blind to space and time), tube (the same places in every frame), frame (whole frames) or block
            (the hidden tokens form space-time blocks).
        mask_ratio: fraction hidden, in (0, 1).
        rng: the only source of randomness; same state, same draw.
        round_down: see `visible_token_count`.
    Returns:
        ids_keep `B K`, ascending; K is the same for every clip.
    Raises:
        UserError: as `visible_token_count`.
    Source: arXiv:2412.15212 (random, 95 %); arXiv:2205.09113 (random, 90 %, compared with the other three; its blocks
      are not published: ours).
    """
    count = visible_token_count(strategy, grid, mask_ratio, round_down=round_down)
    if strategy == "block":
        visible = torch.stack([_visible_beside_blocks(grid, count, rng) for _ in range(batch)])  # B N
    else:
        units = _units(strategy, grid)
        drawn = math.prod(units) * count // math.prod(grid)
        ids = torch.rand(batch, math.prod(units), generator=rng).topk(drawn, largest=False, sorted=False).indices
        visible = torch.zeros(batch, math.prod(units), dtype=torch.bool).scatter(1, ids, True)
        visible = visible.reshape(batch, *units).expand(batch, *grid).flatten(1)  # B N
    return MaskedTokens(visible.nonzero()[:, 1].reshape(batch, count), grid)


def visible_token_count(strategy: str, grid: Grid, mask_ratio: float, *, round_down: bool = False) -> int:
    """K, the number of visible tokens (mae_st's `len_keep`): whole tokens, places (tube) or frames (frame).

    Args:
        round_down: round K down, as mae_st's code does, instead of to the nearest.
    Raises:
        UserError: unknown strategy, mask_ratio outside (0, 1), no visible token, or no hidden one.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"masking = {strategy!r}; needed one of {', '.join(STRATEGIES)}{did_you_mean(strategy, STRATEGIES)}")
    total = math.prod(_units(strategy, grid))
    exact = total * (1 - mask_ratio)
    count = int(exact) if round_down else round(exact)
    if not 0 < mask_ratio < 1 or not 0 < count < total:
        units = {"tube": "places", "frame": "frames"}.get(strategy, "tokens")
        raise UserError(
            f"mask_ratio = {mask_ratio} keeps {count} of {total} {units}; set it in (0, 1) so that some are kept and some hidden"
        )
    return count * math.prod(grid) // total


def hidden_pixels(masked: MaskedTokens, clip: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """float `B T H W 1`: 1 at hidden pixels, 0 at visible ones."""
    ids_keep = masked.ids_keep
    hidden = torch.ones(ids_keep.shape[0], masked.token_count, device=ids_keep.device).scatter(1, ids_keep, 0.0)  # B N
    return unpatchify(hidden[..., None].expand(-1, -1, math.prod(patch)), clip, patch)


def _units(strategy: str, grid: Grid) -> Grid:
    """Grid of the units that are drawn: places (tube), frames, or tokens."""
    return {"tube": (1, *grid[1:]), "frame": (grid[0], 1, 1)}.get(strategy, grid)


def _visible_beside_blocks(grid: Grid, count: int, rng: torch.Generator) -> Tensor:
    """bool `N`: hide random blocks of a clip until `count` tokens are left; part of the last block stays."""
    hidden, wanted = torch.zeros(grid, dtype=torch.bool), math.prod(grid) - count
    while True:
        share = BLOCK_SHARE[0] + (BLOCK_SHARE[1] - BLOCK_SHARE[0]) * torch.rand((), generator=rng).item()
        size = [max(1, round(share ** (1 / 3) * n)) for n in grid]
        reach = [n + k - 1 for n, k in zip(grid, size, strict=True)]  # blocks may stick out, or the middle is hidden most
        corner = [int(torch.randint(r, (), generator=rng)) - k + 1 for r, k in zip(reach, size, strict=True)]
        before = hidden.clone()
        hidden[tuple(slice(max(a, 0), a + k) for a, k in zip(corner, size, strict=True))] = True
        excess = int(hidden.sum()) - wanted
        if excess >= 0:
            new = (hidden & ~before).flatten().nonzero()[:, 0]
            hidden.view(-1)[new[torch.randperm(len(new), generator=rng)[:excess]]] = False
            return ~hidden.flatten()
