"""A frozen readout of stage `readout`, loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from scaling4d import checkpoint, config
from scaling4d.artifacts import PROVENANCE
from scaling4d.config import StageConfig
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.readout.heads import Head, HeadConfig
from scaling4d.readout.protocols import HEAD, EvaluationConfig, Frozen, ReadoutModel, load_readout_weights
from scaling4d.readout.tasks import TASKS
from scaling4d.records import Result, UserError, read_json_object, shortened


@dataclass(frozen=True)
class TrainedReadout:
    """A frozen readout, its result, and its encoder.

    bound: the settings that its provenance.json records. data: folder of the benchmarks. checkpoint: the encoder's
    folder.
    model: features to predictions.
    """

    folder: Path
    result: Result
    bound: StageConfig
    data: Path
    checkpoint: Path
    encoder: nn.Module
    model: ReadoutModel


def load_trained_readout(folder: Path) -> TrainedReadout:
    """Load a readout's folder in artifacts/, and the encoder beside it.

    Raises:
        UserError: no readout, one of another version, a fine-tuned one (its encoder is not kept), or an encoder that is
            gone or has other weights.
    """
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder} is not the folder of a readout: no result.json; needed one such as readout/mini/depth/frozen")
    try:
        result = checkpoint.read_description(folder / "result.json", Result, "a result")
        settings = read_json_object(folder / PROVENANCE)["settings"]
        home = folder.resolve().parents[3] / "pretrain" / folder.resolve().parents[1].name
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{folder} is not the folder of a readout: {shortened(error)}") from error
    if result.protocol != Frozen.name:
        raise UserError(f"{folder} was fine-tuned, and the tuned encoder is not kept; take the frozen readout beside it")
    if not (folder / HEAD).is_file():
        raise UserError(f"{folder} is not the folder of a readout: it has no {HEAD}")
    if not home.is_dir() or checkpoint.weights_sha256(home) != result.checkpoint_sha256:
        raise UserError(f"{folder} was trained on an encoder {result.encoder} that is no longer at {home}; make both again")
    try:
        keys = ["profile", "readout.Head", "readout.Evaluation", f"readout.tasks.{result.task}"]
        bound = config.build({key: settings[key] for key in keys}, HeadConfig, EvaluationConfig, TASKS[result.task])
    except (UserError, TypeError, KeyError) as error:
        raise UserError(f"{folder} was made by another version, with other settings ({error}); run `dvc repro`") from error
    task, evaluation = bound[TASKS[result.task]], bound[EvaluationConfig]
    encoder = load_encoder(home, frames=evaluation.frames, side_px=evaluation.side_px).eval()
    with torch.device("meta"):
        head = Head(bound[HeadConfig], task.queries(encoder.clip), features_width=encoder.width, frames=encoder.clip[0])
    model = ReadoutModel(None, load_readout_weights(head, folder / HEAD), head, task)
    return TrainedReadout(folder, result, bound, Path(evaluation.data), home, encoder, model.eval())
