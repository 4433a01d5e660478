"""CLIPS -> FEATURES, once: what a frozen encoder says of a clip, kept on disk for all heads, tasks, depths and seeds."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scaling4d import artifacts
from scaling4d.checkpoint import load_tensors, save_tensors, weights_sha256
from scaling4d.readout.features import in_time
from scaling4d.records import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_BYTES = 2**28
CODE = Path("artifacts/code/readout.json")
MODELS = ("scaling4d.mae", "scaling4d.readout.pretrained")  # whose code features depend on
CLIPS = "clips"  # the tensor of a shard that names its clips, uint8 `n 32`


class Store:
    """Features of one encoder, in shards that are mapped into memory, not read: a split may be larger than it.

    A clip is known by the sha256 of its pixels, a shard by that of its bytes. Every process writes shards of its own, so any
    number of them may share a folder. layers: entries of the encoder's list of features that are kept of a new clip; wanted: the
    one that readouts are given.
    """

    def __init__(self, folder: Path, encoder: nn.Module, *, layers: Sequence[int], wanted: int, dtype: torch.dtype) -> None:
        self.folder, self.encoder, self.wanted, self.dtype = folder, encoder, wanted, dtype
        self.layers = sorted({*layers, wanted})
        self.kept: dict[bytes, dict[int, Tensor]] = {}  # clip -> layer -> features, mapped
        self.new: dict[bytes, dict[int, Tensor]] = {}  # not on disk yet
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.safetensors")):
            self._take_in(path)

    def _take_in(self, path: Path) -> None:
        if artifacts.sha256(path) != path.stem:
            warnings.warn(f"{path} is damaged; its clips are computed again", stacklevel=2)
            return
        shard = load_tensors(path)
        for row, clip in enumerate(shard.pop(CLIPS).numpy()):
            self.kept.setdefault(clip.tobytes(), {}).update({int(layer): rows[row] for layer, rows in shard.items()})

    @torch.no_grad()
    def add(self, pixels: Tensor) -> bytes:
        """One clip, uint8 `T H W C`: the encoder sees it if it is not here. Returns its name."""
        clip = hashlib.sha256(pixels.contiguous().numpy()).digest()
        if self.wanted not in self.kept.get(clip, {}) and clip not in self.new:
            layers = self.encoder.features(pixels[None], self.layers[-1] + 1)
            self.new[clip] = {index: in_time(layers[index], self.encoder.grid)[0].to(self.dtype) for index in self.layers}
            if sum(rows.nbytes for rows in self.new[clip].values()) * len(self.new) >= SHARD_BYTES:
                self.flush()
        return clip

    def ready(self, added: list[bytes]) -> list[Tensor]:
        """Features `t n D` of the wanted layer, where they lie on disk."""
        self.flush()
        return [self.kept[clip][self.wanted] for clip in added]

    def flush(self) -> None:
        """Write what is new as a shard."""
        if not self.new:
            return
        shard = {str(layer): torch.stack([rows[layer] for rows in self.new.values()]) for layer in self.layers}
        shard[CLIPS] = torch.from_numpy(np.frombuffer(b"".join(self.new), np.uint8).reshape(-1, 32).copy())
        partial = self.folder / f"partial-{os.getpid()}"
        save_tensors(partial, shard)
        final = self.folder / f"{artifacts.sha256(partial)}.safetensors"
        partial.rename(final)
        self.new = {}
        self._take_in(final)


def opened(store: Path, folder: Path, encoder: nn.Module, *, layers: Sequence[int], wanted: int, dtype: str) -> Store:
    """Features of a Checkpoint folder's encoder, in a folder of `store` that its weights, the models' code and the dtype name.

    Raises:
        UserError: no such dtype.
    """
    if dtype not in DTYPES:
        raise UserError(
            f"feature_dtype = {dtype!r}; needed one of {', '.join(DTYPES)}; set readout.shared.Evaluation.feature_dtype"
        )
    modules = json.loads(CODE.read_text())["modules"] if CODE.is_file() else {}
    models = {name: digest for name, digest in modules.items() if name.startswith(MODELS)}
    made_by = [weights_sha256(folder), artifacts.sha256(folder / "config.json"), models, dtype]
    name = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    return Store(store / name, encoder, layers=layers, wanted=wanted, dtype=DTYPES[dtype])
