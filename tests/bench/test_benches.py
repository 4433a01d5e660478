"""Each bench from end to end at the smallest size: who is in the table and what is in the json, never how fast."""

import json

import numpy as np
import pytest

from scaling4d_bench import curate, decode, loader, measure, readers

SMALL = (96, 128)  # height, width


@pytest.fixture(autouse=True)
def two_cores(monkeypatch) -> None:
    monkeypatch.setattr(measure, "cores", lambda: 2)


def late() -> readers.Reader:
    return lambda path, numbers: readers.ours()(path, np.asarray(numbers) + 5)


def gone() -> readers.Reader:
    raise ImportError("No module named 'cv2'")


def test_decoding_names_every_contestant_and_marks_who_returns_other_frames(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(readers, "pyav", late)
    monkeypatch.setattr(readers, "opencv", gone)
    path = decode.bench(tmp_path, clips=2, repeats=2, seconds=3, files=1, sizes=[SMALL], gops=[12])
    told, shown = json.loads(path.read_text()), capsys.readouterr().out
    raw, found = told["raw"]["128x96 GOP 12"], told["found"]["128x96 GOP 12"]
    assert "OpenCV: not measured (No module named 'cv2')" in shown
    assert told["not_measured"]["OpenCV"] == "No module named 'cv2'"
    assert {"ours", "plain PyAV", "FFmpeg alone"} <= raw["one process"]["seconds"].keys()
    assert raw["one process"]["seconds"].keys() | told["not_measured"].keys() == {
        "ours", "torchcodec", "torchcodec exact", "torchcodec, torch resizes", "OpenCV", "plain PyAV", "FFmpeg alone"
    }  # fmt: skip
    assert all(len(seconds) == 2 for group in raw.values() for seconds in group["seconds"].values())
    assert all(f"│ {name} " in shown for name in [*raw["one process"]["seconds"], "ours, processes: 1", "ours, processes: 2"])
    same = {row["name"]: row.get("same_frames") for row in found["rows"]}
    assert same["ours"] is True and same["plain PyAV"] is False and shown.count("OTHER FRAMES") == 1
    assert 0 < found["ffmpeg_share_of_ours"]["decoder"] + found["ffmpeg_share_of_ours"]["swscale"] < 1
    assert "av" in told["versions"]


def test_peers_read_the_same_frames(tmp_path) -> None:
    path = decode.videos.make(tmp_path / "x.mp4", 0, seconds=3, height_px=240, width_px=320, gop=250)
    work = decode.places([path], clips=2, frames=75, seed=0)
    made, _ = measure.available({"OpenCV": readers.opencv, "plain PyAV": readers.pyav})
    for read in made.values():
        assert decode.differences(read, work) < decode.SAME_BELOW < decode.differences(late(), work)


def test_the_loader_is_measured_with_every_number_of_workers(tmp_path, capsys) -> None:
    path = loader.bench(tmp_path, steps=1, repeats=2, minutes=0, files=3, seconds=3, size_px=SMALL, workers=(0, 1))
    told, shown = json.loads(path.read_text()), capsys.readouterr().out
    names = ["one core, decoding alone", "workers: 0", "workers: 1"]
    for kind in ("encoded clips", "whole sources"):
        assert {name: len(seconds) for name, seconds in told["raw"][kind]["seconds"].items()} == dict.fromkeys(names, 2)
        assert [row["name"] for row in told["found"][kind]["rows"]] == names
        assert told["found"][kind]["memory"]["peak"] > 0
        one = told["found"][kind]["rows"][0]
        assert (one["over_ours"], one["over_all_cores"]) == (1.0, 0.5)
    assert all(shown.count(f"│ {name} ") == 2 for name in names)


def test_curation_is_measured_at_two_sizes_and_again(tmp_path, capsys) -> None:
    path = curate.bench(tmp_path, files=2, more=3, repeats=1, seconds=3, size_px=SMALL, hashes=64, tasks=4)
    told, shown = json.loads(path.read_text()), capsys.readouterr().out
    assert {name: len(seconds) for name, seconds in told["raw"]["seconds"].items()} == {
        "2 files": 1,
        "3 files": 1,
        "1 files added": 1,
    }
    assert [row["files"] for row in told["found"]["rows"]] == [2, 3, 4]
    first, second, again = told["found"]["rows"]
    assert told["found"]["second_run_of_first"] == again["seconds"] / second["seconds"]
    assert min(row["peak_main"] for row in told["found"]["rows"]) > 0 and second["peak_worker"] > 0
    assert "core-hours" in shown and "storage, TB" in shown
