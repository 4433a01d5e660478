"""A frozen readout as the `readout` stage left it, ready to speak again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scaling4d import checkpoint, config
from scaling4d.encoders.features import Standard
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.readout.split import Evaluation
from scaling4d.readout.tasks.task import Task
from scaling4d.readout.train import HEAD, TASKS, Probe
from scaling4d.records import Result, UserError


@dataclass(frozen=True)
class Trained:
    """A result with what it was measured on: `encoder`, whose weights lie in `checkpoint`, and `probe`, the readout on it.

    settings: those that were in force, by dotted key.
    """

    folder: Path
    result: Result
    settings: Mapping[str, Any]
    evaluation: Evaluation
    asked: Task
    checkpoint: Path
    encoder: nn.Module
    probe: Probe


def read(folder: Path) -> Trained:
    """A readout's folder in artifacts/, and the encoder beside it.

    Raises:
        UserError: no readout, one of another version, a fine-tuned one, whose encoder was not kept, or an encoder that is gone or
            is another one.
    """
    try:
        result = Result.read(folder / "result.json")
        if result.protocol != "frozen":
            raise UserError(f"{folder} was fine-tuned, and the tuned encoder is not kept; take the frozen readout beside it")
        settings = json.loads((folder / "provenance.json").read_text())["settings"]
        tensors = checkpoint.load_tensors(folder / HEAD)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is not the folder of a readout: {' '.join(str(error).split())}") from error
    home = folder.resolve().parents[3] / "pretrain" / result.encoder
    if not home.is_dir() or checkpoint.weights_sha256(home) != result.checkpoint_sha256:
        raise UserError(f"{folder} was trained on an encoder {result.encoder} that is no longer at {home}; run `dvc repro`")
    try:
        config.bind(settings["readout.shared"], settings[f"readout.tasks.{result.task}"])
        evaluation, asked = config.build(Evaluation), config.build(TASKS[result.task])
    except (UserError, KeyError) as error:
        raise UserError(f"{folder} was made by another version, with other settings ({error}); run `dvc repro`") from error
    encoder = load_encoder(home).eval()
    head = asked.head(features_width=encoder.width, clip=encoder.clip)
    standard = Standard(tensors.pop("standard.matrix"), tensors.pop("standard.offset"))
    head.load_state_dict(tensors)
    probe = Probe(None, standard, head, asked, evaluation.depth_fraction).eval()
    return Trained(folder, result, settings, evaluation, asked, home, encoder, probe)
