"""FLOPs, memory and traffic of one training step, by formulas.

Letters: D width, M width of the mlp, h heads, K tokens of a clip in a block, B clips on a GPU, S shards, R replicas;
W weights; c, m, r bytes of a number computed with, stored, reduced (2, 4, 4 in mixed precision); pad(W) values when the
first axis of every parameter is rounded up to a multiple of S, as FSDP2 stores and sends them.

FLOPs of a clip (a multiply and an add are two)
  linear layer       forward 2 K W; backward twice that: for the weights, and for the input, which pixels do not need
  attention          forward 4 K^2 D (2 products); backward 10 K^2 D (5): fused attention computes the scores again
  recompute          a block's forward pass again, without its last linear layer, whose output nobody needs

Memory of a GPU, in bytes
  parameters         m pad(W) / S; twice that where the best weights of the validations are kept
  gradients          r pad(W) / S of the finished blocks, or, with several microbatches, of all blocks since the
                     first microbatch; c W, not yet reduced, of the current block and of the layers after the blocks
  optimizer          2 m pad(W) / S: AdamW's two moments
  activations        B times: of a block c K (8 D + 2 M) + 4 K (4 + h): its input, two normed inputs, queries, keys,
                     values, attention's output, the sum after it, the mlp before and after its GELU, and fp32
                     statistics; with norms of queries and keys c K 2 D + 16 K h more; with recompute c K D of every
                     block but the current one; the loss, in fp32, since its target is, with what its kernel holds.
                     Pixels come as uint8 and leave after the forward pass, before the peak. Not counted: those of up
                     to two further steps, which are copied early (training.fit), 2.4 MB a clip of 16 x 224 x 224
  communication      c pad(W) of the layers outside the blocks; c pad(W) of the current block and of the prefetched one;
                     r pad(W) of the gradients under reduction. With one shard: copies of the weights, of the layers
                     outside the blocks and of each block until its backward pass; with recompute of the current one.
                     Not counted: copies on several GPUs join a block's gradients in a message, for which both lie
                     there for a moment, r W of the block (of S by the dry run 5 MB)
The peak of a step is sought at the loss, at three places in every block's backward pass, and at the step's end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from scaling4d.mae.encoder import Method
from scaling4d.pretrain.plan.work import BlockWork, FrozenWork, Shapes, Work, values_of, work_of

USABLE = 0.9  # ours: share of a GPU's memory; the rest is for CUDA, NCCL and fragmentation
GIB = 2**30
KINDS = ("parameters", "gradients", "optimizer", "activations", "communication")


@dataclass(frozen=True)
class Sizes:
    """compute: bytes of a number computed with. gathered: whether FSDP2 gathers weights, or one shard casts them."""

    compute: int
    gathered: bool


STORED = REDUCED = LOSS = 4  # bytes of a number: as stored, as reduced, and in the loss, whose target is fp32
MIXED, FLOAT32, PLAIN = Sizes(2, True), Sizes(4, True), Sizes(4, False)  # PLAIN: every GPU has the weights, in fp32


@dataclass(frozen=True)
class StepLayout:
    """How a step lies on the GPUs.

    shards: of a copy. recompute: of every block. microbatches: of a batch, in turn. keep_best: hold the best weights.
    """

    shards: int
    recompute: bool
    microbatches: int = 1
    sizes: Sizes = MIXED
    keep_best: bool = False


def flops(work: Work, *, recompute: bool) -> dict[str, int]:
    """FLOPs of one clip in a training step.

    Returns:
        Executed ones: forward (with a teacher's), backward, recompute, and their total. And `model`: a backward pass
        counts as two forward passes, a teacher has one forward pass; recomputed activations do not count, nor does the
        decoder's output for a class token, which nobody uses.
    """
    linears = (work.embedding, *work.linears)
    linear = sum(2 * tokens * weights for tokens, weights in linears)
    used = sum(2 * min(tokens, work.all_token_count) * weights for tokens, weights in linears)
    pixels = 2 * math.prod(work.embedding)
    products, scores = _forward_flops(work.blocks)
    teacher = features_flops(work.teacher) if work.teacher else 0
    forward, backward = linear + products + scores + teacher, 2 * (linear + products) - pixels + 5 * scores // 2
    again = products + scores - sum(2 * block.tokens * block.mlp * block.width for block in work.blocks) if recompute else 0
    counts = {"forward": forward, "backward": backward, "recompute": again, "total": forward + backward + again}
    return counts | {"model": 3 * (used + products + scores) + teacher}


def features_flops(frozen: FrozenWork) -> int:
    """FLOPs of the features of one clip, by a frozen encoder."""
    return 2 * math.prod(frozen.embedding) + sum(_forward_flops(frozen.blocks))


def _forward_flops(blocks: Sequence[BlockWork]) -> tuple[int, int]:
    """Of the blocks' linear layers, and of attention."""
    linear = sum(2 * block.tokens * (4 * block.width**2 + 2 * block.width * block.mlp) for block in blocks)
    return linear, sum(4 * block.tokens**2 * block.width for block in blocks)


def flops_per_clip(model: Method) -> int:
    """Model FLOPs of one clip in a training step."""
    return flops(work_of(model), recompute=False)["model"]


def memory(work: Work, layout: StepLayout, *, clips: int) -> dict[str, int]:
    """Bytes on a GPU by kind, and their total, at the peak of a step with `clips` at once on each GPU."""
    return max(memory_timeline(work, layout, clips=clips), key=lambda place: place["total"])


def memory_timeline(work: Work, layout: StepLayout, *, clips: int) -> list[dict[str, int]]:
    """Memory at every place of a step where its peak can be."""
    shards, c, blocks = layout.shards, layout.sizes.compute, work.blocks
    gathered_shards = layout.shards if layout.sizes.gathered else 0
    activations = [clips * block.tokens * _saved_bytes(block, c) for block in blocks]
    saved = [clips * c * block.tokens * block.width for block in blocks] if layout.recompute else activations
    outside = clips * c * work.saved_values + clips * 8 * work.visible_token_count
    block_shards, root_shard = [shard_values(block.shapes, shards) for block in blocks], shard_values(work.shapes, shards)
    all_shards = root_shard + sum(block_shards)
    parameters = (1 + layout.keep_best) * STORED * all_shards + (c * work.teacher.parameters if work.teacher else 0)
    weights = [c * gathered_shards * shard for shard in block_shards]
    reduced = [REDUCED * gathered_shards * shard for shard in block_shards]
    root, head = c * gathered_shards * root_shard, c * work.head_parameters
    cast = gathered_shards == 1
    beside, at_loss = [0, *weights[:-1]], weights[-1]  # of the block before, gathered ahead
    if cast:
        *beside, at_loss = [0] * (len(blocks) + 1) if layout.recompute else [0, *accumulate(weights)]  # of all before
    after = sum(saved) + clips * c * work.head_saved_values
    finished = all_shards if layout.microbatches > 1 else 0  # values that have a reduced gradient
    loss = [clips * LOSS * (work.loss_values + work.loss_kernel_values)]
    if teacher := work.teacher:  # every block's input, and of the last one queries, keys, values, the sum, the mlp
        inputs = sum(block.tokens * block.width for block in teacher.blocks)
        last = max((block.tokens * (4 * block.width + 2 * block.mlp) for block in teacher.blocks), default=0)
        patches = (1 + LOSS + c * (c != LOSS)) * work.pixels  # uint8, normalised, and in the teacher's dtype
        loss.append(clips * (work.pixels + max(c * (inputs + last), patches)))
    places = [(REDUCED * finished, after + values, root + at_loss) for values in loss]
    for i in reversed(range(len(blocks))):
        block, earlier, tokens = blocks[i], sum(saved[:i]), clips * c * blocks[i].tokens
        previous = reduced[i + 1] if i + 1 < len(blocks) and not cast else 0
        ready, unreduced = REDUCED * finished + head, c * values_of(block.shapes)
        sent = root + weights[i] + beside[i] + previous
        # the mlp, with gradients of its output and hidden layer; the block's end, before its gradients are reduced
        mlp = earlier + activations[i] + tokens * (block.width + block.mlp)
        places.append((ready + c * block.width * block.mlp, mlp, sent))
        places.append((ready + unreduced, earlier + tokens * 3 * block.width, sent))
        finished += block_shards[i] if layout.microbatches == 1 else 0
        # its gradients are copied for the reduction; its weights are freed
        places.append((ready + unreduced, earlier + tokens * block.width, root + beside[i] + reduced[i]))
    ready = REDUCED * finished + c * values_of(work.shapes)
    places.append((ready, 0, root + reduced[0] * (not cast)))  # the end, before the rest is reduced, and after
    places.append((ready, 0, REDUCED * gathered_shards * root_shard))
    timeline = []
    for gradients, values, communication in places:
        kinds = (parameters, gradients, 2 * STORED * all_shards, outside + values, communication)
        timeline.append(dict(zip(KINDS, kinds, strict=True)) | {"total": sum(kinds)})
    return timeline


def _saved_bytes(block: BlockWork, c: int) -> int:
    """Activations that a block saves, per token."""
    norms = (c * 2 * block.width + 16 * block.heads) * block.qk_norm
    return c * (8 * block.width + 2 * block.mlp) + 4 * (4 + block.heads) + norms


def shard_values(shapes: Shapes, shards: int) -> int:
    """Values of the largest shard: FSDP2 splits the first axis of every parameter, rounded up."""
    return sum(-(-first // shards) * rest for first, rest in shapes)


def clips_that_fit(work: Work, layout: StepLayout, *, usable_bytes: float) -> int:
    """The most clips at once on a GPU within `usable_bytes`; 0: not one. Memory grows linearly with the clips."""
    none, one = ([place["total"] for place in memory_timeline(work, layout, clips=clips)] for clips in (0, 1))
    return max(0, min(int((usable_bytes - fixed) // (total - fixed)) for fixed, total in zip(none, one, strict=True)))


def traffic(work: Work, layout: StepLayout, *, replicas: int) -> dict[str, float]:
    """Bytes that a GPU sends in a step, within its shards and between replicas, in rings.

    A microbatch gathers twice. For clipping, shards sum the square of each parameter's gradient.
    """
    shards = layout.shards
    blocks, root = sum(shard_values(block.shapes, shards) for block in work.blocks), shard_values(work.shapes, shards)
    gathered = (shards - 1) * MIXED.compute * (2 * blocks + root)
    scattered = (shards - 1) * REDUCED * (blocks + root)
    norms = 2 * (shards - 1) / shards * REDUCED * (len(work.shapes) + sum(len(block.shapes) for block in work.blocks))
    return {
        "shards_bytes": layout.microbatches * (gathered + scattered) + norms,
        "replicas_bytes": 2 * (replicas - 1) / replicas * REDUCED * (blocks + root),
    }
