"""`scaling4d bench gpu`: the steps of one hour on a GPU, in order of value, each with a budget and a record of its own.

A step runs in a process of its own. Its folder has `log.txt`, the files that it writes, and at its end `record.json`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from scaling4d.records import UserError, did_you_mean, write_json
from scaling4d_bench import measure

LOG, RECORD, OUTCOME = "log.txt", "record.json", "outcome.json"
SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
GRACE_S = 15.0  # from SIGTERM, at which a training saves its state, to SIGKILL
COLUMNS = {
    "step": "{name}",
    "": "{status}",
    "result": "{result}",
    "expected": "{expected}",
    "minutes": "{minutes:.1f} of {budget:g}",
}


@dataclass(frozen=True)
class Outcome:
    """One line each: the result of a step, and the plan's or a paper's figure for it."""

    result: str
    expected: str = ""


@dataclass(frozen=True)
class HourStep:
    """minutes: its budget. work: a function of a module; its folder and whether it rehearses -> the outcome."""

    name: str
    minutes: float
    work: Callable[[Path, bool], Outcome]


@dataclass(frozen=True)
class Record:
    """Content of record.json. status: done, failed or late. result: where it is not done, the last line of the log."""

    name: str
    status: str
    result: str
    expected: str
    minutes: float
    budget: float
    device: str


def run_hour(steps: Sequence[HourStep], out: Path, *, rehearse: bool, only: Sequence[str] = ()) -> bool:
    """Run the steps, print a table, and write `<out>/<step>/`. Returns whether all are done.

    A step that is done on this device is not run again. A step that fails or is late is recorded, and the next one
    goes on.

    Args:
        rehearse: on the CPU at the smallest size. only: steps that run, also if they are done; empty: all that are not.
    Raises:
        UserError: no CUDA device and no rehearsal, or `only` names no step.
    """
    names = [step.name for step in steps]
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"no step {unknown[0]!r}; needed some of {', '.join(names)}{did_you_mean(unknown[0], names)}")
    device = _device(rehearse)
    for step in steps:
        former = read_record(out / step.name)
        if (step.name not in only) if only else (former and former.status == "done" and former.device == device):
            continue
        print(f"{step.name}: at most {step.minutes:g} minutes; log in {out / step.name / LOG}", flush=True)
        record = run_step(step, out / step.name, rehearse=rehearse, device=device)
        print(f"{step.name}: {record.status} after {record.minutes:.1f} minutes: {record.result}", flush=True)
    records = [record for step in steps if (record := read_record(out / step.name))]
    measure.table(f"{device}; every figure is in {out}", [asdict(record) for record in records], COLUMNS)
    done = {record.name for record in records if record.status == "done" and record.device == device}
    return set(names) <= done


def run_step(step: HourStep, folder: Path, *, rehearse: bool, device: str) -> Record:
    """Run a step in a process, until its budget ends, and write its record."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RECORD, OUTCOME):
        (folder / name).unlink(missing_ok=True)
    started = time.monotonic()
    child = SPAWN.Process(target=_child, args=(step.work, folder, rehearse))
    child.start()
    try:
        child.join(60 * step.minutes)
        late = child.is_alive()
    finally:
        end_tree(child)
    minutes = (time.monotonic() - started) / 60
    outcome, status = Outcome(last_line(folder / LOG)), "late" if late else "failed"
    if (folder / OUTCOME).is_file() and child.exitcode == 0:
        outcome, status = Outcome(**json.loads((folder / OUTCOME).read_text())), "done"
    record = Record(step.name, status, outcome.result, outcome.expected, minutes, step.minutes, device)
    write_json(folder / f".{RECORD}.partial", asdict(record))
    (folder / f".{RECORD}.partial").rename(folder / RECORD)
    return record


def _child(work: Callable[[Path, bool], Outcome], folder: Path, rehearse: bool) -> None:
    """A step in its process: both outputs go to the log, and the last line is the error, if there is one."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)  # the log of a step that is ended for its lateness, too
    write_json(folder / OUTCOME, asdict(work(folder, rehearse)))


def end_tree(child: BaseProcess) -> None:
    """End a process and all below it: SIGTERM, and SIGKILL for those that stay."""
    if not child.is_alive():
        child.join()
        return
    below = psutil.Process(child.pid).children(recursive=True)
    for process in (child, *below):
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile
            process.terminate()
    child.join(GRACE_S)
    _, alive = psutil.wait_procs(below, timeout=GRACE_S)
    for process in (child, *alive):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    child.join()


def read_record(folder: Path) -> Record | None:
    """The record of a step; None: it never ended."""
    path = folder / RECORD
    return Record(**json.loads(path.read_text())) if path.is_file() else None


def last_line(path: Path) -> str:
    """The last line of a log that is not empty, at most measure.MAX_REASON characters."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.is_file() else []
    return lines[-1][: measure.MAX_REASON] if lines else "no output"


def _device(rehearse: bool) -> str:
    """The GPU's name. Raises UserError: there is none, and this is no rehearsal."""
    if rehearse:
        return "rehearsal on a CPU"
    import torch

    if not torch.cuda.is_available():
        raise UserError("no CUDA device is here; needed one, or --rehearse for the same steps at the smallest size on a CPU")
    return torch.cuda.get_device_name()
