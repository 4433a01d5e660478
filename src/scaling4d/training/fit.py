"""One trainer for pretraining, distillation, readouts and fine-tuning.

Stages parallelize the model and start the ranks (pretrain.stage, readout.stage).

An interrupted and resumed run gives the same bits as an uninterrupted one: the batch of a step is a pure function of
the step, and all state is saved. A step waits for no GPU and for no other machine, except where it logs or saves.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from scaling4d import artifacts, seeds
from scaling4d.mae.device import to_device
from scaling4d.records import MaskedTokens, Preempted, UserError, write_json
from scaling4d.training.distributed import StepVotes, end_start, heartbeat, stop_requests
from scaling4d.training.optimizer import ParamGroups, build_adamw, named_state, warmup_cosine
from scaling4d.training.parallelize import full_tensor, reduce_gradients, set_last_microbatch
from scaling4d.training.resume import CheckpointManager

MOST_SKIPPED = 10  # steps in a row whose gradient is not finite; ours
MOST_REWINDS = 3  # of a run to its last state, after so many skipped steps; ours
STEPS_AHEAD = 2  # of the GPU, whose work this process has issued; ours
GC_STEPS = 50  # between two garbage collections, alike on all ranks, which wait for each other; ours


@dataclass(frozen=True)
class FitConfig:
    """How `fit` trains.

    name: of the run, for messages and its folder in .runs. batch: clips a step, over all ranks. clip_norm: of the
    gradient. rate_setting: the setting to lower when gradients are not finite, for the message. device: cpu or cuda.
    accumulate: microbatches of a rank's batch, one after another. log_every, save_every: steps; save_every at
    least 1 with a manager. decay_positions: as `build_adamw`.
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
    decay_positions: bool = False


@dataclass(frozen=True)
class ChangedClips:
    """Clips `B ...`, each of which the device changes before the model sees it. changes: of each clip; shapes stay."""

    clips: Tensor
    changes: tuple[Callable[[Tensor], Tensor], ...]


Input = Tensor | ChangedClips | MaskedTokens | dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """This rank's part of a step's batch. inputs: arguments of the model, split along the first axis. ids: of clips."""

    inputs: tuple[Input, ...]
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """step: steps done. loss: mean over this rank's clips. grad_norm: before clipping. waited_s: for the batch.

    loss and grad_norm lie on the device; to read them waits for it. learning_rate: of the first parameter group.
    """

    step: int
    last: bool
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    waited_s: float


