"""DATA -> HASHES: which folders a task's readouts read, so that DVC looks at every file once and not once for each readout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling4d import artifacts, benchmarks, config
from scaling4d.records import UserError, write_json

KEYS = ["readout.shared.Evaluation.data"]  # what this stage declares in dvc.yaml


def benchmark(task: str, settings: Mapping[str, Any]) -> Path:
    """Write `artifacts/benchmarks/<task>.json`: {"task", "folders": {folder: sha256 over its files}, "problem"}.

    A benchmark that no readout could read is a `problem`, in words, and has no folders: that is an error of who reads it out.

    Raises:
        UserError: unknown task.
    """
    if task not in benchmarks.TASKS:
        raise UserError(f"unknown task {task!r}; needed one of {', '.join(benchmarks.TASKS)}")
    root = Path(config.declared(settings, KEYS)[KEYS[0]])
    folders, problem = set(), ""
    try:
        folders = {benchmarks.folder(task, root, split) for split in benchmarks.SPLITS}
    except UserError as error:
        problem = str(error)
    out = Path("artifacts/benchmarks") / f"{task}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    hashes = {folder.as_posix(): artifacts.sha256(folder) for folder in folders}
    write_json(out, {"task": task, "folders": hashes, "problem": problem})
    return out
