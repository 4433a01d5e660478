"""Checkpoint folder -> encoder, of this project or of transformers."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from scaling4d.encoders.load import load_model
from scaling4d.encoders.transformers import PretrainedEncoder
from scaling4d.mae.models import MODELS, encoder_of
from scaling4d.records import UserError


def load_encoder(folder: Path) -> nn.Module:
    """The encoder of a Checkpoint folder. Raises UserError: as load_model and PretrainedEncoder."""
    return encoder_of(load_model(folder, MODELS | {PretrainedEncoder.__name__: PretrainedEncoder}))


def load(checkpoint: str | Path) -> nn.Module:
    """The encoder of a Checkpoint folder or of a model in artifacts/<profile>/pretrain by its name, in evaluation mode.

    It has `features(pixels)`, pixels `B T H W 3` uint8 or float in 0..1 -> a list of layers `B N D`; `resize((T, H,
    W))` for clips of another size; and `width`, `depth`, `grid`, `clip`.

    Raises UserError: no such checkpoint, or weights that do not fit its config.json.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        folders = sorted(Path("artifacts").glob("*/pretrain/*"))
        matches = [path for path in folders if path.name == str(checkpoint)]
        if len(matches) != 1:
            names = ", ".join(map(str, matches or folders)) or "none here"
            raise UserError(f"{len(matches)} checkpoints are called {str(checkpoint)!r}; needed a folder, such as {names}")
        (folder,) = matches
    return load_encoder(folder).eval()
