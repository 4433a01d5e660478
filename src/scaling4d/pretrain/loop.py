"""Train one scaling point: the same loop on a laptop and on a cluster, and the same bits whether it was interrupted or not."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling4d import artifacts, code, config, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.clips import loader
from scaling4d.pretrain.observe import Observer, peak_flops
from scaling4d.pretrain.point import build, describe, key_of, keys_of, sections, teacher_of
from scaling4d.pretrain.settings import Running, Training
from scaling4d.pretrain.validate import picture, validate
from scaling4d.records import ClipBatch, MaskedTokens, Preempted, UserError, write_json
from scaling4d.training import optimizer
from scaling4d.training.distributed import anyone, at, leads, stop_wanted, stopped, unwatched
from scaling4d.training.distributed import run as in_ranks
from scaling4d.training.parallelize import TYPES, Sharding, last_part, mine, reduce, spread, whole
from scaling4d.training.resume import State, claim, folder_of, refusals, remove, tensors_of

SHARDS = "croissant.json"  # of a clips folder: the sha256 of its table and of every shard
MASKED_TOGETHER = 8  # clips whose masks are one draw, however many ranks share them


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    step: steps done. loader: state of the clips' order. lines: of losses.jsonl and validations of validation.jsonl, so far.
    recent: of every rank, the losses since the last line. ranks: `[from_step, ranks]`, one more whenever their number changed.
    """

    step: int
    loader: dict[str, int]
    lines: list[dict]
    validations: list[dict]
    recent: list[list[float]]
    ranks: list[list[int]]


@dataclass(frozen=True)
class Run:
    """What is trained and how: the same in every rank."""

    point: str
    settings: Mapping[str, Any]
    training: Training
    running: Running
    sharding: Sharding

    @property
    def keys(self) -> list[str]:
        """The settings that the stage declares: those on which its result depends."""
        return ["profile", "seed", "pretrain.Training", *keys_of(self.point, self.settings)]

    @property
    def home(self) -> Path:
        return artifacts.home(self.settings)

    @property
    def clips(self) -> Path:
        return self.home / "clips"

    @property
    def seed(self) -> int:
        return self.settings["seed"]


def pretrain(point: str, settings: Mapping[str, Any]) -> Path:
    """The `pretrain` stage of one point: clips in, Checkpoint folder with `losses.jsonl` and `summary.json` out.

    Raises:
        UserError: unknown point or setting, no clips, a loss that is not finite (before the update), no room for the state.
        Preempted: it was asked to stop, and the next call goes on where it stopped.
    """
    run = prepare(point, settings)
    made = made_of(run)
    folder = train(run, made)
    if leads():
        remove(state_of(run, made))
    return folder


def train(run: Run, made: Mapping[str, Any]) -> Path:
    """The same of a run that was prepared. Its last state stays; whoever calls removes it when nothing can go wrong any more.

    Args:
        made: as `made_of` says; settings, code and data may change while the run goes on, and this does not.
    """
    in_ranks(_train, ranks=run.training.ranks, device=run.training.device, hang_s=run.running.hang_s, run=run, made=made)
    return run.home / "pretrain" / run.point


def made_of(run: Run) -> dict[str, Any]:
    """What the result is made of, as provenance.json says it: settings and the code of this process as they are now, and inputs.

    The clips are named by the sha256 of the list of their shards' sha256: audit verifies the bytes.
    """
    return {
        "stage": "pretrain",
        "settings": config.declared(run.settings, run.keys),
        "overrides": config.overrides(run.settings, run.keys),
        "code": code.running("pretrain"),
        "inputs": {"clips": artifacts.sha256(run.clips / SHARDS)} | _teacher_sha(run),
    }


def state_of(run: Run, made: Mapping[str, Any]) -> Path:
    """The folder of a run's state."""
    return folder_of("pretrain", _about(run, made))


def _about(run: Run, made: Mapping[str, Any]) -> dict[str, Any]:
    """A run may go on with another number of ranks, on which its weights lie in another way."""
    settings = {key: dict(value) if isinstance(value, Mapping) else value for key, value in made["settings"].items()}
    del settings["pretrain.Training"]["ranks"], settings[f"{key_of(run.point, run.settings)}.{Sharding.__name__}"]
    return {
        "run": run.point,
        "profile": run.settings["profile"],
        "settings": settings,
        "inputs": made["inputs"],
        "code": made["code"]["sha256"],
    }


