"""The command `pretrain` by torchrun, on several nodes and as a Slurm job gives the bytes of forked ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interrupting import free_port
from nano import NANO, TIMINGS, steps_shown, written

from scaling4d import config
from scaling4d.pretrain.settings import bind_pretrain
from scaling4d.pretrain.stage import _job, pretrain, provenance_of
from scaling4d.records import AGAIN

pytestmark = pytest.mark.integration

COMMAND = [sys.executable, "-m", "scaling4d", "pretrain", "nano"]
SAVED = {"Runtime.save_every": 5}


def elsewhere(short: Callable, steps: int, **launch: object) -> dict:
    return short(steps, **SAVED, **{f"points.nano.Launch.{key}": value for key, value in launch.items()})


def test_the_progress_of_a_job_is_that_of_its_own_steps(short: Callable) -> None:
    settings = short(6)
    TIMINGS.parent.mkdir(parents=True)
    TIMINGS.write_text('{"step": 6}\n')  # of a run before
    pretraining = bind_pretrain("nano", settings)
    job = _job(pretraining, settings, provenance_of(pretraining))
    assert job.steps_done() == 0
    with TIMINGS.open("a") as file:
        file.write('{"step": 2}\n{"ste')  # and a line that is being written
    assert job.steps_done() == 2


def processes_below(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in children.read_text().split()] if children.exists() else []


def wait_for_steps(process: subprocess.Popen, steps: int) -> None:
    while process.poll() is None and (not TIMINGS.is_file() or len(TIMINGS.read_text().splitlines()) < steps):
        time.sleep(0.02)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_torchrun_on_nodes_gives_the_bytes_of_forked_ranks(short: Callable, monkeypatch: pytest.MonkeyPatch, nodes: int) -> None:
    pretrain("nano", short(6, **SAVED))
    forked = written()
    here, both = {"where": "torchrun"}, {"where": "nodes", "nodes": 2, "rendezvous": f"127.0.0.1:{free_port()}"}
    elsewhere(short, 6, **(here if nodes == 1 else both))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    started = [subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True) for _ in range(nodes)]
    assert "".join(process.communicate()[0] for process in started) == f"wrote {NANO}\n"  # once, not by every rank
    assert [process.returncode for process in started] == [0] * nodes
    assert written() == forked
    assert not [path for kind in ("pretrain", "snapshot", "removed") for path in Path(".resume").glob(f"{kind}-*")]


@pytest.mark.slow
def test_a_refused_run_is_not_started_again_and_tells_why_once(short: Callable, changed: Callable) -> None:
    elsewhere(short, 6, where="torchrun")
    changed("pretrain.Training.rate_times_width", 1e9)
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "the gradients are not finite" in errors[0]
    assert done.stdout == ""
    assert steps_shown() == list(range(1, len(steps_shown()) + 1))  # it was not started again


@pytest.mark.slow
def test_a_lost_rank_is_started_again_and_a_request_to_stop_is_answered(short: Callable) -> None:
    pretrain("nano", short(60, **SAVED))
    forked = written()
    elsewhere(short, 60, where="torchrun")
    process = subprocess.Popen(COMMAND, stderr=subprocess.DEVNULL)
    wait_for_steps(process, 8)
    before = config.PARAMS.read_text()
    config.PARAMS.write_text("other: 1")  # ranks that start again belong to the same run
    (torchrun,) = processes_below(process.pid)
    os.kill(processes_below(torchrun)[-1], signal.SIGKILL)
    wait_for_steps(process, 20)
    config.PARAMS.write_text(before)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == AGAIN
    assert list(Path(".resume").glob("pretrain-*/step-*"))
    assert subprocess.run(COMMAND, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert written() == forked


@pytest.mark.slow
def test_ctrl_c_twice_ends_torchrun_after_the_state_is_saved(short: Callable) -> None:
    unsaved = {"Runtime.save_every": 1000, "Runtime.workers": 1, "Runtime.cached_clips": 0}
    short(60, **unsaved, **{"points.nano.Launch.where": "torchrun"})
    process = subprocess.Popen(COMMAND, stderr=subprocess.PIPE, text=True, process_group=0)
    wait_for_steps(process, 8)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    errors = process.communicate()[1]
    assert process.returncode == AGAIN and "KeyboardInterrupt" not in errors
    done = re.search(r"^stopped after step (\d+) of 60, on request; the same command goes on from there$", errors, re.MULTILINE)
    assert [path.name for path in Path(".resume").glob("pretrain-*/step-*")] == [f"step-{int(done[1]):08d}"]
    assert subprocess.run(COMMAND, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert steps_shown() == list(range(1, 61))


@pytest.mark.slow
def test_submitits_job_gives_the_same_bytes_and_is_queued_again_when_it_is_preempted(short: Callable) -> None:
    pytest.importorskip("submitit")
    pretrain("nano", short(80, **SAVED))
    forked = written()
    elsewhere(short, 80, where="slurm", cluster="local")
    process = subprocess.Popen(COMMAND, stderr=subprocess.DEVNULL)
    wait_for_steps(process, 8)
    (controller,) = processes_below(process.pid)
    (task,) = processes_below(controller)
    os.kill(task, signal.SIGUSR2)  # what Slurm sends before it preempts
    assert process.wait() == 0
    assert written() == forked
    assert steps_shown() == list(range(1, 81))  # the state was saved, and no step repeated
    logs = Path(".runs/slurm/pretrain-nano").glob("*_log.*")
    assert "Caught signal SIGUSR2" in "".join(path.read_text() for path in logs)
