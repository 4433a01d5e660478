"""Start a job's ranks where its LaunchConfig says: torchrun here, torchrun on several machines, or a Slurm job.

Every rank runs the same command with `--snapshot FOLDER`. The folder holds settings, code and names of the inputs at
the time of the launch, so that ranks that start again days later belong to the same run.

    .resume/snapshot-<sha>/run.json    the job's content
                           code/       this package
                           refused     the reason of a rank that refused to continue; restarted ranks then leave at once

A Slurm job outlives the command that submitted it. Its id is in the folder of the run's state, and the same command
follows the job again, or takes its end.

    .resume/<stage>-<sha>/slurm.json   id, tasks and snapshot of the job
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import scaling4d
from scaling4d import artifacts, provenance
from scaling4d.checkpoint import read_description
from scaling4d.config import require_minima, require_words
from scaling4d.records import AGAIN, UserError, json_text, pip_install, shortened, write_json
from scaling4d.training.distributed import stop_requests

CONTENT, CODE, REFUSED = "run.json", "code", "refused"
SLURM_JOB = "slurm.json"
ADDRESS = "ADDRESS"  # stands for the rendezvous in the command of a Slurm job
PORT, PORTS = 29500, 1_000  # torchrun's own port, and the next ones: two jobs on one machine should not meet
REQUEUE_S, REQUEUES = 60, 10_000  # left of a Slurm job's time to queue it again after its ranks have saved; how often
POLL_S = 2.0


@dataclass(frozen=True)
class LaunchConfig:
    """Where a job's ranks run; results do not depend on it.

    where: here (forked ranks), torchrun (on this machine), nodes (the same command on each of several machines, which
    meet at `rendezvous`) or slurm. nodes: machines, which share the ranks. rendezvous: HOST:PORT of one of the nodes.
    restarts: of all ranks when one is lost (torchrun). wait_s: for other nodes, and for a state to be saved. partition,
    hours: of a Slurm job. cluster: slurm, or local for submitit's processes on this machine.
    """

    where: str
    nodes: int
    rendezvous: str
    restarts: int
    wait_s: int
    partition: str
    hours: int
    cluster: str

    def __post_init__(self) -> None:
        require_words(self, {"where": ("here", "torchrun", "nodes", "slurm"), "cluster": ("slurm", "local")})
        require_minima(self, {"nodes": 1, "restarts": 0, "wait_s": 0, "hours": 1})


@dataclass(frozen=True)
class Job:
    """A command for several ranks.

    name: such as pretrain-nano. arguments: of `python -m scaling4d`. setting: dotted key of its LaunchConfig. ranks:
    over all machines. processes: of a rank. content: for the ranks, as JSON. state: folder of the run's state. written:
    whether the run's result is there. steps: in all, None: not counted. steps_done: by now.
    """

    name: str
    arguments: tuple[str, ...]
    setting: str
    ranks: int
    processes: int
    device: str
    content: Mapping[str, Any]
    state: Path
    written: Callable[[], bool]
    steps: int | None = None
    steps_done: Callable[[], int] = int


def describe(job: Job, config: LaunchConfig) -> str:
    """How `launch` starts a job's ranks: the command, or Slurm's batch file. Raises UserError: as launch."""
    _check(job, config)
    snapshot = provenance.WORK_FOLDER / "snapshot"
    if config.where == "here":
        return f"{job.ranks} forked ranks of this process"
    return _batch_file(job, config, snapshot) if config.where == "slurm" else shlex.join(_command(job, config, snapshot))


def launch(job: Job, config: LaunchConfig) -> int | None:
    """Run a job's ranks elsewhere.

    Returns:
        The exit code, AGAIN after a request to stop; None: the ranks are to run in this process.
    Raises:
        UserError: ranks that do not divide among the nodes, no answer at the rendezvous, no Slurm, or a rank refused.
    """
    _check(job, config)
    if config.where == "here":
        return None
    if config.where == "slurm":
        return _slurm(job, config)
    shared = config.where == "nodes"
    snapshot, code = _write_snapshot(job, "" if shared else _suffix()), None
    try:
        if config.where == "nodes":
            _wait_for_rendezvous(job, config)
        code = _run(_command(job, config, snapshot), snapshot)
        _raise_refusal(code, snapshot)
        return code
    finally:
        if code == 0 or not shared:
            shutil.rmtree(snapshot, ignore_errors=True)


def _raise_refusal(code: int, snapshot: Path) -> None:
    """Raises UserError: that of a rank which refused to continue."""
    if code and (snapshot / REFUSED).is_file():
        raise UserError((snapshot / REFUSED).read_text())


def _check(job: Job, config: LaunchConfig) -> None:
    if job.ranks % config.nodes:
        raise UserError(f"{job.ranks} ranks do not divide among {config.nodes} nodes; set {job.setting}.nodes")
    host, _, port = config.rendezvous.rpartition(":")
    if config.where == "nodes" and not (host and port.isdigit()):
        raise UserError(f"{job.setting}.rendezvous is {config.rendezvous!r}; needed HOST:PORT of one of the nodes")


@contextmanager
def snapshot_content(snapshot: Path) -> Iterator[dict[str, Any] | None]:
    """In a rank: the job's content; None if another rank was refused. The launcher prints the reason of a refusal.

    Raises:
        SystemExit: the block raised a UserError.
    """
    if (snapshot / REFUSED).is_file():
        yield None
        return
    try:
        yield json.loads((snapshot / CONTENT).read_text())
    except UserError as error:
        with suppress(FileExistsError), (snapshot / REFUSED).open("x") as file:
            file.write(str(error))
        raise SystemExit(1) from error


def first_gpu_bytes() -> int | None:
    """Memory of the first GPU of this machine; None: no GPU. By nvidia-smi, so that this process stays free to fork."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    words = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return int(words[0]) * 2**20 if words and words[0].isdigit() else None


