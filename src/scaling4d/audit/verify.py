"""Check that settings, code, data, weights and numbers on disk are those that made each other."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config
from scaling4d.audit import lock
from scaling4d.audit.explain import explain as explain_number
from scaling4d.checkpoint import WEIGHTS
from scaling4d.records import Result, UserError

WRONG, NOTE, UNCHECKED = "wrong", "note", "not checked"


@dataclass(frozen=True)
class Finding:
    """kind: `wrong` (something differs), `note` (differs and is declared), `not checked` (the bytes are not here)."""

    kind: str
    where: str
    message: str


def run(explain: str | None) -> int:
    """The `audit` command in the current folder; 0 when nothing is wrong."""
    if explain is not None:
        print(explain_number(Path(), explain))
        return 0
    findings = verify(Path())
    for finding in findings:
        print(f"{finding.kind:<12}{finding.where}: {finding.message}")
    wrong = sum(finding.kind == WRONG for finding in findings)
    unchecked = any(finding.kind == UNCHECKED for finding in findings)
    print(f"{wrong} wrong; " + ("what is not here was not checked; " if unchecked else "") + "everything else agrees")
    return 1 if wrong else 0


def verify(root: Path) -> list[Finding]:
    """Every disagreement, and what could not be checked, in a fixed order.

    Raises:
        UserError: no project here, or its pipeline does not resolve.
    """
    with chdir(root):
        settings = config.read()
        stages, missing = lock.stages(Path())
        findings = [Finding(WRONG, name, "not in dvc.lock, so it was never run: run `dvc repro`") for name in missing]
        return [*findings, *_hashes(stages), *_settings(settings), *_provenances(stages), *_numbers(settings)]


def _hashes(stages: dict[str, lock.Stage]) -> Iterator[Finding]:
    """Recompute the hash of everything that a stage read or wrote."""
    ignored = lock.ignored_names(Path())
    now: dict[str, str] = {}
    absent: dict[str, None] = {}
    for stage in stages.values():
        for role, files in (("wrote", stage.outs), ("read", stage.deps)):
            for file in files:
                path = Path(file.path)
                if not path.exists():
                    absent[file.path] = None
                    continue
                found = now.setdefault(file.path, lock.md5(path, ignored))
                if found != file.md5:
                    inside = lock.changed(Path(), file, ignored)
                    detail = f" (differs: {', '.join(inside[:5])}{' ...' if inside[5:] else ''})" if inside else ""
                    yield Finding(WRONG, stage.name, f"{role} {file.path} as md5 {file.md5}, on disk it is {found}{detail}")
    if absent:
        names = ", ".join(list(absent)[:4]) + (" ..." if len(absent) > 4 else "")
        yield Finding(
            UNCHECKED, "dvc.lock", f"{len(absent)} files and folders that it names are not here ({names}): run `dvc repro`"
        )


def _settings(settings: dict[str, Any]) -> Iterator[Finding]:
    """params.yaml is the composition of its profile, or the stages name what differs."""
    try:
        overrides = config.overrides(settings)
    except UserError as error:
        yield Finding(WRONG, "params.yaml", str(error))
        return
    files = sorted(artifacts.home(settings).rglob("provenance.json"))
    named = {key for path in files for key in (_json(path).get("overrides") or {})}
    for key, value in overrides.items():
        profile = settings["profile"]
        if key in named:
            yield Finding(
                NOTE, "params.yaml", f"override {key} = {value!r} of profile {profile}, named by the stages that it changes"
            )
        else:
            hint = f"undo it with `scaling4d compose profile={profile}`, or run `dvc repro`"
            yield Finding(
                WRONG, "params.yaml", f"{key} = {value!r} is not the value of profile {profile}, and no stage names it: {hint}"
            )


def _provenances(stages: dict[str, lock.Stage]) -> Iterator[Finding]:
    """The settings that an artifact names are those that dvc.lock names for its stage."""
    for stage in stages.values():
        for out in stage.outs:
            path = Path(out.path) / "provenance.json"
            if not path.is_file():
                continue
            named = _json(path).get("settings") or {}
            for key, value in stage.params.items():
                if key not in named:
                    yield Finding(WRONG, stage.name, f"{path} does not name the setting {key} that dvc.lock names")
                elif named[key] != value:
                    yield Finding(WRONG, stage.name, f"{path} was made with {key} = {named[key]!r}, dvc.lock says {value!r}")


def _numbers(settings: dict[str, Any]) -> Iterator[Finding]:
    """Weights are those that a Result names; every number in the tables is one of a Result, a summary and metrics.json."""
    home, folder = artifacts.home(settings), Path(config.section(settings, "report.folder"))
    yield from _weights(home)
    results, points = _rows(folder / "results.csv"), _rows(folder / "pretrain.csv")
    for path, rows in ((folder / "results.csv", results), (folder / "pretrain.csv", points)):
        if rows is None:
            yield Finding(UNCHECKED, str(path), "not here: run `dvc repro`")
    absent = 0
    for row in results or ():
        where = home / "readout" / row["encoder"] / row["task"] / row["protocol"] / "result.json"
        if not where.is_file():
            absent += 1
            continue
        result = Result.read(where)
        value = result.value if row["metric"] == result.metric else result.others.get(row["metric"])
        if repr(value) != row["value"] or result.checkpoint_sha256 != row["checkpoint_sha256"]:
            yield Finding(WRONG, f"{folder}/results.csv", f"{row['metric']} = {row['value']} is not the {value!r} of {where}")
    for row in points or ():
        where = home / "pretrain" / row["point"] / "summary.json"
        if not where.is_file():
            absent += 1
            continue
        summary = _json(where)
        for key, text in row.items():
            if str(summary.get(key)) != text:
                yield Finding(
                    WRONG, f"{folder}/pretrain.csv", f"{row['point']} {key} = {text} is not the {summary.get(key)!r} of {where}"
                )
    if absent:
        yield Finding(UNCHECKED, str(folder), f"{absent} rows of its tables, because {home} does not hold their results")
    yield from _summary(folder, results or [], points or [])


def _weights(home: Path) -> Iterator[Finding]:
    now: dict[Path, str] = {}
    for path in sorted((home / "readout").glob("*/*/*/result.json")):
        result = Result.read(path)
        weights = home / "pretrain" / result.encoder / WEIGHTS
        if not weights.is_file():
            yield Finding(UNCHECKED, str(path), f"names the weights {weights}, which are not here")
        elif now.setdefault(weights, artifacts.sha256(weights)) != result.checkpoint_sha256:
            yield Finding(WRONG, str(path), f"was measured on weights {result.checkpoint_sha256}, {weights} is {now[weights]}")


def _summary(folder: Path, results: list[dict[str, str]], points: list[dict[str, str]]) -> Iterator[Finding]:
    """metrics.json says the same as the tables; git alone proves this."""
    path = folder / "metrics.json"
    if not path.is_file():
        yield Finding(UNCHECKED, str(path), "not here: run `dvc repro`")
        return
    said = _json(path)
    expected = {(row["task"], row["protocol"], row["encoder"]): row["value"] for row in results if row["low"]}
    expected |= {("val_loss", row["point"]): row["val_loss"] for row in points}
    for keys, text in expected.items():
        value: Any = said
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if repr(value) != text:
            yield Finding(WRONG, str(path), f"{' '.join(keys)} = {value!r}, the table says {text}")


def _rows(path: Path) -> list[dict[str, str]] | None:
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; remove it and run `dvc repro`") from error
