"""What a built report says, read from its files on disk or in a git revision; the artifacts need not be there."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from scaling4d import config
from scaling4d.records import UserError
from scaling4d.report.story import leaves

WORKSPACE = "workspace"
EXPERIMENTS = "refs/exps/"  # where DVC keeps experiments: <2>/<38 of the commit that they start from>/<name>
NUMBERS = ("value", "low", "high", "parameters", "flops", "clips_seen", "train_loss", "val_loss", "loss", "examples", "seed")
TEXT = {"encoding": "utf-8", "errors": "replace"}


@dataclass(frozen=True)
class Built:
    """One report with the settings that it was built with.

    name: as it was asked for. revision: 40 digits, empty for the workspace. settings: params.yaml by dotted key.
    results, points, curves: rows of results.csv (with an interval), pretrain.csv and curves.csv. stages: of stages.json, empty in
    reports older than that file. code: md5 of each room's hash file, from dvc.lock.
    """

    name: str
    revision: str
    settings: Mapping[str, Any]
    results: tuple[Mapping[str, Any], ...]
    points: tuple[Mapping[str, Any], ...]
    curves: tuple[Mapping[str, Any], ...]
    stages: Mapping[str, Any]
    code: Mapping[str, str]

    def result(self, key: tuple[str, str, str]) -> Mapping[str, Any] | None:
        """key: encoder, task, protocol."""
        return next((row for row in self.results if key_of(row) == key), None)


def key_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["encoder"], row["task"], row["protocol"]


def read(name: str = WORKSPACE, folder: str | None = None) -> Built:
    """The report of a git revision, of a DVC experiment by its name, or of `workspace`, the files as they lie here.

    Args:
        folder: of the report; as the revision's own settings say, unless told.
    Raises:
        UserError: no such revision, or no report in it.
    """
    revision = "" if name == WORKSPACE else resolve(name)
    settings = YAML(typ="safe", pure=True).load(_text(name, revision, str(config.PARAMS)) or "{}")
    folder = folder or config.section(settings, "report.folder")
    results = _text(name, revision, f"{folder}/results.csv")
    if results is None:
        raise UserError(f"{name} has no {folder}/results.csv; build the report there with `dvc repro` and commit it")
    rows = {part: _rows(_text(name, revision, f"{folder}/{part}.csv")) for part in ("pretrain", "curves")}
    lock = YAML(typ="safe", pure=True).load(_text(name, revision, "dvc.lock") or "{}") or {}
    code = {Path(out["path"]).stem: out["md5"] for out in lock.get("stages", {}).get("code", {}).get("outs", ())}
    return Built(
        name=name,
        revision=revision,
        settings=dict(leaves(settings)),
        results=tuple(row for row in _rows(results) if row["low"] != ""),
        points=rows["pretrain"],
        curves=rows["curves"],
        stages=json.loads(_text(name, revision, f"{folder}/stages.json") or "{}"),
        code=code,
    )


def experiments() -> list[str]:
    """Names of the DVC experiments in this repository, whatever commit they start from."""
    refs = _git("for-each-ref", "--format=%(refname)", EXPERIMENTS) or ""
    parts = (ref.removeprefix(EXPERIMENTS).split("/") for ref in refs.splitlines())
    return sorted(name for first, *_, name in parts if len(first) == 2)


def history(path: str, limit: int) -> list[str]:
    """The newest commits that changed a file, short, the newest first."""
    return (_git("log", f"-{limit}", "--format=%h", "--", path) or "").split()


def resolve(name: str) -> str:
    """The commit of a revision or of an experiment.

    Raises:
        UserError: there is none of that name.
    """
    refs = _git("for-each-ref", "--format=%(refname)", EXPERIMENTS) or ""
    mine = [ref for ref in refs.splitlines() if ref.endswith(f"/{name}")]
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{mine[0] if len(mine) == 1 else name}^{{commit}}")
    if found is None:
        known = ", ".join(experiments()) or "none"
        raise UserError(f"no revision or experiment {name!r}; needed a git revision, {WORKSPACE!r}, or an experiment: {known}")
    return found.strip()


def _text(name: str, revision: str, path: str) -> str | None:
    """A file of the revision; None where it has none."""
    if name == WORKSPACE:
        return Path(path).read_text() if Path(path).is_file() else None
    return _git("show", f"{revision}:{path}")


def _git(*command: str) -> str | None:
    done = subprocess.run(["git", *command], capture_output=True, check=False, **TEXT)
    return done.stdout if done.returncode == 0 else None


def _rows(text: str | None) -> tuple[dict[str, Any], ...]:
    """Rows of a csv; what is a number becomes one."""
    rows = csv.DictReader((text or "").splitlines())
    return tuple({key: float(value) if key in NUMBERS and value else value for key, value in row.items()} for row in rows)
