"""Stage `pretrain`: clips in, the Checkpoint folder of one point out, here or on a cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from scaling4d import artifacts
from scaling4d.checkpoint import Checkpoint
from scaling4d.clips import loader
from scaling4d.encoders.card import write_model_card
from scaling4d.mae.masking import draw_masks
from scaling4d.pipeline import code_hashes
from scaling4d.pretrain.plan.closed_form import flops_per_clip
from scaling4d.pretrain.plan.memory import check_memory
from scaling4d.pretrain.probes import check_benchmarks
from scaling4d.pretrain.settings import HIGHER_IS_BETTER, PretrainConfig, bind_pretrain, clips_remedies
from scaling4d.pretrain.start import initialise
from scaling4d.pretrain.validate import Validation
from scaling4d.provenance import atomic_folder
from scaling4d.records import UserError, file_system_errors, remedy, write_json
from scaling4d.training import distributed
from scaling4d.training.distributed import WatchdogConfig
from scaling4d.training.fit import MOST_REWINDS, Batch, ChangedClips, fit
from scaling4d.training.launch import Job, describe, first_gpu_bytes, launch, snapshot_content
from scaling4d.training.observe import TrainingLog, peak_flops
from scaling4d.training.optimizer import ParamGroups
from scaling4d.training.parallelize import DTYPES, parallelize, save_weights
from scaling4d.training.resume import CheckpointManager, fingerprint, remove_state, state_folder


def pretrain(point: str, settings: Mapping[str, Any]) -> Path | int:
    """Train one point where its Launch settings say.

    Returns:
        The Checkpoint folder, with `losses.jsonl` and `summary.json`; or an exit code, where another process trained.
    Raises:
        UserError: unknown point or setting, no clips, gradients that stay not finite, no space for the state.
        Preempted: a signal asked to stop; the next call continues from the saved state.
    """
    pretraining = _bind_and_check(point, settings)
    provenance = provenance_of(pretraining)
    code = None if distributed.launched_by_torchrun() else launch(_job(pretraining, settings, provenance), pretraining.launch)
    if code is None:
        start_ranks(pretraining, provenance)
    if not code and distributed.is_main():
        remove_state(state_folder("pretrain", pretrain_fingerprint(pretraining, provenance)))
    return pretraining.folder if code is None else code


def describe_start(point: str, settings: Mapping[str, Any]) -> str:
    """How `pretrain` starts the ranks of a point. Raises UserError: as pretrain."""
    pretraining = _bind_and_check(point, settings)
    return describe(_job(pretraining, settings, provenance_of(pretraining)), pretraining.launch)


def _bind_and_check(point: str, settings: Mapping[str, Any]) -> PretrainConfig:
    pretraining = bind_pretrain(point, settings)
    check_benchmarks(pretraining)
    if pretraining.training.device == "cuda" and (distributed.launched_by_torchrun() or pretraining.launch.where != "slurm"):
        check_memory(pretraining, first_gpu_bytes())  # a Slurm job is submitted from another machine
    return pretraining


def pretrain_launched(point: str, snapshot: Path) -> Path | None:
    """In a rank that a launcher started: train by its snapshot. None: another rank failed with a UserError."""
    with snapshot_content(snapshot) as content:
        if content is None:
            return None
        pretraining = bind_pretrain(point, content["settings"])
        if pretraining.training.device == "cuda":
            check_memory(pretraining, first_gpu_bytes())
        start_ranks(pretraining, content["evidence"])
        return pretraining.folder


def start_ranks(pretraining: PretrainConfig, provenance: Mapping[str, Any]) -> None:
    """Run the ranks. Later edits of settings, code and data do not change `provenance`, see `provenance_of`.

    The last training state stays; the caller removes it after success.
    """
    training, runtime = pretraining.training, pretraining.runtime
    watchdog = WatchdogConfig(runtime.start_s, runtime.hang_s, artifacts.RUNS / pretraining.fit.name)
    given = {"pretraining": pretraining, "provenance": provenance}
    distributed.run(train_on_rank, ranks=training.ranks, device=training.device, watchdog=watchdog, **given)


def provenance_of(pretraining: PretrainConfig) -> dict[str, Any]:
    """Content of provenance.json: settings, the code of this process, and inputs.

    The clips are named by the sha256 of croissant.json, which lists that of their table and of every shard; the audit
    verifies the shards. Benchmarks and code of probes are named by that of the file in which stage `benchmarks` lists
    their hashes.
    """
    inputs = {"clips": artifacts.sha256(pretraining.clips / "croissant.json")}
    if pretraining.training.probe_tasks:
        with remedy(UserError, "run `dvc repro benchmarks`"):
            inputs["probes"] = artifacts.sha256(artifacts.PROBES)
    if pretraining.teacher is not None:
        inputs["teacher"] = artifacts.sha256(pretraining.teacher)
    if pretraining.start_from is not None:
        inputs["start_from"] = artifacts.sha256(pretraining.start_from)
    return artifacts.provenance_of("pretrain", pretraining.bound, code=code_hashes.running("pretrain"), inputs=inputs)


def pretrain_fingerprint(pretraining: PretrainConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """All that the result depends on, except the number and layout of ranks: a run may continue with another one."""
    settings = {key: value for key, value in provenance["settings"].items() if key != f"{pretraining.key}.Sharding"}
    settings["pretrain.Training"] = {k: v for k, v in settings["pretrain.Training"].items() if k != "ranks"}
    run = f"{pretraining.point} of profile {settings['profile']}"
    return fingerprint(run, settings=settings, inputs=provenance["inputs"], code_sha256=provenance["code"]["sha256"])


def _job(pretraining: PretrainConfig, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> Job:
    timings = artifacts.RUNS / pretraining.fit.name / "timings.jsonl"
    shown_before = timings.stat().st_size if timings.is_file() else 0

    def steps_done() -> int:
        text = timings.read_text()[shown_before:] if timings.is_file() else ""
        lines = text.split("\n")[:-1]  # without a line that is being written
        return json.loads(lines[-1])["step"] if lines else 0

    return Job(
        name=pretraining.fit.name,
        arguments=("pretrain", pretraining.point),
        setting=f"{pretraining.key}.Launch",
        ranks=pretraining.training.ranks,
        processes=1 + pretraining.runtime.workers,
        device=pretraining.training.device,
        content={"point": pretraining.point, "settings": settings, "evidence": provenance},
        state=state_folder("pretrain", pretrain_fingerprint(pretraining, provenance)),
        steps=pretraining.training.steps,
        steps_done=steps_done,
        written=partial(artifacts.is_written, pretraining.folder, provenance),
    )


@file_system_errors()
@clips_remedies()
def train_on_rank(*, rank: int, ranks: int, pretraining: PretrainConfig, provenance: Mapping[str, Any]) -> None:
    """Build, parallelize, train and validate the point in one rank. All ranks write its weights, rank 0 the rest."""
    started, training, runtime = time.time(), pretraining.training, pretraining.runtime
    model = pretraining.build()
    for teacher in getattr(model, "teacher_encoder", ()):
        teacher.to(training.device, DTYPES[training.compute])
    parallelize(model, pretraining.sharding, training, ranks=ranks)
    model.to_empty(device=training.device)
    name, state = pretraining.fit.name, pretrain_fingerprint(pretraining, provenance)
    peak_s_per_clip = flops_per_clip(model) / (ranks * peak_flops(training.device, DTYPES[training.compute]))
    folder = artifacts.RUNS / name
    log = TrainingLog(pretraining.fit, folder=folder, peak_s_per_clip=peak_s_per_clip, tensorboard=runtime.tensorboard)
    validation = Validation(model, pretraining, log)
    manager = CheckpointManager("pretrain", state, keep_latest_k=runtime.keep_latest_k, asynchronous=runtime.asynchronous)
    batches, groups = partial(_batches, pretraining, model, rank, ranks), param_groups(model, pretraining)
    callbacks = (log, validation)
    start = partial(initialise, model, pretraining.seed, pretraining.start_from)
    run = {"callbacks": callbacks, "manager": manager, "initialise": start}
    progress = fit(model, batches, pretraining.fit, param_groups=groups, **run)
    written = validation.finish()
    with atomic_folder(pretraining.folder) if rank == 0 else nullcontext() as out:
        save_weights(model, out)
        distributed.stop_watchdog()
        if rank == 0:
            losses = [line["loss"] for line in log.lines]
            tail = losses[-max(len(losses) // 20, 1) :]
            measures = {name: written[name] for name in HIGHER_IS_BETTER if name in written}
            summary = {"train_loss": sum(tail) / len(tail), **measures, "ranks": progress.ranks}
            summary |= {"best_step": written["step"]} if training.keep_best else {}
            summary |= {name: value for name in ("skipped", "rewinds") if (value := getattr(progress, name))}
            _write(out, pretraining, provenance, model, summary, {"losses": log.lines, "validation": validation.lines})
    if rank == 0:
        facts = {"runtime": asdict(runtime), "launch": asdict(pretraining.launch), **log.close()}
        artifacts.write_run(name, artifacts.sha256(pretraining.folder), started=started, **facts)
    manager.close()


def param_groups(model: nn.Module, pretraining: PretrainConfig) -> ParamGroups:
    """Two learning rates: of the matrices inside the network; of all parameters that are added to it or read pixels.

    They are one where `rate_times_width` is 0.
    Source: the widths' rule for Adam of Tensor Programs V (arXiv:2203.03466); its use here is ours.
    """
    training, named = pretraining.training, list(model.named_parameters())
    inside = {name for name, p in named if p.ndim == 2 and name.endswith("weight") and "patch_embedding" not in name}
    matrix_rate = training.rate_times_width / pretraining.model.width or training.embedding_rate
    return {
        "matrices": ([item for item in named if item[0] in inside], matrix_rate),
        "embeddings": ([item for item in named if item[0] not in inside], training.embedding_rate),
    }


def _batches(pretraining: PretrainConfig, model: nn.Module, rank: int, ranks: int, start: int) -> Iterator[Batch]:
    """This rank's clips and their masks, from step `start` on."""
    training = pretraining.training
    share = training.batch // ranks
    batches = loader.train_batches(
        pretraining.clips,
        frames=pretraining.model.clip[0],
        batch=training.batch,
        repeats=training.repeats,
        seed=pretraining.seed,
        start=start,
        steps=training.steps * (1 + MOST_REWINDS),  # a rewound training goes on with later batches
        flip=training.flip,
        reverse=training.reverse,
        crop=training.crop,
        aspect=training.aspect,
        short_side_px=training.short_side_px,
        on_device=training.device != "cpu",
        window_shards=training.window_shards,
        rank=rank,
        ranks=ranks,
        cached_clips=pretraining.runtime.cached_clips,
        workers=pretraining.runtime.workers,
        draw_masks=partial(draw_masks, model.mask_generator(), pretraining.seed, first=rank * share, count=share),
    )
    for clips in batches:
        changes = tuple(partial(loader.augment, augmentation=augmentation) for augmentation in clips.augmentations)
        yield Batch((ChangedClips(clips.pixels, changes) if changes else clips.pixels, clips.masked), clips.ids)


