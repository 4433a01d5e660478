"""Released arrays <-> our tensors: names, shapes, and conversion of the 4DS and MAE-ST backbones.

Sources: the files of google-deepmind/representations4d, with the names of their flax modules, and the checkpoints of
facebookresearch/mae_st, with the names of its torch modules.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaling4d.encoders.arrays import Shape, check_expansion
from scaling4d.mae.encoder import BackboneConfig
from scaling4d.mae.mae_st import MAESTConfig, MAESTEncoderConfig
from scaling4d.mae.patches import grid_of
from scaling4d.records import UserError

PATCH_KERNEL = "encoder/patch_embedding/Conv_0/kernel"  # pt ph pw 3 D
POSITIONS = "encoder/posenc/embeddings"  # t h w D
BACKBONE, BACKBONE_BESIDE_HEAD = "params/", "params/layers_0/"  # prefixes in a 4DS file
MAE_ST_HEADS = {768: 12, 1024: 16, 1280: 16}  # by width; its files do not say
MAE_ST_DECODER_HEADS = {512: 16}
MAE_ST_OPTIONS = {  # name in its files -> type, our name
    "decoder_num_heads": (int, "decoder_heads"),
    "mask_ratio": (float, "mask_ratio"),
    "norm_pix_loss": (bool, "normalise_target"),
}
MAE_ST_MEAN, MAE_ST_STD = 0.45, 0.225  # of pixels in 0..1, its util/kinetics.py


@dataclass(frozen=True)
class TensorMap:
    """One of our tensors and the released arrays that hold its numbers.

    shape: of our tensor. arrays: shape by key of the released arrays. to_ours: arrays -> tensor. to_released: tensor ->
    arrays; None: this layout is only read.
    """

    shape: Shape
    arrays: Mapping[str, Shape]
    to_ours: Callable[..., np.ndarray]
    to_released: Callable[[np.ndarray], list[np.ndarray]] | None = None


WeightMap = dict[str, TensorMap]  # by the name of our tensor


def reshaped(key: str, released: Shape, ours: Shape | None = None) -> TensorMap:
    """Equal numbers in equal order. ours: default as released."""
    ours = ours or released
    return TensorMap(ours, {key: released}, lambda a: a.reshape(ours), lambda a: [a.reshape(released)])


def transposed(key: str, inputs: Shape, outputs: Shape) -> TensorMap:
    """A flax kernel `*inputs *outputs` as a torch weight `outputs inputs`."""
    rows, columns = math.prod(inputs), math.prod(outputs)
    return TensorMap(
        (columns, rows),
        {key: (*inputs, *outputs)},
        lambda a: a.reshape(rows, columns).T,
        lambda a: [a.T.reshape(*inputs, *outputs)],
    )


def concatenated(maps: list[TensorMap]) -> TensorMap:
    """Tensors of one shape, one after the other along the first axis."""
    return TensorMap(
        (len(maps) * maps[0].shape[0], *maps[0].shape[1:]),
        {key: shape for entry in maps for key, shape in entry.arrays.items()},
        lambda *arrays: np.concatenate([entry.to_ours(a) for entry, a in zip(maps, arrays, strict=True)]),
        lambda a: [b for entry, part in zip(maps, np.split(a, len(maps)), strict=True) for b in entry.to_released(part)],
    )


def flax_dense(name: str, key: str, inputs: Shape, outputs: Shape) -> WeightMap:
    """A flax layer `*inputs -> *outputs` (Dense, DenseGeneral, or a convolution of whole patches) as a torch Linear."""
    bias = reshaped(f"{key}/bias", outputs, (math.prod(outputs),))
    return {f"{name}.weight": transposed(f"{key}/kernel", inputs, outputs), f"{name}.bias": bias}


def flax_norm(name: str, key: str, width: int) -> WeightMap:
    """A flax LayerNorm."""
    return {f"{name}.weight": reshaped(f"{key}/scale", (width,)), f"{name}.bias": reshaped(f"{key}/bias", (width,))}


def flax_attention(name: str, out: str, key: str, width: int, heads: int, parts: str = "qkv") -> WeightMap:
    """Flax projections of queries, keys and values as one Linear `name`, or some of them, and their output `out`."""
    shape, names = (heads, width // heads), {"q": "query", "k": "key", "v": "value"}
    layers = [flax_dense(name, f"{key}/{names[part]}", (width,), shape) for part in parts]
    weights = {tensor: concatenated([layer[tensor] for layer in layers]) for tensor in layers[0]}
    return weights | (flax_dense(out, f"{key}/out", shape, (width,)) if out else {})


def flax_mlp(name: str, key: str, width: int, mlp: int) -> WeightMap:
    """The norm and the two layers of a block's mlp."""
    weights = flax_norm(f"{name}.mlp_norm", f"{key}/mlp_norm", width)
    weights |= flax_dense(f"{name}.mlp_in", f"{key}/mlp/dense_in", (width,), (mlp,))
    return weights | flax_dense(f"{name}.mlp_out", f"{key}/mlp/dense_out", (mlp,), (width,))


