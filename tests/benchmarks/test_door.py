"""The door to all benchmarks: tasks by name, layouts checked before anything is read."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from benchmarks.writers import write_kinetics, write_objects
from clips.small_videos import save, world

from scaling4d import benchmarks, cli
from scaling4d.benchmarks import ssv2
from scaling4d.benchmarks.samples import ClipRequest, SkippedItem
from scaling4d.records import Sample, UserError, write_json

CLIP = ClipRequest(frames=4, rate_hz=8.0, side_px=32)
ENCODING = {"rate_hz": 8.0, "crf": 40, "gop": 6}
RANDOM = {"windows": "random"}
TEMPLATES = ("Holding [something]", "Moving [something]")


@pytest.mark.parametrize(("task", "split", "clip", "expected"), [
    ("dept", "train", {}, "unknown task 'dept'; needed one of actions, boxes, depth, points, pose"),
    ("depth", "test", {}, "unknown split 'test'; needed one of train, val"),
    ("points", "val", {"queries": "all"}, "queries = 'all'; needed one of frame_0, first, strided"),
    ("depth", "val", {"queries": "first"}, r"views = \(1, 1\) and queries = 'first' of task depth; needed \(1, 1\) except"),
    ("depth", "val", {"windows": "second"}, "windows = 'second'; needed one of first, random"),
    ("depth", "val", RANDOM | {"views": (1, 3)}, r"views = \(1, 3\) and queries = 'frame_0' of task depth; needed"),
    ("points", "val", RANDOM | {"views": (2, 1), "queries": "first"}, r"views = \(2, 1\) and queries = 'first' of task"),
    ("depth", "val", {"views": (2, 1)}, r"views = \(2, 1\) and queries = 'frame_0' of task depth; needed \(1, 1\) except"),
])  # fmt: skip
def test_an_unknown_request_names_what_exists(tmp_path, task, split, clip, expected):
    for name in ("scannet", "perception_test"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"^{expected}"):
        benchmarks.read_samples(task, tmp_path, split, replace(CLIP, **clip))


@pytest.mark.parametrize(("task", "folder", "expected"), [
    ("actions", "ssv2", r"needed labels/train.json (or something-something-v2-train.json)"),
    ("boxes", "waymo", r"needed training/camera_image (pictures <context>.parquet, or training/segment-"),
    ("depth", "scannet", r"needed scannetv2_train.txt (one scene a line)"),
    ("points", "perception_test", r"needed point_tracking_train.json (tracks by video_id)"),
    ("pose", "realestate10k", r"needed train (row files <16 hex>.txt)"),
])  # fmt: skip
def test_a_missing_or_empty_folder_says_what_belongs_there_before_the_first_sample(tmp_path, task, folder, expected):
    places = {"perception_test_objects": "perception_test (with object_tracking_*.json or all_*.json)"}
    names = " or ".join(f"{tmp_path}/{places.get(name, name)}" for name in benchmarks.TASKS[task])
    with pytest.raises(UserError, match=re.escape(f"no folder {names} for task {task}; put the benchmark there")):
        benchmarks.read_samples(task, tmp_path, "train", CLIP)
    (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match=re.escape(f"is laid out in another way: {expected}")):
        benchmarks.read_samples(task, tmp_path, "train", CLIP)


def grey(names: Sequence[str]) -> list[Sample]:
    """Grey clips of two actions in turn."""
    pixels = np.full((6, 32, 32, 3), 99, np.uint8)
    return [Sample(name, name, pixels, {"action": np.int64(n % 2)}) for n, name in enumerate(names)]


def broken_ssv2(root: Path) -> Path:
    """Ten videos, of which `d` is broken, `f` is missing, and `h` has a template that labels.json does not list."""
    for split, names in (("train", "abcdefghij"), ("val", "kl")):
        ssv2.write(root / "ssv2", split, grey(names), templates=TEMPLATES, **ENCODING)
    (root / "ssv2" / ssv2.VIDEOS / "d.webm").write_bytes(b"no video")
    (root / "ssv2" / ssv2.VIDEOS / "f.webm").unlink()
    path = root / "ssv2/labels/train.json"
    entries = json.loads(path.read_text())
    entries[7]["template"] = "Eating [something]"
    write_json(path, entries)
    return root


def two_of_kinetics(root: Path) -> Path:
    ids = [f"{letter}-_________" for letter in "abcd"]
    for split, some in (("train", ids[:2]), ("val", ids[2:])):
        write_kinetics(root / "kinetics", split, grey(some), labels=["b", "a"], **ENCODING)
    return root


def test_bad_samples_are_skipped_and_listed_in_the_order_of_the_list(tmp_path):
    skipped: list[SkippedItem] = []
    samples = benchmarks.read_samples("actions", broken_ssv2(tmp_path), "train", CLIP, skipped=skipped, max_bad_share=0.5)
    assert samples.count == 10 and "".join(sample.id for sample in samples) == "abcegij"
    assert [(item.id, item.bad) for item in skipped] == [("d", True), ("f", True), ("h", True)]
    for item, why in zip(skipped, ("d.webm", "needed 20bn-.*/f.webm", "h is 'Eating something'"), strict=True):
        assert re.search(why, item.why) and len(item.why.splitlines()) == 1
    part = samples.part(slice(1, None, 3), [])
    assert [sample.id for sample in part] == ["b", "e"] and part.count == 10


def test_missing_files_stop_before_anything_is_decoded_unless_they_may_be_skipped(tmp_path):
    broken_ssv2(tmp_path)
    with pytest.raises(UserError, match="lacks 1 of 10 videos of train, the first is f.webm"):
        benchmarks.read_samples("actions", tmp_path, "train", CLIP)
    expected = "actions train: 1 of 10 samples .*, more than max_bad_share = 0.05; mend them or raise it. The first: f.webm"
    with pytest.raises(UserError, match=f"^{expected}: missing$"):
        benchmarks.read_samples("actions", tmp_path, "train", CLIP, skipped=[], max_bad_share=0.05)


def test_a_message_lists_the_first_ten_bad_items_and_one_that_a_rule_excludes_does_not_count():
    skipped = [SkippedItem("<rule>", "small", False), *(SkippedItem(f"<{n}>", "broken", True) for n in range(12))]
    benchmarks.check_bad_share(skipped, 100, 0.12, "depth val")
    with pytest.raises(UserError, match=r"depth val: 12 of 100 samples .*The first: <0>: broken; .*<9>: broken$"):
        benchmarks.check_bad_share(skipped, 100, 0.119, "depth val")


def test_of_two_benchmarks_for_a_task_the_one_that_is_there_is_read(tmp_path):
    two_of_kinetics(tmp_path)
    assert [int(s.labels["action"]) for s in benchmarks.read_samples("actions", tmp_path, "val", CLIP)] == [0, 1]
    assert benchmarks.class_names(tmp_path) == ["a", "b"]
    (tmp_path / "ssv2").mkdir()
    with pytest.raises(UserError, match="ssv2 and .*kinetics are both there for task actions; keep one of them"):
        benchmarks.read_samples("actions", tmp_path, "val", CLIP)
    checks = benchmarks.check_benchmarks(tmp_path, max_bad_share=0.0)
    assert not any(split.usable for split in checks) and all("are both there" in split.problems[0] for split in checks)


def test_check_reports_layout_counts_and_the_first_problems_of_what_is_there(tmp_path):
    train, val = benchmarks.check_benchmarks(broken_ssv2(tmp_path), max_bad_share=0.2)
    assert (train.benchmark, train.split, train.layout, train.samples) == ("ssv2", "train", "labels/train.json", 9)
    assert (train.official, val.official) == ("168,913", "24,777")
    assert "lacks 1 of 10 videos of train, the first is f.webm" in train.problems[0]
    assert train.usable and val.usable and val.problems == () and val.samples == 2
    assert not benchmarks.check_benchmarks(tmp_path, max_bad_share=0.0)[0].usable
    for path in (tmp_path / "ssv2" / ssv2.VIDEOS).iterdir():
        path.write_bytes(b"no video")
    val = benchmarks.check_benchmarks(tmp_path, max_bad_share=0.9)[1]  # reads the first samples
    assert not val.usable and [re.search(r"\w.webm", problem)[0] for problem in val.problems] == ["k.webm", "l.webm"]


def test_a_video_that_is_damaged_in_its_middle_is_found_by_decoding(tmp_path, capsys, monkeypatch):
    two_of_kinetics(tmp_path / "benchmarks")
    monkeypatch.chdir(tmp_path)
    cli.check(tmp_path, decode=True)
    assert "benchmarks: 4 videos decoded, 0 of them damaged\n" in capsys.readouterr().out
    damaged = next(file for file in sorted(tmp_path.rglob("*.mp4")))
    whole = save(tmp_path / "whole.mkv", world(5, 64), crf=30)
    damaged.write_bytes(whole.read_bytes()[: int(0.6 * whole.stat().st_size)])
    whole.unlink()
    cli.check(tmp_path)
    assert "problem" not in capsys.readouterr().out
    cli.check(tmp_path, decode=True)
    out = capsys.readouterr().out
    assert "benchmarks: 4 videos decoded, 1 of them damaged\n" in out
    assert f"problem: {damaged.relative_to(tmp_path)}: incomplete: the data ends at" in out


def test_data_check_fails_only_for_what_cannot_be_used(tmp_path, capsys, monkeypatch):
    """Curation rejects videos that do not open; a folder of a hundred thousand always has some."""
    two_of_kinetics(tmp_path / "benchmarks")
    (tmp_path / "benchmarks/kinetics700").mkdir()
    monkeypatch.chdir(tmp_path)
    cli.check(tmp_path)
    summary, *lines = capsys.readouterr().out.splitlines()
    assert summary.startswith(f"{tmp_path}: 6 files (0 below videos/), ") and summary.endswith(" 0 others left out")
    assert lines == [
        "videos: none",
        "benchmarks/kinetics700: passed over, since no reader has this name",
        "kinetics train: 2 samples; official: 246,534 in Kinetics-400 (train.csv, videos in one folder)",
        "kinetics val: 2 samples; official: 19,906 in Kinetics-400 (val.csv, videos in one folder)",
        "actions: trained on kinetics, measured on kinetics",
    ]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/broken.mp4").write_bytes(b"no video")
    cli.check(tmp_path)
    out = capsys.readouterr().out
    assert "videos: 1 files, 0 open as videos" in out and "problem: videos/broken.mp4: not a " in out
    path = tmp_path / "benchmarks/kinetics/val.csv"
    path.write_text(path.read_text() + "a,bbbbbbbbbbb,soon,20,val\n")
    with pytest.raises(typer.Exit):
        cli.check(tmp_path)
    expected = r"problem: kinetics val: .*val.csv, line 4: time_start and time_end must be seconds"
    assert re.search(expected, capsys.readouterr().out)


@pytest.mark.integration
def test_the_door_imports_no_heavy_library():
    program = (
        "import sys; from scaling4d import benchmarks;"
        "print([m for m in ('av', 'PIL', 'torch', 'pyarrow', 'trimesh', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_boxes_come_from_perception_test_where_there_is_no_waymo(tmp_path):
    """Its folder belongs to the points; that both are there is no contradiction."""
    (tmp_path / "perception_test").mkdir()
    with pytest.raises(UserError, match="no folder .*waymo or .*perception_test .with object_tracking_"):
        benchmarks.find_benchmark("boxes", tmp_path)
    boxes = {"boxes": np.tile(np.array([0.2, 0.2, 0.6, 0.6], np.float32), (1, 6, 1))}
    for split in ("train", "val"):
        sample = replace(grey(["video_1"])[0], labels=boxes, valid={"boxes": np.ones((1, 6), bool)})
        write_objects(tmp_path / "perception_test", split, [sample], **ENCODING)
    assert benchmarks.find_benchmark("boxes", tmp_path).folder == tmp_path / "perception_test"
    (sample,) = benchmarks.read_samples("boxes", tmp_path, "val", CLIP)
    assert sample.id == "video_1" and sample.labels["boxes"].shape == (1, 4, 4)
    checks = {(split.benchmark, split.split): split for split in benchmarks.check_benchmarks(tmp_path, max_bad_share=0.0)}
    assert checks["perception_test_objects", "val"].usable and checks["perception_test_objects", "val"].samples == 1
    assert "needed point_tracking_valid.json" in checks["perception_test", "val"].problems[0]
    (tmp_path / "waymo").mkdir()
    assert benchmarks.find_benchmark("boxes", tmp_path).folder == tmp_path / "waymo"
    assert benchmarks.find_benchmark("points", tmp_path).folder == tmp_path / "perception_test"
    assert benchmarks.unknown_folders(tmp_path) == []
