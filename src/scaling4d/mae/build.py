"""Checkpoint folders <-> models."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from scaling4d import checkpoint
from scaling4d.checkpoint import Checkpoint
from scaling4d.mae.encoder import PixelTokens
from scaling4d.mae.mae_st import MAEST
from scaling4d.mae.simple_mae import SimpleMAE
from scaling4d.records import UserError

METHODS: dict[str, type[nn.Module]] = {"SimpleMAE": SimpleMAE, "MAEST": MAEST}


def load(folder: Path) -> nn.Module:
    """The model of a Checkpoint folder, with its weights.

    Raises:
        UserError: not a checkpoint, an unknown model, or weights of another shape.
    """
    saved = Checkpoint.read(folder)
    models = METHODS | {"PixelTokens": PixelTokens}
    if saved.model not in models:
        raise UserError(f"{folder}: unknown model {saved.model!r}; needed one of {', '.join(models)}")
    model = models[saved.model](**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.settings.items()})
    try:
        model.load_state_dict(checkpoint.weights(folder))
    except RuntimeError as error:
        raise UserError(f"{folder}: weights do not fit {saved.model}: {' '.join(str(error).split())}") from error
    return model


def encoder_of(model: nn.Module) -> nn.Module:
    """The part that readouts use: `features(pixels)`, `width`, `depth`, `grid`, `clip`."""
    return model if isinstance(model, PixelTokens) else model.encoder
