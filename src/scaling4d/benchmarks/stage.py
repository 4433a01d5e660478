"""Stage `benchmarks`: hash the benchmark folders of each task. DVC then looks at every file once, not per readout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from scaling4d import artifacts, benchmarks, config, provenance
from scaling4d.records import UserError, did_you_mean, write_json

KEYS = ["benchmarks.root", "benchmarks.tasks"]  # these and PROBE_KEY are declared in dvc.yaml
PROBE_KEY = "pretrain.Training.probe_tasks"


def check_settings(settings: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The stage's root and tasks. Raises UserError: an unknown task."""
    root, tasks = config.declared(settings, KEYS).values()
    if unknown := [task for task in tasks if task not in (*benchmarks.TASKS,)]:
        near = did_you_mean(unknown[0], benchmarks.TASKS)
        raise UserError(f"benchmarks.tasks: unknown task {unknown[0]!r}; needed one of {', '.join(benchmarks.TASKS)}{near}")
    return root, tasks


def hash_benchmarks(settings: Mapping[str, Any]) -> Path:
    """Write `artifacts/benchmarks/<task>.json`, a file a task: {"task", "folders": {folder: sha256}, "problem"}.

    A task without a readable folder has a `problem`, in words, and no folders. Whoever reads its benchmark raises that
    error. PROBES, {"tasks", "folders", "code"}, has the folders of the tasks that pretraining probes, and the hash of
    the probes' code. It is the same for all profiles without such tasks, so that their pretraining depends on no
    benchmark and on no readout.
    Raises:
        UserError: unknown task.
    """
    root, tasks = check_settings(settings)
    probe_tasks, probed = list(config.section(settings, PROBE_KEY)), {}
    sha256 = cache(artifacts.sha256)  # tasks may share a folder
    with provenance.atomic_folder(artifacts.BENCHMARKS) as out:
        for task in tasks:
            folders, problem = set(), ""
            try:
                folders = {benchmarks.find_benchmark(task, Path(root), split).folder for split in benchmarks.SPLITS}
            except UserError as error:
                problem = str(error)
            hashes = {folder.as_posix(): sha256(folder) for folder in folders}
            write_json(out / f"{task}.json", {"task": task, "folders": hashes, "problem": problem})
            probed |= hashes if task in probe_tasks else {}
        code = artifacts.code_hash("probes") if probe_tasks else None
        content = {"tasks": probe_tasks, "folders": probed, "code": code["sha256"] if code else None}
        write_json(out / artifacts.PROBES.name, content)
    return artifacts.BENCHMARKS
