"""Walk one number back: cell <- Result <- checkpoint <- shards <- source videos <- settings <- code <- environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling4d.audit.lock import File, Stage
from scaling4d.audit.numbers import SHA256
from scaling4d.audit.run import Run
from scaling4d.records import UserError

NOT_NUMBERS = ("encoder", "task", "protocol", "metric", "unit", "higher_is_better", "checkpoint_sha256", "point", "method")


def explain(runs: list[Run], key: str) -> dict[str, Any]:
    """The number's cells in the report, and every stage that led to it, the nearest first; a fresh clone tells less, and says so.

    Args:
        key: `encoder/task/protocol`, `point/pretrain` or `point/reconstruct`, then, if one number of the row is meant, `/metric`;
            of a run kept beside its report, with the report's folder before it: `desk/mini/depth/frozen`.
    Returns:
        key, cells (file, line, name, value, interval, unit), result (path, sha256), checkpoint (path, sha256), stages: each with
        name, level (steps back from the number), command, read and wrote (path, md5, bytes, count of files), shards (sha256 by
        name, as the clips describe them), settings, overrides, code (room, sha256, modules) and environment (machine, versions,
        time), then `again`, the command that repeats the last one. Only the result and the weights are read; `audit` reads all.
    Raises:
        UserError: no such number.
    """
    run, name = _run(runs, key)
    row = next((row for row in run.numbers if name == row or name.startswith(f"{row}/")), None)
    cells = list(_cells(run, row, name[len(row) + 1 :])) if row else []
    if not cells:
        known = ", ".join(run.numbers) or "none was run"
        raise UserError(f"no number {key!r}; needed encoder/task/protocol, point/pretrain or point/reconstruct, one of: {known}")
    record, encoder = run.numbers[row], row.split("/")[0]
    levels = _levels(run, record)
    last = next(iter(levels))
    again = f"dvc repro {last}" if run.settings else f"scaling4d compose profile={Path(run.home).name} && dvc repro {last}"
    return {
        "key": key,
        "cells": cells,
        "result": {"path": record, "sha256": run.disk.sha256(record)},
        "checkpoint": {"path": run.weights(encoder), "sha256": run.disk.sha256(run.weights(encoder)) or _named(cells)},
        "stages": [{"level": level, **_stage(run, run.stages[stage])} for stage, level in levels.items()],
        "again": again,
    }


def keys(run: Run) -> list[str]:
    """Of every number in the tables of a report."""
    return [f"{row}/{cell['name']}" for row in run.numbers for cell in _cells(run, row, "")]


def text(found: dict[str, Any]) -> str:
    """What `explain` found, for a terminal."""
    lines = []
    for cell in found["cells"]:
        interval = f" [{', '.join(cell['interval'])}]" if cell["interval"] else ""
        unit = f" {cell['unit']}" if cell["unit"] else ""
        lines.append(f"cell        {cell['file']} line {cell['line']}: {cell['name']} = {cell['value']}{interval}{unit}")
    for kind in ("result", "checkpoint"):
        lines.append(f"{kind:<12}{found[kind]['path']}: sha256 {found[kind]['sha256'] or 'unknown, it is not here'}")
    for stage in found["stages"]:
        lines += ["", f"<- {stage['name']}", f"   command  {stage['command']}"]
        for role in ("wrote", "read"):
            for file in stage[role]:
                many = f" in {file['count']:,} files" if file["count"] > 1 else ""
                lines.append(f"   {role:<8} {file['path']}  md5 {file['md5']}, {file['bytes']:,} bytes{many}")
        lines += [f"   holds    {name}  sha256 {sha}" for name, sha in stage["shards"].items()]
        lines += [f"   setting  {key} = {json.dumps(value)}" for key, value in stage["settings"].items()]
        if stage["code"]:
            lines.append(
                f"   code     {stage['code']['room']}: sha256 {stage['code']['sha256']}, {len(stage['code']['modules'])} modules"
            )
        if stage["environment"]:
            lines.append(f"   ran on   {', '.join(_facts(stage['environment']))}")
    return "\n".join([*lines, "", "to make it again", f"   {found['again']}"])


def _run(runs: list[Run], key: str) -> tuple[Run, str]:
    """The run that a key means, and the key within it."""
    first, _, rest = key.partition("/")
    kept = next((run for run in runs[1:] if Path(run.folder).name == first), None)
    return (runs[0], key) if kept is None else (kept, rest)


def _cells(run: Run, row: str, metric: str) -> Iterator[dict[str, Any]]:
    """metric: of the row, or empty for all of them."""
    words = row.split("/")
    table = "results" if len(words) == 3 else words[1]
    wanted = dict(zip(("encoder", "task", "protocol"), words, strict=True)) if table == "results" else {"point": words[0]}
    for line, found in run.rows(table, **wanted):
        values = (
            {found["metric"]: found["value"]} if table == "results" else {k: v for k, v in found.items() if k not in NOT_NUMBERS}
        )
        for name, value in values.items():
            if metric in ("", name):
                interval = [found["low"], found["high"]] if found.get("low") else []
                shared = {"file": f"{run.folder}/{table}.csv", "line": line, "unit": found.get("unit", "")}
                yield {
                    **shared,
                    "name": name,
                    "value": value,
                    "interval": interval,
                    "weights": found.get("checkpoint_sha256", ""),
                }


def _named(cells: list[dict[str, Any]]) -> str | None:
    """The weights' hash as the table names it."""
    return next((cell["weights"] for cell in cells if SHA256.fullmatch(cell["weights"])), None)


def _levels(run: Run, path: str) -> dict[str, int]:
    """Every stage that a path comes from -> how many steps back it lies at most, the nearest first."""
    levels: dict[str, int] = {}
    waiting = [(path, 0)]
    while waiting:
        at, level = waiting.pop()
        stage = run.maker(at)
        if stage is not None and levels.get(stage.name, -1) < level:
            levels[stage.name] = level
            waiting += [(dep.path, level + 1) for dep in stage.deps]
    return dict(sorted(levels.items(), key=lambda item: (item[1], item[0])))


def _stage(run: Run, stage: Stage) -> dict[str, Any]:
    room = next((dep for dep in stage.deps if dep.path.startswith("artifacts/code/")), None)
    said = next((run.json(f"{out.path}/provenance.json") or {} for out in stage.outs), {})
    facts = run.facts(stage)
    return {
        "name": stage.name,
        "command": stage.command,
        "wrote": [_file(file) for file in stage.outs],
        "read": [_file(file) for file in stage.deps],
        "shards": {name: sha for out in stage.outs for name, sha in run.described(out.path).items()},
        "settings": dict(stage.params),
        "overrides": said.get("overrides") or {},
        "code": run.json(room.path) if room and run.disk.md5(room.path) == room.md5 else said.get("code"),
        "environment": {key: value for key, value in facts.items() if key not in ("stage", "out_sha256")} if facts else {},
    }


def _file(file: File) -> dict[str, Any]:
    return {"path": file.path, "md5": file.md5, "bytes": file.size, "count": file.nfiles or 1}


def _facts(environment: dict[str, Any]) -> list[str]:
    versions = [f"{name} {version}" for name, version in environment.get("versions", {}).items()]
    plain = [f"{key} {value}" for key, value in environment.items() if key not in ("versions", "finished_unix_s")]
    return [*plain, *versions]
