"""Heads stop when held-out clips no longer get better."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scaling4d.readout.protocols import CHECKS, EarlyStopping, FrozenConfig
from scaling4d.training.fit import StepResult

RECIPE = {"steps": 1000, "batch": 4, "learning_rate": 0.01, "rate_at_width": 0, "weight_decay": 0.0, "warmup_steps": 0}


def stopped(losses: list[float], *, patience: int) -> tuple[int, float, list[dict]]:
    """The step at which a training with these held-out losses ends, the step whose weights it keeps, and its lines."""
    head = nn.Linear(1, 1)
    rule = EarlyStopping(SimpleNamespace(head=head), None, FrozenConfig(**RECIPE, shrinkage=1.0, patience=patience))
    values = iter(losses)
    rule.held_out_loss = lambda: next(values)
    for step in range(1, RECIPE["steps"] + 1):
        nn.init.constant_(head.weight, step)
        if rule.after_step(StepResult(step, step == RECIPE["steps"], torch.zeros(()), 0.0, 0.0, 0.0)):
            break
    rule.restore()
    return step, head.weight.item(), rule.lines


def test_a_head_stops_after_its_patience_and_keeps_the_weights_of_the_lowest_loss() -> None:
    step, kept, lines = stopped([5.0, 3.0, 4.0, *[3.5] * 100], patience=10 * CHECKS)
    assert (step, kept) == (20 + 10 * CHECKS, 20.0)
    assert lines[:2] == [{"step": 10, "held_out_loss": 5.0}, {"step": 20, "held_out_loss": 3.0}] and len(lines) == 2 + CHECKS


def test_a_head_that_gets_better_trains_to_the_end_and_the_last_step_is_measured() -> None:
    step, kept, lines = stopped([1 / n for n in range(1, 200)], patience=7 * CHECKS)
    assert (step, kept, lines[-1]["step"]) == (1000, 1000.0, 1000)


def test_a_patience_of_fewer_steps_than_measurements_is_refused() -> None:
    with pytest.raises(ValueError, match=f"^patience = 3; needed 0 or at least {CHECKS} steps$"):
        FrozenConfig(**RECIPE, shrinkage=1.0, patience=3)
