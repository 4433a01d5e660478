"""Checkpoint folder -> encoder, of this project or published by others."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from scaling4d.encoders.load import load_model
from scaling4d.encoders.published import MODELS as PUBLISHED
from scaling4d.mae.models import MODELS, encoder_of


def load_encoder(folder: Path) -> nn.Module:
    """The encoder of a Checkpoint folder. Raises UserError: as load_model and PretrainedEncoder."""
    return encoder_of(load_model(folder, MODELS | PUBLISHED))
