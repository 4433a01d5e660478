"""The rendered data set: equal bytes for equal seeds, every benchmark readable, every defect present."""

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from nearness import contents

from scaling4d import benchmarks, cli, config, video
from scaling4d.benchmarks.samples import ClipRequest
from scaling4d.records import UserError
from scaling4d.scenes.dataset import RenderConfig, SceneSpec, bind_render, draw_sample, draw_video, write_dataset
from scaling4d.scenes.scene import MOTIONS

pytestmark = pytest.mark.integration

COUNTS = {"action": (8, 1), "room": (1, 1), "walk": (2, 1), "track": (1, 1), "drive": (1, 1), "videos": 8}
TINY = RenderConfig(**COUNTS, frames=4, video_frames=16, rate_hz=4.0, side_px=32, depth_side_px=16, crf=30, workers=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    with contextlib.chdir(tmp_path_factory.mktemp("render")):
        return write_dataset(Path("tiny"), seed=5, settings=TINY).resolve()


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = write_dataset(Path("again"), seed=5, settings=replace(TINY, workers=1))
    first, second = contents(tiny), contents(again)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_every_seed_and_every_index_draws_another_scene():
    drawn = [draw_sample(SceneSpec(seed, "room", n, TINY)).pixels for seed, n in ((0, 0), (0, 1), (0, 2), (1, 0))]
    assert len({pixels.tobytes() for pixels in drawn}) == 4


@pytest.mark.parametrize(("task", "kind"), [
    ("actions", "action"), ("boxes", "drive"), ("depth", "room"), ("points", "track"), ("pose", "walk")
])  # fmt: skip
def test_every_benchmark_reads_back_the_drawn_samples(tiny, task, kind):
    for split in ("train", "val"):
        read = list(benchmarks.read_samples(task, tiny / "benchmarks", split, ClipRequest(4, 4.0, 32)))
        samples, indices = {sample.id: sample for sample in read}, TINY.clips(kind, split)
        assert len(samples) == len(read) == len(indices)
        for index in indices:
            drawn = draw_sample(SceneSpec(5, kind, index, TINY))
            sample = samples[drawn.id]
            assert np.abs(sample.pixels.astype(int) - drawn.pixels).mean() < 12
            for name in sample.labels.keys() - {"action_mirrored"}:  # the reader derives it from the classes' wording
                label, expected = sample.labels[name], drawn.labels[name]
                if name == "depth_m":
                    expected = expected.repeat(2, 1).repeat(2, 2)
                valid = sample.valid.get(name, np.ones((), bool))
                assert np.allclose(label[valid], expected[valid], atol=1e-3)


def test_check_counts_the_written_samples(tiny):
    findings = benchmarks.check_benchmarks(tiny / "benchmarks", max_bad_share=0.0)
    counts = {(f.benchmark, f.split): f.samples for f in findings if f.usable and not f.problems}
    assert len(counts) == 10
    assert (counts["ssv2", "train"], counts["realestate10k", "train"]) == (8, 2)


def test_action_classes_come_in_equal_numbers_and_four_have_a_mirror_image(tiny):
    labels = [
        sample.labels for sample in benchmarks.read_samples("actions", tiny / "benchmarks", "train", ClipRequest(4, 8.0, 32))
    ]
    assert sorted(int(label["action"]) for label in labels) == list(range(8))
    assert sum(int(label["action"] != label["action_mirrored"]) for label in labels) == 4
    assert benchmarks.class_names(tiny / "benchmarks") == sorted(m.replace("[", "").replace("]", "") for m in MOTIONS)


def test_videos_hold_every_defect(tiny):
    def pixels(name: str) -> np.ndarray:
        return video.decode_all(tiny / "videos" / name)[1].astype(float)

    for name in ("cut_off.mp4", "corrupt.mp4", "cut_off.mkv", "empty.mp4", "notes.mp4"):
        with pytest.raises(video.VideoError):
            video.decode_all(tiny / "videos/misc" / name)
    times_s, _ = video.decode_all(tiny / "videos/phone/VFR_0000.mp4")
    assert np.diff(times_s).max() > 2 * np.diff(times_s).min() > 0
    assert (pixels("edited/blackout0.mp4").mean((1, 2, 3)) < 3).sum() == 12
    assert (np.abs(np.diff(pixels("edited/freeze0.mp4"), axis=0)).mean((1, 2, 3)) < 2).sum() >= 22
    change = np.abs(np.diff(pixels("edited/cut0.mp4"), axis=0)).mean((1, 2, 3))
    assert change.argmax() == len(change) // 2 and change.max() > 3 * np.median(change)
    copies = [path.read_bytes() for path in sorted((tiny / "videos/backup").glob("copy_of_*"))]
    originals = {path.read_bytes() for path in tiny.rglob("videos/**/*.mp4") if path.parent.name != "backup"}
    assert len(copies) == 3 and set(copies) <= originals
    assert len(pixels("misc/short.mp4")) == 5
    assert pixels("misc/odd0.mp4").shape[1:3] == (32, 36)  # (66, 70) in a data set of 64 px
    upright = draw_video(SceneSpec(5, "defect", 25, TINY))
    header = video.probe(tiny / "videos/phone/portrait0.mp4", sha256="")
    assert (header.rotation_deg, header.height_px, header.width_px) == (90, 48, 32) == (90, *upright.shape[1:3])
    assert np.abs(pixels("phone/portrait0.mp4")[:4] - upright[:4]).mean() < 12


@pytest.mark.parametrize(("change", "message"), [
    ({"side_px": 33}, "side_px = 33; needed an even number"),
    ({"video_frames": 8}, "video_frames is 8; needed 16 or more"),
    ({"walk": (1,)}, r"walk = \[1\]; needed \[clips for training, clips for validation\]"),
    ({"workers": 0}, "workers is 0; needed 1 or more"),
])  # fmt: skip
def test_settings_that_cannot_be_drawn_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(TINY, **change)


def test_a_refused_command_names_the_cause_and_writes_nothing(tmp_path, in_the_project):
    render = partial(cli.app, standalone_mode=False)
    with pytest.raises(UserError, match="exists; render writes a new folder"):
        render(["render", str(tmp_path)])
    with pytest.raises(UserError, match="^render.Render: side_px = 33; needed an even number"):
        render(["render", str(tmp_path / "x"), "render.Render.side_px=33"])
    settings = config.compose([])
    del settings["render"]["Render"]["crf"]
    with pytest.raises(UserError, match="^params.yaml lacks render.Render.crf"):
        bind_render(settings)
    assert list(tmp_path.iterdir()) == []
