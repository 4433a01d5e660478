"""Pixels <-> patches."""

from __future__ import annotations

import torch
from torch import Tensor

from scaling4d.records import UserError


def grid_of(clip: tuple[int, int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Token grid t h w of a clip T H W.

    Raises:
        UserError: the clip does not divide into patches.
    """
    if any(side % part for side, part in zip(clip, patch, strict=True)):
        raise UserError(f"clip T H W = {tuple(clip)} does not divide into patches {tuple(patch)}; set them to multiples")
    return tuple(side // part for side, part in zip(clip, patch, strict=True))


def _split(pixels: Tensor, patch: tuple[int, int, int]) -> Tensor:
    B, T, H, W, C = pixels.shape
    t, h, w = grid_of((T, H, W), patch)
    pt, ph, pw = patch
    return pixels.reshape(B, t, pt, h, ph, w, pw, C).permute(0, 1, 3, 5, 2, 4, 6, 7)  # B t h w pt ph pw C


def patchify(pixels: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """`B T H W C` -> `B N P` of the same dtype; tokens run over t, h, w and values over pt, ph, pw, C (row-major)."""
    x = _split(pixels, patch)
    return x.reshape(x.shape[0], -1, x.shape[4:].numel())  # B N P


def gather_patches(pixels: Tensor, ids_keep: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """`B T H W C`, `B K` -> `B K P`: `patchify(pixels)` gathered at `ids_keep`. Copies no other patch."""
    x = _split(pixels, patch)
    _, h, w = x.shape[1:4]
    clip = torch.arange(x.shape[0], device=x.device)[:, None]  # B 1
    x = x[clip, ids_keep // (h * w), ids_keep // w % h, ids_keep % w]  # B K pt ph pw C
    return x.flatten(2)  # B K P


def unpatchify(patches: Tensor, clip: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """`B N P` -> `B T H W C`; the inverse of `patchify`."""
    t, h, w = grid_of(clip, patch)
    x = patches.reshape(patches.shape[0], t, h, w, *patch, -1)  # B t h w pt ph pw C
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(patches.shape[0], *clip, -1)  # B T H W C
