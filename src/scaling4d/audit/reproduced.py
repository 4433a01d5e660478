"""Compare a run that was made again with the committed one, stage by stage: the same bytes, the same numbers, or neither."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling4d.audit import history, lock
from scaling4d.audit.lock import Stage
from scaling4d.audit.run import Run
from scaling4d.records import UserError

SAME, CLOSE, OTHER, FAILED, ABSENT = "same bytes", "same numbers", "other bytes", "not reproduced", "not made again"
SHARE = 0.01  # by which a number without an interval may differ, of its value; ours (measured: experiments/LOG.md)
TIMES = (
    "seconds",
    "finished_unix_s",
    "clips_per_s",
    "git",
    "out_sha256",
    "versions",
)  # of a run: differ anyway, or are told one by one


@dataclass(frozen=True)
class Outcome:
    """Of one stage. kind: SAME; CLOSE (other bytes, each number inside its interval); OTHER (other bytes, no number of its own:
    those made from it tell); FAILED (a number outside, or other settings, code or data); ABSENT (not here).
    """

    kind: str
    stage: str
    message: str


def compare(run: Run) -> list[Outcome]:
    """Every stage of the checkout's run as its files are now, against dvc.lock and the report of the last commit.

    A readout's number is the same when it lies in the committed 95 % interval; one without an interval (losses, filled-in pixels)
    when it differs by at most SHARE of its value; counts must be equal. Where bytes differ, it says how the machines differ.

    Raises:
        UserError: git has no dvc.lock to compare with.
    """
    text = history.committed(run.lock)
    if text is None:
        raise UserError(
            f"the last commit holds no {run.lock}, so there is nothing to compare with; run inside a clone of the project"
        )
    before = lock.parse(text, Path(run.lock))
    for name in (name for name in run.stages if name.endswith(".dvc")):
        before |= lock.imported(name, history.committed(name) or "{}")
    return [_outcome(run, stage, before.get(stage.name)) for stage in run.stages.values()]


def _outcome(run: Run, stage: Stage, before: Stage | None) -> Outcome:
    if before is None:
        return Outcome(FAILED, stage.name, "the committed run has no such stage")
    was = {out.path: out.md5 for out in before.outs}
    now = {out.path: run.disk.md5(out.path) for out in stage.outs}
    if None in now.values():
        return Outcome(
            ABSENT, stage.name, f"{next(path for path, md5 in now.items() if md5 is None)} is not here: run `dvc repro`"
        )
    if was == now:
        return Outcome(SAME, stage.name, ", ".join(now))
    if inputs := list(_inputs(run, stage, before)):
        return Outcome(FAILED, stage.name, f"it was made with other inputs, so it is another run: {'; '.join(inputs)}")
    compared = [number for out in now for number in _numbers(run, out)]
    wrong = [message for same, message in compared if not same]
    machines = _machines(run, stage)
    if wrong:
        return Outcome(FAILED, stage.name, f"{'; '.join(wrong)} ({machines})")
    if compared:
        return Outcome(CLOSE, stage.name, f"{'; '.join(message for _, message in compared)} ({machines})")
    return Outcome(OTHER, stage.name, f"no number of its own: those made from it tell ({machines})")


def _inputs(run: Run, stage: Stage, before: Stage) -> Iterator[str]:
    """What went in from outside: settings, command, code and data; what other stages made is theirs to explain."""
    if stage.command != before.command:
        yield f"`{stage.command}`, committed `{before.command}`"
    for key in sorted(stage.params.keys() | before.params.keys()):
        if stage.params.get(key) != before.params.get(key):
            yield f"{key} = {stage.params.get(key)!r}, committed {before.params.get(key)!r}"
    was = {dep.path: dep.md5 for dep in before.deps}
    for dep in stage.deps:
        maker = run.maker(dep.path)
        outside = maker is None or maker.kind in ("code", "benchmarks") or maker.name.endswith(".dvc")
        if outside and dep.path != run.home and run.disk.md5(dep.path) != was.get(dep.path):
            yield f"{dep.path} is md5 {run.disk.md5(dep.path)}, committed {was.get(dep.path)}"


def _numbers(run: Run, out: str) -> Iterator[tuple[bool, str]]:
    """(whether it is the same, what it was and is) for every committed number that an output holds now."""
    for key, path in run.numbers.items():
        if not path.startswith(f"{out}/"):
            continue
        words, content = key.split("/"), run.json(path) or {}
        if len(words) == 3:
            wanted = dict(zip(("encoder", "task", "protocol"), words, strict=True))
            for row in _committed(run, "results", wanted):
                value = (
                    content.get("value")
                    if row["metric"] == content.get("metric")
                    else content.get("others", {}).get(row["metric"])
                )
                yield _judge(f"{key} {row['metric']}", value, row["value"], row)
        else:
            for row in _committed(run, words[1], {"point": words[0]}):
                for name, written in row.items():
                    if name not in ("point", "method", "checkpoint_sha256") and written:
                        yield _judge(f"{key} {name}", content.get(name), written, {})


def _judge(name: str, value: Any, written: str, row: Mapping[str, str]) -> tuple[bool, str]:
    was = float(written)
    if value is None:
        return False, f"{name} was {was:.6g} and is not there now"
    if row.get("low"):
        low, high = float(row["low"]), float(row["high"])
        return low <= value <= high, f"{name} {value:.6g}, was {was:.6g} [{low:.4g}, {high:.4g}]"
    same = value == was if written.lstrip("-").isdigit() else abs(value - was) <= SHARE * abs(was)
    return same, f"{name} {value:.6g}, was {was:.6g}"


def _committed(run: Run, table: str, wanted: Mapping[str, str]) -> list[dict[str, str]]:
    text = history.committed(f"{run.folder}/{table}.csv") or ""
    return [row for row in csv.DictReader(text.splitlines()) if all(row[key] == value for key, value in wanted.items())]


def _machines(run: Run, stage: Stage) -> str:
    """How the two machines and their software differ, as far as both runs tell."""
    committed = history.committed(f"{run.folder}/runs.json")
    was, now = run.told(stage, committed or "{}"), run.facts(stage)
    if was is None or now is None:
        return "which machines made them is not told"
    before, after = ({**facts, **facts["versions"]} for facts in (was, now))
    keys = [key for key in before | after if key not in TIMES and before.get(key) != after.get(key)]
    differ = "; ".join(f"{key} {after.get(key)}, committed {before.get(key)}" for key in keys)
    return (
        differ or "the same machine, CPUs and versions as far as the runs tell: another kind of CPU, or another number of threads"
    )
