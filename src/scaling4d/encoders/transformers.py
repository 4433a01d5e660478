"""FOLDER OR HUB -> CHECKPOINT: encoders that others trained and published, through Hugging Face transformers.

Only JSON and safetensors are read: no pickle, no code that comes with a model. Stage `baseline` imports a model once
and keeps the parts that features need; a readout then reads a Checkpoint folder like any other. transformers (extra
`baselines`) is imported only where it is used.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from scaling4d.config import MOST_SIZE, require_sizes, require_words
from scaling4d.encoders import hub, torchvision_shim
from scaling4d.mae.encoder import MOST_BLOCKS
from scaling4d.mae.patches import patchify
from scaling4d.provenance import flatten
from scaling4d.records import UserError, as_user_error, pip_install, read_json_object, remedy

CONFIG, WEIGHTS = "config.json", "model*.safetensors"
PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
FILES = (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", *PREPROCESSORS)  # of a model, patterns
DEFAULT_FRAMES = 16  # of a clip, as 4DS and MAE-ST take
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
FILE_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class PretrainedConfig:
    """Where a published encoder comes from.

    source: a folder with config.json, the preprocessor's JSON and safetensors, a released file, or `owner/name` on the
    Hugging Face hub. revision: the commit there, 40 hex digits; empty for a folder or file. clip: T H W that it is
    shown.
    """

    source: str
    revision: str
    clip: tuple[int, int, int]

    def __post_init__(self) -> None:
        require_sizes(self, "clip")


# ---- differences between the models ----


@dataclass(frozen=True)
class Family:
    """A kind of published encoder.

    model, processor: its classes in transformers. states: network, pixels -> the tokens, then the output of each block.
    video: the network takes clips `B T C H W`; else frames `B*T C H W`. unused: a part that features do not need.
    rescales_first: its preprocessor divides by 255 before it resizes; others resize uint8.
    frames_key, side_key: keys of its config that fix T and the side in pixels; empty: any will do.
    any_side: whether its positions suit other sides: they are interpolated, or rotations by a token's place.
    grid_key: attribute of its attention that holds the tokens of a row; empty: it needs none.
    """

    model: str
    processor: str
    states: Callable[[nn.Module, Tensor], Iterator[Tensor]]
    video: bool = False
    unused: str = ""
    rescales_first: bool = False
    frames_key: str = ""
    side_key: str = ""
    any_side: bool = True
    grid_key: str = ""


def _run_blocks(x: Tensor, blocks: nn.ModuleList, **arguments: Any) -> Iterator[Tensor]:
    """The tokens `B N D`, then the output of each block. Lazy: a block runs when its output is taken."""
    yield x
    for block in blocks:
        x = block(x, **arguments)
        x = x[0] if isinstance(x, tuple) else x
        yield x


def _dinov2(network: nn.Module, frames: Tensor) -> Iterator[Tensor]:
    return _run_blocks(network.embeddings(frames), network.encoder.layer)


def _dinov3(network: nn.Module, frames: Tensor) -> Iterator[Tensor]:
    return _run_blocks(network.embeddings(frames), network.model.layer, position_embeddings=network.rope_embeddings(frames))


def _siglip(network: nn.Module, frames: Tensor) -> Iterator[Tensor]:
    x = network.embeddings(frames, interpolate_pos_encoding=True)
    return _run_blocks(x, network.encoder.layers, attention_mask=None)


def _siglip2(network: nn.Module, frames: Tensor) -> Iterator[Tensor]:
    """The variant of any aspect ratio (NaFlex). It takes patches, and the number of patches of each picture."""
    side = network.config.patch_size
    patches = patchify(frames.movedim(1, -1)[:, None], (1, side, side))  # B N P
    shape = torch.tensor([[frames.shape[-2] // side, frames.shape[-1] // side]]).expand(len(frames), -1)
    return _run_blocks(network.embeddings(patches, shape), network.encoder.layers, attention_mask=None)


def _videomae(network: nn.Module, clips: Tensor) -> Iterator[Tensor]:
    return _run_blocks(network.embeddings(clips, None), network.encoder.layer)


def _vjepa2(network: nn.Module, clips: Tensor) -> Iterator[Tensor]:
    return _run_blocks(network.encoder.embeddings(clips), network.encoder.layer)


def _videoprism(network: nn.Module, clips: Tensor) -> Iterator[Tensor]:
    """Blocks over the tokens of a frame, then blocks over the frames of a place."""
    B, T = clips.shape[:2]
    for x in _run_blocks(network.spatial_embeddings(clips, True), network.spatial_layers):
        yield x.reshape(B, -1, x.shape[-1])  # B T*n D
    x = network.temporal_embeddings(network.layernorm1(x), clips.shape, True)  # B*n T D
    for y in islice(_run_blocks(x, network.temporal_layers), 1, None):
        yield y.unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)  # B T*n D


SIGLIP = Family("SiglipVisionModel", "SiglipImageProcessor", _siglip, unused="head")
SIGLIP2 = Family("Siglip2VisionModel", "Siglip2ImageProcessor", _siglip2, unused="head")
FAMILIES = {  # by config.json's model_type
    "dinov2": Family("Dinov2Model", "BitImageProcessor", _dinov2),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "BitImageProcessor", _dinov2),
    "dinov3_vit": Family("DINOv3ViTModel", "DINOv3ViTImageProcessor", _dinov3, rescales_first=True),
    "siglip": SIGLIP,  # also SigLIP 2 of a fixed size
    "siglip_vision_model": SIGLIP,
    "siglip2": SIGLIP2,
    "siglip2_vision_model": SIGLIP2,
    "videomae": Family(
        *("VideoMAEModel", "VideoMAEImageProcessor", _videomae),
        **{"video": True, "frames_key": "num_frames", "side_key": "image_size", "any_side": False},
    ),
    "vjepa2": Family(
        *("VJEPA2Model", "VJEPA2VideoProcessor", _vjepa2),
        **{"video": True, "unused": "predictor", "side_key": "crop_size", "grid_key": "grid_size"},
    ),
    "videoprism_vision_model": Family("VideoPrismVisionModel", "LlavaOnevisionVideoProcessor", _videoprism, video=True),
}


# ---- the encoder ----


@dataclass(frozen=True)
class PretrainedEncoderConfig:
    """A published encoder.

    kind: of FAMILIES. values: its config in transformers. clip: T H W, with H = W.
    side_px, resample: every frame is resized to this square, the model's own; "bilinear" or "bicubic", antialiased.
    mean, std: of each channel of pixels in 0..1, with which the model's preprocessor normalises.
    """

    kind: str
    values: Mapping[str, Any]
    clip: tuple[int, int, int]
    side_px: int
    resample: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        require_words(self, {"kind": tuple(FAMILIES), "resample": tuple(RESAMPLE.values())})
        require_sizes(self, "clip", "side_px")
        if min(self.std) <= 0:
            raise ValueError(f"std = {self.std}; needed numbers above 0")
        _check_sizes(self.values)


class PretrainedEncoder(nn.Module):
    """A published encoder with the interface of this project's encoders. The grid of image models has T frames.

    Raises UserError: transformers is missing or lacks the model, or the clip does not suit it.
    """

    config_class = PretrainedEncoderConfig

    def __init__(self, config: PretrainedEncoderConfig) -> None:
        super().__init__()
        self.kind, self.family, self.side_px, self.resample = config.kind, FAMILIES[config.kind], config.side_px, config.resample
        model = _model_class(config.kind)
        with torch.device("cpu"):  # some models compute tables here, which no file holds
            with importlib.import_module("transformers.initialization").no_init_weights():
                self.network = model(_network_config(model, config.values))
            self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)  # C 1 1
            self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)
        if hasattr(self.network, self.family.unused):
            delattr(self.network, self.family.unused)
        self.width, self.depth = self.network.config.hidden_size, len(self.blocks)
        side = getattr(self.network.config, self.family.side_key) if self.family.side_key else self.side_px
        if side not in (self.side_px, [self.side_px] * 2):
            problem = f"a {self.kind} of {self.family.side_key} = {side} cannot see {self.side_px} px"
            raise UserError(f"{problem}; its files disagree")
        self.resize(config.clip)
        self.train(False)

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        return tuple(self.mean.flatten().tolist())

    @property
    def pixel_scale(self) -> tuple[float, ...]:
        return tuple((1 / self.std).flatten().tolist())

    def train(self, mode: bool = True) -> PretrainedEncoder:
        """Stay in evaluation mode. In training mode DINOv3 shifts its positions and others drop parts, at random."""
        return super().train(False)

    def resize(self, clip: tuple[int, int, int], side_px: int | None = None) -> None:
        """Take clips of another T H W from now on. Frames are resized to the model's own side as before.

        side_px: another side than its own, from now on. Learned positions are interpolated; V-JEPA 2 rotates by a
        token's row and column, which count on, DINOv3 by its place as a share of the picture, as their code does.
        Raises UserError: not square, or the model does not take this T or this side.
        """
        kind, family, shape = self.kind, self.family, self.network.config
        tubelet, patch = getattr(shape, "tubelet_size", 1), getattr(shape, "patch_size", None)  # image models have no tubelets
        if isinstance(tubelet, int):
            tubelet = (tubelet, *(2 * (patch,) if isinstance(patch, int) else patch))
        (t, h, w), (T, height, width) = tubelet, clip
        frames = getattr(shape, family.frames_key) if family.frames_key else T
        if height != width or T % t or frames != T:
            needed = f"{frames} frames" if frames != T else f"a multiple of {t} frames"
            raise UserError(f"clip T H W = {tuple(clip)} does not suit a {kind}; needed {needed}, height = width")
        if side_px not in (None, self.side_px):
            if not family.any_side or side_px % h or side_px % w:
                needed = f"a multiple of {math.lcm(h, w)}" if family.any_side else f"{self.side_px}, its own"
                raise UserError(f"side_px = {side_px} does not suit a {kind} of patches {(t, h, w)}; needed {needed}")
            self.side_px = side_px
        self.clip, self.grid = tuple(clip), (T // t, self.side_px // h, self.side_px // w)
        if not all(self.grid):
            raise UserError(f"a {kind} of patches {(t, h, w)} shown {T} frames of {self.side_px} px has no token")
        for module in self.network.modules() if family.grid_key else ():
            if hasattr(module, family.grid_key):
                setattr(module, family.grid_key, self.grid[2])

    def preprocess(self, pixels: Tensor) -> Tensor:
        """uint8, or float in 0..1, `B T H W C` -> inputs `B T C H W`, as the model's own preprocessor makes them."""
        x = pixels.movedim(-1, 2)  # B T C H W
        if self.family.rescales_first and x.dtype == torch.uint8:
            x = x.float() / 255
        if x.shape[-2:] != (self.side_px, self.side_px):
            functional = importlib.import_module("torchvision.transforms.v2.functional")
            kernel = functional.InterpolationMode(self.resample)
            x = functional.resize(x, [self.side_px, self.side_px], interpolation=kernel, antialias=True)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return (x - self.mean) / self.std

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """In the order of the forward pass."""
        lists = [module for module in self.network.modules() if isinstance(module, nn.ModuleList)]
        return tuple(block for blocks in lists for block in blocks)

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """The tokens, then the output of each block before any last norm, each `B N D`. layers: number of entries.

        They are transformers' hidden states without class and register tokens, which come before those of the patches.
        """
        x, video = self.preprocess(pixels).to(next(self.network.parameters()).dtype), self.family.video
        states = self.family.states(self.network, x if video else x.flatten(0, 1))
        tokens = math.prod(self.grid if video else self.grid[1:])
        return [state[:, -tokens:].reshape(len(pixels), -1, self.width) for state in islice(states, layers)]


