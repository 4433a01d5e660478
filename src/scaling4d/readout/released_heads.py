"""Released weights <-> Checkpoint folders: 4DS's `.npz`, with or without a readout, both ways; MAE-ST's `.pth` in.

A readout in the file becomes `readout.safetensors` and `readout.json` in the Checkpoint folder of its encoder.
Arrays of 4DS are streamed: converting a file of 14 GB needs the memory of a few of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scaling4d import artifacts, checkpoint
from scaling4d.checkpoint import WEIGHTS, Checkpoint
from scaling4d.config import check_types, require_sizes, require_words
from scaling4d.encoders import released
from scaling4d.encoders.arrays import Npz, Shape, write_npz, write_safetensors
from scaling4d.encoders.card import write_model_card
from scaling4d.encoders.encoder import rate_hz_of
from scaling4d.encoders.features import DEPTH_FRACTION, layer_index, split_time
from scaling4d.encoders.load import build_model
from scaling4d.encoders.released import MAESTOptions, TensorMap, WeightMap, flax_dense, flax_norm, reshaped, shape_of, transposed
from scaling4d.mae.encoder import BackboneConfig
from scaling4d.mae.mae_st import MAESTConfig
from scaling4d.mae.models import MODELS
from scaling4d.mae.patches import unpatchify
from scaling4d.provenance import atomic_new
from scaling4d.readout.classifier import MeanPoolClassifier
from scaling4d.readout.heads import AttentionReadout, Head, HeadConfig, PlainAttentionReadout, Queries
from scaling4d.records import UserError, as_user_error, shortened, write_json

READOUT_WEIGHTS, READOUT = "readout.safetensors", "readout.json"
HEAD = "params/layers_2/"
DEPTH_PATCH = (2, 8, 8)  # of the released depth readout
DROPOUT = 0.5  # mae_st's default; without effect on loaded weights
TILES = "temporal_tile_posenc/embeddings"
INITIAL = {"query_std": 0.02, "time_init": "normal", "out_scale": 1.0}  # without effect on loaded weights
TRACKING = {"fourier_bases": 16, "stretched": True, "distance_bias": (), **INITIAL}  # of the released tracking readouts
Read = Callable[[str], np.ndarray]  # released array by key


@dataclass(frozen=True)
class AttentionSettings:
    """Arguments of an AttentionReadout, or of a PlainAttentionReadout, if `plain`. queries: learned ones, 0: given."""

    features_width: int
    frames: int
    width: int
    heads: int
    queries: int
    query_width: int
    out: int
    plain: bool

    def __post_init__(self) -> None:
        require_sizes(self, "features_width", "frames", "width", "heads", "out")
        require_sizes(self, "queries", "query_width", least=0)
        if bool(self.queries) == bool(self.query_width):
            raise ValueError(f"queries = {self.queries}, query_width = {self.query_width}; needed one of them above 0")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")


@dataclass(frozen=True)
class TrackingSettings:
    """Arguments of a Head of given queries. head, queries: of HeadConfig and Queries."""

    features_width: int
    frames: int
    head: Mapping[str, Any]
    queries: Mapping[str, Any]

    def __post_init__(self) -> None:
        require_sizes(self, "features_width", "frames")
        check_types(HeadConfig, self.head, "head.")
        check_types(Queries, self.queries, "queries.")
        HeadConfig(**self.head)
        queries = Queries(**self.queries)
        if queries.learned or queries.coordinates not in (2, 4) or self.frames % queries.tiles:
            raise ValueError(f"{queries}; needed 2 or 4 coordinates, none learned, and tiles that divide {self.frames} frames")


@dataclass(frozen=True)
class ClassesSettings:
    """Arguments of a MeanPoolClassifier."""

    width: int
    classes: int
    dropout: float

    def __post_init__(self) -> None:
        require_sizes(self, "width", "classes")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout = {self.dropout}; needed 0 to 1")


KINDS = dict(depth=AttentionSettings, attention=AttentionSettings, tracking=TrackingSettings, classes=ClassesSettings)


@dataclass(frozen=True)
class ReleasedReadout:
    """Content of `readout.json`.

    kind: "depth" (of the whole clip), "attention" (learned or given queries of any meaning), "tracking" (given points
    or boxes), or "classes". settings: arguments of its module. depth_fraction: of the encoder's depth, where it reads.
    """

    kind: str
    settings: Mapping[str, Any]
    depth_fraction: float

    def __post_init__(self) -> None:
        require_words(self, {"kind": tuple(KINDS)})
        if not 0 < self.depth_fraction <= 1:
            raise ValueError(f"depth_fraction = {self.depth_fraction}; needed a share above 0 and at most 1")
        check_types(KINDS[self.kind], self.settings)
        KINDS[self.kind](**self.settings)

    def build(self) -> nn.Module:
        """The module on meta, without weights."""
        settings = dict(self.settings)
        with torch.device("meta"):
            if self.kind == "classes":
                return MeanPoolClassifier(**settings)
            if self.kind == "tracking":
                return Head(HeadConfig(**settings.pop("head")), Queries(**settings.pop("queries")), **settings)
            return (PlainAttentionReadout if settings.pop("plain") else AttentionReadout)(**settings)

    def weight_map(self) -> WeightMap:
        """Every tensor of a 4DS readout."""
        return (tracking_weight_map if self.kind == "tracking" else attention_weight_map)(self.settings, HEAD)


# ---- 4DS ----


def from_4ds(source: Path, out: Path) -> Path:
    """Convert a released `.npz` to a Checkpoint folder.

    Raises UserError, and writes nothing: `out` exists, a damaged file, or a key or shape that 4DS models do not have.
    """
    arrays = Npz(source)
    prefix = released.four_ds_prefix(arrays.shapes)
    with as_user_error(source):
        config = released.four_ds_config(arrays.shapes, source, prefix)
        readout = four_ds_readout(arrays.shapes, source, config)
    files = {WEIGHTS: released.four_ds_weight_map(config, prefix)}
    files |= {READOUT_WEIGHTS: readout.weight_map()} if readout else {}
    released.check_shapes(arrays.shapes, files, source)
    return _write_folder(source, out, config, files, readout, arrays.read)


def to_4ds(folder: Path, out: Path) -> Path:
    """Convert a Checkpoint folder of a `Backbone` or `SimpleMAE` (no shifted pixels, no qk_norm) to a released `.npz`.

    Raises UserError: another model, or `out` exists.
    """
    saved, readout = Checkpoint.read(folder), read_readout(folder)
    if saved.model not in ("Backbone", "SimpleMAE"):
        raise UserError(f"{folder} holds a {saved.model}; the released 4DS layout takes a Backbone, or the one in a SimpleMAE")
    _, config = build_model(folder)
    if (config.pixel_mean, config.pixel_scale) != (0.0, 1.0):
        numbers = f"(x - {config.pixel_mean}) * {config.pixel_scale}"
        raise UserError(f"{folder} takes pixels as {numbers}; the released 4DS layout tells no such numbers and means 0 and 1")
    if config.qk_norm:
        raise UserError(f"{folder} has norms of queries and keys; the released 4DS layout takes an encoder with qk_norm false")
    encoder = released.four_ds_weight_map(config, released.BACKBONE_BESIDE_HEAD if readout else released.BACKBONE)
    if saved.model == "SimpleMAE":
        encoder = {f"encoder.{name}": entry for name, entry in encoder.items()}
    parts = [(encoder, checkpoint.weights_files(folder))]
    parts += [(readout.weight_map(), [folder / READOUT_WEIGHTS])] if readout else []
    with atomic_new(out) as partial:
        write_npz(partial, (pair for weights, paths in parts for pair in _released_arrays(weights, paths)))
    return out


def _released_arrays(weights: WeightMap, paths: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    path = paths[0]
    try:
        with ExitStack() as stack:
            tensors = {}
            for path in paths:
                file = stack.enter_context(safe_open(path, framework="numpy"))
                tensors |= dict.fromkeys(file.keys(), (path, file))
            for name, entry in weights.items():
                path, file = tensors.get(name, (paths[0], None))
                tensor = file.get_tensor(name) if file else None
                if tensor is None or tensor.shape != entry.shape:
                    raise UserError(f"{path}: {name} is missing or not {entry.shape}; it does not fit the folder's JSON files")
                yield from zip(entry.arrays, entry.to_released(tensor), strict=True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def four_ds_readout(shapes: Mapping[str, Shape], source: Path, encoder: BackboneConfig) -> ReleasedReadout | None:
    """The readout below HEAD, if any, read off the shapes of its arrays. Raises UserError: as released.shape_of."""
    shapes, source = {key.removeprefix(HEAD): shape for key, shape in shapes.items() if key.startswith(HEAD)}, f"{source}, {HEAD}"
    if not shapes:
        return None
    tracking = "query_initializer/layers_1/Dense_0/kernel" in shapes
    prefix = "attention_readout/" if tracking else ""
    features_width, heads, head_width = shape_of(shapes, f"{prefix}key_embedding/kernel", 3, source)
    positions, frames = f"{prefix}temporal_posenc/embeddings", encoder.clip[0]
    if positions in shapes:
        frames = shape_of(shapes, positions, 3, source)[0]
    settings = {"features_width": features_width, "frames": frames}
    if tracking:
        embedded, query_width = shape_of(shapes, "query_initializer/layers_1/Dense_0/kernel", 2, source)
        head = HeadConfig(width=heads * head_width, heads=heads, query_width=query_width, **TRACKING)
        out = shape_of(shapes, "attention_readout/Dense_2/kernel", 2, source)[1]
        tiles = shape_of(shapes, TILES, 2, source)[0] if TILES in shapes else 1
        queries = Queries(out=out, coordinates=embedded // (2 * head.fourier_bases), tiles=tiles)
        return ReleasedReadout("tracking", settings | {"head": asdict(head), "queries": asdict(queries)}, DEPTH_FRACTION)
    plain, given = "LayerNorm_0/scale" not in shapes, "query" not in shapes
    out = shape_of(shapes, f"Dense_{given + (not plain)}/kernel", 2, source)[1]  # see attention_weight_map
    learned = 0 if given else shape_of(shapes, "query", 3, source)[0]
    settings |= {"width": heads * head_width, "heads": heads, "queries": learned, "out": out, "plain": plain}
    settings["query_width"] = shape_of(shapes, "Dense_0/kernel", 2, source)[0] if given else 0
    dense = not given and out == math.prod(DEPTH_PATCH) and learned * out == math.prod(encoder.clip)
    return ReleasedReadout("depth" if dense else "attention", settings, DEPTH_FRACTION)


def attention_weight_map(settings: Mapping[str, Any], prefix: str) -> WeightMap:
    """Every tensor of an `AttentionReadout`, or of a `PlainAttentionReadout`, if `plain`."""
    C, D, plain, learned = settings["features_width"], settings["width"], settings["plain"], settings["queries"]
    heads, times = (settings["heads"], D // settings["heads"]), (settings["frames"], 1, C)
    dense = iter(f"{prefix}Dense_{i}" for i in range(3))  # flax numbers them in this order: given queries, residual, output
    weights = {"temporal_positions": _absent(times) if plain else reshaped(f"{prefix}temporal_posenc/embeddings", times)}
    if learned:
        weights["query"] = reshaped(f"{prefix}query", (learned, *heads), (learned, D))
    else:
        weights |= flax_dense("query_in", next(dense), (settings["query_width"],), (D,))
    weights |= {f"{name}.weight": transposed(f"{prefix}{name}_embedding/kernel", (C,), heads) for name in ("key", "value")}
    if not plain:
        weights |= {f"{name}.bias": reshaped(f"{prefix}{name}_embedding/bias", heads, (D,)) for name in ("key", "value")}
        weights |= flax_norm("features_norm", f"{prefix}LayerNorm_0", C) | flax_norm("mlp_norm", f"{prefix}LayerNorm_1", D)
        weights |= flax_dense("project", next(dense), (D,), (D,))
        weights |= flax_dense("mlp_in", f"{prefix}MLP_0/Dense_0", (D,), (4 * D,))
        weights |= flax_dense("mlp_out", f"{prefix}MLP_0/Dense_1", (4 * D,), (D,))
    return weights | flax_dense("out", next(dense), (D,), (settings["out"],))


def tracking_weight_map(settings: Mapping[str, Any], prefix: str) -> WeightMap:
    """Every tensor of a `Head` with given queries: embedding of queries, tiles, and attention readout."""
    head, queries = settings["head"], settings["queries"]
    embedded, width = 2 * head["fourier_bases"] * queries["coordinates"], head["query_width"]
    weights = flax_dense("embed_mlp_in", f"{prefix}query_initializer/layers_1/Dense_0", (embedded,), (width,))
    weights |= flax_dense("embed_mlp_out", f"{prefix}query_initializer/layers_1/Dense_1", (width,), (width,))
    tiles = (queries["tiles"], width)
    weights["tile_positions"] = reshaped(prefix + TILES, tiles) if queries["tiles"] > 1 else _absent(tiles)
    attention = {**settings, **head, "out": queries["out"], "queries": 0, "plain": False}
    inner = attention_weight_map(attention, f"{prefix}attention_readout/")
    return weights | {f"readout.{name}": entry for name, entry in inner.items()}


def _absent(shape: Shape) -> TensorMap:
    """A tensor that the released readout does without: zeros, and nothing in the file."""
    return TensorMap(shape, {}, lambda: np.zeros(shape, np.float32), lambda _: [])


# ---- MAE-ST ----


def from_mae_st(source: Path, out: Path, options: MAESTOptions) -> Path:
    """Convert an official `.pth` (pretrained, fine-tuned, or an encoder alone) to a Checkpoint folder.

    options: those that the official code saved in the file override them.
    Raises UserError, and writes nothing: `out` exists, a damaged file, content that needs unpickling, another model.
    """
    state, saved_options = released.mae_st_state(released.read_torch(source), source)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    with as_user_error(source):
        config = released.mae_st_config(shapes, source, replace(options, **saved_options))
    files, readout = {WEIGHTS: released.mae_st_weight_map(config)}, None
    if not isinstance(config, MAESTConfig) and len(shapes.get("head.weight", ())) == 2:
        classes, width = shapes["head.weight"]
        head = released.torch_layer("norm", "norm", width) | released.torch_layer("linear", "head", classes, width)
        files[READOUT_WEIGHTS] = head
        readout = ReleasedReadout("classes", {"width": width, "classes": classes, "dropout": DROPOUT}, 1.0)
    released.check_shapes(shapes, files, source)
    return _write_folder(source, out, config, files, readout, lambda key: state[key].numpy())


# ---- Checkpoint folders with a readout ----


def _write_folder(
    source: Path, out: Path, config: BackboneConfig, files: dict[str, WeightMap], readout: ReleasedReadout | None, read: Read
) -> Path:
    """Write a Checkpoint folder, tensor by tensor."""
    model = next(name for name, cls in MODELS.items() if cls.config_class is type(config))
    prefix = "encoder." if isinstance(config, MAESTConfig) else ""
    parameters = sum(math.prod(entry.shape) for name, entry in files[WEIGHTS].items() if name.startswith(prefix))
    with atomic_new(out) as folder:
        folder.mkdir()
        for file, tensors in files.items():
            converted = (entry.to_ours(*(read(key) for key in entry.arrays)) for entry in tensors.values())
            write_safetensors(folder / file, {name: entry.shape for name, entry in tensors.items()}, converted)
        provenance = {"stage": "convert", "settings": {}, "overrides": {}, "code": None}
        saved = Checkpoint(out.name, model, asdict(config), parameters, 0, 0)
        saved = replace(saved, rate_hz=rate_hz_of(saved, provenance))
        saved.write_config(folder)
        if readout:
            write_json(folder / READOUT, asdict(readout))
        provenance["inputs"] = {source.name: artifacts.sha256(source)}
        write_json(folder / artifacts.PROVENANCE, provenance)
        write_model_card(folder, saved, provenance, mean=config.pixel_mean, scale=config.pixel_scale)
    return out


def read_readout(folder: Path) -> ReleasedReadout | None:
    """The readout of a Checkpoint folder, if it has one. Raises UserError: readout.json is no such description."""
    path = folder / READOUT
    return checkpoint.read_description(path, ReleasedReadout, "a readout") if path.is_file() else None


def load_readout(folder: Path, readout: ReleasedReadout) -> nn.Module:
    """The readout's module, with its weights. Raises UserError: readout.json and readout.safetensors do not fit."""
    try:
        module = readout.build()
        weights = checkpoint.load_tensors(folder / READOUT_WEIGHTS)
        module.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    except (RuntimeError, TypeError, KeyError) as error:
        raise UserError(f"{folder / READOUT_WEIGHTS} does not fit {READOUT}: {shortened(error)}") from error
    return module.eval()