def prepare(point: str, settings: Mapping[str, Any]) -> Run:
    """Everything that can be refused before a rank is started or a clip is read.

    Raises:
        UserError: unknown point or setting, a mesh or a batch that does not divide, no such device, no teacher, no clips.
    """
    how = {name: config.section(settings, f"pretrain.{name}") for name in ("Running", "Training")}
    config.bind({"Running": how.pop("Running")})
    running = config.build(Running)
    config.bind(how, sections(point, settings))  # and so what is written as in force is what the result depends on
    training, sharding = config.build(Training), config.build(Sharding)
    sharding.check(ranks=training.ranks, batch=training.batch)
    loader.check(
        batch=training.batch,
        ranks=training.ranks,
        repeats=training.repeats,
        crop=training.crop,
        window_shards=training.window_shards,
        workers=running.workers,
    )
    for name, value, known in (("device", training.device, ("cpu", "cuda")), ("compute", training.compute, tuple(TYPES))):
        if value not in known:
            raise UserError(f"pretrain.Training.{name} = {value!r}; needed {' or '.join(known)}")
    least = dict.fromkeys(("steps", "log_every", "masks_per_clip"), 1) | dict.fromkeys(("val_clips", "validate_every"), 0)
    _least("Training", training, least)
    _least("Running", running, {"save_every": 1, "keep": 1, "kept_clips": 0})
    if not 0 <= training.ema < 1:
        raise UserError(f"pretrain.Training.ema = {training.ema}; needed 0 (none) or a share below 1, such as 0.999")
    if point in settings["distilled"]:
        Checkpoint.read(teacher_of(point, settings))
    run = Run(point, settings, training, running, sharding)
    loader.count(run.clips, "train")
    return run


def _least(section: str, found: Training | Running, least: Mapping[str, int]) -> None:
    for name, value in least.items():
        if getattr(found, name) < value:
            raise UserError(f"pretrain.{section}.{name} is {getattr(found, name)}; needed {value} or more")


@refusals()
def _train(*, rank: int, ranks: int, run: Run, made: Mapping[str, Any]) -> None:
    started, training, running = time.time(), run.training, run.running
    model = _model(run, ranks)
    adamw, peaks = optimizer.adamw(_parts(model, training), betas=training.betas, weight_decay=training.weight_decay)
    optimizer.moments(adamw)
    average = {name: p.detach().clone() for name, p in model.named_parameters()} if training.ema else {}
    tensors = tensors_of(model, adamw) | {f"average.{name}": value for name, value in average.items()}
    batches = _batches(run, rank, ranks)

    folder = state_of(run, made)
    lock = claim(folder, _about(run, made)) if rank == 0 else None
    dist.barrier()
    state = State(folder, keep=running.keep, asynchronous=running.asynchronous, rank=rank, ranks=ranks)
    found = state.load(tensors)
    first = Progress(step=0, loader=batches.state_dict(), lines=[], validations=[], recent=[], ranks=[])
    done = Progress(**found) if found else first
    optimizer.count_steps(adamw, done.step)
    batches.load_state_dict(done.loader)
    lines, validations, recent = done.lines, done.validations, _mine(done.recent, rank, ranks, training.device)
    worlds = done.ranks if done.ranks and done.ranks[-1][1] == ranks else [*done.ranks, [done.step, ranks]]
    observer = _observer(run, model, start=done.step, rank=rank, ranks=ranks)

    with stop_wanted() as wanted:
        for step in range(done.step, training.steps):
            last = step + 1 == training.steps
            observer.step(step)
            at(f"step {step}, reading clips", 2 * step)
            with observer.waiting():
                batch = next(batches)
            at(f"step {step}, computing", 2 * step + 1)
            loss = _gradients(model, batch, _masks(run, model, step, rank, ranks), run.sharding.accumulate)
            grad = _update(run, model, adamw, peaks, step, batch, loss)
            for name, p in model.named_parameters() if average else ():
                mine(average[name]).lerp_(mine(p.detach()), 1 - training.ema)
            recent.append(loss)
            if last or (step + 1) % training.log_every == 0:
                lines.append(_line(step, recent, grad, adamw.param_groups[0]["lr"], training.batch, ranks))
                recent = []
                observer.line(lines[-1])
                state.finish()
            if training.validate_every and (step + 1) % training.validate_every == 0 and not last:
                val_loss = validate(model, run.clips, training, seed=run.seed, rank=rank, ranks=ranks)
                validations.append({"step": step + 1, "val_loss": val_loss})
                observer.validation(step + 1, val_loss, picture(model, run.clips, seed=run.seed))
            stop = anyone(wanted)
            if stop or last or (step + 1) % running.save_every == 0:
                at(f"step {step}, saving")
                progress = Progress(step + 1, batches.state_dict(), lines, validations, _of_all(recent, ranks), worlds)
                state.save(step + 1, asdict(progress), tensors)
            if stop or last:
                state.finish()
            if stop:
                raise Preempted(stopped(step + 1, training.steps))
    if anyone(wanted):  # since the last step was saved; from now on a request ends this process at once
        raise Preempted(stopped(training.steps, training.steps))

    with torch.no_grad():
        for name, p in model.named_parameters() if average else ():
            p.copy_(average[name])
    val_loss = validate(model, run.clips, training, seed=run.seed, rank=rank, ranks=ranks)
    weights = _weights(model, rank)
    unwatched()
    if lock:
        _write(run, made, model, weights, lines, validations, val_loss, worlds)
        how = {
            "running": asdict(running),
            "launch": dict(config.section(run.settings, f"{key_of(run.point, run.settings)}.Launch")),
        }
        artifacts.write_run(
            f"pretrain-{run.point}",
            artifacts.sha256(run.home / "pretrain" / run.point),
            started=started,
            **how,
            **observer.close(),
        )
        lock.close()


