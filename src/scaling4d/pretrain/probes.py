"""Linear probes of labelled clips: features of the encoder that is being trained. Untested on a GPU."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import nn

from scaling4d import benchmarks
from scaling4d.encoders.features import MemoryFeatures
from scaling4d.pretrain.settings import PretrainConfig
from scaling4d.pretrain.trained_features import TrainedFeatures
from scaling4d.readout.data import FeatureDataset, RankSplit, evaluate
from scaling4d.readout.linear import RegressionBatch, fit_probe
from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.tasks.depth import Depth
from scaling4d.readout.tasks.task import Task
from scaling4d.records import UserError
from scaling4d.training.distributed import gather_round_robin, heartbeat
from scaling4d.training.parallelize import is_sharded

BATCH = 8  # clips of a pass, all tokens of each; ours


TASKS: dict[str, type[Task]] = {"actions": Actions, "depth": Depth}


def check_benchmarks(pretraining: PretrainConfig) -> None:
    """Raises UserError: the benchmark of a probe is absent."""
    for task in pretraining.training.probe_tasks:
        for split in benchmarks.SPLITS:
            benchmarks.find_benchmark(task, pretraining.benchmarks, split)


def linear_probe(model: nn.Module, pretraining: PretrainConfig, name: str) -> float:
    """The task's metric of a linear probe, as `<metric>_linear` of a frozen readout with as many items.

    Clips are the first frames of a labelled video, at the rate of the clips that are trained on, in one view. Held-out
    training videos choose the penalty. A rank may have no clip.
    Raises UserError: no clip can be measured, or as readout.data.RankSplit.check_read.
    """
    training, task = pretraining.training, _task(pretraining, name)
    ranks = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "may_be_empty": True}
    splits = zip(("train", "val"), training.probe_items, strict=True)
    where = (task, pretraining.benchmarks, pretraining.max_bad_share, tuple(model.encoder.clip))
    train, val = (RankSplit(name, split, items, *where, **ranks) for split, items in splits)
    passes = {"device": training.device, "batch": BATCH, "collective": is_sharded(model)}
    train_set = FeatureDataset(train, MemoryFeatures(TrainedFeatures(model), **passes))

    def batches(clips: list[int]) -> list[RegressionBatch]:
        return [task.regression(*train_set.batch(clips[first : first + BATCH])) for first in range(0, len(clips), BATCH)]

    fitted = batches(train_set.trained_on)
    heartbeat(f"linear probe of {name}")
    if not any(gather_round_robin([bool(fitted)])):
        raise UserError(f"{name}: no clip of the train split is left to fit; raise pretrain.Training.probe_items")
    probe = fit_probe(fitted, batches(train_set.held_out), training.device)
    source = train_set.source
    _, sums, _ = evaluate(val, source.encode, partial(task.predict_linear, probe), size=BATCH, flush=source.flush)
    pairs = gather_round_robin([clip[task.metric.name] for clip in sums])
    total, count = (sum(values) for values in zip((0.0, 0.0), *pairs, strict=True))
    if not count:
        raise UserError(f"{name}: no clip of the val split can be measured; raise pretrain.Training.probe_items")
    return total / count


def _task(pretraining: PretrainConfig, name: str) -> Task:
    """A task of TASKS as far as a linear probe needs it; its answers have no offset."""
    of_task = {"classes": len(benchmarks.class_names(pretraining.benchmarks))} if name == "actions" else {"offset_m": 0.0}
    return TASKS[name](rate_hz=pretraining.rate_hz, views=("plain",), **of_task)
