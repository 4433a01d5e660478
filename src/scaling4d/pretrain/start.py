"""Weights that a point starts from: those of a checkpoint, or random ones."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from scaling4d.encoders.load import load_model
from scaling4d.mae.encoder import Method, copy_to_param_
from scaling4d.mae.models import encoder_of
from scaling4d.records import UserError

SAME = ("width", "depth", "patch", "pixel_mean", "pixel_scale")  # of an encoder and the one it starts from


def start_weights(model: Method, folder: Path) -> dict[str, Tensor]:
    """Weights of a checkpoint by their names in the model: the encoder's, and others of the same name and shape.

    Positions are resized to the model's clips (mae.resize). A checkpoint of the same method gives its decoder and its
    coarse tokens too. A released encoder has none, and they start at random.
    Raises UserError: not a checkpoint of this project, or an encoder of another kind or size.
    """
    donor = load_model(folder)
    theirs, ours = encoder_of(donor), model.encoder
    if type(theirs).__name__ != type(ours).__name__.removeprefix("FSDP"):  # FSDP renames a class
        raise UserError(f"{folder} has a {type(theirs).__name__}; a point that starts from it needs the same kind of encoder")
    sizes = {name: (getattr(theirs, name), getattr(ours, name)) for name in SAME}
    sizes["heads"] = (theirs.blocks[0].heads, ours.blocks[0].heads)
    if differing := [f"{name} {a}, here {b}" for name, (a, b) in sizes.items() if a != b]:
        raise UserError(f"{folder} has {'; '.join(differing)}; a point that starts from it needs the same")
    theirs.resize(ours.clip)
    weights = {f"encoder.{name}": weight for name, weight in theirs.state_dict().items()}
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    weights = {name: weight for name, weight in (donor.state_dict() | weights).items() if shapes.get(name) == weight.shape}
    if extra := sorted(name for name in theirs.state_dict() if f"encoder.{name}" not in shapes):
        raise UserError(f"{folder} also has {extra[0]}, of {len(extra)} in all, which the point lacks; needed the same settings")
    if missing := sorted(name for name in shapes if name.startswith("encoder.") and name not in weights):
        raise UserError(f"{folder} has no weights of this shape for {missing[0]}, of {len(missing)} in all; needed the same mlp")
    return weights


@torch.no_grad()
def initialise(model: Method, seed: int, folder: Path | None) -> None:
    """Draw all weights; then set those that the checkpoint in this folder has. Every rank does so alike."""
    model.initialise(seed)
    if folder is None:
        return
    weights = start_weights(model, folder)
    for name, parameter in model.named_parameters():
        if name in weights:
            copy_to_param_(parameter, weights[name].to(parameter.dtype))
    if dist.get_rank() == 0:
        at_random = dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters() if name not in weights)
        print(f"starts from {folder}; at random: {', '.join(at_random) or 'nothing'}", file=sys.stderr, flush=True)