def _model(run: Run, ranks: int) -> nn.Module:
    """The point's model in its place with its first weights."""
    device = run.training.device
    model = build(run.point, run.settings)
    for teacher in getattr(model, "taught_by", ()):
        teacher.to(device, TYPES[run.training.compute])
    first = {"initialise": lambda: model.initialise(run.seed)}
    spread(model, run.sharding, ranks=ranks, device=device, compute=run.training.compute, **first)
    return model


def _parts(model: nn.Module, training: Training) -> dict[str, tuple[list[tuple[str, nn.Parameter]], float]]:
    """Parameters by learning rate: matrices inside the network, and all that is added to it or read straight from pixels.

    Source: the widths' rule for Adam of Tensor Programs V (arXiv:2203.03466); that we use it is ours. Rates in proportion to the
    batch: arXiv:2205.09113.
    """
    named = list(model.named_parameters())
    inside = {name for name, p in named if p.ndim == 2 and name.endswith("weight") and "patch_embedding" not in name}
    factor = training.batch / training.rates_at_batch
    return {
        "matrices": ([item for item in named if item[0] in inside], factor * training.rate_times_width / model.encoder.width),
        "embeddings": ([item for item in named if item[0] not in inside], factor * training.embedding_rate),
    }


def _batches(run: Run, rank: int, ranks: int) -> loader.Batches:
    training = run.training
    return loader.batches(
        run.clips,
        split="train",
        batch=training.batch,
        seed=run.seed,
        start=0,
        steps=training.steps,
        flip=training.flip,
        crop=training.crop,
        repeats=training.repeats,
        window_shards=training.window_shards,
        rank=rank,
        ranks=ranks,
        kept=run.running.kept_clips,
        workers=run.running.workers,
    )


def _teacher_sha(run: Run) -> dict[str, str]:
    return {"teacher": artifacts.sha256(teacher_of(run.point, run.settings))} if run.point in run.settings["distilled"] else {}


def _observer(run: Run, model: nn.Module, *, start: int, rank: int, ranks: int) -> Observer:
    training, running = run.training, run.running
    return Observer(
        artifacts.RUNS / f"pretrain-{run.point}" if rank == 0 else None,
        steps=training.steps,
        start=start,
        batch=training.batch,
        flops_per_clip=model.flops_per_clip(),
        peak=ranks * peak_flops(training.device, TYPES[training.compute]),
        tensorboard=running.tensorboard,
        profile=running.profile,
    )


