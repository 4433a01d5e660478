"""Train one scaling point, and make the encoders that it is compared with."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from scaling4d import artifacts, config, log, optimizer, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.clips import loader
from scaling4d.mae.build import METHODS, encoder_of, load
from scaling4d.mae.distilled import Distilled
from scaling4d.mae.encoder import PixelTokens
from scaling4d.ranks import parallel, run
from scaling4d.records import MaskedTokens, UserError, write_json

UNTRAINED = "untrained_"

config.configurable(PixelTokens)


@config.configurable
@dataclass(frozen=True)
class Training:
    """How every point is trained, so that points differ in their model alone.

    ranks: one-thread processes that share a batch; results depend on it. batch: clips a step, over all ranks.
    rate_times_width: peak learning rate of the matrices that read `width` numbers = this / width. embedding_rate: of all else
    (patch embedding, positions, tokens, norms, biases), the same at every width. warmup: share of the steps.
    clip_norm: of the gradient. flip: mirror and time-reverse clips at random. crop: smallest and largest share of the picture's
    area that a random square keeps. repeats: copies of a clip in a batch, each cropped, flipped and masked on its own (MAE-ST's
    repeated sampling: 4). window_shards: shards whose clips are shuffled together, 0: all.
    masks_per_clip: masks a validation clip is measured with. workers: processes that decode for a rank, 0: itself; results do not
    depend on it. kept_clips: decoded clips that stay in the memory of each process that decodes; nor on this.
    """

    ranks: int
    batch: int
    steps: int
    rate_times_width: float
    embedding_rate: float
    betas: tuple[float, float]
    weight_decay: float
    warmup: float
    clip_norm: float
    flip: bool
    crop: tuple[float, float]
    repeats: int
    window_shards: int
    masks_per_clip: int
    workers: int
    kept_clips: int
    log_every: int


def key_of(point: str, settings: Mapping[str, Any]) -> str:
    """Where a point's settings are: in `points`, or in `distilled` for one that has a teacher."""
    return f"distilled.{point}" if point in config.section(settings, "distilled") else f"points.{point}"


def method_of(key: str, settings: Mapping[str, Any]) -> str:
    """Name of the method that a point's settings are for.

    Raises:
        UserError: no such point, or not exactly one method.
    """
    section, taught = config.section(settings, key), key.startswith("distilled.")
    known = [name for name in METHODS if (name == "Distilled") == taught]
    if len(section) != 1 or next(iter(section)) not in known:
        raise UserError(f"{key} has {', '.join(section) or 'nothing'}; needed exactly one of {', '.join(known)}")
    return next(iter(section))


def build(point: str, settings: Mapping[str, Any], seed: int) -> nn.Module:
    """The bound model of a point with its initial weights, and with its teacher, if it has one.

    Raises:
        UserError: a teacher that was not pretrained before.
    """
    method = METHODS[method_of(key_of(point, settings), settings)]
    given = {"taught_by": encoder_of(load(_teacher(point, settings)))} if method is Distilled else {}
    model = config.build(method, **given)
    model.initialise(seed)
    return model


def _teacher(point: str, settings: Mapping[str, Any]) -> Path:
    return artifacts.home(settings) / "pretrain" / settings["distilled"][point]["Distilled"]["teacher"]


def describe(name: str, point: str, model: nn.Module, settings: Mapping[str, Any], *, step: int, clips_seen: int) -> Checkpoint:
    method = type(model).__name__
    return Checkpoint(
        name=name,
        model=method,
        settings=config.section(settings, key_of(point, settings))[method],
        parameters=sum(p.numel() for p in model.encoder.parameters()),
        step=step,
        clips_seen=clips_seen,
    )


def pretrain(point: str, settings: Mapping[str, Any]) -> Path:
    """The `pretrain` stage of one point: clips in, Checkpoint folder with `losses.jsonl` and `summary.json` out.

    Raises:
        UserError: unknown point or setting, no clips, or a loss that is not finite (before the update).
    """
    started = time.time()
    keys = ["profile", "seed", "pretrain", key_of(point, settings)]
    mine = config.declared(settings, keys)
    config.bind(mine["pretrain"], mine[keys[-1]])
    training = config.build(Training)
    home = artifacts.home(settings)
    clips = home / "clips"
    loader.count(clips, "train")  # says at once if there is nothing to train on
    with artifacts.folder(home / "pretrain" / point) as out:
        run(_train, ranks=training.ranks, point=point, settings=settings, training=training, clips=clips, out=out)
        build(point, settings, mine["seed"])  # so that gin counts the model's settings as operative here too
        inputs = {"clips": artifacts.sha256(clips)}
        if point in settings["distilled"]:
            inputs["teacher"] = artifacts.sha256(_teacher(point, settings))
        artifacts.write_provenance(out, stage="pretrain", settings=settings, keys=keys, room="pretrain", inputs=inputs)
    folder = home / "pretrain" / point
    seconds = time.time() - started
    artifacts.write_run(
        f"pretrain-{point}", artifacts.sha256(folder), started=started, clips_per_s=training.batch * training.steps / seconds
    )
    return folder


