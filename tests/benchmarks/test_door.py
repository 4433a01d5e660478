"""The door to all benchmarks: tasks by name, layouts checked before anything is read."""

import pytest

from scaling4d import benchmarks
from scaling4d.records import UserError

CLIP = {"frames": 4, "rate_hz": 8.0, "side_px": 32}


def test_an_unknown_task_names_those_that_exist(tmp_path):
    with pytest.raises(UserError, match="unknown task 'dept'; needed one of actions, boxes, depth, points, pose"):
        benchmarks.read("dept", tmp_path, "train", **CLIP)


def test_an_unknown_split_names_those_that_exist(tmp_path):
    with pytest.raises(UserError, match="unknown split 'test'; needed one of train, val"):
        benchmarks.read("depth", tmp_path, "test", **CLIP)


@pytest.mark.parametrize("task", benchmarks.TASKS)
def test_a_missing_folder_is_named_at_once(tmp_path, task):
    with pytest.raises(UserError, match=f"no folder .*{benchmarks.TASKS[task]} for task {task}; put the benchmark there"):
        benchmarks.read(task, tmp_path, "train", **CLIP)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("actions", r"needed labels/train.json \(or something-something-v2-train.json\)"),
        ("boxes", r"needed training/camera_image \(pictures <context>.parquet\)"),
        ("depth", r"needed scannetv2_train.txt \(one scene a line\)"),
        ("points", r"needed point_tracking_train.json \(tracks by video_id\)"),
        ("pose", r"needed train \(row files <16 hex>.txt\)"),
    ],
)
def test_an_empty_folder_says_what_belongs_in_it_before_the_first_sample(tmp_path, task, expected):
    (tmp_path / benchmarks.TASKS[task]).mkdir()
    with pytest.raises(UserError, match=f"is laid out in another way: {expected}"):
        benchmarks.read(task, tmp_path, "train", **CLIP)


def test_check_lists_every_benchmark_and_split_with_its_problem(tmp_path):
    (tmp_path / "ssv2").mkdir()
    found = benchmarks.check(tmp_path)
    assert len(found) == 10
    assert {name for name, _, _, _ in found} == set(benchmarks.TASKS.values())
    assert all(samples == 0 and len(problem.splitlines()) == 1 for _, _, samples, problem in found)


def test_benchmarks_import_nothing_heavy():
    import subprocess
    import sys

    program = (
        "import sys; from scaling4d import benchmarks;"
        "print([m for m in ('torch', 'av', 'pyarrow', 'trimesh', 'PIL') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"
