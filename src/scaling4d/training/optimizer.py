"""AdamW with the usual exceptions from decay, and a warm-up with a cosine; pretraining and readouts share them."""

from __future__ import annotations

import math

import torch
from torch import nn

NO_DECAY = ("bias", "norm", "positions", "token", "query")  # both papers: no decay on biases, norms and learned positions


def adamw(
    parts: dict[str, tuple[list[tuple[str, nn.Parameter]], float]], *, betas: tuple[float, float], weight_decay: float
) -> tuple[torch.optim.AdamW, list[float]]:
    """AdamW over parts, each some named parameters and their peak learning rate; returns it and the peak of every group."""
    groups, peaks = [], []
    for parameters, peak in parts.values():
        named = [(name, p) for name, p in parameters if p.requires_grad]
        plain = [p for name, p in named if any(word in name for word in NO_DECAY)]
        decayed = [p for name, p in named if not any(word in name for word in NO_DECAY)]
        for some, decay in ((decayed, weight_decay), (plain, 0.0)):
            if some:
                groups.append({"params": some, "weight_decay": decay})
                peaks.append(peak)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True), peaks


def moments(adamw: torch.optim.AdamW) -> None:
    """Give every parameter the state that AdamW itself would give it in its first step, so that another can be loaded into it."""
    for group in adamw.param_groups:
        for p in group["params"]:
            zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            adamw.state[p] = {"step": torch.zeros((), device=p.device), **zeros}


def count_steps(adamw: torch.optim.AdamW, done: int) -> None:
    """Let AdamW go on after `done` steps."""
    for state in adamw.state.values():
        state["step"].fill_(done)


def warmup_cosine(step: int, *, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at `step` of 0..steps: linear from 0 over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def set_rate(optimizer: torch.optim.AdamW, peaks: list[float], share: float) -> None:
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * share
