"""Where the time of a step goes, by kind of work, as torch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.profiler import profile

KINDS = {  # kind -> what the names of torch's operations hold; the first that fits counts
    "attention": ("dot_product", "efficient_attention", "flash", "softmax"),
    "AdamW": ("adam",),
    "matrix products": ("addmm", "bmm", "::mm", "::linear", "conv"),
    "GELU": ("gelu",),
    "norms": ("layer_norm",),
    "gathers, copies": ("index", "gather", "scatter", "copy", "cat", "fill", "zero", "clone"),
    "by element, sums": ("add", "mul", "sub", "div", "sum", "mean", "pow", "sqrt", "var"),
}
REST = "other"


def where(run: Callable[[], None], device: torch.device, *, steps: int = 2) -> dict[str, float]:
    """Share of the time by kind, 0 to 1, the largest first: of the calling thread, or of the GPU."""
    gpu = device.type == "cuda"
    with profile(use_device="cuda" if gpu else None, use_kineto=False) as seen:
        for _ in range(steps):
            run()
    spent: dict[str, float] = {}
    for event in seen.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + (event.self_device_time_total if gpu else event.self_cpu_time_total)
    total = sum(spent.values())
    return {kind: time / total for kind, time in sorted(spent.items(), key=lambda item: -item[1]) if time}


def kind_of(operation: str) -> str:
    name = operation.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)
