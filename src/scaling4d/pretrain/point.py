"""A scaling point: its settings, its model, its Checkpoint folder, and the encoders that it is compared with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaling4d import artifacts, config
from scaling4d.checkpoint import Checkpoint
from scaling4d.mae.build import METHODS, encoder_of, load
from scaling4d.mae.distilled import Distilled
from scaling4d.mae.encoder import PixelTokens
from scaling4d.pretrain.settings import Launch
from scaling4d.records import UserError
from scaling4d.training.parallelize import Sharding

UNTRAINED = "untrained_"
METHOD = "method"  # of a point's settings: dvc.yaml declares by it what the point's result depends on

config.configurable(PixelTokens)


def key_of(point: str, settings: Mapping[str, Any]) -> str:
    """Where a point's settings are: in `points`, or in `distilled` for one that has a teacher."""
    return f"distilled.{point}" if point in config.section(settings, "distilled") else f"points.{point}"


def method_of(key: str, settings: Mapping[str, Any]) -> str:
    """Name of the method that a point's settings are for.

    Raises:
        UserError: no such point, not exactly one method, or another one than `method` says.
    """
    section, taught = config.section(settings, key), key.startswith("distilled.")
    known = [name for name in METHODS if (name == "Distilled") == taught]
    named = [name for name in section if name not in (Sharding.__name__, Launch.__name__, METHOD)]
    if len(named) != 1 or named[0] not in known:
        raise UserError(f"{key} has {', '.join(named) or 'nothing'}; needed exactly one of {', '.join(known)}")
    if section.get(METHOD) != named[0]:
        raise UserError(f"{key} is for {named[0]}, and {key}.{METHOD} is {section.get(METHOD)!r}; set it to {named[0]}")
    return named[0]


def keys_of(point: str, settings: Mapping[str, Any]) -> list[str]:
    """Those of a point's settings on which its result depends; where it is trained is not among them."""
    key = key_of(point, settings)
    return [f"{key}.{method_of(key, settings)}", f"{key}.{Sharding.__name__}"]


def sections(point: str, settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """These settings by the name of their constructor."""
    return {key.split(".")[-1]: value for key, value in config.declared(settings, keys_of(point, settings)).items()}


def build(point: str, settings: Mapping[str, Any]) -> nn.Module:
    """The bound model of a point on meta, without weights, and with its teacher, if it has one.

    Raises:
        UserError: a teacher that was not pretrained before.
    """
    method = METHODS[method_of(key_of(point, settings), settings)]
    given = {"taught_by": encoder_of(load(teacher_of(point, settings)))} if method is Distilled else {}
    with torch.device("meta"):
        return config.build(method, **given)


def start(point: str, settings: Mapping[str, Any], seed: int) -> nn.Module:
    """The bound model of a point with its initial weights, on the CPU."""
    model = build(point, settings).to_empty(device="cpu")
    model.initialise(seed)
    return model


def teacher_of(point: str, settings: Mapping[str, Any]) -> Path:
    return artifacts.home(settings) / "pretrain" / settings["distilled"][point]["Distilled"]["teacher"]


def describe(name: str, point: str, model: nn.Module, settings: Mapping[str, Any], *, step: int, clips_seen: int) -> Checkpoint:
    method = method_of(key_of(point, settings), settings)
    return Checkpoint(
        name=name,
        model=method,
        settings=config.section(settings, key_of(point, settings))[method],
        parameters=sum(p.numel() for p in model.encoder.parameters()),
        step=step,
        clips_seen=clips_seen,
    )


def baseline(encoder: str, settings: Mapping[str, Any]) -> Path:
    """The `baseline` stage: `untrained_<point>` is that point before its first step, `pixels` the patches themselves."""
    started = time.time()
    point = encoder.removeprefix(UNTRAINED)
    if encoder != "pixels" and point == encoder:
        raise UserError(f"unknown baseline {encoder!r}; needed pixels or {UNTRAINED}<point>")
    keys = ["profile", "pixels"] if encoder == "pixels" else ["profile", "seed", *keys_of(point, settings)]
    mine = config.declared(settings, keys)
    config.bind(mine["pixels"] if encoder == "pixels" else sections(point, settings))
    final = artifacts.home(settings) / "pretrain" / encoder
    with artifacts.folder(final) as out:
        if encoder == "pixels":
            tokens = config.build(PixelTokens)
            Checkpoint(encoder, "PixelTokens", mine["pixels"]["PixelTokens"], parameters=0, step=0, clips_seen=0).write(
                out, tokens.state_dict()
            )
        else:
            model = start(point, settings, mine["seed"])
            describe(encoder, point, model, settings, step=0, clips_seen=0).write(out, model.state_dict())
        artifacts.write_provenance(out, stage="baseline", settings=settings, keys=keys, room="pretrain", inputs={})
    artifacts.write_run(f"baseline-{encoder}", artifacts.sha256(final), started=started)
    return final
