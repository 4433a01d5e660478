"""Train a readout on an encoder, frozen or fine-tuned, and measure it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaling4d import artifacts, benchmarks, checkpoint, config, log, optimizer, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.ranks import at, average_gradients, gather, run
from scaling4d.readout import metrics, views
from scaling4d.readout.features import Features, Standard, at_depth, layer_index
from scaling4d.readout.pretrained import load_encoder
from scaling4d.readout.split import Evaluation, Held, Lessons, Share, Sums, held, judged, reread, write_skipped
from scaling4d.readout.store import Store, opened
from scaling4d.readout.tasks import actions
from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.tasks.boxes import Boxes
from scaling4d.readout.tasks.depth import Depth
from scaling4d.readout.tasks.points import Points
from scaling4d.readout.tasks.pose import Pose
from scaling4d.readout.tasks.task import Task
from scaling4d.records import Result, UserError

TASKS: dict[str, type[Task]] = {"actions": Actions, "boxes": Boxes, "depth": Depth, "points": Points, "pose": Pose}
PROTOCOLS = ("frozen", "finetune")
HEAD = "head.safetensors"
JUDGED = 16  # clips at a time


@config.configurable
@dataclass(frozen=True)
class Recipe:
    """How a readout is trained. encoder_learning_rate: 0 leaves the encoder frozen. flattening: see Standard.of."""

    steps: int
    batch: int
    learning_rate: float
    encoder_learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    clip_norm: float
    flattening: float


def readout(encoder: str, task: str, protocol: str, settings: Mapping[str, Any]) -> Result:
    """The `readout` stage: Checkpoint in, `result.json` and the trained head out.

    Fine-tuning starts from the head that the frozen protocol trained (our choice; it saves most of the steps).
    Raises:
        UserError: unknown encoder, task or protocol, a missing checkpoint, or a benchmark that cannot be read.
    """
    started = time.time()
    if task not in TASKS or protocol not in PROTOCOLS:
        raise UserError(f"unknown readout {task!r} {protocol!r}; tasks: {', '.join(TASKS)}; protocols: {', '.join(PROTOCOLS)}")
    keys = ["profile", "seed", "readout.shared", f"readout.tasks.{task}", f"readout.{protocol}.{task}"]
    mine = config.declared(settings, keys)
    config.bind(mine["readout.shared"], mine[f"readout.tasks.{task}"], mine[f"readout.{protocol}.{task}"])
    evaluation, recipe, asked = config.build(Evaluation), config.build(Recipe), config.build(TASKS[task])
    views.check(task, asked.views, asked.test_views)
    home = artifacts.home(settings)
    folder = home / "pretrain" / encoder
    saved = Checkpoint.read(folder)
    final = home / "readout" / encoder / task / protocol
    start = final.with_name("frozen") / HEAD if protocol == "finetune" else None
    if start is not None and not start.is_file():
        raise UserError(
            f"no {start}; fine-tuning starts from the frozen readout: run `scaling4d readout {encoder} {task} frozen`"
        )
    with artifacts.folder(final) as out:
        videos, sums, took = run(
            _work,
            ranks=evaluation.ranks,
            hang_s=evaluation.hang_s,
            folder=folder,
            task=task,
            asked=asked,
            evaluation=evaluation,
            recipe=recipe,
            start=start,
            seed=mine["seed"],
            out=out,
        )
        result = result_of(saved, folder, task, protocol, asked, videos, sums, mine["seed"], evaluation.bootstrap_draws)
        result.write(out / "result.json")
        train, val = (benchmarks.folder(task, Path(evaluation.data), split) for split in benchmarks.SPLITS)
        inputs = {"checkpoint": artifacts.sha256(folder), "benchmark": artifacts.sha256(train)}
        if val != train:
            inputs["benchmark_val"] = artifacts.sha256(val)
        if start is not None:
            inputs["head"] = artifacts.sha256(start)
        asked.head(features_width=1, clip=(16, 16, 16))  # so that gin counts the head's settings as operative here too
        artifacts.write_provenance(out, stage="readout", settings=settings, keys=keys, room="readout", inputs=inputs)
    artifacts.write_run(f"readout-{encoder}-{task}-{protocol}", artifacts.sha256(final), started=started, **took)
    return result


def _work(
    *,
    rank: int,
    ranks: int,
    folder: Path,
    task: str,
    asked: Task,
    evaluation: Evaluation,
    recipe: Recipe,
    start: Path | None,
    seed: int,
    out: Path,
) -> tuple[list[str], list[Sums], dict[str, float]]:
    """Names of validation videos, their sums, and seconds: for what goes into the readout, and for the readout itself."""
    started = time.monotonic()
    encoder = load_encoder(folder)
    if recipe.batch % ranks:
        raise UserError(f"readout batch {recipe.batch} does not divide over {ranks} ranks; set Recipe.batch to a multiple")
    if isinstance(asked, Actions):
        actions.check(asked, Path(evaluation.data))
    tuned = recipe.encoder_learning_rate > 0
    encoder.requires_grad_(tuned)
    frozen = Features(encoder, evaluation.depth_fraction)
    if evaluation.feature_store and not tuned:
        frozen = stored(folder, encoder, evaluation)
    learned, seen = (Share(task, split, asked, evaluation, encoder.clip, rank, ranks) for split in benchmarks.SPLITS)
    lessons = reread(learned) if tuned else held(learned, frozen)
    inputs_s = time.monotonic() - started
    head = asked.head(features_width=encoder.width, clip=encoder.clip)
    head.initialise(seed)
    standard = Standard.none(encoder.width)
    if evaluation.standardise and isinstance(lessons, Held):
        standard = Standard.of(lessons.inputs, flattening=recipe.flattening, place_deviation=evaluation.place_deviation)
    if start is not None:
        tensors = checkpoint.load_tensors(start)
        standard = Standard(tensors.pop("standard.matrix"), tensors.pop("standard.offset"))
        head.load_state_dict(tensors)
    probe = Probe(encoder if tuned else None, standard, head, asked, evaluation.depth_fraction)
    lines = log.Steps(f"{folder.name} {task}", recipe.steps)
    _train(probe, lessons, recipe, lines, rank=rank, ranks=ranks, seed=seed)
    trained = time.monotonic()
    videos, sums, judging_s = judged(seen, frozen, probe.predict, size=JUDGED)
    inputs_s += time.monotonic() - trained - judging_s
    left_out, also = learned.all_skipped(), seen.all_skipped()
    if rank == 0:
        tensors = head.state_dict() | {"standard.matrix": standard.matrix, "standard.offset": standard.offset}
        checkpoint.save_tensors(out / HEAD, tensors)
        write_skipped(out, train=left_out, val=also)
    readout_s = time.monotonic() - started - inputs_s
    took = {"inputs_s": round(inputs_s, 2), "readout_s": round(readout_s, 2)}
    return gather(videos), gather(sums), took


def stored(folder: Path, encoder: nn.Module, evaluation: Evaluation) -> Store:
    """Where features of this encoder stay."""
    depths = (evaluation.depth_fraction, *evaluation.stored_depths)
    layers = [layer_index(depth=encoder.depth, fraction=fraction) for fraction in depths]
    store = Path(evaluation.feature_store)
    return opened(store, folder, encoder, layers=layers, wanted=layers[0], dtype=evaluation.feature_dtype)


class Probe(nn.Module):
    """Encoder (or none, where features are ready) and readout together: what a step of training changes."""

    def __init__(self, encoder: nn.Module | None, standard: Standard, head: nn.Module, asked: Task, fraction: float) -> None:
        super().__init__()
        self.encoder, self.standard, self.head, self.asked, self.fraction = encoder, standard, head, asked, fraction

    def forward(self, inputs: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Pixels `B T H W C` or features `B t n D` -> loss."""
        features = inputs if self.encoder is None else at_depth(self.encoder, inputs, self.fraction)
        return self.asked.loss(self.predict(features, target), target)

    def predict(self, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        return self.asked.predict(self.head, self.standard(features), target)


def _train(probe: Probe, lessons: Lessons, recipe: Recipe, lines: log.Steps, *, rank: int, ranks: int, seed: int) -> None:
    parts = {"head": (list(probe.head.named_parameters()), recipe.learning_rate)}
    if probe.encoder is not None:
        parts["encoder"] = (list(probe.encoder.named_parameters()), recipe.encoder_learning_rate)
    adamw, peaks = optimizer.adamw(parts, betas=recipe.betas, weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        at(f"readout step {step}")
        loss = probe(*lessons.batch(batch_of(step, recipe.batch // ranks, len(lessons), seed, rank)))
        loss.backward()
        average_gradients(probe.parameters())
        grad = nn.utils.clip_grad_norm_(probe.parameters(), recipe.clip_norm)
        if not torch.isfinite(grad):
            raise UserError(f"readout step {step}: the gradient is {grad.item()}; lower Recipe.learning_rate")
        optimizer.set_rate(adamw, peaks, optimizer.warmup_cosine(step, steps=recipe.steps, warmup=recipe.warmup_steps))
        adamw.step()
        adamw.zero_grad()
        if rank == 0:
            lr = adamw.param_groups[0]["lr"]
            lines.line(step + 1, loss=loss.item(), lr=lr, grad=grad.item(), clips=(step + 1) * recipe.batch)


def batch_of(step: int, size: int, length: int, seed: int, rank: int) -> list[int]:
    """`size` positions of an endless sequence of shuffled passes over `length` samples, a pure function of (seed, step)."""
    positions = range(step * size, (step + 1) * size)
    orders = {p // length: None for p in positions}
    for epoch in orders:
        orders[epoch] = seeds.numpy(seed, "readout_order", rank, epoch).permutation(length)
    return [int(orders[p // length][p % length]) for p in positions]


def result_of(
    saved: Checkpoint,
    folder: Path,
    task: str,
    protocol: str,
    asked: Task,
    videos: list[str],
    found: list[Sums],
    seed: int,
    draws: int,
) -> Result:
    names = sorted(set(videos))
    row = {name: index for index, name in enumerate(names)}
    table = {metric: np.zeros((len(names), 2)) for metric in found[0]}
    for video, sums in zip(videos, found, strict=True):
        for metric, pair in sums.items():
            table[metric][row[video]] += pair
    table = metrics.tracks_by_video(table)
    value = {metric: float(pairs[:, 0].sum() / pairs[:, 1].sum()) for metric, pairs in table.items() if pairs[:, 1].any()}
    primary = asked.primary
    if primary.metric not in value:
        raise UserError(f"{task}: nothing in the val split can be measured; {primary.metric} has no clip to rest on")
    rng = seeds.numpy(seed, "bootstrap", task)
    low, high = metrics.interval(*table[primary.metric].T, rng, draws=draws)
    low, high = min(low, value[primary.metric]), max(high, value[primary.metric])  # rounding, where all videos are equal
    return Result(
        encoder=saved.name,
        parameters=saved.parameters,
        task=task,
        protocol=protocol,
        metric=primary.metric,
        value=value.pop(primary.metric),
        low=low,
        high=high,
        unit=primary.unit,
        higher_is_better=primary.higher_is_better,
        examples=len(found),
        seed=seed,
        checkpoint_sha256=checkpoint.weights_sha256(folder),
        others=value,
    )
