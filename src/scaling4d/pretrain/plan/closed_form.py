"""FLOPs, memory and traffic of one training step, by formulas.

Letters: D width, M width of the mlp, h heads, K tokens of a clip in a block, B clips on a GPU, S shards, R replicas; W weights;
c, m, r bytes of a number computed with, stored, reduced (2, 4, 4 in mixed precision); pad(W) values after every parameter's
first axis was rounded up to a multiple of S, which is what FSDP2 stores and sends.

FLOPs of a clip (a multiply and an add are two)
  linear layer       forward 2 K W; backward twice that: one for the weights, one for the input, which pixels do not need
  attention          forward 4 K^2 D; backward 10 K^2 D: fused attention makes the scores again (5 products where forward has 2)
  recompute          a block's forward pass again, without its last linear layer, whose output nobody needs

Memory of a GPU, in bytes
  parameters         m pad(W) / S
  gradients          r pad(W) / S of the blocks that are done, or, where a batch is worked off in parts, of all since the first
                     part; c W, not yet reduced, of the block at work and of what follows the blocks
  optimizer          2 m pad(W) / S: AdamW's two moments
  activations        B times: pixels; of a block c K (8 D + 2 M) + 4 K (4 + h): its input, two normed inputs, queries, keys,
                     values, attention's output, the sum after it, the mlp before and after its GELU, and fp32 statistics;
                     with recompute c K D of every block but the one at work; the loss
  communication      c pad(W) of what lies outside the blocks; c pad(W) of the block at work and of the one fetched ahead;
                     r pad(W) of the gradients being reduced
The step's peak is sought at the loss, at three places in every block's backward pass, and at its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from scaling4d.pretrain.plan.work import BlockWork, Rows, Work, count

KINDS = ("parameters", "gradients", "optimizer", "activations", "communication")
Memory = dict[str, int]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a number: as stored, computed with, reduced. Gathered: whether weights are shards that FSDP2 gathers."""

    stored: int = 4
    compute: int = 2
    reduced: int = 4
    gathered: bool = True


MIXED = Sizes()
PLAIN = Sizes(compute=4, gathered=False)  # one process, all in fp32


def flops(work: Work, *, recompute: bool) -> dict[str, int]:
    """Of one clip: forward (with a teacher's), backward, recompute, total."""
    linear = sum(2 * layer.tokens * layer.weights for layer in work.linears)
    pixels = sum(2 * layer.tokens * layer.weights for layer in work.linears if not layer.learns_input)
    products = sum(_products(block) for block in work.blocks)
    scores = sum(_scores(block) for block in work.blocks)
    again = sum(_products(block) + _scores(block) - 2 * block.tokens * block.mlp * block.width for block in work.blocks)
    forward, backward = linear + products + scores, 2 * (linear + products) - pixels + 5 * scores // 2
    if work.teacher:
        embedding = work.teacher.embedding
        forward += 2 * embedding.tokens * embedding.weights + sum(_products(b) + _scores(b) for b in work.teacher.blocks)
    again = again if recompute else 0
    return {"forward": forward, "backward": backward, "recompute": again, "total": forward + backward + again}


def _products(block: BlockWork) -> int:
    return 2 * block.tokens * (4 * block.width**2 + 2 * block.width * block.mlp)


def _scores(block: BlockWork) -> int:
    return 4 * block.tokens**2 * block.width


def memory(work: Work, *, clips: int, shards: int, recompute: bool, parts: int = 1, sizes: Sizes = MIXED) -> Memory:
    """Bytes on a GPU by kind, and their total, at the peak of a step; `clips` at once on each GPU, `parts` one after another."""
    found = moments(work, clips=clips, parts=parts, shards=shards, recompute=recompute, sizes=sizes)
    return max(found, key=lambda at: at["total"])