def _write(
    out: Path,
    pretraining: PretrainConfig,
    provenance: Mapping[str, Any],
    model: nn.Module,
    summary: Mapping[str, Any],
    lines: Mapping[str, list[dict[str, Any]]],
) -> None:
    training, flops, method = pretraining.training, flops_per_clip(model), pretraining.method.__name__  # FSDP renames a class
    counts = {"parameters": sum(p.numel() for p in model.encoder.parameters()), "clips_seen": training.steps * training.batch}
    step = summary.get("best_step", training.steps)
    saved = counts | {"clips_seen": step * training.batch}  # of the weights; the summary's are the whole training's
    checkpoint = Checkpoint(pretraining.point, method, asdict(pretraining.model), step=step, **saved, rate_hz=pretraining.rate_hz)
    content = {"point": pretraining.point, "method": method, "seed": pretraining.seed, **counts, **summary}
    content["parameters_total"] = sum(p.numel() for p in model.parameters())
    content |= {"flops_per_clip": flops, "flops": flops * counts["clips_seen"]}
    checkpoint.write_config(out)
    write_model_card(out, checkpoint, provenance, mean=pretraining.model.pixel_mean, scale=pretraining.model.pixel_scale)
    for name, content_lines in lines.items():
        if content_lines:
            (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content_lines))
    write_json(out / "summary.json", content)
    artifacts.write_provenance(out, provenance, pretraining.bound.operative)
