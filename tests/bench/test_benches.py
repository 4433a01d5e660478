"""Benchmarks of videos from end to end at the smallest size: tables and content of the json, never speed."""

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from scaling4d import cli
from scaling4d_bench import curate, decode, loader, measure, videos
from scaling4d_bench.measure import Measurements

SMALL = (96, 128)  # height, width


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cores", lambda: 2)
    sizes = {"SECONDS": 3, "SIZE_PX": SMALL}
    for module, values in {
        decode: {"SECONDS": 3, "FILES": 1, "SIZES": [SMALL], "GOPS": [12]},
        loader: sizes | {"FILES": 3, "WORKERS": (0, 1)},
        curate: sizes | {"HASHES": 64, "TASKS": 4},
    }.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def late() -> decode.Reader:
    return lambda path, numbers: decode.ours()(path, np.asarray(numbers) + 5)


def gone() -> decode.Reader:
    raise ImportError("No module named 'cv2'")


def test_decoding_names_every_reader_and_marks_other_frames(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(decode, "LOADERS", decode.LOADERS | {"plain PyAV": late, "OpenCV": gone})
    path = decode.bench(tmp_path, clips=2, repeats=2)
    content, shown = json.loads(path.read_text()), capsys.readouterr().out
    raw, results = content["raw"]["128x96 GOP 12"], content["results"]["128x96 GOP 12"]
    assert "OpenCV: not measured (No module named 'cv2')" in shown
    assert content["not_measured"]["OpenCV"] == "No module named 'cv2'"
    assert {"ours", "plain PyAV", "FFmpeg alone"} <= raw["one process"]["seconds"].keys()
    assert raw["one process"]["seconds"].keys() | content["not_measured"].keys() == {*decode.LOADERS, "FFmpeg alone"}
    assert all(len(seconds) == 2 for group in raw.values() for seconds in group["seconds"].values())
    assert all(f"│ {name} " in shown for name in [*raw["one process"]["seconds"], "ours, processes: 1", "ours, processes: 2"])
    same = {row["name"]: row.get("same_frames") for row in results["rows"]}
    assert same["ours"] is True and same["plain PyAV"] is False and shown.count("OTHER FRAMES") == 1
    assert 0 < results["ffmpeg_share_of_ours"]["decoder"] + results["ffmpeg_share_of_ours"]["swscale"] < 1
    assert "av" in content["versions"]


def test_peers_read_the_same_frames(tmp_path) -> None:
    path = videos.write(tmp_path / "x.mp4", 0, seconds=3, size_px=(240, 320))
    work = decode.random_clips([path], clips=2, frames=75)
    loaded = Measurements("all", {}, []).load({name: decode.LOADERS[name] for name in ("OpenCV", "plain PyAV")})
    for read in loaded.values():
        assert decode.difference(read, work) < decode.SAME_BELOW < decode.difference(late(), work)


def test_the_loader_is_measured_with_every_number_of_workers(tmp_path, capsys) -> None:
    path = loader.bench(tmp_path, steps=1, repeats=2, minutes=0)
    content, shown = json.loads(path.read_text()), capsys.readouterr().out
    names = ["one core, decoding alone", "workers: 0", "workers: 1"]
    for kind in ("encoded clips", "whole sources"):
        assert {name: len(seconds) for name, seconds in content["raw"][kind]["seconds"].items()} == dict.fromkeys(names, 2)
        assert [row["name"] for row in content["results"][kind]["rows"]] == names
        assert content["results"][kind]["memory"]["peak"] > 0
        one = content["results"][kind]["rows"][0]
        assert (one["over_ours"], one["over_all_cores"]) == (1.0, 0.5)
    assert all(shown.count(f"│ {name} ") == 2 for name in names)


def test_curation_is_measured_at_two_sizes_and_again(tmp_path, capsys) -> None:
    path = curate.bench(tmp_path, files=2, more=3, repeats=1)
    content, shown = json.loads(path.read_text()), capsys.readouterr().out
    seconds = {name: len(times) for name, times in content["raw"]["seconds"].items()}
    assert seconds == {"2 files": 1, "3 files": 1, "1 files added": 1}
    assert [row["files"] for row in content["results"]["rows"]] == [2, 3, 4]
    first, second, again = content["results"]["rows"]
    assert content["results"]["second_run_of_first"] == again["seconds"] / second["seconds"]
    assert min(row["peak_main"] for row in content["results"]["rows"]) > 0 and second["peak_worker"] > 0
    assert "core-hours" in shown and "storage, TB" in shown


def test_the_paper_calculation_multiplies_rates_up() -> None:
    rates = {"core_s_per_video_s": 0.2, "clips_per_video_s": 0.5, "bytes_per_clip": 100_000, "tasks_per_video": 2.0}
    rates |= {"tasks_per_s": 400.0, "dedupe_bytes_per_clip": 168, "comparisons_per_s": 1e6, "hash_bits": 15}
    paper = curate.extrapolate(rates | {"main_bytes_per_video": 1000}, videos=1_800_000, video_s=10, cores=(100,))
    assert {name: pytest.approx(value) for name, value in paper.items()} == {
        "core-hours": 1000,  # 1.8e6 * 10 s * 0.2 / 3600
        "clips": 9e6,
        "storage, TB": 0.9,
        "hashes, GB": 0.288,
        "memory to find duplicates, GB": 1.8,
        "memory of the main process, GB": 1.8,
        "comparisons of hashes": 9e6**2 / 2 * 16 / 65536,
        "core-hours of comparing": 9e6**2 / 2 * 16 / 65536 / 1e6 / 3600,
        "scheduler: tasks/s it was seen to hand out": 400,
        "100 cores: days": 10 / 24,
        "100 cores: tasks/s": 100,  # 3.6e6 tasks in 36,000 s
    }
    # as clips/duplicates.py states
    assert curate.comparisons(10**6, 15) == pytest.approx(1.2e8, rel=0.05)
    assert curate.comparisons(10**6, 24) == pytest.approx(1.1e10, rel=0.1)


def test_every_benchmark_has_a_command_whose_help_needs_no_torch() -> None:
    code = "import sys\nfrom scaling4d.cli import app\nassert 'torch' not in sys.modules\napp()"
    shown = subprocess.run([sys.executable, "-c", code, "bench", "--help"], capture_output=True, text=True, check=True).stdout
    names = ("attention", "costs", "curate", "decode", "loader", "masking", "pretrain", "readout")
    assert all(f" {name} " in shown for name in names)
    refused = CliRunner().invoke(cli.app, ["bench", "masking", "--precision", "fp16"])
    assert str(refused.exception) == "--precision 'fp16'; needed fp32 or bf16"
