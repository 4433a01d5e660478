"""Checkpoint folder -> model of this project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaling4d import checkpoint
from scaling4d.checkpoint import Checkpoint
from scaling4d.mae.models import MODELS, config_of
from scaling4d.records import UserError, as_user_error, shortened


def load_model(folder: Path, models: Mapping[str, type[nn.Module]] = MODELS) -> nn.Module:
    """The model of a Checkpoint folder, with its weights. Raises UserError: as build_model, or other shapes."""
    model, _ = build_model(folder, models)
    try:
        model.load_state_dict(checkpoint.weights(folder), assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: weights do not fit {type(model).__name__}: {shortened(error)}") from error
    return model


def build_model(folder: Path, models: Mapping[str, type[nn.Module]] = MODELS) -> tuple[nn.Module, Any]:
    """The model of a Checkpoint folder on the meta device, without weights, and its config.

    models: classes that the folder may name; each has a `config_class`.
    Raises UserError: not a checkpoint, an unknown model, or settings of another version.
    """
    saved = Checkpoint.read(folder)
    if saved.model not in models:
        raise UserError(f"{folder}: unknown model {saved.model!r}; needed one of {', '.join(models)}")
    with as_user_error(f"{folder}: config.json is not that of a {saved.model} of this version"):
        config = config_of(models[saved.model], saved.settings)
        with torch.device("meta"):
            return models[saved.model](config), config