def _train(*, rank: int, ranks: int, point: str, settings: Mapping[str, Any], training: Training, clips: Path, out: Path) -> None:
    seed = settings["seed"]
    model = build(point, settings, seed)
    step_loss = parallel(model)
    adamw, peaks = optimizer.adamw(_parts(model, training), betas=training.betas, weight_decay=training.weight_decay)
    warmup = round(training.steps * training.warmup)
    batches = loader.batches(
        clips,
        split="train",
        batch=training.batch,
        seed=seed,
        start=0,
        steps=training.steps,
        flip=training.flip,
        crop=training.crop,
        repeats=training.repeats,
        window_shards=training.window_shards,
        rank=rank,
        ranks=ranks,
        kept=training.kept_clips,
        workers=training.workers,
    )
    lines, recent = [], []
    steps = log.Steps(training.steps)
    for step, batch in enumerate(batches):
        masked = model.choose(len(batch.ids), seeds.stream(seed, "mask", step, rank))
        loss = step_loss(batch.pixels, masked)
        loss.backward()
        grad = _update(model, adamw, batch.ids, step, training.clip_norm, peaks, warmup, training.steps)
        recent.append(loss.detach())
        if (step + 1) % training.log_every == 0 or step + 1 == training.steps:
            mean = torch.stack(recent).mean()
            dist.all_reduce(mean)
            lr = adamw.param_groups[0]["lr"]
            line = {
                "step": step + 1,
                "clips_seen": (step + 1) * training.batch,
                "loss": mean.item() / ranks,
                "lr": lr,
                "grad": grad,
            }
            lines.append(line)
            recent = []
            if rank == 0:
                steps.line(step + 1, loss=line["loss"], lr=lr, grad=grad, clips=line["clips_seen"])
    val_loss = validate(model, clips, training, seed=seed, rank=rank, ranks=ranks)
    if rank == 0:
        saved = describe(point, point, model, settings, step=training.steps, clips_seen=training.steps * training.batch)
        _write(out, saved, model, lines, val_loss, seed)


def _parts(model: nn.Module, training: Training) -> dict[str, tuple[list[tuple[str, nn.Parameter]], float]]:
    """Parameters by learning rate: matrices inside the network, and all that is added to it or read straight from pixels.

    Source: the widths' rule for Adam of Tensor Programs V (arXiv:2203.03466); that we use it is ours.
    """
    named = list(model.named_parameters())
    inside = {name for name, p in named if p.ndim == 2 and name.endswith("weight") and "patch_embedding" not in name}
    return {
        "matrices": ([item for item in named if item[0] in inside], training.rate_times_width / model.encoder.width),
        "embeddings": ([item for item in named if item[0] not in inside], training.embedding_rate),
    }


def _update(
    model: nn.Module,
    adamw: torch.optim.AdamW,
    ids: tuple[str, ...],
    step: int,
    clip_norm: float,
    peaks: list[float],
    warmup: int,
    steps: int,
) -> float:
    grad = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    if not torch.isfinite(grad):
        raise UserError(
            f"step {step}: the gradient is {grad.item()}; clips {', '.join(ids)}; lower pretrain.Training.rate_times_width"
        )
    optimizer.set_rate(adamw, peaks, optimizer.warmup_cosine(step, steps=steps, warmup=warmup))
    adamw.step()
    adamw.zero_grad()
    return grad.item()


@torch.no_grad()
def validate(model: nn.Module, clips: Path, training: Training, *, seed: int, rank: int, ranks: int) -> float:
    """Mean loss over every validation clip, each hidden by the same masks whatever the ranks and the model."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch in loader.every(clips, split="val", batch=16, rank=rank, ranks=ranks):
        for draw in range(training.masks_per_clip):
            chosen = [model.choose(1, seeds.stream(seed, "val_mask", name, draw)) for name in batch.ids]
            masked = MaskedTokens(torch.cat([m.kept for m in chosen]), chosen[0].grid)
            total += torch.tensor([model(batch.pixels, masked).item() * len(batch.ids), len(batch.ids)], dtype=torch.float64)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def _write(out: Path, saved: Checkpoint, model: nn.Module, lines: list[dict], val_loss: float, seed: int) -> None:
    saved.write(out, model.state_dict())
    (out / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tail = [line["loss"] for line in lines[-max(len(lines) // 20, 1) :]]
    write_json(
        out / "summary.json",
        {
            "point": saved.name,
            "method": saved.model,
            "parameters": saved.parameters,
            "parameters_total": sum(p.numel() for p in model.parameters()),
            "flops_per_clip": model.flops_per_clip(),
            "flops": model.flops_per_clip() * saved.clips_seen,
            "clips_seen": saved.clips_seen,
            "train_loss": sum(tail) / len(tail),
            "val_loss": val_loss,
            "seed": seed,
        },
    )


def baseline(encoder: str, settings: Mapping[str, Any]) -> Path:
    """The `baseline` stage: `untrained_<point>` is that point before its first step, `pixels` the patches themselves."""
    started = time.time()
    point = encoder.removeprefix(UNTRAINED)
    if encoder != "pixels" and point == encoder:
        raise UserError(f"unknown baseline {encoder!r}; needed pixels or {UNTRAINED}<point>")
    keys = ["profile", "pixels"] if encoder == "pixels" else ["profile", "seed", f"points.{point}"]
    mine = config.declared(settings, keys)
    config.bind(mine[keys[-1]])
    final = artifacts.home(settings) / "pretrain" / encoder
    with artifacts.folder(final) as out:
        if encoder == "pixels":
            tokens = config.build(PixelTokens)
            Checkpoint(encoder, "PixelTokens", mine["pixels"]["PixelTokens"], parameters=0, step=0, clips_seen=0).write(
                out, tokens.state_dict()
            )
        else:
            model = build(point, settings, mine["seed"])
            describe(encoder, point, model, settings, step=0, clips_seen=0).write(out, model.state_dict())
        artifacts.write_provenance(out, stage="baseline", settings=settings, keys=keys, room="pretrain", inputs={})
    artifacts.write_run(f"baseline-{encoder}", artifacts.sha256(final), started=started)
    return final
