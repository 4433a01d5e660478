"""Studies: every number of runs.csv is what its run's lock and DVC's cache say, and all else follows from runs.csv."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config, study
from scaling4d.audit import history, lock
from scaling4d.audit.verify import NOTE, SOURCE, UNCHECKED, WRONG, Finding, committed_place
from scaling4d.records import UserError
from scaling4d.study import Arm, Study

CACHE = Path(".dvc/cache")


def findings() -> Iterator[Finding]:
    """Of every study in reports/studies."""
    for path in sorted(study.REPORTS.glob(f"*/{study.FACTS}")):
        try:
            yield from _study(path)
        except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
            yield Finding(WRONG, path.parent.as_posix(), f"{' '.join(str(error).split())}; take it from git again")


def _study(path: Path) -> Iterator[Finding]:
    folder, said = path.parent, json.loads(path.read_text())
    for name, sha in said["files"].items():
        found = artifacts.sha256(folder / name) if (folder / name).is_file() else "not there"
        if found != sha:
            again = f"take it from git again, or run `scaling4d study {folder.name} --collect`"
            yield Finding(WRONG, f"{folder}/{name}", f"{path} says sha256 {sha}, it is {found}: {again}")
    if folder.name not in study.names():
        yield Finding(NOTE, str(path), f"{study.DEFINITIONS} no longer has this study")
        return
    mine = study.with_seeds(study.read(folder.name), ",".join(map(str, said["seeds"])))
    rows = list(csv.DictReader((folder / study.RUNS).read_text().splitlines()))
    if study.to_csv(study.TABLE_COLUMNS, study.table(rows, mine.base)) != (folder / study.TABLE).read_text():
        yield Finding(WRONG, f"{folder}/{study.TABLE}", f"it does not follow from {study.RUNS}")
    if (folder / study.FINDINGS).is_file():
        text = (folder / study.FINDINGS).read_text()
        yield from (Finding(WRONG, f"{folder}/{study.FINDINGS}", wrong) for wrong in study.unfounded(text, folder))
    yield from _numbers(mine, rows, said["runs"])
    for arm in mine.arms:
        yield from _settings(mine, arm)


def _numbers(mine: Study, rows: list[dict[str, str]], runs: Mapping[str, Any]) -> Iterator[Finding]:
    """runs.csv, row by row, from the locks and the cache."""
    absent = 0
    for arm in mine.arms:
        for seed in mine.seeds:
            where = mine.lock(arm.name, seed)
            stages = study.load_lock(where.read_text())
            found = study.numbers(arm, seed, stages, CACHE, runs[f"{arm.name}-{seed}"]["experiment"])
            here = [row for row in rows if (row["arm"], row["seed"]) == (arm.name, str(seed))]
            if found is None:
                absent += 1
            elif [*csv.DictReader(study.to_csv(study.RUN_COLUMNS, found).splitlines())] != here:
                yield Finding(
                    WRONG, f"{mine.folder}/{study.RUNS}", f"the rows of {arm.name}, seed {seed}, are not what {where} names"
                )
    if absent:
        again = f"`scaling4d study {mine.name}` makes them"
        yield Finding(UNCHECKED, mine.folder.as_posix(), f"{absent} runs whose results DVC's cache does not hold: {again}")


def _settings(mine: Study, arm: Arm) -> Iterator[Finding]:
    """The runs of an arm ran with the settings and the data of the commit that holds their code, and the arm's overrides."""
    for seed in mine.seeds:
        where = mine.lock(arm.name, seed)
        stages = lock.read(where)
        source = next((dep.md5 for dep in stages["code"].deps if dep.path == SOURCE), None)
        commit = _holding(source)
        if commit is None:
            yield Finding(
                UNCHECKED, str(where), f"no commit of this clone holds the {SOURCE} that it names, so neither settings nor data"
            )
            return
        composed = _composed(commit, arm.profile, arm.overrides) | {"seed": seed}
        for stage in stages.values():
            for key, value, wanted in lock.unequal(stage.params, config.declared(composed, list(stage.params))):
                message = f"{stage.name} ran with {key} = {value!r}; by the arm and commit {commit[:7]}, its code's, {wanted!r}"
                yield Finding(WRONG, str(where), message)
        made = {out.path for stage in stages.values() for out in stage.outs}
        read = {dep.path: dep.md5 for stage in stages.values() for dep in stage.deps if dep.path not in made}
        for path, md5 in read.items():
            if path.startswith("data/") and (found := _data(commit, path)) != md5:
                message = f"{path} was md5 {md5}; in commit {commit[:7]}, which holds its code, it is {found}"
                yield Finding(WRONG, str(where), message)


@cache
def _holding(source: str | None) -> str | None:
    return next((commit for commit in history.commits(SOURCE) if history.md5(commit, SOURCE) == source), None)


@cache
def _data(commit: str, path: str) -> str | None:
    return history.md5(commit, committed_place(commit, path))


@cache
def _composed(commit: str, profile: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    with chdir(_experiments(commit).name):
        return config.compose([f"profile={profile}", *overrides])


@cache
def _experiments(commit: str) -> tempfile.TemporaryDirectory:
    """experiments/ as it was in a commit, as long as this process lives."""
    folder = tempfile.TemporaryDirectory()
    history.write(commit, config.EXPERIMENTS.as_posix(), Path(folder.name))
    return folder
