"""`scaling4d.Encoder`: an encoder by path or hub id, preprocessing for any video, and features as one output."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaling4d import artifacts
from scaling4d.checkpoint import Checkpoint, weights_identity, weights_sha256
from scaling4d.encoders import card, hub
from scaling4d.encoders.preprocess import ALIASED, BICUBIC, FITS, check_rate, check_video, pick_frames
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.encoders.published import MODELS as PUBLISHED
from scaling4d.encoders.published import import_published
from scaling4d.encoders.transformers import CONFIG, FILES, PretrainedEncoder, read_json, source_files
from scaling4d.mae.encoder import Backbone
from scaling4d.provenance import atomic_new
from scaling4d.records import UserError, as_user_error, file_system_errors, shortened, write_json
from scaling4d.video import read_video

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
HUB_FILES = (*FILES, artifacts.PROVENANCE)
EVERY_FOURTH_HZ = 7.5  # of about 30 frames a second, as Kinetics has them
RATES_HZ = {  # class of a released model, or its kind in transformers -> frames per second of its authors' clips
    "MAEST": EVERY_FOURTH_HZ,  # facebookresearch/mae_st, PRETRAIN.md, FINETUNE.md, util/kinetics.py
    "MAESTEncoder": EVERY_FOURTH_HZ,
    "VideoMAE2": EVERY_FOURTH_HZ,  # OpenGVLab/VideoMAEv2, docs/PRETRAIN.md, docs/FINETUNE.md
    "VJEPA": EVERY_FOURTH_HZ,  # facebookresearch/jepa, configs/pretrain, configs/evals
    "VJEPA21": 4.0,  # as V-JEPA 2: facebookresearch/vjepa2, configs/train
    "videomae": EVERY_FOURTH_HZ,  # as VideoMAE2
    "vjepa2": 4.0,
}  # of 4DS, RVM and VideoPrism none is published
CHANGED = "changed"  # stage of weights that were changed since they were loaded
SIZED = ("clip", "grid", "positions")  # attributes of a model that a resize changes
RESAMPLE = dict.fromkeys(("VideoMAE2", "VJEPA", "VJEPA21"), ALIASED)  # their code resizes by OpenCV, INTER_LINEAR


@dataclass(frozen=True)
class EncoderOutput:
    """Features of a batch of clips. N = t h w tokens of the patches, in this order; class tokens are left out.

    last_hidden_state: `B N D`, the output of the last block, before any final norm.
    hidden_states: depth + 1 tensors `B N D`. Of 4DS and MAE-ST, as the released 4DS code lists them: the embedded
    tokens, then the INPUT of each block, so [0] equals [1] and last_hidden_state is not among them. Of any other
    model: the embedded tokens, then the output of each block, so [-1] is last_hidden_state.
    pooled: `B D`, the mean of last_hidden_state over the tokens.
    lists_inputs: whether hidden_states has the input of each block, as of 4DS and MAE-ST.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]
    pooled: Tensor
    lists_inputs: bool

    @property
    def block_outputs(self) -> tuple[Tensor, ...]:
        """depth + 1 tensors `B N D` of any encoder: the embedded tokens, then the output of each block."""
        if self.lists_inputs:
            return (self.hidden_states[0], *self.hidden_states[2:], self.last_hidden_state)
        return self.hidden_states


