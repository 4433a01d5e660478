"""Training steps to be timed: forward pass, backward pass, AdamW, on random pixels; ours, and those of other libraries.

All are stepped by the same fused AdamW at a learning rate of 0, so every step is the same work; nobody's gradient is clipped.
Ours start from uint8 pixels and draw their masks; a peer is handed what its own loader would have made: normalised fp32 pixels,
and its mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scaling4d import config, seeds
from scaling4d.mae.build import METHODS
from scaling4d.mae.mae_st import MAEST
from scaling4d.mae.masking import keep
from scaling4d.records import MaskedTokens
from scaling4d.training import optimizer
from scaling4d_bench import device as devices

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.05


Update = Callable[[Tensor], None]


@dataclass(frozen=True)
class Step:
    """clips: in a batch. flops: of a clip, three forward passes. run: a whole step."""

    clips: int
    flops: float
    run: Callable[[], None]


def settings_of(point: str) -> tuple[str, dict[str, Any]]:
    """Method of a file of experiments/point, and its settings at the clip size of profile paper."""
    settings = config.compose(["profile=paper"])
    if point not in settings["points"]:
        settings = config.compose(["profile=paper", f"+point@points.{point}={point}"])
    section = settings["points"][point]
    (method,) = section.keys() & METHODS.keys()
    return method, section[method]


def model(point: str, changes: Mapping[str, Any], *, device: torch.device, seed: int) -> nn.Module:
    """The point with its initial weights.

    Args:
        changes: of its settings, by name.
    """
    method, settings = settings_of(point)
    config.bind({method: settings | changes})
    made = config.build(METHODS[method])
    made.initialise(seed)
    return made.to(device)


def updated(model: nn.Module) -> Update:
    """The backward pass from a loss and AdamW's update, the same for everyone."""
    adamw, _ = optimizer.adamw({"all": (list(model.named_parameters()), 0.0)}, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def update(loss: Tensor) -> None:
        loss.backward()
        adamw.step()
        adamw.zero_grad()

    return update


def masked(model: nn.Module, clips: int, mask_ratio: float, rng: torch.Generator) -> MaskedTokens:
    """As the model's own `choose`, with another share; 0 hides one token, since a loss on hidden tokens needs one."""
    grid, down = model.encoder.grid, isinstance(model, MAEST)
    ratio = mask_ratio or 1 / math.prod(grid)
    return keep(model.masking, batch=clips, grid=grid, mask_ratio=ratio, rng=rng, down=down)


def ours(
    model: nn.Module, update: Update, *, clips: int, mask_ratio: float, precision: str, device: torch.device, seed: int
) -> Step:
    """One of METHODS as it is trained; its masks come from a stream that goes on from step to step."""
    pixels = torch.randint(0, 256, (clips, *model.encoder.clip, 3), dtype=torch.uint8, generator=seeds.stream(seed, "bench"))
    pixels, rng = pixels.to(device), seeds.stream(seed, "bench mask")

    def loss() -> Tensor:
        chosen = masked(model, clips, mask_ratio, rng)
        with devices.computing_in(precision, device):
            return model(pixels, MaskedTokens(chosen.kept.to(device), chosen.grid))

    return step(loss, update, clips)


def step(loss: Callable[[], Tensor], update: Update, clips: int) -> Step:
    return Step(clips, 3 * forward_flops(loss) / clips, lambda: update(loss()))


def forward_flops(loss: Callable[[], Tensor]) -> int:
    """Of one forward pass, counted while it runs."""
    from scaling4d.pretrain.plan.dry_run import CPU_ATTENTION

    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with torch.no_grad(), counter:
        loss()
    return counter.get_total_flops()
