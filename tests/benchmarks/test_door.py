"""The door to all benchmarks: tasks by name, layouts checked before anything is read."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer

from scaling4d import benchmarks, cli, video
from scaling4d.benchmarks import kinetics, perception_test_objects, ssv2, waymo
from scaling4d.benchmarks.skipped import Skipped
from scaling4d.records import Sample, UserError, write_json

CLIP = {"frames": 4, "rate_hz": 8.0, "side_px": 32}


def test_an_unknown_task_names_those_that_exist(tmp_path):
    with pytest.raises(UserError, match="unknown task 'dept'; needed one of actions, boxes, depth, points, pose"):
        benchmarks.read("dept", tmp_path, "train", **CLIP)


def test_an_unknown_split_names_those_that_exist(tmp_path):
    with pytest.raises(UserError, match="unknown split 'test'; needed one of train, val"):
        benchmarks.read("depth", tmp_path, "test", **CLIP)


@pytest.mark.parametrize("task", benchmarks.TASKS)
def test_a_missing_folder_is_named_at_once(tmp_path, task):
    places = {"perception_test_objects": "perception_test (with object_tracking_*.json or all_*.json)"}
    names = " or ".join(f"{tmp_path}/{places.get(name, name)}" for name in benchmarks.TASKS[task])
    with pytest.raises(UserError, match=re.escape(f"no folder {names} for task {task}; put the benchmark there")):
        benchmarks.read(task, tmp_path, "train", **CLIP)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("actions", r"needed labels/train.json \(or something-something-v2-train.json\)"),
        ("boxes", r"needed training/camera_image \(pictures <context>.parquet, or training/segment-"),
        ("depth", r"needed scannetv2_train.txt \(one scene a line\)"),
        ("points", r"needed point_tracking_train.json \(tracks by video_id\)"),
        ("pose", r"needed train \(row files <16 hex>.txt\)"),
    ],
)
def test_an_empty_folder_says_what_belongs_in_it_before_the_first_sample(tmp_path, task, expected):
    (tmp_path / benchmarks.TASKS[task][0]).mkdir()
    with pytest.raises(UserError, match=f"is laid out in another way: {expected}"):
        benchmarks.read(task, tmp_path, "train", **CLIP)


def samples(names: Sequence[str]) -> list[Sample]:
    """Grey clips of two actions in turn."""
    grey = np.full((6, 32, 32, 3), 99, np.uint8)
    return [Sample(name, name, grey, {"action": np.int64(n % 2)}) for n, name in enumerate(names)]


def write_ssv2(root: Path) -> Path:
    """Ten videos, of which `d` is broken, `f` is not there, and `h` has a template that labels.json does not know."""
    folder = root / "ssv2/20bn-something-something-v2"
    for split, names in (("train", "abcdefghij"), ("val", "kl")):
        templates = ("Holding [something]", "Moving [something]")
        ssv2.write(root / "ssv2", split, samples(names), templates=templates, rate_hz=8.0, crf=40, gop=6)
    (folder / "d.webm").write_bytes(b"no video")
    (folder / "f.webm").unlink()
    path = root / "ssv2/labels/train.json"
    entries = json.loads(path.read_text())
    entries[7]["template"] = "Eating [something]"
    write_json(path, entries)
    return root


def write_kinetics(root: Path) -> Path:
    ids = [f"{letter}-_________" for letter in "abcd"]
    for split, some in (("train", ids[:2]), ("val", ids[2:])):
        kinetics.write(root / "kinetics", split, samples(some), labels=["b", "a"], rate_hz=8.0, crf=40, gop=6)
    return root


def test_bad_samples_are_skipped_and_listed_in_the_order_of_the_list(tmp_path):
    write_ssv2(tmp_path)
    skipped: list[Skipped] = []
    read = list(benchmarks.read("actions", tmp_path, "train", **CLIP, skipped=skipped, max_bad_share=0.5))
    assert "".join(sample.id for sample in read) == "abcegij"
    assert [(item.id, item.bad) for item in skipped] == [("d", True), ("f", True), ("h", True)]
    for item, why in zip(skipped, ("d.webm", "needed 20bn-.*/f.webm", "h is 'Eating something'"), strict=True):
        assert re.search(why, item.why) and len(item.why.splitlines()) == 1


def test_without_a_list_for_them_bad_samples_raise(tmp_path):
    write_ssv2(tmp_path)
    with pytest.raises(UserError, match="lacks 1 of 10 videos of train, the first is f.webm"):
        benchmarks.read("actions", tmp_path, "train", **CLIP)


def test_too_many_missing_files_stop_before_anything_is_decoded(tmp_path):
    write_ssv2(tmp_path)
    expected = (
        r"actions train: 1 of 10 samples are damaged or missing, more than the share readout.shared.Evaluation.max_bad_share = "
        r"0.05; mend them or raise it. The first: f.webm: missing"
    )
    with pytest.raises(UserError, match=expected):
        benchmarks.read("actions", tmp_path, "train", **CLIP, skipped=[], max_bad_share=0.05)


def test_what_a_rule_leaves_out_is_listed_and_not_bad(tmp_path):
    boxes = np.tile(np.array([0.4, 0.4, 0.43, 0.43], np.float32), (1, 6, 1))  # smaller than the protocol's 0.5 % of the square
    (one,) = samples(["a"])
    small = Sample("a", "a", one.pixels, {"boxes": boxes}, {"boxes": np.ones((1, 6), bool)})
    waymo.write(tmp_path / "waymo", "val", [small], rate_hz=8.0, jpeg_quality=90)
    skipped: list[Skipped] = []
    assert list(benchmarks.read("boxes", tmp_path, "val", **CLIP, skipped=skipped)) == []
    assert [(item.id, item.bad) for item in skipped] == [("a", False)]
    benchmarks.judge(skipped, 1, 0.0, "boxes val")


def test_a_message_lists_the_first_ten(tmp_path):
    bad = [Skipped(f"<{n}>", "broken", True) for n in range(12)]
    benchmarks.judge(bad, 100, 0.12, "depth val")
    with pytest.raises(UserError, match=r"depth val: 12 of 100 samples .*The first: <0>: broken; .*<9>: broken$"):
        benchmarks.judge(bad, 100, 0.119, "depth val")


def test_of_two_benchmarks_for_a_task_the_one_that_is_there_is_read(tmp_path):
    write_kinetics(tmp_path)
    assert [int(s.labels["action"]) for s in benchmarks.read("actions", tmp_path, "val", **CLIP)] == [0, 1]
    assert benchmarks.classes(tmp_path) == ["a", "b"]
    (tmp_path / "ssv2").mkdir()
    with pytest.raises(UserError, match="ssv2 and .*kinetics are both there for task actions; keep one of them"):
        benchmarks.read("actions", tmp_path, "val", **CLIP)
    assert not any(finding.usable for finding in benchmarks.check(tmp_path, max_bad_share=0.0))


def test_points_cannot_be_trained_on_tap_vid(tmp_path):
    (tmp_path / "tapvid").mkdir()
    with pytest.raises(UserError, match="TAP-Vid has no split 'train'"):
        benchmarks.read("points", tmp_path, "train", **CLIP)


def test_check_reports_layout_counts_and_the_first_problems_of_what_is_there(tmp_path):
    write_ssv2(tmp_path)
    train, val = benchmarks.check(tmp_path, max_bad_share=0.2)
    assert (train.benchmark, train.split, train.layout, train.samples) == ("ssv2", "train", "labels/train.json", 9)
    assert (train.official, val.official) == ("168,913", "24,777")
    assert "lacks 1 of 10 videos of train, the first is f.webm" in train.problems[0]
    assert train.usable and val.usable and val.problems == () and val.samples == 2
    assert not benchmarks.check(tmp_path, max_bad_share=0.0)[0].usable


def test_check_reads_the_first_samples_whole(tmp_path):
    write_ssv2(tmp_path)
    for path in (tmp_path / "ssv2/20bn-something-something-v2").iterdir():
        path.write_bytes(b"no video")
    val = benchmarks.check(tmp_path, max_bad_share=0.9)[1]
    assert not val.usable and [re.search(r"\w.webm", problem)[0] for problem in val.problems] == ["k.webm", "l.webm"]


def test_check_of_half_a_benchmark_says_what_is_missing(tmp_path):
    write_kinetics(tmp_path)
    (tmp_path / "kinetics/train.csv").unlink()
    train, val = benchmarks.check(tmp_path, max_bad_share=0.0)
    assert not train.usable and not val.usable and val.samples == 2
    assert all("needed train.csv (the official list" in finding.problems[0] for finding in (train, val))


def test_data_check_fails_only_for_what_cannot_be_used(tmp_path, capsys, monkeypatch):
    write_kinetics(tmp_path / "benchmarks")
    (tmp_path / "benchmarks/kinetics700").mkdir()
    monkeypatch.chdir(tmp_path)
    cli.check(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "videos: none",
        "benchmarks/kinetics700: passed over, since no reader has this name",
        "kinetics train: 2 samples; official: 246,534 in Kinetics-400 (train.csv, videos in one folder)",
        "kinetics val: 2 samples; official: 19,906 in Kinetics-400 (val.csv, videos in one folder)",
    ]
    path = tmp_path / "benchmarks/kinetics/val.csv"
    path.write_text(path.read_text() + "a,bbbbbbbbbbb,soon,20,val\n")
    with pytest.raises(typer.Exit):
        cli.check(tmp_path)
    assert re.search(
        r"problem: kinetics val: .*val.csv, line 4: time_start and time_end must be seconds", capsys.readouterr().out
    )


def test_the_door_imports_no_heavy_library():
    import subprocess
    import sys

    program = (
        "import sys; from scaling4d import benchmarks;"
        "print([m for m in ('av', 'PIL', 'torch', 'pyarrow', 'trimesh', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def write_objects(root: Path, split: str) -> None:
    boxes = np.tile(np.array([0.2, 0.2, 0.6, 0.6], np.float32), (1, 6, 1))
    (one,) = samples(["video_1"])
    sample = Sample("video_1", "video_1", one.pixels, {"boxes": boxes}, {"boxes": np.ones((1, 6), bool)})
    perception_test_objects.write(root / "perception_test", split, [sample], rate_hz=8.0, crf=40, gop=6)


def test_boxes_come_from_perception_test_where_there_is_no_waymo(tmp_path):
    """Its folder belongs to the points; that both are there is no contradiction."""
    (tmp_path / "perception_test").mkdir()
    with pytest.raises(UserError, match="no folder .*waymo or .*perception_test .with object_tracking_"):
        benchmarks.folder("boxes", tmp_path)
    write_objects(tmp_path, "val")
    assert benchmarks.folder("boxes", tmp_path) == tmp_path / "perception_test"
    (read,) = benchmarks.read("boxes", tmp_path, "val", **CLIP)
    assert read.id == "video_1" and read.labels["boxes"].shape == (1, 4, 4)
    (tmp_path / "waymo").mkdir()
    assert benchmarks.folder("boxes", tmp_path) == tmp_path / "waymo"
    assert benchmarks.folder("points", tmp_path) == tmp_path / "perception_test"
    assert benchmarks.unknown(tmp_path) == []


def test_check_reports_the_objects_of_perception_test_beside_its_points(tmp_path):
    write_objects(tmp_path, "train")
    write_objects(tmp_path, "val")
    found = {(one.benchmark, one.split): one for one in benchmarks.check(tmp_path, max_bad_share=0.0)}
    assert found["perception_test_objects", "val"].usable and found["perception_test_objects", "val"].samples == 1
    assert "needed point_tracking_valid.json" in found["perception_test", "val"].problems[0]


def write_any(root: Path, name: str) -> Path:
    """Two videos of a benchmark; its list."""
    if name == "objects":
        write_objects(root, "train")
        return root / "perception_test/object_tracking_train.json"
    templates = ("Holding [something]", "Moving [something]")
    ssv2.write(root / "ssv2", "train", samples("ab"), templates=templates, rate_hz=8.0, crf=40, gop=6)
    return root / "ssv2/labels/train.json"


@pytest.mark.parametrize(
    ("name", "spoil", "expected"),
    [
        ("ssv2", lambda e: e[1].update(id=7), "train.json, entry 1: needed id and template as strings, found {'id': 7"),
        ("ssv2", lambda e: e[1].update(template="Eating"), "labels/train.json: b is 'Eating', which labels.json does not list"),
        ("ssv2", lambda e: e.append({"id": "../x", "template": ""}), "labels/train.json, entry 2: id '../x' is not the name of"),
        (
            "objects",
            lambda e: e["video_1"]["metadata"].update(resolution=3),
            "train.json: the metadata of video_1 needs a frame_rate",
        ),
        ("objects", lambda e: e["video_1"]["metadata"].update(num_frames=10**9), "the metadata of video_1 needs num_frames in 1"),
        (
            "objects",
            lambda e: e["video_1"].update(object_tracking=[{}]),
            "an object of video_1 needs frame_ids and bounding_boxes",
        ),
        ("objects", lambda e: e.update({"../x": e["video_1"]}), "object_tracking_train.json: '../x' is not the name of a video"),
    ],
)
def test_check_names_the_file_and_the_place_in_it(tmp_path, name, spoil, expected):
    path = write_any(tmp_path, name)
    entries = json.loads(path.read_text())
    spoil(entries)
    write_json(path, entries)
    found = [one for one in benchmarks.check(tmp_path, max_bad_share=0.0) if one.split == "train"]
    assert any(expected in problem and path.name in problem for one in found for problem in one.problems), found


def test_data_check_lists_videos_that_do_not_open_and_does_not_fail_for_them(tmp_path, capsys, monkeypatch):
    """Curation rejects them; a folder of a hundred thousand always has some."""
    write_kinetics(tmp_path / "benchmarks")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/broken.mp4").write_bytes(b"no video")
    monkeypatch.chdir(tmp_path)
    cli.check(tmp_path)
    out = capsys.readouterr().out
    assert "videos: 1 files, 0 open as videos" in out and "problem: videos/broken.mp4: not a " in out


def test_listed_counts_what_is_missing_too(tmp_path):
    write_kinetics(tmp_path)
    assert benchmarks.listed("actions", tmp_path, "val") == 2
    next((tmp_path / "kinetics/val").iterdir()).unlink()
    assert benchmarks.listed("actions", tmp_path, "val") == 2


@pytest.mark.parametrize("name", ["ssv2", "kinetics"])
def test_test_views_go_through_a_video_whose_container_has_no_duration(tmp_path, name):
    """As a browser or a stream writes it."""
    shade = (20 + 8 * np.arange(24))[:, None, None, None] * np.ones((1, 32, 32, 3))
    sample = Sample("ABCDEFGHIJ1", "ABCDEFGHIJ1", shade.astype(np.uint8), {"action": np.int64(0)})
    if name == "ssv2":
        ssv2.write(tmp_path / name, "val", [sample], templates=["Holding [something]"], rate_hz=8.0, crf=10, gop=4)
    else:
        for split in ("train", "val"):
            kinetics.write(tmp_path / name, split, [sample], labels=["hold"], rate_hz=8.0, crf=10, gop=4)

    def views() -> list[np.ndarray]:
        return [one.pixels for one in benchmarks.read("actions", tmp_path, "val", **CLIP, views=(3, 1))]

    said, parts = views(), []
    (path,) = [path for path in (tmp_path / name).rglob("ABC*") if "train" not in path.parts]
    pipe = SimpleNamespace(write=lambda some: parts.append(bytes(some)) or len(some))  # has no place to go back to
    video.write(pipe, sample.pixels, rate_hz=8.0, codec="libvpx-vp9", crf=10, gop=4, container="webm")
    path.write_bytes(b"".join(parts))
    assert video.probe(path, sha256="").duration_s == 0
    found = views()
    for one, wanted, start in zip(found, said, (0, 10, 20), strict=True):
        assert np.abs(one.astype(int) - wanted).mean() < 3 and abs(one[0].mean() - 20 - 8 * start) < 5
