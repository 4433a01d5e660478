"""Runs the arms of a study as DVC experiments, in clones of the last commit, so that the working folder is left alone.

A clone (in .dvc/tmp/studies/, with the objects and the DVC cache of this repository) stays for the next study: data are
checked out once, a killed training goes on, and times stay in its .runs/. An experiment is named after its arm, its
seed and a hash of settings, code, data and pipeline. A finished experiment is not run again, nor one whose lock and
numbers are in the folder of any study, as on another machine that pulled them. Of an unfinished one, DVC's run cache
brings every stage that ran before, except clips, which one run takes over from another where both cut alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config
from scaling4d.clips.data_import import restore_links
from scaling4d.pipeline import code_hashes
from scaling4d.provenance import (
    EXPERIMENT_REFS,
    LOCK,
    experiments,
    file_at,
    git_or_error,
    load_yaml,
    lock_folder,
    read_lock,
    required,
    write_text,
)
from scaling4d.records import UserError, write_json
from scaling4d.studies.page import write_study
from scaling4d.studies.study import (
    FACTS,
    REPORTS,
    UNMEASURED,
    Arm,
    Study,
    read_finished_study,
    read_study,
    recorded_run,
    with_seeds,
)

CLONES = Path(".dvc/tmp/studies")
TIMES = artifacts.RUNS / "studies"  # not beside the stages' own, all of which the report reads
STASH = f"{EXPERIMENT_REFS}stash"  # DVC runs every experiment in its stash, also that of a killed run
INPUTS = ("src", "experiments", "dvc.yaml", "dvc.lock", "data.dvc", ".dvc/config", ":(exclude)*.md")  # of every run
VIDEO_LISTS = config.EXPERIMENTS / "listed"  # for clips.Curation.listed, whose value names a file; the name holds its hash


@dataclass(frozen=True)
class StudyRun:
    """One arm with one seed, and the name of its experiment."""

    arm: Arm
    seed: int
    name: str

    @property
    def command(self) -> list[str]:
        """The command that runs in a clone."""
        settings = [word for value in self.arm.settings(self.seed) for word in ("-S", value)]
        return ["dvc", "exp", "run", "--name", self.name, *settings, *self.arm.targets]


def collect_studies(names: Sequence[str]) -> Iterator[Path]:
    """Write tables, figures and pages of finished studies again (no names: of all). Yields their folders."""
    for folder in [REPORTS / name for name in names] or [path.parent for path in sorted(REPORTS.glob(f"*/{FACTS}"))]:
        write_study(read_finished_study(folder), dvc_cache_folder(), {})
        yield folder


def run_studies(names: Sequence[str], *, seeds: str, jobs: int, dry: bool, report: Callable[[str], None]) -> None:
    """Run all arms of studies with all seeds, and write their outcome. A shared experiment runs once.

    Args:
        seeds: such as `0,1,2`; empty: the studies' own. jobs: experiments side by side. dry: run none, and report
            which exist. report: receives a line for each run and each outcome.
    Raises:
        UserError: as `read_study` and `run_experiments`, or runs failed.
    """
    studies = [with_seeds(study, seeds) if seeds else study for study in map(read_study, names)]
    by_study = {study.name: study_runs(study) for study in studies}
    runs = list({run.name: run for some in by_study.values() for run in some}.values())
    recorded = {run.name for run in runs if recorded_run(run.name)}
    if dry:
        known = {*experiments(), *recorded}
        for run in runs:
            report(f"{run.name}: {'exists' if run.name in known else ' '.join(run.command)}")
        return
    failed = run_experiments([run for run in runs if run.name not in recorded], jobs=jobs, report=report)
    for study in studies:
        if not any(run.name in failed for run in by_study[study.name]):
            write_study(study, dvc_cache_folder(), save_locks(study, by_study[study.name]))
            report(f"wrote {study.folder}")
    if failed:
        names = ", ".join(run.name for run in runs if run.name in failed)
        raise UserError(f"{len(failed)} of {len(runs)} runs failed, run it again for those: {names}")


def study_runs(study: Study) -> list[StudyRun]:
    """Every arm with every seed. Equal settings, code, data and targets give equal names, in every study.

    Raises UserError for settings that do not compose.
    """
    packages = code_hashes.hashes(code_hashes.SOURCE)
    files = [Path("dvc.yaml"), Path("data.dvc"), *sorted(VIDEO_LISTS.glob("*.csv"))]
    code = {package: content["sha256"] for package, content in packages.items() if package not in UNMEASURED}
    inputs, runs = [code, *(file.read_text() for file in files)], []
    for arm in study.arms:
        words = [arm.profile, arm.encoder, *(override.rpartition("=")[2] for override in arm.overrides)]
        label, composed = re.sub(r"[^\w-]", "", "-".join(words)), _composed(arm.profile, arm.overrides)
        for seed in study.seeds:
            content = json.dumps([composed | {"seed": seed}, arm.targets, inputs], sort_keys=True)
            digest = hashlib.sha256(content.encode()).hexdigest()
            runs.append(StudyRun(arm, seed, f"{label}-{seed}-{digest[:8]}"))
    return runs


def clips_settings(arm: Arm) -> str:
    """The settings on which an arm's clips depend, as JSON."""
    composed = _composed(arm.profile, arm.overrides)
    return json.dumps([composed["profile"], composed["clips"]], sort_keys=True)


