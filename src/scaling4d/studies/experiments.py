"""Runs the arms of a study as DVC experiments, in copies of the last commit, so that the folder one works in is left alone.

A copy (a git clone in .dvc/tmp/studies/, with the objects and the DVC cache of this repository) stays for the next study: data
are checked out once, a killed training goes on, and times stay in its .runs/. An experiment is named after its arm, its seed and
a hash of settings, code, data and pipeline: what is there already is not run again, and of what is not, DVC's own run cache
brings every stage that ran before but clips, which are taken over from run to run where they are alike.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scaling4d import artifacts, code, config
from scaling4d.records import UserError, write_json
from scaling4d.studies.study import Arm, Study, load_lock, needed

COPIES = Path(".dvc/tmp/studies")
REFS, STASH = "refs/exps/", "refs/exps/stash"  # DVC runs what it finds stashed, also by a run that was killed
INPUTS = ("src", "experiments", "dvc.yaml", "dvc.lock", "data.dvc", ".dvc/config", ":(exclude)*.md")  # what runs are made of
LISTED = config.EXPERIMENTS / "listed"  # videos for clips.Curation.listed; DVC knows their names, so these have a hash in them
NOT_MEASURED = ("show", "report")  # rooms whose code no number of a study comes from


@dataclass(frozen=True)
class Wanted:
    """One run of a study and the experiment that holds it."""

    arm: Arm
    seed: int
    name: str

    def __str__(self) -> str:
        return f"{self.arm.name} seed {self.seed}"

    def command(self) -> str:
        """What `run` does, in a copy."""
        return " ".join(["dvc", *self.words])

    @property
    def words(self) -> list[str]:
        settings = [word for value in self.arm.settings(self.seed) for word in ("-S", value)]
        return ["exp", "run", "--name", self.name, *settings, *self.arm.targets]


def wanted(study: Study) -> list[Wanted]:
    """Every arm and seed, with the name of its experiment.

    Raises:
        UserError: settings that do not compose.
    """
    common = _inputs()
    found = []
    for arm in study.arms:
        composed = _composed(arm.profile, arm.overrides)
        for seed in study.seeds:
            content = json.dumps([composed | {"seed": seed}, arm.targets, common], sort_keys=True)
            digest = hashlib.sha256(content.encode()).hexdigest()
            found.append(Wanted(arm, seed, f"{_label(arm)}-{seed}-{digest[:8]}"))
    return found


@cache
def _composed(profile: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    return config.compose([f"profile={profile}", *overrides])


def _label(arm: Arm) -> str:
    """The same in every study that has such an arm."""
    words = [arm.profile, arm.encoder, *(override.rpartition("=")[2] for override in arm.overrides)]
    return re.sub(r"[^\w-]", "", "-".join(words))


def there() -> dict[str, str]:
    """Name of an experiment -> its git reference."""
    refs = _git("for-each-ref", "--format=%(refname)", REFS).split()
    return {ref.rpartition("/")[2]: ref for ref in refs if ref.count("/") == 4}


def keep(study: Study, runs: Sequence[Wanted]) -> dict[str, dict[str, Any]]:
    """Copy the lock of every run to the study's folder; `arm-seed` -> its experiment, and what it took if it ran here."""
    known, told = there(), {}
    for one in runs:
        path = study.lock(one.arm.name, one.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_git("show", f"{known[one.name]}:dvc.lock"))
        told[f"{one.arm.name}-{one.seed}"] = {"experiment": one.name} | (facts(one.name) or {})
    return told


def run(runs: Sequence[Wanted], *, jobs: int, say: Callable[[str], None]) -> dict[str, str]:
    """Run what is not there yet; returns, of every run that failed, its name and why, in one line.

    Args:
        jobs: experiments side by side. say: is told of each one as it ends.
    Raises:
        UserError: what a run is made of differs from the last commit.
    """
    known = there()
    todo = [one for one in runs if one.name not in known]
    if not todo:
        return {}
    changed = _git("status", "--porcelain", "--", *INPUTS).splitlines()
    if changed:
        raise UserError(f"{changed[0][3:]} differs from the last commit, and a study runs what is committed; commit it first")
    begun = _begun()
    copies = list(dict.fromkeys([*(begun[one.name] for one in todo if one.name in begun), *range(jobs)]))[: min(jobs, len(todo))]
    waiting = {number: deque(one for one in todo if begun.get(one.name) == number) for number in copies}
    others = deque(one for one in todo if begun.get(one.name) not in copies)
    failed: dict[str, str] = {}
    done, stop = [], threading.Event()
    commit, kept = _git("rev-parse", "HEAD").strip(), dvc_cache()
    running: set[subprocess.Popen] = set()

    def following(number: int) -> Wanted | None:
        for some in (waiting[number], others):
            with contextlib.suppress(IndexError):
                return some.popleft()
        return None

    def work(number: int) -> None:
        copy = Copy(number, commit, kept)
        while not stop.is_set() and (one := following(number)):
            copy.prepare(one.arm)
            why = copy.run(one, running, stop)
            if stop.is_set():
                return
            if why is not None:
                failed[one.name] = why
            done.append(one)
            say(f"[{len(done)}/{len(todo)}] {one}: {why or _took(one.name)}")

    with _alone(), ThreadPoolExecutor(len(copies)) as threads:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        workers = [threads.submit(work, number) for number in copies]
        try:
            for worker in as_completed(workers):
                worker.result()
        finally:
            stop.set()
            for process in list(running):
                _end(process)
            signal.signal(signal.SIGTERM, before)
    return failed


