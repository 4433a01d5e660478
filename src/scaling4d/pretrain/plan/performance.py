"""Seconds of one training step on a GPU, as a range: a roofline for each operation, launches, exposed communication.

An operation takes the longer of its FLOPs at a share of the peak and its bytes at a share of the memory's speed, and a
launch for each kernel. Products are counted in whole tiles, and tiles in whole waves over the GPU's processors. The
communication of a block runs beside the computing of its neighbour: what takes longer there is exposed. The CPU issues
all work, beside the GPU: its longer time is exposed. The shares are ours. On one H200 a step of 4 blocks of j lay
between them, and the CPU's slow end is what was measured there (experiments/LOG.md, 2026-11-26). Stragglers, shared
networks and other kernels are not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scaling4d.pretrain.plan.closed_form import LOSS, MIXED, REDUCED, STORED, StepLayout, shard_values
from scaling4d.pretrain.plan.work import BlockWork, FrozenWork, Shapes, Work, values_of
from scaling4d.training.gpus import NODE, Gpu

TILE, TILE_DEPTH = 128, 512  # side of a tile of a product, and least inner length of a piece of it; ours
OPTIMIZER_BYTES = 40  # of a value: AdamW reads four fp32 numbers and writes three; clipping reads two and writes one
# Of a pixel: patches as uint8 (2), as fp32 (5), normalised by three operations in place (24), loss and gradient (22)
PIXEL_BYTES, PIXEL_KERNELS = 53, 30
ENCODED_PIXEL_BYTES, ENCODED_PIXEL_KERNELS = 31, 15  # the same without loss and gradient


@dataclass(frozen=True)
class Efficiency:
    """Shares of a GPU's figures that work reaches, and latencies.

    matmul, attention: of the peak. memory, link: of their speeds. launch_s: of a kernel. block_cpu_s, fsdp_cpu_s: of
    the CPU, to issue both passes of a block, plain and under FSDP2. node_hop_s, network_hop_s: of a message from one
    GPU of a ring to the next.
    """

    matmul: float
    attention: float
    memory: float
    link: float
    launch_s: float
    block_cpu_s: float
    fsdp_cpu_s: float
    node_hop_s: float
    network_hop_s: float


# Ours, but: hops are Ring LL and Ring Simple of NCCL's src/graph/tuning.cc (hwLat, NVLink and network); the CPU's slow
# case was measured beside an H200 (26 ms for 12 blocks; 62, 62, 165, 183 ms for 12, 12, 24, 32 blocks under FSDP2)
HOPS = {
    "fast": {"node_hop_s": 0.6e-6, "network_hop_s": 2.7e-6},
    "slow": {"node_hop_s": 3.4e-6, "network_hop_s": 14e-6},
}
CASES = {
    "fast": Efficiency(0.75, 0.4, 0.9, 0.9, launch_s=2e-6, block_cpu_s=1e-3, fsdp_cpu_s=2e-3, **HOPS["fast"]),
    "slow": Efficiency(0.5, 0.1, 0.7, 0.6, launch_s=6e-6, block_cpu_s=2.2e-3, fsdp_cpu_s=6e-3, **HOPS["slow"]),
}
FORWARD_SHARE = 1 / 3  # of a block's CPU time, in its forward pass; ours


@dataclass(frozen=True)
class Operation:
    """One kernel, or several that only move bytes."""

    flops: float
    bytes: float
    kernels: int = 1
    attention: bool = False


class Seconds(dict[str, float]):
    """Seconds of a step by kind: compute, memory, launches, communication, host (pixels to the GPU), cpu.

    Left out: the waits for the GPU of steps that log or save, one in `log_every`.
    """

    def add(self, operations: Iterable[Operation], gpu: Gpu, share: Efficiency) -> float:
        """Add operations, one after the other. Returns their seconds."""
        total = 0.0
        for op in operations:
            flops_s = op.flops / (gpu.bf16_flop_per_s * (share.attention if op.attention else share.matmul))
            bytes_s, launch_s = op.bytes / (gpu.memory_bytes_per_s * share.memory), op.kernels * share.launch_s
            for name, value in (("compute" if flops_s >= bytes_s else "memory", max(flops_s, bytes_s)), ("launches", launch_s)):
                self[name] = self.get(name, 0.0) + value
            total += max(flops_s, bytes_s) + launch_s
        return total

    def add_cpu(self, seconds: float) -> None:
        """The CPU's seconds beside all others: the part that is longer."""
        self["cpu"] = max(0.0, seconds - sum(self.values()))