def flax_block(name: str, key: str, width: int, heads: int, mlp: int) -> WeightMap:
    """A pre-norm block of 4DS and its kin."""
    weights = flax_norm(f"{name}.attention_norm", f"{key}/attention_norm", width)
    weights |= flax_attention(f"{name}.qkv", f"{name}.out", f"{key}/attention", width, heads)
    return weights | flax_mlp(name, key, width, mlp)


def torch_layer(name: str, key: str, width: int, inputs: int | None = None) -> WeightMap:
    """A torch Linear `inputs -> width`, or a LayerNorm without `inputs`."""
    weight = (width,) if inputs is None else (width, inputs)
    return {f"{name}.weight": reshaped(f"{key}.weight", weight), f"{name}.bias": reshaped(f"{key}.bias", (width,))}


def torch_patches(name: str, key: str, width: int, patch: Shape) -> WeightMap:
    """A torch convolution of whole patches `pt ph pw`, as a Linear."""
    convolution = TensorMap(  # D C pt ph pw -> D P
        (width, math.prod(patch) * 3),
        {f"{key}.weight": (width, 3, *patch)},
        lambda a: a.transpose(0, 2, 3, 4, 1).reshape(width, -1),
    )
    return {f"{name}.weight": convolution, f"{name}.bias": reshaped(f"{key}.bias", (width,))}


def shape_of(shapes: Mapping[str, Shape], key: str, axes: int, source: object) -> Shape:
    """Shape of a released array. Raises UserError: it is missing or has another number of axes."""
    if len(shapes.get(key, ())) != axes:
        state = f"{key} is {shapes[key]}" if key in shapes else f"lacks {key}"
        raise UserError(f"{source}: {state}; needed an array of {axes} axes, as the released files have it")
    return shapes[key]


def check_shapes(shapes: Mapping[str, Shape], files: Mapping[str, WeightMap], source: object) -> None:
    """Raises UserError: a released array is missing, superfluous, or has another shape."""
    needed = {key: shape for weights in files.values() for entry in weights.values() for key, shape in entry.arrays.items()}
    for key, shape in needed.items():
        if key not in shapes:
            raise UserError(f"{source} lacks {key}; needed an array {shape}")
        if shapes[key] != shape:
            raise UserError(f"{source}: {key} is {shapes[key]}; needed {shape}")
    for key in shapes:
        if key not in needed:
            raise UserError(f"{source} has {key} {shapes[key]}, which this model does not have")


def count_blocks(shapes: Mapping[str, Shape], prefix: str) -> int:
    return len({re.split("[/.]", key.removeprefix(prefix))[0] for key in shapes if key.startswith(prefix)})


# ---- 4DS ----


def four_ds_prefix(shapes: Mapping[str, Shape]) -> str:
    """Prefix of the backbone's arrays, which depends on whether a readout is beside it."""
    nested = any(key.startswith(f"{BACKBONE_BESIDE_HEAD}encoder/") for key in shapes)
    return BACKBONE_BESIDE_HEAD if nested else BACKBONE


def four_ds_config(shapes: Mapping[str, Shape], source: object, prefix: str) -> BackboneConfig:
    """Config of the `Backbone` whose arrays lie below `prefix`, read off their shapes.

    Raises UserError: an array is missing or has another number of axes, or the sizes do not fit together.
    """
    *patch, channels, width = shape_of(shapes, prefix + PATCH_KERNEL, 5, source)
    *grid, _ = shape_of(shapes, prefix + POSITIONS, 4, source)
    _, heads, head_width = shape_of(shapes, f"{prefix}processor/layers_0/attention/query/kernel", 3, source)
    _, mlp = shape_of(shapes, f"{prefix}processor/layers_0/mlp/dense_in/kernel", 2, source)
    if channels != 3 or heads * head_width != width:
        given = f"{channels} channels, width {width}, {heads} heads of {head_width}"
        raise UserError(f"{source}: {given}; needed 3 channels, and heads that fill the width")
    return BackboneConfig(
        clip=tuple(g * p for g, p in zip(grid, patch, strict=True)),
        patch=tuple(patch),
        pixel_mean=0.0,
        pixel_scale=1.0,
        width=width,
        depth=count_blocks(shapes, f"{prefix}processor/layers_"),
        heads=heads,
        mlp=mlp,
    )


