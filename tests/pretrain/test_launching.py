"""Where a point's ranks are started."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interrupted import TIMINGS, written

from scaling4d import config
from scaling4d.code import hashes, running
from scaling4d.pretrain import launch
from scaling4d.pretrain.launch import fits
from scaling4d.pretrain.loop import made_of, prepare, pretrain
from scaling4d.records import AGAIN, UserError

NANO = Path("artifacts/smoke/pretrain/nano")


@pytest.fixture
def small(changed: Callable) -> Callable[..., dict]:
    """Settings of a short run on two ranks, with changes."""

    def make(**more: object) -> dict:
        TIMINGS.unlink(missing_ok=True)
        values = {"ranks": 2, "batch": 8, "steps": 6, "log_every": 1} | {
            key: more.pop(key) for key in ("steps", "ranks") if key in more
        }
        for key, value in values.items():
            changed(f"pretrain.Training.{key}", value)
        settings = changed("pretrain.Running.save_every", 5)
        for key, value in more.items():
            settings = changed(f"points.nano.Launch.{key}", value)
        return settings

    return make


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "scaling4d", "pretrain", "nano", *more]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def below(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in children.read_text().split()] if children.exists() else []


def after_steps(process: subprocess.Popen, steps: int) -> None:
    while process.poll() is None and (not TIMINGS.is_file() or len(TIMINGS.read_text().splitlines()) < steps):
        time.sleep(0.02)


def test_torchrun_gives_the_same_bytes_as_forked_ranks(small: Callable) -> None:
    forked = written(pretrain("nano", small()))
    small(where="torchrun")
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["wrote artifacts/smoke/pretrain/nano"]  # once, not by every rank
    assert written(NANO) == forked
    assert not [path for kind in ("pretrain", "snapshot", "removed") for path in Path(".resume").glob(f"{kind}-*")]


@pytest.mark.slow
def test_a_lost_rank_is_started_again_and_a_request_to_stop_is_answered(small: Callable) -> None:
    forked = written(pretrain("nano", small(steps=60)))
    small(steps=60, where="torchrun")
    process = subprocess.Popen(command(), stderr=subprocess.DEVNULL)
    after_steps(process, 8)
    before = config.PARAMS.read_text()
    config.PARAMS.write_text("other: 1")  # ranks that start again are those of the same run
    (torchrun,) = below(process.pid)
    os.kill(below(torchrun)[-1], signal.SIGKILL)
    after_steps(process, 20)
    config.PARAMS.write_text(before)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == AGAIN
    assert list(Path(".resume").glob("pretrain-*/step-*"))
    assert subprocess.run(command(), stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert written(NANO) == forked


def test_a_refused_run_is_not_started_again_and_says_why_once(small: Callable, changed: Callable) -> None:
    small(where="torchrun")
    changed("pretrain.Training.rate_times_width", 1e9)
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(said) == 1 and "the gradient is" in said[0]
    assert done.stdout == ""
    steps = [json.loads(line)["step"] for line in TIMINGS.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(
    ("script", "refused", "code"),
    [("exit 0", False, 0), ("exit 1", False, AGAIN), ("exit 0", True, 1), ("exit 1", True, 1)],
)
def test_asked_to_stop_it_says_run_me_again_only_where_that_is_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, refused: bool, code: int
) -> None:
    """A run that had ended, or was refused, is not run again."""
    if refused:
        (tmp_path / launch.REFUSED).write_text("the disk is full")
    waiting = f"trap '{script}' TERM; touch {tmp_path}/ready; while :; do sleep 0.01; done"
    asking = f"while [ ! -e {tmp_path}/ready ]; do sleep 0.01; done; kill -TERM {os.getpid()}"
    with subprocess.Popen(["sh", "-c", asking]):
        assert launch._run(["sh", "-c", waiting], tmp_path, False) == code


def test_asked_to_stop_while_torchrun_is_being_started_it_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = launch._start

    def start_and_ask(command: list[str], snapshot: Path) -> subprocess.Popen:
        started = start(command, snapshot)
        os.kill(os.getpid(), signal.SIGTERM)
        return started

    monkeypatch.setattr(launch, "_start", start_and_ask)
    assert launch._run(["sleep", "60"], tmp_path, False) == AGAIN


def test_a_launcher_keeps_settings_and_code_for_its_ranks(small: Callable) -> None:
    settings = small(where="torchrun")
    run = prepare("nano", settings)
    snapshot = launch._snapshot(run, made_of(run), "")
    told = launch._read(snapshot)
    assert told["settings"] == settings and told["made"]["code"] == running("pretrain")
    assert hashes(snapshot / launch.CODE / "scaling4d")["pretrain"] == told["made"]["code"]
    (snapshot / launch.REFUSED).write_text("once")
    assert launch._snapshot(run, made_of(run), "") == snapshot and not (snapshot / launch.REFUSED).exists()
    shutil.rmtree(snapshot)


@pytest.mark.slow
def test_two_nodes_on_loopback_give_the_same_bytes(small: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    forked = written(pretrain("nano", small()))
    small(where="nodes", nodes=2, rendezvous=f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    nodes = [subprocess.Popen(command(), stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [node.wait() for node in nodes] == [0, 0]
    assert written(NANO) == forked


@pytest.mark.slow
def test_submitits_job_gives_the_same_bytes_and_is_requeued_when_it_is_preempted(small: Callable) -> None:
    pytest.importorskip("submitit")
    forked = written(pretrain("nano", small(steps=80)))
    settings = small(steps=80, where="slurm", cluster="local")
    process = subprocess.Popen(command(), stderr=subprocess.DEVNULL)
    after_steps(process, 8)
    (controller,) = below(process.pid)
    (task,) = below(controller)
    os.kill(task, signal.SIGUSR2)  # what Slurm sends before it preempts
    assert process.wait() == 0
    assert written(NANO) == forked
    steps = [json.loads(line)["step"] for line in TIMINGS.read_text().splitlines()]
    assert steps == list(range(1, settings["pretrain"]["Training"]["steps"] + 1))  # it was saved and went on, not begun anew
    assert "Caught signal SIGUSR2" in "".join(path.read_text() for path in Path(".runs/slurm/nano").glob("*_log.*"))


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"where": "here"}, "2 forked ranks of this process"),
        ({"where": "torchrun"}, "--standalone --nproc-per-node 2 --max-restarts 3 "),
        (
            {"where": "nodes", "nodes": 2, "rendezvous": "a:1"},
            "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:1 --rdzv-id nano ",
        ),
        ({"where": "slurm", "nodes": 2, "partition": "gpu"}, "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n"),
        ({"where": "slurm", "nodes": 2, "partition": "gpu"}, "#SBATCH --partition=gpu\n"),
    ],
)
def test_dry_prints_how_it_would_be_started(small: Callable, capsys: pytest.CaptureFixture, where: dict, words: str) -> None:
    if where["where"] == "slurm":
        pytest.importorskip("submitit")
    assert launch.launch("nano", small(**where), dry=True) == 0
    assert words in capsys.readouterr().out and not TIMINGS.exists()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"where": "moon"}, "points.nano.Launch.where is 'moon'; needed one of here, torchrun, nodes, slurm"),
        ({"where": "nodes", "nodes": 3}, "2 ranks do not divide among 3 nodes; set points.nano.Launch.nodes"),
        ({"where": "nodes", "nodes": 2}, "points.nano.Launch.rendezvous is ''; needed HOST:PORT of one of the nodes"),
        (
            {"where": "nodes", "nodes": 2, "rendezvous": "nowhere.invalid:1"},
            r"points.nano.Launch.rendezvous is nowhere.invalid:1: no host nowhere.invalid \(.+\); needed one of the nodes",
        ),
        ({"where": "slurm"}, "no sbatch here, so no Slurm; set points.nano.Launch.where to here, torchrun or nodes"),
    ],
)
def test_what_cannot_be_started_is_refused_in_one_line(
    small: Callable, monkeypatch: pytest.MonkeyPatch, where: dict, message: str
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=f"^{message}$"):
        launch.launch("nano", small(**where), dry=False)


def test_a_rendezvous_where_nobody_answers_is_named(small: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_is_mine", lambda address: False)
    monkeypatch.setattr(launch, "POLL_S", 0.01)
    settings = small(where="nodes", nodes=2, rendezvous=f"127.0.0.1:{free_port()}", wait_s=0)
    with pytest.raises(UserError, match=r"^nobody answers at points.nano.Launch.rendezvous 127.0.0.1:\d+ for 0 s \(.+\); start"):
        launch.launch("nano", settings, dry=False)


def test_another_number_of_ranks_than_torchrun_started_is_refused(small: Callable) -> None:
    small(ranks=4)
    standalone = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run([*standalone, *command()[1:]], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "error: torchrun started 1 ranks, and the settings are for 4; set pretrain.Training.ranks=1" in done.stderr


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(project: Path) -> None:
    settings = config.read()
    settings["pretrain"]["Training"] |= {"device": "cuda", "compute": "bfloat16", "batch": 4096, "ranks": 4}
    run = prepare("nano", settings)
    fits(run, 80 * 10**9)
    with pytest.raises(
        UserError, match=r"^a step of nano with 1024 clips a GPU needs \d.\d GiB, and 90% of a GPU here is 0.8 GiB; "
    ):
        fits(run, 10**9)
    with pytest.raises(UserError, match=r"set Sharding.accumulate=\d+, or see scaling4d plan nano$") as refused:
        fits(run, 10**9)
    parts = int(str(refused.value).split("accumulate=")[1].split(",")[0])
    settings["points"]["nano"]["Sharding"]["accumulate"] = parts
    fits(prepare("nano", settings), 10**9)


@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize("profile", ["h100", "paper"])
def test_every_point_of_the_large_profiles_fits_its_mesh_and_has_its_script(
    profile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("scaling4d.clips.loader.count", lambda folder, split: 1)  # there are no clips here
    monkeypatch.setattr(launch, "_gpu_bytes", lambda: 80 * 10**9)
    settings = config.compose([f"profile={profile}"])
    for point in settings["points"]:
        assert launch.launch(point, settings, dry=True) == 0
        printed = capsys.readouterr().out
        assert ("#SBATCH --gpus-per-node=8" in printed and "#SBATCH --nodes=32" in printed) == (profile == "paper"), point
