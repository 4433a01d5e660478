"""How one model lies on many ranks: whole on each, or every block in shards; pretraining, fine-tuning and `plan`'s dry run
share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scaling4d import config
from scaling4d.records import UserError
from scaling4d.training.distributed import average_gradients

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEAR = ("aten.mm.", "aten.addmm.", "attention", "flash")  # what `selective` keeps; norms, GELU and sums are made again


@config.configurable
@dataclass(frozen=True)
class Sharding:
    """How a model lies on the ranks; results depend on it only as they depend on the order in which numbers are added.

    shards: ranks that share one copy of the weights, gradients and moments, block by block; copies are as many as fit the ranks.
      1: every rank holds all of them (plain data parallel); all ranks: FSDP; between: HSDP.
    recompute: none; block (make a block's activations again in the backward pass); selective (only what is cheap to make).
    recompute_every: of the blocks, 1: all, k: every k-th. compile: blocks by torch.compile.
    packed: attention sees all clips of a rank as one sequence with a block-diagonal mask. accumulate: parts in which a rank
      works off its part of a batch.
    """

    shards: int
    recompute: str
    recompute_every: int
    compile: bool
    packed: bool
    accumulate: int

    def check(self, *, ranks: int, batch: int) -> None:
        """Raises UserError: a mesh or a batch that does not divide, or an unknown word."""
        if self.shards < 1 or ranks % self.shards:
            raise UserError(f"{ranks} ranks do not divide into copies of {self.shards} shards; set Sharding.shards to a divisor")
        if self.accumulate < 1 or batch % (ranks * self.accumulate):
            raise UserError(
                f"a batch of {batch} clips does not divide among {ranks} ranks in {self.accumulate} parts each; set "
                "batch to a multiple, or Sharding.accumulate"
            )
        if self.recompute not in ("none", "block", "selective") or self.recompute_every < 1:
            raise UserError(
                f"Sharding.recompute {self.recompute!r} of every {self.recompute_every} blocks; needed none, block or selective, "
                "and 1 or more"
            )


def shard(
    model: nn.Module, *, shards: int, replicas: int, device: str, compute: torch.dtype, prepare: Callable[[nn.Module], None]
) -> None:
    """Split a model over a mesh: each block is gathered on its own, all else together, but for a readout's head.

    Weights, gradients and moments stay float32, and are reduced in it; a head computes in it, too. What the model is given keeps
    its type. prepare: changes a block before it is split.
    """
    shape, names = ((replicas, shards), ("replicas", "shards")) if replicas > 1 else ((shards,), ("shards",))
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for block in blocks(model):
        prepare(block)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if hasattr(model, "head"):
        fully_shard(model.head, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    fully_shard(model, mesh=mesh, mp_policy=replace(policy, cast_forward_inputs=False))


def blocks(model: nn.Module) -> tuple[nn.Module, ...]:
    """In the order of the forward pass."""
    return (*model.encoder.blocks, *getattr(model, "decoder_blocks", ()))


def recomputing(block: nn.Module, how: str) -> None:
    """Let a block keep less for its backward pass: `block`, its input alone; `selective`, what is dear to make."""
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if how == "selective" else {}
    draws = getattr(block, "drop_path", 0) != 0  # what is drawn at random is to be drawn alike again
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=draws, **contexts)


def _policy(_: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    dear = any(word in str(operator) for word in DEAR)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def spread(
    model: nn.Module, sharding: Sharding, *, ranks: int, device: str, compute: str, initialise: Callable[[], None]
) -> None:
    """Give a model on meta its place on the ranks and its first weights, see settle."""
    settle(model, sharding, ranks=ranks, device=device, compute=compute)
    model.to_empty(device=device)
    initialise()


def settle(model: nn.Module, sharding: Sharding, *, ranks: int, device: str, compute: str) -> None:
    """Give a model its place on the ranks; weights that it has stay, or go to their shards on `device`.

    In float32 and one shard every rank holds a plain model; else the model is split, if need be in one piece, which also
    computes in `compute` with weights that stay float32.
    """
    numbered = iter(range(len(blocks(model))))

    def prepare(block: nn.Module) -> None:
        block.packed = sharding.packed
        if sharding.recompute != "none" and next(numbered) % sharding.recompute_every == 0:
            recomputing(block, sharding.recompute)
        if sharding.compile:
            block.forward = torch.compile(block.forward)

    plain = sharding.shards == 1 and compute == "float32"
    if plain:
        for block in blocks(model):
            prepare(block)
    else:
        shape = {"shards": sharding.shards, "replicas": ranks // sharding.shards}
        shard(model, **shape, device=device, compute=TYPES[compute], prepare=prepare)


def last_part(model: nn.Module, last: bool) -> None:
    """Whether the next backward pass is that of a batch's last part.

    Where weights lie in shards, gradients of every part go to their shards at once, so that none stay whole; what waits for the
    last part is the sum over copies.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def reduce(model: nn.Module) -> None:
    """After a batch's last backward pass every rank has the mean gradients: sharded models saw to it, others do it now."""
    if not isinstance(model, FSDPModule):
        average_gradients(model.parameters())


def gathered(model: nn.Module, again: Callable[[], nn.Module], *, compute: str, device: str) -> nn.Module:
    """A model that a rank can use without the others, its encoder in `compute`; every rank takes part.

    Args:
        again: makes the same model anew, to be filled; where `model` itself is plain, it is returned instead.
    """
    if not isinstance(model, FSDPModule):
        return model
    found = {}
    for name, value in model.state_dict().items():
        found[name] = whole(value)
        if name.startswith("encoder.") and value.is_floating_point():
            found[name] = found[name].to(TYPES[compute])
    plain = again()
    plain.load_state_dict(found, assign=True)
    return plain.to(device)


def whole(value: Tensor) -> Tensor:
    """A tensor that is in shards, put together; every rank takes part."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def mine(value: Tensor) -> Tensor:
    """This rank's part of a tensor, in place."""
    return value.to_local() if isinstance(value, DTensor) else value
