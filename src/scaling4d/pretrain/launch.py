"""Start a point's ranks where its Launch settings say: torchrun here, torchrun on several machines, or a Slurm job.

Each of them runs the same command in every rank, `scaling4d pretrain POINT --snapshot FOLDER`: the folder holds settings, code
and names of the inputs as the launcher found them, so that ranks that start again days later are the same run.

    .resume/snapshot-<sha>/run.json    point, settings, made
                           code/       this package
                           refused     why a rank refused to go on; torchrun starts ranks again, and those then leave at once
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import scaling4d
from scaling4d import artifacts, config
from scaling4d.pretrain.loop import Run, made_of, prepare, state_of, train
from scaling4d.pretrain.plan.closed_form import MIXED, Sizes, memory
from scaling4d.pretrain.plan.estimate import GIB, USABLE
from scaling4d.pretrain.plan.work import work_of
from scaling4d.pretrain.point import build, key_of
from scaling4d.pretrain.settings import Launch
from scaling4d.records import AGAIN, UserError, write_json
from scaling4d.training.distributed import STOP, started
from scaling4d.training.resume import remove

TOLD, CODE, REFUSED = "run.json", "code", "refused"
PORT = 29500  # where the machines of a Slurm job meet; torchrun's own
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
IN_FLOAT32 = Sizes(compute=4)
PORTS = 1_000  # two jobs on one machine should not meet
REQUEUE_S = 60  # left of a job's time to queue it again, once its ranks had theirs to save
REQUEUES = 10_000
POLL_S = 2.0


def launch(point: str, settings: Mapping[str, Any], *, dry: bool) -> int | None:
    """Exit code of the point's training, which this starts elsewhere; None: this process is to train.

    Args:
        dry: print the command or the script instead.
    Raises:
        UserError: settings that cannot be, nobody at the rendezvous, no Slurm here.
    """
    config.bind({Launch.__name__: config.section(settings, f"{key_of(point, settings)}.{Launch.__name__}")})
    how = config.build(Launch)
    run = prepare(point, settings)
    if run.training.device == "cuda" and (started() or how.where != "slurm"):  # where one submits is another machine
        fits(run, _gpu_bytes())
    if started():
        return None
    if run.training.ranks % how.nodes:
        raise UserError(f"{run.training.ranks} ranks do not divide among {how.nodes} nodes; set points.{point}.Launch.nodes")
    if how.where not in ("here", *STARTERS):
        raise UserError(f"points.{point}.Launch.where is {how.where!r}; needed one of here, {', '.join(STARTERS)}")
    if how.where == "here":
        return _here(run, dry)
    if dry:
        return STARTERS[how.where](run, how, artifacts.PARTIAL / "snapshot", dry)
    made = made_of(run)
    shared = how.where == "nodes"
    snapshot, code = _snapshot(run, made, "" if shared else f"-{socket.gethostname()}-{os.getpid()}"), None
    try:
        code = STARTERS[how.where](run, how, snapshot, dry)
        if code and (snapshot / REFUSED).is_file():
            raise UserError((snapshot / REFUSED).read_text())
        if code == 0:
            remove(state_of(run, made))
        return code
    finally:
        if code == 0 or not shared:
            shutil.rmtree(snapshot, ignore_errors=True)


def train_rank(point: str, snapshot: Path) -> Path | None:
    """In a rank that a launcher started: train by its snapshot; None: it was refused before. Why, the launcher says."""
    if (snapshot / REFUSED).is_file():
        return None
    told = _read(snapshot)
    try:
        run = prepare(point, told["settings"])
        if run.training.device == "cuda":
            fits(run, _gpu_bytes())
        return train(run, told["made"])
    except UserError as error:
        with suppress(FileExistsError), (snapshot / REFUSED).open("x") as file:
            file.write(str(error))
        raise SystemExit(1) from error


def _snapshot(run: Run, made: Mapping[str, Any], whose: str) -> Path:
    """The folder for a run's ranks; launchers on several machines share one, that of the first."""
    told = {"point": run.point, "settings": run.settings, "made": made}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    folder = artifacts.PARTIAL / f"snapshot-{digest[:16]}{whose}"
    (folder / REFUSED).unlink(missing_ok=True)
    if not folder.is_dir():
        partial = folder.with_name(f"partial-{folder.name}-{socket.gethostname()}-{os.getpid()}")
        shutil.copytree(
            Path(scaling4d.__file__).parent, partial / CODE / "scaling4d", ignore=shutil.ignore_patterns("__pycache__")
        )
        write_json(partial / TOLD, told)
        try:
            partial.rename(folder)
        except OSError:  # another machine was first
            if not folder.is_dir():
                raise
            shutil.rmtree(partial)
    return folder


def _read(snapshot: Path) -> dict[str, Any]:
    return json.loads((snapshot / TOLD).read_text())