def _begun() -> dict[str, int]:
    """Name of every run that was stopped or failed -> the copy in which it began, where a training's state lies."""
    return {path.stem.partition(".")[0]: int(path.stem.partition(".")[2]) for path in COPIES.glob("*.*.log")}


def _end(process: subprocess.Popen) -> None:
    """Ask an experiment and its stages to stop; a training saves its state."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def _ended(group: int) -> None:
    """Wait, a minute at most, for stages that save their state after DVC is gone: the next run is refused as long as they do."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """The copies belong to one process.

    Raises:
        UserError: another one has them.
    """
    COPIES.mkdir(parents=True, exist_ok=True)
    with (COPIES / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another study runs here; wait for it, or stop it") from None
        yield


def _took(name: str) -> str:
    found = facts(name)
    return f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} CPU seconds" if found else "done"


def facts(name: str) -> dict[str, float] | None:
    """What an experiment took where it ran in this clone: `seconds` and `cpu_seconds`, of the whole `dvc exp run`."""
    path = _facts(name)
    return json.loads(path.read_text()) if path.is_file() else None


def write_facts(name: str, taken: dict[str, float]) -> None:
    """For `facts`; not beside the stages' own times."""
    _facts(name).parent.mkdir(parents=True, exist_ok=True)
    write_json(_facts(name), taken)


class Copy:
    """A clone of a commit in which experiments run one after another. kept: DVC's cache, for all copies."""

    _fetching = threading.Lock()

    def __init__(self, number: int, commit: str, kept: Path) -> None:
        self.number, self.folder, self.commit = number, COPIES / str(number), commit
        self.cut: tuple[object, ...] | None = None  # profile and overrides of the clips that lie here
        if not (self.folder / ".git").is_dir():
            fresh = self.folder.with_name(f"{number}-fresh")  # what is killed while it is cloned, is cloned anew
            shutil.rmtree(fresh, ignore_errors=True)
            _git("clone", "-q", "--shared", "--no-checkout", ".", str(fresh))
            fresh.rename(self.folder)
        for key in ("user.name", "user.email"):
            self._git("config", key, _git("config", "--default", "scaling4d", "--get", key).strip())
        self._reset()
        (self.folder / ".dvc/config.local").write_text(f"[cache]\n    dir = {kept}\n")

    def prepare(self, arm: Arm) -> None:
        """The commit as it is; of its lock only what the arm needs, because DVC reads the whole lock again and again.

        Clips that a run before cut alike stay in it: DVC has no run cache for outs that persist.
        """
        from ruamel.yaml import YAML

        path, alike = self.folder / "dvc.lock", (arm.profile, arm.overrides)
        former = load_lock(path.read_text()) if self.cut == alike else {}
        self._reset()
        stages = dict(needed(load_lock(path.read_text()), arm.targets))
        stages |= {name: stage for name, stage in former.items() if name == "clips"}
        self.cut = alike
        with path.open("w") as file:
            YAML(typ="safe", pure=True).dump({"schema": "2.0", "stages": stages}, file)

    def run(self, one: Wanted, running: set[subprocess.Popen], stop: threading.Event) -> str | None:
        """None, or why it failed; what it took is written to .runs/. Who sets `stop` also ends those that are `running`."""
        command = [sys.executable, "-m", "dvc", *one.words]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        log = COPIES / f"{one.name}.{self.number}.log"
        ref = f"{REFS}{self.commit[:2]}/{self.commit[2:]}/{one.name}"
        self._git("update-ref", "-d", ref)  # of a run that was not fetched
        started = time.monotonic()
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            running.add(process)
            if stop.is_set():  # since before it was among them
                _end(process)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if stop.is_set():
                _ended(process.pid)
            running.discard(process)
        if process.returncode:
            return _why(log)
        with self._fetching:
            _git("fetch", "-q", str(self.folder), f"+{ref}:{ref}")
        log.unlink()
        taken = {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}
        write_facts(one.name, taken)
        return None

    def _reset(self) -> None:
        """Also after a kill in the middle of anything: nobody else works here."""
        (self.folder / ".git/index.lock").unlink(missing_ok=True)
        self._git("update-ref", "-d", STASH)
        self._git("checkout", "-q", "--force", "--detach", self.commit)

    def _git(self, *words: str) -> str:
        return _git("-C", str(self.folder), *words)


def _why(log: Path) -> str:
    """The line of a failed run that says most: a stage's own error, else DVC's, else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for start in ("error: ", "ERROR: "):
        if said := [line for line in lines if line.startswith(start)]:
            return f"{said[0].removeprefix(start)} ({log})"
    return f"{lines[-1] if lines else 'it said nothing'} ({log})"


def _inputs() -> list[object]:
    """Hashes of what every run is made of, beside its settings."""
    rooms = code.hashes(Path(code.__file__).parent)
    meant = {room: found["sha256"] for room, found in rooms.items() if room not in NOT_MEASURED}
    files = [Path("dvc.yaml"), Path("data.dvc"), *sorted(LISTED.glob("*.csv"))]
    return [meant, *(path.read_text() for path in files)]


def _facts(name: str) -> Path:
    return artifacts.RUNS / "studies" / f"{name}.json"  # not beside the stages' own, all of which the report reads


def dvc_cache() -> Path:
    """Where DVC keeps the bytes of this repository.

    Raises:
        UserError: DVC does not say it.
    """
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"DVC does not say where its cache is: {' '.join(done.stderr.split())}")
    return Path(done.stdout.strip()).resolve()


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git {' '.join(words[:6])}: {' '.join(done.stderr.split()) or 'failed'}")
    return done.stdout
