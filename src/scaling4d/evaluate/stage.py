"""CHECKPOINT FOLDER -> RESULT: one encoder on one labelled benchmark, by a linear probe, by an attention readout, or by
label propagation, which fits nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.load import build_model
from scaling4d.encoders.pretrained import set_clip
from scaling4d.encoders.published import MODELS as PUBLISHED
from scaling4d.evaluate.function import FunctionEncoder
from scaling4d.mae.models import MODELS, encoder_of
from scaling4d.pipeline import code_hashes
from scaling4d.provenance import atomic_folder
from scaling4d.readout.data import FeatureDataset, RankSplit, evaluate
from scaling4d.readout.protocols import Frozen
from scaling4d.readout.stage import bind_readout, input_hashes, readout, result_of
from scaling4d.readout.tasks import TASKS
from scaling4d.readout.tasks.task import MetricSums
from scaling4d.records import AGAIN, Preempted, Result, UserError, did_you_mean, file_system_errors, write_json
from scaling4d.training import distributed
from scaling4d.training.distributed import WatchdogConfig, gather_round_robin

LINEAR, PROPAGATED = "linear", "propagated"
PROTOCOLS = (LINEAR, Frozen.name, PROPAGATED)
HEAD_CELL_PX = 8  # of depth's attention readout, which answers for squares of this side


def check_tasks(tasks: list[str], protocol: str) -> None:
    """Raises UserError: an unknown protocol or task, or a task that the protocol does not have."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol = {protocol!r}; needed {' or '.join(PROTOCOLS)}{did_you_mean(protocol, PROTOCOLS)}")
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}; needed some of {', '.join(TASKS)}{did_you_mean(task, TASKS)}")
        if not tasks_of(protocol, [task]):
            known = ", ".join(tasks_of(protocol, TASKS))
            others = " or ".join(other for other in PROTOCOLS if tasks_of(other, [task]))
            problem = f"{task} has no protocol {protocol}; tasks that have it: {known}"
            raise UserError(f"{problem}; needed those, or --protocol {others}")


def tasks_of(protocol: str, tasks: Iterable[str]) -> list[str]:
    """Those of some tasks that have the protocol."""
    has = {LINEAR: lambda task: TASKS[task].linear, PROPAGATED: lambda task: TASKS[task].propagates}
    return [task for task in tasks if has.get(protocol, lambda _: True)(task)]


def evaluate_encoder(encoder: str, task: str, protocol: str, settings: Mapping[str, Any], home: Path) -> Result:
    """Measure `home/pretrain/<encoder>` and write `home/readout/<encoder>/<task>/<protocol>`.

    A result with the same provenance (settings, code, weights, benchmark) is kept.
    Raises UserError: as `readout`, ranks elsewhere that failed, or an encoder whose tokens do not suit the task.
    Raises Preempted: as `readout`.
    """
    evaluation = config.section(settings, "readout.Evaluation")
    _check_tokens(home / "pretrain" / encoder, task, frames=evaluation["frames"], side_px=evaluation["side_px"])
    if protocol == Frozen.name:
        where = config.section(settings, "readout.Launch.where")
        if where != "here" and Checkpoint.read(home / "pretrain" / encoder).model == FunctionEncoder.__name__:
            problem = f"{encoder} is a callable, which runs in ranks of this process alone"
            raise UserError(f"{problem}, and readout.Launch.where is {where}; -S readout.Launch.where=here")
        result = readout(encoder, task, protocol, settings, home=home)
        if result == AGAIN:
            raise Preempted(f"the readout of {encoder} for {task} was stopped on request; the same command continues it")
        if isinstance(result, int) and result:
            raise UserError(f"the readout of {encoder} for {task} ended with exit code {result}; its messages are above")
        return Result.read(home / "readout" / encoder / task / protocol / "result.json")
    return _headless(encoder, task, protocol, settings, home)


def _check_tokens(folder: Path, task: str, *, frames: int, side_px: int) -> None:
    """Depth needs tokens that are squares of whole pixels, since each answers for its own."""
    encoder = encoder_of(build_model(folder, MODELS | PUBLISHED)[0])
    set_clip(encoder, frames=frames, side_px=side_px)
    (_, side_px, _), (_, h, _) = encoder.clip, encoder.grid
    if task == "depth" and side_px % h:
        problem = f"{folder.name} has {h} x {h} tokens, which do not divide the {side_px} px of a clip, as depth needs"
        raise UserError(f"{problem}; -S clip.side_px={math.lcm(h, HEAD_CELL_PX)} suits it")


def _headless(encoder: str, task: str, protocol: str, settings: Mapping[str, Any], home: Path) -> Result:
    """A result of protocol linear or propagated."""
    started, names = time.time(), (encoder, task, protocol)
    bound, readout_config = bind_readout(encoder, task, Frozen, settings, home)
    code, inputs = code_hashes.running("evaluate"), input_hashes(readout_config)
    provenance, final = artifacts.provenance_of("evaluate", bound, code=code, inputs=inputs), home / "readout" / Path(*names)
    if artifacts.is_written(final, provenance):
        return Result.read(final / "result.json")
    evaluation, name = readout_config.evaluation, "-".join(("evaluate", *names))
    watchdog = WatchdogConfig(evaluation.start_s, evaluation.hang_s, artifacts.RUNS / name)
    where = {"ranks": evaluation.ranks, "device": readout_config.device, "watchdog": watchdog}
    videos, sums, skipped = distributed.run(_measure_on_rank, **where, frozen=Frozen(readout_config), protocol=protocol)
    result = result_of(Checkpoint.read(readout_config.folder), readout_config, protocol, videos, sums)
    with atomic_folder(final) as out:
        if skipped:
            write_json(out / "skipped.json", skipped)
        result.write(out / "result.json")
        artifacts.write_provenance(out, provenance, bound.operative)
    artifacts.write_run(name, artifacts.sha256(final), started=started)
    return result


@file_system_errors()
def _measure_on_rank(
    *, rank: int, ranks: int, frozen: Frozen, protocol: str
) -> tuple[list[str], list[MetricSums], list[dict[str, Any]]]:
    """One rank of a protocol without a head, with the numbers of `<metric>_<protocol>` of a frozen readout.

    Label propagation reads no training split. Returns all ranks' videos and metric sums, and skipped items.
    """
    settings = frozen.config
    evaluation, task, root = settings.evaluation, settings.task, Path(settings.evaluation.data)
    task.check_benchmark(root)
    encoder = settings.load_encoder().requires_grad_(False)
    windows_seed = settings.seed if evaluation.windows == "random" else None
    where = (task, root, evaluation.max_bad_share, encoder.clip, rank, ranks, windows_seed)
    val = RankSplit(settings.task_name, "val", evaluation.val_items, *where)
    splits, source, probes = [val], frozen.features_of(encoder), {}
    if protocol == PROPAGATED:
        predict = task.predict_propagated
    else:
        splits = [RankSplit(settings.task_name, "train", evaluation.train_items, *where), val]
        probes = frozen.probes(FeatureDataset(splits[0], source))
        predict = probes.pop(LINEAR)
    size = max(frozen.evaluation_batch, evaluation.feature_batch)
    videos, sums, _ = evaluate(val, source.encode, predict, size=size, probes=probes, flush=source.flush)
    skipped = [{"split": part.split, **asdict(item)} for part in splits for item in gather_round_robin(part.skipped)]
    return gather_round_robin(videos), gather_round_robin(sums), skipped
