"""How a model lies on its ranks: plain on each, or every block in shards (FSDP2, HSDP).

torch's sharding takes a second to import; only functions that shard import it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling4d import checkpoint
from scaling4d.config import require_minima, require_words
from scaling4d.training.distributed import heartbeat

BUCKET_VALUES = 2**23  # gradients that ranks sum in one message
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ComputeConfig:
    """device: cpu or cuda. compute: float32 or bfloat16; weights, moments and reductions are float32 in both."""

    device: str
    compute: str

    def __post_init__(self) -> None:
        require_words(self, {"device": ("cpu", "cuda"), "compute": tuple(DTYPES)})


@dataclass(frozen=True)
class ShardingConfig:
    """How a model lies on the ranks. Results depend on it only through the order of summation.

    shards: ranks that share one copy of weights, gradients and moments. 1: plain data parallel; all ranks: FSDP;
    between: HSDP. recompute: activations in the backward pass: none, or those of each block. compile: torch.compile of
    each block. packed: one attention call for all clips of a rank, see mae.attention. accumulate: microbatches of a
    rank's batch.
    """

    shards: int
    recompute: str
    compile: bool
    packed: bool
    accumulate: int

    def __post_init__(self) -> None:
        require_words(self, {"recompute": ("none", "block")})
        require_minima(self, dict.fromkeys(("shards", "accumulate"), 1))

    def check(self, *, ranks: int, batch: int) -> None:
        """Raises ValueError: ranks or batch do not divide."""
        if ranks % self.shards:
            raise ValueError(f"{ranks} ranks do not divide into copies of {self.shards} shards; set Sharding.shards to a divisor")
        if batch % (ranks * self.accumulate):
            problem = f"a batch of {batch} clips does not divide among {ranks} ranks in {self.accumulate} microbatches each"
            raise ValueError(f"{problem}; set batch to a multiple, or Sharding.accumulate")


def parallelize(
    model: nn.Module, sharding: ShardingConfig, compute: ComputeConfig, *, ranks: int, float32_modules: Sequence[nn.Module] = ()
) -> None:
    """Apply packed attention, activation checkpointing, torch.compile and FSDP2 or HSDP to a model, in place.

    With one shard in float32 every rank holds a plain model. Otherwise FSDP2 wraps each block, each of
    `float32_modules`, and the rest of the model (also with one shard, for bfloat16). Weights, gradients and moments
    stay float32; so do reductions, and the computation of `float32_modules`. Inputs keep their dtype.

    With one shard FSDP2 gathers nothing: each block casts its own weights, and its gradients are summed in one float32
    message, as DDP's. HSDP's sums over copies overlap the backward pass: torch gives them a stream of their own, for
    which the computing stream waits at the end. Seen in torch 2.13's calls on a fake device; no GPU timed it.
    """
    blocks = blocks_of(model)
    for block in blocks:
        block.packed = sharding.packed
        if sharding.recompute == "block":
            recompute_block(block)
        if sharding.compile:
            block.forward = torch.compile(block.forward, dynamic=False)  # blocks share its code, and see other shapes
    if sharding.shards == 1 and compute.compute == "float32":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    shape, names = (ranks // sharding.shards, sharding.shards), ("replicas", "shards")
    first = 0 if shape[0] > 1 else 1
    mesh = init_device_mesh(compute.device, shape[first:], mesh_dim_names=names[first:])
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[compute.compute], reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for module in float32_modules:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    fully_shard(model, mesh=mesh, mp_policy=replace(policy, cast_forward_inputs=False))
    for method in ("reconstruct", "features"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def blocks_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Transformer blocks of encoder and decoder, in the order of the forward pass."""
    return *getattr(model.encoder, "blocks", ()), *getattr(model, "decoder_blocks", ())


def recompute_block(block: nn.Module) -> None:
    """Activation checkpointing: the forward pass saves a block's input alone."""
    from torch.utils.checkpoint import checkpoint as recomputed

    draws = getattr(block, "drop_path", 0) != 0  # random draws must be the same again
    block.forward = partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=draws)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has wrapped a model."""
    return hasattr(model, "set_requires_all_reduce")


def set_last_microbatch(model: nn.Module, last: bool) -> None:
    """Tell a sharded model whether the next backward pass ends a batch; HSDP sums over copies only then."""
    if is_sharded(model):
        model.set_requires_all_reduce(last)


def reduce_gradients(model: nn.Module) -> None:
    """After the last backward pass of a batch: mean gradients on every rank. FSDP has reduced its own already.

    Source: torch's DistributedDataParallel. DDP takes a second to import, and its sums after the first step depend on
    the number of that step, so that a resumed run would have other bits.
    """
    if is_sharded(model) or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    first = list(itertools.accumulate((g.numel() for g in gradients), initial=0))
    for _, group in itertools.groupby(zip(gradients, first, strict=False), lambda item: item[1] // BUCKET_VALUES):
        bucket = [gradient for gradient, _ in group]
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def unshard(model: nn.Module, build: Callable[[], nn.Module], compute: ComputeConfig, *, prefix: str) -> nn.Module:
    """A model that one rank can use alone: a plain one itself, else one that `build` makes and this fills.

    Weights whose names begin with `prefix` are then in the compute dtype. Every rank takes part.
    """
    if not is_sharded(model):
        return model
    state = {}
    for name, value in model.state_dict().items():
        state[name] = full_tensor(value)
        if name.startswith(prefix) and value.is_floating_point():
            state[name] = state[name].to(DTYPES[compute.compute])
    plain = build()
    plain.load_state_dict(state, assign=True)
    return plain.to(compute.device)


def save_weights(model: nn.Module, folder: Path | None) -> None:
    """Write a model's weights in the layout of scaling4d.checkpoint. Every rank takes part and writes its own files.

    A rank holds one gathered tensor, and on the CPU those of one file. folder: of rank 0; the others learn it.
    Raises UserError: no space, or no permission.
    """
    rank, ranks, state, folders = dist.get_rank(), dist.get_world_size(), model.state_dict(), [folder]
    dist.broadcast_object_list(folders)

    def gather(name: str) -> Tensor:
        heartbeat(f"writing weights, {name}")
        return full_tensor(state[name])

    shas: list[dict[str, str]] = [{}] * ranks
    dist.all_gather_object(shas, checkpoint.save_weights(folders[0], state, gather, rank=rank, ranks=ranks))
    if rank == 0:
        checkpoint.write_index(folders[0], state, {file: sha for part in shas for file, sha in part.items()})


def full_tensor(value: Tensor) -> Tensor:
    """The whole of a sharded tensor. Every rank takes part."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
