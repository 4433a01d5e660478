"""Predictions of studies: committed before the results, unchanged since, and those of the law of the named runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from scaling4d import artifacts
from scaling4d.audit.run import NOTE, UNCHECKED, WRONG, AuditFinding
from scaling4d.provenance import commits_of, file_at, git
from scaling4d.records import UserError
from scaling4d.studies.study import REPORTS, RUNS

TOLERANCE = 1e-3  # relative, of a fit that is made again on another machine; ours


def findings() -> Iterator[AuditFinding]:
    """Findings about every file of experiments/prediction."""
    from scaling4d.studies.law import PREDICTIONS

    for path in sorted(PREDICTIONS.glob("*.json")):
        try:
            yield from _order(path)
            yield from _numbers(path)
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            yield AuditFinding(WRONG, path.as_posix(), f"{' '.join(str(error).split())}; take it from git again")


def _order(path: Path) -> Iterator[AuditFinding]:
    """The commit of the prediction comes before that of the results, and the file is as in that commit."""
    results = (REPORTS / path.stem / RUNS).as_posix()
    made, measured = commits_of(path.as_posix()), commits_of(results)
    if not made:
        kind = UNCHECKED if git("rev-parse", "HEAD") is None else WRONG if Path(results).is_file() else NOTE
        yield AuditFinding(kind, path.as_posix(), f"no commit has it; commit it before `scaling4d study {path.stem}`")
        return
    first = made[-1]
    if file_at(first, path.as_posix()) != path.read_text():
        yield AuditFinding(WRONG, path.as_posix(), f"it was changed after commit {first[:7]}, which predicts first")
    if not measured:
        return
    before = git("merge-base", "--is-ancestor", first, measured[-1]) is not None
    if first == measured[-1] or not before:
        shallow = git("rev-parse", "--is-shallow-repository") == b"true\n"
        message = f"commit {first[:7]} predicts {results}, which commit {measured[-1][:7]} measures already"
        yield AuditFinding(UNCHECKED if shallow else WRONG, path.as_posix(), message)


def _numbers(path: Path) -> Iterator[AuditFinding]:
    """The predicted losses follow from the named runs, where those are still here."""
    from scaling4d.studies.law import law_of

    prediction = json.loads(path.read_text())
    source = Path(prediction["source"])
    if not (source / RUNS).is_file() or artifacts.sha256(source / RUNS) != prediction["source_sha256"]:
        yield AuditFinding(NOTE, path.as_posix(), f"it was made of other runs than {source / RUNS} has now")
        return
    law = law_of(source)
    for row in prediction["arms"]:
        again = law.prediction(row["parameters"], row["clips_seen"])
        given = (row["predicted"], row["low"], row["high"])
        if not all(math.isclose(*pair, rel_tol=TOLERANCE) for pair in zip(given, again, strict=True)):
            message = f"{row['arm']} has {given[0]:.5f}; the law of {source / RUNS} predicts {again[0]:.5f}"
            yield AuditFinding(WRONG, path.as_posix(), message)