def _masks(run: Run, model: nn.Module, step: int, rank: int, ranks: int) -> MaskedTokens:
    """What of this rank's clips is seen; a clip's mask depends on its place in the batch and not on how many ranks share it."""
    clips = run.training.batch // ranks
    first = rank * clips
    groups = range(first // MASKED_TOGETHER, -(-(first + clips) // MASKED_TOGETHER))
    drawn = [model.choose(MASKED_TOGETHER, seeds.stream(run.seed, "mask", step, group)) for group in groups]
    skipped = first - groups[0] * MASKED_TOGETHER
    return MaskedTokens(torch.cat([masked.kept for masked in drawn])[skipped : skipped + clips], drawn[0].grid)


def _gradients(model: nn.Module, batch: ClipBatch, masked: MaskedTokens, parts: int) -> Tensor:
    """Sum the gradients of this rank's clips, part by part, and over the ranks; the mean loss of this rank's clips."""
    device = next(model.parameters()).device
    mean = torch.zeros((), device=device)
    for part, (some, kept) in enumerate(zip(batch.pixels.chunk(parts), masked.kept.chunk(parts), strict=True)):
        last_part(model, part + 1 == parts)
        pixels, of_them = some.to(device, non_blocking=True), MaskedTokens(kept.to(device, non_blocking=True), masked.grid)
        loss = model(pixels, of_them) / parts
        loss.backward()
        mean += loss.detach()
    reduce(model)
    return mean


def _update(
    run: Run, model: nn.Module, adamw: torch.optim.AdamW, peaks: list[float], step: int, batch: ClipBatch, loss: Tensor
) -> float:
    """One step of AdamW; returns the gradient's norm before it is clipped.

    Raises:
        UserError: the gradient is not finite; nothing was updated, and the batch is written down.
    """
    training = run.training
    grad = whole(nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm))
    if not torch.isfinite(grad):
        raise UserError(_not_finite(run, step, grad.item(), batch, loss))
    share = optimizer.warmup_cosine(step, steps=training.steps, warmup=round(training.steps * training.warmup))
    optimizer.set_rate(adamw, peaks, share)
    adamw.step()
    adamw.zero_grad()
    return grad.item()


def _not_finite(run: Run, step: int, grad: float, batch: ClipBatch, loss: Tensor) -> str:
    """Write down what every rank had in its hands, and say so."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, {"loss": str(loss.item()), "clips": batch.ids})
    path = artifacts.RUNS / f"pretrain-{run.point}" / f"not-finite-{step:08d}.json"
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"step": step, "gradient": str(grad), "ranks": found})
    return (
        f"step {step}: the gradient is {grad}; clips {', '.join(batch.ids[:2])} ... and each rank's loss are in {path}; "
        "lower pretrain.Training.rate_times_width"
    )


def _weights(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """All weights on rank 0, none elsewhere; one at a time is put together."""
    found = {}
    for name, value in model.state_dict().items():
        together = whole(value)
        if rank == 0:
            found[name] = together.cpu()
    return found


def _line(step: int, recent: list[Tensor], grad: float, lr: float, batch: int, ranks: int) -> dict[str, Any]:
    """A line of losses.jsonl: the mean loss since the last one, over all ranks."""
    mean = torch.stack(recent).mean()
    dist.all_reduce(mean)
    return {"step": step + 1, "clips_seen": (step + 1) * batch, "loss": mean.item() / ranks, "lr": lr, "grad": grad}


def _of_all(recent: list[Tensor], ranks: int) -> list[list[float]]:
    found: list[list[float]] = [[]] * ranks
    dist.all_gather_object(found, [loss.item() for loss in recent])
    return found


def _mine(recent: list[list[float]], rank: int, ranks: int, device: str) -> list[Tensor]:
    """This rank's losses since the last line; where ranks were more or fewer, their mean."""
    losses = recent[rank] if len(recent) == ranks else [sum(step) / len(step) for step in zip(*recent, strict=True)]
    return [torch.tensor(loss, device=device) for loss in losses]


def _write(
    run: Run,
    made: Mapping[str, Any],
    model: nn.Module,
    weights: Mapping[str, Tensor],
    lines: list[dict],
    validations: list[dict],
    val_loss: float,
    worlds: list[list[int]],
) -> None:
    training, final = run.training, run.home / "pretrain" / run.point
    clips_seen = training.steps * training.batch
    saved = describe(run.point, run.point, model, run.settings, step=training.steps, clips_seen=clips_seen)
    tail = [line["loss"] for line in lines[-max(len(lines) // 20, 1) :]]
    with artifacts.folder(final) as out:
        saved.write(out, weights)
        for name, content in (("losses.jsonl", lines), ("validation.jsonl", validations)):
            if content:
                (out / name).write_text("".join(json.dumps(line) + "\n" for line in content))
        write_json(
            out / "summary.json",
            {
                "point": saved.name,
                "method": saved.model,
                "parameters": saved.parameters,
                "parameters_total": sum(p.numel() for p in model.parameters()),
                "flops_per_clip": model.flops_per_clip(),
                "flops": model.flops_per_clip() * clips_seen,
                "clips_seen": clips_seen,
                "train_loss": sum(tail) / len(tail),
                "val_loss": val_loss,
                "seed": run.seed,
                "ranks": worlds,
            },
        )
        write_json(out / "provenance.json", made)
        (out / "operative_config.gin").write_text(config.operative())
