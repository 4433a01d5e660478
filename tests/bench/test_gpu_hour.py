"""One hour on a GPU: records, budgets, resumption, by small steps; the real steps rehearsed on the CPU."""

import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from scaling4d.records import UserError
from scaling4d_bench import gpu_hour  # light: the process of every step imports this file
from scaling4d_bench.gpu_hour import HourStep, Outcome, read_record, run_hour

ROOT = Path(__file__).parents[2]
SECOND = 1 / 60  # in minutes


def quick(folder: Path, rehearse: bool) -> Outcome:
    with (folder / "runs.txt").open("a") as file:
        file.write("once\n")
    return Outcome(f"rehearsed: {rehearse}", "1 line")


def failing(folder: Path, rehearse: bool) -> Outcome:
    print("before the failure")
    raise UserError("the kernel differs")


def gone(folder: Path, rehearse: bool) -> Outcome:
    os._exit(9)  # as of a process that the system kills


def endless(folder: Path, rehearse: bool) -> Outcome:
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "pid.txt").write_text(str(child.pid))
    print("still waiting")
    time.sleep(600)
    return Outcome("never")


STEPS = [HourStep("first", 1, failing), HourStep("second", 8 * SECOND, endless), HourStep("third", 1, quick)]


def test_the_steps_fit_in_an_hour_and_come_in_order_of_value() -> None:
    from scaling4d_bench import gpu_steps

    names = [step.name for step in gpu_steps.STEPS]
    assert sum(step.minutes for step in gpu_steps.STEPS) <= 60
    smoke, profile = names.index("smoke"), names.index("profile")
    assert names[0] == "lock" and names[-1] == "videomae"
    assert {*names[1:smoke]} == {"attention", "determinism"} and {*names[smoke + 1 : profile]} == {"mfu", "widest"}
    assert (ROOT / gpu_steps.TESTS).is_file() and (ROOT / gpu_steps.LOCK).is_file()


@pytest.mark.integration
def test_a_failing_and_a_late_step_are_recorded_and_the_next_one_goes_on(tmp_path: Path, capsys) -> None:
    assert not run_hour(STEPS, tmp_path, rehearse=True)
    first, second, third = (read_record(tmp_path / step.name) for step in STEPS)
    assert (first.status, first.result) == ("failed", "scaling4d.records.UserError: the kernel differs")
    assert "before the failure" in (tmp_path / "first" / gpu_hour.LOG).read_text()
    assert (second.status, second.result) == ("late", "still waiting") and second.minutes >= 8 * SECOND
    assert not psutil.pid_exists(int((tmp_path / "second/pid.txt").read_text()))
    assert (third.status, third.result, third.expected) == ("done", "rehearsed: True", "1 line")
    table = capsys.readouterr().out.rpartition("every figure is in")[2]
    assert all(word in table for word in ("failed", "late", "done", "1 line"))


@pytest.mark.integration
def test_a_step_that_is_done_runs_again_only_on_another_device_or_where_it_is_named(tmp_path: Path, monkeypatch) -> None:
    steps = [HourStep("third", 1, quick), HourStep("lost", 1, gone)]
    runs = tmp_path / "third/runs.txt"
    for only, count in (((), 1), ((), 1), (("third",), 2), (("lost",), 2)):
        assert not run_hour(steps, tmp_path, rehearse=True, only=only)
        assert len(runs.read_text().splitlines()) == count
    assert read_record(tmp_path / "lost").status == "failed" and read_record(tmp_path / "lost").result == "no output"
    assert run_hour(steps[:1], tmp_path, rehearse=True)
    monkeypatch.setattr(gpu_hour, "_device", lambda rehearse: "another GPU")
    assert run_hour(steps[:1], tmp_path, rehearse=False)
    assert len(runs.read_text().splitlines()) == 3 and read_record(tmp_path / "third").device == "another GPU"


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run_hour(STEPS, tmp_path, rehearse=True, only=["seconds"])
    assert str(error.value) == "no step 'seconds'; needed some of first, second, third; did you mean second?"


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path: Path, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="^no CUDA device is here; needed one, or --rehearse for the same steps"):
        run_hour(STEPS, tmp_path, rehearse=False)


def test_the_lock_is_compared_with_what_is_installed() -> None:
    import torch

    from scaling4d_bench import gpu_steps

    version = torch.__version__.partition("+")[0]
    lock = f"# a comment == 1\ntorch=={version}+cu999\nno-such-package==1.0\nnumpy==0.1\n"
    differing = gpu_steps.lock_differences(lock)
    assert differing.keys() == {"no-such-package", "numpy"}
    assert differing["no-such-package"] == ("1.0", "none") and differing["numpy"][0] == "0.1"


@pytest.mark.parametrize(("loss", "weight", "fits"), [(0.009, 0.04, True), (0.011, 0.0, False), (0.0, 0.06, False)])
def test_two_equal_runs_may_differ_by_the_tolerance(
    loss: float, weight: float, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from scaling4d_bench import gpu_steps

    runs = iter([(torch.ones(2), torch.ones(3)), (torch.ones(2) - loss, torch.ones(3) - weight)])
    monkeypatch.setattr(gpu_steps, "_train", lambda *_, **__: next(runs))
    if fits:
        assert gpu_steps.repeat_steps(tmp_path, True).expected == "at most 0.01 and 0.05"
    else:
        with pytest.raises(UserError, match=r"^20 steps twice: losses differ by .*; needed at most 0.01 and 0.05$"):
            gpu_steps.repeat_steps(tmp_path, True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_step_rehearses_on_a_cpu(tmp_path: Path, in_the_project: None) -> None:
    from scaling4d_bench import gpu_steps

    done = run_hour(gpu_steps.STEPS, tmp_path, rehearse=True)
    records = {step.name: read_record(tmp_path / step.name) for step in gpu_steps.STEPS}
    assert done, {name: record.result for name, record in records.items()}
    assert "1 frozen readouts and the report" in records["profile"].result
    assert (tmp_path / "profile/report/report.html").is_file()
    assert json.loads((tmp_path / "determinism/differences.json").read_text())["loss"] == 0
