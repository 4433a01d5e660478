"""CLIPS -> FEATURES, once: what a frozen encoder says of a clip, kept on disk for all heads, tasks, depths and seeds."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scaling4d import artifacts
from scaling4d.checkpoint import Checkpoint, save_tensors, weights_sha256
from scaling4d.encoders.features import in_time
from scaling4d.encoders.pretrained import PretrainedEncoder
from scaling4d.records import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARD_BYTES = 2**28
CODE = Path("artifacts/code/readout.json")
MODELS = ("scaling4d.mae", "scaling4d.encoders.pretrained")  # whose code features depend on
CLIPS = "clips"  # the tensor of a shard that names its clips, uint8 `n 32`
LIBRARIES = {PretrainedEncoder.__name__: ("torch", "transformers")}  # that compute an encoder's features; others: torch


class Store:
    """Features of one encoder, in shards that are mapped into memory, not read: a split may be larger than it.

    A clip is known by the sha256 of its pixels, a shard by that of its bytes, which is checked when the shard is first used.
    Every process writes shards of its own, so any number of them may share a folder. layers: entries of the encoder's list of
    features that are kept of a new clip; wanted: the one that readouts are given.
    """

    def __init__(self, folder: Path, encoder: nn.Module, *, layers: Sequence[int], wanted: int, dtype: torch.dtype) -> None:
        self.folder, self.encoder, self.wanted, self.dtype = folder, encoder, wanted, dtype
        self.layers = sorted({*layers, wanted})
        self.places: dict[bytes, tuple[Path, int]] = {}  # clip -> shard and row
        self.mapped: dict[Path, Tensor] = {}  # shards in use -> features `n t n D`
        self.new: dict[bytes, dict[int, Tensor]] = {}  # not on disk yet
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.safetensors")):
            self._note(path)

    def _note(self, path: Path) -> None:
        """Which clips a shard has, if it has the wanted layer."""
        try:
            with safe_open(path, "pt") as shard:
                clips = shard.get_tensor(CLIPS).numpy() if str(self.wanted) in shard.keys() else ()  # noqa: SIM118
        except SafetensorError:
            self._leave_out(path)
        else:
            self.places |= {clip.tobytes(): (path, row) for row, clip in enumerate(clips)}

    def _leave_out(self, path: Path) -> None:
        warnings.warn(f"{path} is damaged; its clips are computed again", stacklevel=2)
        self.places = {clip: place for clip, place in self.places.items() if place[0] != path}

    def _has(self, clip: bytes) -> bool:
        """Whether its features are here, in a shard that is whole."""
        if clip in self.new:
            return True
        if clip not in self.places:
            return False
        path, _ = self.places[clip]
        if path not in self.mapped:
            if artifacts.sha256(path) != path.stem:
                self._leave_out(path)
                return False
            self._map(path)
        return True

    def _map(self, path: Path) -> None:
        with safe_open(path, "pt") as shard:
            self.mapped[path] = shard.get_tensor(str(self.wanted))

    @torch.no_grad()
    def add(self, pixels: Tensor) -> bytes:
        """One clip, uint8 `T H W C`: the encoder sees it if it is not here. Returns its name."""
        clip = hashlib.sha256(pixels.contiguous().numpy()).digest()
        if not self._has(clip):
            layers = self.encoder.features(pixels[None], self.layers[-1] + 1)
            self.new[clip] = {index: in_time(layers[index], self.encoder.grid)[0].to(self.dtype) for index in self.layers}
            if sum(rows.nbytes for rows in self.new[clip].values()) * len(self.new) >= SHARD_BYTES:
                self.flush()
        return clip

    def of(self, clip: bytes) -> Tensor:
        """Features `t n D` of the wanted layer of a clip that was added, where they lie."""
        if clip in self.new:
            return self.new[clip][self.wanted]
        path, row = self.places[clip]
        return self.mapped[path][row]

    def ready(self, added: list[bytes]) -> Stored:
        return Stored(self, added)

    def flush(self) -> None:
        """Write what is new as a shard."""
        if not self.new:
            return
        shard = {str(layer): torch.stack([rows[layer] for rows in self.new.values()]) for layer in self.layers}
        shard[CLIPS] = torch.from_numpy(np.frombuffer(b"".join(self.new), np.uint8).reshape(-1, 32).copy())
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="partial-") as partial:  # of no other process or machine
            whole = Path(partial, "shard")
            save_tensors(whole, shard)
            final = self.folder / f"{artifacts.sha256(whole)}.safetensors"
            whole.rename(final)
        self._note(final)
        self._map(final)
        self.new = {}


@dataclass(frozen=True)
class Stored(Sequence[Tensor]):
    """Features of clips of a store, which are looked up when they are used."""

    store: Store
    clips: list[bytes]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Tensor:
        return self.store.of(self.clips[index])


def opened(store: Path, folder: Path, encoder: nn.Module, *, layers: Sequence[int], wanted: int, dtype: str) -> Store:
    """Features of a Checkpoint folder's encoder, in a folder of `store` whose name depends on its weights, the models' code, the
    libraries' versions and the dtype.

    Raises:
        UserError: no such dtype.
    """
    if dtype not in DTYPES:
        raise UserError(
            f"feature_dtype = {dtype!r}; needed one of {', '.join(DTYPES)}; set readout.shared.Evaluation.feature_dtype"
        )
    modules = json.loads(CODE.read_text())["modules"] if CODE.is_file() else {}
    models = {name: digest for name, digest in modules.items() if name.startswith(MODELS)}
    libraries = {name: metadata.version(name) for name in LIBRARIES.get(Checkpoint.read(folder).model, ("torch",))}
    made_by = [weights_sha256(folder), artifacts.sha256(folder / "config.json"), models, libraries, dtype]
    name = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    return Store(store / name, encoder, layers=layers, wanted=wanted, dtype=DTYPES[dtype])
