"""`audit --reproduced`: compare a run that was made again with the committed one, stage by stage.

Package `reproduce` is another thing: published numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scaling4d.audit.run import REPORT, AuditFinding, LockedRun, find_maker, recorded_row, row_numbers, without_leftovers
from scaling4d.provenance import LOCK, LockedStage, differences, file_at, read_lock, required
from scaling4d.records import UserError

# Kinds of findings. CLOSE: every number is inside its interval. OTHER: no number of its own, see the stages after it.
# FAILED: a number outside its interval, or other settings, code or data. ABSENT: not here.
SAME, CLOSE, OTHER, FAILED, ABSENT = "same bytes", "same numbers", "other bytes", "not reproduced", "not made again"
TOLERANCE = 0.01  # of a number without an interval, relative to its value; ours (measured: experiments/LOG.md)
NOT_COMPARED = ("seconds", "finished_unix_s", "clips_per_s", "git", "out_sha256", "versions")  # of two environments


def compare_with_committed(run: LockedRun) -> list[AuditFinding]:
    """Every stage of the checkout's run, as its files are now, against dvc.lock and the report of the last commit.

    A readout's number is the same inside the committed 95 % interval. A number without an interval (losses, masked
    pixels) is the same within TOLERANCE of its value; counts are equal. Where bytes differ, the message compares the
    machines. A stage that the committed report needs and today's lock lacks is ABSENT.

    Raises:
        UserError: git has no dvc.lock to compare with.
    """
    text = file_at("HEAD", str(LOCK))
    if text is None:
        raise UserError(f"the last commit has no {LOCK} to compare with; run inside a clone of the project")
    committed = read_lock(LOCK, text)
    needed = required(without_leftovers(committed, run.stages), [REPORT])
    for name in (name for name in run.stages if name.endswith(".dvc")):
        committed |= read_lock(Path(name), file_at("HEAD", name) or "{}")
    missing = f"{LOCK} lacks this stage of the committed report: run `dvc repro`"
    return [
        *(_compare(run, stage, committed.get(stage.name)) for stage in run.stages.values()),
        *(AuditFinding(ABSENT, name, missing) for name in needed if name not in run.stages),
    ]


def _compare(run: LockedRun, stage: LockedStage, committed: LockedStage | None) -> AuditFinding:
    if committed is None:
        return AuditFinding(FAILED, stage.name, "the committed run has no such stage")
    md5s = {out.path: run.disk.md5(out.path) for out in stage.outs}
    if absent := [path for path, md5 in md5s.items() if md5 is None]:
        return AuditFinding(ABSENT, stage.name, f"{absent[0]} is not here: run `dvc repro`")
    if md5s == {out.path: out.md5 for out in committed.outs}:
        return AuditFinding(SAME, stage.name, ", ".join(md5s))
    if inputs := [*_other_inputs(run, stage, committed)]:
        return AuditFinding(FAILED, stage.name, f"another run, with other inputs: {'; '.join(inputs)}")
    records = {key: path for key, path in run.records.items() if any(path.startswith(f"{out}/") for out in md5s)}
    numbers = []
    for key, _, _, row in run.table_rows(lambda path: file_at("HEAD", path)):
        if key in records:
            now = recorded_row(run.json_object(records[key]), row)
            for name, text in row_numbers(row).items():
                numbers += [_compare_number(f"{key} {name}", now.get(name, now.get("value")), text, row)] if text else []
    environments = [run.environment(stage, file_at("HEAD", f"{run.folder}/runs.json") or "{}"), run.environment(stage)]
    if None in environments:
        machines = "unknown machines"
    else:
        before, after = ({**environment, **environment["versions"]} for environment in environments)
        keys = [key for key in before | after if key not in NOT_COMPARED and before.get(key) != after.get(key)]
        machines = "; ".join(f"{key} {after.get(key)}, committed {before.get(key)}" for key in keys)
        machines = machines or "machine, CPUs and versions as committed: another kind of CPU, or another number of threads"
    failed = [message for same, message in numbers if not same]
    messages = failed or [message for _, message in numbers] or ["no number of its own: see the stages after it"]
    kind = FAILED if failed else CLOSE if numbers else OTHER
    return AuditFinding(kind, stage.name, f"{'; '.join(messages)} ({machines})")


def _other_inputs(run: LockedRun, stage: LockedStage, committed: LockedStage) -> Iterator[str]:
    """Command, settings, code and data that differ. Files of other stages are their matter."""
    if stage.command != committed.command:
        yield f"`{stage.command}`, committed `{committed.command}`"
    for key, value, before in differences(stage.params, committed.params):
        yield f"{key} = {value!r}, committed {before!r}"
    md5s = {dep.path: dep.md5 for dep in committed.deps}
    for dep in (dep for dep in stage.deps if dep.path != run.home):
        maker = find_maker(run.makers, dep.path)
        outside = maker is None or maker.kind in ("code", "benchmarks") or maker.name.endswith(".dvc")
        if outside and run.disk.md5(dep.path) != md5s.get(dep.path):
            yield f"{dep.path} is md5 {run.disk.md5(dep.path)}, committed {md5s.get(dep.path)}"


def _compare_number(name: str, value: Any, committed: str, row: Mapping[str, str]) -> tuple[bool, str]:
    before = float(committed)
    if value in (None, ""):
        return False, f"{name} was {before:.6g} and is absent now"
    if row.get("low"):
        low, high = float(row["low"]), float(row["high"])
        return low <= value <= high, f"{name} {value:.6g}, was {before:.6g} [{low:.4g}, {high:.4g}]"
    same = value == before if committed.lstrip("-").isdigit() else abs(value - before) <= TOLERANCE * abs(before)
    return same, f"{name} {value:.6g}, was {before:.6g}"
