"""A built report, read from its files on disk or in a git revision. The artifacts are not needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling4d import config
from scaling4d.provenance import LOCK, experiments, file_at, flatten, git, load_yaml, parse_csv, read_lock
from scaling4d.records import UserError

WORKSPACE = "workspace"
NUMBERS = ("value", "low", "high", "parameters", "flops", "clips_seen", "train_loss", "val_loss", "loss", "examples", "seed")


class NoReportError(UserError):
    """A revision without a report."""


@dataclass(frozen=True)
class BuiltReport:
    """One report with the settings that it was built with.

    name: given by the user. revision: 40 digits, empty for the workspace. settings: params.yaml by dotted key. results,
    points, curves: rows of results.csv (with an interval), pretrain.csv and curves.csv. stages: of stages.json. code:
    md5 of each package's hash file, from dvc.lock.
    """

    name: str
    revision: str
    settings: Mapping[str, Any]
    results: tuple[Mapping[str, Any], ...]
    points: tuple[Mapping[str, Any], ...]
    curves: tuple[Mapping[str, Any], ...]
    stages: Mapping[str, Any]
    code: Mapping[str, str]


def key_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """(encoder, task, protocol) of a row of results.csv."""
    return row["encoder"], row["task"], row["protocol"]


def read_built_report(name: str = WORKSPACE, folder: str | None = None) -> BuiltReport:
    """The report of a git revision, of a DVC experiment by its name, or of `workspace`, the files on disk.

    Args:
        folder: of the report; the default is that of the revision's settings.
    Raises:
        NoReportError: no report in it.
        UserError: no such revision, or the report is damaged.
    """
    revision = "" if name == WORKSPACE else _revision(name)

    def text(path: str) -> str | None:
        if revision:
            return file_at(revision, path)
        return Path(path).read_text() if Path(path).is_file() else None

    try:
        return _read(name, revision, text, folder)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: its report is damaged ({' '.join(repr(error).split())}); build it again there") from error


def _read(name: str, revision: str, text: Callable[[str], str | None], folder: str | None) -> BuiltReport:
    """text: of a file of the revision; None: absent."""
    settings = load_yaml(text(str(config.PARAMS)) or "{}")
    folder = folder or config.section(settings, "report.folder")
    names = ("results.csv", "pretrain.csv", "curves.csv", "stages.json")
    results, points, curves, stages = texts = [text(f"{folder}/{name}") for name in names]
    if None in texts:
        lacks = f"{folder}/{names[texts.index(None)]}"
        raise NoReportError(f"{name} has no {lacks}; build the report there with `dvc repro` and commit it")
    lock = text(str(LOCK))
    code = read_lock(LOCK, lock)["code"].outs if lock else ()
    return BuiltReport(
        name=name,
        revision=revision,
        settings=dict(flatten(settings)),
        results=tuple(row for row in _rows(results) if row["low"] != ""),
        points=_rows(points),
        curves=_rows(curves),
        stages=json.loads(stages),
        code={Path(out.path).stem: out.md5 for out in code},
    )


def _revision(name: str) -> str:
    """The commit of a revision or of an experiment."""
    known = experiments()
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{known.get(name, name)}^{{commit}}")
    if commit is None:
        names = ", ".join(sorted(known)) or "none"
        raise UserError(f"no revision or experiment {name!r}; needed a git revision, {WORKSPACE!r}, or an experiment: {names}")
    return commit.decode().strip()


def _rows(text: str) -> tuple[dict[str, Any], ...]:
    """Rows of a csv, with the columns NUMBERS as floats."""
    rows = parse_csv(text)
    if any(None in row for row in rows):
        raise ValueError("a row has more values than there are columns")
    return tuple({key: float(value) if key in NUMBERS and value else value for key, value in row.items()} for row in rows)
