"""The device that computes: one GPU or all cores; and its measured limits: matrix products and memory copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from scaling4d.training.observe import matrix_product
from scaling4d_bench import measure
from scaling4d_bench.measure import Timings

MATRIX_SIDE = {"cpu": 4096, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**29, "cuda": 2**32}  # more than any cache holds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPY = "memory copy"


def prepare() -> torch.device:
    """The GPU, or the CPU; on all cores torch computes from now on."""
    torch.set_num_threads(measure.cores())
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settings(device: torch.device) -> dict[str, Any]:
    """The GPU's name by its driver, or "cpu"; and the number of threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": measure.cores()}


def timed(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """The same work, returning its seconds. A GPU has finished all earlier work before, and this work after."""
    return measure.timed(work, partial(torch.cuda.synchronize, device)) if device.type == "cuda" else measure.timed(work)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bf16: matrix products and attention in bf16, weights and their gradients in fp32. fp32: no change."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def beside_limits(
    workloads: Mapping[str, tuple[Callable[[], float], float, float]], *, precision: str, device: torch.device, repeats: int
) -> tuple[Timings, list[dict[str, Any]], dict[str, float]]:
    """Let workloads take turns with a large matrix product and a memory copy, the limits of the device.

    Args:
        workloads: by name: the function that returns its seconds, units, and FLOPs of a unit (0: not counted).
    Returns:
        All times; `throughput` of the workloads, with `share_of_peak`, FLOP/s over those of the product; and the
        limits, FLOP/s of the product and bytes/s of the copy (read and written).
    """
    run, flops = matrix_product(device, DTYPES[precision], side=MATRIX_SIDE[device.type])
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    product, copy = f"matrix product, {precision}", timed(partial(torch.zeros_like(source).copy_, source), device)
    everyone = {**workloads, product: (run, flops, 0), COPY: (copy, 2 * source.numel(), 0)}
    timings = measure.take_turns({name: run for name, (run, _, _) in everyone.items()}, repeats=repeats)
    *rows, peak, copied = measure.throughput(timings, {name: units for name, (_, units, _) in everyone.items()})
    for row in rows:
        if flops := workloads[row["name"]][2]:
            row["share_of_peak"] = row["per_s"] * flops / peak["per_s"]
    return timings, rows, {product: peak["per_s"], COPY: copied["per_s"]}


def print_limits(limits: Mapping[str, float]) -> None:
    parts = [f"{name} {per_s / 1e9:,.0f} {'GB/s' if name == COPY else 'GFLOP/s'}" for name, per_s in limits.items()]
    print(f"limits measured in the same turns: {', '.join(parts)}")
