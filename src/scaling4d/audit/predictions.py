"""Predictions of studies: committed after the named runs and before the results, unchanged since, of the runs' law."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from scaling4d.audit.commit import is_shallow
from scaling4d.audit.run import NOTE, UNCHECKED, WRONG, AuditFinding
from scaling4d.provenance import commits_of, file_at, git, life_of, parse_csv
from scaling4d.records import UserError
from scaling4d.studies.law import PREDICTIONS, law_of_text, predicting_runs, trained_runs
from scaling4d.studies.study import FACTS, REPORTS, RUNS

TOLERANCE = 1e-3  # relative, of a fit that is made again on another machine; ours


def findings() -> Iterator[AuditFinding]:
    """Findings about every file of experiments/prediction, also about those that are gone."""
    words = ("--format=", "--name-only", "-z", "--relative", "--diff-filter=A")
    added = (git("log", *words, "--", f"{PREDICTIONS}/") or b"").decode().replace("\n", "").split("\0")
    for name in sorted({name for name in added if name and not Path(name).is_file()}):
        yield AuditFinding(NOTE, name, f"the prediction of commit {commits_of(name)[-1][:7]} is gone")
    for path in sorted(PREDICTIONS.glob("*.json")):
        try:
            for kind, message in chain(_order(path), _numbers(path)):
                yield AuditFinding(kind, path.as_posix(), message)
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            yield AuditFinding(WRONG, path.as_posix(), f"{' '.join(str(error).split())}; take it from git again")


def _order(path: Path) -> Iterator[tuple[str, str]]:
    """The commit of the prediction has the predicting runs, comes before the results, and has the file as it is."""
    results = (REPORTS / path.stem / RUNS).as_posix()
    made, measured = life_of(path.as_posix()), life_of(results)
    if not made:
        kind = UNCHECKED if git("rev-parse", "HEAD") is None else WRONG if Path(results).is_file() else NOTE
        yield kind, f"no commit has it; commit it before `scaling4d study {path.stem}`"
        return
    first, late = made[-1], UNCHECKED if is_shallow() else WRONG
    if withdrawn := [commit for commit in commits_of(path.as_posix()) if commit not in made and file_at(commit, path.as_posix())]:
        message = f"an earlier prediction, of commit {withdrawn[-1][:7]}, was withdrawn before commit {first[:7]}"
        yield NOTE, message
    if file_at(first, path.as_posix()) != path.read_text():
        yield WRONG, f"it was changed after commit {first[:7]}, which predicts first"
    prediction = json.loads(path.read_text())
    source = f"{prediction['source']}/{RUNS}"
    if hashlib.sha256((file_at(first, source) or "").encode()).hexdigest() != prediction["source_sha256"]:
        message = f"commit {first[:7]} has no {source} of sha256 {prediction['source_sha256'][:12]}, from which it predicts"
        yield late, message
    measured_first = measured and (first == measured[-1] or git("merge-base", "--is-ancestor", first, measured[-1]) is None)
    if measured_first:
        message = f"commit {first[:7]} predicts {results}, which commit {measured[-1][:7]} measures already"
        yield late, message
    if (
        not Path(results).is_file()
        and (gone := commits_of(results))
        and git("merge-base", "--is-ancestor", first, gone[0]) is not None
    ):
        yield (
            NOTE,
            f"{results}, which commit {gone[0][:7]} changed last, is gone; `scaling4d study {path.stem}` makes its outcome again",
        )
    facts, arms = REPORTS / path.stem / FACTS, {row["arm"] for row in prediction["arms"]}
    runs = json.loads(facts.read_text())["runs"] if facts.is_file() else {}
    for run, known in runs.items():  # a run has the name of its settings, code and data
        name = known["experiment"] if run.rpartition("-")[0] in arms else ""
        if name and (commits := (git("log", "--format=%H", f"-S{name}", first, "--", f"{REPORTS}/") or b"").decode().split()):
            message = f"commit {first[:7]} predicts {run}, whose result commit {commits[-1][:7]} has already"
            yield late, message
    predicted = {(row["parameters"], row["clips_seen"]): row["arm"] for row in prediction["arms"]}
    former = (git("log", "--format=%H", f"{first}~", "--", f":(glob){REPORTS}/*/{RUNS}") or b"").decode().split()
    every = ((commit, name) for commit in (first, *former) for name in _results_in(commit))
    for commit, name in (pair for pair in every if not (measured_first and pair[1] == results)):
        for run in trained_runs(parse_csv(file_at(commit, name) or "")):
            if arm := predicted.pop((run.parameters, run.clips_seen), None):
                message = f"{arm} is predicted by commit {first[:7]}, in which {name} has a run of its size and clips already"
                gone = (
                    f"{name} of commit {commit[:7]} had a run of the size and clips of {arm}, which commit {first[:7]} predicts"
                )
                yield (late, message) if commit == first else (NOTE, gone)


def _results_in(commit: str) -> list[str]:
    """Names of the results of studies that a commit has."""
    listed = (git("ls-tree", "-r", "--name-only", commit, "--", f"{REPORTS}/") or b"").decode().splitlines()
    return [name for name in listed if Path(name).name == RUNS]


def _numbers(path: Path) -> Iterator[tuple[str, str]]:
    """The predicted losses follow from the runs that the prediction names."""
    prediction = json.loads(path.read_text())
    try:
        law = law_of_text(predicting_runs(prediction))
    except UserError as error:
        yield UNCHECKED if is_shallow() else WRONG, f"{error}; take it from git again"
        return
    for row in prediction["arms"]:
        again = law.prediction(row["parameters"], row["clips_seen"])
        given = (row["predicted"], row["low"], row["high"])
        if not all(math.isclose(*pair, rel_tol=TOLERANCE) for pair in zip(given, again, strict=True)):
            message = f"{row['arm']} has {given[0]:.5f}; the law of {prediction['source']}/{RUNS} predicts {again[0]:.5f}"
            yield WRONG, message
