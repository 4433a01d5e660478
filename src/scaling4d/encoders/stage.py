"""Stage `baseline`: encoders to compare with, as Checkpoint folders: untrained, raw pixels, and published ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scaling4d import artifacts, config, provenance
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.transformers import PretrainedConfig, import_encoder, source_files, source_folder
from scaling4d.mae.encoder import PixelTokens
from scaling4d.mae.models import encoder_of, method_of
from scaling4d.records import UserError

UNTRAINED, PIXELS = "untrained_", "pixels"


def baseline(name: str, settings: Mapping[str, Any]) -> Path:
    """Write `untrained_<point>` (a point before its first step), `pixels`, or an encoder of `encoders.pretrained`.

    Raises:
        UserError: unknown name; of a published encoder: no such folder or model, no network, an unknown kind, pickles
            instead of safetensors, files that do not fit together, a clip that does not suit the model.
    """
    started = time.time()
    final = artifacts.home(settings) / "pretrain" / name
    inputs: dict[str, str] = {}
    with provenance.atomic_folder(final) as out:
        if name in config.section(settings, "encoders.pretrained"):
            bound = config.bind(settings, ["profile", f"encoders.pretrained.{name}"], PretrainedConfig)
            source = source_folder(bound[PretrainedConfig], f"encoders.pretrained.{name}")
            model_config, model = import_encoder(source, bound[PretrainedConfig].clip)
            inputs = {path.name: artifacts.sha256(path) for path in source_files(source)}
        elif name == PIXELS:
            bound = config.bind(settings, ["profile", "pixels"], PixelTokens.config_class)
            model_config = bound[PixelTokens.config_class]
            model = PixelTokens(model_config)
        elif name.startswith(UNTRAINED):
            key = f"points.{name.removeprefix(UNTRAINED)}.model"
            method = method_of(config.section(settings, key), key)
            bound = config.bind(settings, ["profile", "seed", key], method.config_class)
            model_config = bound[method.config_class]
            with torch.device("meta"):
                model = method(model_config)
            model.to_empty(device="cpu").initialise(settings["seed"])
        else:
            raise UserError(f"unknown baseline {name!r}; needed pixels, {UNTRAINED}<point>, or one of encoders.pretrained")
        parameters = sum(p.numel() for p in encoder_of(model).parameters())
        saved = Checkpoint(name, type(model).__name__, asdict(model_config), parameters, step=0, clips_seen=0)
        saved.write(out, model.state_dict())
        evidence = artifacts.evidence("baseline", bound, code=artifacts.code_hash("encoders"), inputs=inputs)
        artifacts.write_evidence(out, evidence, bound.operative)
    artifacts.write_run(f"baseline-{name}", artifacts.sha256(final), started=started)
    return final
