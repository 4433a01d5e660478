"""Studies: runs.csv has the numbers of its runs' locks and of DVC's cache, and all other files follow from runs.csv."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from scaling4d import artifacts
from scaling4d.audit.commit import closest_commit, is_shallow
from scaling4d.audit.run import NOTE, UNCHECKED, WRONG, AuditFinding, dvc_cache, without_leftovers
from scaling4d.provenance import LOCK, commits_of, differences, file_at, load_yaml, parse_csv, read_lock, to_csv
from scaling4d.records import UserError, is_of_finder
from scaling4d.studies import study as studies

TOLERANCE, OF_LARGEST = 1e-2, 2e-3  # of a fit that is made again on another machine: relative, and see `_largest`; ours
EXACT = 1e-6  # relative, of numbers without a search, whose last digits differ between kinds of CPUs; ours
MEASURED = {"points", "largest", "measured", "runs", "flops"}  # columns without a search, beside those of one


def findings() -> Iterator[AuditFinding]:
    """Findings about every study in reports/studies, and about their index."""
    from scaling4d.studies.page import INDEX, index_page

    index, damaged = studies.REPORTS / INDEX, False
    for folder in sorted(path.parent for path in studies.REPORTS.glob(f"*/{studies.RUNS}")):
        if not (folder / studies.FACTS).is_file():
            message = f"absent beside {studies.RUNS}; take it from git again, or run `scaling4d study {folder.name}`"
            yield AuditFinding(WRONG, f"{folder}/{studies.FACTS}", message)
    paths = sorted(studies.REPORTS.glob(f"*/{studies.FACTS}"))
    for path in paths:
        try:
            yield from _verify_study(path)
        except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            damaged = True
            yield AuditFinding(WRONG, path.parent.as_posix(), f"{' '.join(str(error).split())}; take it from git again")
    again = "take it from git again, or run `scaling4d study --collect`"
    if paths and not index.is_file():
        yield AuditFinding(WRONG, str(index), f"absent; {again}")
    elif not damaged and index.is_file() and index.read_text() != index_page():
        yield AuditFinding(WRONG, str(index), f"it does not follow from the studies; {again}")


def _verify_tables(study: studies.Study, rows: list[dict[str, str]], code: Mapping[str, str]) -> Iterator[AuditFinding]:
    """Tables and page follow from runs.csv. rows: of runs.csv. code: of study.json."""
    from scaling4d.studies import page

    folder, expected = study.folder, page.tables(study, rows)
    texts = {path.name: path.read_text() for path in (*folder.glob("*.csv"), *folder.glob("*.md"), folder / page.PAGE)}
    for name in sorted(expected.keys() | {*page.CSV_TABLES} & texts.keys()):
        text, other = texts.get(name, ""), expected.get(name, "")
        exact = name in (studies.TABLE, page.SIGNAL)
        if text != other and (exact or not _same_table(text, other, searched=name not in (page.TASKS, page.PREDICTED))):
            yield AuditFinding(WRONG, f"{folder}/{name}", f"it does not follow from {studies.RUNS}")
    if page.study_page(study, rows, texts, texts.get(studies.FINDINGS, ""), code) != texts[page.PAGE]:
        yield AuditFinding(WRONG, f"{folder}/{page.PAGE}", "it does not follow from the tables and findings.md")


def _same_table(text: str, expected: str, *, searched: bool) -> bool:
    """searched: its numbers are of a search, whose end differs a little between machines, except those of MEASURED."""
    rows, others = (list(csv.reader(table.splitlines())) for table in (text, expected))
    if not rows or len(rows) != len(others) or rows[0] != others[0]:
        return False
    head = rows[0]
    if any(len(row) != len(head) for row in (*rows, *others)):
        return False
    for row, other, largest in zip(rows[1:], others[1:], _largest(others), strict=True):
        for column, one, two in zip(head, row, other, strict=True):
            values = tuple(map(_number, (one, two)))
            tolerance = {"rel_tol": EXACT}
            if searched and column not in MEASURED:
                tolerance = {"rel_tol": TOLERANCE, "abs_tol": OF_LARGEST * largest[_quantity(column)]}
            if one != two and (None in values or not math.isclose(*values, **tolerance)):
                return False
    return True


def _largest(table: list[list[str]]) -> Iterator[dict[str, float]]:
    """For each row: quantity -> its largest absolute number, in the row where it has an interval, else in the table."""
    head, *rows = table
    sizes = [[abs(number) if (number := _number(cell)) and math.isfinite(number) else 0.0 for cell in row] for row in rows]
    columns: dict[str, list[int]] = {}
    for column, name in enumerate(head):
        columns.setdefault(_quantity(name), []).append(column)
    for row in sizes:
        yield {name: max(r[at] for r in ([row] if ats[1:] else sizes) for at in ats) for name, ats in columns.items()}


def _quantity(column: str) -> str:
    """A number and the ends of its intervals are one quantity: `floor`, `floor_low`; `value`, `low`, `low_of_runs`."""
    return re.sub("(^value|_?(low|high)(_of_runs)?)$", "", column)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _questions(name: str) -> Iterator[str]:
    """Questions of a study's definition in the commits that changed it, newest first."""
    path = (studies.DEFINITIONS / f"{name}.yaml").as_posix()
    for text in (file_at(commit, path) for commit in commits_of(path)):
        if text is not None:
            yield load_yaml(text)["question"].strip()


