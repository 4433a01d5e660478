"""FOLDER OR HUB -> CHECKPOINT: encoders that others trained and published, through Hugging Face transformers.

What is read is JSON and safetensors: no pickle, no code that comes with a model. The `baseline` stage takes over, once, what
features need; a readout then finds a Checkpoint folder like any other. transformers (extra `baselines`) is imported only where
it is used.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from scaling4d import artifacts, config, vision_operators
from scaling4d.checkpoint import Checkpoint
from scaling4d.mae.build import ENCODERS, METHODS, encoder_of, load
from scaling4d.mae.patches import patchify
from scaling4d.records import UserError

CONFIG, WEIGHTS = "config.json", "model*.safetensors"
PREPROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them


@config.configurable
@dataclass(frozen=True)
class Pretrained:
    """Where a published encoder comes from, and which clips it is shown.

    source: a folder with config.json, the preprocessor's JSON and safetensors, or a model of the Hugging Face hub, `owner/name`.
    revision: the commit of that model, 40 hex digits; empty for a folder. clip: T H W.
    """

    source: str
    revision: str
    clip: tuple[int, int, int]


# ---------------------------------------------------------------- what differs between the models


@dataclass(frozen=True)
class Family:
    """A kind of published encoder.

    model, processor: its classes in transformers. states: network, pictures -> the tokens, then what leaves each block.
    video: it sees a clip `B T C H W` at once; else a frame `B*T C H W` at a time. unused: a part that features do without.
    floats: its preprocessor divides by 255 before it resizes; others resize uint8.
    only_frames, only_side: names of the values in its config that T and the side in pixels must have; empty: any will do.
    """

    model: str
    processor: str
    states: Callable[[nn.Module, Tensor], Iterator[Tensor]]
    video: bool = False
    unused: str = ""
    floats: bool = False
    only_frames: str = ""
    only_side: str = ""


def _through(x: Tensor, blocks: nn.ModuleList, **given: Any) -> Iterator[Tensor]:
    """The tokens `B N D`, then what leaves each block; a block is not computed before it is asked for."""
    yield x
    for block in blocks:
        x = block(x, **given)
        x = x[0] if isinstance(x, tuple) else x
        yield x


def _dinov2(network: nn.Module, frames: Tensor) -> Iterator[Tensor]:
    return _through(network.embeddings(frames), network.encoder.layer)


def _dinov3(network: nn.Module, frames: Tensor) -> Iterator[Tensor]:
    return _through(network.embeddings(frames), network.model.layer, position_embeddings=network.rope_embeddings(frames))


def _siglip(network: nn.Module, frames: Tensor) -> Iterator[Tensor]:
    x = network.embeddings(frames, interpolate_pos_encoding=True)
    return _through(x, network.encoder.layers, attention_mask=None)


def _siglip2(network: nn.Module, frames: Tensor) -> Iterator[Tensor]:
    """The variant of any aspect ratio (NaFlex): it takes patches and says of how many each picture consists."""
    side = network.config.patch_size
    patches = patchify(frames.movedim(1, -1)[:, None], (1, side, side))  # B N P
    shape = torch.tensor([[frames.shape[-2] // side, frames.shape[-1] // side]]).expand(len(frames), -1)
    return _through(network.embeddings(patches, shape), network.encoder.layers, attention_mask=None)


def _videomae(network: nn.Module, clips: Tensor) -> Iterator[Tensor]:
    return _through(network.embeddings(clips, None), network.encoder.layer)


def _vjepa2(network: nn.Module, clips: Tensor) -> Iterator[Tensor]:
    return _through(network.encoder.embeddings(clips), network.encoder.layer)


def _videoprism(network: nn.Module, clips: Tensor) -> Iterator[Tensor]:
    """Blocks over the tokens of a frame, then blocks over the frames of a place."""
    B, T = clips.shape[:2]
    for x in _through(network.spatial_embeddings(clips, True), network.spatial_layers):
        yield x.reshape(B, -1, x.shape[-1])  # B T*n D
    x = network.temporal_embeddings(network.layernorm1(x), clips.shape, True)  # B*n T D
    for y in islice(_through(x, network.temporal_layers), 1, None):
        yield y.unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)  # B T*n D


DINOV2 = Family("Dinov2Model", "BitImageProcessor", _dinov2)
SIGLIP = Family("SiglipVisionModel", "SiglipImageProcessor", _siglip, unused="head")
SIGLIP2 = Family("Siglip2VisionModel", "Siglip2ImageProcessor", _siglip2, unused="head")
FAMILIES = {  # by config.json's model_type
    "dinov2": DINOV2,
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", DINOV2.processor, _dinov2),
    "dinov3_vit": Family("DINOv3ViTModel", "DINOv3ViTImageProcessor", _dinov3, floats=True),
    "siglip": SIGLIP,  # SigLIP 2 of a fixed size, too
    "siglip_vision_model": SIGLIP,
    "siglip2": SIGLIP2,
    "siglip2_vision_model": SIGLIP2,
    "videomae": Family(
        "VideoMAEModel", "VideoMAEImageProcessor", _videomae, video=True, only_frames="num_frames", only_side="image_size"
    ),
    "vjepa2": Family("VJEPA2Model", "VJEPA2VideoProcessor", _vjepa2, video=True, unused="predictor", only_side="crop_size"),
    "videoprism_vision_model": Family("VideoPrismVisionModel", "LlavaOnevisionVideoProcessor", _videoprism, video=True),
}


# ---------------------------------------------------------------- the encoder


class PretrainedEncoder(nn.Module):
    """A published encoder as readouts use one. Image models see one frame at a time, so their grid has T frames.

    Args:
        kind: of FAMILIES. values: its config in transformers. clip: T H W, with H = W.
        side_px, resample: every frame is resized to this square, the model's own, "bilinear" or "bicubic", antialiased.
        mean, std: of each channel, by which the model's preprocessor normalises pixels in 0..1.
    Raises:
        UserError: transformers is missing or lacks the model, or the clip does not suit it.
    """

    def __init__(
        self,
        *,
        kind: str,
        values: Mapping[str, Any],
        clip: tuple[int, int, int],
        side_px: int,
        resample: str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.kind, self.side_px, self.resample = kind, side_px, resample
        with torch.device("cpu"):  # some models compute tables here, which no file holds
            self.network = _network(kind, values)
            self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)  # C 1 1
            self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        known = self.network.config
        self.width = known.hidden_size
        self.depth = known.num_spatial_layers + known.num_temporal_layers if "videoprism" in kind else known.num_hidden_layers
        self.resize(clip)
        self.train(False)

    def train(self, mode: bool = True) -> PretrainedEncoder:
        """Stays as in use, fine-tuned or not: in training DINOv3 moves its positions about, and others drop parts, at random."""
        return super().train(False)

    def resize(self, clip: tuple[int, int, int]) -> None:
        """Take clips of another T H W from now on; frames are resized to the model's own side as before.

        Raises:
            UserError: not square, or T or the side is none that the model takes.
        """
        family, known = FAMILIES[self.kind], self.network.config
        T, height, width = clip
        t, h, w = _patch(known)
        frames = getattr(known, family.only_frames) if family.only_frames else T
        if height != width or T % t or frames != T:
            needed = f"{frames} frames" if frames != T else f"a multiple of {t} frames"
            raise UserError(f"clip T H W = {tuple(clip)} does not suit a {self.kind}; needed {needed}, height = width")
        if family.only_side and getattr(known, family.only_side) not in (self.side_px, [self.side_px] * 2):
            asked = getattr(known, family.only_side)
            raise UserError(f"a {self.kind} of {family.only_side} = {asked} cannot see {self.side_px} px; its files disagree")
        self.clip, self.grid = tuple(clip), (T // t, self.side_px // h, self.side_px // w)
        if not all(self.grid):
            raise UserError(f"a {self.kind} of patches {(t, h, w)} shown {T} frames of {self.side_px} px has no token")

    def seen(self, pixels: Tensor) -> Tensor:
        """uint8, or float in 0..1, `B T H W C` -> what the network takes, `B T C H W`; equal to the model's own preprocessor."""
        x = pixels.movedim(-1, 2)  # B T C H W
        if FAMILIES[self.kind].floats and x.dtype == torch.uint8:
            x = x.float() / 255
        if x.shape[-2:] != (self.side_px, self.side_px):
            vision = importlib.import_module("torchvision.transforms.v2.functional")
            kernel = vision.InterpolationMode(self.resample)
            x = vision.resize(x, [self.side_px, self.side_px], interpolation=kernel, antialias=True)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return (x - self.mean) / self.std

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """In the order of the forward pass."""
        lists = [part for part in self.network.modules() if isinstance(part, nn.ModuleList)]
        return tuple(block for blocks in lists for block in blocks)

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """The tokens, then what leaves each block, before any last norm, each `B N D`; `layers` stops after so many.

        As transformers counts hidden states; class and register tokens, which come before the patches', are left out.
        """
        family, x = FAMILIES[self.kind], self.seen(pixels).to(next(self.network.parameters()).dtype)
        states = family.states(self.network, x if family.video else x.flatten(0, 1))
        tokens = math.prod(self.grid if family.video else self.grid[1:])
        return [state[:, -tokens:].reshape(len(pixels), -1, self.width) for state in islice(states, layers)]


