"""Whether a training step fits the GPUs here, by the closed form. Apart from plan.py, on which no training depends."""

from __future__ import annotations

from scaling4d.pretrain.plan.closed_form import FLOAT32, GIB, MIXED, PLAIN, USABLE, StepLayout, memory
from scaling4d.pretrain.plan.work import work_of
from scaling4d.pretrain.settings import PretrainConfig
from scaling4d.records import UserError


def check_memory(pretraining: PretrainConfig, gpu_bytes: int | None) -> None:
    """Raises UserError: a step needs more than the usable share of a GPU of `gpu_bytes` (None: no GPU here)."""
    if gpu_bytes is None:
        return
    training, sharding, usable = pretraining.training, pretraining.sharding, USABLE * gpu_bytes
    work = work_of(pretraining.build(teacher_weights=False))
    recompute = sharding.recompute == "block"
    sizes = MIXED if training.compute == "bfloat16" else PLAIN if sharding.shards == 1 else FLOAT32
    clips = training.batch // training.ranks
    at_once = clips // sharding.accumulate

    def needed(microbatches: int, clips: int) -> int:
        layout = StepLayout(sharding.shards, recompute, microbatches, sizes, keep_best=bool(training.keep_best))
        return memory(work, layout, clips=clips)["total"]

    if (held := needed(sharding.accumulate, at_once)) > usable:
        fitting = [n for n in range(1, at_once) if at_once % n == 0 and needed(2, n) <= usable]
        change = f"Sharding.accumulate={clips // fitting[-1]}" if fitting else "more Sharding.shards"
        problem = f"a step of {pretraining.point} with {at_once} clips a GPU needs {held / GIB:.1f} GiB"
        limit = f"{USABLE:.0%} of a GPU here is {usable / GIB:.1f} GiB"
        raise UserError(f"{problem}, and {limit}; set {change}, or see scaling4d plan {pretraining.point}")