def _of_pipeline(stages: studies.Stages) -> studies.Stages:
    """Those that dvc.yaml has, by their names; all where there is none."""
    path = Path("dvc.yaml")
    defined = load_yaml(path.read_text())["stages"] if path.is_file() else {}
    several = {name: not {"matrix", "foreach"}.isdisjoint(stage) for name, stage in defined.items()}
    return {name: s for name, s in stages.items() if not defined or several.get(name.partition("@")[0]) == ("@" in name)}


def _contradictions(stages: studies.Stages, code: Mapping[str, str]) -> Iterator[str]:
    """A lock has one version of each file, and the code of study.json. code: of study.json."""
    versions: dict[str, set[str]] = {}
    for file in (file for stage in stages.values() for file in (*stage.outs, *stage.deps)):
        versions.setdefault(file.path, set()).add(file.md5)
    for path in (path for path, md5s in versions.items() if len(md5s) > 1):
        yield f"it contradicts itself about {path}: md5 {' and '.join(sorted(versions[path]))}"
    read = {(dep.path, dep.md5) for stage in stages.values() for dep in stage.deps if dep.path in code}
    if packages := {Path(path).stem for path, md5 in read if md5 != code[path]} - {*studies.UNMEASURED}:
        yield f"it is of other code than {studies.FACTS} names: {', '.join(sorted(packages))}"


def _other_origins(arm: studies.Arm, stages: studies.Stages) -> Iterator[str]:
    """The results in DVC's cache were made with the settings that the lock has for their stages."""
    for target in arm.targets:
        stage = stages[target]
        origin = studies.cached_json(stage.outs[0], artifacts.PROVENANCE, dvc_cache())
        settings = {key: value for key, value in origin["settings"].items() if key in stage.params} if origin else stage.params
        for key, value, locked in differences(settings, stage.params):
            yield f"the result of {target} was made with {key} = {value!r}, not {locked!r}"


