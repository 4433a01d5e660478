"""The one trainer, on a model of a few weights."""

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from nearness import near
from torch import Tensor, nn

from scaling4d import seeds
from scaling4d.records import MaskedTokens, Preempted, UserError
from scaling4d.training import fit as fit_module
from scaling4d.training.distributed import run
from scaling4d.training.fit import Batch, Callback, ChangedClips, FitConfig, Progress, StepResult, fit
from scaling4d.training.observe import TrainingLog
from scaling4d.training.optimizer import build_adamw, warmup_cosine
from scaling4d.training.resume import CheckpointManager, state_folder

pytestmark = pytest.mark.integration

OPTIMIZER = {"betas": (0.9, 0.95), "weight_decay": 0.1, "warmup_steps": 2, "clip_norm": 0.5, "rate_setting": "line.learning_rate"}
CADENCE = {"accumulate": 1, "log_every": 3, "save_every": 100}
CONFIG = FitConfig(name="line", steps=6, batch=8, seed=3, device="cpu", **OPTIMIZER, **CADENCE)
RATE = 0.05


class Line(nn.Module):
    """Linear regression with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(5, 1), nn.Dropout(dropout)
        nn.init.constant_(self.linear.weight, 0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, target: dict[str, Tensor], masked: MaskedTokens) -> Tensor:
        assert len(x) == len(target["y"]) == len(masked.ids_keep)
        return (self.linear(self.dropout(x)) - target["y"]).square().mean()


def batch_of(step: int, *, rank: int, ranks: int) -> Batch:
    x = torch.randn(CONFIG.batch, 5, generator=seeds.torch_rng(0, "x", step))
    ids = tuple(f"clip{step}-{n}" for n in range(CONFIG.batch))
    part = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
    masked = MaskedTokens(torch.arange(CONFIG.batch)[:, None][part], (1, 1, 8))
    return Batch((x[part], {"y": x[part].sum(1, keepdim=True)}, masked), ids[part])


class History(Callback):
    """All that a callback is told, on one rank; saved and loaded."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.begun, self.steps, self.weights = model, [], [], []

    def begin(self, start: int) -> None:
        self.begun.append(start)

    def after_step(self, result: StepResult) -> None:
        self.steps.append([result.step, result.last, result.loss.item(), result.grad_norm.item(), result.learning_rate])
        self.weights.append([p.detach().flatten().tolist() for p in self.model.parameters()])

    def state_dict(self) -> dict:
        return {"steps": self.steps, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.weights = state["steps"], state["weights"]


def train(
    *,
    rank: int,
    ranks: int,
    config: FitConfig = CONFIG,
    saved: bool = False,
    dropout: float = 0.0,
    rate: float = RATE,
    batches: Callable = batch_of,
    stop_at: int | None = None,
) -> tuple[History, TrainingLog, list[int], list]:
    """What callbacks saw of a training, the steps whose batches were requested for, and the numbers of ranks."""
    model = Line(dropout)
    history, log, requested = History(model), TrainingLog(config), []
    manager = None
    if saved:
        manager = CheckpointManager("line", {"run": "line", "profile": "smoke"}, keep_latest_k=1, asynchronous=False)

    def batch(step: int) -> Batch:
        requested.append(step)
        if step == stop_at and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)  # noted by this rank alone
        return batches(step, rank=rank, ranks=ranks)

    groups = {"all": (list(model.named_parameters()), rate)}
    try:
        run_of = {"param_groups": groups, "callbacks": (history, log), "manager": manager}
        world_sizes = fit(model, lambda start: map(batch, count(start)), config, **run_of).ranks
    except Preempted as preempted:
        world_sizes = []
        assert str(preempted).startswith(f"stopped after step {stop_at + 2} of {config.steps}, ")
    log.terminal = None  # which cannot be sent to the caller
    return history, log, requested, world_sizes


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 4), (2, 1), (2, 2)])
def test_parts_and_ranks_add_up_to_the_whole_batch(ranks: int, accumulate: int) -> None:
    alone, log, *_ = run(train, ranks=1)
    parts, parts_log, *_ = run(train, ranks=ranks, config=replace(CONFIG, accumulate=accumulate))
    assert near(torch.tensor(parts.weights[-1][0]), torch.tensor(alone.weights[-1][0]))
    for line, whole in zip(parts_log.lines, log.lines, strict=True):
        assert line == pytest.approx(whole, rel=1e-5)
    assert [line["step"] for line in log.lines] == [3, 6] and [line["clips_seen"] for line in log.lines] == [24, 48]


