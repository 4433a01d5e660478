"""Scaled dot-product attention: xformers on CUDA where it has a kernel, torch elsewhere; one function, one answer."""

from __future__ import annotations

import sys
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 8  # values of the last axis; xformers' kernels need a multiple


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, packed: bool = False) -> Tensor:
    """`B Q heads d`, `B N heads d`, `B N heads d` -> `B Q heads d`.

    Args:
        scale: factor of the scores; default 1/sqrt(d).
        packed: xformers computes all clips as one sequence with a block-diagonal mask; the same answer. torch computes
            clips in a batch, packed or not: they are equally long, so a batch is the block-diagonal answer.
    """
    B, Q, N, mask = *q.shape[:2], k.shape[1], None
    if q.is_cuda and runs_xformers(q.shape[-1], q.dtype, q.device, packed):
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        if packed:
            q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))  # 1 B*N heads d
            mask = BlockDiagonalMask.from_seqlens([Q] * B, [N] * B)
        scale = scale or q.shape[-1] ** -0.5
        out = memory_efficient_attention(*align(q, k, v), attn_bias=mask, scale=scale)[..., : v.shape[-1]]
        return out.reshape(B, Q, *out.shape[2:])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B heads N d
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


@torch.compiler.assume_constant_result  # torch.compile breaks its graph at an import that fails
def runs_xformers(size: int, dtype: torch.dtype, device: torch.device, packed: bool) -> bool:
    """Whether xformers has a kernel for heads of `size` on a GPU. The first rank tells once why it has none."""
    problem = xformers_problem() or xformers_kernel(size, dtype, device, packed)[1]
    if problem:
        _warn(problem)
    return not problem


@cache
def _warn(problem: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"warning: attention is torch's scaled_dot_product_attention: {problem}", file=sys.stderr)


@cache
def xformers_problem() -> str:
    """Why attention on a GPU is torch's, not xformers'; empty where xformers loads. Its import takes seconds."""
    try:
        from xformers import _cpp_lib, ops  # noqa: F401

        error = _cpp_lib._cpp_library_load_exception
    except Exception as error:  # noqa: BLE001  a library of another build fails in any way
        return f"xformers does not import: {' '.join(str(error).split())}"
    if error is None:
        return ""
    reason = " ".join(str(error).partition("Please")[0].rpartition("extensions. ")[2].split())
    return f"the library of xformers does not load: {reason}"


@cache
def xformers_kernel(size: int, dtype: torch.dtype, device: torch.device, packed: bool = False) -> tuple[str, str]:
    """Name of the kernel that a loaded xformers chooses, and why it has none for both passes: one of them is empty."""
    x = torch.empty(1, 16, 4, size + -size % ALIGNMENT, dtype=dtype, device=device)  # B N heads d; only d counts
    try:
        from xformers.ops import fmha
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        inputs = fmha.Inputs(query=x, key=x, value=x, attn_bias=BlockDiagonalMask.from_seqlens([8, 8]) if packed else None)
        kernel = fmha._dispatch_fw(inputs, True)
        fmha._dispatch_bw(inputs, kernel.VARLEN_LSE_PACKED if packed else None)
    except Exception as error:  # noqa: BLE001  private functions, which another version may change
        reasons = str(error)[max(str(error).find("\n`"), 0) :]  # behind the description of the inputs: one for each kernel
        return "", f"xformers has no kernel for heads of {size} in {dtype}: {' '.join(reasons.split())}"
    return kernel.NAME, ""


def rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: turn the first 2P channels of each head, in neighbouring pairs; the others stay.

    Args:
        x: queries or keys, `B N heads d`.
        angles: radians, `N P`, float32; 2P at most d.
    Source: arXiv:2104.09864.
    """
    turned, rest = x.split([2 * angles.shape[1], x.shape[-1] - 2 * angles.shape[1]], dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)  # B N heads P
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # N 1 P
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def align(*tensors: Tensor) -> list[Tensor]:
    """Pad the last axis with zeros to a multiple of ALIGNMENT. Zeros change no score and no sum."""
    return [F.pad(x, (0, -x.shape[-1] % ALIGNMENT)) if x.shape[-1] % ALIGNMENT else x for x in tensors]
