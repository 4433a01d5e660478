"""Where steps are timed, one GPU or all cores of the CPU, and the most that it can do: matrix products and copies, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from scaling4d_bench import measure
from scaling4d_bench.measure import Contestant, Raw

PRODUCT_SIDE = {"cpu": 4096, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**29, "cuda": 2**32}  # more than any cache holds
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPY = "memory copy"


def best() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name(device: torch.device) -> str:
    """Of the GPU, as its driver has it, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def file_name(bench: str, device: torch.device) -> str:
    """A GPU's results lie beside the CPU's, under its name."""
    return bench if device.type == "cpu" else f"{bench}-{name(device).replace(' ', '-').lower()}"


def settings(device: torch.device) -> dict[str, Any]:
    return {"device": name(device), "threads": torch.get_num_threads()}


def clocked(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """The same work, returning its seconds; a GPU has finished it by then, and whatever came before."""
    if device.type == "cpu":
        return measure.timed(work)

    def finished() -> None:
        work()
        torch.cuda.synchronize(device)

    def alone() -> float:
        torch.cuda.synchronize(device)
        return measure.timed(finished)()

    return alone


def computing_in(precision: str, device: torch.device) -> AbstractContextManager:
    """fp32 as it is; bf16: matrix products and attention in bf16, weights and their gradients in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def peaks(precisions: Sequence[str], device: torch.device) -> list[Contestant]:
    """A large matrix product in each precision (units: FLOPs), and a copy of memory (units: bytes read and written)."""
    side = PRODUCT_SIDE[device.type]
    found = []
    for precision in precisions:
        a, b, out = (torch.randn(side, side, device=device, dtype=PRECISIONS[precision]) for _ in range(3))
        found.append(Contestant(peak_of(precision), clocked(partial(torch.mm, a, b, out=out), device), 2 * side**3))
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = partial(target.copy_, source)
    return [*found, Contestant(COPY, clocked(copy, device), 2 * source.numel())]


def peak_of(precision: str) -> str:
    return f"matrix product, {precision}"


def limits(contestants: Sequence[Contestant], raw: Raw) -> dict[str, float]:
    """Of those of `peaks` that took part: FLOP/s by precision, and bytes/s, at the median."""
    rows = measure.rows(contestants, raw, ours=COPY)
    return {row["name"]: row["per_s"] for row in rows if row["name"] in {COPY, *map(peak_of, PRECISIONS)}}


def told(limits: dict[str, float]) -> str:
    """The limits as a line."""
    parts = [f"{what} {per_s / 1e9:,.0f} {'GB/s' if what == COPY else 'GFLOP/s'}" for what, per_s in limits.items()]
    return "limits measured in the same turns: " + ", ".join(parts)
