"""Checkpoint folders <-> models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from scaling4d import checkpoint
from scaling4d.checkpoint import Checkpoint
from scaling4d.mae.distilled import Distilled
from scaling4d.mae.encoder import Encoder, PixelTokens
from scaling4d.mae.mae_st import MAEST, MAESTEncoder
from scaling4d.mae.simple_mae import SimpleMAE
from scaling4d.records import UserError

METHODS: dict[str, type[nn.Module]] = {"SimpleMAE": SimpleMAE, "MAEST": MAEST, "Distilled": Distilled}
ENCODERS: dict[str, type[nn.Module]] = {"Encoder": Encoder, "MAESTEncoder": MAESTEncoder, "PixelTokens": PixelTokens}


def load(folder: Path, models: Mapping[str, type[nn.Module]] = METHODS | ENCODERS) -> nn.Module:
    """The model of a Checkpoint folder, with its weights: one of `models` by their names. Holds one copy of the weights.

    Raises:
        UserError: not a checkpoint, an unknown model, or weights of another shape.
    """
    saved = Checkpoint.read(folder)
    if saved.model not in models:
        raise UserError(f"{folder}: unknown model {saved.model!r}; needed one of {', '.join(models)}")
    try:
        with torch.device("meta"):
            model = models[saved.model](**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.settings.items()})
    except TypeError as error:
        raise UserError(f"{folder}: config.json is not that of a {saved.model} of this version: {error}") from error
    try:
        model.load_state_dict(checkpoint.weights(folder), assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: weights do not fit {saved.model}: {' '.join(str(error).split())}") from error
    return model


def encoder_of(model: nn.Module) -> nn.Module:
    """The part that readouts use: `features(pixels)`, `width`, `depth`, `grid`, `clip`."""
    return getattr(model, "encoder", model)
