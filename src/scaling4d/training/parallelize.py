"""How a model lies on its ranks: plain on each, or every block in shards (FSDP2, HSDP).

torch's sharding takes a second to import; only functions that shard import it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from scaling4d import checkpoint
from scaling4d.config import require_minima, require_words
from scaling4d.training.distributed import heartbeat

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORWARD_METHODS = ("reconstruct", "features")  # of a model, beside its forward pass, that use its weights


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
    between: HSDP. recompute: activation checkpointing: none, or block. compile: torch.compile of
    each block. packed: one attention call for all clips of a rank, see mae.attention. accumulate: microbatches of a
    rank's batch (gradient accumulation).
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
    """Apply packed attention, torch.compile, activation checkpointing and FSDP2 or HSDP to a model, in place.

    With one shard every rank holds a plain model, whose blocks cast their weights in bfloat16. Otherwise FSDP2 wraps
    each block, each of `float32_modules`, and the rest of the model. Weights, gradients and moments stay float32; so do
    reductions, and the computation of `float32_modules`. Inputs keep their dtype.

    FSDP2 with one shard has the same bits, where a block is called once a pass, and more work for the CPU: on an H200 a
    step of S took 2.4 times as long as under autocast, since it waited for that (experiments/LOG.md, 2026-11-26).
    """
    blocks, dtype = blocks_of(model), DTYPES[compute.compute]
    cast = sharding.shards == 1 and dtype != torch.float32
    for block in blocks:
        block.packed = sharding.packed
        if sharding.recompute == "block" and not cast:
            recompute_block(block)
        if sharding.compile:
            block.forward = torch.compile(block.forward, dynamic=False)  # blocks share its code, and see other shapes
    if cast:
        cast_weights(model, blocks, float32_modules, dtype)
        for block in blocks if sharding.recompute == "block" else ():
            recompute_block(block)  # casts again
    if sharding.shards == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    shape, names = (ranks // sharding.shards, sharding.shards), ("replicas", "shards")
    first = 0 if shape[0] > 1 else 1
    mesh = init_device_mesh(compute.device, shape[first:], mesh_dim_names=names[first:])
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for module in float32_modules:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    fully_shard(model, mesh=mesh, mp_policy=replace(policy, cast_forward_inputs=False))
    for method in FORWARD_METHODS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


class CastWeights(torch.autograd.Function):
    """Weights of a module in another dtype. Their gradients come back in float32. One call each way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        cast = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(cast, weights)
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [gradient for gradient in gradients if gradient is not None]
        full = [torch.empty_like(gradient, dtype=torch.float32) for gradient in present]
        torch._foreach_copy_(full, present)
        given = iter(full)
        return None, *(None if gradient is None else next(given) for gradient in gradients)


