"""Features of clips at a fraction of an encoder's depth, in memory or in a store on disk."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scaling4d import artifacts
from scaling4d.checkpoint import Checkpoint, save_tensors, weights_sha256
from scaling4d.mae.device import to_device
from scaling4d.pipeline import code_hashes
from scaling4d.provenance import work_folder

DEPTH_FRACTION = 0.95  # of the depth, where the readouts of 4DS read: depth demo of its released code
SHARD_BYTES = 2**28
CLIPS = "clips"  # the tensor of a shard that names its clips, uint8 `n 32`
MODELS = ("scaling4d.mae", "scaling4d.encoders")  # modules whose code features depend on


def layer_index(*, depth: int, fraction: float = DEPTH_FRACTION) -> int:
    """Entry of the encoder's feature list at a fraction of its depth; the list has depth + 1 entries.

    Source: the released EncoderToReadout, int(len * fraction) - 1; so 0.95 of 12 blocks is the state after 10.
    """
    return max(int((depth + 1) * fraction) - 1, 0)


def features_at_depth(encoder: nn.Module, pixels: Tensor, fraction: float = DEPTH_FRACTION) -> Tensor:
    """uint8 `B T H W C` on the encoder's device -> float32 features `B t h*w D` at a fraction of its depth."""
    index = layer_index(depth=encoder.depth, fraction=fraction)
    return split_time(encoder.features(pixels, index + 1)[index], encoder.grid).float()


