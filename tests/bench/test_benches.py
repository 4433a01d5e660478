"""Benchmarks of videos from end to end at the smallest size: tables and content of the json, never speed."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from commands import invoke

from scaling4d.scenes.scene import KINDS
from scaling4d_bench import curate, decode, features, loader, measure, render, videos
from scaling4d_bench.loader import ALONE, CROPPED
from scaling4d_bench.measure import Measurements

pytestmark = pytest.mark.integration

SMALL = (96, 128)  # height, width


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cores", lambda: 2)
    sizes = {"SECONDS": 3, "SIZE_PX": SMALL}
    for module, values in {
        decode: {"SECONDS": 3, "FILES": 1, "SIZES": [SMALL], "GOPS": [12]},
        loader: sizes | {"FILES": 3, "STEPS": 1, "WORKERS": (0, 1), "MAX_FRAMES": 30},
        features: {"SECONDS": 3, "SIZE_PX": (224, 320)},
        curate: sizes | {"FILES": 2, "MORE": 3, "EXTRA": 1, "HASHES": 64, "TASKS": 4},
    }.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def late() -> decode.Reader:
    return lambda path, numbers: decode.ours()(path, np.asarray(numbers) + 5)


def gone() -> decode.Reader:
    raise ImportError("No module named 'cv2'")


@pytest.mark.parametrize("pool", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_decoding_names_every_reader_and_marks_other_frames(tmp_path, monkeypatch, capsys, pool: str) -> None:
    if pool == "threads":
        monkeypatch.setattr(decode, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
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


def test_the_loaders_table_follows_from_its_seconds(tmp_path, monkeypatch, capsys) -> None:
    memory = {"workers": 1, "minutes": 0.5, "batches": 7, "bytes": [2**20, 2**21], "first": 2**20, "last": 2**21, "peak": 2**21}
    memory |= {"slope_per_minute": 0.0, "slope_per_minute_second_half": 0.0}
    monkeypatch.setattr(videos, "curated", lambda *_, **__: tmp_path)
    monkeypatch.setattr(loader.loader, "count_clips", lambda folder, split: 105)
    monkeypatch.setattr(loader, "decode", lambda folder, steps: 4.0)

    def load(folder: Path, steps: int, workers: int, repeats: int = 1, crop: tuple[float, float] | None = None) -> float:
        return (8.0 if crop else (5.0, 2.5)[workers]) / repeats

    monkeypatch.setattr(loader, "load", load)
    monkeypatch.setattr(loader, "watch_memory", lambda folder, minutes, workers: memory)
    content, shown = json.loads(loader.bench(tmp_path, repeats=2, minutes=0).read_text()), capsys.readouterr().out
    for kind in ("encoded clips", "whole sources"):
        rows = content["results"][kind]["rows"]
        over_ours = {ALONE: 1.0, "workers: 0": 0.8, "workers: 1": 1.6, CROPPED: 0.5}
        assert {row["name"]: row["over_ours"] for row in rows} == pytest.approx(over_ours)
        assert [row["over_all_cores"] for row in rows] == pytest.approx([0.5, 0.4, 0.8, 0.25])
        assert [row["per_s"] for row in rows] == pytest.approx([loader.BATCH / seconds for seconds in (4.0, 5.0, 2.5, 8.0)])
        seconds = {ALONE: [4.0] * 2, "workers: 0": [5.0] * 2, "workers: 1": [2.5] * 2, CROPPED: [8.0] * 2}
        assert content["raw"][kind]["seconds"] == seconds
        assert content["results"][kind]["memory"] == memory
    rows = content["results"]["repeated sampling"]["rows"]
    assert [row["over_ours"] for row in rows] == pytest.approx([1.0, 1.0, 0.25])
    assert "1 workers over 0.5 min, 7 batches: 1 to 2 MiB, peak 2 MiB" in shown


@pytest.mark.slow  # quick: the test above
def test_the_loader_is_measured_with_every_number_of_workers(tmp_path, capsys) -> None:
    content = json.loads(loader.bench(tmp_path, repeats=2, minutes=0).read_text())
    names, shown = [ALONE, "workers: 0", "workers: 1", CROPPED], capsys.readouterr().out
    for kind in ("encoded clips", "whole sources"):
        assert {name: len(seconds) for name, seconds in content["raw"][kind]["seconds"].items()} == dict.fromkeys(names, 2)
        assert [row["name"] for row in content["results"][kind]["rows"]] == names
        assert content["results"][kind]["memory"]["peak"] > 0
    assert all(shown.count(f"│ {name} ") == 2 for name in names)
    copies, windows, alone = content["results"]["repeated sampling"]["rows"]
    assert copies["over_ours"] == 1.0 and windows["per_s"] > 0 and alone["per_s"] > 0


def test_features_are_those_of_a_loop_over_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(features, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    path = features.bench(tmp_path, source=None, minutes=0.1, rate_hz=8.0, size="small", repeats=2)
    content, shown = json.loads(path.read_text()), capsys.readouterr().out
    rows = {row["name"]: row for row in content["results"]["rows"]}
    assert content["results"]["windows"] == 3 and rows.keys() == {features.OURS, features.LOOP}  # 6 s, of 16 frames each
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in content["raw"]["seconds"].values())
    peaks = [row["peak_mib"] for row in rows.values()]
    assert 0 < content["results"]["peak_mib_of_a_tenth"] <= min(peaks) + 1  # of one process here
    assert rows[features.LOOP]["difference"] < 0.02
    assert "0.1 minutes of video, 48 frames at 8 Hz, VideoMAE small" in shown


def test_the_rates_of_curation_come_from_the_difference_of_two_sizes(tmp_path, monkeypatch, capsys) -> None:
    def made_up(folder, paths, curation, *, previous) -> dict:
        seconds = 3.0 if previous else 10.0 + len(paths)
        sizes = {"clips": 2 * len(paths), "clip_bytes": 1000 * len(paths), "peak_main": 2**20 * len(paths), "peak_worker": 2**20}
        return {"files": len(paths), "seconds": seconds, **sizes}

    monkeypatch.setattr(curate, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    monkeypatch.setattr(videos, "write", lambda path, seed, *, seconds, size_px: path)
    monkeypatch.setattr(curate, "run_curation", made_up)
    monkeypatch.setattr(curate, "measure_scheduler", lambda: 400.0)
    content, shown = json.loads(curate.bench(tmp_path).read_text()), capsys.readouterr().out
    assert content["raw"]["seconds"] == {"2 files": [12.0], "3 files": [13.0], "1 files added": [3.0]}
    assert [row["files"] for row in content["results"]["rows"]] == [2, 3, 4]
    rates = content["results"]["measured"]
    assert (rates["core_s_per_video_s"], rates["clips_per_video_s"]) == pytest.approx((2 / 3, 2 / 3))  # a file of 3 s, 2 workers
    assert rates["main_bytes_per_video"] == 2**20 and rates["bytes_per_clip"] == 500 and rates["tasks_per_s"] == 400.0
    assert content["results"]["second_run_of_first"] == 3 / 13 and "the second run took 23.1% of the first" in shown
    assert "core-hours" in shown and "storage, TB" in shown


@pytest.mark.slow  # quick: the test above
def test_curation_is_measured_at_two_sizes_and_again(tmp_path) -> None:
    content = json.loads(curate.bench(tmp_path).read_text())
    assert [row["files"] for row in content["results"]["rows"]] == [2, 3, 4]
    first, second, again = content["results"]["rows"]
    assert content["results"]["second_run_of_first"] == again["seconds"] / second["seconds"]
    assert min(row["peak_main"] for row in content["results"]["rows"]) > 0 and second["peak_worker"] > 0


def test_drawing_is_measured_for_every_kind(tmp_path, in_the_project, monkeypatch, capsys) -> None:
    drawn = {"draw_sample": Counter(), "draw_video": Counter()}
    for name, specs in drawn.items():
        monkeypatch.setattr(render, name, lambda spec, specs=specs: specs.update([(spec.kind, spec.index)]))
    content, shown = json.loads(render.bench(tmp_path, repeats=3).read_text()), capsys.readouterr().out
    clips = {kind: [(kind, index) for index in range(render.CLIPS)] for kind in (*KINDS, "corpus")}
    assert drawn["draw_video"] == dict.fromkeys(clips.pop("corpus"), 4)  # once without counting
    assert drawn["draw_sample"] == dict.fromkeys(sum(clips.values(), []), 4)
    assert content["settings"]["frames"] > 1
    rows, seconds = content["results"]["rows"], content["raw"]["seconds"]["seconds"]
    assert [row["name"] for row in rows] == [*KINDS, "video"] and {len(several) for several in seconds.values()} == {3}
    for row in rows:
        assert row["per_s"] == pytest.approx(render.CLIPS / np.median(seconds[row["name"]])) and f"│ {row['name']} " in shown


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
    names = ("attention", "costs", "curate", "decode", "loader", "masking", "pretrain", "readout", "render")
    assert all(f" {name} " in shown for name in names)
    refused = invoke("bench", "masking", "--precision", "fp16")
    assert refused.exit_code == 2 and "'fp16' is not one of 'fp32'" in refused.output
