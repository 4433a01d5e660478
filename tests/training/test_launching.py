"""Where a job's ranks are started, and what a launcher hands to them."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest
from interrupting import exit_code, free_port
from torch.distributed.elastic.multiprocessing import PContext

from scaling4d.pipeline.code_hashes import hashes, running
from scaling4d.records import AGAIN, UserError
from scaling4d.training import launch, torchrun
from scaling4d.training.launch import CODE, REFUSED, SLURM_JOB, Job, LaunchConfig, snapshot_content

HERE = LaunchConfig(where="here", nodes=1, rendezvous="", restarts=3, wait_s=0, partition="", hours=24, cluster="slurm")
TWO_NODES = {"where": "nodes", "nodes": 2}
JOB = Job(
    name="toy",
    arguments=("pretrain", "toy"),
    setting="points.toy.Launch",
    ranks=2,
    processes=1,
    device="cpu",
    content={"settings": {"seed": 0}},
    state=Path(".resume/toy-0"),
    steps=6,
    steps_done=lambda: 0,
    written=lambda: True,
)
SLURM = replace(HERE, where="slurm")
RECORD = JOB.state / SLURM_JOB
JOB_IDS = count(1000)  # submitit remembers the states of former ones


@pytest.mark.integration
@pytest.mark.parametrize(("script", "refused", "code"), [
    ("exit 0", False, 0), ("exit 1", False, AGAIN), ("exit 0", True, 1), ("exit 1", True, 1)
])  # fmt: skip
def test_asked_to_stop_it_says_run_me_again_only_where_of_use(tmp_path: Path, script: str, refused: bool, code: int) -> None:
    """A run that had ended, or was refused, is not run again."""
    if refused:
        (tmp_path / REFUSED).write_text("the disk is full")
    waiting = f"trap '{script}' TERM; touch {tmp_path}/ready; while :; do sleep 0.01; done"
    asking = f"while [ ! -e {tmp_path}/ready ]; do sleep 0.01; done; kill -TERM {os.getpid()}"
    with subprocess.Popen(["sh", "-c", asking]):
        assert launch._run(["sh", "-c", waiting], tmp_path) == code


@pytest.mark.integration
def test_asked_to_stop_while_torchrun_is_being_started_it_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = launch._start

    def start_and_ask(command: list[str], snapshot: Path) -> subprocess.Popen:
        started = start(command, snapshot)
        os.kill(os.getpid(), signal.SIGTERM)
        return started

    monkeypatch.setattr(launch, "_start", start_and_ask)
    assert launch._run(["sleep", "60"], tmp_path) == AGAIN


STAND_IN = """
import signal, time
from pathlib import Path
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
Path("ready").touch()
while not Path("over").exists():
    time.sleep(0.01)