def _transformers() -> ModuleType:
    torchvision_shim.declare_operators()
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(f"published encoders need transformers ({error}); run {pip_install('baselines')}") from error


def _model_class(kind: str) -> type[nn.Module]:
    transformers, name = _transformers(), FAMILIES[kind].model
    if not hasattr(transformers, name):
        raise UserError(f"transformers {transformers.__version__} has no {name}; run {pip_install('baselines')}")
    return getattr(transformers, name)


def _check_sizes(values: Mapping[str, Any]) -> None:
    """Raises ValueError: a number for which no model has a use, and whose network would fill the memory."""
    for name, value in flatten(values):
        for number in value if isinstance(value, list | tuple) else [value]:
            most = MOST_BLOCKS if re.search("layers|depth", name) else MOST_SIZE
            if isinstance(number, int | float) and not abs(number) <= most:
                raise ValueError(f"{name} = {number}; needed at most {most:,}")


def _network_config(model: type[nn.Module], values: Mapping[str, Any]) -> Any:
    """The config in transformers. The attention is set here, since a file's config may name code on the hub."""
    try:
        config = model.config_class(**values)
    except importlib.import_module("huggingface_hub.errors").StrictDataclassError as error:
        raise ValueError(str(error)) from error
    config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    return config


# ---- import from a folder or the hub ----