def predict(
    readout: ReleasedReadout, module: nn.Module, encoder: nn.Module, layers: list[Tensor], pixels: Tensor, queries: Tensor | None
) -> Tensor:
    """Predictions for clips `B T H W C` by kind of readout.

    depth: `B T H W 1`. attention: `B Q out`, of learned queries or of given ones `B Q Dq`. tracking: `B Q T values`
    before any sigmoid, of queries `B Q 2` (x y) or `B Q 4` in 0..1. classes: scores `B classes`.
    layers: all features of the encoder for these clips.
    Raises UserError: the readout is for another encoder, or queries are missing or have another width.
    """
    width = readout.settings["width" if readout.kind == "classes" else "features_width"]
    if width != encoder.width:
        raise UserError(f"{READOUT} is for features of width {width}, and the encoder has {encoder.width}")
    if readout.kind == "classes":
        return module(encoder.last_tokens(pixels)[:, 1:])  # the official code drops the first token even if it is no class token
    features = split_time(layers[layer_index(depth=encoder.depth, fraction=readout.depth_fraction)], encoder.grid)  # B t n D
    settings = readout.settings
    query_width = settings["queries"]["coordinates"] if readout.kind == "tracking" else settings["query_width"]
    if not query_width:
        values = module(features)
        if readout.kind == "depth" and values[0].numel() != math.prod(encoder.clip):
            raise UserError(f"{READOUT} predicts {values[0].numel()} depths of a clip; needed those of {encoder.clip}")
        return unpatchify(values, encoder.clip, DEPTH_PATCH) if readout.kind == "depth" else values
    if queries is None or queries.shape[-1] != query_width:
        given = "none" if queries is None else f"some of {queries.shape[-1]}"
        raise UserError(f"the readout takes queries of {query_width} numbers, given {given}; correct --queries")
    return module(features, queries.expand(len(features), -1, -1))
