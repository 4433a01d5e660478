"""The settings of stage `show`, checked without drawing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scaling4d.records import UserError, did_you_mean


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError: no clip or frame, or a task or an encoder without a frozen readout."""
    shown, read_out = settings["show"], settings["encoders"]["frozen"]
    if shown["clips"] < 1 or shown["frames"] < 1:
        raise UserError(f"show.clips = {shown['clips']}, show.frames = {shown['frames']}; needed 1 or more")
    for key, known in {"tasks": settings["benchmarks"]["tasks"], "encoder": read_out, "beside": read_out}.items():
        words = shown[key] if key == "tasks" else [shown[key]] if shown["tasks"] else []
        for word in (word for word in words if word not in known):
            needed = f"needed some of {', '.join(known)}" if known else "profile has none"
            raise UserError(f"show.{key} has {word!r}; {needed}{did_you_mean(word, known)}")
