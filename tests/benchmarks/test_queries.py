"""In which frames tracks are asked about, and that a clip starts there, in both benchmarks of points."""

from pathlib import Path

import numpy as np
import pytest
from numbered import SIDE, numbers, pictures

from scaling4d import benchmarks, seeds, video
from scaling4d.benchmarks import perception_test, tapvid
from scaling4d.benchmarks.queries import asked
from scaling4d.records import Sample, UserError

FRAMES = 20
SEEN = np.array(
    [
        [True] * 20,
        [False] * 5 + [True] * 15,
        [False] * 7 + [True] * 3 + [False] * 10,
        [False] * 19 + [True],
        [False] * 20,
    ]
)
CLIP = {"frames": 4, "rate_hz": 25.0, "side_px": SIDE}


def write(root: Path, name: str) -> Sample:
    points = seeds.numpy(0, "queries").uniform(0.3, 0.7, (len(SEEN), FRAMES, 2)).astype(np.float32)
    sample = Sample("video_7", "video_7", pictures(FRAMES), {"points": points}, {"points": SEEN})
    if name == "tapvid":
        tapvid.write(root / name, "val", [sample])
    else:
        perception_test.write(root / name, "val", [sample], rate_hz=25.0, crf=5, gop=4)
    return sample


def read(root: Path, how: str) -> dict[str, Sample]:
    return {sample.id: sample for sample in benchmarks.read("points", root, "val", **CLIP, queries=how)}


BOTH = pytest.mark.parametrize("name", ["tapvid", "perception_test"])


@BOTH
def test_without_a_word_only_what_frame_0_shows_is_asked_about(tmp_path, name):
    write(tmp_path, name)
    (plain,) = benchmarks.read("points", tmp_path, "val", **CLIP)
    (asked_at_0,) = read(tmp_path, "frame_0").values()
    assert np.array_equal(plain.pixels, asked_at_0.pixels) and plain.id == asked_at_0.id == "video_7"
    assert plain.valid["points"].tolist() == [[True] * 4]


@BOTH
def test_first_asks_about_every_track_where_it_is_first_visible(tmp_path, name):
    """The fourth track appears in the last frame, from which no clip fits, and the fifth never."""
    written = write(tmp_path, name)
    found = read(tmp_path, "first")
    assert {id: numbers(sample.pixels) for id, sample in found.items()} == {
        "video_7@0": [0, 1, 2, 3],
        "video_7@5": [5, 6, 7, 8],
        "video_7@7": [7, 8, 9, 10],
    }
    assert found["video_7@7"].valid["points"].tolist() == [[True, True, True, False]]
    for track, start in ((0, 0), (1, 5)):
        sample = found[f"video_7@{start}"]
        assert sample.video == "video_7"
        assert np.allclose(sample.labels["points"], written.labels["points"][track : track + 1, start : start + 4], atol=2e-5)


@BOTH
def test_strided_asks_every_fifth_frame_about_all_that_is_visible_and_looks_both_ways(tmp_path, name):
    written = write(tmp_path, name)
    found = read(tmp_path, "strided")
    assert {id: numbers(sample.pixels) for id, sample in found.items()} == {
        "video_7@0": [0, 1, 2, 3],
        "video_7@5": [5, 6, 7, 8],
        "video_7@5b": [5, 4, 3, 2],
        "video_7@10": [10, 11, 12, 13],
        "video_7@10b": [10, 9, 8, 7],
        "video_7@15": [15, 16, 17, 18],
        "video_7@15b": [15, 14, 13, 12],
    }
    back = found["video_7@10b"]
    assert back.valid["points"].tolist() == [[True] * 4] * 2  # the third track has gone by then, and is not asked about
    assert np.allclose(back.labels["points"], written.labels["points"][:2, [10, 9, 8, 7]], atol=2e-5)
    assert not found["video_7@5b"].valid["points"][1, 1:].any()  # not visible before


@BOTH
def test_clips_from_a_later_query_take_their_frames_at_their_own_rate(tmp_path, name):
    write(tmp_path, name)
    slow = {"frames": 3, "rate_hz": 5.0, "side_px": SIDE}
    clips = {sample.id: numbers(sample.pixels) for sample in benchmarks.read("points", tmp_path, "val", **slow, queries="first")}
    assert clips == {"video_7@0": [0, 5, 10], "video_7@5": [5, 10, 15], "video_7@7": [7, 12, 17]}


def test_an_unknown_way_to_ask_is_refused_before_any_video_is_looked_at(tmp_path):
    with pytest.raises(UserError, match="readout.tasks.points: queries = 'all'; needed one of frame_0, first, strided"):
        read(tmp_path, "all")


def test_queries_are_those_of_a_slow_version_that_you_can_read():
    rng = seeds.numpy(0, "visible")
    for _ in range(20):
        visible, points, after = rng.uniform(size=(6, 17)) < 0.3, rng.uniform(size=(6, 17, 2)), np.arange(3)
        first = {(np.nonzero(row)[0][0], q) for q, row in enumerate(visible) if row.any()}
        strided = {(frame, q) for frame in range(0, 17, 5) for q in range(6) if visible[q, frame]}
        for how, wanted in (("first", first), ("strided", strided)):
            found = set()
            for clip in asked("v", points, visible, after, how):
                assert clip.visible[:, 0].all()
                for places in clip.points[:, 0]:
                    (q,) = np.nonzero((points[:, clip.numbers[0]].astype(np.float32) == places).all(-1))[0]
                    found.add((int(clip.numbers[0]), int(q)))
            forwards = {(frame, q) for frame, q in wanted if frame + 2 < 17}
            assert found == forwards | ({(frame, q) for frame, q in wanted if frame >= 2} if how == "strided" else set())


def test_tap_vid_is_measured_on_where_perception_test_is_there_to_train_on(tmp_path):
    write(tmp_path, "perception_test")
    write(tmp_path, "tapvid")
    root = tmp_path / "perception_test"
    (root / "point_tracking_valid.json").rename(root / "point_tracking_train.json")
    assert benchmarks.folder("points", tmp_path) == root
    assert benchmarks.folder("points", tmp_path, "val") == tmp_path / "tapvid"
    assert [sample.id for sample in benchmarks.read("points", tmp_path, "train", **CLIP)] == ["video_7"]
    found = benchmarks.check(tmp_path, max_bad_share=0.0)
    assert [(one.benchmark, one.split, bool(one.problems)) for one in found] == [
        ("perception_test", "train", False),
        ("perception_test", "val", True),  # which nobody needs
        ("tapvid", "val", False),
    ]
    assert all(one.usable for one in found)


@pytest.mark.parametrize("how", ["first", "strided"])
def test_a_video_is_decoded_once_however_often_it_is_asked_about(tmp_path, monkeypatch, how):
    write(tmp_path, "perception_test")
    opened, frames = [], video.frames
    monkeypatch.setattr(video, "frames", lambda source: opened.append(source) or frames(source))
    assert len(read(tmp_path, how)) > 2 and len(opened) == 1