def fits(run: Run, gpu_bytes: int | None) -> None:
    """Raises UserError: by the closed form, a step needs more than a GPU of `gpu_bytes` (None: there is none here to ask)."""
    if gpu_bytes is None:
        return
    training, sharding = run.training, run.sharding
    given = {
        "shards": sharding.shards,
        "recompute": sharding.recompute == "block" and sharding.recompute_every == 1,
        "sizes": MIXED if training.compute == "bfloat16" else IN_FLOAT32,
    }
    work = work_of(build(run.point, run.settings))
    clips = training.batch // training.ranks // sharding.accumulate
    needed = memory(work, clips=clips, parts=sharding.accumulate, **given)["total"]
    if needed > USABLE * gpu_bytes:
        fewer = [
            n
            for n in range(1, clips)
            if clips % n == 0 and memory(work, clips=n, parts=2, **given)["total"] <= USABLE * gpu_bytes
        ]
        change = f"Sharding.accumulate={training.batch // training.ranks // fewer[-1]}" if fewer else "more Sharding.shards"
        raise UserError(
            f"a step of {run.point} with {clips} clips a GPU needs {needed / GIB:.1f} GiB, and {USABLE:.0%} of a GPU here is "
            f"{USABLE * gpu_bytes / GIB:.1f} GiB; set {change}, or see scaling4d plan {run.point}"
        )


def _gpu_bytes() -> int | None:
    """Memory of the first GPU here; asked so that this process stays free to fork."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return int(found[0]) * 2**20 if found and found[0].isdigit() else None


def _here(run: Run, dry: bool) -> int | None:
    if not dry:
        return None
    print(f"{run.training.ranks} forked ranks of this process")
    return 0


def _torchrun(run: Run, how: Launch, snapshot: Path, dry: bool) -> int:
    return _run(_command(run, how, snapshot, ["--standalone"]), snapshot, dry)


def _nodes(run: Run, how: Launch, snapshot: Path, dry: bool) -> int:
    host, _, port = how.rendezvous.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"points.{run.point}.Launch.rendezvous is {how.rendezvous!r}; needed HOST:PORT of one of the nodes")
    if not dry:
        _reach(run, how, host, int(port))
    return _run(_command(run, how, snapshot, _meeting(how, how.rendezvous, run.point)), snapshot, dry)


def _meeting(how: Launch, address: str, name: str) -> list[str]:
    return [
        *("--nnodes", str(how.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", address, "--rdzv-id", name),
        *("--rdzv-conf", f"join_timeout={how.wait_s}"),
    ]


def _command(run: Run, how: Launch, snapshot: Path, where: list[str]) -> list[str]:
    """Of one machine. torchrun hands requests to stop on, and gives ranks the time to save."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(run.training.ranks // how.nodes)),
        *("--max-restarts", str(how.restarts), "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
        *("--shutdown-timeout", str(how.wait_s), "-m", "scaling4d", "pretrain", run.point, "--snapshot", str(snapshot)),
    ]


def _run(command: list[str], snapshot: Path, dry: bool) -> int:
    """Exit code of a command, as `_said`; AGAIN if it was asked to stop and did."""
    if dry:
        print(shlex.join(command))
        return 0
    torchrun: subprocess.Popen | None = None
    asked: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if torchrun:
            torchrun.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in STOP}
    try:
        torchrun = _start(command, snapshot)
        if asked:  # while it was being started
            torchrun.send_signal(signal.SIGTERM)
        code = torchrun.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = _said(code, snapshot)
    return AGAIN if asked and code and not (snapshot / REFUSED).is_file() else code


def _said(code: int, snapshot: Path) -> int:
    """Of torchrun, whose ranks were refused: those that it started after them left as if all were well."""
    return 1 if (snapshot / REFUSED).is_file() else code


