import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from scaling4d import audit
from scaling4d.audit import reproduced
from scaling4d.audit.run import AuditFinding, locked_run
from scaling4d.records import UserError

pytestmark = pytest.mark.integration

NANO, SUMMARY = "artifacts/test/readout/nano/actions/frozen/result.json", "artifacts/test/pretrain/nano/summary.json"


def outcomes() -> dict[str, AuditFinding]:
    return {outcome.where: outcome for outcome in reproduced.compare_with_committed(locked_run())}


def test_the_same_bytes_are_named_stage_by_stage(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert audit.check_reproduced() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "same bytes      readout@nano: artifacts/test/readout/nano/actions/frozen" in lines
    assert lines[-1] == "12 same bytes"


def test_numbers_inside_their_intervals_are_reproduced_and_the_machines_are_compared(project: Path, rewrite: Callable) -> None:
    rewrite(NANO, value=0.5625)
    same = "(machine, CPUs and versions as committed: another kind of CPU, or another number of threads)"
    assert outcomes()["readout@nano"].message.endswith(same)
    rewrite(SUMMARY, val_loss=0.2512)
    runs = json.loads(Path("reports/built/runs.json").read_text())["runs"]
    versions = {**runs[0]["versions"], "torch": "2.14.0"}
    rewrite("reports/built/runs.json", runs=[run | {"cpus": 8, "seconds": 3.0, "versions": versions} for run in runs])
    by_stage = outcomes()
    machines = "(cpus 8, committed 4; torch 2.14.0, committed 2.13.0)"
    numbers = "nano/actions/frozen top1 0.5625, was 0.5 [0.4, 0.6]; nano/actions/frozen top5 0.875, was 0.875"
    assert by_stage["readout@nano"] == AuditFinding("same numbers", "readout@nano", f"{numbers} {machines}")
    pretrained = by_stage["pretrain@nano"]
    assert pretrained.kind == "same numbers" and "val_loss 0.2512, was 0.25" in pretrained.message
    assert by_stage["readout@mini"].kind == "same bytes"
    assert audit.check_reproduced() == 0


@pytest.mark.parametrize(("path", "values", "stage", "message"), [
    (NANO, {"value": 0.375}, "readout@nano", "nano/actions/frozen top1 0.375, was 0.5 [0.4, 0.6]"),
    (NANO, {"others": {}}, "readout@nano", "nano/actions/frozen top5 was 0.875 and is absent now"),
    (SUMMARY, {"val_loss": 0.26}, "pretrain@nano", "val_loss 0.26, was 0.25"),
    (SUMMARY, {"parameters": 6}, "pretrain@nano", "parameters 6, was 5"),
])  # fmt: skip
def test_a_number_that_does_not_come_back_is_named(
    project: Path, rewrite: Callable, path: str, values: dict, stage: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    rewrite(path, **values)
    assert audit.check_reproduced() == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("not reproduced"))
    assert line.startswith(f"not reproduced  {stage}: ") and message in line


def test_bytes_without_a_number_leave_the_verdict_to_the_stages_after_them(project: Path) -> None:
    shard = Path("artifacts/test/clips/shards/train-00000.tar")
    shard.chmod(0o644)
    shard.write_text("clips of another encoder")
    clips = outcomes()["clips"]
    assert clips.kind == "other bytes" and clips.message.startswith("no number of its own: see the stages after it")
    assert audit.check_reproduced() == 0


def test_a_run_with_another_command_or_benchmark_is_another_run(
    project: Path, flip: Callable, rewrite: Callable, request: pytest.FixtureRequest
) -> None:
    rewrite(NANO, value=0.5625)
    flip("dvc.lock", "cmd: true readout nano", "cmd: true readout NANO")
    another = "another run, with other inputs: "
    assert outcomes()["readout@nano"].message == f"{another}`true readout NANO`, committed `true readout nano`"
    assert audit.check_reproduced() == 1
    flip("dvc.lock", "cmd: true readout NANO", "cmd: true readout nano")
    request.getfixturevalue("another_benchmark")
    for stage, path in (("benchmarks", "data/benchmarks"), ("readout@nano", "artifacts/benchmarks/actions.json")):
        outcome = outcomes()[stage]
        assert outcome.kind == reproduced.FAILED and outcome.message.startswith(f"{another}{path} is md5 ")


def test_a_clone_in_which_nothing_was_run_has_reproduced_nothing(clone: Path) -> None:
    by_stage = outcomes()
    assert by_stage["readout@nano"].kind == "not made again" and by_stage["report"].kind == "same bytes"
    assert audit.check_reproduced() == 1


def test_a_stage_that_today_s_lock_lacks_is_not_made_again(project: Path) -> None:
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    del lock["stages"]["readout@nano"]
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    absent = outcomes()["readout@nano"]
    assert (absent.kind, audit.check_reproduced()) == ("not made again", 1)
    assert absent.message == "dvc.lock lacks this stage of the committed report: run `dvc repro`"
    Path("dvc.lock").unlink()
    assert [stage for stage, outcome in outcomes().items() if outcome.kind == "same bytes"] == ["data.dvc"]
    assert audit.check_reproduced() == 1


def test_without_a_committed_run_there_is_nothing_to_compare_with(project: Path) -> None:
    subprocess.run(["git", "update-ref", "-d", "HEAD"], check=True)
    with pytest.raises(UserError, match="^the last commit has no dvc.lock to compare with; run inside a clone of the project$"):
        outcomes()