def load_encoder(folder: Path) -> nn.Module:
    """The encoder of a Checkpoint folder, of this project or a published one.

    Raises:
        UserError: as mae.build.load and PretrainedEncoder.
    """
    return encoder_of(load(folder, METHODS | ENCODERS | {PretrainedEncoder.__name__: PretrainedEncoder}))


def _network(kind: str, values: Mapping[str, Any]) -> nn.Module:
    """The network without weights."""
    made = _model(_transformers(), kind)
    with importlib.import_module("transformers.initialization").no_init_weights():
        return _needed(made(_config(made, values)), kind)


def _config(made: type[nn.Module], values: Mapping[str, Any]) -> Any:
    """The config of a model. Which attention is computed is ours to say: a config may also name code on the hub."""
    known = made.config_class(**values)
    known._attn_implementation = "sdpa" if made._supports_sdpa else "eager"
    return known


def _needed(network: nn.Module, kind: str) -> nn.Module:
    if hasattr(network, FAMILIES[kind].unused):
        delattr(network, FAMILIES[kind].unused)
    return network


def _patch(known: Any) -> tuple[int, int, int]:
    """pt ph pw of a config; image models have no tubelets."""
    tubelet = getattr(known, "tubelet_size", 1)
    if not isinstance(tubelet, int):
        return tuple(tubelet)
    side = known.patch_size
    return (tubelet, side, side) if isinstance(side, int) else (tubelet, *side)


