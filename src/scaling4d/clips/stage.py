"""Stage `clips`: curate data/videos into a folder of shards and tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config, provenance
from scaling4d.clips import curate, data_import
from scaling4d.clips.settings import CurationConfig, WorkersConfig

VIDEOS = Path("data/videos")


def clips(settings: Mapping[str, Any]) -> Path:
    """Curate data/videos; returns the folder written. Raises UserError: no videos, or none usable."""
    started = time.time()
    bound = _bind(settings)
    final = artifacts.home(settings) / "clips"
    with provenance.atomic_folder(final) as out:
        curation, workers = bound[CurationConfig], bound[WorkersConfig]
        inputs = {"videos": curate.curate(VIDEOS, out, curation, workers, previous=final, cache=_cache())}
        content = artifacts.provenance_of("clips", bound, code=artifacts.code_hash("clips"), inputs=inputs)
        artifacts.write_provenance(out, content, bound.operative)
    artifacts.write_run("clips", artifacts.sha256(final), started=started)
    return final


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError: settings that the stage refuses."""
    _bind(settings)


def dry_run(settings: Mapping[str, Any], *, list_files: bool) -> None:
    """Print how many videos of the folder that data.dvc names would be used, and why not the rest."""
    bound, videos = _bind(settings), data_import.used_folder().videos
    curate.dry_run(videos, bound[CurationConfig], bound[WorkersConfig], cache=_cache(), list_files=list_files)


def _bind(settings: Mapping[str, Any]) -> config.StageConfig:
    return config.bind(settings, ["profile", "clips.Curation"], CurationConfig, unrecorded={"clips.Workers": WorkersConfig})


def _cache() -> Path | None:
    """Folder of the results of this code; None before stage `code` has written its hash."""
    code = artifacts.code_hash("clips")
    return provenance.WORK_FOLDER / "clips" / code["sha256"][:16] if code else None
