"""dvc.lock -> LINEAGE: verify every hash, explain a number, compare a run made again, export the run.

The functions of command `audit`: each prints its findings about the current folder and returns the exit code.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from scaling4d.audit import evaluations, predictions, reproduced, studies
from scaling4d.audit.explain import as_text, explain, explain_study
from scaling4d.audit.run import NOTE, UNCHECKED, WRONG, AuditFinding, locked_run
from scaling4d.audit.verify import verify, verify_and_count
from scaling4d.records import UserError, on_one_line

__all__ = ["AuditFinding", "check", "check_evaluation", "check_reproduced", "explain_number", "export", "locked_run", "verify"]
FORMATS = {"text": as_text, "json": lambda explained: json.dumps(explained, indent=2, sort_keys=True)}


def check() -> int:
    """Verify every hash, setting and number; print the findings by kind, and the counts of all that was checked."""
    findings, counts = verify_and_count(locked_run())
    findings += [*studies.findings(), *predictions.findings()]
    kinds = ", ".join(f"{counts[kind]:,} {kind}" for kind in ("hashes", "settings", "numbers"))
    absent = f", {counts['absent']:,} files and folders not here" if counts["absent"] else ""
    return _report(findings, f"{kinds}{absent}")


def check_evaluation(folder: Path) -> int:
    """Verify a folder of `scaling4d evaluate`; print as `check`. Raises UserError: another folder."""
    findings, results = evaluations.verify_evaluation(folder)
    return _report(findings, f"{results} results of {on_one_line(folder)}")


def _report(findings: list[AuditFinding], checked: str) -> int:
    """Print findings by kind, and what was checked. Returns the exit code."""
    for kind in (NOTE, UNCHECKED, WRONG):
        for finding in (finding for finding in findings if finding.kind == kind):
            print(finding)
    wrong = sum(finding.kind == WRONG for finding in findings)
    print(f"{wrong} wrong; checked {checked}")
    return 1 if wrong else 0


def explain_number(key: str, form: str) -> int:
    """Walk a number of the run or of a study back. Raises UserError for an unknown number or form."""
    if form not in FORMATS:
        raise UserError(f"--as {form}: needed {', '.join(FORMATS)}")
    print(FORMATS[form](explain_study(key) or explain(locked_run(), key)))
    return 0


def export(out: Path) -> int:
    """Write the run as an RO-Crate. Raises UserError where it does not verify, or is not complete here."""
    from scaling4d.audit.crate import write_crate

    run = locked_run()
    wrong = [finding for finding in verify(run) if finding.kind == WRONG]
    if wrong:
        raise UserError(f"{len(wrong)} wrong, so no crate was written; the first: {wrong[0].where}: {wrong[0].message}")
    print(f"wrote {write_crate(run, out)}")
    return 0


def check_reproduced() -> int:
    """Compare a run made again with the committed one."""
    findings = reproduced.compare_with_committed(locked_run())
    for finding in findings:
        print(f"{finding.kind:<16}{on_one_line(f'{finding.where}: {finding.message}')}")
    kinds = Counter(finding.kind for finding in findings)
    print("; ".join(f"{count} {kind}" for kind, count in kinds.items()))
    return 1 if kinds[reproduced.FAILED] or kinds[reproduced.ABSENT] else 0
