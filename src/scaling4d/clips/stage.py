"""Stage `clips`: curate data/videos into a folder of shards and tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config, provenance
from scaling4d.clips import curate, data_import
from scaling4d.clips.settings import CurationConfig

VIDEOS = Path("data/videos")
KEYS = ["profile", "clips"]


def clips(settings: Mapping[str, Any]) -> Path:
    """Curate data/videos; returns the folder written. Raises UserError: no videos, or none usable."""
    started = time.time()
    bound = config.bind(settings, KEYS, CurationConfig)
    final = artifacts.home(settings) / "clips"
    with provenance.atomic_folder(final) as out:
        inputs = {"videos": curate.curate(VIDEOS, out, bound[CurationConfig], previous=final, cache=_cache())}
        content = artifacts.evidence("clips", bound, code=artifacts.code_hash("clips"), inputs=inputs)
        artifacts.write_evidence(out, content, bound.operative)
    artifacts.write_run("clips", artifacts.sha256(final), started=started)
    return final


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError: settings that the stage refuses."""
    config.bind(settings, KEYS, CurationConfig)


def dry_run(settings: Mapping[str, Any], *, list_files: bool) -> None:
    """Print how many videos of the folder that data.dvc names would be used, and why not the rest."""
    bound = config.bind(settings, KEYS, CurationConfig)
    curate.dry_run(data_import.used_folder().videos, bound[CurationConfig], cache=_cache(), list_files=list_files)


def _cache() -> Path | None:
    """Folder of the results of this code; None before stage `code` has written its hash."""
    code = artifacts.code_hash("clips")
    return provenance.WORK_FOLDER / "clips" / code["sha256"][:16] if code else None
