"""Stage `readout`: train a readout on an encoder by one of three protocols, and measure it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from scaling4d import artifacts, benchmarks, checkpoint, config, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.config import StageConfig
from scaling4d.pipeline import code_hashes
from scaling4d.provenance import atomic_folder
from scaling4d.readout import metrics
from scaling4d.readout.data import RankSplit, evaluate
from scaling4d.readout.heads import HeadConfig
from scaling4d.readout.protocols import (
    HEAD,
    PROTOCOLS,
    Classifier,
    ClassifierConfig,
    EvaluationConfig,
    ReadoutConfig,
    ReadoutProtocol,
    SavingConfig,
)
from scaling4d.readout.tasks import TASKS
from scaling4d.readout.tasks.task import MetricSums
from scaling4d.records import Result, UserError, did_you_mean, file_system_errors, write_json
from scaling4d.training import distributed
from scaling4d.training.distributed import WatchdogConfig
from scaling4d.training.fit import FitConfig, fit
from scaling4d.training.launch import Job, LaunchConfig, launch, snapshot_content
from scaling4d.training.observe import TrainingLog
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig, parallelize, unshard
from scaling4d.training.resume import CheckpointManager, fingerprint_of, remove_state, state_folder

BETAS = (0.9, 0.999)  # AdamW's default; released readouts publish none
BOOTSTRAP_DRAWS = 1000  # ours


def readout(encoder: str, task: str, protocol: str, settings: Mapping[str, Any], *, home: Path | None = None) -> Result | int:
    """Checkpoint in, `result.json` and the trained head out, by ranks that run where readout.Launch says.

    Args:
        home: folder of the artifacts, outside the pipeline: a result with the same provenance is kept there. None: the
            profile's, where DVC decides what runs.
    Returns:
        The result; or an exit code, where another process trained.
    Raises:
        UserError: unknown encoder, task or protocol, no checkpoint, an unreadable benchmark, settings that do not fit.
        Preempted: a signal asked a fine-tuning to stop; the next call continues from its saved state, if it saves any.
    """
    if protocol not in PROTOCOLS or task not in PROTOCOLS[protocol].tasks:
        limits = [f"{p.name}: {', '.join(p.tasks)} alone" for p in PROTOCOLS.values() if p.tasks != tuple(TASKS)]
        protocols = f"{', '.join(PROTOCOLS)} ({'; '.join(limits)})"
        raise UserError(f"unknown readout {task!r} {protocol!r}; tasks: {', '.join(TASKS)}; protocols: {protocols}")
    folder = home or artifacts.home(settings)
    bound, readout_config = bind_readout(encoder, task, PROTOCOLS[protocol], settings, folder)
    names, provenance = (encoder, task, protocol), None
    if distributed.is_main():
        code = code_hashes.running("readout") if readout_config.saving or home else artifacts.code_hash("readout")
        provenance = artifacts.provenance_of("readout", bound, code=code, inputs=input_hashes(readout_config))
        if home and artifacts.is_written(final := _folder(names, readout_config), provenance):
            return Result.read(final / "result.json")
    if distributed.launched_by_torchrun():
        return _start_ranks(names, bound, readout_config, provenance)
    state, final = state_folder("readout", _fingerprint(names, provenance)), _folder(names, readout_config)
    content = {"names": names, "settings": settings, "evidence": provenance, "home": folder.as_posix()}
    where = {"ranks": readout_config.evaluation.ranks, "processes": 1, "device": readout_config.device}
    where |= {"state": state, "written": lambda: artifacts.is_written(final, provenance)}
    job = Job("-".join(("readout", *names)), ("readout", *names), "readout.Launch", content=content, **where)
    exit_code = launch(job, bound[LaunchConfig])
    return _start_ranks(names, bound, readout_config, provenance) if exit_code is None else exit_code


def readout_launched(snapshot: Path) -> Result | None:
    """In a rank that a launcher started: a readout by its snapshot. None: another rank failed with a UserError."""
    with snapshot_content(snapshot) as content:
        if content is None:
            return None
        (encoder, task, protocol), settings = content["names"], content["settings"]
        bound, readout_config = bind_readout(encoder, task, PROTOCOLS[protocol], settings, Path(content["home"]))
        return _start_ranks((encoder, task, protocol), bound, readout_config, content["evidence"])


def _start_ranks(
    names: tuple[str, str, str], bound: StageConfig, readout_config: ReadoutConfig, provenance: Mapping[str, Any] | None
) -> Result:
    """Run the ranks of a readout of encoder, task and protocol, and write its folder.

    provenance: content of provenance.json; None: this process does not write.
    """
    started, name, protocol = time.time(), "-".join(("readout", *names)), names[-1]
    evaluation, saving = readout_config.evaluation, readout_config.saving
    state = _fingerprint(names, provenance) if provenance and saving and saving.save_every else None
    watchdog = WatchdogConfig(evaluation.start_s, evaluation.hang_s, artifacts.RUNS / name)
    where = {"ranks": evaluation.ranks, "device": readout_config.device, "watchdog": watchdog}
    arguments = {"protocol": PROTOCOLS[protocol](readout_config), "name": name, "state": state}
    videos, sums, head, held_out, skipped, seconds = distributed.run(_train_and_evaluate_on_rank, **where, **arguments)
    result = result_of(Checkpoint.read(readout_config.folder), readout_config, protocol, videos, sums)
    if distributed.is_main():
        final = _folder(names, readout_config)
        with atomic_folder(final) as out:
            checkpoint.save_tensors(out / HEAD, head)
            if held_out:
                (out / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held_out))
            if skipped:
                write_json(out / "skipped.json", skipped)
            result.write(out / "result.json")
            artifacts.write_provenance(out, provenance, bound.operative)
        artifacts.write_run(name, artifacts.sha256(final), started=started, **seconds)
        if state is not None:
            remove_state(state_folder("readout", state))
    return result


def _folder(names: tuple[str, str, str], readout_config: ReadoutConfig) -> Path:
    return readout_config.folder.parents[1] / "readout" / Path(*names)


def _fingerprint(names: tuple[str, str, str], provenance: Mapping[str, Any]) -> dict[str, Any]:
    return fingerprint_of(f"{'/'.join(names)} of profile {provenance['settings']['profile']}", provenance)


def bind_readout(
    encoder: str, task: str, protocol: type[ReadoutProtocol], settings: Mapping[str, Any], home: Path
) -> tuple[StageConfig, ReadoutConfig]:
    """Bind and check a readout's settings before a rank starts. Raises UserError: as `readout`.

    home: folder of the profile's artifacts.
    """
    bound = bind_task(task, protocol, settings)
    recipe = protocol.recipe_of(bound[protocol.recipe_class], encoder)
    _check_batch(task, protocol, bound, recipe)
    folder = home / "pretrain" / encoder
    if not protocol.supports(model := Checkpoint.read(folder).model):
        problem = f"{encoder} is a {model}, which this protocol cannot fine-tune"
        raise UserError(f"{problem}; take it out of encoders.{protocol.name}")
    return bound, ReadoutConfig(
        folder=folder,
        task_name=task,
        task=bound[TASKS[task]],
        seed=bound.declared["seed"],
        evaluation=bound[EvaluationConfig],
        recipe=recipe,
        head=bound.configs.get(HeadConfig),
        compute=bound[ComputeConfig],
        sharding=bound[ShardingConfig],
        saving=bound.configs.get(SavingConfig),
        frozen_head=protocol.frozen_head(home, encoder, task),
    )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError: settings that some readout of the profile's tasks refuses."""
    for protocol in PROTOCOLS.values():
        for task in settings["benchmarks"]["tasks"]:
            if task in protocol.tasks:
                bound = bind_task(task, protocol, settings)
                for encoder in settings["encoders"][protocol.name]:
                    _check_batch(task, protocol, bound, protocol.recipe_of(bound[protocol.recipe_class], encoder))
                if protocol is Classifier:
                    _check_names(bound[ClassifierConfig], settings)


