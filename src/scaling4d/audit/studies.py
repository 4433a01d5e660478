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

from scaling4d import artifacts, config
from scaling4d.audit import history, lock
from scaling4d.audit.verify import NOTE, SOURCE, UNCHECKED, WRONG, Finding, committed_place
from scaling4d.records import UserError
from scaling4d.studies import study
from scaling4d.studies.study import Arm, Study

CACHE = Path(".dvc/cache")
SETTINGS = (f":(glob){config.EXPERIMENTS}/**/*.yaml", "data.dvc", ":(exclude)experiments/study")


def findings() -> Iterator[Finding]:
    """Of every study in reports/studies."""
    for path in sorted(study.REPORTS.glob(f"*/{study.FACTS}")):
        try:
            yield from _study(path)
        except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            yield Finding(WRONG, path.parent.as_posix(), f"{' '.join(str(error).split())}; take it from git again")


def _study(path: Path) -> Iterator[Finding]:
    folder, said = path.parent, json.loads(path.read_text())
    seeds = ",".join(map(str, said["seeds"]))
    again = f"take it from git again, or run `scaling4d study {folder.name} --seeds {seeds} --collect`"
    here = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file() and file != path}
    for name in sorted(here | said["files"].keys()):
        sha, found = said["files"].get(name, "nothing"), artifacts.sha256(folder / name) if name in here else "not there"
        if found != sha:
            yield Finding(WRONG, f"{folder}/{name}", f"{path} says sha256 {sha}, it is {found}: {again}")
    if folder.name not in study.names():
        yield Finding(NOTE, str(path), f"{study.DEFINITIONS} no longer has this study")
        return
    mine = study.with_seeds(study.read(folder.name), seeds)
    if (folder / study.FINDINGS).is_file():
        text = (folder / study.FINDINGS).read_text()
        yield from (Finding(WRONG, f"{folder}/{study.FINDINGS}", wrong) for wrong in study.unfounded(text, folder))
    places = {f"{arm.name}-{seed}": mine.lock(arm.name, seed) for arm in mine.arms for seed in mine.seeds}
    if absent := [place for place in (*places.values(), folder / study.RUNS, folder / study.TABLE) if not place.is_file()]:
        message = f"not there, though {study.DEFINITIONS}/{folder.name}.yaml asks for it: run `{mine.command}`"
        yield from (Finding(WRONG, str(place), message) for place in absent)
        return
    locks = {key: study.load_lock(place.read_text()) for key, place in places.items()}
    described = json.loads(json.dumps(study.described(mine, locks, said["runs"])))
    for key in sorted(described.keys() | said.keys() - {"files"}):
        if said.get(key) != described.get(key):
            yield Finding(WRONG, str(path), f"its {key!r} does not follow from {study.DEFINITIONS} and the locks: {again}")
    rows = list(csv.DictReader((folder / study.RUNS).read_text().splitlines()))
    if study.to_csv(study.TABLE_COLUMNS, study.table(rows, mine.base)) != (folder / study.TABLE).read_text():
        yield Finding(WRONG, f"{folder}/{study.TABLE}", f"it does not follow from {study.RUNS}")
    yield from _numbers(mine, rows, said["runs"], locks)
    for arm in mine.arms:
        yield from _settings(mine, arm)


def _numbers(mine: Study, rows: list[dict[str, str]], runs: Mapping[str, Any], locks: Mapping[str, Any]) -> Iterator[Finding]:
    """runs.csv, row by row, from the locks and the cache."""
    absent, where = 0, f"{mine.folder}/{study.RUNS}"
    for arm in mine.arms:
        for seed in mine.seeds:
            key, place = f"{arm.name}-{seed}", mine.lock(arm.name, seed)
            found = study.numbers(arm, seed, locks[key], CACHE, runs[key]["experiment"])
            here = [row for row in rows if (row["arm"], row["seed"]) == (arm.name, str(seed))]
            if found is None:
                absent += 1
            elif [*csv.DictReader(study.to_csv(study.RUN_COLUMNS, found).splitlines())] != here:
                yield Finding(WRONG, where, f"the rows of {arm.name}, seed {seed}, are not what {place} names")
    known = {(arm.name, str(seed)) for arm in mine.arms for seed in mine.seeds}
    for arm, seed in sorted({(row["arm"], row["seed"]) for row in rows} - known):
        yield Finding(WRONG, where, f"it has rows of {arm}, seed {seed}, which is no run of this study")
    if absent:
        again = f"`{mine.command}` makes them"
        yield Finding(UNCHECKED, mine.folder.as_posix(), f"{absent} runs whose results DVC's cache does not hold: {again}")


def _settings(mine: Study, arm: Arm) -> Iterator[Finding]:
    """The runs of an arm ran with the settings and the data of a commit that holds their code, and the arm's overrides."""
    for seed in mine.seeds:
        where = mine.lock(arm.name, seed)
        stages = lock.read(where)
        source = next((dep.md5 for dep in stages["code"].deps if dep.path == SOURCE), None)
        holding = _holding(source)
        if not holding:
            yield Finding(
                UNCHECKED, str(where), f"no commit of this clone holds the {SOURCE} that it names, so neither settings nor data"
            )
            return
        wrong = []
        for commit in holding:
            wrong.append([*_unlike(commit, arm, seed, stages)])
            if not wrong[-1]:
                break
        else:
            yield from (Finding(WRONG, str(where), message) for message in min(wrong, key=len))


def _unlike(commit: str, arm: Arm, seed: int, stages: Mapping[str, lock.Stage]) -> Iterator[str]:
    """How a run's settings and data differ from those of a commit that holds its code."""
    try:
        composed = _composed(commit, arm.profile, arm.overrides) | {"seed": seed}
        asked = {stage.name: config.declared(composed, list(stage.params)) for stage in stages.values()}
    except UserError as error:
        yield f"by commit {commit[:7]}, which holds its code, the arm does not compose: {error}"
        return
    for stage in stages.values():
        for key, value, wanted in lock.unequal(stage.params, asked[stage.name]):
            yield f"{stage.name} ran with {key} = {value!r}; by the arm and commit {commit[:7]}, which holds its code, {wanted!r}"
    made = {out.path for stage in stages.values() for out in stage.outs}
    read = {dep.path: dep.md5 for stage in stages.values() for dep in stage.deps if dep.path not in made}
    for path, md5 in read.items():
        if path.startswith("data/") and (found := _data(commit, path)) != md5:
            yield f"{path} was md5 {md5}; in commit {commit[:7]}, which holds its code, it is {found}"


@cache
def _holding(source: str | None) -> tuple[str, ...]:
    """Commits with this code, newest first: the one that brought it, and those that changed settings or data since."""
    first = next((commit for commit in history.commits(SOURCE) if history.md5(commit, SOURCE) == source), None)
    if first is None:
        return ()
    tree, changing = history.tree(first, SOURCE), history.commits(SOURCE, *SETTINGS)
    return tuple(commit for commit in changing if history.tree(commit, SOURCE) == tree)


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
