"""Stage `benchmarks`: hash the benchmark folders of a task. DVC then looks at every file once, not once per readout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling4d import artifacts, benchmarks, config
from scaling4d.records import UserError, write_json

KEYS = ["benchmarks.root"]  # the settings that this stage declares in dvc.yaml


def hash_benchmark(task: str, settings: Mapping[str, Any]) -> Path:
    """Write `artifacts/benchmarks/<task>.json`: {"task", "folders": {folder: sha256 over its files}, "problem"}.

    A task without a readable folder has a `problem`, in words, and no folders. Whoever reads its benchmark raises that
    error. Raises:
        UserError: unknown task.
    """
    if task not in benchmarks.TASKS:
        raise UserError(f"unknown task {task!r}; needed one of {', '.join(benchmarks.TASKS)}")
    root = Path(config.declared(settings, KEYS)["benchmarks.root"])
    folders, problem = set(), ""
    try:
        folders = {benchmarks.find_benchmark(task, root, split).folder for split in benchmarks.SPLITS}
    except UserError as error:
        problem = str(error)
    out = Path("artifacts/benchmarks") / f"{task}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    hashes = {folder.as_posix(): artifacts.sha256(folder) for folder in folders}
    write_json(out, {"task": task, "folders": hashes, "problem": problem})
    return out