def _check_names(recipe: ClassifierConfig, settings: Mapping[str, Any]) -> None:
    points = {name for group in config.POINTS for name in settings[group]}
    for name in recipe.per_encoder:
        if name.removeprefix("untrained_") not in points:
            hint = did_you_mean(name, points) or f"; points: {', '.join(sorted(points))}"
            raise UserError(f"readout.classifier.Classifier.per_encoder has {name!r}, which is no point{hint}")


def bind_task(task: str, protocol: type[ReadoutProtocol], settings: Mapping[str, Any]) -> StageConfig:
    """Bind a task's settings for any encoder. Raises UserError: settings that do not fit."""
    keys = protocol.config_keys(task)
    unrecorded = {"readout.Launch": LaunchConfig} | ({"readout.saving": SavingConfig} if protocol.trains_encoder else {})
    bound = config.bind(settings, ["profile", "seed", *keys.values()], *keys, unrecorded=unrecorded)
    bound_task = bound[TASKS[task]]
    several = bound_task.train_windows > 1 or (bound_task.test_views[0] > 1 and not bound_task.pools)
    if bound[EvaluationConfig].windows == "first" and several:
        counts = f"train_windows = {bound_task.train_windows} and test_views = {list(bound_task.test_views)}"
        raise UserError(f"readout.tasks.{task}: {counts}; needed 1 and [1, 1], or readout.Evaluation.windows: random")
    return bound


