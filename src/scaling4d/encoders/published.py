"""RELEASED FILE OR FOLDER -> ENCODER: 4DS, RVM, MAE-ST, VideoMAE v2, V-JEPA 1 and 2.1, and the models of transformers.

A file is recognised by the names of its tensors. No code in it or beside it is executed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaling4d.checkpoint import WEIGHTS as CHECKPOINT_WEIGHTS
from scaling4d.checkpoint import load_tensors
from scaling4d.encoders import released, transformers
from scaling4d.encoders.arrays import Npz, Shape
from scaling4d.encoders.released import (
    TensorMap,
    WeightMap,
    concatenated,
    flax_attention,
    flax_block,
    flax_dense,
    flax_norm,
    reshaped,
    shape_of,
    torch_layer,
    torch_patches,
    transposed,
)
from scaling4d.encoders.transformers import CONFIG, PREPROCESSORS, PretrainedEncoder
from scaling4d.encoders.transformers import WEIGHTS as SAFETENSORS
from scaling4d.mae.encoder import Backbone
from scaling4d.mae.mae_st import MAESTEncoder, MAESTEncoderConfig
from scaling4d.mae.patches import grid_of
from scaling4d.mae.rvm import RVM, RVMConfig, frame_positions
from scaling4d.mae.vit import VJEPA, VJEPA21, VideoMAE2, VideoViT, VideoViTConfig, sinusoid, vjepa_positions
from scaling4d.records import UserError, as_user_error, read_json_object

MODELS: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (PretrainedEncoder, VideoMAE2, VJEPA, VJEPA21, RVM)}
NPZ, TORCH = (".npz",), (".pth", ".pt", ".tar")  # ends of files' names
SECTIONS = ("ema_encoder", "target_encoder", "model", "model_state", "module")  # V-JEPA evaluates its target encoder
HALVES = (torch.float32, torch.float16, torch.bfloat16)  # DeepSpeed, with which VideoMAE v2 was trained, saves halves
PATCHES = "patch_embed.proj.weight"  # D C pt ph pw
VIDEOMAE2 = "VideoMAEv2"  # start of config.json's model_type
VIT_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # by width; files do not say
VJEPA21_HEADS = {768: 12, 1024: 16, 1408: 22, 1664: 26}  # likewise, of V-JEPA 2.1
VIT_UNUSED = ("norm.", "fc_norm.", "head.")  # after the last block
VJEPA21_UNUSED = ("norms_block.", "patch_embed_img.", "img_mod_embed")  # norms of four layers' outputs; of images
VIDEO_EMBEDDING = "video_mod_embed"  # 1 1 D
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # all codes; pixels in 0..1
FRAMES, SIDE_PX = 16, 224  # of the released VideoMAE v2; V-JEPA has as many frames
VJEPA21_CLIP = (64, 384, 384)  # as its hub builds the released encoders
RVM_PATCHES = "tokenizer/patch_embedding/Conv_0/kernel"  # 1 ph pw 3 D
RVM_CLIP = (16, 256, 256)  # side as released; RVM takes any number of frames, so that of frames is ours


@dataclass(frozen=True)
class Layout:
    """Tensors of one encoder in a file. weights: which array holds which tensor. read: one array, float32."""

    model: type[nn.Module]
    config: Any
    weights: WeightMap
    shapes: Mapping[str, Shape]
    read: Callable[[str], np.ndarray]


def import_published(source: Path, clip: tuple[int, int, int] | None = None) -> tuple[Any, nn.Module]:
    """The encoder of a released file or of a folder in Hugging Face's layout, with float32 weights, and its config.

    clip: T H W that it is shown; default: its own.
    Raises UserError: a damaged file, another model, tensors that do not fit together, a clip that does not suit it.
    """
    if source.is_dir() and not _is_videomae2(source):
        return transformers.import_encoder(source, clip or transformers.default_clip(source))
    if not source.is_dir() and source.suffix not in NPZ + TORCH:
        files = "a .npz of 4DS or RVM, a .pth of MAE-ST or VideoMAE v2, a .pth.tar of V-JEPA or a .pt of V-JEPA 2.1"
        raise UserError(f"{source} is a file; needed a folder with {CONFIG} and {CHECKPOINT_WEIGHTS}, {files}")
    with as_user_error(source):
        layout = _of_folder(source) if source.is_dir() else _of_npz(source) if source.suffix in NPZ else _of_torch(source)
        with torch.device("meta"):
            model = layout.model(layout.config)
    tensors = {name: entry.to_ours(*map(layout.read, entry.arrays)) for name, entry in layout.weights.items()}
    model.load_state_dict(
        {name: torch.from_numpy(np.require(a, requirements=("C", "W"))) for name, a in tensors.items()}, assign=True
    )
    if clip is None or tuple(clip) == model.clip:
        return layout.config, model
    model.resize(clip)
    return replace(layout.config, clip=tuple(clip)), model


def _is_videomae2(folder: Path) -> bool:
    path = folder / CONFIG
    with as_user_error(f"{path} is damaged"):
        return path.is_file() and str(read_json_object(path).get("model_type")).startswith(VIDEOMAE2)


def _of_npz(source: Path) -> Layout:
    arrays = Npz(source)
    if RVM_PATCHES in arrays.shapes:
        config = rvm_config(arrays.shapes, source)
        return _only_needed(Layout(RVM, config, rvm_weight_map(config), arrays.shapes, arrays.read), source)
    prefix = released.four_ds_prefix(arrays.shapes)
    config = released.four_ds_config(arrays.shapes, source, prefix)
    weights = released.four_ds_weight_map(config, prefix)
    return _only_needed(Layout(Backbone, config, weights, arrays.shapes, arrays.read), source)


def _of_torch(source: Path) -> Layout:
    content = released.read_torch(source)
    state = released.state_dict(content, source, SECTIONS, HALVES)
    if any(key.endswith("attn.qkv.weight") for key in state):
        return _vit(state, source)
    state, options = released.mae_st_state(content, source)
    shapes = _shapes(state)
    method = released.mae_st_config(shapes, source, replace(released.MAESTOptions(), **options))
    config = MAESTEncoderConfig(**{field.name: getattr(method, field.name) for field in fields(MAESTEncoderConfig)})
    weights = released.mae_st_weight_map(config)
    return _only_needed(Layout(MAESTEncoder, config, weights, shapes, lambda key: state[key].numpy()), source)


def _of_folder(source: Path) -> Layout:
    """OpenGVLab's VideoMAE v2 on the hub: safetensors, and a config.json of its own."""
    files = sorted(source.glob(SAFETENSORS))
    if not files:
        raise UserError(f"{source} has no {SAFETENSORS}; needed the encoder's weights")
    state = {key: value for path in files for key, value in load_tensors(path).items()}
    shape, path = read_json_object(source / CONFIG).get("model_config"), source / PREPROCESSORS[0]
    if not isinstance(shape, dict) or not {"num_heads", "num_frames", "img_size"} <= shape.keys():
        raise UserError(f"{source / CONFIG} has no model_config with num_heads, num_frames and img_size; needed VideoMAE v2's")
    seen = read_json_object(path) if path.is_file() else {}
    return _vit(
        released.state_dict(state, source, (), HALVES),
        source,
        heads=shape["num_heads"],
        frames=shape["num_frames"],
        side_px=shape["img_size"],
        mean=tuple(seen.get("image_mean", IMAGENET_MEAN)),
        std=tuple(seen.get("image_std", IMAGENET_STD)),
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _only_needed(layout: Layout, source: Path) -> Layout:
    """The same without arrays beside the encoder. Raises UserError: one of the encoder is missing, or differs."""
    needed = {key for entry in layout.weights.values() for key in entry.arrays}
    layout = replace(layout, shapes={key: shape for key, shape in layout.shapes.items() if key in needed})
    released.check_shapes(layout.shapes, {source.name: layout.weights}, source)
    return layout


# ---- VideoMAE v2, V-JEPA and V-JEPA 2.1 ----


def _vit(
    state: Mapping[str, Tensor],
    source: Path,
    *,
    heads: int | None = None,
    frames: int = FRAMES,
    side_px: int = SIDE_PX,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Layout:
    """The encoder in a state dict, below any prefix, whatever lies beside it.

    heads: default: those of the official models of this width. frames, side_px: of VideoMAE v2; V-JEPA has the same
    frames and its file tells the side; V-JEPA 2.1 has VJEPA21_CLIP.
    """
    places = [key for key in state if key.endswith(PATCHES)]
    if len(places) != 1:
        raise UserError(f"{source} has {len(places)} tensors {PATCHES}; needed that of one encoder")
    prefix = places[0].removesuffix(PATCHES)
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    shapes = {key: shape for key, shape in _shapes(state).items() if not key.startswith(VIT_UNUSED + VJEPA21_UNUSED)}
    width, channels, *patch = shape_of(shapes, PATCHES, 5, source)
    if channels != 3:
        raise UserError(f"{source}: {PATCHES} takes {channels} channels; needed 3")
    kinds: dict[str, type[VideoViT]] = {"pos_embed": VJEPA, VIDEO_EMBEDDING: VJEPA21, "blocks.0.attn.q_bias": VideoMAE2}
    model = next((kind for key, kind in kinds.items() if key in shapes), None)
    if model is None:
        needed = f"VideoMAE v2's blocks.0.attn.q_bias, V-JEPA's pos_embed nor V-JEPA 2.1's {VIDEO_EMBEDDING}"
        raise UserError(f"{source} has neither {needed}; needed one of them")
    official = VJEPA21_HEADS if model is VJEPA21 else VIT_HEADS
    if heads is None and width not in official:
        raise UserError(f"{source}: width {width} is none of the official ones ({', '.join(map(str, official))})")
    clip = (frames, side_px, side_px)
    if model is VJEPA:
        tokens, t = shape_of(shapes, "pos_embed", 3, source)[1], frames // patch[0]
        clip = (frames, *2 * (math.isqrt(tokens // t) * patch[1],))
    elif model is VJEPA21:
        clip = VJEPA21_CLIP
    config = VideoViTConfig(
        clip=clip,
        patch=tuple(patch),
        width=width,
        depth=released.count_blocks(shapes, "blocks."),
        heads=heads or official[width],
        mlp=shape_of(shapes, "blocks.0.mlp.fc1.weight", 2, source)[0],
        mean=mean,
        std=std,
    )
    weights = vit_weight_map(config, model)
    released.check_shapes(shapes, {source.name: weights}, source)
    if model is VJEPA:  # files of V-JEPA 2 also have such a table, which it does not use
        table = vjepa_positions(grid_of(config.clip, config.patch), width)
        if not torch.allclose(state["pos_embed"][0].float(), table, atol=1e-3):
            other = "V-JEPA 2 is in transformers' layout on the hub, facebook/vjepa2-vitl-fpc64-256"
            raise UserError(f"{source}: pos_embed is not V-JEPA's for {frames} frames of {clip[1]} px; {other}")
    return Layout(model, config, weights, shapes, lambda key: state[key].float().numpy())


def vit_weight_map(config: VideoViTConfig, model: type[VideoViT]) -> WeightMap:
    """Every tensor of a `VideoMAE2`, a `VJEPA` or a `VJEPA21`."""
    width, tokens = config.width, math.prod(grid_of(config.clip, config.patch))
    weights = torch_patches("patch_embedding", PATCHES.removesuffix(".weight"), width, config.patch)
    if model is VJEPA:
        weights["positions"] = reshaped("pos_embed", (1, tokens, width), (tokens, width))
    elif model is VJEPA21:
        biases = {"patch_embed.proj.bias": (width,), VIDEO_EMBEDDING: (1, 1, width)}
        weights["patch_embedding.bias"] = TensorMap((width,), biases, lambda bias, video: bias + video.reshape(-1))
    else:  # in no file
        weights["positions"] = TensorMap((tokens, width), {}, lambda: sinusoid(tokens, width).numpy())
    for i in range(config.depth):
        block = f"blocks.{i}"
        weights |= torch_layer(f"{block}.attention_norm", f"{block}.norm1", width)
        weights |= torch_layer(f"{block}.qkv", f"{block}.attn.qkv", 3 * width, width)
        if model is VideoMAE2:  # keys have no bias
            biases = {f"{block}.attn.{letter}_bias": (width,) for letter in "qv"}
            weights[f"{block}.qkv.bias"] = TensorMap((3 * width,), biases, lambda q, v: np.concatenate([q, np.zeros_like(q), v]))
        weights |= torch_layer(f"{block}.out", f"{block}.attn.proj", width, width)
        weights |= torch_layer(f"{block}.mlp_norm", f"{block}.norm2", width)
        weights |= torch_layer(f"{block}.mlp_in", f"{block}.mlp.fc1", config.mlp, width)
        weights |= torch_layer(f"{block}.mlp_out", f"{block}.mlp.fc2", width, config.mlp)
    return weights


# ---- RVM ----


def rvm_config(shapes: Mapping[str, Shape], source: Path) -> RVMConfig:
    """Config of a released RVM, read off its shapes.

    Raises UserError: an array is missing or has another number of axes, or the sizes do not fit together.
    """
    frame, core = "encoder/layers_", "rnn_core/transformer/xa_blocks_"
    *patch, channels, width = shape_of(shapes, RVM_PATCHES, 5, source)
    _, heads, head_width = shape_of(shapes, f"{frame}0/attention/query/kernel", 3, source)
    _, core_heads, core_head_width = shape_of(shapes, f"{core}0/attention/query/kernel", 3, source)
    if (patch[0], channels) != (1, 3) or {heads * head_width, core_heads * core_head_width} != {width}:
        given = (
            f"patches of {patch[0]} frames, {channels} channels, heads {heads} x {head_width}, {core_heads} x {core_head_width}"
        )
        raise UserError(f"{source}: {given}; needed 1 frame, 3 channels, and heads that fill the width {width}")
    return RVMConfig(
        clip=RVM_CLIP,
        patch=tuple(patch),
        width=width,
        depth=released.count_blocks(shapes, frame),
        heads=heads,
        mlp=shape_of(shapes, f"{frame}0/mlp/dense_in/kernel", 2, source)[1],
        core_depth=released.count_blocks(shapes, core),
        core_heads=core_heads,
        core_mlp=shape_of(shapes, f"{core}0/mlp/dense_in/kernel", 2, source)[1],
    )


def rvm_weight_map(config: RVMConfig) -> WeightMap:
    """Every tensor of an `RVM`."""
    width, grid = config.width, grid_of(config.clip, config.patch)
    weights = flax_dense("patch_embedding", RVM_PATCHES.removesuffix("/kernel"), (*config.patch, 3), (width,))
    weights["positions"] = TensorMap((math.prod(grid[1:]), width), {}, lambda: frame_positions(grid, width).numpy())
    weights |= {"class_token": reshaped("cls_token", (1, width))} | flax_norm("norm", "encoder/LayerNorm_0", width)
    for i in range(config.depth):
        weights |= flax_block(f"frame_blocks.{i}", f"encoder/layers_{i}", width, config.heads, config.mlp)
    for side in ("input", "state"):
        gates = [transposed(f"rnn_core/{side}_{gate}/kernel", (width,), (width,)) for gate in ("update", "reset")]
        weights[f"{side}_gates.weight"] = concatenated(gates)
    weights["state_norm.weight"] = reshaped("rnn_core/state_layer_norm/scale", (width,))
    weights |= flax_norm("core_norm", "rnn_core/transformer/output_norm", width)
    for i in range(config.core_depth):
        ours, key, heads = f"core_blocks.{i}", f"rnn_core/transformer/xa_blocks_{i}", config.core_heads
        weights |= flax_block(ours, key, width, heads, config.core_mlp)
        weights |= flax_norm(f"{ours}.cross_norm", f"{key}/ca_attention_norm", width)
        weights |= flax_attention(f"{ours}.q", f"{ours}.cross_out", f"{key}/ca_attention", width, heads, parts="q")
        weights |= flax_attention(f"{ours}.kv", "", f"{key}/ca_attention", width, heads, parts="kv")
    return weights