def import_encoder(source: Path, clip: tuple[int, int, int]) -> tuple[PretrainedEncoderConfig, PretrainedEncoder]:
    """A model in Hugging Face's layout, with float32 weights, and its config. Raises UserError: as stage baseline."""
    if not (source / CONFIG).is_file():
        raise UserError(f"{source} is no model of Hugging Face: needed {CONFIG}, the preprocessor's JSON and safetensors")
    kind = str(read_json(source / CONFIG).get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{source / CONFIG} has model_type {kind!r}; needed one of {', '.join(FAMILIES)}")
    if not list(source.glob(WEIGHTS)):
        pickles = ", ".join(sorted(path.name for path in source.iterdir() if path.suffix in (".bin", ".pt", ".pth")))
        raise UserError(f"{source} has no {WEIGHTS}{f', but {pickles}, which could run code' * bool(pickles)}; convert it first")
    model, family, logging = _model_class(kind), FAMILIES[kind], _transformers().logging
    logging.set_verbosity_error()  # of its loading report; the checks below refuse what matters
    logging.disable_progress_bar()
    strict = importlib.import_module("huggingface_hub.errors").StrictDataclassError
    try:
        values = _architecture(model, read_json(source / CONFIG))
        config = PretrainedEncoderConfig(kind=kind, values=values, clip=tuple(clip), **_preprocessing(source, family))
        encoder = PretrainedEncoder(config)
        options = {"local_files_only": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        network_config = _network_config(model, values)
        network, report = model.from_pretrained(
            source, config=network_config, dtype=torch.float32, use_safetensors=True, **options
        )
    except UserError:
        raise
    except (strict, *FILE_ERRORS) as error:
        raise UserError(f"{source} cannot be read as a {kind}: {' '.join(str(error).split())}") from error
    missing = {key for key in report["missing_keys"] if key.split(".")[0] != (family.unused or None)}
    missing |= {key for key, *_ in report["mismatched_keys"]}
    if missing:  # transformers has drawn them at random
        raise UserError(
            f"{source} lacks {len(missing)} tensors of a {kind} of this shape, the first {min(missing)}; needed the whole encoder"
        )
    weights = network.state_dict()
    encoder.network.load_state_dict({name: weights[name] for name in encoder.network.state_dict()}, assign=True)
    return config, encoder


def default_clip(source: Path) -> tuple[int, int, int]:
    """T H W of a model's own settings; DEFAULT_FRAMES frames of an image model, or where they do not tell.

    Raises UserError: the preprocessor's JSON is damaged.
    """
    content = read_json(source / CONFIG)
    kind = str(content.get("model_type"))
    with as_user_error(f"{source} cannot be read as a {kind}"):
        side_px = _preprocessing(source, FAMILIES[kind])["side_px"] if kind in FAMILIES else 1  # import_encoder refuses others
    frames = content.get("num_frames", content.get("frames_per_clip", DEFAULT_FRAMES))
    return frames, side_px, side_px


def _architecture(model: type[nn.Module], content: Mapping[str, Any]) -> dict[str, Any]:
    """Values of config.json that shape the network (the vision part of a larger model). No other value is used."""
    content = content.get(model.config_class.base_config_key) or content
    common = {field.name for field in fields(_transformers().PreTrainedConfig)}
    names = {field.name for field in fields(model.config_class)} - common
    given = {key: value for key, value in content.items() if key in names | {"qkv_bias"}}  # VideoMAE's old name
    _check_sizes(given)
    return {key: value for key, value in vars(model.config_class(**given)).items() if key in names and not key.startswith("_")}


def _preprocessing(source: Path, family: Family) -> dict[str, Any]:
    """side_px, resample, mean and std of a model's preprocessor; defaults are those of transformers for this kind."""
    path = next((source / name for name in PREPROCESSORS if (source / name).is_file()), None)
    if path is None:
        raise UserError(f"{source} does not say how the model sees a picture; needed one of {', '.join(PREPROCESSORS)}")
    given = read_json(path)
    given = given.get("image_processor") or given.get("video_processor") or given
    given = getattr(_transformers(), family.processor)().to_dict() | given
    if not given["do_rescale"] or not math.isclose(given["rescale_factor"], 1 / 255, rel_tol=1e-3):
        rescaling = f"do_rescale = {given['do_rescale']}, rescale_factor = {given['rescale_factor']}"
        raise UserError(f"{path}: {rescaling}; needed 1 / 255")
    if given["resample"] not in RESAMPLE:
        raise UserError(f"{path}: resample = {given['resample']}; needed 2 (bilinear) or 3 (bicubic)")
    mean, std = (tuple(map(float, given[key])) for key in ("image_mean", "image_std"))
    if not (len(mean) == len(std) == 3 and min(std) > 0):
        raise UserError(f"{path}: image_mean = {mean}, image_std = {std}; needed a number for each of three channels, std > 0")
    if not given["do_normalize"]:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if "max_num_patches" in given:
        sides = {given["patch_size"] * math.isqrt(given["max_num_patches"])}
    else:  # the side of the crop, where one is cut out: clips come cropped
        size = given["crop_size"] if given.get("do_center_crop") else given["size"]
        sides = {size} if isinstance(size, int) else set(size.values())
        if len(sides) != 1:
            raise UserError(f"{path}: pictures of {size}; needed squares")
    return {"side_px": sides.pop(), "resample": RESAMPLE[given["resample"]], "mean": mean, "std": std}


def source_path(config: PretrainedConfig, key: str) -> Path:
    """A model's file, or the folder of its files. Files of the hub are downloaded once, to its cache.

    key: of the settings.
    Raises UserError: no such file or folder, a revision that is no commit, or no download.
    """
    source, revision = config.source, config.revision
    if not revision:
        if not Path(source).exists():
            raise UserError(
                f"{key}: no folder or file {source}; needed one, or a model of the hub with its commit as Pretrained.revision"
            )
        return Path(source)
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise UserError(f"{key}.Pretrained.revision = {revision!r}; needed a commit of 40 hex digits, or '' for a folder or file")
    _transformers()
    with remedy(UserError, "or copy its files to a folder, set Pretrained.source to it and Pretrained.revision to ''"):
        try:
            return hub.download(source, revision, FILES)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error


def source_files(source: Path) -> list[Path]:
    """Files of a model that are read."""
    if source.is_file():
        return [source]
    return sorted({*source.glob(WEIGHTS), *(source / name for name in (CONFIG, *PREPROCESSORS) if (source / name).is_file())})


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file. Raises UserError: no JSON object."""
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
