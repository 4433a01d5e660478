"""How a readout is trained, alone or with its encoder: on CPU ranks or GPUs, whole or in shards, and on from where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling4d import code, config, log, seeds
from scaling4d.records import Preempted, UserError
from scaling4d.training import optimizer
from scaling4d.training.distributed import anyone, at, stop_wanted, stopped
from scaling4d.training.parallelize import TYPES, Sharding, last_part, reduce, settle, whole
from scaling4d.training.resume import State, claim, folder_of, refusals, tensors_of

Parts = dict[str, tuple[list[tuple[str, nn.Parameter]], float]]  # named parameters and their peak learning rate
Target = dict[str, Tensor]
KEYS = ["readout.tuning"]  # settings on which a fine-tuning's result depends, beside those of every readout


@config.configurable
@dataclass(frozen=True)
class Tuning:
    """Where encoder and readout are trained together.

    device: cpu or cuda. compute: float32 or bfloat16, of the encoder; its weights and moments, and the readout with its loss, are
    float32 in both.
    """

    device: str
    compute: str


@config.configurable
@dataclass(frozen=True)
class Saving:
    """How a fine-tuning is kept safe; no result depends on it.

    every: steps, after which its state is written to .resume/; 0: never, and a run that was stopped begins anew. keep: how many
    such states stay.
    """

    every: int
    keep: int


@dataclass(frozen=True)
class Means:
    """What a fine-tuning runs on. about: all that its result depends on, which names its state; None where nobody asks for it."""

    tuning: Tuning
    sharding: Sharding
    saving: Saving
    about: Mapping[str, Any] | None


class Schedule(Protocol):
    """What Recipe and Classifier have in common."""

    steps: int
    batch: int
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    clip_norm: float


def saving_of(settings: Mapping[str, Any]) -> Saving:
    """Binds nothing else, so that what is bound next is all that counts as in force.

    Raises:
        UserError: no such setting, or a number below its least.
    """
    config.bind(config.section(settings, "readout.saving"))
    saving = config.build(Saving)
    for name, value, least in (("every", saving.every, 0), ("keep", saving.keep, 1)):
        if value < least:
            raise UserError(f"readout.saving.Saving.{name} is {value}; needed {least} or more")
    return saving


def means_of(saving: Saving, *, ranks: int, batch: int) -> Means:
    """By the bound settings; `about` is filled in later.

    Raises:
        UserError: an unknown word, a mesh or a batch that does not divide.
    """
    tuning, sharding = config.build(Tuning), config.build(Sharding)
    for name, value, known in (("device", tuning.device, ("cpu", "cuda")), ("compute", tuning.compute, tuple(TYPES))):
        if value not in known:
            raise UserError(f"readout.tuning.Tuning.{name} = {value!r}; needed {' or '.join(known)}")
    sharding.check(ranks=ranks, batch=batch)
    return Means(tuning, sharding, saving, None)


def about(run: str, room: str, mine: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that a result depends on. run: its encoder, task and protocol. mine: the declared settings."""
    return {
        "run": run,
        "profile": mine["profile"],
        "settings": dict(mine),
        "inputs": dict(inputs),
        "code": code.running(room)["sha256"],
    }


def state_of(means: Means | None) -> Path | None:
    """The folder of a run's state, in the process that leads; None: it keeps none."""
    return folder_of("readout", means.about) if means and means.about and means.saving.every else None


def placed(model: nn.Module, means: Means, ranks: int) -> nn.Module:
    """A model of an encoder and a head that has its weights, in its place on the ranks."""
    settle(model, means.sharding, ranks=ranks, device=means.tuning.device, compute=means.tuning.compute)
    return model.to(means.tuning.device)


def fit(
    model: nn.Module,
    parts: Parts,
    lesson: Callable[[int], tuple[Tensor, Target]],
    schedule: Schedule,
    means: Means | None,
    lines: log.Steps,
    *,
    what: str,
    rank: int,
    ranks: int,
    seed: int,
) -> None:
    """Train a model, which is called with inputs and target and says its loss; every rank takes part.

    Args:
        parts: of the model in its place. lesson: this rank's part of a step's batch. means: None, on the CPU and unsaved.
        what: the protocol, for messages.
    Raises:
        UserError: the gradient is not finite (before the update), or the state cannot be written.
        Preempted: it was asked to stop and saved its state.
    """
    adamw, peaks = optimizer.adamw(parts, betas=schedule.betas, weight_decay=schedule.weight_decay)
    device, count = (means.tuning.device, means.sharding.accumulate) if means else ("cpu", 1)

    def train(step: int) -> None:
        at(f"{what} step {step}")
        inputs, target = lesson(step)
        mean = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seeds.numpy(seed, "drop", rank, step).integers(2**31)))  # dropout and stochastic depth
            for number, (some, of_them) in enumerate(_split(inputs, target, count)):
                last_part(model, number + 1 == count)
                loss = model(some.to(device), on(of_them, device)) / count
                loss.backward()
                mean += loss.detach()
        reduce(model)
        grad = whole(nn.utils.clip_grad_norm_(model.parameters(), schedule.clip_norm))
        if not torch.isfinite(grad):
            raise UserError(f"{what} step {step}: the gradient is {grad.item()}; lower {type(schedule).__name__}.learning_rate")
        share = optimizer.warmup_cosine(step, steps=schedule.steps, warmup=schedule.warmup_steps)
        optimizer.set_rate(adamw, peaks, share)
        adamw.step()
        adamw.zero_grad()
        if rank == 0:
            lr = adamw.param_groups[0]["lr"]
            lines.line(step + 1, loss=mean.item(), lr=lr, grad=grad.item(), clips=(step + 1) * schedule.batch)

    if means and means.saving.every:
        _saved(train, model, adamw, schedule.steps, means, rank=rank, ranks=ranks)
    else:
        for step in range(schedule.steps):
            train(step)


@refusals()
def _saved(
    train: Callable[[int], None],
    model: nn.Module,
    adamw: torch.optim.AdamW,
    steps: int,
    means: Means,
    *,
    rank: int,
    ranks: int,
) -> None:
    """Train on from the last state, and write one every so many steps and after the last."""
    optimizer.moments(adamw)
    tensors = tensors_of(model, adamw)
    where = [state_of(means) if rank == 0 else None]
    dist.broadcast_object_list(where, device=torch.device("cpu"))
    lock = claim(where[0], means.about) if rank == 0 else None
    dist.barrier()
    state = State(where[0], keep=means.saving.keep, asynchronous=False, rank=rank, ranks=ranks)
    done = (state.load(tensors) or {"step": 0})["step"]
    optimizer.count_steps(adamw, done)
    with stop_wanted() as wanted:
        for step in range(done, steps):
            train(step)
            stop = anyone(wanted)
            if stop or step + 1 == steps or (step + 1) % means.saving.every == 0:
                state.save(step + 1, {"step": step + 1}, tensors)
            if stop:
                raise Preempted(stopped(step + 1, steps))
    if anyone(wanted):
        raise Preempted(stopped(steps, steps))
    if lock:
        lock.close()


def _split(inputs: Tensor, target: Target, count: int) -> Iterator[tuple[Tensor, Target]]:
    """A batch in parts."""
    pieces = {name: value.chunk(count) for name, value in target.items()}
    for number, some in enumerate(inputs.chunk(count)):
        yield some, {name: piece[number] for name, piece in pieces.items()}


def on(target: Target, device: str) -> Target:
    return {name: value.to(device) for name, value in target.items()}
