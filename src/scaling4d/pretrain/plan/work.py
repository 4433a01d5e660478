"""The shapes of one clip's way through a model: all that the closed form knows of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from scaling4d.mae.encoder import Backbone, Block, Method
from scaling4d.mae.mae_st import MAEST
from scaling4d.mae.simple_mae import SimpleMAE
from scaling4d.training.parallelize import blocks_of

Shapes = tuple[tuple[int, int], ...]  # of each parameter: first axis, which FSDP2 shards, and values of a row
Linear = tuple[int, int]  # a linear layer outside the blocks: tokens of a clip, weights


@dataclass(frozen=True)
class BlockWork:
    """A transformer block and the number of a clip's tokens that go through it."""

    width: int
    mlp: int
    heads: int
    tokens: int
    shapes: Shapes
    qk_norm: bool = False


@dataclass(frozen=True)
class FrozenWork:
    """A frozen encoder that sees all tokens of a clip. blocks: below the chosen layer. parameters: of all blocks."""

    embedding: Linear
    blocks: tuple[BlockWork, ...]
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """Per clip, unless a name says otherwise.

    blocks: in the order of the forward pass. shapes: of all parameters outside the blocks; head_parameters: number of
    those after the blocks. pixels: values of a clip. saved_values: activations that layers before and between the
    blocks save for the backward pass; head_saved_values: those of the layers after the blocks; loss_values: fp32 values
    in the loss's backward pass; loss_kernel_values: those that a kernel of the loss holds besides, unseen by a dry run
    (measured on an H200, experiments/LOG.md, 2026-11-26).
    """

    visible_token_count: int
    all_token_count: int
    coarse_token_count: int
    embedding: Linear
    blocks: tuple[BlockWork, ...]
    linears: tuple[Linear, ...]
    shapes: Shapes
    head_parameters: int
    pixels: int
    saved_values: int
    head_saved_values: int
    loss_values: int
    loss_kernel_values: int
    teacher: FrozenWork | None

    @property
    def parameters(self) -> int:
        return values_of(self.shapes) + sum(values_of(block.shapes) for block in self.blocks)


def values_of(shapes: Shapes) -> int:
    return sum(first * rest for first, rest in shapes)


def work_of(model: Method) -> Work:
    """The work of one of mae.models.METHODS; its weights may be on meta."""
    encoder, visible, tokens = model.encoder, model.visible_token_count, math.prod(model.encoder.grid)
    coarse, saved, teacher = 0, visible * encoder.patch_embedding.in_features, None
    if isinstance(model, MAEST):
        prefix, width = encoder.prefix_tokens, model.decoder_norm.normalized_shape[0]
        blocks = _blocks(encoder.blocks, visible + prefix) + _blocks(model.decoder_blocks, tokens + prefix)
        linears = (_linear(model.decoder_embedding, visible), _linear(model.decoder, tokens + prefix))
        head = (model.decoder_embedding, model.decoder_norm, model.decoder, model.decoder_positions)
        saved += (2 * visible + prefix) * encoder.width
        head_saved = 2 * (tokens + prefix) * width
        loss = 5 * tokens * model.decoder.out_features  # the difference, and four on the way to its gradient
        in_kernel = 0
    else:
        alone, decoded = len(encoder.blocks), visible
        if isinstance(model, SimpleMAE):
            coarse = decoded = math.prod(model.coarse_grid)
            alone -= model.config.decode_blocks
        elif (teacher_encoder := model.teacher_encoder[0]) is not None:
            teacher = frozen_work(teacher_encoder, model.config.teacher_layer)
        blocks = _blocks(encoder.blocks[:alone], visible) + _blocks(encoder.blocks[alone:], visible + coarse)
        linears, head = (_linear(model.decoder, decoded),), (model.decoder,)
        head_saved = decoded * encoder.width
        in_kernel = decoded * model.decoder.out_features
        loss = 3 * in_kernel  # target, gradient; prediction and gradient in bf16 are one more
    in_blocks = {id(p) for block in blocks_of(model) for p in block.parameters()}
    return Work(
        visible_token_count=visible,
        all_token_count=tokens,
        coarse_token_count=coarse,
        embedding=_linear(encoder.patch_embedding, visible),
        blocks=blocks,
        linears=linears,
        shapes=_shapes(p for p in model.parameters() if id(p) not in in_blocks),
        head_parameters=sum(p.numel() for part in head for p in part.parameters()),
        pixels=math.prod(encoder.clip) * 3,
        saved_values=saved,
        head_saved_values=head_saved,
        loss_values=loss,
        loss_kernel_values=in_kernel,
        teacher=teacher,
    )


def frozen_work(encoder: Backbone, layer: int) -> FrozenWork:
    """The work of features of a layer, counted as `encoder.features` does; weights may be on meta."""
    tokens = math.prod(encoder.grid)
    return FrozenWork(
        embedding=_linear(encoder.patch_embedding, tokens),
        blocks=_blocks(encoder.blocks[: max(layer - 1, 0)], tokens + encoder.prefix_tokens),
        parameters=sum(p.numel() for p in encoder.parameters()),
    )


def _blocks(blocks: Iterable[Block], tokens: int) -> tuple[BlockWork, ...]:
    return tuple(
        BlockWork(
            width=block.out.in_features,
            mlp=block.mlp_in.out_features,
            heads=block.heads,
            tokens=tokens,
            shapes=_shapes(block.parameters()),
            qk_norm=isinstance(block.q_norm, nn.LayerNorm),
        )
        for block in blocks
    )


def _linear(layer: nn.Linear, tokens: int) -> Linear:
    return tokens, layer.weight.numel()


def _shapes(parameters: Iterable[nn.Parameter]) -> Shapes:
    return tuple((p.shape[0], p.numel() // p.shape[0]) for p in parameters)
