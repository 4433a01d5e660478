import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling4d import audit
from scaling4d.audit import reproduced
from scaling4d.audit.run import runs
from scaling4d.records import UserError, write_json

NANO = Path("artifacts/test/readout/nano/actions/frozen/result.json")


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.chmod(0o644)
    write_json(path, {**content, **values})


def outcomes() -> dict[str, reproduced.Outcome]:
    return {outcome.stage: outcome for outcome in reproduced.compare(runs()[0])}


def test_the_same_bytes_are_said_stage_by_stage(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert audit.again() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "same bytes      readout@nano: artifacts/test/readout/nano/actions/frozen" in lines
    assert lines[-1] == "11 same bytes"


def test_other_bytes_with_numbers_inside_their_intervals_are_reproduced_and_the_machines_are_compared(project: Path) -> None:
    change(NANO, value=0.5625)
    change(Path("artifacts/test/pretrain/nano/summary.json"), val_loss=0.2512)
    told = json.loads(Path("reports/built/runs.json").read_text())
    for run in told["runs"]:
        run |= {"cpus": 8, "seconds": 3.0, "versions": {**run["versions"], "torch": "2.14.0"}}
    write_json(Path("reports/built/runs.json"), told)
    found = outcomes()
    machines = "(cpus 8, committed 4; torch 2.14.0, committed 2.13.0)"
    numbers = "nano/actions/frozen top1 0.5625, was 0.5 [0.4, 0.6]; nano/actions/frozen top5 0.875, was 0.875"
    assert found["readout@nano"] == reproduced.Outcome("same numbers", "readout@nano", f"{numbers} {machines}")
    assert found["pretrain@nano"].kind == "same numbers" and "val_loss 0.2512, was 0.25" in found["pretrain@nano"].message
    assert found["readout@mini"].kind == "same bytes"
    assert audit.again() == 0


def test_other_bytes_on_the_same_machine_say_that_the_cause_is_not_told(project: Path) -> None:
    change(NANO, value=0.5625)
    assert outcomes()["readout@nano"].message.endswith(
        "(the same machine, CPUs and versions as far as the runs tell: another kind of CPU, or another number of threads)"
    )


@pytest.mark.parametrize(
    ("path", "values", "stage", "said"),
    [
        (NANO, {"value": 0.375}, "readout@nano", "nano/actions/frozen top1 0.375, was 0.5 [0.4, 0.6]"),
        (NANO, {"others": {}}, "readout@nano", "nano/actions/frozen top5 was 0.875 and is not there now"),
        (Path("artifacts/test/pretrain/nano/summary.json"), {"val_loss": 0.26}, "pretrain@nano", "val_loss 0.26, was 0.25"),
        (Path("artifacts/test/pretrain/nano/summary.json"), {"parameters": 6}, "pretrain@nano", "parameters 6, was 5"),
    ],
)
def test_a_number_that_does_not_come_back_is_named(
    project: Path, path: Path, values: dict, stage: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    change(path, **values)
    assert audit.again() == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("not reproduced"))
    assert line.startswith(f"not reproduced  {stage}: ") and said in line


def test_bytes_without_a_number_leave_it_to_the_numbers_made_from_them(project: Path) -> None:
    shard = Path("artifacts/test/clips/shards/train-00000.tar")
    shard.chmod(0o644)
    shard.write_text("clips of another encoder")
    found = outcomes()
    assert found["clips"].kind == "other bytes" and found["clips"].message.startswith(
        "no number of its own: those made from it tell"
    )
    assert audit.again() == 0


def test_a_run_with_other_settings_is_another_run(project: Path, flip: Callable[[str, str, str], None]) -> None:
    change(NANO, value=0.5625)
    flip("dvc.lock", "cmd: true readout nano", "cmd: true readout NANO")
    message = outcomes()["readout@nano"].message
    assert message == "it was made with other inputs, so it is another run: `true readout NANO`, committed `true readout nano`"
    assert audit.again() == 1


@pytest.mark.usefixtures("another_benchmark")
def test_a_run_with_another_benchmark_is_another_run() -> None:
    change(NANO, value=0.5625)
    found = outcomes()
    for stage, read in (("benchmarks", "data/benchmarks"), ("readout@nano", "artifacts/benchmarks/actions.json")):
        assert found[stage].kind == reproduced.FAILED
        assert found[stage].message.startswith(f"it was made with other inputs, so it is another run: {read} is md5 ")


def test_a_clone_in_which_nothing_was_run_has_reproduced_nothing(clone: Path) -> None:
    found = outcomes()
    assert found["readout@nano"].kind == "not made again" and found["report"].kind == "same bytes"
    assert audit.again() == 1


def test_without_a_committed_run_there_is_nothing_to_compare_with(project: Path) -> None:
    subprocess.run(["git", "update-ref", "-d", "HEAD"], check=True)
    with pytest.raises(UserError, match="^the last commit holds no dvc.lock, so there is nothing to compare with"):
        reproduced.compare(runs()[0])
