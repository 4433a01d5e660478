"""The Checkpoint folder: model.safetensors, config.json as on the Hugging Face hub, operative_config.gin,
provenance.json.

Weights of more than SHARD_BYTES are several files, `model-00001-of-00018.safetensors` ..., in transformers' layout:
model.safetensors.index.json names the file of every tensor. It has the sha256 of every file, so its own stands for all.
`training.resume` has the states from which a killed run continues.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scaling4d.artifacts import sha256
from scaling4d.config import check_types
from scaling4d.records import UserError, read_json_object, shortened, write_json

if TYPE_CHECKING:
    import torch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of a file of weights, unless a single tensor is larger; huggingface_hub's default

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """Description of a folder of weights.

    model: name of its class. settings: of the class's config. parameters: of the encoder that readouts use.
    step, clips_seen: 0 without training. rate_hz: frames per second of the clips; None, and not in config.json: not
    told there.
    """

    name: str
    model: str
    settings: Mapping[str, Any]
    parameters: int
    step: int
    clips_seen: int
    rate_hz: float | None = None

    def __post_init__(self) -> None:
        if self.rate_hz is not None and not self.rate_hz > 0:
            raise ValueError(f"rate_hz = {self.rate_hz}; needed more than 0, or none")

    def write(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        write_index(folder, weights, save_weights(folder, weights, weights.__getitem__))
        self.write_config(folder)

    def write_config(self, folder: Path) -> None:
        write_json(folder / "config.json", {key: value for key, value in asdict(self).items() if value is not None})

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """The description in a folder. Raises UserError: not a Checkpoint folder."""
        path = folder / "config.json"
        if not path.is_file() or not weights_identity(folder).is_file():
            raise UserError(f"{folder} is not a checkpoint: needed config.json and {WEIGHTS}")
        return read_description(path, cls, "a checkpoint")


def read_description(path: Path, cls: type[T], what: str) -> T:
    """A dataclass that was written as JSON, checked by its annotations. Raises UserError: the file describes none."""
    try:
        content = read_json_object(path)
        check_types(cls, content)
        return cls(**content)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe {what}: {shortened(error)}") from error


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file that all may read whom the umask lets. Raises UserError: no space, or no permission."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path)
        path.chmod(0o666 & ~_umask())  # the library writes a temporary file, which its owner alone may read
    except SafetensorError as error:
        raise UserError(f"{path} cannot be written: {error}; free space there, and run the same command again") from error


def _umask() -> int:
    os.umask(umask := os.umask(0o022))  # it can only be read by setting it
    return umask


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file by name. Raises UserError: the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def save_weights(
    folder: Path, state: Mapping[str, torch.Tensor], full_tensor: Callable[[str], torch.Tensor], *, rank: int = 0, ranks: int = 1
) -> dict[str, str]:
    """Write a rank's share of a model's files of weights. A rank holds the tensors of one file at once.

    Args:
        state: all tensors, plain or sharded, in the same order on every rank.
        full_tensor: a whole tensor by its name. Every rank calls it for every tensor in the same order.
    Returns:
        The sha256 of this rank's files by name, for `write_index`; empty where one file holds all.
    Raises:
        UserError: no space, or no permission.
    """
    files, shas = list(_split(state).items()), {}
    for first in range(0, len(files), ranks):  # as many files as ranks at a time
        own = {}
        for owner, (_, names) in enumerate(files[first : first + ranks]):
            for name in names:
                tensor = full_tensor(name)
                if owner == rank:
                    own[name] = tensor.cpu()
        if first + rank < len(files):
            path = folder / files[first + rank][0]
            save_tensors(path, own)
            shas |= {path.name: sha256(path)} if len(files) > 1 else {}
    return shas


def write_index(folder: Path, state: Mapping[str, torch.Tensor], shas: Mapping[str, str]) -> None:
    """Write INDEX, if there are several files. shas: sha256 of each."""
    if shas:
        total_bytes = sum(value.nbytes for value in state.values())
        weight_map = {name: file for file, names in _split(state).items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes, "sha256": dict(shas)}, "weight_map": weight_map})


def _split(state: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """File -> names of its tensors, in order: WEIGHTS, or files of at most SHARD_BYTES."""
    groups, size = [[]], 0
    for name, tensor in state.items():
        size += tensor.nbytes
        if groups[-1] and size > SHARD_BYTES:
            groups.append([])
            size = tensor.nbytes
        groups[-1].append(name)
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, 1)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Checkpoint folder by name. Raises UserError: a file is missing or damaged."""
    return {name: tensor for path in weights_files(folder) for name, tensor in load_tensors(path).items()}


def weights_files(folder: Path) -> list[Path]:
    """Paths of WEIGHTS, or of the files that INDEX names. Raises UserError: one is missing, or INDEX is damaged."""
    index = weights_identity(folder)
    if index.name == WEIGHTS:
        return [index]
    try:
        names = sorted(set(read_json_object(index)["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("weight_map does not name files beside it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {shortened(error)}") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        problem = f"{folder} lacks {', '.join(missing)} of the {len(names)} files that {INDEX} names"
        raise UserError(f"{problem}; fetch or train the checkpoint again")
    return [folder / name for name in names]


def weights_identity(folder: Path) -> Path:
    """The file whose hash stands for all weights: WEIGHTS, or INDEX where there are several files."""
    index = folder / INDEX
    return index if index.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def weights_sha256(folder: Path) -> str:
    return sha256(weights_identity(folder))
