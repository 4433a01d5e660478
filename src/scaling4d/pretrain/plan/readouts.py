"""What the frozen readouts of a scaling point take: windows of labelled videos, passes of the encoder, stored features.

Of heads only the bytes of features that their training reads are counted. A GPU reads windows with one process while it
computes, so it takes the longer of both. Seconds of a pass are those of plan.performance, whose shares are ours; j on
an H200 was faster than both its cases.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from scaling4d import benchmarks
from scaling4d.benchmarks.samples import ClipRequest
from scaling4d.encoders.features import layer_index, stored_features
from scaling4d.encoders.pretrained import set_clip
from scaling4d.mae.encoder import Backbone
from scaling4d.pretrain.plan.closed_form import features_flops
from scaling4d.pretrain.plan.performance import CASES, features_seconds
from scaling4d.pretrain.plan.plan import CLIP_VALUES, build
from scaling4d.pretrain.plan.work import frozen_work
from scaling4d.readout.protocols import EvaluationConfig, Frozen, FrozenConfig
from scaling4d.readout.stage import bind_task
from scaling4d.readout.tasks import TASKS
from scaling4d.readout.tasks.task import Task
from scaling4d.records import UserError
from scaling4d.training.gpus import GPUS, Gpu
from scaling4d.training.parallelize import ShardingConfig

PLANNED = {("points", "train"): "movi"}  # as the profiles of the papers say; of the rest the first of benchmarks.TASKS


def plan_readouts(point: str, settings: Mapping[str, Any], *, gpu: str, worker_clips_per_s: float) -> dict[str, Any] | None:
    """All figures of a point's frozen readouts, units in the names; pairs are of the fast and the slow case.

    Args:
        settings: of a profile. gpu: of training.gpus.GPUS. worker_clips_per_s: as of plan.plan.
    Returns:
        None where the profile reads out no task of the point.
    Raises UserError: settings that a readout refuses, or a benchmark that is laid out in another way.
    """
    tasks = settings["benchmarks"]["tasks"] if point in settings["encoders"]["frozen"] else ()
    rows = [_task_row(point, task, settings, GPUS[gpu], worker_clips_per_s) for task in tasks]
    if not rows:
        return None
    totals = {key: sum(row[key] for row in rows) for key in ("windows", "passes", "flops", "stored_bytes", "head_bytes")}
    totals |= {key: [sum(ends) for ends in zip(*(row[key] for row in rows), strict=True)] for key in ("gpu_hours", "days")}
    shared = {key: rows[0][key] for key in ("gpus", "clip")}
    return {"tasks": rows, "total": totals, "feature_store": settings["readout"]["Evaluation"]["feature_store"], **shared}


def _task_row(point: str, name: str, settings: Mapping[str, Any], gpu: Gpu, worker_clips_per_s: float) -> dict[str, Any]:
    bound = bind_task(name, Frozen, settings)
    evaluation, recipe, task, sharding = (bound[kind] for kind in (EvaluationConfig, FrozenConfig, TASKS[name], ShardingConfig))
    encoder: Backbone = build(point, settings).encoder
    set_clip(encoder, frames=evaluation.frames, side_px=evaluation.side_px)
    task.check_clip(encoder.clip)
    frozen = frozen_work(encoder, layer_index(depth=encoder.depth))
    train, val = (_videos(name, split, task, evaluation, encoder.clip) for split in benchmarks.SPLITS)
    clips, val_windows = train["videos"] * len(task.views), val["videos"] * val["windows"]
    stored_bytes, reused = stored_features(encoder, clips, train["windows"], draws=recipe.steps * recipe.batch)
    window_bytes, _ = stored_features(encoder, 1, 1, draws=1)
    if evaluation.feature_store:
        stored_bytes += val_windows * window_bytes
    windows, windows_read = (clips * number + val_windows for number in (train["windows"], task.train_windows))
    passes, pixels = math.ceil(windows / evaluation.ranks / evaluation.feature_batch), 3 * math.prod(encoder.clip)
    read_s = windows_read / evaluation.ranks * pixels / CLIP_VALUES / worker_clips_per_s
    sizes = {"shards": sharding.shards, "clips": evaluation.feature_batch, "pixels": pixels}
    gpu_s = [passes * sum(features_seconds(frozen, gpu, share, **sizes).values()) for share in CASES.values()]
    seconds = [max(value, read_s) for value in gpu_s]
    return {
        "task": name,
        "train": train,
        "val": val,
        "views": list(task.views),
        "train_windows": task.train_windows,
        "test_views": list(task.test_views),
        "clip": list(encoder.clip),
        "windows": windows,
        "gpus": evaluation.ranks,
        "passes": passes * evaluation.ranks,
        "flops": windows * features_flops(frozen),
        "gpu_s": gpu_s,
        "read_s": read_s,
        "bound": ["reading" if read_s > value else "encoder" for value in gpu_s],
        "gpu_hours": [value * evaluation.ranks / 3600 for value in seconds],
        "days": [value / 86400 for value in seconds],
        "stored_bytes": stored_bytes,
        "draws": recipe.steps * recipe.batch,
        "head_bytes": recipe.steps * recipe.batch * window_bytes,
        "reused_share": reused,
    }


def _videos(name: str, split: str, task: Task, evaluation: EvaluationConfig, clip: tuple[int, int, int]) -> dict[str, Any]:
    """Items of a split, windows of each to encode, and where both come from: the list here, or the authors' count."""
    root, items = Path(evaluation.data), evaluation.train_items if split == "train" else evaluation.val_items
    request = ClipRequest(clip[0], task.rate_hz, clip[1], windows=evaluation.windows)
    try:
        benchmark = benchmarks.find_benchmark(name, root, split)
    except UserError:  # none, or two of them
        planned = PLANNED.get((name, split), benchmarks.TASKS[name][0])
        benchmark = benchmarks.Benchmark(planned, root / planned)
        official = benchmark.module.OFFICIAL[split]
        number = re.search(r"[\d,]+", official)[0]
        count, source = (
            int(number.replace(",", "")),
            f"{benchmark.name}, {official}".removesuffix(f", {number}") + ", authors' count",
        )
    else:
        samples = benchmarks.read_samples(name, root, split, request, skipped=[], max_bad_share=1.0)
        count, source = samples.count, f"{benchmark.name}, the list here"
    windows = math.prod(task.test_views) if split == "val" else task.train_windows
    if split == "train" and evaluation.feature_store:  # it keeps one copy of equal windows
        windows = _different_windows(benchmark.module, request, draws=windows)
    return {"videos": min(items, count) if items else count, "windows": windows, "source": source}


def _different_windows(module: ModuleType, request: ClipRequest, *, draws: int) -> int:
    """Expected number of different windows among a video's draws. All of them, where videos differ in length."""
    if not hasattr(module, "FRAMES"):
        return draws
    starts = len(request.start_frames(request.frame_numbers(module.RATE_HZ), module.FRAMES)[:: module.WINDOW_STEP])
    return round(starts * (1 - (1 - 1 / starts) ** draws))
