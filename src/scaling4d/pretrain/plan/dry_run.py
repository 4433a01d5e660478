"""A whole training step of the real model under the real `fully_shard`, for a mesh of any size, on fake tensors.

Fake tensors have shapes and no bytes. The model is sharded on meta, outside fake mode, then emptied and stepped inside.
Fake tensors stand for a CPU: a build of torch without CUDA refuses fake CUDA ones.

For a process that starts no ranks later: torch remembers the place of rank 0 of a mesh, and forked ranks inherit that.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from scaling4d.mae.encoder import Method
from scaling4d.pretrain.settings import BETAS
from scaling4d.records import MaskedTokens, UserError
from scaling4d.training.optimizer import build_adamw
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig, parallelize, reduce_gradients, set_last_microbatch

OLDEST = "2.13"
TRACKED = {  # our kinds of memory: those of the trackers, with shards and with one
    "parameters": ("Sharded Param", "Parameter", "Buffer"),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Gradient"),
    "optimizer": ("OptState", "Optstate"),
    # Temp includes a block's own gradients until they are reduced; with one shard Activation includes cast weights
    "activations": ("Activation", "Temp", "Inputs", "Other"),
    "communication": ("Unsharded Param", "All Gather", "Reduce Scatter"),
}
CPU_ATTENTION = {  # torch counts attention on CUDA alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


class OneCopyTracker(MemTracker):
    """Of a model with one shard: the copies of weights that its modules hold within a pass are no weights."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        if all(isinstance(weight, nn.Parameter) for weight in module.parameters()):
            return super()._track_module_params_and_buffers(module, install_grad_hooks)
        return 0, 0


def count_flops(step: Callable[[], object]) -> int:
    """Executed FLOPs of a step: torch counts its operations while they run."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    return counter.get_total_flops()


def dry_run(
    model: Method,
    *,
    shards: int,
    replicas: int,
    clips: int,
    recompute: str,
    microbatches: int = 1,
    keep_best: bool = False,
) -> dict[str, Any]:
    """`{"memory_bytes", "flops", "wall_s", "rss_bytes"}` of one GPU's step in the steady state.

    Args:
        model: on meta; it is used up. clips: at once on each GPU. recompute: none or block. microbatches: of a batch.
        keep_best: hold the best weights too, as pretrain.validate.
    Raises:
        UserError: a torch whose tracker counts the optimizer of all shards.
    """
    if torch.__version__ < OLDEST:  # compared as versions
        raise UserError(
            f"a dry run with torch {torch.__version__} counts too much memory; needed {OLDEST}, as in requirements.lock"
        )
    started, ranks = time.time(), shards * replicas
    teachers = [teacher.to(torch.bfloat16) for teacher in getattr(model, "teacher_encoder", ())]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        sharding = ShardingConfig(shards, recompute, compile=False, packed=False, accumulate=microbatches)
        parallelize(model, sharding, ComputeConfig(device="cpu", compute="bfloat16"), ranks=ranks)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in (model, *teachers):
                module.to_empty(device="cpu")
            held = [p for teacher in teachers for p in teacher.parameters()]  # not sharded
            if keep_best:
                held += [torch.zeros_like(p.to_local() if shards > 1 else p) for p in model.parameters()]
            adamw = build_adamw({"all": (list(model.named_parameters()), 0.0)}, betas=BETAS, weight_decay=0.05)
            grid, clip = model.encoder.grid, model.encoder.clip

            def microbatch_loss() -> torch.Tensor:
                """As training.fit: a microbatch reaches the GPU now, and its pixels leave after the forward pass."""
                ids_keep = torch.zeros(clips, model.visible_token_count, dtype=torch.int64)
                return model(torch.empty(clips, *clip, 3, dtype=torch.uint8), MaskedTokens(ids_keep, grid))

            def step(tracker: MemTracker | None = None) -> None:
                for microbatch in range(microbatches):
                    if tracker:
                        tracker.reset_mod_stats()
                    set_last_microbatch(model, microbatch + 1 == microbatches)
                    microbatch_loss().backward()
                reduce_gradients(model)
                adamw.step()
                adamw.zero_grad()

            step()
            if shards > 1:
                tracker = FSDPMemTracker(model, adamw)
                tracker.track_inputs(held)
            else:
                tracker = OneCopyTracker()
                tracker.track_external(model, adamw, *held)
            with tracker:
                step(tracker)
            executed = count_flops(step)
    finally:
        dist.destroy_process_group()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    sizes = {getattr(word, "value", word): size for word, size in snapshot.items()}
    kinds = {kind: sum(sizes.get(word, 0) for word in words) for kind, words in TRACKED.items()}
    held_bytes = sum(p.numel() * p.element_size() for p in held)  # inputs to the tracker, parameters to us
    kinds["parameters"] += held_bytes
    kinds["activations"] -= held_bytes
    memory_bytes, wall_s = kinds | {"total": sum(kinds.values())}, time.time() - started
    return {"memory_bytes": memory_bytes, "flops": executed, "wall_s": wall_s, "rss_bytes": _peak_rss()}


def _peak_rss() -> int:
    """Peak resident bytes of this process. getrusage also counts those of its parent before it."""
    if (status := Path("/proc/self/status")).is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
