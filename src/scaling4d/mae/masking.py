"""Which tokens the encoder sees."""

from __future__ import annotations

import torch

from scaling4d.records import MaskedTokens, UserError


def random_keep(*, batch: int, grid: tuple[int, int, int], mask_ratio: float, rng: torch.Generator) -> MaskedTokens:
    """Keep a random set of tokens, independently for every clip, blind to space and time.

    Args:
        mask_ratio: fraction hidden, in (0, 1).
        rng: the only source of randomness; same state, same choice.
    Returns:
        K = round(N * (1 - mask_ratio)) kept tokens a clip, ascending.
    Raises:
        UserError: mask_ratio outside (0, 1), or so high that no token is left.
    Source: arXiv:2412.15212 (95 %, no tubes), arXiv:2205.09113 (90 %, space-time agnostic).
    """
    tokens = grid[0] * grid[1] * grid[2]
    keep = round(tokens * (1 - mask_ratio))
    if not 0 < mask_ratio < 1 or keep < 1:
        raise UserError(
            f"mask_ratio = {mask_ratio} keeps {keep} of {tokens} tokens; set mask_ratio in (0, 1), low enough to keep one"
        )
    noise = torch.rand(batch, tokens, generator=rng)
    return MaskedTokens(noise.argsort(dim=1)[:, :keep].sort(dim=1).values, grid)