def _transformers() -> ModuleType:
    vision_operators.declare()
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"published encoders need transformers ({error}); install it with: pip install -c requirements.lock -e '.[baselines]'"
        ) from error


def _model(transformers: ModuleType, kind: str) -> type[nn.Module]:
    name = FAMILIES[kind].model
    if not hasattr(transformers, name):
        raise UserError(f"transformers {transformers.__version__} has no {name}; install the version of requirements.lock")
    return getattr(transformers, name)


# ---------------------------------------------------------------- taking one over


def baseline(name: str, settings: Mapping[str, Any]) -> Path:
    """The `baseline` stage for an encoder of `encoders.pretrained`: a Checkpoint folder with what features need.

    Raises:
        UserError: no such folder or model, no network, an unknown kind, pickles instead of safetensors, files that do not fit
            together, a clip that does not suit the model.
    """
    started = time.time()
    keys = ["profile", f"encoders.pretrained.{name}"]
    mine = config.declared(settings, keys)
    config.bind(mine[keys[-1]])
    asked = config.build(Pretrained)
    source = _folder(asked, keys[-1])
    final = artifacts.home(settings) / "pretrain" / name
    with artifacts.folder(final) as out:
        made, encoder = take_over(source, asked.clip)
        parameters = sum(weight.numel() for weight in encoder.parameters())
        described = Checkpoint(name, PretrainedEncoder.__name__, made, parameters, step=0, clips_seen=0)
        described.write(out, encoder.state_dict())
        inputs = {path.name: artifacts.sha256(path) for path in _files(source)}
        artifacts.write_provenance(out, stage="baseline", settings=settings, keys=keys, room="baseline", inputs=inputs)
    artifacts.write_run(f"baseline-{name}", artifacts.sha256(final), started=started)
    return final


