"""Published weights <-> Checkpoint folders: 4DS's `.npz` (backbone, or backbone and readout) both ways, MAE-ST's `.pth` in.

A folder of ours holds the encoder as any Checkpoint does, and where the file has a readout, `readout.safetensors` and
`readout.json`. Arrays of 4DS are streamed: a file of 14 GB needs the memory of a few of its tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaling4d import artifacts, checkpoint
from scaling4d.checkpoint import WEIGHTS, Checkpoint
from scaling4d.encoders.arrays import Npz, Shape, new, open_safetensors, write_npz, write_safetensors
from scaling4d.encoders.features import layer_index
from scaling4d.encoders.released import (
    Part,
    check,
    four_ds,
    four_ds_settings,
    mae_st,
    mae_st_encoder,
    mae_st_settings,
    same,
    turned,
)
from scaling4d.mae.patches import unpatchify
from scaling4d.readout.classifier import Classes, last_tokens
from scaling4d.readout.heads import AttentionReadout, Head
from scaling4d.records import UserError, write_json

READOUT_WEIGHTS, READOUT = "readout.safetensors", "readout.json"
BACKBONE = ("params/layers_0/", "params/")  # below which a released 4DS file has its backbone
HEAD = "params/layers_2/"
DEPTH_FRACTION = 0.95  # of the released readouts
DEPTH_PATCH = (2, 8, 8)  # of the released depth readout
TILES = "temporal_tile_posenc/embeddings"
FOURIER_BASES = 16  # of the released tracking readouts


@dataclass(frozen=True)
class Readout:
    """What `readout.json` says. kind: of KINDS. settings: of its module. depth_fraction: where in the encoder it reads."""

    kind: str
    settings: Mapping[str, Any]
    depth_fraction: float


KINDS: dict[str, type[nn.Module]] = {
    "depth": AttentionReadout,  # of the whole clip
    "attention": AttentionReadout,  # of learned queries, whatever they mean
    "tracking": Head,  # of given points or boxes
    "classes": Classes,
}


# ---------------------------------------------------------------- 4DS


def from_4ds(source: Path, out: Path) -> Path:
    """A released `.npz` as a Checkpoint folder.

    Raises:
        UserError: `out` exists, a damaged file, an object array, a key or a shape that such a model does not have; nothing is
            written.
    """
    arrays = Npz(source)
    prefix = next((p for p in BACKBONE if any(key.startswith(f"{p}encoder/") for key in arrays.shapes)), BACKBONE[1])
    settings = four_ds_settings(arrays.shapes, source, prefix)
    backbone, head, readout = four_ds(settings, prefix), {}, None
    if any(key.startswith(HEAD) for key in arrays.shapes):
        readout = four_ds_readout(arrays.shapes, source, settings)
        head = readout_parts(readout)
    check(arrays.shapes, backbone | {f"readout.{name}": part for name, part in head.items()}, source)
    with new(out) as folder:
        folder.mkdir()
        for name, parts in ((WEIGHTS, backbone), (READOUT_WEIGHTS, head)):
            if parts:
                made = (part.ours(*(arrays.read(key) for key in part.sources)) for part in parts.values())
                write_safetensors(folder / name, {key: part.shape for key, part in parts.items()}, made)
        _describe(folder, out.name, "Encoder", settings, backbone, readout, source)
    return out


def to_4ds(folder: Path, out: Path) -> Path:
    """A Checkpoint folder with an `Encoder` (of 4DS's kind: no shifted pixels) as a released `.npz`.

    Raises:
        UserError: another model, or `out` exists.
    """
    saved = Checkpoint.read(folder)
    settings = dict(saved.settings) | {"gelu": saved.settings.get("gelu", "tanh")}
    nested = saved.model == "SimpleMAE"
    if saved.model not in ("Encoder", "SimpleMAE"):
        raise UserError(f"{folder} holds a {saved.model}; the released 4DS layout takes an Encoder, or the one in a SimpleMAE")
    if (settings["gelu"], settings["pixel_mean"], settings["pixel_scale"]) != ("tanh", 0.0, 1.0):
        raise UserError(
            f"{folder} takes pixels as (x - {settings['pixel_mean']}) * {settings['pixel_scale']} and gelu {settings['gelu']!r}; "
            "the released 4DS layout says neither and means 0, 1 and 'tanh'"
        )
    readout = read_readout(folder)
    backbone = four_ds(settings, BACKBONE[0] if readout else BACKBONE[1])
    head = readout_parts(readout) if readout else {}
    with new(out) as partial, open_safetensors(folder / WEIGHTS) as weights:
        chosen = {f"encoder.{name}" if nested else name: part for name, part in backbone.items()}
        if not head:
            write_npz(partial, _released(chosen, weights))
        else:
            with open_safetensors(folder / READOUT_WEIGHTS) as more:
                write_npz(partial, chain(_released(chosen, weights), _released(head, more)))
    return out


def _released(parts: Mapping[str, Part], weights: Mapping[str, np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    there = set(weights)
    for name, part in parts.items():
        array = weights[name] if name in there else None
        if array is None or array.shape != part.shape:
            raise UserError(f"{name} is missing or not {part.shape}, as config.json says; the folder's files do not fit together")
        yield from zip(part.sources, part.theirs(array), strict=True)


def four_ds_readout(found: Mapping[str, Shape], source: Path, encoder: Mapping[str, Any]) -> Readout:
    """The readout below HEAD, by the shapes of its arrays.

    Raises:
        UserError: arrays that say so are missing or of another number of axes.
    """

    def shape(key: str, axes: int) -> Shape:
        if len(found.get(HEAD + key, ())) != axes:
            raise UserError(f"{source} lacks {HEAD}{key}, or it has not {axes} axes; needed a readout of the released kind")
        return found[HEAD + key]

    tracking = f"{HEAD}query_initializer/layers_1/Dense_0/kernel" in found
    inner = "attention_readout/" if tracking else ""
    features_width, heads, d = shape(f"{inner}key_embedding/kernel", 3)
    frames = shape(times, 3)[0] if HEAD + (times := f"{inner}temporal_posenc/embeddings") in found else encoder["clip"][0]
    settings = {"features_width": features_width, "frames": frames, "width": heads * d, "heads": heads}
    if tracking:
        embedded, query_width = shape("query_initializer/layers_1/Dense_0/kernel", 2)
        settings |= {
            "learned": 0,
            "out": shape("attention_readout/Dense_2/kernel", 2)[1],
            "coordinates": embedded // (2 * FOURIER_BASES),
            "tiles": shape(TILES, 2)[0] if HEAD + TILES in found else 1,
            "fourier_bases": FOURIER_BASES,
            "query_width": query_width,
            "query_std": 0.02,
            "time_init": "normal",
            "out_scale": 1.0,
            "sharpness": [],
        }
        return Readout("tracking", settings, DEPTH_FRACTION)
    plain, given = HEAD + "LayerNorm_0/scale" not in found, HEAD + "query" not in found
    last = f"Dense_{int(given) + int(not plain)}/kernel"  # after the queries' own Dense and the residual's
    queries, answers = 0 if given else shape("query", 3)[0], shape(last, 2)[1]
    settings |= {"queries": queries, "query_width": shape("Dense_0/kernel", 2)[0] if given else 0, "out": answers, "plain": plain}
    dense = not given and answers == math.prod(DEPTH_PATCH) and queries * answers == math.prod(encoder["clip"])
    return Readout("depth" if dense else "attention", settings, DEPTH_FRACTION)


def readout_parts(readout: Readout) -> dict[str, Part]:
    """Name -> Part for every tensor of a 4DS readout."""
    return (tracking_readout if readout.kind == "tracking" else attention_readout)(readout.settings, HEAD)


def attention_readout(settings: Mapping[str, Any], prefix: str) -> dict[str, Part]:
    """Name -> Part for every tensor of an `AttentionReadout`, with learned or given queries.

    With given queries flax counts one more Dense, the queries' own, before the others.
    """
    C, D, heads, plain = settings["features_width"], settings["width"], settings["heads"], settings.get("plain", False)
    d, given = D // heads, settings["queries"] == 0
    dense = [f"{prefix}Dense_{i}" for i in range(3)]
    *own, project, out = dense if given else dense[:2]
    if plain:
        *own, out = dense[:2] if given else dense[:1]
    split = lambda name: turned(f"{prefix}{name}_embedding/kernel", (C, heads, d), C)  # noqa: E731
    times = (settings["frames"], 1, C)
    parts = {"temporal_positions": same(f"{prefix}temporal_posenc/embeddings", times)}
    if plain:  # released without
        parts = {"temporal_positions": _zeros(times)}
    if given:
        parts |= _linear("query_in", own[0], settings["query_width"], D)
    else:
        parts["query"] = same(f"{prefix}query", (settings["queries"], heads, d), (settings["queries"], D))
    parts |= {"key.weight": split("key"), "value.weight": split("value")}
    if not plain:
        for name in ("key", "value"):
            parts[f"{name}.bias"] = same(f"{prefix}{name}_embedding/bias", (heads, d), (D,))
        parts |= _norm("features_norm", f"{prefix}LayerNorm_0", C) | _norm("mlp_norm", f"{prefix}LayerNorm_1", D)
        parts |= _linear("project", project, D, D)
        parts |= _linear("mlp_in", f"{prefix}MLP_0/Dense_0", D, 4 * D) | _linear("mlp_out", f"{prefix}MLP_0/Dense_1", 4 * D, D)
    return parts | _linear("out", out, D, settings["out"])


def tracking_readout(settings: Mapping[str, Any], prefix: str) -> dict[str, Part]:
    """Name -> Part for every tensor of a `Head` with given queries: its embedding of queries, its tiles, its readout."""
    asked = 2 * settings["fourier_bases"] * settings["coordinates"]
    width = settings["query_width"]
    parts = _linear("embed_mlp_in", f"{prefix}query_initializer/layers_1/Dense_0", asked, width)
    parts |= _linear("embed_mlp_out", f"{prefix}query_initializer/layers_1/Dense_1", width, width)
    tiles = (settings["tiles"], width)
    parts["tile_positions"] = same(prefix + TILES, tiles) if settings["tiles"] > 1 else _zeros(tiles)
    inner = {key: settings[key] for key in ("features_width", "frames", "width", "heads", "out", "query_width")} | {"queries": 0}
    return parts | {f"readout.{name}": part for name, part in attention_readout(inner, f"{prefix}attention_readout/").items()}


def _zeros(shape: Shape) -> Part:
    """A tensor that the released readout does without; in the file there is nothing."""
    return Part(shape, {}, lambda: np.zeros(shape, np.float32), lambda _: [])


def _linear(here: str, there: str, inputs: int, outputs: int) -> dict[str, Part]:
    return {
        f"{here}.weight": turned(f"{there}/kernel", (inputs, outputs), inputs),
        f"{here}.bias": same(f"{there}/bias", (outputs,)),
    }


def _norm(here: str, there: str, width: int) -> dict[str, Part]:
    return {f"{here}.weight": same(f"{there}/scale", (width,)), f"{here}.bias": same(f"{there}/bias", (width,))}


# ---------------------------------------------------------------- MAE-ST


def from_mae_st(
    source: Path,
    out: Path,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    frames: int = 16,
    mask_ratio: float = 0.9,
    normalise_target: bool = True,
) -> Path:
    """An official `.pth`, pretrained, fine-tuned or an encoder alone, as a Checkpoint folder.

    Args:
        heads ... normalise_target: what tensors do not tell, see mae_st_settings. Options that the official code saved along
          go before decoder_heads, mask_ratio and normalise_target.
    Raises:
        UserError: `out` exists, a file that is damaged, has something in it that only unpickling could read, or is no such
            model; nothing is written.
    """
    state, said = _state(source)
    found = {key: tuple(value.shape) for key, value in state.items()}
    settings = mae_st_settings(
        found,
        source,
        heads=heads,
        decoder_heads=said.get("decoder_num_heads", decoder_heads),
        frames=frames,
        mask_ratio=said.get("mask_ratio", mask_ratio),
        normalise_target=said.get("norm_pix_loss", normalise_target),
    )
    pretrained, head, readout = "decoder_width" in settings, {}, None
    parts = mae_st(settings) if pretrained else mae_st_encoder(settings)
    if not pretrained and len(found.get("head.weight", ())) == 2:
        classes, width = found["head.weight"]
        head = {
            "norm.weight": same("norm.weight", (width,)),
            "norm.bias": same("norm.bias", (width,)),
            "linear.weight": same("head.weight", (classes, width)),
            "linear.bias": same("head.bias", (classes,)),
        }
        readout = Readout("classes", {"width": width, "classes": classes, "dropout": 0.5}, 1.0)
    check(found, parts | {f"readout.{name}": part for name, part in head.items()}, source)
    with new(out) as folder:
        folder.mkdir()
        for name, chosen in ((WEIGHTS, parts), (READOUT_WEIGHTS, head)):
            if chosen:
                made = (part.ours(*(state[key].numpy() for key in part.sources)) for part in chosen.values())
                write_safetensors(folder / name, {key: part.shape for key, part in chosen.items()}, made)
        encoder = {name: part for name, part in parts.items() if not pretrained or name.startswith("encoder.")}
        _describe(folder, out.name, "MAEST" if pretrained else "MAESTEncoder", settings, encoder, readout, source)
    return out


def _state(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The float32 tensors of an official checkpoint and the options saved along, read without executing anything in it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the official code saves its options as one
            content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{source} is no checkpoint of torch, or holds more than tensors: refused, since only unpickling could read it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{source} is not a checkpoint of torch, or is damaged: {why}") from error
    said = content.get("args") if isinstance(content, dict) else None
    said = vars(said) if isinstance(said, argparse.Namespace) else {}
    if isinstance(content, dict):
        content = content.get("model_state", content.get("model", content))
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{source} has no state dict; needed one at the top, below 'model' or below 'model_state'")
    state = {
        str(key).replace("head.projection.", "head."): value.detach() for key, value in content.items()
    }  # as PySlowFast names it
    for key, value in state.items():
        if value.dtype != torch.float32 or value.layout != torch.strided:
            raise UserError(f"{source}: {key} is {value.dtype} ({value.layout}); needed dense torch.float32")
        if value.untyped_storage().nbytes() < 4 * value.numel() or not value.numel():
            raise UserError(f"{source}: {key} has {value.untyped_storage().nbytes()} bytes; needed those of {tuple(value.shape)}")
    known = {"decoder_num_heads": int, "mask_ratio": float, "norm_pix_loss": bool}
    return state, {key: said[key] for key, kind in known.items() if isinstance(said.get(key), kind)}


# ---------------------------------------------------------------- our side


def read_readout(folder: Path) -> Readout | None:
    """What the folder's readout is, if it has one.

    Raises:
        UserError: readout.json is not such a description.
    """
    path = folder / READOUT
    try:
        readout = Readout(**json.loads(path.read_text())) if path.is_file() else None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a readout: {error}") from error
    if readout is not None and readout.kind not in KINDS:
        raise UserError(f"{path} has kind {readout.kind!r}; needed one of {', '.join(KINDS)}")
    return readout


def load_readout(folder: Path, readout: Readout) -> nn.Module:
    """The readout of a Checkpoint folder, with its weights."""
    try:
        module = KINDS[readout.kind](**readout.settings)
        module.load_state_dict(checkpoint.load_tensors(folder / READOUT_WEIGHTS))
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{folder / READOUT_WEIGHTS} does not fit {READOUT}: {' '.join(str(error).split())}") from error
    return module.eval()


def output(
    encoder: nn.Module, layers: list[Tensor], pixels: Tensor, readout: Readout, head: nn.Module, queries: Tensor | None
) -> Tensor:
    """What the readout says about clips `B T H W C`.

    depth `B T H W 1`; attention, of its own queries or of given ones `B Q Dq`, `B Q out`; tracking, of queries `B Q 2` (x y) or
    `B Q 4` in 0..1, `B Q T values`, before any sigmoid; classes, scores `B classes`.
    Raises:
        UserError: queries are missing, or not of the readout's width.
    """
    if readout.kind == "classes":
        return head(last_tokens(encoder, pixels)[:, 1:])  # the first is left out even where it is no class token, as there
    t, h, w = encoder.grid
    features = layers[layer_index(depth=encoder.depth, fraction=readout.depth_fraction)]
    features = features.reshape(len(features), t, h * w, -1)  # B t n D
    wanted = readout.settings["coordinates"] if readout.kind == "tracking" else readout.settings["query_width"]
    if not wanted:
        answers = head(features)
        return unpatchify(answers, encoder.clip, DEPTH_PATCH) if readout.kind == "depth" else answers
    if queries is None or queries.shape[-1] != wanted:
        given = "none" if queries is None else f"some of {queries.shape[-1]}"
        raise UserError(f"the readout is asked by queries of {wanted} numbers, given {given}; correct --queries")
    return head(features, queries.expand(len(features), -1, -1))


def _describe(
    folder: Path,
    name: str,
    model: str,
    settings: Mapping[str, Any],
    encoder: Mapping[str, Part],
    readout: Readout | None,
    source: Path,
) -> None:
    """config.json, readout.json and where the weights came from."""
    parameters = sum(math.prod(part.shape) for part in encoder.values())
    described = Checkpoint(name, model, dict(settings), parameters, 0, 0)
    write_json(folder / "config.json", asdict(described))
    if readout is not None:
        write_json(folder / READOUT, asdict(readout))
    inputs = {source.name: artifacts.sha256(source)}
    write_json(folder / "provenance.json", {"stage": "convert", "settings": {}, "overrides": {}, "code": None, "inputs": inputs})
