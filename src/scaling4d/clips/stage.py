"""The `clips` stage: settings in, a folder of shards with its tables out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config
from scaling4d.clips import curate

VIDEOS = Path("data/videos")
MEMORY = Path(".resume/clips")
KEYS = ["profile", "clips"]


def clips(settings: Mapping[str, Any]) -> Path:
    """Curate data/videos; returns the folder written.

    Raises:
        UserError: no videos, none usable, or a setting that does not fit.
    """
    started = time.time()
    curation = _curation(settings)
    final = artifacts.home(settings) / "clips"
    with artifacts.folder(final) as out:
        inputs = {"videos": curate.curate(VIDEOS, out, curation, before=final, memory=_memory())}
        artifacts.write_provenance(out, stage="clips", settings=settings, keys=KEYS, room="clips", inputs=inputs)
    artifacts.write_run("clips", artifacts.sha256(final), started=started)
    return final


def dry(settings: Mapping[str, Any]) -> None:
    """Print what would be used, and why not the rest."""
    curate.dry(VIDEOS, _curation(settings), memory=_memory())


def _memory() -> Path | None:
    """Where findings are kept; nowhere as long as stage `code` has not said what this code means."""
    return MEMORY if Path("artifacts/code/clips.json").is_file() else None


def _curation(settings: Mapping[str, Any]) -> curate.Curation:
    config.bind(config.declared(settings, KEYS)["clips"])
    return config.build(curate.Curation)
