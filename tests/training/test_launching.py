"""Where a job's ranks are started, and what a launcher hands to them."""

import os
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from interrupting import free_port

from scaling4d.pipeline.code_hashes import hashes, running
from scaling4d.records import AGAIN, UserError
from scaling4d.training import launch
from scaling4d.training.launch import CODE, REFUSED, Job, LaunchConfig, snapshot_content

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
    steps=6,
    steps_done=lambda: 0,
)


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