def take_over(source: Path, clip: tuple[int, int, int]) -> tuple[dict[str, Any], PretrainedEncoder]:
    """A model in Hugging Face's layout -> the arguments of its PretrainedEncoder, and that encoder with its weights (float32).

    Raises:
        UserError: as baseline.
    """
    if not (source / CONFIG).is_file():
        raise UserError(f"{source} is no model of Hugging Face: needed {CONFIG}, the preprocessor's JSON and safetensors")
    kind = str(_json(source / CONFIG).get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{source / CONFIG} has model_type {kind!r}; needed one of {', '.join(FAMILIES)}")
    if not list(source.glob(WEIGHTS)):
        pickles = ", ".join(sorted(path.name for path in source.iterdir() if path.suffix in (".bin", ".pt", ".pth")))
        raise UserError(f"{source} has no {WEIGHTS}{f', but {pickles}, which could run code' * bool(pickles)}; convert it first")
    transformers = _transformers()
    transformers.logging.set_verbosity_error()  # of its report on loading; what matters in it is refused below
    transformers.logging.disable_progress_bar()
    made = _model(transformers, kind)
    with _as_one_line(f"{source} cannot be read as a {kind}"):
        values = _values(transformers, made, _json(source / CONFIG))
        settings = {"kind": kind, "values": values, "clip": tuple(clip), **_seen_as(transformers, source, kind)}
        encoder = PretrainedEncoder(**settings)
        stored, report = made.from_pretrained(
            source,
            config=_config(made, values),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    absent = {key for key in report["missing_keys"] if key.split(".")[0] != (FAMILIES[kind].unused or None)}
    absent |= {key for key, *_ in report["mismatched_keys"]}
    if absent:  # transformers has drawn them at random
        raise UserError(
            f"{source} lacks {len(absent)} tensors of a {kind} of this shape, the first {min(absent)}; needed the whole encoder"
        )
    encoder.network.load_state_dict(_needed(stored, kind).state_dict(), assign=True)
    return settings, encoder


@contextmanager
def _as_one_line(what: str) -> Iterator[None]:
    """What transformers and its config's own checks raise about a user's files."""
    strict = importlib.import_module("huggingface_hub.errors").StrictDataclassError
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error
    except (SafetensorError, strict) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error


def _values(transformers: ModuleType, made: type[nn.Module], said: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes the network, of its part for pictures where it has others; nothing else that config.json holds is used."""
    said = said.get(made.config_class.base_config_key) or said
    common = {field.name for field in fields(transformers.PreTrainedConfig)}
    shape = {field.name for field in fields(made.config_class)} - common
    known = made.config_class(**{key: value for key, value in said.items() if key in shape | {"qkv_bias"}})  # VideoMAE's old name
    return {key: value for key, value in vars(known).items() if key in shape and not key.startswith("_")}


def _seen_as(transformers: ModuleType, source: Path, kind: str) -> dict[str, Any]:
    """side_px, resample, mean and std as the preprocessor says, where it says nothing as transformers has it for this kind."""
    found = next((source / name for name in PREPROCESSOR if (source / name).is_file()), None)
    if found is None:
        raise UserError(f"{source} does not say how the model sees a picture; needed one of {', '.join(PREPROCESSOR)}")
    said = _json(found)
    said = said.get("image_processor") or said.get("video_processor") or said
    said = getattr(transformers, FAMILIES[kind].processor)().to_dict() | said
    if not said["do_rescale"] or not math.isclose(said["rescale_factor"], 1 / 255, rel_tol=1e-3):
        raise UserError(f"{found}: do_rescale = {said['do_rescale']}, rescale_factor = {said['rescale_factor']}; needed 1 / 255")
    if said["resample"] not in RESAMPLE:
        raise UserError(f"{found}: resample = {said['resample']}; needed 2 (bilinear) or 3 (bicubic)")
    mean, std = (tuple(map(float, said[key])) for key in ("image_mean", "image_std"))
    if not (len(mean) == len(std) == 3 and min(std) > 0):
        raise UserError(
            f"{found}: image_mean = {mean}, image_std = {std}; needed a number for each of three channels, std above 0"
        )
    if not said["do_normalize"]:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return {"side_px": _side(said, found), "resample": RESAMPLE[said["resample"]], "mean": mean, "std": std}


def _side(said: Mapping[str, Any], found: Path) -> int:
    """Of the square that the network is shown: of the crop, where one is cut out; clips come cut to size already."""
    if "max_num_patches" in said:
        return said["patch_size"] * math.isqrt(said["max_num_patches"])
    size = said["crop_size"] if said.get("do_center_crop") else said["size"]
    sides = {size} if isinstance(size, int) else set(size.values())
    if len(sides) != 1:
        raise UserError(f"{found}: pictures of {size}; needed squares")
    return sides.pop()


def _folder(asked: Pretrained, key: str) -> Path:
    """Where the model's files lie; those of the hub are downloaded once, to its cache."""
    if not asked.revision:
        if not Path(asked.source).is_dir():
            raise UserError(
                f"{key}: no folder {asked.source}; needed a folder, or a model of the hub with its commit as Pretrained.revision"
            )
        return Path(asked.source)
    if not re.fullmatch("[0-9a-f]{40}", asked.revision):
        raise UserError(f"{key}.Pretrained.revision = {asked.revision!r}; needed a commit of 40 hex digits, or '' for a folder")
    _transformers()
    hub = importlib.import_module("huggingface_hub")
    wanted = [CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", *PREPROCESSOR]
    try:
        return Path(hub.snapshot_download(asked.source, revision=asked.revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # what huggingface_hub raises is one of both
        raise UserError(
            f"{key}: {asked.source} at {asked.revision[:12]} cannot be downloaded ({' '.join(str(error).split())[:200]}); "
            "or copy its files to a folder, set Pretrained.source to it and Pretrained.revision to ''"
        ) from error


def _files(source: Path) -> list[Path]:
    return sorted({*source.glob(WEIGHTS), *(source / name for name in (CONFIG, *PREPROCESSOR) if (source / name).is_file())})


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; needed settings")
    return content