def _check_batch(task: str, protocol: type[ReadoutProtocol], bound: StageConfig, recipe: Any) -> None:
    ranks, sharding = bound[EvaluationConfig].ranks, bound[ShardingConfig]
    try:
        protocol.check_batch(recipe, ranks)
        sharding.check(ranks=ranks, batch=recipe.batch)
    except ValueError as error:
        raise UserError(f"{protocol.recipe_key(task)}: {error}") from error


def input_hashes(readout_config: ReadoutConfig) -> dict[str, str]:
    """sha256 by name of all that is read."""
    root = Path(readout_config.evaluation.data)
    train, val = (benchmarks.find_benchmark(readout_config.task_name, root, split).folder for split in benchmarks.SPLITS)
    paths = {"checkpoint": readout_config.folder, "benchmark": train, "head": readout_config.frozen_head}
    paths["benchmark_val"] = val if val != train else None
    return {name: artifacts.sha256(path) for name, path in paths.items() if path}


@file_system_errors()
def _train_and_evaluate_on_rank(
    *, rank: int, ranks: int, protocol: ReadoutProtocol, name: str, state: Mapping[str, Any] | None
) -> tuple[list[str], list[MetricSums], dict[str, Tensor], list[dict[str, float]], list[dict[str, Any]], dict[str, float]]:
    """One rank of a readout.

    Returns all ranks' videos and metric sums, the head's weights, held-out losses, skipped items, seconds.
    """
    started, readout_config = time.monotonic(), protocol.config
    evaluation, recipe, saving = readout_config.evaluation, readout_config.recipe, readout_config.saving
    root, task, sharding = Path(evaluation.data), readout_config.task, readout_config.sharding
    task.check_benchmark(root)
    if rank == 0:
        print(benchmarks.describe_use(readout_config.task_name, root), file=sys.stderr, flush=True)
    encoder = readout_config.load_encoder().requires_grad_(protocol.trains_encoder)
    task.check_clip(encoder.clip)
    windows_seed = readout_config.seed if evaluation.windows == "random" else None
    where = (task, root, evaluation.max_bad_share, encoder.clip, rank, ranks, windows_seed)
    train = RankSplit(readout_config.task_name, "train", evaluation.train_items, *where)
    val = RankSplit(readout_config.task_name, "val", evaluation.val_items, *where)
    train_set = protocol.train_set(train, encoder)
    inputs_s = time.monotonic() - started
    model = protocol.build(encoder, train_set)
    if protocol.trains_encoder:
        parallelize(model, sharding, readout_config.compute, ranks=ranks, float32_modules=[model.head])
    model.to(readout_config.device)
    fit_config = FitConfig(
        **{key: getattr(recipe, key) for key in ("steps", "batch", "weight_decay", "warmup_steps")},
        name=name,
        betas=BETAS,
        clip_norm=protocol.clip_norm,
        seed=readout_config.seed,
        rate_setting=f"learning_rate of {type(recipe).__name__.removesuffix('Config')}",
        device=readout_config.device,
        accumulate=sharding.accumulate,
        log_every=10,  # ours; no result depends on it
        save_every=saving.save_every if saving else 0,
    )
    manager = None
    if fit_config.save_every:
        states = [state]
        dist.broadcast_object_list(states, device=torch.device("cpu"))  # of torchrun's ranks only rank 0 hashes the inputs
        manager = CheckpointManager("readout", states[0], keep_latest_k=saving.keep_latest_k, asynchronous=False)
    groups, log = protocol.param_groups(model), TrainingLog(fit_config)
    early_stopping = protocol.early_stopping(model, train_set)
    callbacks = (log, early_stopping) if early_stopping else (log,)
    fit(model, partial(protocol.batches, train_set, rank), fit_config, param_groups=groups, callbacks=callbacks, manager=manager)
    if early_stopping:
        early_stopping.restore()
    plain = model.eval()
    if protocol.trains_encoder:
        plain = unshard(
            model,
            lambda: protocol.build(readout_config.load_encoder(), train_set),
            readout_config.compute,
            prefix="encoder.",
        ).eval()
    weights = plain.state_dict().items()
    head = {name.removeprefix("head."): value.cpu() for name, value in weights if not name.startswith("encoder.")}
    encode, predict = protocol.evaluator(plain, train_set)
    trained = time.monotonic()
    size = max(protocol.evaluation_batch, evaluation.feature_batch)
    hooks = {"probes": protocol.probes(train_set), "flush": protocol.flush(train_set)}
    videos, sums, measuring_s = evaluate(val, encode, predict, size=size, **hooks)
    if manager:
        manager.close()
    inputs_s += time.monotonic() - trained - measuring_s
    seconds = {"inputs_s": round(inputs_s, 2), "readout_s": round(time.monotonic() - started - inputs_s, 2)}
    gather = distributed.gather_round_robin
    skipped = [{"split": part.split, **asdict(item)} for part in (train, val) for item in gather(part.skipped)]
    return gather(videos), gather(sums), head, early_stopping.lines if early_stopping else [], skipped, seconds


