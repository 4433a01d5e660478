"""Stages side by side."""

import threading
from pathlib import Path

import pytest
from commands import ENVIRONMENT

from scaling4d import ahead

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
WAITS = {
    "data.dvc": set(),
    "clips": {"data.dvc"},
    "pretrain@nano": {"clips"},
    "pretrain@mini": {"clips"},
    "readout@mini-boxes": {"pretrain@mini"},
}


def test_what_dvc_prints_of_its_stages_is_understood() -> None:
    assert ahead.parse(DOT) == WAITS


def test_the_stage_with_the_longest_chain_behind_it_begins_first() -> None:
    began: list[str] = []
    ahead.run(WAITS, 1, began.append)
    assert began == ["data.dvc", "clips", "pretrain@mini", "pretrain@nano", "readout@mini-boxes"]


def test_stages_that_do_not_wait_for_each_other_run_at_a_time_and_no_more_than_were_asked_for() -> None:
    both, done, under_way, most = threading.Barrier(2, timeout=60), set(), set(), []

    def execute(stage: str) -> None:
        assert WAITS[stage] <= done
        under_way.add(stage)
        most.append(len(under_way))
        if stage.startswith("pretrain"):
            both.wait()  # ends only if the other one runs too
        under_way.remove(stage)
        done.add(stage)

    ahead.run(WAITS, 2, execute)
    assert done == set(WAITS) and max(most) == 2


def test_nothing_begins_after_a_stage_that_failed_and_what_is_under_way_ends() -> None:
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
        ahead.run(WAITS, 2, execute)
    assert sorted(began) == ["clips", "data.dvc", "pretrain@mini", "pretrain@nano"]
    assert ended == ["data.dvc", "clips", "pretrain@nano"]


@pytest.mark.parametrize("jobs", ["0", "-1", "many", ""])
def test_a_wrong_number_of_jobs_is_one_clear_line(jobs: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: JOBS is '{jobs}'; needed a whole number from 1 up$"):
        ahead.main(jobs)


def test_a_command_that_fails_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", ENVIRONMENT["PATH"])
    monkeypatch.chdir(tmp_path)  # no DVC repository
    with pytest.raises(SystemExit, match="^error: `dvc dag --dot` failed; why, it says above$"):
        ahead.main("2")
