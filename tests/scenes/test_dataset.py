"""The rendered data set as a whole: equal bytes for equal seeds, every benchmark readable, every defect there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scaling4d import artifacts, benchmarks, config, video
from scaling4d.records import UserError
from scaling4d.scenes import Render, dataset, render, stage, worlds

TINY = {
    "action": (8, 1),
    "room": (1, 1),
    "walk": (2, 1),
    "track": (1, 1),
    "drive": (1, 1),
    "videos": 8,
    "frames": 4,
    "video_frames": 16,
    "side_px": 32,
    "depth_side_px": 16,
    "rate_hz": 8.0,
    "drive_rate_hz": 10.0,
    "tracks": 6,
    "tracks_on_room": 2,
    "crf": 30,
    "vp9_crf": 45,
    "jpeg_quality": 60,
    "contrast": {"action": 0.15, "room": 0.3, "walk": 0.5, "track": 0.45, "drive": 0.7},
    "gop": 16,
    "workers": 2,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("render"))
        return render(Path("tiny"), seed=5, settings=Render(**TINY)).resolve()


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = render(Path("again"), seed=5, settings=Render(**{**TINY, "workers": 1})).resolve()
    names = sorted(path.relative_to(tiny) for path in tiny.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert [str(name) for name in names if (tiny / name).read_bytes() != (again / name).read_bytes()] == []
    assert artifacts.sha256(tiny) == artifacts.sha256(again)


def test_another_seed_gives_another_world():
    first, second = (dataset.sample(dataset.Task(seed, "room", 0, Render(**TINY))) for seed in (0, 1))
    assert not np.array_equal(first.pixels, second.pixels)


def test_training_and_validation_share_no_world():
    settings = Render(**TINY)
    shown = [dataset.sample(dataset.Task(0, "room", index, settings)).pixels.tobytes() for index in range(4)]
    assert len(set(shown)) == 4


@pytest.mark.parametrize(("task", "rate_hz"), [("actions", 8), ("boxes", 10), ("depth", 8), ("points", 8), ("pose", 8)])
def test_every_benchmark_reads_back_what_was_drawn(tiny, task, rate_hz):
    kind = {"actions": "action", "boxes": "drive", "depth": "room", "points": "track", "pose": "walk"}[task]
    settings = Render(**TINY)
    for split, first in (("train", 0), ("val", settings.count(kind, "train"))):
        found = {s.id: s for s in benchmarks.read(task, tiny / "benchmarks", split, frames=4, rate_hz=rate_hz, side_px=32)}
        assert len(found) == settings.count(kind, split)
        for index in range(first, first + len(found)):
            drawn = dataset.sample(dataset.Task(5, kind, index, settings))
            read = found[drawn.id]
            assert np.abs(read.pixels.astype(int) - drawn.pixels).mean() < 12
            for name, label in read.labels.items():
                if name == "action_mirrored":  # not drawn: it follows from the classes' wording
                    continue
                expected = drawn.labels[name]
                if name == "depth_m":
                    expected = expected.repeat(2, 1).repeat(2, 2)
                valid = read.valid.get(name, np.ones((), bool))
                assert np.allclose(label[valid], expected[valid], atol=1e-3)


@pytest.mark.parametrize("task", benchmarks.TASKS)
def test_a_part_of_a_benchmark_is_that_part_of_its_list(tiny, task):
    def names(part: slice) -> list[str]:
        return [
            s.video for s in benchmarks.read(task, tiny / "benchmarks", "train", frames=4, rate_hz=8.0, side_px=32, part=part)
        ]

    whole = names(slice(None))
    assert len(whole) >= 1
    assert [names(slice(rank, None, 2)) for rank in range(2)] == [whole[0::2], whole[1::2]]


def test_check_counts_what_was_written(tiny):
    expected = {("ssv2", "train"): 8, ("realestate10k", "train"): 2}
    findings = benchmarks.check(tiny / "benchmarks", max_bad_share=0.0)
    found = {(f.benchmark, f.split): f.samples for f in findings if f.usable and not f.problems}
    assert len(found) == 10
    assert {key: found[key] for key in expected} == expected


def test_action_classes_come_in_equal_numbers_and_know_their_mirror_images(tiny):
    samples = list(benchmarks.read("actions", tiny / "benchmarks", "train", frames=4, rate_hz=8, side_px=32))
    names = benchmarks.classes(tiny / "benchmarks")
    mirrored = {names[int(s.labels["action"])]: names[int(s.labels["action_mirrored"])] for s in samples}
    assert mirrored["Moving something from left to right"] == "Moving something from right to left"
    assert mirrored["Moving something anticlockwise in a circle"] == "Moving something clockwise in a circle"
    assert sum(name != image for name, image in mirrored.items()) == 4
    assert sorted(int(sample.labels["action"]) for sample in samples) == list(range(8))
    assert benchmarks.classes(tiny / "benchmarks") == sorted(m.replace("[", "").replace("]", "") for m in worlds.MOTIONS)


def test_videos_hold_every_defect(tiny):
    videos = tiny / "videos"
    for name in ("cut_off.mp4", "corrupt.mp4", "cut_off.mkv", "empty.mp4", "notes.mp4"):
        with pytest.raises(video.VideoError):
            video.read(videos / "misc" / name)
    turned = video.probe(videos / "phone/portrait0.mp4", sha256="")
    assert (turned.rotation_deg, turned.height_px, turned.width_px) == (90, 48, 32)  # half of what it is at 64 px
    times_s, _ = video.read(videos / "phone/VFR_0000.mp4")
    assert np.diff(times_s).max() > 2 * np.diff(times_s).min() > 0
    _, black = video.read(videos / "edited/blackout0.mp4")
    assert (black.mean((1, 2, 3)) < 3).sum() == 12
    _, frozen = video.read(videos / "edited/freeze0.mp4")
    assert (np.abs(np.diff(frozen.astype(float), axis=0)).mean((1, 2, 3)) < 2).sum() >= 22
    _, cut = video.read(videos / "edited/cut0.mp4")
    change = np.abs(np.diff(cut.astype(float), axis=0)).mean((1, 2, 3))
    assert change.argmax() == len(cut) // 2 - 1 and change.max() > 3 * np.median(change)
    copies = [path.read_bytes() for path in sorted((videos / "backup").glob("copy_of_*"))]
    originals = {path.read_bytes() for path in videos.rglob("*.mp4") if path.parent.name != "backup"}
    assert len(copies) == 3 and set(copies) <= originals
    assert len(video.read(videos / "misc/short.mp4")[1]) == 5
    assert video.read(videos / "misc/odd0.mp4")[1].shape[1:3] == (32, 36)  # (66, 70) at 64 px


def test_a_portrait_stands_upright_when_read(tiny):
    settings = Render(**TINY)
    drawn = dataset.corpus_pixels(dataset.Task(5, "defect", 25, settings))
    _, shown = video.read(tiny / "videos/phone/portrait0.mp4")
    assert np.abs(shown[:4].astype(int) - drawn[:4]).mean() < 12


def test_every_kind_of_world_needs_a_contrast():
    with pytest.raises(UserError, match="^Render.contrast has action, room; needed action, room, walk, track, drive\n"):
        Render(**{**TINY, "contrast": {"action": 0.15, "room": 0.3}})


def test_rendering_over_something_is_refused(tiny):
    with pytest.raises(UserError, match="exists; render writes a new folder"):
        render(tiny, seed=0, settings=Render(**TINY))


@pytest.mark.parametrize(("change", "message"), [
    ({"side_px": 33}, r"Render.side_px = 33; needed an even number"),
    ({"video_frames": 8}, r"Render.video_frames = 8; needed 2 and 16"),
    ({"tracks_on_room": 7}, r"tracks_on_room must lie in 0 .. Render.tracks"),
    ({"workers": 0}, r"Render.workers be 1 or more"),
])  # fmt: skip
def test_settings_that_cannot_be_drawn_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(Render(**TINY), **change)


def test_the_stage_says_which_setting_is_missing(tmp_path):
    partial = {key: list(value) if isinstance(value, tuple) else value for key, value in TINY.items() if key != "crf"}
    with pytest.raises(UserError, match="Render.*crf"):
        stage.render(tmp_path / "x", {"seed": 0, "render": {"Render": partial}})
    assert not (tmp_path / "x").exists()
    config.bind()
