"""Checkpoint folder -> encoder, of this project or published by others."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from scaling4d.encoders.load import load_model
from scaling4d.encoders.published import MODELS as PUBLISHED
from scaling4d.encoders.transformers import PretrainedEncoder
from scaling4d.mae.models import MODELS, encoder_of


def load_encoder(folder: Path, *, frames: int = 0, side_px: int = 0) -> nn.Module:
    """The encoder of a Checkpoint folder, resized to clips by `set_clip`.

    Raises UserError: as load_model, PretrainedEncoder and set_clip.
    """
    encoder = encoder_of(load_model(folder, MODELS | PUBLISHED))
    set_clip(encoder, frames=frames, side_px=side_px)
    return encoder


def set_clip(encoder: nn.Module, *, frames: int = 0, side_px: int = 0) -> None:
    """Let an encoder take clips of `frames` pictures of `side_px` squared from now on; 0: as many as before.

    Learned positions are interpolated (of 4DS as in the official demo); see `resize` of each encoder. A published one
    then sees pictures of this side: it does not resize them to its own.
    Raises UserError: the encoder does not take such clips.
    """
    if not (frames or side_px):
        return
    clip = (frames or encoder.clip[0], *((side_px, side_px) if side_px else encoder.clip[1:]))
    if isinstance(encoder, PretrainedEncoder):
        encoder.resize(clip, side_px or None)
    else:
        encoder.resize(clip)
