"""Train a readout on an encoder, frozen or fine-tuned, and measure it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from scaling4d import artifacts, benchmarks, checkpoint, config, log, seeds
from scaling4d.benchmarks.skipped import Skipped
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.features import Features, Standard, at_depth, layer_index
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.encoders.store import Store, opened
from scaling4d.readout import metrics, views
from scaling4d.readout.split import Evaluation, Held, Share, Sums, held, judged, reread, write_skipped
from scaling4d.readout.tasks import actions
from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.tasks.boxes import Boxes
from scaling4d.readout.tasks.depth import Depth
from scaling4d.readout.tasks.points import Points
from scaling4d.readout.tasks.pose import Pose
from scaling4d.readout.tasks.task import Task
from scaling4d.readout.tune import KEYS, Means, Parts, about, fit, means_of, on, placed, saving_of, state_of
from scaling4d.records import Result, UserError
from scaling4d.training.distributed import gather, leads, run
from scaling4d.training.parallelize import gathered, whole
from scaling4d.training.resume import remove

TASKS: dict[str, type[Task]] = {"actions": Actions, "boxes": Boxes, "depth": Depth, "points": Points, "pose": Pose}
PROTOCOLS = ("frozen", "finetune")
HEAD = "head.safetensors"
READING = ("readout.key.weight", "readout.value.weight")
JUDGED = 16  # clips at a time


@config.configurable
@dataclass(frozen=True)
class Recipe:
    """How a readout is trained.

    encoder_learning_rate: 0 leaves the encoder frozen. rate_at_width: the matrices that read features, each of whose numbers is a
    sum over all channels, have `learning_rate` at features of this width, and at others in inverse proportion (ours, after
    Tensor Programs V, arXiv:2203.03466); 0: at any width (released). flattening: see Standard.of.
    """

    steps: int
    batch: int
    learning_rate: float
    rate_at_width: int
    encoder_learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    clip_norm: float
    flattening: float


@dataclass(frozen=True)
class Found:
    """What the ranks made: of every validation clip its video and the metric's sums, the head, and what the splits left out.

    took: seconds, for what goes into the readout and for the readout itself.
    """

    videos: list[str]
    sums: list[Sums]
    head: dict[str, Tensor]
    skipped: dict[str, list[Skipped]]
    took: dict[str, float] = field(default_factory=dict)


def readout(encoder: str, task: str, protocol: str, settings: Mapping[str, Any]) -> Result:
    """The `readout` stage: Checkpoint in, `result.json` and the trained head out.

    Fine-tuning starts from the head that the frozen protocol trained (our choice; it saves most of the steps).
    Raises:
        UserError: unknown encoder, task or protocol, a missing checkpoint, a benchmark that cannot be read, or settings of a
            fine-tuning that cannot be.
        Preempted: a fine-tuning was asked to stop, and the next call goes on where it stopped.
    """
    started = time.time()
    if task not in TASKS or protocol not in PROTOCOLS:
        raise UserError(f"unknown readout {task!r} {protocol!r}; tasks: {', '.join(TASKS)}; protocols: {', '.join(PROTOCOLS)}")
    tuned = protocol == "finetune"
    keys = ["profile", "seed", "readout.shared", f"readout.tasks.{task}", f"readout.{protocol}.{task}", *(KEYS if tuned else [])]
    mine = config.declared(settings, keys)
    saving = saving_of(settings) if tuned else None
    config.bind(*(mine[key] for key in keys[2:]))
    evaluation, recipe, asked = config.build(Evaluation), config.build(Recipe), config.build(TASKS[task])
    views.check(task, asked.views, asked.test_views)
    if tuned != (recipe.encoder_learning_rate > 0):
        needed = "more than 0, or the protocol frozen" if tuned else "0, or the protocol finetune"
        raise UserError(
            f"readout.{protocol}.{task}.Recipe.encoder_learning_rate is {recipe.encoder_learning_rate}; needed {needed}"
        )
    if recipe.batch % evaluation.ranks:
        raise UserError(
            f"readout batch {recipe.batch} does not divide over {evaluation.ranks} ranks; set Recipe.batch to a multiple"
        )
    means = means_of(saving, ranks=evaluation.ranks, batch=recipe.batch) if saving else None
    home = artifacts.home(settings)
    folder = home / "pretrain" / encoder
    saved = Checkpoint.read(folder)
    final = home / "readout" / encoder / task / protocol
    start = final.with_name("frozen") / HEAD if tuned else None
    if start is not None and not start.is_file():
        raise UserError(
            f"no {start}; fine-tuning starts from the frozen readout: run `scaling4d readout {encoder} {task} frozen`"
        )
    inputs = _inputs(folder, task, Path(evaluation.data), start) if leads() else {}
    if means and means.saving.every and leads():
        means = replace(means, about=about(f"{encoder}/{task}/{protocol}", "readout", mine, inputs))
    found = run(
        _work,
        ranks=evaluation.ranks,
        device=means.tuning.device if means else "cpu",
        hang_s=evaluation.hang_s,
        folder=folder,
        task=task,
        asked=asked,
        evaluation=evaluation,
        recipe=recipe,
        means=means,
        start=start,
        seed=mine["seed"],
    )
    draws = evaluation.bootstrap_draws
    result = result_of(saved, folder, task, protocol, asked, found.videos, found.sums, mine["seed"], draws)
    if leads():
        asked.head(features_width=1, clip=(16, 16, 16))  # so that gin counts the head's settings as operative here too
        made = {"settings": settings, "keys": keys, "room": "readout", "inputs": inputs}
        write(final, result, found, made, state=state_of(means), started=started)
    return result


def _inputs(folder: Path, task: str, data: Path, start: Path | None) -> dict[str, str]:
    """sha256 of what is read, by name."""
    train, val = (benchmarks.folder(task, data, split) for split in benchmarks.SPLITS)
    inputs = {"checkpoint": artifacts.sha256(folder), "benchmark": artifacts.sha256(train)}
    if val != train:
        inputs["benchmark_val"] = artifacts.sha256(val)
    if start is not None:
        inputs["head"] = artifacts.sha256(start)
    return inputs


def write(final: Path, result: Result, found: Found, made: Mapping[str, Any], *, state: Path | None, started: float) -> None:
    """A readout's folder, complete or not at all; what it could have gone on from is no longer needed then.

    Args:
        made: what provenance.json says of it, see artifacts.write_provenance.
    """
    with artifacts.folder(final) as out:
        checkpoint.save_tensors(out / HEAD, found.head)
        write_skipped(out, **found.skipped)
        result.write(out / "result.json")
        artifacts.write_provenance(out, stage="readout", **made)
    name = "-".join(("readout", *final.parts[-3:]))  # encoder, task, protocol
    artifacts.write_run(name, artifacts.sha256(final), started=started, **found.took)
    if state is not None:
        remove(state)


def _work(
    *,
    rank: int,
    ranks: int,
    folder: Path,
    task: str,
    asked: Task,
    evaluation: Evaluation,
    recipe: Recipe,
    means: Means | None,
    start: Path | None,
    seed: int,
) -> Found:
    started = time.monotonic()
    encoder = load_encoder(folder)
    if isinstance(asked, Actions):
        actions.check(asked, Path(evaluation.data))
    encoder.requires_grad_(means is not None)
    frozen = Features(encoder, evaluation.depth_fraction)
    if evaluation.feature_store and means is None:
        frozen = stored(folder, encoder, evaluation)
    learned, seen = (Share(task, split, asked, evaluation, encoder.clip, rank, ranks) for split in benchmarks.SPLITS)
    lessons = reread(learned) if means else held(learned, frozen)
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
    device = means.tuning.device if means else "cpu"
    given = {"standard": standard.to(device), "asked": asked, "fraction": evaluation.depth_fraction}
    probe = Probe(encoder if means else None, head=head, **given)
    if means:
        probe = placed(probe, means, ranks)
    fit(
        probe,
        _parts(probe, recipe),
        lambda step: lessons.batch(batch_of(step, recipe.batch // ranks, len(lessons), seed, rank)),
        recipe,
        means,
        log.Steps(f"{folder.name} {task}", recipe.steps),
        what="readout",
        rank=rank,
        ranks=ranks,
        seed=seed,
    )
    tensors = {name: whole(value).cpu() for name, value in probe.head.state_dict().items()}
    if means:
        again = asked.head(features_width=encoder.width, clip=encoder.clip)
        probe = gathered(
            probe, lambda: Probe(load_encoder(folder), head=again, **given), compute=means.tuning.compute, device=device
        )
        frozen = Features(probe.encoder, evaluation.depth_fraction, device)
    trained = time.monotonic()
    videos, sums, judging_s = judged(seen, frozen, lambda x, target: probe.predict(x, on(target, device)), size=JUDGED)
    inputs_s += time.monotonic() - trained - judging_s
    skipped = {"train": learned.all_skipped(), "val": seen.all_skipped()}
    readout_s = time.monotonic() - started - inputs_s
    took = {"inputs_s": round(inputs_s, 2), "readout_s": round(readout_s, 2)}
    tensors |= {"standard.matrix": standard.matrix, "standard.offset": standard.offset}
    return Found(gather(videos), gather(sums), tensors, skipped, took)


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


def _parts(probe: Probe, recipe: Recipe) -> Parts:
    named, width = dict(probe.head.named_parameters()), probe.head.readout.key.in_features
    reading = [(name, named.pop(name)) for name in READING]
    share = recipe.rate_at_width / width if recipe.rate_at_width else 1.0
    parts = {"head": (list(named.items()), recipe.learning_rate), "reading": (reading, share * recipe.learning_rate)}
    if probe.encoder is not None:
        parts["encoder"] = (list(probe.encoder.named_parameters()), recipe.encoder_learning_rate)
    return parts


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