def cast_weights(model: nn.Module, blocks: Sequence[nn.Module], float32_modules: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Let a model compute with copies of its weights: a block's in its own forward pass, the rest in the model's.

    `float32_modules` compute with the weights themselves. The backward pass holds the copies.
    """
    for block in blocks:
        _cast_around(block, "forward", _owned(block, ()), dtype, cast_inputs=True)
    rest = _owned(model, (*blocks, *float32_modules))
    for method in ("forward", *FORWARD_METHODS):
        if hasattr(model, method):
            _cast_around(model, method, rest, dtype, cast_inputs=False)


def _owned(model: nn.Module, without: Sequence[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Modules and names of a model's floating-point weights, apart from those of `without`."""
    left_out = {module for part in without for module in part.modules()}
    owners = (module for module in model.modules() if module not in left_out)
    return [(owner, name) for owner in owners for name, p in owner.named_parameters(recurse=False) if p.is_floating_point()]


def _cast_around(
    module: nn.Module, method: str, owned: Sequence[tuple[nn.Module, str]], dtype: torch.dtype, *, cast_inputs: bool
) -> None:
    """Wrap a method: within it, parameters named in `owned` are copies in `dtype`. Calls can lie in each other."""
    inner = getattr(module, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        if cast_inputs:
            args, kwargs = tree_map(to_dtype, (args, kwargs))
        weights = [owner._parameters[name] for owner, name in owned]
        if not weights or not isinstance(weights[0], nn.Parameter):  # a call within another one
            return inner(*args, **kwargs)
        for (owner, name), weight in zip(owned, CastWeights.apply(dtype, *weights), strict=True):
            owner._parameters[name] = weight
        try:
            return inner(*args, **kwargs)
        finally:
            for (owner, name), weight in zip(owned, weights, strict=True):
                owner._parameters[name] = weight

    def to_dtype(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    setattr(module, method, outer)


def blocks_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Transformer blocks of encoder and decoder, in the order of the forward pass."""
    return *getattr(getattr(model, "encoder", None), "blocks", ()), *getattr(model, "decoder_blocks", ())


def recompute_block(block: nn.Module) -> None:
    """Activation checkpointing: the forward pass saves a block's input alone."""
    from torch.utils.checkpoint import checkpoint as recomputed

    draws = getattr(block, "drop_path", 0) != 0  # random draws must be the same again
    block.forward = partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=draws)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has wrapped a model."""
    return hasattr(model, "set_requires_all_reduce")


def set_last_microbatch(model: nn.Module, last: bool) -> None:
    """Tell a model whether the next backward pass ends a batch. Copies of it sum their gradients only then."""
    if is_sharded(model):
        model.set_requires_all_reduce(last)
    elif dist.get_world_size() > 1:
        gradient_means(model).last = last


def reduce_gradients(model: nn.Module) -> None:
    """After the last backward pass of a batch: mean gradients on every rank. FSDP has reduced its own already."""
    if not is_sharded(model) and dist.get_world_size() > 1:
        gradient_means(model).finish()


def gradient_means(model: nn.Module) -> GradientMeans:
    """The one of a model, made when its weights are in their place."""
    if not hasattr(model, "gradient_means"):
        model.gradient_means = GradientMeans(model)
    return model.gradient_means


class GradientMeans:
    """Mean gradients of plain copies of a model: ranks sum those of a block while they compute the block before.

    Messages are alike on all ranks: a block's gradients, from the last block to the first, then all others. The
    gradients become views of their message, so the last microbatch has one backward pass. Behind a block without
    gradients, as the last ones of a fine-tuning are, all are summed after the backward pass.
    Source: torch's DistributedDataParallel. DDP takes a second to import, and its sums after the first step depend on
    the number of that step, so that a resumed run would have other bits.

    Attributes:
        last: whether the next backward pass ends a batch; before, gradients add up in each rank.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = [list(block.parameters()) for block in reversed(blocks_of(model))]
        in_blocks = set(itertools.chain(*blocks))
        self.last, self.parts = False, [*blocks, [p for p in model.parameters() if p not in in_blocks]]
        assert sum(map(len, self.parts)) == len(list(model.parameters())), "blocks that share parameters"
        self._expect_all()
        me = weakref.proxy(self)  # the hooks live as long as their parameters, and so would what they hold
        for number, missing in enumerate(self.missing):
            for parameter in missing:
                parameter.register_post_accumulate_grad_hook(partial(GradientMeans._ready, me, number))

    def finish(self) -> None:
        """Send what the backward pass has not sent, and wait."""
        while self.next < len(self.parts):
            self._send()
        for flat, work in self.sent:
            work.wait()
            flat.div_(dist.get_world_size())
        self.last = False
        self._expect_all()

    def _expect_all(self) -> None:
        self.sent: list[tuple[Tensor, Any]] = []
        self.next, self.missing = 0, [{p for p in part if p.requires_grad} for part in self.parts]

    def _ready(self, number: int, parameter: nn.Parameter) -> None:
        """Called by the backward pass with each gradient: it, and those that it came behind, may be complete."""
        if self.last:
            self.missing[number].discard(parameter)
            while self.next < len(self.parts) and not self.missing[self.next]:
                self._send()

    def _send(self) -> None:
        weights = [p for p in self.parts[self.next] if p.grad is not None]
        self.next += 1
        if weights:
            flat = torch.cat([p.grad.flatten() for p in weights])
            for p, gradient in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
                p.grad = gradient.view_as(p)
            self.sent.append((flat, dist.all_reduce(flat, async_op=True)))


def unshard(model: nn.Module, build: Callable[[], nn.Module], compute: ComputeConfig, *, prefix: str) -> nn.Module:
    """A model that one rank can use alone: a plain one in float32 itself, else one that `build` makes and this fills.

    Weights whose names begin with `prefix` are then in the compute dtype. Every rank takes part.
    """
    if not is_sharded(model) and compute.compute == "float32":
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
