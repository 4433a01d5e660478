"""Stages side by side."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commands import ENVIRONMENT, ROOT

from scaling4d.pipeline import parallel_repro

DOT = """strict digraph {
"data.dvc";
"clips";
"pretrain@nano";
"pretrain@mini";
"readout@mini-boxes";
"data.dvc" -> "clips";
"clips" -> "pretrain@nano";
"clips" -> "pretrain@mini";
"pretrain@mini" -> "readout@mini-boxes";
}
"""
NEEDS = {
    "data.dvc": set(),
    "clips": {"data.dvc"},
    "pretrain@nano": {"clips"},
    "pretrain@mini": {"clips"},
    "readout@mini-boxes": {"pretrain@mini"},
}


def test_the_graph_that_dvc_prints_is_read() -> None:
    assert parallel_repro.parse_dag(DOT) == NEEDS


def test_the_stage_with_the_longest_chain_behind_it_begins_first() -> None:
    began: list[str] = []
    parallel_repro.run_graph(NEEDS, 1, began.append)
    assert began == ["data.dvc", "clips", "pretrain@mini", "pretrain@nano", "readout@mini-boxes"]


def test_independent_stages_run_side_by_side_at_most_jobs_at_a_time() -> None:
    both, done, under_way, most = threading.Barrier(2, timeout=60), set(), set(), []

    def execute(stage: str) -> None:
        assert NEEDS[stage] <= done
        under_way.add(stage)
        most.append(len(under_way))
        if stage.startswith("pretrain"):
            both.wait()  # ends only if the other one runs too
        under_way.remove(stage)
        done.add(stage)

    parallel_repro.run_graph(NEEDS, 2, execute)
    assert done == set(NEEDS) and max(most) == 2


def test_after_a_failed_stage_no_stage_begins_and_running_stages_end() -> None:
    failed, began, ended = threading.Event(), [], []

    def execute(stage: str) -> None:
        began.append(stage)
        if stage == "pretrain@mini":
            failed.set()
            raise OSError(stage)
        if stage == "pretrain@nano":
            assert failed.wait(60)
        ended.append(stage)

    with pytest.raises(OSError, match="pretrain@mini"):
        parallel_repro.run_graph(NEEDS, 2, execute)
    assert sorted(began) == ["clips", "data.dvc", "pretrain@mini", "pretrain@nano"]
    assert ended == ["data.dvc", "clips", "pretrain@nano"]


@pytest.mark.parametrize("jobs", ["0", "-1", "many", ""])
def test_a_wrong_number_of_jobs_is_one_clear_line(jobs: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: JOBS is '{jobs}'; needed a whole number from 1 up$"):
        parallel_repro.main(jobs)


@pytest.mark.integration
def test_a_command_that_fails_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", ENVIRONMENT["PATH"])
    monkeypatch.chdir(tmp_path)  # no DVC repository
    with pytest.raises(SystemExit, match="^error: `dvc dag --dot` failed; its output above has the reason$"):
        parallel_repro.main("2")


@pytest.mark.integration
def test_ctrl_c_ends_the_run_after_its_stages_without_a_traceback(tmp_path: Path) -> None:
    dvc = tmp_path / "dvc"  # whose stage presses Ctrl-C: the signal reaches all processes of the terminal
    dvc.write_text("#!/bin/sh\n[ $1 = dag ] && echo '\"clips\";' && exit\ntrap 'touch ended; exit 1' INT\nkill -INT 0\n")
    dvc.chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    command = (sys.executable, "-m", "scaling4d.pipeline.parallel_repro", "2")
    where = {"cwd": tmp_path, "env": environment, "start_new_session": True}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **where)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "") and (tmp_path / "ended").is_file()
