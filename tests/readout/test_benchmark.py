import json
from pathlib import Path

import pytest

from scaling4d import artifacts
from scaling4d.readout.benchmark import benchmark
from scaling4d.records import UserError

SETTINGS = {"readout": {"shared": {"Evaluation": {"data": "data/benchmarks"}}}}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two benchmarks, of depth and pose, each with one file."""
    monkeypatch.chdir(tmp_path)
    for name in ("scannet", "realestate10k"):
        (Path("data/benchmarks") / name).mkdir(parents=True)
        (Path("data/benchmarks") / name / "list.txt").write_text(name)
    return tmp_path


def said(task: str) -> dict:
    return json.loads(benchmark(task, SETTINGS).read_text())


def test_another_file_of_a_benchmark_changes_its_own_task_alone() -> None:
    before = {task: said(task) for task in ("depth", "pose")}
    assert before["depth"]["folders"] == {"data/benchmarks/scannet": artifacts.sha256(Path("data/benchmarks/scannet"))}
    Path("data/benchmarks/scannet/list.txt").write_text("other")
    assert said("depth") != before["depth"] and said("pose") == before["pose"]


def test_a_task_that_is_measured_on_another_benchmark_depends_on_both() -> None:
    for path in ("perception_test/all_train.json", "tapvid/tapvid_davis.pkl"):
        file = Path("data/benchmarks") / path
        file.parent.mkdir()
        file.write_text("x")
    assert set(said("points")["folders"]) == {"data/benchmarks/perception_test", "data/benchmarks/tapvid"}


def test_a_benchmark_that_is_not_there_is_a_problem_of_who_reads_it() -> None:
    found = said("actions")
    assert found["folders"] == {} and "no folder data/benchmarks/ssv2" in found["problem"]
    with pytest.raises(UserError, match="unknown task 'smell'; needed one of actions, boxes"):
        benchmark("smell", SETTINGS)
