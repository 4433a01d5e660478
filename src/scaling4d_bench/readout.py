"""`scaling4d bench readout`: what frozen readouts cost beside one pass of their encoder; what storing its features saves and
changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from scaling4d import artifacts, config
from scaling4d.records import Result, UserError
from scaling4d_bench import measure

HALF = ("float16", "bfloat16")
OTHER_DEPTH = 0.5  # also stored, then read out
LIBRARIES = ("numpy", "safetensors", "torch")


def bench(out: Path, *, encoder: str, tasks: Sequence[str] = ()) -> Path:
    """Run the commands of the pipeline in a folder of their own, print two tables, write `<out>/readout.json`.

    Args:
        encoder: a name in artifacts/<profile>/pretrain. tasks: all, if none is named.
    Raises:
        UserError: no such encoder, or a readout failed.
    """
    load, settings = measure.busy(), config.read()
    home = artifacts.home(settings)
    if not (home / "pretrain" / encoder).is_dir():
        raise UserError(f"no {home / 'pretrain' / encoder}; needed an encoder of this profile: run `dvc repro`, or name another")
    tasks = tuple(tasks) or tuple(settings["readout"]["tasks"])
    store = {"feature_store": "store", "stored_depths": [OTHER_DEPTH]}
    depth = settings["readout"]["shared"]["Evaluation"]["depth_fraction"]
    turns = {
        "in memory": {},
        "stored": store,
        "stored before": store,
        f"at depth {OTHER_DEPTH:g}, stored before": store | {"depth_fraction": OTHER_DEPTH, "stored_depths": [depth]},
        **{f"stored as {dtype}": store | {"feature_dtype": dtype} for dtype in HALF},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for path in ("data", "experiments", "src", home / "pretrain", "artifacts/code"):
            Path(scratch, path).parent.mkdir(parents=True, exist_ok=True)
            Path(scratch, path).symlink_to(Path(path).resolve())
        raw = {name: _readouts(Path(scratch), settings, change, encoder, tasks, home) for name, change in turns.items()}
        stored = sum(path.stat().st_size for path in Path(scratch, "store").rglob("*.safetensors"))
    found = summary(raw)
    _show(encoder, found)
    told = {"encoder": encoder, "profile": settings["profile"], "tasks": list(tasks), "load_before": load, "stored_bytes": stored}
    return measure.write(
        "readout", out, settings=told, libraries=measure.versions(LIBRARIES), raw=raw, found=found, not_measured={}
    )


def _readouts(
    scratch: Path, settings: Mapping[str, Any], change: Mapping[str, Any], encoder: str, tasks: Sequence[str], home: Path
) -> dict[str, Any]:
    """Per task: the command's seconds, those of its two parts, and what it measured."""
    changed = deepcopy(dict(settings))
    changed["readout"]["shared"]["Evaluation"] |= change
    (scratch / config.PARAMS).write_text(yaml.safe_dump(changed, sort_keys=False))
    found = {}
    for task in tasks:
        command = [sys.executable, "-m", "scaling4d", "readout", encoder, task, "frozen"]
        start = time.perf_counter()
        places = {"cwd": scratch, "env": os.environ | {"PYTHONPATH": "src"}}
        done = subprocess.run(command, **places, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise UserError(f"`{' '.join(command[1:])}` failed: {done.stderr.strip().splitlines()[-1]}")
        folder = scratch / home / "readout" / encoder / task / "frozen"
        (told,) = (scratch / artifacts.RUNS).glob(f"readout-{encoder}-{task}-frozen-{artifacts.sha256(folder)[:16]}.json")
        run = json.loads(told.read_text())
        result = Result.read(folder / "result.json")
        found[task] = {"seconds": seconds, "inputs_s": run["inputs_s"], "readout_s": run["readout_s"]}
        found[task] |= {"metric": result.metric, "value": result.value, "low": result.low, "high": result.high}
    return found


def summary(raw: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the tasks by turn, each over the first turn's pass and readouts; and each value beside the first turn's."""
    first = next(iter(raw.values()))
    limit = sum(one["inputs_s"] + one["readout_s"] for one in first.values())
    rows = []
    for name, tasks in raw.items():
        sums = {key: sum(one[key] for one in tasks.values()) for key in ("seconds", "inputs_s", "readout_s")}
        changed = {task: one["value"] - first[task]["value"] for task, one in tasks.items()}
        rows.append({"name": name, **sums, "over_pass_and_readouts": sums["seconds"] / limit, "changed": changed})
    return {"rows": rows, "pass_and_readouts_s": limit}


def _show(encoder: str, found: Mapping[str, Any]) -> None:
    lines = [
        (
            row["name"],
            *(f"{row[key]:.1f}" for key in ("seconds", "inputs_s", "readout_s")),
            f"{row['over_pass_and_readouts']:.2f}",
        )
        for row in found["rows"]
    ]
    columns = ("features", "all commands, s", "reading and encoder, s", "readouts, s", "over one pass + readouts")
    measure.show(f"{encoder}: all frozen readouts", columns, lines)
    tasks = list(found["rows"][0]["changed"])
    lines = [(row["name"], *(f"{row['changed'][task]:+.5f}" for task in tasks)) for row in found["rows"][1:]]
    measure.show("what that changes in the metric", ("features", *tasks), lines)
