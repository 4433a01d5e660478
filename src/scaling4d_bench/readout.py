"""`scaling4d bench readout`: frozen readouts beside one pass of their encoder; the time that stored features save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scaling4d import artifacts, config
from scaling4d.records import Result, UserError
from scaling4d_bench import measure
from scaling4d_bench.measure import Measurements

LIBRARIES = ("numpy", "safetensors", "torch")
PARTS = ("seconds", "inputs_s", "readout_s")
COLUMNS = {
    "features": "{name}",
    "all commands, s": "{seconds:.1f}",
    "reading and encoder, s": "{inputs_s:.1f}",
    "readouts, s": "{readout_s:.1f}",
    "over one pass + readouts": "{over_pass_and_readouts:.2f}",
}


def bench(out: Path, *, encoder: str, tasks: Sequence[str] = ()) -> Path:
    """Run the commands of the pipeline in a folder of their own, print two tables, write `<out>/readout.json`.

    Args:
        encoder: a name in artifacts/<profile>/pretrain. tasks: empty: all.
    Raises:
        UserError: no such encoder, or a readout failed.
    """
    settings = config.read()
    home = artifacts.home(settings)
    if not (home / "pretrain" / encoder).is_dir():
        raise UserError(f"no {home / 'pretrain' / encoder}; needed an encoder of this profile: run `dvc repro`, or name another")
    tasks = list(tasks or settings["benchmarks"]["tasks"])
    measurements = Measurements("readout", {"encoder": encoder, "profile": settings["profile"], "tasks": tasks}, LIBRARIES)
    with tempfile.TemporaryDirectory() as scratch:
        for path in ("data", "experiments", "src", home / "pretrain", "artifacts/code"):
            Path(scratch, path).parent.mkdir(parents=True, exist_ok=True)
            Path(scratch, path).symlink_to(Path(path).resolve())
        for name, store in {"in memory": "", "stored": "store", "stored before": "store"}.items():
            settings["readout"]["Evaluation"]["feature_store"] = store
            Path(scratch, config.PARAMS).write_text(yaml.safe_dump(settings, sort_keys=False))
            measurements.raw[name] = {task: run_readout(Path(scratch), home, encoder, task) for task in tasks}
        stored = Path(scratch, "store").rglob("*.safetensors")
        measurements.settings["stored_bytes"] = sum(path.stat().st_size for path in stored)
    results = summary(measurements.raw)
    measurements.results.update(results)
    measure.table(f"{encoder}: all frozen readouts", results["rows"], COLUMNS)
    columns = {"features": "{name}", **{task: f"{{changed[{task}]:+.5f}}" for task in tasks}}
    measure.table("changes of the metric", results["rows"][1:], columns)
    return measurements.write(out)


def run_readout(scratch: Path, home: Path, encoder: str, task: str) -> dict[str, Any]:
    """The command's seconds, those of its two parts, and its result."""
    command = [sys.executable, "-m", "scaling4d", "readout", encoder, task, "frozen"]
    start, environment = time.perf_counter(), os.environ | {"PYTHONPATH": "src"}
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"`{' '.join(command[1:])}` failed: {done.stderr.strip().splitlines()[-1]}")
    folder = scratch / home / "readout" / encoder / task / "frozen"
    (path,) = (scratch / artifacts.RUNS).glob(f"readout-{encoder}-{task}-frozen-{artifacts.sha256(folder)[:16]}.json")
    run, result = json.loads(path.read_text()), Result.read(folder / "result.json")
    interval = {"metric": result.metric, "value": result.value, "low": result.low, "high": result.high}
    return {"seconds": seconds, "inputs_s": run["inputs_s"], "readout_s": run["readout_s"]} | interval


def summary(raw: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By way of features: sums over the tasks, also over the first way's pass and readouts; changes of the values."""
    first = next(iter(raw.values()))
    limit = sum(one["inputs_s"] + one["readout_s"] for one in first.values())
    rows = []
    for name, tasks in raw.items():
        sums = {part: sum(one[part] for one in tasks.values()) for part in PARTS}
        changed = {task: one["value"] - first[task]["value"] for task, one in tasks.items()}
        rows.append({"name": name, **sums, "over_pass_and_readouts": sums["seconds"] / limit, "changed": changed})
    return {"rows": rows, "pass_and_readouts_s": limit}
