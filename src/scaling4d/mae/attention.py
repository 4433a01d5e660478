"""Scaled dot-product attention: xformers on CUDA, torch elsewhere; one function, same answer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNED = 8  # values


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, packed: bool = False) -> Tensor:
    """`B Q heads d`, `B N heads d`, `B N heads d` -> `B Q heads d`.

    Scores are multiplied by `scale`, 1/sqrt(d) unless told. packed: all clips are one sequence in which each sees itself alone.
    """
    if packed:
        return _packed(q, k, v, scale)
    if q.is_cuda:
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(*aligned(q, k, v), scale=scale or q.shape[-1] ** -0.5)[..., : v.shape[-1]]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B heads N d
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def aligned(*tensors: Tensor) -> list[Tensor]:
    """With zeros behind the last axis, up to a multiple of what xformers' kernels need; they change no score and no sum."""
    return [F.pad(x, (0, -x.shape[-1] % ALIGNED)) if x.shape[-1] % ALIGNED else x for x in tensors]


def _packed(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    B, Q, N = *q.shape[:2], k.shape[1]
    one = [x.flatten(0, 1)[None] for x in (q, k, v)]  # 1 B*N heads d
    if q.is_cuda:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        out = memory_efficient_attention(*one, attn_bias=BlockDiagonalMask.from_seqlens([Q] * B, [N] * B), scale=scale)
    else:
        itself = torch.eye(B, dtype=torch.bool).repeat_interleave(Q, 0).repeat_interleave(N, 1)  # B*Q B*N
        q, k, v = (x.transpose(1, 2) for x in one)  # 1 heads B*N d
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=itself, scale=scale).transpose(1, 2)
    return out.reshape(B, Q, *out.shape[2:])