def moments(work: Work, *, clips: int, shards: int, recompute: bool, parts: int = 1, sizes: Sizes = MIXED) -> list[Memory]:
    """Memory at every place of a step where its peak can be."""
    c, blocks = sizes.compute, work.blocks
    saved = [clips * _saved(block, c) for block in blocks]
    kept = [clips * c * block.tokens * block.width for block in blocks] if recompute else saved
    outside = clips * c * (work.pixel_values + work.saved_values) + clips * 8 * work.visible_tokens
    owned = _shard(work.rows, shards) + sum(_shard(block.rows, shards) for block in blocks)
    fixed = {
        "parameters": sizes.stored * owned + (c * work.teacher.parameters if work.teacher else 0),
        "optimizer": 2 * sizes.stored * owned,
    }
    whole = [c * shards * _shard(block.rows, shards) * sizes.gathered for block in blocks]  # gathered
    reduced = [sizes.reduced * shards * _shard(block.rows, shards) * sizes.gathered for block in blocks]
    root = c * shards * _shard(work.rows, shards) * sizes.gathered
    head = c * work.head_parameters
    found = []

    def at(*, gradients: int, activations: int, communication: int) -> None:
        here = fixed | {"gradients": gradients, "activations": outside + activations, "communication": communication}
        found.append({kind: here[kind] for kind in KINDS} | {"total": sum(here.values())})

    after = sum(kept) + clips * c * work.head_saved_values
    loss = clips * c * (work.loss_saved_values + work.loss_temporary_values)
    done = owned if parts > 1 else 0  # values whose gradients are there
    at(gradients=sizes.reduced * done, activations=after + loss, communication=root + whole[-1])
    if work.teacher:
        taught = clips * c * _taught(work)
        at(gradients=sizes.reduced * done, activations=after + taught, communication=root + whole[-1])
    for i in reversed(range(len(blocks))):
        block, earlier = blocks[i], sum(kept[:i])
        ahead, behind = whole[i - 1] if i else 0, reduced[i + 1] if i + 1 < len(blocks) else 0
        ready, mine = sizes.reduced * done + head, c * count(block.rows)
        tokens = clips * c * block.tokens
        at(  # the mlp: its output's and its hidden layer's gradients
            gradients=ready + c * block.width * block.mlp,
            activations=earlier + saved[i] + tokens * (block.width + block.mlp),
            communication=root + whole[i] + ahead + behind,
        )
        at(  # the block's end, before its gradients are reduced
            gradients=ready + mine,
            activations=earlier + tokens * 3 * block.width,
            communication=root + whole[i] + ahead + behind,
        )
        done += _shard(block.rows, shards) if parts == 1 else 0
        at(  # its gradients are copied to be reduced; its weights are gone
            gradients=ready + mine,
            activations=earlier + tokens * block.width,
            communication=root + ahead + reduced[i],
        )
    ready = sizes.reduced * done + c * count(work.rows)
    at(gradients=ready, activations=0, communication=root + reduced[0])  # the end, before the rest is reduced, and then
    at(gradients=ready, activations=0, communication=sizes.reduced * shards * _shard(work.rows, shards) * sizes.gathered)
    return found


def _saved(block: BlockWork, c: int) -> int:
    return block.tokens * (c * (8 * block.width + 2 * block.mlp) + 4 * (4 + block.heads))


def _taught(work: Work) -> int:
    """Values while the teacher looks: the input of every block, and in the last queries, keys, values, the sum, the mlp."""
    teacher = work.teacher
    layers = sum(block.tokens * block.width for block in teacher.blocks)
    at_work = max((block.tokens * (4 * block.width + 2 * block.mlp) for block in teacher.blocks), default=0)
    return max(layers + at_work, 2 * teacher.patch_values)


def _shard(rows: Rows, shards: int) -> int:
    """Values of the largest shard: FSDP2 splits the first axis of every parameter, rounded up."""
    return sum(-(-first // shards) * rest for first, rest in rows)


def clips_that_fit(work: Work, *, room_bytes: float, shards: int, recompute: bool, parts: int = 1) -> int:
    """The most clips at once on a GPU that stay within `room_bytes`; 0: not one."""
    given = {"parts": parts, "shards": shards, "recompute": recompute}
    fits = lambda clips: memory(work, clips=clips, **given)["total"] <= room_bytes  # noqa: E731
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def traffic(work: Work, *, shards: int, replicas: int, parts: int = 1) -> dict[str, float]:
    """Bytes that a GPU sends in a step: within its shards (of every part gathered for both passes, reduced once), and between
    replicas."""
    blocks, root = sum(_shard(block.rows, shards) for block in work.blocks), _shard(work.rows, shards)
    gathered = (shards - 1) * MIXED.compute * (2 * blocks + root)
    scattered = (shards - 1) * MIXED.reduced * (blocks + root)
    return {
        "shards_bytes": parts * (gathered + scattered),
        "replicas_bytes": 2 * (replicas - 1) / replicas * MIXED.reduced * (blocks + root),
    }
