"""Stage `baseline`: encoders to compare with, as Checkpoint folders: untrained, raw pixels, and published ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scaling4d import artifacts, config
from scaling4d.checkpoint import Checkpoint
from scaling4d.config import StageConfig
from scaling4d.encoders.card import write_model_card
from scaling4d.encoders.published import import_published
from scaling4d.encoders.transformers import PretrainedConfig, source_files, source_path
from scaling4d.mae.encoder import PixelTokens
from scaling4d.mae.models import encoder_of, method_of
from scaling4d.provenance import atomic_folder
from scaling4d.records import UserError, did_you_mean

UNTRAINED, PIXELS = "untrained_", "pixels"


def baseline(name: str, settings: Mapping[str, Any]) -> Path:
    """Write `untrained_<point>` (a point before its first step), `pixels`, or an encoder of `encoders.pretrained`.

    Raises:
        UserError: unknown name; of a published encoder: no such file, folder or model, no network, an unknown kind,
            pickles instead of safetensors, files that do not fit together, a clip that does not suit the model.
    """
    started = time.time()
    final = artifacts.home(settings) / "pretrain" / name
    inputs: dict[str, str] = {}
    with atomic_folder(final) as out:
        if name in config.section(settings, "encoders.pretrained"):
            bound = _bind_pretrained(name, settings)
            source = source_path(bound[PretrainedConfig], f"encoders.pretrained.{name}")
            model_config, model = import_published(source, bound[PretrainedConfig].clip)
            inputs = {path.name: artifacts.sha256(path) for path in source_files(source)}
        elif name == PIXELS:
            bound = _bind_pixels(settings)
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
        encoder = encoder_of(model)
        parameters = sum(p.numel() for p in encoder.parameters())
        saved = Checkpoint(name, type(model).__name__, asdict(model_config), parameters, step=0, clips_seen=0)
        saved.write(out, model.state_dict())
        provenance = artifacts.provenance_of("baseline", bound, code=artifacts.code_hash("encoders"), inputs=inputs)
        artifacts.write_provenance(out, provenance, bound.operative)
        write_model_card(out, saved, provenance, mean=encoder.pixel_mean, scale=encoder.pixel_scale)
    artifacts.write_run(f"baseline-{name}", artifacts.sha256(final), started=started)
    return final


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError: settings that the stage refuses, or an encoder that no stage makes."""
    _bind_pixels(settings)
    for name in settings["encoders"]["pretrained"]:
        _bind_pretrained(name, settings)
    points, lists = list(settings["points"]), settings["encoders"]
    trained = (point for group in config.POINTS for point in settings[group])
    made = [*trained, *lists["pretrained"], PIXELS, *(f"{UNTRAINED}{name}" for name in lists["untrained"])]
    for kind, known in {"untrained": points, **dict.fromkeys(config.PROTOCOLS, made)}.items():
        for name in lists[kind]:
            if name not in known:
                needed = f"needed some of {', '.join(known)}{did_you_mean(name, known)}"
                raise UserError(f"encoders.{kind}: profile {settings['profile']} has no encoder {name!r}; {needed}")


def _bind_pretrained(name: str, settings: Mapping[str, Any]) -> StageConfig:
    return config.bind(settings, ["profile", f"encoders.pretrained.{name}"], PretrainedConfig)


def _bind_pixels(settings: Mapping[str, Any]) -> StageConfig:
    return config.bind(settings, ["profile", "pixels"], PixelTokens.config_class)
