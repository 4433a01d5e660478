"""The Checkpoint folder: model.safetensors, config.json as on the Hugging Face hub, operative_config.gin,
provenance.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scaling4d.artifacts import sha256
from scaling4d.config import check_types
from scaling4d.records import UserError, read_json_object, shortened, write_json

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"

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
        save_tensors(folder / WEIGHTS, weights)
        self.write_config(folder)

    def write_config(self, folder: Path) -> None:
        write_json(folder / "config.json", {key: value for key, value in asdict(self).items() if value is not None})

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Raises UserError: not a Checkpoint folder."""
        path = folder / "config.json"
        if not path.is_file() or not (folder / WEIGHTS).is_file():
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
    """Raises UserError: the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / WEIGHTS)


def weights_sha256(folder: Path) -> str:
    return sha256(folder / WEIGHTS)