class Encoder(nn.Module):
    """A frozen or trainable encoder of video: `encoder(encoder.preprocess(video))` gives an EncoderOutput.

    Attributes:
        model: the network, of this project (4DS, MAE-ST, raw pixels, RVM, VideoMAE v2, V-JEPA 1 and 2.1) or of
            transformers.
        checkpoint: its description, as in config.json. provenance: how it was made; empty: not known.
        rate_hz: frames per second of the clips that it was trained on, or evaluated at by its authors; None: not known,
            as of 4DS, RVM and models of pictures. It may be set.
        resample: filter with which `preprocess` resizes pictures, as the code or the preprocessor of a published model.
        clip: T H W of its clips. grid: t h w of its tokens. width: D. depth: number of blocks.
        device, dtype: of its weights.
        mean, scale: the encoder computes with (x - mean) * scale of pixels x in 0..1; a number, or one per channel.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, provenance: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model, self.checkpoint, self.provenance = model, checkpoint, dict(provenance or {})
        self.rate_hz = rate_hz_of(checkpoint, self.provenance)
        self._checksums = checksums(model.state_dict())  # of the weights that provenance describes
        self._donor = deepcopy(self.provenance), None  # provenance of these weights; their Checkpoint folder, if any
        self._native: dict[str, Any] = {}  # SIZED of the model before its first resize
        self.eval()

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, clip: tuple[int, int, int] | None = None
    ) -> Encoder:
        """An encoder in evaluation mode.

        Args:
            source: a Checkpoint folder, of this project or from `save_pretrained`; a folder of transformers
                (DINOv2 and v3, SigLIP 1 and 2, VideoMAE, V-JEPA 2, VideoPrism: extra `baselines`) or of VideoMAE v2;
                a released `.npz` of 4DS or RVM, `.pth` of MAE-ST or VideoMAE v2, `.pth.tar` of V-JEPA or `.pt` of
                V-JEPA 2.1; or `owner/name` or `owner/name@REVISION` on the Hugging Face hub (extra `hub`).
            revision: branch, tag or commit on the hub.
            clip: T H W of the clips that it is shown; default: the checkpoint's own.
        Raises:
            UserError: no such checkpoint, one that is damaged or of another kind, a missing package, or a clip that
                does not suit it.
        """
        clip = None if clip is None else check_clip(clip)
        path, name, hub_id = Path(source), Path(source).resolve().name, str(source)
        if not path.exists():
            if revision is not None and "@" in hub_id:
                raise UserError(f"{source} names a revision, and revision = {revision!r} another; needed one of them")
            if "@" in hub_id:
                hub_id, _, revision = hub_id.partition("@")
            if not re.fullmatch(HUB_ID, hub_id):
                raise UserError(f"no folder or file {source}; needed one, or owner/name of a model on the Hugging Face hub")
            name = hub_id.rpartition("/")[2]
            try:
                path = hub.download(hub_id, revision, HUB_FILES)
            except UserError as error:
                raise UserError(f"no folder {source} here, and {error}") from error
        elif revision is not None:
            raise UserError(f"revision = {revision!r} is of a model on the hub; {source} is on this disk: leave out revision")
        encoder = cls._from_folder(path, name, clip) if path.is_dir() else cls(*_released_file(path))
        folder = path if path.is_dir() and encoder.provenance else None
        if not encoder.provenance:
            local = path == Path(source)  # else of the hub's cache, which names a folder by its commit
            origin = {"source": name} if local else {"source": hub_id, "revision": path.name}
            inputs = {file.name: artifacts.sha256(file) for file in source_files(path)}
            encoder.provenance = {"stage": "import", "settings": origin, "inputs": inputs}
        encoder._donor = deepcopy(encoder.provenance), folder
        if clip is not None and clip != encoder.clip:
            encoder.resize(clip)
        return encoder

    @classmethod
    def _from_folder(cls, folder: Path, name: str, clip: tuple[int, int, int] | None) -> Encoder:
        if (folder / CONFIG).is_file() and "model_type" in read_json(folder / CONFIG):
            try:
                config, model = import_published(folder, clip)
            except ImportError as error:  # of a package that transformers needs
                raise UserError(f"{folder} cannot be read: needed the extra `baselines` ({shortened(error)})") from error
            return cls(model, _description(name, model, asdict(config)))
        path = folder / artifacts.PROVENANCE
        return cls(load_encoder(folder), Checkpoint.read(folder), read_json(path) if path.is_file() else {})

    @property
    def rate_hz(self) -> float | None:
        return self._rate_hz

    @rate_hz.setter
    def rate_hz(self, rate_hz: float | None) -> None:
        self._rate_hz = None if rate_hz is None else check_rate(rate_hz)

    @property
    def clip(self) -> tuple[int, int, int]:
        return self.model.clip

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.model.grid

    @property
    def width(self) -> int:
        return self.model.width

    @property
    def depth(self) -> int:
        return self.model.depth

    @property
    def device(self) -> torch.device:
        return next((weight.device for weight in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((weight.dtype for weight in self.parameters()), torch.float32)

    @property
    def mean(self) -> float | tuple[float, ...]:
        return self.model.pixel_mean

    @property
    def scale(self) -> float | tuple[float, ...]:
        return self.model.pixel_scale

    @property
    def resample(self) -> str:
        if self._is_transformers:
            return self.model.resample
        return RESAMPLE.get(type(self.model).__name__, BICUBIC)

    @property
    def _is_transformers(self) -> bool:
        return isinstance(self.model, PretrainedEncoder)

    def _apply(self, *arguments: Any, **options: Any) -> Encoder:
        """A cast of the weights leaves mean and deviation of transformers' models in float32."""
        pixels = {name: getattr(self.model, name) for name in ("mean", "std")} if self._is_transformers else {}
        super()._apply(*arguments, **options)
        for name, values in pixels.items():
            setattr(self.model, name, values.to(getattr(self.model, name).device))
        return self

    def read_video(self, path: str | Path, *, start_s: float = 0.0) -> np.ndarray:
        """The frames of one clip of a video file, at the encoder's rate: uint8 `T H W 3`, for `preprocess`.

        Raises UserError: rate_hz is not known, and as scaling4d.read_video.
        """
        if self.rate_hz is None:
            needed = "needed encoder.rate_hz, the frames per second that you choose"
            raise UserError(f"the checkpoint {self.checkpoint.name} does not tell its clips' rate; {needed}")
        try:
            return read_video(path, start_s=start_s, rate_hz=self.rate_hz, frames=self.clip[0])
        except UserError as error:
            fixes = "lower start_s, or call encoder.resize to take clips of fewer frames"
            raise UserError(str(error).replace("lower start_s or frames", fixes)) from error

    def preprocess(
        self, video: np.ndarray | Tensor | Sequence[np.ndarray | Tensor], *, rate_hz: float | None = None, fit: str = "crop"
    ) -> Tensor:
        """Video of any size -> clips `B T H W 3` of this encoder, uint8 or float32 in 0..1, on its device.

        Of a longer video the clip at its start is taken. The encoder itself normalises pixels.

        Args:
            video: `T H W 3` or `B T H W 3`, red, green and blue, uint8 or float in 0..1, numpy or torch; or a list of
                those.
            rate_hz: frames per second of the video; frames are then picked at the encoder's `rate_hz`. None: the video
                has as many frames as a clip.
            fit: "crop" cuts pictures to the clip's shape around their centre, "inner" to 7/8 of that, "pad" adds black
                bars; all then resize. "squash" resizes all of the picture, as the demos of 4DS and RVM do.
        Raises:
            UserError: no such video, too few frames, or another fit.
        """
        if fit not in FITS:
            raise UserError(f"fit = {fit!r}; needed {', '.join(FITS)}")
        videos = [check_video(one) for one in (video if isinstance(video, list | tuple) else [video])]
        if len({one.dtype for one in videos}) != 1:
            raise UserError("videos of a list are some uint8, some float; needed one type" if videos else "no video in the list")
        frames, height, width = self.clip
        rates = {"rate_hz": rate_hz, "encoder_rate_hz": self.rate_hz}
        clips = [FITS[fit](pick_frames(one, frames, **rates), height, width, self.resample) for one in videos]
        return torch.cat(clips).to(self.device)

    def forward(self, clips: Tensor) -> EncoderOutput:
        """Clips `B T H W 3`, as `preprocess` makes them, on any device -> features.

        Raises UserError: clips of another size, or what `preprocess` refuses.
        """
        pixels = check_video(clips).to(self.device)
        if (size := tuple(pixels.shape[1:4])) != self.clip:
            fix = f"encoder.preprocess(video) makes them, or encoder.resize({size}) takes clips of this size"
            raise UserError(f"clips T H W = {size}; this encoder takes {self.clip}: {fix}")
        if isinstance(self.model, Backbone):
            states = Backbone.features(self.model, pixels)  # with MAE-ST's class token, which blocks need
            states.append(self.model.blocks[-1](states[-1]))
            *hidden, last = [x[:, self.model.prefix_tokens :] for x in states]
        else:
            hidden = self.model.features(pixels)
            last = hidden[-1]
        return EncoderOutput(last, tuple(hidden), last.mean(1), lists_inputs=isinstance(self.model, Backbone))

    def step(self, frame: np.ndarray | Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One frame of a stream, of a recurrent encoder (RVM): features `B n D`, and the state for the next frame.

        Args:
            frame: `H W 3` or `B H W 3` of the clip's height and width, uint8 or float in 0..1.
            state: that after the frame before; None: the frame is the first.
        Raises:
            UserError: another encoder or size, or what `preprocess` refuses.
        """
        if not hasattr(self.model, "step"):
            raise UserError(f"a {type(self.model).__name__} takes clips, not single frames: encoder(clips)")
        if (axes := getattr(frame, "ndim", 4)) not in (3, 4):
            raise UserError(f"frame has {axes} axes; needed H W 3 or B H W 3")
        pixels = check_video(frame[None] if axes == 3 else frame)[0]
        if (size := tuple(pixels.shape[1:3])) != self.clip[1:]:
            raise UserError(f"frame H W = {size}; this encoder takes {self.clip[1:]}; encoder.resize(({self.clip[0]}, H, W))")
        return self.model.step(pixels.to(self.device), state)

    def resize(self, clip: tuple[int, int, int], *, side_px: int | None = None) -> None:
        """Take clips of another T H W from now on; learned positions are interpolated.

        Each call interpolates those of the checkpoint, or, where they were trained since, the present ones. They become
        new parameters, so an optimiser is made after it.
        side_px: of a model of transformers, which resizes every picture of a clip to a side of its own: another side.
        Raises UserError: the model does not take such clips, or such a side.
        """
        clip = check_clip(clip)
        if side_px is not None and not self._is_transformers:
            raise UserError(f"side_px = {side_px} is for models of transformers; this encoder takes a clip's own H W")
        device, present = self.device, {name: getattr(self.model, name) for name in SIZED if hasattr(self.model, name)}
        trained = {name: weight.requires_grad for name, weight in self.model.named_parameters()}
        untrained = checksums(self._positions()).items() <= self._checksums.items()
        if not (untrained and self._native):
            self._native = deepcopy(present)
        try:
            self._set_model(deepcopy(self._native))
            self.model.to(device).resize(clip, *(() if side_px is None else (side_px,)))
        except UserError:
            self._set_model(present)
            raise
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(trained[name])
        if untrained:
            self._checksums |= checksums(self._positions())

    def _set_model(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.model, name, value)

    def _positions(self) -> dict[str, Tensor]:
        """Positions of the model that are interpolated, by name."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name.split(".")[0] == "positions"}

    # ---- to disk and to the hub ----

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json, model.safetensors, provenance.json and a model card to a new folder.

        The folder holds the encoder alone, without a decoder, at its present clip and rate. Weights that were changed
        since they were loaded (trained, cast) have no steps and no clips there, and a provenance of stage `changed`
        with the sha256 of the files that were loaded, unless `provenance` was set anew.
        Raises UserError: the folder has files, or cannot be made.
        """
        folder = Path(folder)
        with file_system_errors(folder), suppress(FileExistsError, NotADirectoryError):  # atomic_new tells these
            folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            folder.rmdir()  # an empty one
        with atomic_new(folder) as out:
            out.mkdir()
            checkpoint, provenance = self._saved_description(), self.provenance
            if checksums(self.model.state_dict()) != self._checksums:
                checkpoint = replace(checkpoint, step=0, clips_seen=0)
                donor, loaded = self._donor
                if provenance == donor:
                    inputs = donor.get("inputs", {})
                    if loaded and loaded.is_dir():
                        inputs = {weights_identity(loaded).name: weights_sha256(loaded)}
                    provenance = {"stage": CHANGED, "settings": {"donor": checkpoint.name}, "inputs": inputs}
            checkpoint.write(out, self.model.state_dict())
            with as_user_error(f"{artifacts.PROVENANCE} of {checkpoint.name} is not one of scaling4d"):
                if provenance:
                    write_json(out / artifacts.PROVENANCE, provenance)
                card.write_model_card(out, checkpoint, provenance, mean=self.mean, scale=self.scale)
        return folder

    def push_to_hub(self, target: str, *, private: bool | None = None, commit_message: str = "Upload encoder") -> str:
        """Upload what `save_pretrained` writes to `owner/name` on the Hugging Face hub. Returns the model's address.

        Files of the same names there are replaced, README.md too; other files stay. So a model of more than 5 GB, whose
        weights are several files, needs a name under which no single file lies: that file would be read.
        private: of a new model.
        Raises UserError: no owner/name, no huggingface_hub, no network, no right to write there.
        """
        if not re.fullmatch(HUB_ID, target):
            raise UserError(f"{target} is no model of the Hugging Face hub; needed owner/name")
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary, "encoder"))
            return hub.upload(folder, target, private=private, message=commit_message)

    def _saved_description(self) -> Checkpoint:
        names = [field.name for field in fields(type(self.model).config_class)]
        settings = {name: value for name, value in self.checkpoint.settings.items() if name in names} | {"clip": self.clip}
        if self._is_transformers and (side := self.model.side_px) != settings["side_px"]:
            key = self.model.family.side_key  # of the values, where these have the side, too
            settings |= {"side_px": side, "values": settings["values"] | ({key: side} if key else {})}
        parameters = sum(weight.numel() for weight in self.model.parameters())
        changes = {"settings": settings, "parameters": parameters, "rate_hz": self.rate_hz}
        return replace(self.checkpoint, model=type(self.model).__name__, **changes)


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Type, shape and a sum of the bits of each tensor, weighted by their places; equal on every device."""
    sums = {}
    for name, tensor in tensors.items():
        bits = tensor.detach().flatten().clone().view(torch.uint8)  # a copy, for its alignment
        aligned = len(bits) // 8 * 8
        words = bits[:aligned].view(torch.int64)
        places = torch.arange(1, 1 + len(words), device=words.device)
        total = int((words * places).sum()) + int(bits[aligned:].sum())
        sums[name] = (str(tensor.dtype), tuple(tensor.shape), total)
    return sums


def check_clip(clip: object) -> tuple[int, int, int]:
    """T H W. Raises UserError: no three integers above 0."""
    sizes = tuple(clip) if isinstance(clip, Iterable) else ()
    if len(sizes) != 3 or not all(isinstance(size, Integral) and size > 0 for size in sizes):
        raise UserError(f"clip = {sizes or clip}; needed three integers T H W, each 1 or more")
    return tuple(map(int, sizes))


def rate_hz_of(checkpoint: Checkpoint, provenance: Mapping[str, Any]) -> float | None:
    """A checkpoint's rate. Of a released model whose folder tells none: that of RATES_HZ."""
    released = ("convert", "MAEST"), ("convert", "MAESTEncoder"), ("baseline", "MAESTEncoder")  # not an untrained MAEST
    made = provenance.get("stage"), checkpoint.model
    if checkpoint.rate_hz is None and (checkpoint.model in PUBLISHED or made in released):
        return RATES_HZ.get(checkpoint.settings.get("kind", checkpoint.model))
    return checkpoint.rate_hz


def _description(name: str, model: nn.Module, settings: Mapping[str, Any]) -> Checkpoint:
    parameters = sum(weight.numel() for weight in model.parameters())
    return Checkpoint(name, type(model).__name__, settings, parameters, step=0, clips_seen=0)


def _released_file(source: Path) -> tuple[nn.Module, Checkpoint, dict[str, Any]]:
    """The encoder in a released file, its description, and its provenance."""
    config, model = import_published(source)
    provenance = {"stage": "convert", "settings": {}, "inputs": {source.name: artifacts.sha256(source)}}
    return model, _description(Path(source.name.removesuffix(".tar")).stem, model, asdict(config)), provenance
