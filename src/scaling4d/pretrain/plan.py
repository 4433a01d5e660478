"""A dry run of a scaling point: what it is made of, without a weight in memory."""

from __future__ import annotations

from typing import Any

import torch

from scaling4d import config
from scaling4d.mae.build import METHODS
from scaling4d.records import UserError


def plan(point: str) -> dict[str, Any]:
    """`{"point", "profile", "parameters": {"backbone", "coarse_tokens", "decoder", "total"}}` of a point.

    It is sought in params.yaml, then in every profile in turn. backbone: the encoder that readouts use.
    Raises:
        UserError: no profile has such a point.
    """
    settings = _settings(point)
    section = (settings["points"] | settings["distilled"])[point]
    config.bind(section)
    (method,) = section
    with torch.device("meta"):
        model = config.build(METHODS[method])
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    coarse = model.coarse_tokens.numel() if hasattr(model, "coarse_tokens") else 0
    total, backbone = count(model), count(model.encoder)
    parameters = {"backbone": backbone, "coarse_tokens": coarse, "decoder": total - backbone - coarse, "total": total}
    return {"point": point, "profile": settings["profile"], "parameters": parameters}


def _settings(point: str) -> dict[str, Any]:
    profiles = sorted(path.stem for path in (config.EXPERIMENTS / "profile").glob("*.yaml"))
    known: set[str] = set()
    for profile in (None, *profiles):
        settings = config.read() if profile is None else config.compose([f"profile={profile}"])
        points = settings["points"] | settings["distilled"]
        if point in points:
            return settings
        known |= set(points)
    raise UserError(f"no profile has a point {point!r}; points: {', '.join(sorted(known))}")