def _verify_study(path: Path) -> Iterator[AuditFinding]:
    """path: of study.json."""
    folder, facts = path.parent, json.loads(path.read_text())
    again = f"take it from git again, or run `scaling4d study {folder.name} --collect`"
    here = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file() and file != path}
    for name in sorted(name for name in here | facts["files"].keys() if not is_of_finder(Path(name).name)):
        listed, now = facts["files"].get(name, "none"), artifacts.sha256(folder / name) if name in here else "absent"
        if listed != now:
            yield AuditFinding(WRONG, f"{folder}/{name}", f"sha256 {listed} in {path}, {now} on disk: {again}")
    study = studies.read_finished_study(folder)
    defined = studies.read_study(folder.name) if folder.name in studies.study_names() else study
    if absent := [str(seed) for seed in defined.seeds if seed not in study.seeds]:
        yield AuditFinding(
            NOTE, str(path), f"it lacks seeds {', '.join(absent)} of its definition; `{defined.command}` makes them"
        )
    if folder.name not in studies.study_names():
        yield AuditFinding(NOTE, str(path), f"{studies.DEFINITIONS} no longer has this study")
    elif (defined := replace(defined, seeds=study.seeds)) != study:
        if defined.question != study.question and defined.arms == study.arms and study.question not in _questions(folder.name):
            message = f"its 'question' is not that of {studies.DEFINITIONS}, nor of a commit of it: "
            message += f"take it from git again, or run `{study.command}`"
            yield AuditFinding(UNCHECKED if is_shallow() else WRONG, str(path), message)
        else:
            lacking = [arm.name for arm in defined.arms if arm.name not in {arm.name for arm in study.arms}]
            otherwise = f"otherwise, with arms {', '.join(lacking)}" if lacking else "otherwise"
            message = f"{studies.DEFINITIONS} now defines it {otherwise}; `{study.command}` makes it anew"
            yield AuditFinding(NOTE, str(path), message)
    hashed = read_lock(LOCK).get("code") if LOCK.is_file() else None
    code = {out.path: out.md5 for out in hashed.outs if out.path in facts["code"]} if hashed else {}
    if hashed and (packages := studies.changed_packages(facts["code"], code)):
        message = f"it was made with other code than {LOCK} names ({', '.join(packages)}); `{study.command}` makes it anew"
        yield AuditFinding(NOTE, str(path), message)
    needed = [*map(study.lock, study.runs), folder / studies.RUNS, folder / studies.TABLE]
    if absent := [file for file in needed if not file.is_file()]:
        yield from (AuditFinding(WRONG, str(file), f"absent, though {path} needs it: run `{study.command}`") for file in absent)
        return
    locks = {run: read_lock(study.lock(run)) for run in study.runs}
    if lacking := [study.lock(run) for run, stages in locks.items() if "code" not in stages]:
        yield from (AuditFinding(WRONG, str(lock), f"it has no stage `code`: run `{study.command}`") for lock in lacking)
        return
    for run, stages in locks.items():
        own = without_leftovers(stages, _of_pipeline(stages))
        yield from (AuditFinding(WRONG, str(study.lock(run)), message) for message in _contradictions(own, facts["code"]))
    expected = json.loads(json.dumps(studies.study_facts(study, locks, facts["runs"])))
    for key in sorted(expected.keys() | facts.keys() - {"files"}):
        if facts.get(key) != expected.get(key):
            message = f"its {key!r} does not follow from the locks: {again}"
            yield AuditFinding(WRONG, str(path), message)
    where, rows = f"{folder}/{studies.RUNS}", studies.read_runs(folder)
    yield from _verify_tables(study, rows, facts["code"])
    uncached, unknown = 0, 0
    for run, (arm, seed) in study.runs.items():
        numbers = studies.run_numbers(arm, seed, locks[run], dvc_cache(), facts["runs"][run]["experiment"])
        uncached += numbers is None
        listed = [row for row in rows if (row["arm"], row["seed"]) == (arm.name, str(seed))]
        if numbers is not None and parse_csv(to_csv(studies.RUN_COLUMNS, numbers)) != listed:
            yield AuditFinding(WRONG, where, f"the rows of {arm.name}, seed {seed}, are not those of {study.lock(run)}")
        if numbers is not None:
            yield from (AuditFinding(WRONG, str(study.lock(run)), message) for message in _other_origins(arm, locks[run]))
        overrides = (f"profile={arm.profile}", *arm.overrides)
        for kind, _, message in closest_commit(locks[run], overrides, {"seed": seed}, {})[1]:
            unknown += kind == UNCHECKED
            if kind == WRONG:
                yield AuditFinding(WRONG, str(study.lock(run)), message)
    listed = {(row["arm"], row["seed"]) for row in rows}
    for name, seed in sorted(listed - {(arm.name, str(seed)) for arm, seed in study.runs.values()}):
        yield AuditFinding(WRONG, where, f"it has rows of {name}, seed {seed}, which is no run of this study")
    results = f"{uncached} runs whose results DVC's cache does not hold: `{study.command}` makes them"
    inputs = f"{unknown} inputs of its locks: no commit of this clone has them"
    for count, message in ((uncached, results), (unknown, inputs)):
        if count:
            yield AuditFinding(UNCHECKED, folder.as_posix(), message)