def step_seconds(work: Work, layout: StepLayout, gpu: Gpu, share: Efficiency, *, clips: int, replicas: int) -> Seconds:
    """Of a step with `clips` at once on each GPU. Clips are there when they are needed."""
    shards, c, blocks, seconds = layout.shards, layout.sizes.compute, work.blocks, Seconds()
    group, others = Group(shards, NODE), Group(replicas, max(NODE // shards, 1))
    shard = [shard_values(block.shapes, shards) for block in blocks]
    root = shard_values(work.shapes, shards)

    def gather(values: int) -> float:
        return group.seconds(c * values * (shards - 1), shards - 1, gpu, share)

    def scatter(values: int) -> float:
        return group.seconds(REDUCED * values * (shards - 1), shards - 1, gpu, share)

    def sum_copies(values: int) -> float:
        hops = 2 * math.ceil(math.log2(replicas))  # a tree
        return others.seconds(2 * (replicas - 1) / replicas * REDUCED * values, hops, gpu, share)

    outside = [op for tokens, weights in (work.embedding, *work.linears) for op in _outside(clips * tokens, weights, c, gpu)]
    outside.append(Operation(0, PIXEL_BYTES * work.pixels * clips, PIXEL_KERNELS))
    outside += _gather_copies(work.shapes, root, c, shards) + _reduce_copies(work.shapes, c, shards)
    if work.teacher:
        outside += [op for block in work.teacher.blocks for op in forward(block, clips, c, gpu)]
    exposed = 0.0
    for microbatch in range(layout.microbatches):
        seconds.add(outside, gpu, share)
        exposed += gather(root) + gather(shard[0])
        for i, block in enumerate(blocks):
            computing = seconds.add(forward(block, clips, c, gpu) + _gather_copies(block.shapes, shard[i], c, shards), gpu, share)
            exposed += max(0.0, (gather(shard[i + 1]) if i + 1 < len(blocks) else 0.0) - computing)
        last = microbatch + 1 == layout.microbatches
        for i in reversed(range(len(blocks))):
            copies = _reduce_copies(blocks[i].shapes, c, shards)
            if shards > 1 or layout.recompute:
                copies += _gather_copies(blocks[i].shapes, shard[i], c, shards)
            computing = seconds.add(backward(blocks[i], clips, c, gpu, layout.recompute) + copies, gpu, share)
            within, between = gather(shard[i - 1]) if i else 0.0, 0.0
            if i + 1 < len(blocks):
                within, between = within + scatter(shard[i + 1]), sum_copies(shard[i + 1]) if last else 0.0
            exposed += max(0.0, max(within, between) - computing)
        exposed += sum(scatter(values) + (sum_copies(values) if last else 0.0) for values in (shard[0], root))
    tensors = len(work.shapes) + sum(len(block.shapes) for block in blocks)
    seconds.add([Operation(0, OPTIMIZER_BYTES * (root + sum(shard)), 2 * tensors)], gpu, share)
    seconds["communication"] = exposed
    host_s = layout.microbatches * clips * work.pixels / (gpu.host_bytes_per_s * share.link)
    seconds["host"] = max(0.0, host_s - sum(seconds.values()))  # a step's clips are copied beside the step before
    passes = layout.microbatches * (1 + FORWARD_SHARE * layout.recompute)
    seconds.add_cpu(len(blocks) * passes * (share.fsdp_cpu_s if shards > 1 else share.block_cpu_s))
    return seconds


def features_seconds(frozen: FrozenWork, gpu: Gpu, share: Efficiency, *, shards: int, clips: int, pixels: int) -> Seconds:
    """Of a pass of a frozen encoder in bfloat16 over `clips` at once on each GPU. pixels: values of a clip.

    Shards gather weights, as in `step_seconds`. Pixels come from the host, and fp32 features go back to it.
    """
    c, group, seconds, (tokens, weights) = MIXED.compute, Group(shards, NODE), Seconds(), frozen.embedding
    shard = [shard_values(block.shapes, shards) for block in frozen.blocks]

    def gather(values: int) -> float:
        return group.seconds(c * values * (shards - 1), shards - 1, gpu, share) if shards > 1 else 0.0

    embedding = _outside(clips * tokens, weights, c, gpu)[:1]
    seconds.add([Operation(0, ENCODED_PIXEL_BYTES * pixels * clips, ENCODED_PIXEL_KERNELS), *embedding], gpu, share)
    exposed = gather(shard[0]) if shard else 0.0
    for i, block in enumerate(frozen.blocks):
        copies = _gather_copies(block.shapes, shard[i], c, shards)
        computing = seconds.add(forward(block, clips, c, gpu) + copies, gpu, share)
        exposed += max(0.0, (gather(shard[i + 1]) if i + 1 < len(shard) else 0.0) - computing)
    width = frozen.blocks[0].width if frozen.blocks else 0
    back_s, there_s = (clips * size / (gpu.host_bytes_per_s * share.link) for size in (STORED * tokens * width, pixels))
    seconds["communication"] = exposed
    seconds["host"] = back_s + max(0.0, there_s - sum(seconds.values()))  # clips are copied beside the pass before
    seconds.add_cpu(len(frozen.blocks) * FORWARD_SHARE * (share.fsdp_cpu_s if shards > 1 else share.block_cpu_s))
    return seconds


@dataclass(frozen=True)
class Group:
    """GPUs that send to each other, `in_node` of them, at most, on one machine. Rings use all their adapters (NCCL)."""

    size: int
    in_node: int

    def seconds(self, sent: float, hops: int, gpu: Gpu, share: Efficiency) -> float:
        """Of a collective that sends `sent` bytes from each GPU, and `hops` messages in turn."""
        nodes = -(-self.size // self.in_node)
        speed = gpu.node_bytes_per_s if nodes == 1 else min(gpu.node_bytes_per_s, self.in_node * gpu.network_bytes_per_s)
        far = hops * (nodes - 1) / max(self.size - 1, 1)
        return sent / (speed * share.link) + (hops - far) * share.node_hop_s + far * share.network_hop_s


def forward(block: BlockWork, clips: int, c: int, gpu: Gpu) -> list[Operation]:
    """Of a block: norms and sums, GELU, attention, four products."""
    tokens, width = clips * block.tokens, block.width
    moved = Operation(0, c * tokens * (9 * width + 2 * block.mlp), 4)
    attention = Operation(4 * tokens * block.tokens * width, 4 * c * tokens * width, attention=True)
    return [moved, attention, *(_product(tokens, n, k, c, gpu) for k, n in _layers(block))]


def backward(block: BlockWork, clips: int, c: int, gpu: Gpu, recompute: bool) -> list[Operation]:
    """Of a block: two products for each of the forward pass. recompute: that pass again, without its last one."""
    tokens, width = clips * block.tokens, block.width
    moved = Operation(0, c * tokens * (13 * width + 4 * block.mlp), 10)
    attention = Operation(10 * tokens * block.tokens * width, 8 * c * tokens * width, attention=True)
    products = [op for k, n in _layers(block) for op in (_product(tokens, k, n, c, gpu), _product(k, n, tokens, c, gpu))]
    return [*(forward(block, clips, c, gpu)[:-1] if recompute else []), moved, attention, *products]


def _layers(block: BlockWork) -> Sequence[tuple[int, int]]:
    """Inputs and outputs of the linear layers."""
    width = block.width
    return (width, 3 * width), (width, width), (width, block.mlp), (block.mlp, width)


def _product(rows: int, columns: int, inner: int, c: int, gpu: Gpu) -> Operation:
    pieces = max(inner // TILE_DEPTH, 1)
    waves = math.ceil(math.ceil(rows / TILE) * math.ceil(columns / TILE) * pieces / gpu.processors)
    flops = 2 * TILE * TILE * inner / pieces * gpu.processors * waves
    return Operation(flops, c * (rows * columns + rows * inner + columns * inner))


def _outside(tokens: int, weights: int, c: int, gpu: Gpu) -> list[Operation]:
    """The three products of a layer outside the blocks, as of a square one."""
    side = round(weights**0.5)
    return [_product(tokens, side, side, c, gpu)] * 2 + [_product(side, side, tokens, c, gpu)]


def _gather_copies(shapes: Shapes, shard: int, c: int, shards: int) -> list[Operation]:
    """A shard from fp32, and gathered weights into their tensors. One shard is cast alone."""
    cast, values = (STORED + c) * shard, values_of(shapes)
    return [Operation(0, cast + 2 * c * values, 3) if shards > 1 else Operation(0, cast, 1)]


def _reduce_copies(shapes: Shapes, c: int, shards: int) -> list[Operation]:
    """Gradients into one fp32 buffer; of one shard, into tensors."""
    return [Operation(0, (c + LOSS) * values_of(shapes), 3 if shards > 1 else 1)]
