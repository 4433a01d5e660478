"""What one clip costs a model, read off the model's shapes: the only thing that the closed form knows of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from scaling4d.mae.distilled import Distilled
from scaling4d.mae.encoder import Block, Encoder
from scaling4d.mae.mae_st import MAEST
from scaling4d.mae.masking import kept_tokens

Rows = tuple[tuple[int, int], ...]  # of each parameter: its first axis, which is sharded, and the values of one row


@dataclass(frozen=True)
class BlockWork:
    """A transformer block and the tokens of a clip that go through it."""

    width: int
    mlp: int
    heads: int
    tokens: int
    rows: Rows


@dataclass(frozen=True)
class LinearWork:
    """A linear layer outside the blocks. learns_input: whether a gradient goes on to its input (not to pixels)."""

    tokens: int
    weights: int
    learns_input: bool


@dataclass(frozen=True)
class TeacherWork:
    """A frozen encoder that sees all tokens, and whose features of every layer are held until one is chosen.

    blocks: those that are computed, one more than the chosen layer needs.
    """

    blocks: tuple[BlockWork, ...]
    embedding: LinearWork
    parameters: int
    patch_values: int


@dataclass(frozen=True)
class Work:
    """Per clip, unless a name says otherwise.

    blocks: in the order of the forward pass. rows: of all parameters outside the blocks; head_parameters: of those, the ones that
    are used after the blocks. pixel_values: of a clip. saved_values: what layers before and between the blocks keep for the
    backward pass; head_saved_values: those after them.
    loss_saved_values: what the loss keeps; loss_temporary_values: what its backward pass holds beside that.
    """

    visible_tokens: int
    all_tokens: int
    coarse_tokens: int
    blocks: tuple[BlockWork, ...]
    linears: tuple[LinearWork, ...]
    rows: Rows
    head_parameters: int
    pixel_values: int
    saved_values: int
    head_saved_values: int
    loss_saved_values: int
    loss_temporary_values: int
    teacher: TeacherWork | None

    @property
    def parameters(self) -> int:
        return count(self.rows) + sum(count(block.rows) for block in self.blocks)


def count(rows: Rows) -> int:
    return sum(first * rest for first, rest in rows)


def kept_of(model: nn.Module) -> int:
    """Visible tokens of a clip, as the model's own `choose` has them."""
    return kept_tokens(model.masking, model.encoder.grid, model.mask_ratio, down=isinstance(model, MAEST))


def work_of(model: nn.Module) -> Work:
    """The work of one of mae.build.METHODS; the weights may be on meta."""
    if isinstance(model, MAEST):
        return _mae_st(model)
    return _distilled(model) if isinstance(model, Distilled) else _simple_mae(model)


def _simple_mae(model: nn.Module) -> Work:
    encoder, width = model.encoder, model.encoder.width
    kept, coarse = kept_of(model), math.prod(model.coarse_grid)
    alone = len(encoder.blocks) - model.decode_blocks
    blocks = _blocks(encoder.blocks[:alone], kept) + _blocks(encoder.blocks[alone:], kept + coarse)
    predicted = coarse * model.decoder.out_features
    return Work(
        visible_tokens=kept,
        all_tokens=math.prod(encoder.grid),
        coarse_tokens=coarse,
        blocks=blocks,
        linears=(_embedding(encoder, kept), _linear(model.decoder, coarse)),
        rows=_rows(model, encoder.blocks),
        head_parameters=_parameters(model.decoder),
        pixel_values=math.prod(encoder.clip) * 3,
        saved_values=kept * encoder.patch_embedding.in_features,
        head_saved_values=coarse * width,
        loss_saved_values=2 * predicted,  # of loss_on all: what is predicted, and what is there
        loss_temporary_values=predicted,
        teacher=None,
    )


def _mae_st(model: MAEST) -> Work:
    encoder, width, inner = model.encoder, model.encoder.width, model.decoder_norm.normalized_shape[0]
    kept, tokens, first = kept_of(model), math.prod(encoder.grid), encoder.first
    predicted = tokens * model.decoder.out_features
    head = (model.decoder_embedding, model.decoder_norm, model.decoder, model.decoder_positions)
    return Work(
        visible_tokens=kept,
        all_tokens=tokens,
        coarse_tokens=0,
        blocks=_blocks(encoder.blocks, kept + first) + _blocks(model.decoder_blocks, tokens + first),
        linears=(
            _embedding(encoder, kept),
            _linear(model.decoder_embedding, kept),
            _linear(model.decoder, tokens + first),
        ),
        rows=_rows(model, encoder.blocks, model.decoder_blocks),
        head_parameters=sum(_parameters(part) for part in head),
        pixel_values=math.prod(encoder.clip) * 3,
        saved_values=kept * encoder.patch_embedding.in_features + (2 * kept + first) * width,
        head_saved_values=2 * (tokens + first) * inner,
        loss_saved_values=predicted,
        loss_temporary_values=4 * predicted,
        teacher=None,
    )


def _distilled(model: Distilled) -> Work:
    encoder, kept = model.encoder, kept_of(model)
    predicted = kept * model.decoder.out_features
    return Work(
        visible_tokens=kept,
        all_tokens=math.prod(encoder.grid),
        coarse_tokens=0,
        blocks=_blocks(encoder.blocks, kept),
        linears=(_embedding(encoder, kept), _linear(model.decoder, kept)),
        rows=_rows(model, encoder.blocks),
        head_parameters=_parameters(model.decoder),
        pixel_values=math.prod(encoder.clip) * 3,
        saved_values=kept * encoder.patch_embedding.in_features,
        head_saved_values=kept * encoder.width,
        loss_saved_values=2 * predicted,
        loss_temporary_values=predicted,
        teacher=_teacher(model),
    )


def _teacher(model: Distilled) -> TeacherWork | None:
    (teacher,) = model.taught_by
    if teacher is None:
        return None
    tokens = math.prod(teacher.grid)
    return TeacherWork(
        blocks=_blocks(teacher.blocks[: max(model.teacher_layer - 1, 0)], tokens),
        embedding=_embedding(teacher, tokens),
        parameters=_parameters(teacher),
        patch_values=tokens * teacher.patch_embedding.in_features,
    )


def _blocks(blocks: Iterable[Block], tokens: int) -> tuple[BlockWork, ...]:
    return tuple(
        BlockWork(width=block.out.in_features, mlp=block.mlp_in.out_features, heads=block.heads, tokens=tokens, rows=_rows(block))
        for block in blocks
    )


def _embedding(encoder: Encoder, tokens: int) -> LinearWork:
    return LinearWork(tokens, encoder.patch_embedding.weight.numel(), learns_input=False)


def _linear(layer: nn.Linear, tokens: int) -> LinearWork:
    return LinearWork(tokens, layer.weight.numel(), learns_input=True)


def _rows(module: nn.Module, *without: nn.Module) -> Rows:
    left_out = {id(p) for part in without for p in part.parameters()}
    return tuple((p.shape[0], p.numel() // p.shape[0]) for p in module.parameters() if id(p) not in left_out)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