def split_time(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """`B N D` -> `B t n D`."""
    t, h, w = grid
    return x.reshape(x.shape[0], t, h * w, x.shape[-1])


def stored_features(encoder: nn.Module, clips: int, windows: int, *, draws: int) -> tuple[int, float]:
    """Bytes of the features of `windows` windows of each clip, and the share of a training's draws that take one again.

    The training takes window e modulo `windows` of every clip in epoch e, so that all are drawn before one is again.
    """
    stored = clips * windows
    return 4 * math.prod(encoder.grid) * encoder.width * stored, max(1 - stored / draws, 0.0)


class FeatureEncoder(nn.Module):
    """An encoder with a forward pass that ends at DEPTH_FRACTION, for training.parallelize.

    Takes uint8 `B T H W C`, returns float32 `B t n D`.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return features_at_depth(self.encoder, pixels)


class MemoryFeatures:
    """Features of clips in the CPU's memory. A key stands for a clip.

    The CPU reads the next clips while the device computes a pass.
    Args:
        model: a FeatureEncoder on its device. batch: clips of a pass; sums may have other last bits in another batch.
        collective: FSDP needs all ranks in each pass. A rank without clips then takes part with a black one, and every
            rank calls `flush` after the last clip of a split.
    """

    def __init__(self, model: nn.Module, *, device: str = "cpu", batch: int = 1, collective: bool = False) -> None:
        self.model, self.device, self.batch, self.collective = model, device, batch, collective
        self.waiting: dict[int | bytes, Tensor] = {}  # clip -> pixels of the next pass
        self.computing: tuple[list[int | bytes], Tensor] = [], torch.empty(0)  # clips of the last pass, features on the device
        self.new: dict[int | bytes, Tensor] = {}  # clip -> features
        self.added = 0

    def add(self, pixels: Tensor) -> int | bytes:
        """One clip, uint8 `T H W C` on the CPU -> its key. Its features are there after `flush`."""
        self.added += 1
        self._wait_for_pass(self.added, pixels)
        return self.added

    def _wait_for_pass(self, clip: int | bytes, pixels: Tensor) -> None:
        self.waiting[clip] = pixels
        if len(self.waiting) == self.batch:
            self._compute_waiting()

    def _compute_waiting(self) -> None:
        features = self._compute(list(self.waiting.values()))
        self._fetch()
        self.computing, self.waiting = ([*self.waiting], features), {}

    def _fetch(self) -> None:
        """Take the features of the last pass from the device."""
        clips, features = self.computing
        self.new |= dict(zip(clips, features.cpu(), strict=True))
        self.computing = [], features[:0]

    @torch.no_grad()
    def _compute(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips -> features `B t n D` on the device."""
        if self.collective:
            self._any_rank_has_clips(True)
        return self.model(to_device(torch.stack(list(clips)), self.device))

    def _any_rank_has_clips(self, answer: bool) -> bool:
        answers = torch.tensor(int(answer))
        dist.all_reduce(answers, dist.ReduceOp.MAX)
        return bool(answers)

    @torch.no_grad()
    def flush(self) -> None:
        """After the last clip of a split: compute the rest, and take part in the passes of other ranks."""
        if self.waiting:
            self._compute_waiting()
        self._fetch()
        while self.collective and self._any_rank_has_clips(False):
            self.model(torch.zeros(1, *self.model.encoder.clip, 3, dtype=torch.uint8, device=self.device))

    def stack(self, keys: Sequence[int | bytes]) -> Tensor:
        """float32 `B t n D` on the CPU."""
        return torch.stack([self.new[key] for key in keys])

    def encode(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips, uint8 `T H W C` on the CPU -> float32 `B t n D` on the device. They are not kept."""
        return torch.cat([self._compute(clips[first : first + self.batch]) for first in range(0, len(clips), self.batch)])


class FeatureStore(MemoryFeatures):
    """Features of one layer of one encoder, in shards on disk that all readouts share.

    Shards are mapped into memory, so a split may be larger than memory. A clip's key is the sha256 of its pixels. A
    shard's name is the sha256 of its bytes, checked at first use. Every process writes its own shards, so any number
    may share a folder.

    Args:
        folder: of the store; a subfolder depends on weights, config.json, the models' code, library versions, device,
            compute type, batch and the size of clips.
        checkpoint: the encoder's Checkpoint folder. compute: dtype of the pass; features are float32. Others: as of
            MemoryFeatures.
    """

    def __init__(self, folder: Path, checkpoint: Path, model: FeatureEncoder, *, compute: str = "float32", **passes: Any) -> None:
        super().__init__(model, **passes)
        modules = code_hashes.running("encoders")["modules"]
        code = {name: digest for name, digest in modules.items() if name.startswith(MODELS)}
        libraries = ("torch", "transformers") if Checkpoint.read(checkpoint).model == "PretrainedEncoder" else ("torch",)
        versions = {name: metadata.version(name) for name in libraries}
        made_by = [weights_sha256(checkpoint), artifacts.sha256(checkpoint / "config.json"), code, versions]
        made_by += [self.device, compute, self.batch, model.encoder.clip, model.encoder.grid]
        self.folder = folder / hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
        self.layer = str(layer_index(depth=model.encoder.depth))  # its tensor in a shard, `n t n D`
        self.places: dict[bytes, tuple[Path, int]] = {}  # clip -> shard and row
        self.mapped: dict[Path, Tensor] = {}  # shards in use -> features
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                shard = load_file(path)  # maps it into memory
                clips = shard[CLIPS].numpy() if self.layer in shard else ()
            except (SafetensorError, KeyError):
                self._drop(path)
            else:
                self.places |= {clip.tobytes(): (path, row) for row, clip in enumerate(clips)}

    def _drop(self, path: Path) -> None:
        warnings.warn(f"{path} is damaged; its clips are computed again", stacklevel=2)
        self.places = {clip: place for clip, place in self.places.items() if place[0] != path}

    def _has(self, clip: bytes) -> bool:
        """Whether the clip is here, in an intact shard."""
        if clip in self.new or clip not in self.places:
            return clip in self.new
        path, _ = self.places[clip]
        if path not in self.mapped:
            if artifacts.sha256(path) != path.stem:
                self._drop(path)
                return False
            self.mapped[path] = load_file(path)[self.layer]
        return True

    def add(self, pixels: Tensor) -> bytes:
        clip = hashlib.sha256(pixels.contiguous().numpy()).digest()
        if clip not in self.waiting and clip not in self.computing[0] and not self._has(clip):
            self._wait_for_pass(clip, pixels)
        return clip

    def _fetch(self) -> None:
        super()._fetch()
        if sum(features.nbytes for features in self.new.values()) >= SHARD_BYTES:
            self._write()

    def stack(self, keys: Sequence[bytes]) -> Tensor:
        features = []
        for key in keys:
            path, row = self.places.get(key, (None, None))
            features.append(self.new[key] if path is None else self.mapped[path][row])
        return torch.stack(features)

    def encode(self, clips: Sequence[Tensor]) -> Tensor:
        """As of MemoryFeatures, and they are kept."""
        keys = [self.add(clip) for clip in clips]
        if self.waiting:
            self._compute_waiting()
        self._fetch()
        return to_device(self.stack(keys), self.device)

    def flush(self) -> None:
        super().flush()
        self._write()

    def _write(self) -> None:
        """Write the new features as a shard."""
        if not self.new:
            return
        shard = {self.layer: torch.stack(list(self.new.values()))}
        shard[CLIPS] = torch.from_numpy(np.frombuffer(b"".join(self.new), np.uint8).reshape(-1, 32).copy())
        with work_folder("shard", self.folder) as partial:  # of no other process or machine
            file = partial / "shard"
            save_tensors(file, shard)
            final = self.folder / f"{artifacts.sha256(file)}.safetensors"
            file.rename(final)
        self.mapped[final] = load_file(final)[self.layer]
        self.places |= {clip: (final, row) for row, clip in enumerate(self.new)}
        self.new = {}