def changed_batch_of(step: int, *, rank: int, ranks: int) -> Batch:
    """The batch, each clip of which the device has to scale by a factor of its own."""
    batch = batch_of(step, rank=rank, ranks=ranks)
    changes = [partial(torch.mul, other=2.0 ** (n % 3)) for n in range(len(batch.ids))]
    scaled = torch.stack([x / change.keywords["other"] for x, change in zip(batch.inputs[0], changes, strict=True)])
    return replace(batch, inputs=(ChangedClips(scaled, tuple(changes)), *batch.inputs[1:]))


def test_each_clip_of_a_part_is_changed_by_its_own_function() -> None:
    config = replace(CONFIG, accumulate=4)
    plain, changed = (run(train, ranks=1, config=config, batches=batches)[0] for batches in (batch_of, changed_batch_of))
    assert plain.weights == changed.weights


def test_a_step_clips_the_gradient_and_follows_the_schedule() -> None:
    history, log, requested, world_sizes = run(train, ranks=1)
    assert requested == list(range(6)) and world_sizes == [[0, 1]] and history.begun == [0]
    steps, lasts, _, _, rates = map(list, zip(*history.steps, strict=True))
    assert steps == [1, 2, 3, 4, 5, 6] and lasts == [False] * 5 + [True]
    assert rates == [RATE * warmup_cosine(step, steps=6, warmup=2) for step in range(6)]
    x, target, _ = batch_of(0, rank=0, ranks=1).inputs
    model = Line(0.0)
    loss = (model.linear(x) - target["y"]).square().mean()
    loss.backward()
    assert history.steps[0][2] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert history.steps[0][3] == pytest.approx(norm, rel=1e-5) and norm > CONFIG.clip_norm  # told before clipping
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE / 2, betas=CONFIG.betas, weight_decay=0.1)
    nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip_norm)
    adamw.step()
    assert near(torch.tensor(history.weights[0][0]), model.linear.weight.detach().flatten())
    assert log.lines[0]["loss"] == pytest.approx(sum(step[2] for step in history.steps[:3]) / 3, rel=1e-5)


def test_stopped_it_continues_with_the_next_batch_and_its_callbacks_forget_nothing() -> None:
    whole, log, *_ = run(train, ranks=2, dropout=0.3)
    _, _, first, _ = run(train, ranks=2, dropout=0.3, saved=True, stop_at=3)
    rest, rest_log, second, world_sizes = run(train, ranks=2, dropout=0.3, saved=True)
    assert (first, second) == ([0, 1, 2, 3, 4], [5]) and rest.begun == [5] and world_sizes == [[0, 2]]
    assert rest.steps == whole.steps and rest.weights == whole.weights  # to the bit, the first ones from the state
    assert rest_log.lines == log.lines  # the second line is a mean over steps of both runs


def test_with_other_ranks_a_mean_continues_from_the_former_ranks_mean() -> None:
    _, log, *_ = run(train, ranks=1)
    run(train, ranks=4, saved=True, stop_at=3)
    _, rest, _, world_sizes = run(train, ranks=2, saved=True)
    assert world_sizes == [[0, 4], [5, 2]]
    assert [line["loss"] for line in rest.lines] == pytest.approx([line["loss"] for line in log.lines], rel=1e-5)


