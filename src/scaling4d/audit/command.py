"""The `audit` command: prints what it finds in the current folder and gives the exit code, 0 when nothing is wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from scaling4d.audit import crate, explain, picture, reproduced, studies, verify
from scaling4d.audit.run import runs
from scaling4d.records import UserError

FORMS = {"text": explain.text, "json": lambda found: json.dumps(found, indent=2, sort_keys=True), "svg": picture.svg}


def check() -> int:
    """Every hash, setting and number."""
    findings = [*verify.verify(Path()), *studies.findings()]
    for finding in findings:
        print(finding)
    wrong = sum(finding.kind == verify.WRONG for finding in findings)
    unchecked = any(finding.kind == verify.UNCHECKED for finding in findings)
    print(f"{wrong} wrong; " + ("what is not here was not checked; " if unchecked else "") + "everything else agrees")
    return 1 if wrong else 0


def walk_back(key: str, form: str) -> int:
    """One number.

    Raises:
        UserError: no such number or form.
    """
    if form not in FORMS:
        raise UserError(f"--as {form}: needed {', '.join(FORMS)}")
    print(FORMS[form](explain.explain(runs(), key)))
    return 0


def export(out: Path) -> int:
    """The run as an RO-Crate.

    Raises:
        UserError: it does not verify, or is not all here.
    """
    found = runs()
    wrong = [finding for finding in verify.findings(found) if finding.kind == verify.WRONG]
    if wrong:
        raise UserError(f"{len(wrong)} wrong, so no crate was written; the first: {wrong[0].where}: {wrong[0].message}")
    print(f"wrote {crate.write(found[0], out)}")
    return 0


def again() -> int:
    """A run made again against the committed one."""
    outcomes = reproduced.compare(runs()[0])
    for outcome in outcomes:
        print(f"{outcome.kind:<16}{outcome.stage}: {outcome.message}")
    counts = Counter(outcome.kind for outcome in outcomes)
    print("; ".join(f"{count} {kind}" for kind, count in counts.items()))
    return 1 if counts[reproduced.FAILED] or counts[reproduced.ABSENT] else 0
