"""Walk one number back: cell <- result <- checkpoint <- shards <- source videos <- settings <- code <- environment."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from scaling4d.artifacts import PROVENANCE
from scaling4d.audit.run import CODE, LockedRun, row_numbers
from scaling4d.provenance import LockedStage, overlap
from scaling4d.records import UserError, did_you_mean, on_one_line


def explain(runs: list[LockedRun], key: str) -> dict[str, Any]:
    """The cells of a number in the report, and every stage that led to it, the nearest first. A fresh clone knows less.

    Args:
        key: `encoder/task/protocol`, `point/pretrain` or `point/reconstruct`; `/metric` after it for one number of the
            row; the report's folder before it for a kept run (a lock beside a report).
    Returns:
        key, cells (see `table_cells`), result and checkpoint (path, sha256), stages, and `again`, the command that
        repeats the last stage. A stage has name, level (steps back from the number), command, read and wrote (path,
        md5, bytes, count of files), shards (sha256 by name), settings, overrides, code (package, sha256, modules) and
        environment (machine, versions, time). Of large files, only the result and the weights are read.
    Raises:
        UserError: no such number.
    """
    folder, _, rest = key.partition("/")
    kept = next((run for run in runs[1:] if Path(run.folder).name == folder), None)
    run, number = (runs[0], key) if kept is None else (kept, rest)
    row = next((row for row in run.records if f"{number}/".startswith(f"{row}/")), "")
    cells = [cell for cell in table_cells(run, row) if number in (row, f"{row}/{cell['name']}")]
    if not cells:
        known = ", ".join(run.records) or "none was run"
        known += did_you_mean(number, run.records, 3)
        raise UserError(f"no number {key!r}; needed encoder/task/protocol, point/pretrain or point/reconstruct, one of: {known}")
    record, weights = run.records[row], run.weights(row.split("/")[0])
    levels, waiting = {}, [(record, 0)]  # stage -> its longest way to the number
    while waiting:
        path, level = waiting.pop()
        stage = run.maker(path)
        if stage is not None and levels.get(stage.name, -1) < level:
            levels[stage.name] = level
            waiting += [(dep.path, level + 1) for dep in stage.deps]
    stages = [{"level": n, **_stage(run, run.stages[name])} for n, name in sorted((n, name) for name, n in levels.items())]
    again = "" if kept is None else f"scaling4d compose profile={Path(run.home).name} && "
    again += f"dvc repro {stages[0]['name']}"
    listed = next((cell["weights"] for cell in cells if cell["weights"]), None)
    checkpoint = {"path": weights, "sha256": run.disk.sha256(weights) or listed}
    result = {"path": record, "sha256": run.disk.sha256(record)}
    return {"key": key, "cells": cells, "result": result, "checkpoint": checkpoint, "stages": stages, "again": again}


def table_cells(run: LockedRun, key: str) -> list[dict[str, Any]]:
    """The numbers of the rows of a key: file, line, name, value, unit, ends of the interval, sha256 of the weights."""
    cells = []
    for row_key, file, line, row in run.table_rows():
        properties = {"file": file, "line": line, "interval": [row["low"], row["high"]] if row.get("low") else []}
        properties |= {"unit": row.get("unit", ""), "weights": row.get("checkpoint_sha256", "")}
        cells += [{"name": name, "value": value, **properties} for name, value in row_numbers(row).items() if row_key == key]
    return cells


def _stage(run: LockedRun, stage: LockedStage) -> dict[str, Any]:
    properties = {"name": stage.name, "command": stage.command, "settings": dict(stage.params)}
    for verb, files in (("wrote", stage.outs), ("read", stage.deps)):
        properties[verb] = [{"path": file.path, "md5": file.md5, "bytes": file.size, "count": file.nfiles or 1} for file in files]
    properties["shards"] = {name: sha for out in stage.outs for name, sha in run.shards(out.path).items()}
    made = next((run.json_object(f"{out.path}/{PROVENANCE}") for out in stage.outs), {})
    locked = next((dep for dep in stage.deps if dep.path.startswith(f"{CODE}/")), None)
    code = run.json(locked.path) if locked and run.disk.md5(locked.path) == locked.md5 else made.get("code")
    properties["code"] = code and {"package": Path(locked.path).stem, "sha256": code["sha256"], "modules": code["modules"]}
    environment = (run.environment(stage) or {}).items()
    properties["environment"] = {key: value for key, value in environment if key not in ("stage", "out_sha256")}
    return properties | {"overrides": made.get("overrides") or {}}


def as_text(explained: dict[str, Any]) -> str:
    """An explained number for a terminal."""
    lines = []
    for cell in explained["cells"]:
        interval = f" [{', '.join(cell['interval'])}]" if cell["interval"] else ""
        value = f"{cell['value']}{interval} {cell['unit']}".rstrip()
        lines.append(f"cell        {cell['file']} line {cell['line']}: {cell['name']} = {value}")
    for name in ("result", "checkpoint"):
        lines.append(f"{name:<12}{explained[name]['path']}: sha256 {explained[name]['sha256'] or 'unknown, it is not here'}")
    for stage in explained["stages"]:
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


def as_dot(explained: dict[str, Any]) -> str:
    """An explained number for Graphviz: a node a stage with its command and hashes, an edge from maker to reader."""
    number = [explained["key"], *(f"{cell['name']} = {cell['value']} {cell['unit']}".rstrip() for cell in explained["cells"])]
    number += [f"{explained[name]['path']} sha256 {explained[name]['sha256']}" for name in ("result", "checkpoint")]
    nodes, edges = {explained["key"]: number}, [(explained["stages"][0]["name"], explained["key"])]
    for stage in explained["stages"]:
        hashes = [f"wrote {out['path']} md5 {out['md5']}" for out in stage["wrote"]]
        hashes += [f"code {stage['code']['package']} sha256 {stage['code']['sha256']}"] if stage["code"] else []
        nodes[stage["name"]] = [stage["name"], stage["command"], *hashes]
        for maker in explained["stages"]:
            if any(overlap(dep["path"], out["path"]) for dep in stage["read"] for out in maker["wrote"]):
                edges.append((maker["name"], stage["name"]))
    quoted = partial(json.dumps, ensure_ascii=False)
    lines = [f"{quoted(name)} [label={quoted(chr(10).join(label))}];" for name, label in nodes.items()]
    lines += [f"{quoted(maker)} -> {quoted(reader)};" for maker, reader in edges]
    return "\n".join(["digraph lineage {", "node [shape=box, fontname=monospace];", *lines, "}"])
