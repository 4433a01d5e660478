"""A whole training step of the real model under the real `fully_shard`, on a process group of any size, without any numbers.

Tensors are torch's fake ones: shapes without bytes. The model is sharded on meta, outside fake mode, and emptied and stepped
inside it; the first step, in which AdamW makes its state, is not counted. Fake tensors stand for a CPU: a build of torch without
CUDA refuses fake CUDA ones.

For a process that starts no ranks later: torch remembers where rank 0 of a mesh is, and forked ranks would take that over.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from scaling4d.pretrain.plan.closed_form import KINDS
from scaling4d.pretrain.plan.work import kept_of
from scaling4d.records import MaskedTokens
from scaling4d.training import optimizer
from scaling4d.training.parallelize import last_part, recomputing, shard

STATUS = Path("/proc/self/status")
KIND_OF = {  # the tracker's words -> ours
    "Sharded Param": "parameters",
    "Buffer": "parameters",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "OptState": "optimizer",
    "Activation": "activations",
    "Temp": "activations",  # holds a block's own gradients too, until they are reduced
    "Inputs": "activations",
    "Unsharded Param": "communication",
    "All Gather": "communication",
    "Reduce Scatter": "communication",
}
CPU_ATTENTION = {  # torch counts attention on CUDA alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}


def dry_run(model: nn.Module, *, shards: int, replicas: int, clips: int, recompute: bool, parts: int = 1) -> dict[str, Any]:
    """`{"memory_bytes", "flops", "wall_s", "rss_bytes"}` of one GPU's step in the steady state.

    Args:
        model: one of mae.build.METHODS on meta; it is used up. clips: at once on each GPU. parts: of a batch, one after another.
    """
    started = time.time()
    with _fake_group(shards * replicas):
        prepare = partial(recomputing, how="block") if recompute else lambda block: None
        shard(model, shards=shards, replicas=replicas, device="cpu", compute=torch.bfloat16, prepare=prepare)
        for teacher in _teachers(model):
            teacher.to(torch.bfloat16)
        with FakeTensorMode(allow_non_fake_inputs=True):
            taught = _empty(model)
            step, inputs, adamw = _step(model, clips, parts)
            step()
            tracker = FSDPMemTracker(model, adamw)
            tracker.track_inputs((*inputs, *taught))
            with tracker:
                step(tracker.reset_mod_stats)
            counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
            with counter:
                step()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return {
        "memory_bytes": _by_kind(snapshot, taught),
        "flops": counter.get_total_flops(),
        "wall_s": time.time() - started,
        "rss_bytes": _most_held(),
    }


def _most_held() -> int:
    """Bytes of memory that this process held at most. getrusage also counts what its parent held before it."""
    if STATUS.is_file():
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _fake_group(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _empty(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """Gives the weights fake storage; returns a teacher's, which every GPU holds whole."""
    model.to_empty(device="cpu")
    return tuple(p for teacher in _teachers(model) for p in teacher.to_empty(device="cpu").parameters())


def _teachers(model: nn.Module) -> list[nn.Module]:
    return [teacher for teacher in getattr(model, "taught_by", ()) if teacher is not None]


def _step(model: nn.Module, clips: int, parts: int) -> tuple[Callable[..., None], tuple[torch.Tensor, ...], torch.optim.AdamW]:
    adamw, _ = optimizer.adamw({"all": (list(model.named_parameters()), 0.0)}, betas=(0.9, 0.95), weight_decay=0.05)
    pixels = torch.empty(clips, *model.encoder.clip, 3, dtype=torch.bfloat16)
    masked = MaskedTokens(torch.zeros(clips, kept_of(model), dtype=torch.int64), model.encoder.grid)

    def step(before_part: Callable[[], None] = lambda: None) -> None:
        for part in range(parts):
            before_part()
            last_part(model, part + 1 == parts)
            model(pixels, masked).backward()
        adamw.step()
        adamw.zero_grad()

    return step, (pixels, masked.kept), adamw


def _by_kind(snapshot: dict[Any, int], taught: tuple[torch.Tensor, ...]) -> dict[str, int]:
    """A teacher's weights are inputs to the tracker, parameters to us."""
    held = sum(p.numel() * p.element_size() for p in taught)
    kinds = dict.fromkeys(KINDS, 0) | {"parameters": held, "activations": -held}
    for word, size in snapshot.items():
        name = getattr(word, "value", word)
        if name in KIND_OF:
            kinds[KIND_OF[name]] += size
    return kinds | {"total": sum(kinds.values())}