def _start(command: list[str], snapshot: Path) -> subprocess.Popen:
    """Slurm's signal for submitit reaches every process of a job; it waits in these, which so leave it to submitit.

    Where ranks are started again, they meet in a new store: of several machines only some count that they were started again.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        code = os.pathsep.join(path for path in (str((snapshot / CODE).resolve()), os.environ.get("PYTHONPATH")) if path)
        given = {"PYTHONPATH": code} | (NEW_STORE if "--nnodes" in command else {})
        return subprocess.Popen(command, env=os.environ | given)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reach(run: Run, how: Launch, host: str, port: int) -> None:
    """Wait until somebody answers at the rendezvous, unless it is this machine's part to do so.

    Raises:
        UserError: no such host, or nobody within `wait_s`.
    """
    setting = f"points.{run.point}.Launch.rendezvous"
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"{setting} is {how.rendezvous}: no host {host} ({error.strerror}); needed one of the nodes") from error
    if _is_mine(address):
        return
    until = time.monotonic() + how.wait_s
    while True:
        try:
            socket.create_connection((host, port), timeout=POLL_S).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"nobody answers at {setting} {how.rendezvous} for {how.wait_s} s ({error}); start the same command there"
                ) from error
            time.sleep(POLL_S)


def _is_mine(address: tuple) -> bool:
    family, kind, protocol, _, place = address
    with socket.socket(family, kind, protocol) as trial:
        try:
            trial.bind((place[0], 0, *place[2:]))
        except OSError:
            return False
    return True


@dataclass
class Job:
    """What runs on each machine of a Slurm job, by submitit; it is pickled."""

    command: list[str]  # MEETING stands for the address
    snapshot: Path
    folder: str
    torchrun: subprocess.Popen | None = None

    def __call__(self) -> int:
        import submitit

        os.chdir(self.folder)
        first = submitit.JobEnvironment().hostnames[0]
        port = PORT + int(os.environ.get("SLURM_JOB_ID", "0")) % PORTS
        self.torchrun = _start([word.replace(MEETING, f"{first}:{port}") for word in self.command], self.snapshot)
        try:
            return _said(self.torchrun.wait(), self.snapshot)
        finally:  # cancelled
            self._stop()

    def checkpoint(self) -> Any:
        """The job is to be preempted or its time is over: the ranks save their state and the job is queued again."""
        import submitit

        self._stop()
        return submitit.helpers.DelayedSubmission(Job(self.command, self.snapshot, self.folder))

    def _stop(self) -> None:
        """Also called by a signal's handler while `__call__` waits: Popen's own `wait` would then wait for itself."""
        if self.torchrun is None or self.torchrun.returncode is not None:
            return
        with suppress(ProcessLookupError, ChildProcessError):  # it has ended
            os.kill(self.torchrun.pid, signal.SIGTERM)
            os.waitid(os.P_PID, self.torchrun.pid, os.WEXITED | os.WNOWAIT)


MEETING = "MEETING"


def _slurm(run: Run, how: Launch, snapshot: Path, dry: bool) -> int:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError("Launch.where is slurm and submitit is not installed; run pip install 'scaling4d[cluster]'") from error
    meeting = ["--standalone"] if how.nodes == 1 else _meeting(how, MEETING, run.point)
    job = Job(_command(run, how, snapshot, meeting), snapshot, os.getcwd())
    wanted = {"nodes": how.nodes, "tasks_per_node": 1, "timeout_min": 60 * how.hours, "name": f"pretrain-{run.point}"}
    ranks = run.training.ranks // how.nodes
    wanted |= {"cpus_per_task": ranks * (1 + run.running.workers), "slurm_mem": "0"}  # all of a machine's
    if run.training.device == "cuda":
        wanted["gpus_per_node"] = ranks
    wanted |= {"slurm_signal_delay_s": how.wait_s + REQUEUE_S} | ({"slurm_partition": how.partition} if how.partition else {})
    if dry:
        print(_script(submitit, wanted, job))
        return 0
    if how.cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError(f"no sbatch here, so no Slurm; set points.{run.point}.Launch.where to here, torchrun or nodes")
    folder = artifacts.RUNS / "slurm" / run.point
    executor = submitit.AutoExecutor(folder, cluster=how.cluster, slurm_max_num_timeout=REQUEUES)
    executor.update_parameters(**wanted)
    return _follow(executor.submit(job), run)


def _script(submitit: Any, wanted: dict[str, Any], job: Job) -> str:
    """What sbatch would be given."""
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    named = {SlurmExecutor._equivalence_dict().get(key, key.removeprefix("slurm_")): value for key, value in wanted.items()}
    called = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {artifacts.RUNS / 'slurm'}"
    return _make_sbatch_string(command=called, folder=artifacts.RUNS / "slurm", **named) + f"# it runs: {shlex.join(job.command)}"


def _follow(job: Any, run: Run) -> int:
    """Show how far the job is until it ends; who stops following cancels it, and its ranks save their state."""
    from rich.progress import Progress

    print(f"job {job.job_id}, log {job.paths.stdout}", file=sys.stderr)

    asked: list[int] = []

    def cancel(number: int, _: FrameType | None) -> None:
        asked.append(number)
        job.cancel()

    before = {number: signal.signal(number, cancel) for number in (*STOP, signal.SIGINT, signal.SIGHUP)}
    try:
        with Progress() as bar:
            task = bar.add_task(f"pretrain {run.point}", total=run.training.steps)
            while not job.done():
                bar.update(task, completed=_steps(run))
                time.sleep(POLL_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if job.exception() is None:
        return max(job.results(), key=abs)  # one of each machine
    if asked:
        return AGAIN
    print(job.stderr(), file=sys.stderr)
    return 1


def _steps(run: Run) -> int:
    timings = artifacts.RUNS / f"pretrain-{run.point}" / "timings.jsonl"
    for line in reversed(timings.read_text().splitlines() if timings.is_file() else []):
        with suppress(ValueError):  # it is being written
            return json.loads(line)["step"]
    return 0


STARTERS = {"torchrun": _torchrun, "nodes": _nodes, "slurm": _slurm}
