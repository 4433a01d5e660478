import json
from pathlib import Path

import pytest

from scaling4d import artifacts
from scaling4d.benchmarks.stage import hash_benchmark
from scaling4d.records import UserError

SETTINGS = {"benchmarks": {"root": "data/benchmarks"}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("scannet/list.txt", "realestate10k/list.txt")


def write(*names: str, text: str = "x") -> None:
    for path in (Path("data/benchmarks") / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def hashed(task: str) -> dict:
    return json.loads(hash_benchmark(task, SETTINGS).read_text())


def test_another_file_of_a_benchmark_changes_its_own_task_alone() -> None:
    before = {task: hashed(task) for task in ("depth", "pose")}
    assert before["depth"]["folders"] == {"data/benchmarks/scannet": artifacts.sha256(Path("data/benchmarks/scannet"))}
    write("scannet/list.txt", text="other")
    assert hashed("depth") != before["depth"] and hashed("pose") == before["pose"]


def test_a_task_that_is_measured_on_another_benchmark_depends_on_both() -> None:
    write("perception_test/all_train.json", "tapvid/tapvid_davis.pkl")
    assert set(hashed("points")["folders"]) == {"data/benchmarks/perception_test", "data/benchmarks/tapvid"}


def test_a_benchmark_that_is_not_there_is_a_problem_of_who_reads_it() -> None:
    content = hashed("actions")
    assert content["folders"] == {} and "no folder data/benchmarks/ssv2" in content["problem"]
    with pytest.raises(UserError, match="unknown task 'smell'; needed one of actions, boxes"):
        hash_benchmark("smell", SETTINGS)