Path("received").write_text(" ".join(received))
raise SystemExit(1)
"""


@pytest.mark.integration
def test_ctrl_c_twice_is_one_request_to_torchrun() -> None:
    """torchrun leaves its ranks at a third signal."""
    pressing = "trap '' INT; until [ -e ready ]; do sleep 0.01; done; "
    pressing += "kill -INT 0; sleep 0.2; kill -INT 0; sleep 0.2; touch over"

    def press() -> None:
        with subprocess.Popen(["sh", "-c", pressing]):
            os._exit(launch._run([sys.executable, "-c", STAND_IN], Path()))

    assert exit_code(press) == AGAIN
    assert Path("received").read_text() == "SIGTERM"


def test_torchrun_gives_ranks_the_time_of_the_settings_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list = []
    monkeypatch.setattr(PContext, "close", lambda self, death_sig=None, timeout=30: calls.append((death_sig, timeout)))
    monkeypatch.setattr(
        torchrun.run, "main", lambda words: calls.append(words) or PContext.close(None, signal.SIGTERM, timeout=30)
    )
    monkeypatch.setattr(sys, "argv", ["torchrun", "77", "--standalone"])
    torchrun.main()
    assert calls == [["--standalone"], (signal.SIGTERM, 77)]


def test_a_launcher_keeps_settings_and_code_for_its_ranks() -> None:
    snapshot = launch._write_snapshot(JOB, "")
    assert hashes(snapshot / CODE / "scaling4d", ["pretrain"])["pretrain"] == running("pretrain")
    with snapshot_content(snapshot) as content:
        assert content == JOB.content
    (snapshot / REFUSED).write_text("once")
    assert launch._write_snapshot(JOB, "") == snapshot and not (snapshot / REFUSED).exists()
    assert launch._write_snapshot(replace(JOB, content={"settings": {"seed": 1}}), "") != snapshot


def test_a_refusal_of_one_rank_reaches_the_launcher_and_the_other_ranks_leave() -> None:
    snapshot = launch._write_snapshot(JOB, "")
    with pytest.raises(SystemExit), snapshot_content(snapshot):
        with pytest.raises(SystemExit), snapshot_content(snapshot):
            raise UserError("the gradient is nan")
        raise UserError("the gradient is nan here, too")
    assert (snapshot / REFUSED).read_text() == "the gradient is nan"
    with snapshot_content(snapshot) as content:
        assert content is None


@pytest.mark.parametrize(("changes", "words"), [
    ({}, "2 forked ranks of this process"),
    ({"where": "torchrun"}, "--standalone --nproc-per-node 2 --max-restarts 3 "),
    (TWO_NODES | {"rendezvous": "a:1"}, "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:1 --rdzv-id toy "),
    ({"where": "slurm", "nodes": 2}, "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n"),
    ({"where": "slurm", "partition": "gpu"}, "#SBATCH --partition=gpu\n"),
    ({"where": "slurm"}, " --cpus-per-task=2 "),
])  # fmt: skip
def test_it_says_how_it_would_be_started(changes: dict, words: str) -> None:
    if changes.get("where") == "slurm":
        pytest.importorskip("submitit")
    assert words in launch.describe(JOB, replace(HERE, **changes)) and not list(Path().iterdir())


@pytest.mark.parametrize(("changes", "message"), [
    ({"where": "moon"}, "where = 'moon'; needed here, torchrun, nodes or slurm"),
    ({"where": "nodes", "nodes": 3}, "2 ranks do not divide among 3 nodes; set points.toy.Launch.nodes"),
    (TWO_NODES, "points.toy.Launch.rendezvous is ''; needed HOST:PORT of one of the nodes"),
    (TWO_NODES | {"rendezvous": "no.invalid:1"}, r"points.+ is no.invalid:1: no host no.invalid \(.+\); needed one of .+"),
    (TWO_NODES | {"rendezvous": "127.0.0.1:PORT"}, r"nobody answers at points.+ 127.0.0.1:\d+ for 0 s \(.+\); start .+"),
    ({"where": "slurm"}, "no sbatch here, so no Slurm; set points.toy.Launch.where to here, torchrun or nodes"),
])  # fmt: skip
def test_a_job_that_cannot_start_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, changes: dict, message: str) -> None:
    if changes["where"] == "slurm":
        pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(launch, "POLL_S", 0.01)
    if "PORT" in changes.get("rendezvous", ""):
        changes = changes | {"rendezvous": f"127.0.0.1:{free_port()}"}
        monkeypatch.setattr(socket.socket, "bind", Mock(side_effect=OSError("not an address of this machine")))
    with pytest.raises(ValueError, match=f"^{message}$"):
        launch.launch(JOB, replace(HERE, **changes))


# ---- Slurm ----


class Slurm:
    """Slurm's commands in the folder `bin`: `sbatch` submits job `id`, which has `state`. They list their calls."""

    def __init__(self, folder: Path) -> None:
        self.first, self.folder = next(JOB_IDS), folder
        scripts = {
            "srun": "",
            "sbatch": f"echo RUNNING > state; echo Submitted batch job {self.first}$(grep -c sbatch commands)",
            "squeue": "cat state | grep -E 'RUNNING|PENDING'; grep -q DOWN state && echo down >&2 && exit 1; exit 0",
            "sacct": f"echo 'JobID|State|NodeList'; echo \"{self.first}$(grep -c sbatch commands)|$(cat state)|n1\"",
        }
        for name, script in scripts.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\ncd {folder}; echo {name} >> commands\n{script}\n")
            path.chmod(0o755)

    @property
    def id(self) -> str:
        """Of the last job."""
        return f"{self.first}{self.submissions()}"

    def set(self, state: str) -> None:
        (self.folder / "state").write_text(state)

    def end(self, outcome: str, result: object) -> None:
        """As submitit does at the end of the job."""
        path = Path(f".runs/slurm/toy/{self.id}_0_result.pkl")
        path.write_bytes(pickle.dumps((outcome, result)))
        path.with_name(f"{self.id}_0_log.err").write_text("the job's errors")
        self.set("COMPLETED" if outcome == "success" else "FAILED")

    def submissions(self) -> int:
        return (self.folder / "commands").read_text().split().count("sbatch")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    pytest.importorskip("submitit")
    monkeypatch.setattr(launch, "POLL_S", 0.01)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    return Slurm(tmp_path)


