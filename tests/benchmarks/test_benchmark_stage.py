import json
from pathlib import Path

import pytest

from scaling4d import artifacts
from scaling4d.benchmarks.stage import hash_benchmarks
from scaling4d.records import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("scannet/list.txt", "realestate10k/list.txt")


def write(*names: str) -> None:
    for path in (Path("data/benchmarks") / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def hashed(*tasks: str, probes: tuple[str, ...] = ()) -> dict[str, dict]:
    """Content of the files by task, and of the file of the probes."""
    training = {"Training": {"probe_tasks": probes}}
    folder = hash_benchmarks({"benchmarks": {"root": "data/benchmarks", "tasks": tasks}, "pretrain": training})
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


def test_a_task_that_is_left_out_has_no_file() -> None:
    both = hashed("depth", "pose")
    assert both.keys() == {"depth", "pose", "probes"}
    assert both["depth"]["folders"] == {"data/benchmarks/scannet": artifacts.sha256(Path("data/benchmarks/scannet"))}
    assert hashed("pose").keys() == {"pose", "probes"} and hashed().keys() == {"probes"}


def test_pretraining_depends_on_the_benchmarks_that_it_probes_alone() -> None:
    depth, without = (hashed("depth", "pose", probes=probes)["probes"] for probes in (("depth",), ()))
    assert depth["folders"] == hashed("depth")["depth"]["folders"] and depth["tasks"] == ["depth"]
    write("scannet/more.txt")
    assert hashed("depth", "pose")["probes"] == without
    assert hashed("depth", "pose", probes=("depth",))["probes"] != depth


def test_a_task_that_is_measured_on_another_benchmark_depends_on_both() -> None:
    write("perception_test/all_train.json", "tapvid/tapvid_davis.pkl")
    assert set(hashed("points")["points"]["folders"]) == {"data/benchmarks/perception_test", "data/benchmarks/tapvid"}


def test_a_folder_of_two_tasks_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write("perception_test/all_train.json")
    read, sha256 = [], artifacts.sha256
    monkeypatch.setattr(artifacts, "sha256", lambda path: read.append(path) or sha256(path))
    content = hashed("points", "boxes")
    assert content["points"]["folders"] == content["boxes"]["folders"] != {}
    assert read.count(Path("data/benchmarks/perception_test")) == 1


def test_a_benchmark_that_is_not_there_is_a_problem_of_who_reads_it() -> None:
    content = hashed("actions")["actions"]
    assert content["folders"] == {} and "no folder data/benchmarks/ssv2" in content["problem"]
    with pytest.raises(UserError, match="unknown task 'smell'; needed one of actions, boxes"):
        hashed("smell")