def damaged(
    *,
    rank: int,
    ranks: int,
    steps: range,
    saved: bool = False,
    save_every: int = 2,
    stop_at: int | None = None,
    initialised: bool = True,
) -> tuple[Progress | str, list[list[float]], list[int], list[dict]]:
    """Progress or message of a training, weights before each step and at the end, numbers of the batches, lines.

    steps: numbers of the batches in which rank 1 has a clip that is not finite.
    """
    model, weights, numbers = Line(0.0), [], []
    config = replace(CONFIG, steps=24, save_every=save_every, log_every=1)
    manager = None
    if saved:
        manager = CheckpointManager("line", {"run": "line", "profile": "smoke"}, keep_latest_k=1, asynchronous=False)

    def batch(number: int) -> Batch:
        weights.append(model.linear.weight.flatten().tolist())
        numbers.append(number)
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        clips = batch_of(number, rank=rank, ranks=ranks)
        if number in steps and rank == 1:
            clips.inputs[0][0, 0] = float("nan")
        return clips

    def initialise() -> None:
        assert initialised
        nn.init.constant_(model.linear.weight, 0.25)

    log, groups = TrainingLog(config, folder=Path(".runs/line")), {"all": (list(model.named_parameters()), RATE)}
    run_of = {"param_groups": groups, "callbacks": (log,), "manager": manager, "initialise": initialise}
    try:
        answer = fit(model, lambda start: map(batch, count(start)), config, **run_of)
    except (UserError, Preempted) as error:
        answer = str(error)
    return answer, [*weights, model.linear.weight.flatten().tolist()], numbers, log.lines


def test_a_step_whose_gradient_is_not_finite_changes_no_weight() -> None:
    progress, weights, _, lines = run(damaged, ranks=2, steps=range(2, 4))
    assert weights[2] == weights[3] == weights[4] != weights[5]
    assert (progress.skipped, progress.rewinds) == (2, [])
    assert [line["step"] for line in lines] == [step for step in range(1, 25) if step not in (3, 4)]


def test_after_many_such_steps_it_goes_back_to_its_last_state_and_on_with_the_next_batches() -> None:
    progress, weights, numbers, lines = run(damaged, ranks=2, steps=range(5, 15), saved=True)
    assert numbers == [*range(15), *range(15, 25)] and progress.rewinds == [[14, 1]]
    assert [line["step"] for line in lines] == [*range(1, 6), *range(15, 25)]
    assert weights[5] == weights[15] and progress.skipped == 9


