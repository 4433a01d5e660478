"""Scaled dot-product attention: xformers on CUDA, torch elsewhere; one function, same answer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`B Q heads d`, `B N heads d`, `B N heads d` -> `B Q heads d`.

    Scores are multiplied by `scale`, 1/sqrt(d) unless told.
    """
    if q.is_cuda:
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v, scale=scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B heads N d
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