@cache
def _composed(profile: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    return config.compose([f"profile={profile}", *overrides])


def save_locks(study: Study, runs: Sequence[StudyRun]) -> dict[str, dict[str, Any]]:
    """Copy the lock of every run to the study's folder. Returns the `run_facts` of `write_study`."""
    refs, facts, locks = experiments(), {}, {}
    for run in runs:
        key = f"{run.arm.name}-{run.seed}"
        facts[key] = {"experiment": run.name}
        if run.name in refs:
            locks[key], times = file_at(refs[run.name], str(LOCK)), TIMES / f"{run.name}.json"
            if times.is_file():  # of the whole `dvc exp run`; none if it ran elsewhere, or in parts
                facts[key] |= json.loads(times.read_text())
        else:
            path, _ = recorded_run(run.name)
            locks[key] = path.read_text()
    for key, text in locks.items():  # after the last one is read: it may lie under the name of another run
        study.lock(key).parent.mkdir(parents=True, exist_ok=True)
        write_text(study.lock(key), text)
    return facts


def run_experiments(runs: Sequence[StudyRun], *, jobs: int, report: Callable[[str], None]) -> dict[str, str]:
    """Run the experiments that do not exist yet.

    Args:
        jobs: experiments side by side. report: receives a line as each one ends.
    Returns:
        name -> reason in one line, of every run that failed.
    Raises:
        UserError: an input of the runs differs from the last commit, or another study runs.
    """
    known = experiments()
    if not (waiting := [run for run in runs if run.name not in known]):
        return {}
    if changed := git_or_error("status", "--porcelain", "--", *INPUTS).splitlines():
        raise UserError(f"{changed[0][3:]} differs from the last commit, and a study runs what is committed; commit it first")
    # The log of a run that was stopped or failed names the clone that holds the state of its training.
    begun = {path.stem.partition(".")[0]: int(path.stem.partition(".")[2]) for path in CLONES.glob("*.*.log")}
    total, failed, done = len(waiting), {}, []
    numbers = list(dict.fromkeys([*(begun[run.name] for run in waiting if run.name in begun), *range(jobs)]))[: min(jobs, total)]
    commit, dvc_cache = git_or_error("rev-parse", "HEAD").strip(), dvc_cache_folder()
    stop, choosing, processes = threading.Event(), threading.Lock(), set()

    def next_run(number: int) -> StudyRun | None:
        with choosing:
            own = (run for run in waiting if begun.get(run.name) == number)
            free = (run for run in waiting if begun.get(run.name) not in numbers)
            run = next(own, None) or next(free, None)
            if run:
                waiting.remove(run)
            return run

    def work(number: int) -> None:
        clone = ProjectClone(number, commit, dvc_cache)
        while not stop.is_set() and (run := next_run(number)):
            clone.prepare(run.arm)
            result = clone.run(run, processes, stop)
            if stop.is_set():
                return
            if isinstance(result, str):
                failed[run.name] = result
            else:
                result = f"{result['seconds']:.0f} s, {result['cpu_seconds']:.0f} CPU seconds"
            done.append(run)
            report(f"[{len(done)}/{total}] {run.arm.name} seed {run.seed}: {result}")

    if (clones := lock_folder(CLONES, wait_s=0)) is None:
        raise UserError("another study runs here; wait for it, or stop it")
    with clones, ThreadPoolExecutor(len(numbers)) as threads:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            for worker in as_completed([threads.submit(work, number) for number in numbers]):
                worker.result()
        finally:
            stop.set()
            for process in list(processes):
                _terminate(process)
            signal.signal(signal.SIGTERM, before)
    return failed


def _terminate(process: subprocess.Popen) -> None:
    """Ask an experiment and its stages to stop; a training saves its state."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


class ProjectClone:
    """A clone of a commit in which experiments run one after another. dvc_cache: shared by all clones."""

    _fetching = threading.Lock()

    def __init__(self, number: int, commit: str, dvc_cache: Path) -> None:
        self.number, self.folder, self.commit = number, CLONES / str(number), commit
        self.clips_of = ""  # settings of the clips in this clone, see clips_settings
        if not (self.folder / ".git").is_dir():
            fresh = self.folder.with_name(f"{number}-fresh")  # a kill while cloning leaves no half clone under the final name
            shutil.rmtree(fresh, ignore_errors=True)
            git_or_error("clone", "-q", "--shared", "--no-checkout", ".", str(fresh))
            fresh.rename(self.folder)
        for key in ("user.name", "user.email"):
            self._git("config", key, git_or_error("config", "--default", "scaling4d", "--get", key).strip())
        self._git("config", "gc.auto", "0")  # DVC's git collects garbage at every commit otherwise, which takes most of a minute
        self._reset()
        restore_links(self.folder)
        (self.folder / ".dvc/config.local").write_text(f"[cache]\n    dir = {dvc_cache}\n")

    def prepare(self, arm: Arm) -> None:
        """Check out the commit, with a lock of the arm's stages only, because DVC reads the lock many times.

        Clips of a former run that cut alike stay in the lock: DVC has no run cache for outs that persist.
        """
        from ruamel.yaml import YAML

        path, cut = self.folder / LOCK, clips_settings(arm)
        former = load_yaml(path.read_text())["stages"] if self.clips_of == cut else {}
        self._reset()
        text = path.read_text()
        names, committed = required(read_lock(path, text), arm.targets), load_yaml(text)["stages"]
        stages = {name: committed[name] for name in names} | {name: former[name] for name in former if name == "clips"}
        self.clips_of = cut
        with path.open("w") as file:
            YAML(typ="safe", pure=True).dump({"schema": "2.0", "stages": stages}, file)

    def run(self, run: StudyRun, processes: set[subprocess.Popen], stop: threading.Event) -> dict[str, float] | str:
        """Run an experiment and fetch it. Returns its seconds and CPU seconds, or why it failed.

        The times of an experiment that goes on after a stop are of its last part alone; the study does not keep them.
        Who sets `stop` also ends `processes`. After that, this waits up to a minute for stages that save their state,
        because the next run is refused while they do.
        """
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        log = CLONES / f"{run.name}.{self.number}.log"
        goes_on = log.is_file()
        ref = f"{EXPERIMENT_REFS}{self.commit[:2]}/{self.commit[2:]}/{run.name}"
        self._git("update-ref", "-d", ref)  # of a run that was not fetched
        started, command = time.monotonic(), [sys.executable, "-m", *run.command]
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=out, stderr=out, start_new_session=True)
            processes.add(process)
            if stop.is_set():  # set before the process was among them
                _terminate(process)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            for _ in range(600 if stop.is_set() else 0):
                try:
                    os.killpg(process.pid, 0)
                except ProcessLookupError:
                    break
                time.sleep(0.1)
            processes.discard(process)
        if process.returncode:
            return failure_reason(log)
        with self._fetching:
            git_or_error("fetch", "-q", str(self.folder), f"+{ref}:{ref}")
        log.unlink()
        times = {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}
        kept = TIMES / f"{run.name}.json"
        if goes_on:
            kept.unlink(missing_ok=True)  # of the experiment before it was removed
        else:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, times)
        return times

    def _reset(self) -> None:
        """Restore the commit, also after a kill: no other process works here."""
        (self.folder / ".git/index.lock").unlink(missing_ok=True)
        self._git("update-ref", "-d", STASH)
        self._git("checkout", "-q", "--force", "--detach", self.commit)

    def _git(self, *words: str) -> None:
        git_or_error("-C", str(self.folder), *words)


def failure_reason(log: Path) -> str:
    """The most telling line of a failed run's log: a stage's own error, else DVC's, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for start in ("error: ", "ERROR: "):
        if errors := [line for line in lines if line.startswith(start)]:
            return f"{errors[0].removeprefix(start)} ({log})"
    return f"{lines[-1] if lines else 'no output'} ({log})"


def dvc_cache_folder() -> Path:
    """DVC's cache of this repository. Raises UserError where there is none."""
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`dvc cache dir` fails: {' '.join(done.stderr.split())}")
    return Path(done.stdout.strip()).resolve()