def four_ds_weight_map(config: BackboneConfig, prefix: str) -> WeightMap:
    """Every tensor of the `Backbone`."""
    width, mlp, patch, grid = config.width, config.mlp, config.patch, grid_of(config.clip, config.patch)
    weights = {"positions": reshaped(prefix + POSITIONS, (*grid, width), (math.prod(grid), width))}
    weights |= flax_dense("patch_embedding", prefix + PATCH_KERNEL.removesuffix("/kernel"), (*patch, 3), (width,))
    for i in range(config.depth):
        weights |= flax_block(f"blocks.{i}", f"{prefix}processor/layers_{i}", width, config.heads, mlp)
    return weights


# ---- MAE-ST ----


@dataclass(frozen=True)
class MAESTOptions:
    """Settings of a MAE-ST model that its tensors do not tell.

    heads, decoder_heads: None takes those of the official models of this width. frames: of a clip; used only where
    positions are one table for space and time. mask_ratio, normalise_target: of the pretraining.
    """

    heads: int | None = None
    decoder_heads: int | None = None
    frames: int = 16
    mask_ratio: float = 0.9
    normalise_target: bool = True


def read_torch(source: Path) -> Any:
    """What a file of torch holds. Executes nothing in the file.

    Raises UserError: a damaged file, or content that only unpickling could read.
    """
    check_expansion(source)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the official code saves its options as one
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{source} is no checkpoint of torch, or holds more than tensors: refused, since only unpickling could read it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{source} is not a checkpoint of torch, or is damaged: {reason}") from error


def state_dict(content: Any, source: object, sections: Sequence[str], dtypes: Sequence[torch.dtype]) -> dict[str, Tensor]:
    """The tensors of a file's content, below the first of `sections` that it has, or at the top.

    Raises UserError: no state dict, or tensors that are not dense or not of `dtypes`.
    """
    if isinstance(content, dict):
        content = next((content[name] for name in sections if name in content), content)
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        places = " or ".join(f"below {name!r}" for name in sections)
        raise UserError(f"{source} has no state dict; needed one at the top, {places}")
    state = {str(key): value.detach() for key, value in content.items()}
    for key, value in state.items():
        if value.dtype not in dtypes or value.layout != torch.strided:
            needed = " or ".join(map(str, dtypes))
            raise UserError(f"{source}: {key} is {value.dtype} ({value.layout}); needed dense {needed}")
        if value.untyped_storage().nbytes() < value.itemsize * value.numel() or not value.numel():
            raise UserError(f"{source}: {key} has {value.untyped_storage().nbytes()} bytes; needed those of {tuple(value.shape)}")
    return state


