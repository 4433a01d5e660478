"""One trainer for pretraining, distillation, readouts and fine-tuning.

Stages parallelize the model and start the ranks (pretrain.stage, readout.stage).

An interrupted and resumed run gives the same bits as an uninterrupted one: the batch of a step is a pure function of
the step, and all state is saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from scaling4d import artifacts, seeds
from scaling4d.records import MaskedTokens, Preempted, UserError, write_json
from scaling4d.training.distributed import any_rank, heartbeat, stop_requests
from scaling4d.training.optimizer import ParamGroups, build_adamw, named_state, warmup_cosine
from scaling4d.training.parallelize import full_tensor, reduce_gradients, set_last_microbatch
from scaling4d.training.resume import CheckpointManager

Input = Tensor | MaskedTokens | dict[str, Tensor]


@dataclass(frozen=True)
class FitConfig:
    """How `fit` trains.

    name: of the run, for messages and its folder in .runs. batch: clips a step, over all ranks. clip_norm: of the
    gradient. rate_setting: the setting to lower when a gradient is not finite, for the message. device: cpu or cuda.
    accumulate: microbatches of a rank's batch, one after another. log_every, save_every: steps; save_every at
    least 1 with a manager.
    """

    name: str
    steps: int
    batch: int
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    clip_norm: float
    seed: int
    rate_setting: str
    device: str
    accumulate: int
    log_every: int
    save_every: int


@dataclass(frozen=True)
class Batch:
    """This rank's part of a step's batch. inputs: arguments of the model, split along the first axis. ids: of clips."""

    inputs: tuple[Input, ...]
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """step: steps done. loss: mean over this rank's clips. grad_norm: before clipping. waited_s: for the batch.

    learning_rate: of the first parameter group.
    """

    step: int
    last: bool
    loss: Tensor
    grad_norm: float
    learning_rate: float
    waited_s: float


class Callback:
    """Hooks of `fit`. Every rank calls them alike; their state is saved with the training state."""

    def begin(self, start: int) -> None:
        """Before the first step of this process. start: steps done before."""

    def after_step(self, result: StepResult) -> bool | None:
        """After each step. True ends a training that saves no state; every rank must answer alike."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    config: FitConfig,
    *,
    param_groups: ParamGroups,
    callbacks: Sequence[Callback] = (),
    manager: CheckpointManager | None = None,
) -> list[list[int]]:
    """Train a model in place. `model(*inputs)` returns its mean loss.

    Args:
        model: on its ranks, see training.parallelize. batches: first step -> this rank's batches from that step on.
        param_groups: parameters and their peak learning rates. manager: of the training state; None: nothing is saved.
    Returns:
        `[from_step, ranks]` for every number of ranks that the run had.
    Raises:
        UserError: the gradient is not finite (before the update), or the state cannot be written.
        Preempted: a signal asked to stop, and the state is saved.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    adamw = build_adamw(param_groups, betas=config.betas, weight_decay=config.weight_decay)
    start, world_sizes, tensors = 0, [[0, ranks]], {}
    if manager:
        tensors = named_state(model, adamw)
        if progress := manager.load(tensors):
            start, world_sizes = progress["step"], progress["ranks"]
            world_sizes = world_sizes if world_sizes[-1][1] == ranks else [*world_sizes, [start, ranks]]
            for callback, state in zip(callbacks, progress["callbacks"], strict=True):
                callback.load_state_dict(state)
        for state in adamw.state.values():
            state["step"].fill_(start)
    schedule = LambdaLR(adamw, lambda n: warmup_cosine(start + n, steps=config.steps, warmup=config.warmup_steps))
    for callback in callbacks:
        callback.begin(start)
    done, stop, iterator = start, False, batches(start)
    with stop_requests() if manager else nullcontext() as requests:
        for step in range(start, config.steps):
            heartbeat(f"{config.name} step {step}, reading clips", 2 * step)
            started = time.monotonic()
            batch = next(iterator)
            waited_s = time.monotonic() - started
            heartbeat(f"{config.name} step {step}, computing", 2 * step + 1)
            with torch.random.fork_rng(devices=[]):  # for dropout and stochastic depth
                torch.manual_seed(int(seeds.numpy(config.seed, "drop", rank, step).integers(2**31)))
                loss = _accumulate_gradients(model, batch, config)
            grad_norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm))
            if not torch.isfinite(grad_norm):
                raise UserError(_not_finite(config, step, grad_norm.item(), batch, loss))
            adamw.step()
            adamw.zero_grad()
            done, last, learning_rate = step + 1, step + 1 == config.steps, schedule.get_last_lr()[0]
            schedule.step()
            result = StepResult(done, last, loss, grad_norm.item(), learning_rate, waited_s)
            early = any([callback.after_step(result) for callback in callbacks])
            if manager is None:
                if early:
                    break
                continue
            assert not early, "a training that saves its state runs all its steps"
            if last or done % config.log_every == 0:
                manager.wait()
            stop = any_rank(bool(requests))
            if stop or last or done % config.save_every == 0:
                heartbeat(f"{config.name} step {step}, saving")
                states = [callback.state_dict() for callback in callbacks]
                manager.save(done, {"step": done, "ranks": world_sizes, "callbacks": states}, tensors)
            if stop or last:
                manager.wait()
            if stop:
                break
    if stop or (manager and any_rank(bool(requests))):  # since the last save; a later request ends this process at once
        raise Preempted(f"stopped after step {done} of {config.steps}, as asked; the same command goes on from there")
    return world_sizes


def _accumulate_gradients(model: nn.Module, batch: Batch, config: FitConfig) -> Tensor:
    """Backward passes of each microbatch; mean gradients over the ranks. Returns this rank's mean loss."""
    mean = torch.zeros((), device=config.device)
    for index in range(config.accumulate):
        set_last_microbatch(model, index + 1 == config.accumulate)
        loss = model(*(_microbatch(value, index, config) for value in batch.inputs)) / config.accumulate
        loss.backward()
        mean += loss.detach()
    reduce_gradients(model)
    return mean


def _microbatch(value: Input, index: int, config: FitConfig) -> Input:
    """One microbatch of an argument of the model, on the device."""
    if isinstance(value, MaskedTokens):
        return replace(value, ids_keep=_microbatch(value.ids_keep, index, config))
    if isinstance(value, dict):
        return {name: _microbatch(tensor, index, config) for name, tensor in value.items()}
    return value.chunk(config.accumulate)[index].to(config.device, non_blocking=True)


def _not_finite(config: FitConfig, step: int, grad_norm: float, batch: Batch, loss: Tensor) -> str:
    """Write every rank's loss and clips to `.runs/`; returns the message."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {"loss": str(loss.item()), "clips": batch.ids})
    path = artifacts.RUNS / config.name / f"not-finite-{step:08d}.json"
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"step": step, "gradient": str(grad_norm), "ranks": ranks})
    return f"step {step}: the gradient is {grad_norm}; each rank's clips and loss are in {path}; lower {config.rate_setting}"
