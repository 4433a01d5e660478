"""`scaling4d bench attention`: forward and backward passes at the token counts in use, clips in a batch or in one sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scaling4d import seeds
from scaling4d.mae.attention import attention
from scaling4d_bench import device as devices
from scaling4d_bench import measure
from scaling4d_bench.measure import Contestant

TOKENS = (78, 157, 862, 1568)  # visible at 95 % and 90 %, visible and coarse at 95 %, all
HEADS, WIDTH = 12, 64  # of B
SAME_BELOW = {"fp32": 1e-4, "bf16": 0.05}  # largest difference to ours, of values near 1
LIBRARIES = ("torch", "xformers")
OURS = "ours"

Shape = tuple[int, int, int, int]  # B N heads d
Way = Callable[[Tensor, Tensor, Tensor], Tensor]  # three times `B N heads d` -> `B N heads d`


def bench(
    out: Path,
    *,
    total: int,
    repeats: int,
    precision: str,
    tokens: Sequence[int] = TOKENS,
    heads: int = HEADS,
    seed: int = 0,
) -> Path:
    """Measure, print a table a token count, write `<out>/attention-<precision>.json` (on a GPU with its name).

    Args:
        total: tokens of all clips together, about. tokens: of a clip.
    """
    load, device = measure.busy(), devices.best()
    raw: dict[str, Any] = {}
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    with measure.threads(measure.cores()):
        for count in tokens:
            shape = (max(1, round(total / count)), count, heads, WIDTH)
            raw[str(count)], found[str(count)], gone = race(shape, precision, device, repeats=repeats, seed=seed)
            missing |= gone
            _show(shape, precision, found[str(count)])
        settings = devices.settings(device)
    measure.show_missing(missing)
    settings |= {"total": total, "repeats": repeats, "precision": precision, "heads": heads, "head_width": WIDTH}
    settings |= {"seed": seed, "load_before": load, "same_below": SAME_BELOW[precision]}
    name, libraries = devices.file_name(f"attention-{precision}", device), measure.versions(LIBRARIES)
    return measure.write(name, out, settings=settings, libraries=libraries, raw=raw, found=found, not_measured=missing)


def race(
    shape: Shape, precision: str, device: torch.device, *, repeats: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Raw seconds of clips of one token count, what follows from them, and who does not run here."""
    rng = seeds.stream(seed, "bench attention")
    inputs = [torch.randn(shape, generator=rng).to(device, devices.PRECISIONS[precision]) for _ in range(4)]
    makers = {name: partial(_tried, partial(make, shape, device), inputs) for name, make in WAYS.items()}
    made, missing = measure.available(makers)
    clips, count, heads, width = shape
    contestants = [
        Contestant(name, devices.clocked(partial(both_ways, way, inputs), device), clips) for name, way in made.items()
    ]
    contestants += devices.peaks([precision], device)
    raw = measure.race(contestants, repeats=repeats)
    limits = devices.limits(contestants, raw)
    rows = measure.rows(contestants, raw, ours=OURS)[: len(made)]
    flops = 14 * count**2 * heads * width  # a clip: 2 products forward, 5 backward, since fused attention makes the scores again
    mine = both_ways(made[OURS], inputs)
    for row in rows:
        other = both_ways(made[row["name"]], inputs)
        row["difference"] = max(float((a.float() - b.float()).abs().max()) for a, b in zip(mine, other, strict=True))
        row["same"] = row["difference"] < SAME_BELOW[precision]
        row["share_of_peak"] = row["per_s"] * flops / limits[devices.peak_of(precision)]
    return measure.plain(raw), {"clips": clips, "flops_per_clip": flops, "rows": rows, "limits": limits}, missing


def both_ways(way: Way, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output, and gradients of queries, keys and values; the last input is the output's gradient."""
    *qkv, gradient = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    output = way(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def _tried(make: Callable[[], Way], inputs: Sequence[Tensor]) -> Way:
    """The way, after it has run once."""
    way = make()
    both_ways(way, inputs)
    return way


def _sdpa(backend: SDPBackend | None, shape: Shape, device: torch.device) -> Way:
    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # B heads N d
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return way


def _sdpa_packed(shape: Shape, device: torch.device) -> Way:
    """One sequence with a mask of all pairs of tokens: what packing costs without an operator that knows of blocks."""
    clips, count, _, _ = shape
    clip_of = torch.arange(clips, device=device).repeat_interleave(count)
    mask = clip_of[:, None] == clip_of  # B*N B*N

    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1)[None].transpose(1, 2) for x in (q, k, v))  # 1 heads B*N d
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(shape)

    return way


def _xformers(shape: Shape, device: torch.device) -> Way:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention


def _xformers_packed(shape: Shape, device: torch.device) -> Way:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    clips, count, _, _ = shape
    blocks = BlockDiagonalMask.from_seqlens([count] * clips, device=device)

    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))  # 1 B*N heads d
        return memory_efficient_attention(q, k, v, attn_bias=blocks).reshape(shape)

    return way


def _varlen_packed(shape: Shape, device: torch.device) -> Way:
    from torch.nn.attention.varlen import varlen_attn

    clips, count, _, _ = shape
    starts = torch.arange(clips + 1, dtype=torch.int32, device=device) * count

    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # B*N heads d
        return varlen_attn(q, k, v, starts, starts, count, count).reshape(shape)

    return way


WAYS: Mapping[str, Callable[[Shape, torch.device], Way]] = {
    OURS: lambda shape, device: attention,
    "SDPA, as torch chooses": partial(_sdpa, None),
    "SDPA, flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "SDPA, efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "SDPA, math": partial(_sdpa, SDPBackend.MATH),
    "SDPA, packed": _sdpa_packed,
    "xformers": _xformers,
    "xformers, packed": _xformers_packed,
    "torch varlen, packed": _varlen_packed,
}


def _show(shape: Shape, precision: str, found: Mapping[str, Any]) -> None:
    clips, count, heads, width = shape
    lines = []
    for row in found["rows"]:
        same = f"{row['difference']:.0e}" if row["same"] else "OTHER VALUES"
        lines.append((row["name"], *measure.speed(row), f"{row['share_of_peak']:.0%}", same))
    columns = ("", "clips/s", "quartiles", "times ours", "of the peak", "difference")
    measure.show(f"{count} tokens, {clips} clips, {heads} heads of {width}, {precision}, forward and backward", columns, lines)
    print(devices.told(found["limits"]))