def mae_st_state(content: Any, source: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The float32 tensors of an official `.pth`'s content, and the MAESTOptions saved with them.

    Raises UserError: no state dict of dense float32 tensors.
    """
    state = state_dict(content, source, ("model", "model_state"), (torch.float32,))
    state = {key.replace("head.projection.", "head."): value for key, value in state.items()}  # PySlowFast's name
    saved = content.get("args")
    saved = vars(saved) if isinstance(saved, argparse.Namespace) else {}
    return state, {ours: saved[name] for name, (kind, ours) in MAE_ST_OPTIONS.items() if isinstance(saved.get(name), kind)}


def mae_st_config(shapes: Mapping[str, Shape], source: object, options: MAESTOptions) -> MAESTConfig | MAESTEncoderConfig:
    """Config of the `MAEST` of an official state dict, or of its `MAESTEncoder` where there is no decoder.

    Raises UserError: a tensor is missing, the heads of this width are not known, or frames do not fit.
    """

    def checked_heads(heads: int | None, width: int, official: Mapping[int, int], option: str) -> int:
        if heads is None and width not in official:
            raise UserError(f"{source}: width {width} is none of mae_st's own ({', '.join(map(str, official))}); give {option}")
        heads = official[width] if heads is None else heads
        if heads < 1 or width % heads:
            raise UserError(f"{source}: width {width} does not divide into {heads} heads; correct {option}")
        return heads

    width, channels, *patch = shape_of(shapes, "patch_embed.proj.weight", 5, source)
    if channels != 3:
        raise UserError(f"{source}: patch_embed.proj.weight takes {channels} channels; needed 3")
    class_token, separable = "cls_token" in shapes, "pos_embed_temporal" in shapes
    if separable:
        places, t = (shape_of(shapes, f"pos_embed_{name}", 3, source)[1] for name in ("spatial", "temporal"))
    else:
        tokens, t = shape_of(shapes, "pos_embed", 3, source)[1] - class_token, max(options.frames // patch[0], 1)
        places = tokens // t if tokens % t == 0 else 0
    side = math.isqrt(places)
    if side * side != places or not places:
        raise UserError(f"{source}: positions of {options.frames} frames are not those of square clips; correct --frames")
    encoder = MAESTEncoderConfig(
        clip=(t * patch[0], side * patch[1], side * patch[2]),
        patch=tuple(patch),
        pixel_mean=MAE_ST_MEAN,
        pixel_scale=1 / MAE_ST_STD,
        width=width,
        depth=count_blocks(shapes, "blocks."),
        heads=checked_heads(options.heads, width, MAE_ST_HEADS, "--heads"),
        mlp=shape_of(shapes, "blocks.0.mlp.fc1.weight", 2, source)[0],
        separable_positions=separable,
        class_token=class_token,
    )
    if "decoder_embed.weight" not in shapes:
        return encoder
    decoder_width = shape_of(shapes, "decoder_embed.weight", 2, source)[0]
    frames_per_token = shape_of(shapes, "decoder_pred.weight", 2, source)[0] // (3 * patch[1] * patch[2])
    return MAESTConfig(
        **asdict(encoder),
        masking="random",
        mask_ratio=options.mask_ratio,
        position_init="normal",
        branch_init="released",
        decoder_width=decoder_width,
        decoder_depth=count_blocks(shapes, "decoder_blocks."),
        decoder_heads=checked_heads(options.decoder_heads, decoder_width, MAE_ST_DECODER_HEADS, "--decoder-heads"),
        predicted_frames=frames_per_token * t,
        normalise_target=options.normalise_target,
    )


def mae_st_weight_map(config: MAESTConfig | MAESTEncoderConfig) -> WeightMap:
    """Every tensor of the `MAEST`, or of the `MAESTEncoder`."""
    if not isinstance(config, MAESTConfig):
        return _mae_st_encoder(config)
    width, (pt, ph, pw) = config.decoder_width, config.patch
    predicted = pt * config.predicted_frames // config.clip[0] * ph * pw * 3  # values per token
    weights = {f"encoder.{name}": entry for name, entry in _mae_st_encoder(config).items()}
    weights |= {"mask_token": reshaped("mask_token", (1, 1, width), (1, width))}
    weights |= torch_layer("decoder_embedding", "decoder_embed", width, config.width)
    weights |= torch_layer("decoder_norm", "decoder_norm", width) | torch_layer("decoder", "decoder_pred", predicted, width)
    if config.class_token:
        weights["decoder_class_token"] = reshaped("decoder_cls_token", (1, 1, width), (1, width))
    weights |= _mae_st_positions(config, "decoder_positions", "decoder_pos_embed", width)
    return weights | _mae_st_blocks("decoder_blocks", config.decoder_depth, width, 4 * width)


def _mae_st_encoder(config: MAESTEncoderConfig) -> WeightMap:
    width = config.width
    weights = torch_patches("patch_embedding", "patch_embed.proj", width, config.patch) | torch_layer("norm", "norm", width)
    if config.class_token:
        weights["class_token"] = reshaped("cls_token", (1, 1, width), (1, width))
    weights |= _mae_st_positions(config, "positions", "pos_embed", width)
    return weights | _mae_st_blocks("blocks", config.depth, width, config.mlp)


def _mae_st_positions(config: MAESTEncoderConfig, name: str, key: str, width: int) -> WeightMap:
    t, h, w = grid_of(config.clip, config.patch)
    if config.separable_positions:
        weights = {
            f"{name}.temporal": reshaped(f"{key}_temporal", (1, t, width), (t, width)),
            f"{name}.spatial": reshaped(f"{key}_spatial", (1, h * w, width), (h * w, width)),
        }
        if config.class_token:
            weights[f"{name}.class_token"] = reshaped(f"{key}_class", (1, 1, width), (1, width))
        return weights
    prefix = int(config.class_token)  # the class token's position is the first row of the table
    table = {key: (1, prefix + t * h * w, width)}
    weights = {f"{name}.pos_embed": TensorMap((t * h * w, width), table, lambda a: a[0, prefix:])}
    if prefix:
        weights[f"{name}.class_token"] = TensorMap((1, width), table, lambda a: a[0, :1])
    return weights


def _mae_st_blocks(name: str, depth: int, width: int, mlp: int) -> WeightMap:
    """Blocks have the same name on both sides."""
    weights: WeightMap = {}
    for i in range(depth):
        block = f"{name}.{i}"
        qkv = [torch_layer("qkv", f"{block}.attn.{letter}", width, width) for letter in "qkv"]
        layers = torch_layer("attention_norm", f"{block}.norm1", width)
        layers |= {kind: concatenated([one[kind] for one in qkv]) for kind in ("qkv.weight", "qkv.bias")}
        layers |= torch_layer("out", f"{block}.attn.proj", width, width) | torch_layer("mlp_norm", f"{block}.norm2", width)
        layers |= torch_layer("mlp_in", f"{block}.mlp.fc1", mlp, width) | torch_layer("mlp_out", f"{block}.mlp.fc2", width, mlp)
        for kind in ("weight", "bias"):
            weights |= {f"{block}.{layer}": one for layer, one in layers.items() if layer.endswith(kind)}
    return weights