def _suffix() -> str:
    return f"-{socket.gethostname()}-{os.getpid()}"


def _write_snapshot(job: Job, suffix: str) -> Path:
    """The snapshot's folder; launchers on several machines share that of the first."""
    digest = hashlib.sha256(json.dumps(job.content, sort_keys=True).encode()).hexdigest()
    folder = provenance.WORK_FOLDER / f"snapshot-{digest[:16]}{suffix}"
    (folder / REFUSED).unlink(missing_ok=True)
    if not folder.is_dir():
        source = Path(scaling4d.__file__).parent
        with provenance.work_folder(folder.name) as partial:
            shutil.copytree(source, partial / CODE / "scaling4d", ignore=shutil.ignore_patterns("__pycache__"))
            write_json(partial / CONTENT, job.content)
            try:
                partial.rename(folder)
            except OSError:  # another machine was first
                if not folder.is_dir():
                    raise
    return folder


def _command(job: Job, config: LaunchConfig, snapshot: Path) -> list[str]:
    """torchrun's command on a machine. It forwards requests to stop, and gives ranks the time to save."""
    where = ["--standalone"]
    if address := {"nodes": config.rendezvous, "slurm": ADDRESS * (config.nodes > 1)}.get(config.where):
        where = ["--nnodes", str(config.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", address]
        where += ["--rdzv-id", job.name, "--rdzv-conf", f"join_timeout={config.wait_s}"]
    return [
        *(sys.executable, "-m", "scaling4d.training.torchrun", str(config.wait_s), *where),
        *("--nproc-per-node", str(job.ranks // config.nodes)),
        *("--max-restarts", str(config.restarts), "--signals-to-handle", "SIGTERM,SIGUSR1"),
        *("-m", "scaling4d", *job.arguments, "--snapshot", str(snapshot)),
    ]


def _run(command: list[str], snapshot: Path) -> int:
    """Exit code of torchrun on this machine: 1 after a refusal, AGAIN after a request to stop."""
    torchrun: subprocess.Popen | None = None
    forwarded = False

    def stop(_: int) -> None:
        nonlocal forwarded
        if torchrun and not forwarded:  # at a third signal torchrun leaves its ranks
            forwarded = True
            torchrun.send_signal(signal.SIGTERM)

    with stop_requests(stop) as requests:
        torchrun = _start(command, snapshot)
        if requests:  # while torchrun was being started
            stop(requests[0])
        code = torchrun.wait()
    if (snapshot / REFUSED).is_file():  # restarted ranks leave as if they had succeeded
        return 1
    return AGAIN if requests and code else code


def _start(command: list[str], snapshot: Path) -> subprocess.Popen:
    """Start torchrun with the snapshot's code. In it and its ranks, Slurm's signal for submitit is blocked, and Ctrl-C,
    which this process forwards as SIGTERM.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGINT})
    try:
        code = os.pathsep.join(path for path in (str((snapshot / CODE).resolve()), os.environ.get("PYTHONPATH")) if path)
        added = {"PYTHONPATH": code}
        if "--nnodes" in command:
            added["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # of several machines only some count a restart
        return subprocess.Popen(command, env=os.environ | added)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for_rendezvous(job: Job, config: LaunchConfig) -> None:
    """Wait until somebody answers at the rendezvous, unless this machine is to answer there.

    Raises:
        UserError: no such host, or no answer within `wait_s`.
    """
    setting, (host, _, port) = f"{job.setting}.rendezvous", config.rendezvous.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        reason = f"no host {host} ({error.strerror})"
        raise UserError(f"{setting} is {config.rendezvous}: {reason}; needed one of the nodes") from error
    with socket.socket(family, kind, protocol) as trial, suppress(OSError):
        trial.bind((address[0], 0, *address[2:]))
        return  # an address of this machine
    until = time.monotonic() + config.wait_s
    while True:
        try:
            socket.create_connection((host, port), timeout=POLL_S).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                why = f"nobody answers at {setting} {config.rendezvous} for {config.wait_s} s ({error})"
                raise UserError(f"{why}; start the same command there") from error
            time.sleep(POLL_S)


@dataclass
class SlurmTask:
    """The part of a Slurm job on one machine; submitit pickles and runs it."""

    command: list[str]
    snapshot: Path
    folder: str
    torchrun: subprocess.Popen | None = None

    def __call__(self) -> int:
        import submitit

        os.chdir(self.folder)
        first = submitit.JobEnvironment().hostnames[0]
        port = PORT + int(os.environ.get("SLURM_JOB_ID", "0")) % PORTS
        self.torchrun = _start([word.replace(ADDRESS, f"{first}:{port}") for word in self.command], self.snapshot)
        try:
            return self.torchrun.wait() or int((self.snapshot / REFUSED).is_file())
        finally:  # cancelled
            self._stop()

    def checkpoint(self) -> Any:
        """Before preemption, or at the end of the job's time: ranks save their state, and the job is queued again."""
        import submitit

        self._stop()
        return submitit.helpers.DelayedSubmission(SlurmTask(self.command, self.snapshot, self.folder))

    def _stop(self) -> None:
        """A signal handler calls this while `__call__` waits: Popen's own `wait` would then wait for itself."""
        if self.torchrun is None or self.torchrun.returncode is not None:
            return
        with suppress(ProcessLookupError, ChildProcessError):  # ended already
            os.kill(self.torchrun.pid, signal.SIGTERM)
            os.waitid(os.P_PID, self.torchrun.pid, os.WEXITED | os.WNOWAIT)


def _slurm_parameters(job: Job, config: LaunchConfig) -> dict[str, Any]:
    """submitit's names and values. Raises UserError: no submitit."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError(f"{job.setting}.where is slurm, which needs submitit; run {pip_install('cluster')}")
    ranks = job.ranks // config.nodes
    parameters = {"nodes": config.nodes, "tasks_per_node": 1, "timeout_min": 60 * config.hours, "name": job.name}
    cores = ranks * job.processes
    parameters |= {"cpus_per_task": cores, "slurm_mem": "0"}  # all memory of a machine
    parameters |= {"slurm_srun_args": [f"--cpus-per-task={cores}"]}  # srun of Slurm 22.05 to 23.02 does not inherit it
    parameters |= {"gpus_per_node": ranks} if job.device == "cuda" else {}
    parameters |= {"slurm_signal_delay_s": config.wait_s + REQUEUE_S}
    return parameters | ({"slurm_partition": config.partition} if config.partition else {})


def _batch_file(job: Job, config: LaunchConfig, snapshot: Path) -> str:
    parameters = _slurm_parameters(job, config)
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    names, folder = SlurmExecutor._equivalence_dict(), artifacts.RUNS / "slurm"
    named = {names.get(key, key.removeprefix("slurm_")): value for key, value in parameters.items()}
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {folder}"
    text = _make_sbatch_string(command=command, folder=folder, **named)
    return text + f"# it runs: {shlex.join(_command(job, config, snapshot))}"


@dataclass(frozen=True)
class SubmittedJob:
    """A Slurm job by SLURM_JOB. id: Slurm's. tasks: one a machine. snapshot: its folder."""

    id: str
    tasks: int
    snapshot: str


def _slurm(job: Job, config: LaunchConfig) -> int:
    """Exit code of a Slurm job, whose progress is shown. A signal ends this command with AGAIN, and the job goes on.

    The job is that of an earlier call, if it still runs or has an end to report. submitit's local job is cancelled by a
    signal, since no later call can follow it.
    Raises UserError: no submitit, no Slurm, or a rank refused.
    """
    parameters = _slurm_parameters(job, config)
    from rich.progress import Progress

    if config.cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError(f"no sbatch here, so no Slurm; set {job.setting}.where to here, torchrun or nodes")
    local, record, submitted = config.cluster == "local", job.state / SLURM_JOB, None

    def stop(_: int) -> None:
        if local and submitted:
            submitted.cancel()

    with stop_requests(stop, more=(signal.SIGHUP,)) as requests:
        submitted, snapshot = (None if local else _recorded_job(job, record)) or _submit(job, config, parameters, record)
        print(f"job {submitted.job_id}, log {submitted.paths.stdout}", file=sys.stderr)
        with Progress() as bar:
            shown = bar.add_task(job.name, total=job.steps)
            while not submitted.done() and (local or not requests):
                bar.update(shown, completed=job.steps_done())
                time.sleep(POLL_S)
    if requests and not submitted.done():
        follow = f"job {submitted.job_id} goes on, and the same command follows it again"
        print(f"{follow}; to end it: scancel {submitted.job_id}", file=sys.stderr)
        return AGAIN
    code = _end_of(submitted, cancelled=local and bool(requests))
    record.unlink(missing_ok=True)
    with suppress(OSError):  # states are there
        record.parent.rmdir()
    try:
        _raise_refusal(code, snapshot)
    finally:
        shutil.rmtree(snapshot, ignore_errors=True)
    return code


def _submit(job: Job, config: LaunchConfig, parameters: Mapping[str, Any], record: Path) -> tuple[Any, Path]:
    """A new job of submitit, and its snapshot. The job's id goes into `record`, unless it is a local one."""
    import submitit

    snapshot = _write_snapshot(job, _suffix())
    executor = submitit.AutoExecutor(_slurm_folder(job), cluster=config.cluster, slurm_max_num_timeout=REQUEUES)
    executor.update_parameters(**parameters)
    submitted = executor.submit(SlurmTask(_command(job, config, snapshot), snapshot, os.getcwd()))
    if config.cluster == "slurm":
        record.parent.mkdir(parents=True, exist_ok=True)
        content = SubmittedJob(submitted.job_id, config.nodes, snapshot.as_posix())
        provenance.write_text(record, json_text(asdict(content)))
    return submitted, snapshot


def _recorded_job(job: Job, record: Path) -> tuple[Any, Path] | None:
    """The job of an earlier call and its snapshot; None: there is none to follow, and its record is gone.

    A new job goes on from the last saved state where the recorded one was cancelled, where Slurm no longer knows it, or
    where its result was removed since (`dvc repro` removes a stage's outs before it runs the stage).
    Raises UserError: the record is damaged, or Slurm does not answer.
    """
    import submitit

    if not record.is_file():
        return None
    saved = read_description(record, SubmittedJob, "a Slurm job")
    submitted = submitit.SlurmJob(_slurm_folder(job), saved.id, tasks=range(saved.tasks))
    if _is_queued(saved.id, record):
        return submitted, Path(saved.snapshot)
    state, ended = submitted.get_info().get("State", "UNKNOWN").split()[0], submitted.paths.result_pickle.exists()
    if ended and submitted.exception() is None and not any(submitted.results()):
        why = "" if job.written() else "its result is gone"
    else:
        why = f"Slurm has it as {state}" if state == "CANCELLED" or (state == "UNKNOWN" and not ended) else ""
    if not why:
        return submitted, Path(saved.snapshot)
    print(f"job {saved.id} of an earlier call has ended, and {why}; a new one goes on from its last state", file=sys.stderr)
    shutil.rmtree(saved.snapshot, ignore_errors=True)
    record.unlink()
    return None


def _is_queued(job_id: str, record: Path) -> bool:
    """Whether a job waits or runs. Raises UserError: Slurm does not answer."""
    answer = subprocess.run(["squeue", "--noheader", "--jobs", job_id], capture_output=True, text=True, check=False)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        why = shortened(answer.stderr) or f"exit code {answer.returncode}"
        problem = f"squeue does not tell whether job {job_id} of an earlier call still runs ({why})"
        raise UserError(f"{problem}; run the same command later, or remove {record} if the job is gone")
    return not answer.returncode and bool(answer.stdout.strip())


def _end_of(submitted: Any, *, cancelled: bool) -> int:
    """Exit code of a job that is over; AGAIN of a cancelled one. Prints the errors of a failed one."""
    failed = submitted.exception() is not None
    code = 1 if failed else max(submitted.results(), key=abs)  # one of each machine
    if code and (cancelled or submitted.state.startswith("CANCELLED")):
        return AGAIN
    if failed:
        print(submitted.stderr(), file=sys.stderr)
    return code


def _slurm_folder(job: Job) -> Path:
    return artifacts.RUNS / "slurm" / job.name
