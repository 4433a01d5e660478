"""AdamW, which decays matrices and no vectors; the learning-rate schedule: warm-up, cosine decay."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ParamGroups = dict[str, tuple[list[tuple[str, nn.Parameter]], float]]  # named parameters and their peak learning rate


def build_adamw(
    groups: ParamGroups, *, betas: tuple[float, float], weight_decay: float, decay_positions: bool = False
) -> torch.optim.AdamW:
    """AdamW over parameter groups at their peak learning rates, with its state. decay_positions: as `decays`."""
    param_groups = []
    for parameters, peak in groups.values():
        for decay, decayed in ((weight_decay, True), (0.0, False)):
            params = [p for name, p in parameters if p.requires_grad and decays(name, p, positions=decay_positions) == decayed]
            if params:
                param_groups.append({"params": params, "weight_decay": decay, "lr": peak})
    adamw = torch.optim.AdamW(param_groups, betas=betas, fused=True)
    for group in adamw.param_groups:  # the state that AdamW itself would make in its first step, to load another one into
        for p in group["params"]:
            zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            adamw.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
    return adamw


def decays(name: str, p: nn.Parameter, *, positions: bool) -> bool:
    """Whether a parameter decays: the matrix of a layer, and with `positions` also learned positions, tokens, queries.

    No bias, scale or parameter of a norm decays: these are vectors.
    Source: mae_st's fine-tuning, whose positions and class token do not decay, and its pretraining, where they do.
    """
    return p.ndim > 1 and (positions or name.endswith("weight"))


def named_state(model: nn.Module, adamw: torch.optim.AdamW) -> dict[str, Tensor]:
    """Weights and moments (exp_avg, exp_avg_sq) of the trained parameters by name: themselves, no copies."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state = adamw.state[p]
            tensors |= {f"weight.{name}": p.detach(), f"first.{name}": state["exp_avg"], f"second.{name}": state["exp_avg_sq"]}
    return tensors


def warmup_cosine(step: int, *, steps: int, warmup: int) -> float:
    """Factor on the peak learning rate at step 0, 1, ...: (step + 1) / warmup, then a cosine that ends at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