def result_of(
    saved: Checkpoint, readout_config: ReadoutConfig, protocol: str, videos: list[str], sums: list[MetricSums]
) -> Result:
    """Metrics over all clips, a bootstrap interval over videos. Raises UserError: no clip can be measured."""
    metric, name, seed = readout_config.task.metric, readout_config.task_name, readout_config.seed
    names, rows = np.unique(videos, return_inverse=True)
    table = {key: np.zeros((len(names), 2)) for key in sums[0]}
    for key, pairs in table.items():
        np.add.at(pairs, rows, [clip[key] for clip in sums])
    table = metrics.average_tracks_by_video(table)
    values = {key: float(pairs[:, 0].sum() / pairs[:, 1].sum()) for key, pairs in table.items() if pairs[:, 1].any()}
    if metric.name not in values:
        raise UserError(f"{name}: no clip of the val split can be measured by {metric.name}")
    value = values.pop(metric.name)
    low, high = metrics.interval(*table[metric.name].T, seeds.numpy_rng(seed, "bootstrap", name), draws=BOOTSTRAP_DRAWS)
    return Result(
        encoder=saved.name,
        parameters=saved.parameters,
        task=name,
        protocol=protocol,
        metric=metric.name,
        value=value,
        low=min(low, value),  # rounding, where all videos are equal
        high=max(high, value),
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        examples=len(sums),
        seed=seed,
        checkpoint_sha256=checkpoint.weights_sha256(readout_config.folder),
        others=values,
    )