class Callback:
    """Hooks of `fit`. Every rank calls them alike; their state is saved with the training state."""

    def begin(self, start: int) -> None:
        """Before the first step of this process, and after a return to a saved state. start: steps done before."""

    def after_step(self, result: StepResult) -> bool | None:
        """After each step. True ends a training that saves no state; every rank must answer alike."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        """Further tensors of the training state by name, the same at every call; a saved state fills them in place."""
        return {}


@dataclass
class Progress:
    """State of a training beside its tensors, saved with them.

    step: steps done. ranks: `[from_step, ranks]` for every number of ranks so far. skipped: steps without an update,
    since their gradient was not finite. rewinds: `[step, offset]` for every return to a saved state: the training went
    on from `step` with the batch of number step + offset.
    """

    step: int
    ranks: list[list[int]]
    skipped: int = 0
    rewinds: list[list[int]] = field(default_factory=list)

    @property
    def next_batch(self) -> int:
        """Number of the batch of the next step."""
        return self.step + (self.rewinds[-1][1] if self.rewinds else 0)


class SkippedSteps:
    """Steps whose gradient is not finite, counted on the device: they change no weight and no moment.

    Args:
        config: of the training.
    """

    def __init__(self, config: FitConfig) -> None:
        self.config = config
        self.counts = torch.zeros(2, device=config.device)  # since the last call of `read`, and in a row
        self.recent: deque[dict[str, Any]] = deque(maxlen=MOST_SKIPPED)

    def add(self, step: int, batch: Batch, loss: Tensor, adamw: torch.optim.AdamW, grad_norm: Tensor) -> None:
        """Before a step's update, which the optimizer then skips if the gradient is not finite."""
        adamw.found_inf = (~grad_norm.isfinite()).float()  # torch's fused AdamW changes nothing where this is 1
        self.counts = self.counts + adamw.found_inf
        self.counts[1] *= adamw.found_inf
        self.recent.append({"step": step, "clips": batch.ids, "loss": loss})

    def read(self) -> tuple[int, int]:
        """Skipped steps since the last call, and those in a row up to now. Waits for the device."""
        steps, row = self.counts.int().tolist()
        self.counts[0] = 0
        return steps, row

    def error(self) -> UserError:
        """Write every rank's last losses and clips to `.runs/`; returns the error that names the file."""
        ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, [line | {"loss": str(line["loss"].item())} for line in self.recent])
        first, last = self.recent[0]["step"], self.recent[-1]["step"]
        path = artifacts.RUNS / self.config.name / f"not-finite-{last:08d}.json"
        if dist.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"ranks": ranks})
        steps = f"steps {first} to {last}: the gradients are not finite; each rank's clips and losses are in {path}"
        return UserError(f"{steps}; lower {self.config.rate_setting}")


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    config: FitConfig,
    *,
    param_groups: ParamGroups,
    callbacks: Sequence[Callback] = (),
    manager: CheckpointManager | None = None,
    initialise: Callable[[], object] = lambda: None,
) -> Progress:
    """Train a model in place. `model(*inputs)` returns its mean loss.

    A step whose gradient is not finite changes no weight. After MOST_SKIPPED of them in a row the training goes back to
    its last saved state and on with the batches behind them, MOST_REWINDS times at most.

    Args:
        model: on its ranks, see training.parallelize. batches: number of a batch -> this rank's batches from that one
            on. param_groups: parameters and their peak learning rates. manager: of the training state; None: nothing is
            saved. initialise: draws the first weights; not called where a saved state has them.
    Raises:
        UserError: gradients stay not finite, or the state cannot be written.
        Preempted: a signal asked to stop, and the state is saved.
    """
    rank, stop = dist.get_rank(), False
    decay = {"weight_decay": config.weight_decay, "decay_positions": config.decay_positions}
    adamw = build_adamw(param_groups, betas=config.betas, **decay)
    tensors = named_state(model, adamw) if manager else {}
    for callback in callbacks if manager else ():
        tensors |= callback.tensors()
    progress = _load(manager, tensors, adamw, callbacks)
    if progress is None:
        initialise()
        progress = Progress(0, [[0, dist.get_world_size()]])
    # LambdaLR's own count is not used: `schedule.step()` sets the rate of `progress.step`.
    schedule = LambdaLR(adamw, lambda _: warmup_cosine(progress.step, steps=config.steps, warmup=config.warmup_steps))
    for callback in callbacks:
        callback.begin(progress.step)
    iterator, skipped, votes, issued = batches(progress.next_batch), SkippedSteps(config), StepVotes(), deque()
    first_batch = progress.next_batch  # of this process
    with stop_requests() if manager else nullcontext([]) as requests, _scheduled_gc():
        while progress.step < config.steps and not stop:
            step = progress.step
            beat = 2 * progress.next_batch  # which never falls, as the step may
            heartbeat(f"{config.name} step {step}, reading clips", beat)
            started = time.monotonic()
            batch = next(iterator)
            waited_s = time.monotonic() - started
            heartbeat(f"{config.name} step {step}, computing", beat + 1)
            with torch.random.fork_rng(devices=[]):  # for dropout and stochastic depth
                torch.manual_seed(int(seeds.numpy_rng(config.seed, "drop", rank, step).integers(2**31)))
                loss = _accumulate_gradients(model, batch, config)
            grad_norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm))
            skipped.add(step, batch, loss, adamw, grad_norm)
            adamw.step()
            adamw.zero_grad()
            _limit_steps_ahead(issued, config.device)
            if progress.next_batch == first_batch:
                end_start()
            progress.step, last, learning_rate = step + 1, step + 1 == config.steps, schedule.get_last_lr()[0]
            schedule.step()
            if progress.step % GC_STEPS == 0:
                gc.collect()
            if manager is not None:
                stop, written = votes.exchange(bool(requests), manager.written)
                manager.publish(written)
            save = manager is not None and (stop or last or progress.step % config.save_every == 0)
            if save or last or progress.step % config.log_every == 0:
                steps, row = skipped.read()
                progress.skipped += steps
                if row >= MOST_SKIPPED or (last and row):
                    progress = _rewind(progress, manager, tensors, adamw, callbacks, skipped)
                    schedule.step()
                    for callback in callbacks:
                        callback.begin(progress.step)
                    iterator, skipped = batches(progress.next_batch), SkippedSteps(config)
                    continue
            result = StepResult(progress.step, last, loss, grad_norm, learning_rate, waited_s)
            early = any([callback.after_step(result) for callback in callbacks])
            if manager is None:
                if early:
                    break
                continue
            assert not early, "a training that saves its state runs all its steps"
            if save:
                heartbeat(f"{config.name} step {step}, saving")
                states = [callback.state_dict() for callback in callbacks]
                manager.save(progress.step, asdict(progress) | {"callbacks": states}, tensors)
            if stop or last:
                manager.wait()
        stop = stop or (manager is not None and votes.last(bool(requests)))  # a later request ends this process at once
    if stop:
        done = f"stopped after step {progress.step} of {config.steps}, on request"
        raise Preempted(f"{done}; the same command goes on from there")
    return progress


