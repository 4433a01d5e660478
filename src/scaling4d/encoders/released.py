"""The arrays of the published models <-> our tensors: names, shapes, and how one becomes the other.

Sources: the released files of google-deepmind/representations4d, named as their flax modules, and the checkpoints of
facebookresearch/mae_st, named as its torch modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling4d.records import UserError

Shape = tuple[int, ...]
PATCH_KERNEL = "encoder/patch_embedding/Conv_0/kernel"  # pt ph pw 3 D
POSITIONS = "encoder/posenc/embeddings"  # t h w D
MAE_ST_HEADS = {768: 12, 1024: 16, 1280: 16}  # by width; its files do not say
MAE_ST_DECODER_HEADS = {512: 16}
MAE_ST_MEAN, MAE_ST_STD = 0.45, 0.225  # of pixels in 0..1, its util/kinetics.py


@dataclass(frozen=True)
class Part:
    """One of our tensors: its shape, the published arrays it is made of, with their shapes, and how.

    theirs: the way back, where there is one.
    """

    shape: Shape
    sources: dict[str, Shape]
    ours: Callable[..., np.ndarray]
    theirs: Callable[[np.ndarray], list[np.ndarray]] | None = None


def same(key: str, shape: Shape, here: Shape | None = None) -> Part:
    """The same numbers in the same order."""
    return Part(here or shape, {key: shape}, lambda a: a.reshape(here or shape), lambda a: [a.reshape(shape)])


def turned(key: str, shape: Shape, rows: int) -> Part:
    """A flax kernel of `rows` inputs, in any shape, as a torch weight."""
    columns = math.prod(shape) // rows
    return Part((columns, rows), {key: shape}, lambda a: a.reshape(rows, columns).T, lambda a: [a.T.reshape(shape)])


def stacked(parts: list[Part]) -> Part:
    """Parts of one shape, one below the other."""
    return Part(
        (sum(part.shape[0] for part in parts), *parts[0].shape[1:]),
        {key: shape for part in parts for key, shape in part.sources.items()},
        lambda *arrays: np.concatenate([part.ours(a) for part, a in zip(parts, arrays, strict=True)]),
        lambda a: [b for part, piece in zip(parts, np.split(a, len(parts)), strict=True) for b in part.theirs(piece)],
    )


def check(found: Mapping[str, Shape], parts: Mapping[str, Part], source: object) -> None:
    """Raises UserError: a key is missing or over, or has another shape."""
    wanted = {key: shape for part in parts.values() for key, shape in part.sources.items()}
    for key, shape in wanted.items():
        if key not in found:
            raise UserError(f"{source} lacks {key}; needed an array {shape}")
        if found[key] != shape:
            raise UserError(f"{source}: {key} is {found[key]}; needed {shape}")
    for key in found:
        if key not in wanted:
            raise UserError(f"{source} has {key} {found[key]}, which this model does not have")


# ---------------------------------------------------------------- 4DS


def four_ds_settings(found: Mapping[str, Shape], source: object, prefix: str) -> dict[str, Any]:
    """Arguments of the `Encoder` that the arrays below `prefix` make up, read off their shapes.

    Raises:
        UserError: the arrays that say so are missing or have another number of axes.
    """

    def shape(key: str, axes: int) -> Shape:
        key = prefix + key
        if len(found.get(key, ())) != axes:
            is_ = f"{key} is {found[key]}" if key in found else f"lacks {key}"
            raise UserError(f"{source}: {is_}; needed an array of {axes} axes, as the released 4DS files have it")
        return found[key]

    *patch, channels, width = shape(PATCH_KERNEL, 5)
    *grid, _ = shape(POSITIONS, 4)
    _, heads, per_head = shape("processor/layers_0/attention/query/kernel", 3)
    _, mlp = shape("processor/layers_0/mlp/dense_in/kernel", 2)
    if channels != 3 or heads * per_head != width:
        raise UserError(
            f"{source}: {channels} channels, width {width}, {heads} heads of {per_head}; needed 3, and heads that fill the width"
        )
    there = f"{prefix}processor/layers_"
    layers = {key.removeprefix(there).split("/")[0] for key in found if key.startswith(there)}
    return {
        "width": width,
        "depth": len(layers),
        "heads": heads,
        "mlp": mlp,
        "clip": tuple(g * p for g, p in zip(grid, patch, strict=True)),
        "patch": tuple(patch),
        "gelu": "tanh",
        "pixel_mean": 0.0,
        "pixel_scale": 1.0,
    }


def four_ds(settings: Mapping[str, Any], prefix: str) -> dict[str, Part]:
    """Name -> Part for every tensor of the `Encoder` with these settings."""
    width, mlp, patch = settings["width"], settings["mlp"], tuple(settings["patch"])
    heads, d = settings["heads"], width // settings["heads"]
    grid = tuple(c // p for c, p in zip(settings["clip"], patch, strict=True))
    parts = {
        "positions": same(prefix + POSITIONS, (*grid, width), (math.prod(grid), width)),
        "patch_embedding.weight": turned(prefix + PATCH_KERNEL, (*patch, 3, width), math.prod(patch) * 3),
        "patch_embedding.bias": same(f"{prefix}encoder/patch_embedding/Conv_0/bias", (width,)),
    }
    for i in range(settings["depth"]):
        there, here = f"{prefix}processor/layers_{i}", f"blocks.{i}"
        qkv = [f"{there}/attention/{name}" for name in ("query", "key", "value")]
        parts |= {
            f"{here}.attention_norm.weight": same(f"{there}/attention_norm/scale", (width,)),
            f"{here}.attention_norm.bias": same(f"{there}/attention_norm/bias", (width,)),
            f"{here}.qkv.weight": stacked([turned(f"{key}/kernel", (width, heads, d), width) for key in qkv]),
            f"{here}.qkv.bias": stacked([same(f"{key}/bias", (heads, d), (width,)) for key in qkv]),
            f"{here}.out.weight": turned(f"{there}/attention/out/kernel", (heads, d, width), width),
            f"{here}.out.bias": same(f"{there}/attention/out/bias", (width,)),
            f"{here}.mlp_norm.weight": same(f"{there}/mlp_norm/scale", (width,)),
            f"{here}.mlp_norm.bias": same(f"{there}/mlp_norm/bias", (width,)),
            f"{here}.mlp_in.weight": turned(f"{there}/mlp/dense_in/kernel", (width, mlp), width),
            f"{here}.mlp_in.bias": same(f"{there}/mlp/dense_in/bias", (mlp,)),
            f"{here}.mlp_out.weight": turned(f"{there}/mlp/dense_out/kernel", (mlp, width), mlp),
            f"{here}.mlp_out.bias": same(f"{there}/mlp/dense_out/bias", (width,)),
        }
    return parts


# ---------------------------------------------------------------- MAE-ST


def mae_st_settings(
    found: Mapping[str, Shape],
    source: object,
    *,
    heads: int | None,
    decoder_heads: int | None,
    frames: int,
    mask_ratio: float,
    normalise_target: bool,
) -> dict[str, Any]:
    """Arguments of the `MAEST` (or, without a decoder, the `MAESTEncoder`) that an official state dict makes up.

    heads, decoder_heads: None takes those of the official models of this width. frames: of a clip, asked for only where
    positions are one table for space and time. mask_ratio, normalise_target: of the pretraining, which tensors do not tell.
    Raises:
        UserError: tensors that say so are missing, the heads of this width are not known, or frames do not fit.
    """

    def shape(key: str, axes: int) -> Shape:
        if len(found.get(key, ())) != axes:
            is_ = f"{key} is {found[key]}" if key in found else f"lacks {key}"
            raise UserError(f"{source}: {is_}; needed a tensor of {axes} axes, as mae_st's checkpoints have it")
        return found[key]

    def known(heads: int | None, width: int, table: Mapping[int, int], option: str) -> int:
        if heads is None and width not in table:
            raise UserError(f"{source}: width {width} is none of mae_st's own ({', '.join(map(str, table))}); give {option}")
        heads = table[width] if heads is None else heads
        if heads < 1 or width % heads:
            raise UserError(f"{source}: width {width} does not divide into {heads} heads; correct {option}")
        return heads

    width, channels, *patch = shape("patch_embed.proj.weight", 5)
    if channels != 3:
        raise UserError(f"{source}: patch_embed.proj.weight takes {channels} channels; needed 3")
    class_token = "cls_token" in found
    if "pos_embed_temporal" in found:
        places, times = shape("pos_embed_spatial", 3)[1], shape("pos_embed_temporal", 3)[1]
    else:
        tokens, times = shape("pos_embed", 3)[1] - class_token, max(frames // patch[0], 1)
        places = tokens // times if tokens % times == 0 else 0
    side = math.isqrt(places)
    if side * side != places or not places:
        raise UserError(f"{source}: positions of {frames} frames are not those of square clips; correct --frames")
    settings: dict[str, Any] = {
        "width": width,
        "depth": _count(found, "blocks."),
        "heads": known(heads, width, MAE_ST_HEADS, "--heads"),
        "mlp": shape("blocks.0.mlp.fc1.weight", 2)[0],
        "clip": (times * patch[0], side * patch[1], side * patch[2]),
        "patch": tuple(patch),
        "separable_positions": "pos_embed_temporal" in found,
        "class_token": class_token,
        "pixel_mean": MAE_ST_MEAN,
        "pixel_scale": 1 / MAE_ST_STD,
    }
    if "decoder_embed.weight" not in found:
        return settings
    decoder_width = shape("decoder_embed.weight", 2)[0]
    per_token = shape("decoder_pred.weight", 2)[0] // (3 * patch[1] * patch[2])  # predicted frames a token
    return settings | {
        "decoder_width": decoder_width,
        "decoder_depth": _count(found, "decoder_blocks."),
        "decoder_heads": known(decoder_heads, decoder_width, MAE_ST_DECODER_HEADS, "--decoder-heads"),
        "predicted_frames": per_token * times,
        "masking": "random",
        "mask_ratio": mask_ratio,
        "normalise_target": normalise_target,
        "position_init": "normal",
        "branch_init": "released",
    }


def mae_st(settings: Mapping[str, Any]) -> dict[str, Part]:
    """Name -> Part for every tensor of the `MAEST` with these settings."""
    width, patch = settings["width"], settings["patch"]
    decoder_width = settings["decoder_width"]
    predicted = patch[0] * settings["predicted_frames"] // settings["clip"][0] * patch[1] * patch[2] * 3
    parts = {f"encoder.{name}": part for name, part in mae_st_encoder(settings).items()}
    parts |= {
        "mask_token": same("mask_token", (1, 1, decoder_width), (1, decoder_width)),
        "decoder_embedding.weight": same("decoder_embed.weight", (decoder_width, width)),
        "decoder_embedding.bias": same("decoder_embed.bias", (decoder_width,)),
        "decoder_norm.weight": same("decoder_norm.weight", (decoder_width,)),
        "decoder_norm.bias": same("decoder_norm.bias", (decoder_width,)),
        "decoder.weight": same("decoder_pred.weight", (predicted, decoder_width)),
        "decoder.bias": same("decoder_pred.bias", (predicted,)),
    }
    if settings["class_token"]:
        parts["decoder_class_token"] = same("decoder_cls_token", (1, 1, decoder_width), (1, decoder_width))
    parts |= _mae_st_positions(settings, "decoder_positions", "decoder_pos_embed", decoder_width)
    return parts | _mae_st_blocks("decoder_blocks", "decoder_blocks", settings["decoder_depth"], decoder_width, 4 * decoder_width)


def mae_st_encoder(settings: Mapping[str, Any]) -> dict[str, Part]:
    """Name -> Part for every tensor of the `MAESTEncoder` with these settings."""
    width, patch = settings["width"], tuple(settings["patch"])
    pixels = Part(  # D C pt ph pw -> D P
        (width, math.prod(patch) * 3),
        {"patch_embed.proj.weight": (width, 3, *patch)},
        lambda a: a.transpose(0, 2, 3, 4, 1).reshape(width, -1),
    )
    parts = {
        "patch_embedding.weight": pixels,
        "patch_embedding.bias": same("patch_embed.proj.bias", (width,)),
        "norm.weight": same("norm.weight", (width,)),
        "norm.bias": same("norm.bias", (width,)),
    }
    if settings["class_token"]:
        parts["class_token"] = same("cls_token", (1, 1, width), (1, width))
    parts |= _mae_st_positions(settings, "positions", "pos_embed", width)
    return parts | _mae_st_blocks("blocks", "blocks", settings["depth"], width, settings["mlp"])


def _mae_st_positions(settings: Mapping[str, Any], here: str, there: str, width: int) -> dict[str, Part]:
    t, h, w = (c // p for c, p in zip(settings["clip"], settings["patch"], strict=True))
    if settings["separable_positions"]:
        parts = {
            f"{here}.temporal": same(f"{there}_temporal", (1, t, width), (t, width)),
            f"{here}.spatial": same(f"{there}_spatial", (1, h * w, width), (h * w, width)),
        }
        if settings["class_token"]:
            parts[f"{here}.class_token"] = same(f"{there}_class", (1, 1, width), (1, width))
        return parts
    first = int(settings["class_token"])  # its position is the first row of the one table
    source = {there: (1, first + t * h * w, width)}
    whole = {f"{here}.whole": Part((t * h * w, width), source, lambda a: a[0, first:])}
    if first:
        whole[f"{here}.class_token"] = Part((1, width), source, lambda a: a[0, :1])
    return whole


def _mae_st_blocks(here: str, there: str, depth: int, width: int, mlp: int) -> dict[str, Part]:
    parts = {}
    for i in range(depth):
        a, b = f"{here}.{i}", f"{there}.{i}"
        for kind, wide, narrow in (("weight", (width, width), (width, mlp)), ("bias", (width,), (width,))):
            expanded = (mlp, width) if kind == "weight" else (mlp,)
            parts |= {
                f"{a}.attention_norm.{kind}": same(f"{b}.norm1.{kind}", (width,)),
                f"{a}.qkv.{kind}": stacked([same(f"{b}.attn.{n}.{kind}", wide) for n in "qkv"]),
                f"{a}.out.{kind}": same(f"{b}.attn.proj.{kind}", wide),
                f"{a}.mlp_norm.{kind}": same(f"{b}.norm2.{kind}", (width,)),
                f"{a}.mlp_in.{kind}": same(f"{b}.mlp.fc1.{kind}", expanded),
                f"{a}.mlp_out.{kind}": same(f"{b}.mlp.fc2.{kind}", narrow),
            }
    return parts


def _count(found: Mapping[str, Shape], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in found if key.startswith(prefix)})
