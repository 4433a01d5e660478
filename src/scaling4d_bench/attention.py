"""`scaling4d bench attention`: both passes at the token counts in use, clips in a batch or in one sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scaling4d import seeds
from scaling4d.mae.attention import attention
from scaling4d_bench import devices, measure
from scaling4d_bench.measure import SEED, Measurements

TOKENS = (78, 157, 862, 1568)  # visible at 95 % and 90 %, visible and coarse at 95 %, all
HEADS, WIDTH = 12, 64  # of B
SAME_BELOW = {"fp32": 1e-4, "bf16": 0.05}  # largest difference to ours, of values near 1
LIBRARIES = ("torch", "xformers")
OURS = "ours"
COLUMNS = measure.SPEED | {"of the peak": "{share_of_peak:.0%}", "difference": "{shown}"}

Make = Callable[[int, int, torch.device], "Attention"]  # from clips, tokens of a clip, device
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # three times `B N heads d` -> `B N heads d`


def bench(out: Path, *, total: int, repeats: int, precision: str, tokens: Sequence[int] = TOKENS, heads: int = HEADS) -> Path:
    """Measure, print a table for each token count, write `<out>/attention-<precision>.json` (with a GPU's name)."""
    device = devices.prepare()
    settings = {"total": total, "repeats": repeats, "precision": precision, "heads": heads, "head_width": WIDTH}
    settings |= devices.settings(device) | {"same_below": SAME_BELOW[precision]}
    measurements = Measurements(f"attention-{precision}", settings, LIBRARIES)
    for count in tokens:
        clips, rng = max(1, round(total / count)), seeds.torch_rng(SEED, "bench attention")
        shape, dtype = (clips, count, heads, WIDTH), devices.DTYPES[precision]
        inputs = [torch.randn(shape, generator=rng).to(device, dtype) for _ in range(4)]

        def load(make: Make, inputs: Sequence[Tensor] = inputs) -> Attention:
            function = make(*inputs[0].shape[:2], device)
            both_passes(function, inputs)
            return function

        functions = measurements.load({name: partial(load, make) for name, make in IMPLEMENTATIONS.items()})
        flops = 14 * count**2 * heads * WIDTH  # a clip: 2 products forward, 5 backward (scores again)
        runs = {name: devices.timed(partial(both_passes, run, inputs), device) for name, run in functions.items()}
        workloads = {name: (run, clips, flops) for name, run in runs.items()}
        timings, rows, limits = devices.beside_limits(workloads, precision=precision, device=device, repeats=repeats)
        ours = both_passes(functions[OURS], inputs)
        for row in rows:
            pairs = zip(ours, both_passes(functions[row["name"]], inputs), strict=True)
            row["difference"] = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
            row["same"] = row["difference"] < SAME_BELOW[precision]
        measurements.raw[str(count)] = timings
        measurements.results[str(count)] = {"clips": clips, "flops_per_clip": flops, "rows": rows, "limits": limits}
        title = f"{count} tokens, {clips} clips, {heads} heads of {WIDTH}, {precision}, forward and backward"
        shown = [row | {"shown": f"{row['difference']:.0e}" if row["same"] else "OTHER VALUES"} for row in rows]
        measure.table(title, shown, COLUMNS)
        devices.print_limits(limits)
    return measurements.write(out)


def both_passes(function: Attention, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output, and gradients of queries, keys and values; the last input is the output's gradient."""
    *qkv, gradient = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend | None = None, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B heads N d
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _packed(function: Attention) -> Attention:
    """All clips as one sequence: `1 B*N heads d`."""
    return lambda q, k, v: function(*(x.flatten(0, 1)[None] for x in (q, k, v))).reshape(q.shape)


def _sdpa_packed(clips: int, count: int, device: torch.device) -> Attention:
    """A mask of all pairs of tokens: the cost of packing without an operator for blocks."""
    clip_of = torch.arange(clips, device=device).repeat_interleave(count)
    return _packed(partial(_sdpa, mask=clip_of[:, None] == clip_of))  # B*N B*N


def _xformers_packed(clips: int, count: int, device: torch.device) -> Attention:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return _packed(partial(_xformers(), attn_bias=BlockDiagonalMask.from_seqlens([count] * clips, device=device)))


def _xformers(*_: object) -> Attention:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def _varlen_packed(clips: int, count: int, device: torch.device) -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.arange(clips + 1, dtype=torch.int32, device=device) * count
    return _packed(lambda q, k, v: varlen_attn(q[0], k[0], v[0], starts, starts, count, count))


IMPLEMENTATIONS: Mapping[str, Make] = {
    OURS: lambda *_: attention,
    "ours, packed": lambda *_: partial(attention, packed=True),
    "SDPA, as torch chooses": lambda *_: _sdpa,
    "SDPA, flash": lambda *_: partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "SDPA, efficient": lambda *_: partial(_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "SDPA, math": lambda *_: partial(_sdpa, backend=SDPBackend.MATH),
    "SDPA, packed": _sdpa_packed,
    "xformers": _xformers,
    "xformers, packed": _xformers_packed,
    "torch varlen, packed": _varlen_packed,
}