def _load(
    manager: CheckpointManager | None, tensors: Mapping[str, Tensor], adamw: torch.optim.AdamW, callbacks: Sequence[Callback]
) -> Progress | None:
    """Load the last saved state. None: there is none, and nothing was changed."""
    saved = manager.load(tensors) if manager else None
    if saved is None:
        return None
    for callback, state in zip(callbacks, saved.pop("callbacks"), strict=True):
        callback.load_state_dict(state)
    progress, ranks = Progress(**saved), dist.get_world_size()
    if progress.ranks[-1][1] != ranks:
        progress.ranks.append([progress.step, ranks])
    for state in adamw.state.values():  # AdamW's own count, for its bias correction
        state["step"].fill_(progress.step - progress.skipped)
    return progress


def _rewind(
    progress: Progress,
    manager: CheckpointManager | None,
    tensors: Mapping[str, Tensor],
    adamw: torch.optim.AdamW,
    callbacks: Sequence[Callback],
    skipped: SkippedSteps,
) -> Progress:
    """Go back to the last saved state, and on with the batches after the present one. Raises UserError: as `fit`."""
    if manager is None or len(progress.rewinds) == MOST_REWINDS:
        raise skipped.error()
    manager.wait()
    saved = _load(manager, tensors, adamw, callbacks)
    if saved is None:
        raise skipped.error()
    saved.rewinds = [*progress.rewinds, [saved.step, progress.next_batch - saved.step]]
    if dist.get_rank() == 0:
        back = f"back to the state of step {saved.step}, and on with the batch of step {progress.next_batch}"
        print(f"warning: step {progress.step}: {MOST_SKIPPED} gradients are not finite; {back}", file=sys.stderr)
    return saved


def _limit_steps_ahead(issued: deque, device: str) -> None:
    """Wait until the device has all but STEPS_AHEAD steps done: inputs of later ones take memory."""
    if device == "cuda":
        issued.append(torch.cuda.Event())
        issued[-1].record()
        if len(issued) > STEPS_AHEAD:
            issued.popleft().synchronize()


@contextmanager
def _scheduled_gc() -> Iterator[None]:
    """No garbage collection but the caller's own: ranks that collect at different steps wait for each other."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


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
    """One microbatch of an argument of the model, on the device. The copy there waits for nothing."""
    if isinstance(value, ChangedClips):
        clips = _microbatch(value.clips, index, config)
        changes = value.changes[index * len(clips) : (index + 1) * len(clips)]
        return torch.stack([change(clip) for change, clip in zip(changes, clips, strict=True)])
    if isinstance(value, MaskedTokens):
        return replace(value, ids_keep=_microbatch(value.ids_keep, index, config))
    if isinstance(value, dict):
        return {name: _microbatch(tensor, index, config) for name, tensor in value.items()}
    return to_device(value.chunk(config.accumulate)[index], config.device)