def test_after_it_went_back_the_speed_is_that_of_the_steps_since() -> None:
    progress, _, numbers, lines = run(damaged, ranks=2, steps=range(14, 24), saved=True, save_every=12)
    assert progress.rewinds == [[12, 12]] and numbers == [*range(24), *range(24, 36)]
    assert [line["step"] for line in lines] == list(range(1, 25))
    timings = [json.loads(line) for line in Path(".runs/line/timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timings] == [*range(1, 15), *range(13, 25)]
    assert all(line["clips_per_s"] > 0 for line in timings)


def test_stopped_after_it_went_back_it_ends_with_the_same_bits() -> None:
    steps = range(5, 15)
    whole = run(damaged, ranks=2, steps=steps, saved=True)
    shutil.rmtree(state_folder("line", {"run": "line", "profile": "smoke"}))
    message, _, first, _ = run(damaged, ranks=2, steps=steps, saved=True, stop_at=17)
    assert message.startswith("stopped after step 18 of 24") and first[-1] == 18
    progress, weights, second, lines = run(damaged, ranks=2, steps=steps, saved=True, initialised=False)
    assert (progress, weights[-1], lines) == (whole[0], whole[1][-1], whole[3]) and second == [*range(19, 25)]


@pytest.mark.parametrize(("saved", "steps", "last"), [
    (False, range(2, 100), 11), (True, range(2, 100), 29), (False, range(23, 24), 23)
])  # fmt: skip
def test_gradients_that_stay_not_finite_end_the_run_and_the_clips_are_named(saved: bool, steps: range, last: int) -> None:
    message, weights, numbers, _ = run(damaged, ranks=2, steps=steps, saved=saved)
    path = next(Path(".runs/line").glob("not-finite-*.json"))
    assert message.endswith(f"not finite; each rank's clips and losses are in {path}; lower line.learning_rate")
    assert numbers[-1] == last and weights[-1] == weights[steps[0]]
    content = json.loads(path.read_text())["ranks"]
    assert [rank[-1]["loss"] == "nan" for rank in content] == [False, True]
    assert content[1][-1]["clips"] == [f"clip{last}-{n}" for n in range(4, 8)]


def ones(step: int, *, rank: int, ranks: int) -> Batch:
    """The same batch at every step; the global random state is another each time."""
    torch.manual_seed(1000 * os.getpid() + step)
    return Batch((torch.ones(4, 5), {"y": torch.zeros(4, 1)}, MaskedTokens(torch.zeros(4, 1, dtype=torch.int64), (1, 1, 1))))


def collections(*, rank: int, ranks: int) -> tuple[list[int], bool, bool]:
    """Batches requested when garbage was collected; whether Python collects by itself, in the training and after it."""
    collected, requested, by_itself = [], [], []

    def note(step: int, **where: int) -> Batch:
        requested.append(step)
        by_itself.append(gc.isenabled())
        return ones(step, **where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "GC_STEPS", 4)
        patch.setattr(gc, "collect", lambda: collected.append(len(requested)))
        train(rank=rank, ranks=ranks, config=replace(CONFIG, steps=10), batches=note)
    return collected, any(by_itself), gc.isenabled()


def test_garbage_is_collected_at_chosen_steps_alone() -> None:
    assert run(collections, ranks=1) == ([0, 4, 8], False, True)


def losses_of_ranks(*, rank: int, ranks: int, seed: int) -> list[list[float]]:
    """Losses of every rank with weights that stay: what dropout draws."""
    before = torch.get_rng_state()
    config = replace(CONFIG, seed=seed, weight_decay=0.0)
    history, *_ = train(rank=rank, ranks=ranks, config=config, dropout=0.5, rate=0.0, batches=ones)
    torch.set_rng_state(before)
    everyone: list = [None] * ranks
    dist.all_gather_object(everyone, [step[2] for step in history.steps])
    return everyone


def test_dropout_depends_on_seed_rank_and_step_alone() -> None:
    first, again, other = (run(losses_of_ranks, ranks=2, seed=seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert len({loss for losses in first for loss in losses}) > 8  # twelve draws: ranks and steps differ
    assert run(losses_of_ranks, ranks=1, seed=0)[0] == first[0]


@pytest.mark.parametrize(("step", "share"), [(0, 1 / 4), (3, 1.0), (4, 1.0), (14, 0.5), (24, 0.0)])
def test_the_rate_rises_in_a_line_and_falls_in_a_cosine(step: int, share: float) -> None:
    assert warmup_cosine(step, steps=24, warmup=4) == pytest.approx(share)


def test_only_matrices_of_layers_decay_and_groups_keep_their_rates() -> None:
    matrices = ("blocks.0.qkv.weight", "query_in.weight", "position_mlp.weight", "frozen.weight")
    vectors, tables = ("blocks.0.qkv.bias", "norm.weight", "distance_bias", "scale"), ("positions", "mask_token", "query")
    shapes = dict.fromkeys(matrices + tables, (2, 2)) | dict.fromkeys(vectors, (2,))
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    parameters["frozen.weight"].requires_grad_(False)
    named = list(parameters.items())
    adamw = build_adamw({"body": (named[:1], 0.1), "rest": (named[1:], 0.2)}, betas=(0.9, 0.95), weight_decay=0.05)
    groups = [(len(group["params"]), group["weight_decay"], group["lr"]) for group in adamw.param_groups]
    assert groups == [(1, 0.05, 0.1), (2, 0.05, 0.2), (7, 0.0, 0.2)]
