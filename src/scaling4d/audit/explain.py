"""Walk one number back: cell <- result <- checkpoint <- shards <- source videos <- settings <- code <- environment.

A number of a study is the mean over its seeds: cell <- runs <- their locks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling4d.artifacts import PROVENANCE
from scaling4d.audit.run import CODE, LockedRun, find_maker, row_numbers
from scaling4d.provenance import LockedStage, parse_csv, read_lock, required
from scaling4d.records import UserError, did_you_mean, on_one_line
from scaling4d.studies import study as studies

STATISTICS = ("mean", "deviation", "noise")  # columns of a study's table.csv


def explain(run: LockedRun, key: str) -> dict[str, Any]:
    """The cells of a number in the report, and every stage that led to it, the nearest first. A fresh clone knows less.

    Args:
        key: `encoder/task/protocol`, `point/pretrain` or `point/reconstruct`; `/metric` after it for one number of it.
    Returns:
        key, cells (see `table_cells`), result and checkpoint (path, sha256), stages, and `again`, the command that
        repeats the last stage. A stage has name, level (steps back from the number), command, read and wrote (path,
        md5, bytes, count of files), shards (sha256 by name), settings, overrides, code (package, sha256, modules) and
        environment (machine, versions, time). Of large files, only the result and the weights are read.
    Raises:
        UserError: no such number.
    """
    row = next((row for row in run.records if f"{key}/".startswith(f"{row}/")), "")
    cells = [cell for cell in table_cells(run, row) if key in (row, f"{row}/{cell['name']}")]
    if not cells:
        known = ", ".join(run.records) or "none was run"
        known += did_you_mean(key, run.records, 3)
        raise UserError(f"no number {key!r}; needed encoder/task/protocol, point/pretrain or point/reconstruct, one of: {known}")
    record, weights = run.records[row], run.weights(row.split("/")[0])
    stages = [{"level": level, **_stage(run, stage)} for level, stage in _upstream_stages(run.stages, record)]
    listed = next((cell["weights"] for cell in cells if cell["weights"]), None)
    checkpoint = {"path": weights, "sha256": run.disk.sha256(weights) or listed}
    result = {"path": record, "sha256": run.disk.sha256(record)}
    again = f"dvc repro {stages[0]['name']}"
    return {"key": key, "cells": cells, "result": result, "checkpoint": checkpoint, "stages": stages, "again": again}


def explain_study(key: str) -> dict[str, Any] | None:
    """A mean over seeds, and the run of every seed as its lock records it; None where the key begins with no study.

    Args:
        key: `study/arm/task`, as in the study's table.csv.
    Returns:
        key, cells (as of `explain`), runs and `again`, the command that makes the study. A run has seed, the cell of
        its value, checkpoint (sha256), experiment, lock, and stages (level, name, command, wrote, read, settings).
    Raises:
        UserError: the study has no such number, or lacks a lock.
    """
    name, _, number = key.partition("/")
    folder = studies.REPORTS / name
    if not (folder / studies.FACTS).is_file():
        return None
    study = studies.read_finished_study(folder)
    tables = {file: list(enumerate(parse_csv((folder / file).read_text()), 2)) for file in (studies.TABLE, studies.RUNS)}
    known = {f"{row['arm']}/{row['task']}": (line, row) for line, row in tables[studies.TABLE]}
    if number not in known:
        near = did_you_mean(number, known, 3)
        words = (", ".join(dict.fromkeys(number.split("/")[place] for number in known)) for place in (0, 1))
        raise UserError("no number {!r}; needed {}/arm/task; arms: {}; tasks: {}{}".format(key, name, *words, near))
    line, statistics = known[number]
    of_runs = [(n, row) for n, row in tables[studies.RUNS] if f"{row['arm']}/{row['task']}" == number]
    shared = {"interval": [], "unit": of_runs[0][1]["unit"]}
    table = {"file": (folder / studies.TABLE).as_posix(), "line": line, **shared}
    cells = [{**table, "name": column, "value": statistics[column]} for column in STATISTICS if statistics[column]]
    runs, arms = [], {arm.name: arm for arm in study.arms}
    for n, row in of_runs:
        lock, arm = study.lock(f"{row['arm']}-{row['seed']}"), arms[row["arm"]]
        if not lock.is_file():
            raise UserError(f"no {lock}; take it from git again, or run `{study.command}`")
        locked = required(read_lock(lock), arm.targets)
        out = locked[studies.measuring_stage(row, locked)].outs[0]
        cell = {"file": (folder / studies.RUNS).as_posix(), "line": n, "name": row["metric"], "value": row["value"], **shared}
        stages = [{"level": level, **_declared(stage)} for level, stage in _upstream_stages(locked, out.path)]
        properties = {"seed": int(row["seed"]), "cell": cell, "checkpoint": {"sha256": row["checkpoint_sha256"] or None}}
        runs.append(properties | {"experiment": row["experiment"], "lock": lock.as_posix(), "stages": stages})
    return {"key": key, "cells": cells, "runs": runs, "again": study.command}


def table_cells(run: LockedRun, key: str) -> list[dict[str, Any]]:
    """The numbers of the rows of a key: file, line, name, value, unit, ends of the interval, sha256 of the weights."""
    cells = []
    for row_key, file, line, row in run.table_rows():
        properties = {"file": file, "line": line, "interval": [row["low"], row["high"]] if row.get("low") else []}
        properties |= {"unit": row.get("unit", ""), "weights": row.get("checkpoint_sha256", "")}
        cells += [{"name": name, "value": value, **properties} for name, value in row_numbers(row).items() if row_key == key]
    return cells


def _upstream_stages(stages: Mapping[str, LockedStage], path: str) -> list[tuple[int, LockedStage]]:
    """Every stage that led to a path, the nearest first, with the length of its longest way."""
    makers = {out.path: stage for stage in stages.values() for out in stage.outs}
    levels, waiting = {}, [(path, 0)]
    while waiting:
        path, level = waiting.pop()
        stage = find_maker(makers, path)
        if stage is not None and levels.get(stage.name, -1) < level:
            levels[stage.name] = level
            waiting += [(dep.path, level + 1) for dep in stage.deps]
    return [(level, stages[name]) for level, name in sorted((level, name) for name, level in levels.items())]


def _declared(stage: LockedStage) -> dict[str, Any]:
    """What a lock records of a stage."""
    properties = {"name": stage.name, "command": stage.command, "settings": dict(stage.params)}
    for verb, files in (("wrote", stage.outs), ("read", stage.deps)):
        properties[verb] = [{"path": file.path, "md5": file.md5, "bytes": file.size, "count": file.nfiles or 1} for file in files]
    return properties


def _stage(run: LockedRun, stage: LockedStage) -> dict[str, Any]:
    properties = _declared(stage)
    properties["shards"] = {name: sha for out in stage.outs for name, sha in run.shards(out.path).items()}
    made = next((run.json_object(f"{out.path}/{PROVENANCE}") for out in stage.outs), {})
    locked = next((dep for dep in stage.deps if dep.path.startswith(f"{CODE}/")), None)
    code = run.json(locked.path) if locked and run.disk.md5(locked.path) == locked.md5 else made.get("code")
    properties["code"] = code and {"package": Path(locked.path).stem, "sha256": code["sha256"], "modules": code["modules"]}
    environment = (run.environment(stage) or {}).items()
    properties["environment"] = {key: value for key, value in environment if key not in ("stage", "out_sha256")}
    return properties | {"overrides": made.get("overrides") or {}}


def as_text(explained: dict[str, Any]) -> str:
    """What `explain` or `explain_study` returns, for a terminal."""
    lines = [f"{'cell':<12}{_cell_text(cell)}" for cell in explained["cells"]]
    for run in explained.get("runs", ()):
        lines += ["", f"{'seed ' + str(run['seed']):<12}{_cell_text(run['cell'])}"]
        lines += [f"   {name:<12}{run[name]}" for name in ("experiment", "lock")]
        lines += [f"   {'checkpoint':<12}sha256 {sha}" for sha in [run["checkpoint"]["sha256"]] if sha]
        read = {file["path"] for stage in run["stages"] for file in stage["read"]}
        for stage in run["stages"]:
            wrote = (file for file in stage["wrote"] if file["path"] in read or stage["level"] == 0)
            lines += [f"   <- {stage['name']}: {file['path']}  md5 {file['md5']}" for file in wrote]
    for name in ("result", "checkpoint") if "result" in explained else ():
        lines.append(f"{name:<12}{explained[name]['path']}: sha256 {explained[name]['sha256'] or 'unknown, it is not here'}")
    for stage in explained.get("stages", ()):
        lines += ["", f"<- {stage['name']}", f"   command  {stage['command']}"]
        for verb in ("wrote", "read"):
            for file in stage[verb]:
                many = f" in {file['count']:,} files" if file["count"] > 1 else ""
                lines.append(f"   {verb:<8} {file['path']}  md5 {file['md5']}, {file['bytes']:,} bytes{many}")
        lines += [f"   holds    {name}  sha256 {sha}" for name, sha in stage["shards"].items()]
        lines += [f"   setting  {key} = {json.dumps(value)}" for key, value in stage["settings"].items()]
        if code := stage["code"]:
            lines.append(f"   code     {code['package']}: sha256 {code['sha256']}, {len(code['modules'])} modules")
        if environment := stage["environment"]:
            facts = [f"{key} {value}" for key, value in environment.items() if key not in ("versions", "finished_unix_s")]
            facts += [f"{name} {version}" for name, version in environment.get("versions", {}).items()]
            lines.append(f"   ran on   {', '.join(facts)}")
    return "\n".join(map(on_one_line, [*lines, "", "to make it again", f"   {explained['again']}"]))


def _cell_text(cell: dict[str, Any]) -> str:
    interval = f" [{', '.join(cell['interval'])}]" if cell["interval"] else ""
    return f"{cell['file']} line {cell['line']}: {cell['name']} = {cell['value']}{interval} {cell['unit']}".rstrip()