def during(action: Callable[[], object]) -> Job:
    """The job; `action` is called while it is followed."""
    return replace(JOB, steps_done=lambda: action() and 0 or 0)


def lost(number: signal.Signals = signal.SIGINT) -> Job:
    """The job, whose follower gets a signal."""
    return during(lambda: os.kill(os.getpid(), number))


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_slurm_job_running_and_the_same_command_follows_it_to_its_end(
    slurm: Slurm, capfd: pytest.CaptureFixture, number: signal.Signals
) -> None:
    assert launch.launch(lost(number), SLURM) == AGAIN
    line = f"job {slurm.id} goes on, and the same command follows it again; to end it: scancel {slurm.id}"
    assert line in capfd.readouterr().err.splitlines()
    (snapshot,) = Path(".resume").glob("snapshot-*")  # its ranks still need it
    assert launch.launch(during(lambda: slurm.end("success", 0)), SLURM) == 0
    assert slurm.submissions() == 1 and not RECORD.exists() and not snapshot.exists()


@pytest.mark.integration
@pytest.mark.parametrize(("outcome", "result", "code"), [("success", 0, 0), ("success", 1, 1), ("error", "trace", 1)])
def test_the_end_of_a_job_that_nobody_followed_is_taken(slurm: Slurm, outcome: str, result: object, code: int) -> None:
    launch.launch(lost(), SLURM)
    slurm.end(outcome, result)
    assert launch.launch(JOB, SLURM) == code
    assert slurm.submissions() == 1 and not RECORD.exists()


@pytest.mark.integration
def test_a_refusal_of_a_job_that_nobody_followed_is_told(slurm: Slurm) -> None:
    launch.launch(lost(), SLURM)
    (snapshot,) = Path(".resume").glob("snapshot-*")
    (snapshot / REFUSED).write_text("the disk is full")
    slurm.end("success", 1)
    with pytest.raises(UserError, match="^the disk is full$"):
        launch.launch(JOB, SLURM)
    assert not RECORD.exists() and not snapshot.exists()


@pytest.mark.integration
@pytest.mark.parametrize(("state", "ended", "why"), [
    ("COMPLETED", True, "its result is gone"),
    ("CANCELLED by 0", False, "Slurm has it as CANCELLED"),
    ("UNKNOWN", False, "Slurm has it as UNKNOWN"),
])  # fmt: skip
def test_a_job_without_a_result_is_submitted_again(
    slurm: Slurm, capfd: pytest.CaptureFixture, state: str, ended: bool, why: str
) -> None:
    launch.launch(lost(), SLURM)
    if ended:
        slurm.end("success", 0)
    slurm.set(state)
    before = slurm.id
    assert launch.launch(replace(lost(), written=lambda: False), SLURM) == AGAIN
    message = f"job {before} of an earlier call has ended, and {why}; a new one goes on from its last state"
    assert message in capfd.readouterr().err
    assert slurm.submissions() == 2 and json.loads(RECORD.read_text())["id"] == slurm.id


@pytest.mark.integration
def test_a_cancelled_job_says_run_me_again(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    import submitit

    monkeypatch.setattr(submitit.SlurmJob, "_results_timeout_s", 0)
    assert launch.launch(during(lambda: slurm.set("CANCELLED by 0")), SLURM) == AGAIN
    assert not RECORD.exists()


@pytest.mark.integration
def test_a_slurm_that_does_not_answer_submits_no_second_job(slurm: Slurm) -> None:
    launch.launch(lost(), SLURM)
    slurm.set("DOWN")
    problem = f"squeue does not tell whether job {slurm.id} of an earlier call still runs \\(down\\)"
    with pytest.raises(UserError, match=f"^{problem}; run the same command later, or remove {RECORD} if the job is gone$"):
        launch.launch(JOB, SLURM)
    assert slurm.submissions() == 1 and RECORD.exists()
