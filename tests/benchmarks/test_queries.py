"""The query frames of tracks, and that a clip starts in each, in both benchmarks of points."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.writers import write_tapvid
from numbered import CLIP, numbers, pictures

from scaling4d import benchmarks, seeds, video
from scaling4d.benchmarks import perception_test
from scaling4d.benchmarks.queries import query_clips
from scaling4d.records import Sample

FRAMES = 20
START, END = np.array([0, 5, 7, 19, 20]), np.array([20, 20, 10, 20, 20])  # of the frames in which each track is visible
VISIBLE = (np.arange(FRAMES) >= START[:, None]) & (np.arange(FRAMES) < END[:, None])
FOUR = replace(CLIP, frames=4, rate_hz=25.0)


def write(root: Path, name: str) -> Sample:
    points = seeds.numpy_rng(0, "queries").uniform(0.3, 0.7, (len(VISIBLE), FRAMES, 2)).astype(np.float32)
    sample = Sample("video_7", "video_7", pictures(FRAMES), {"points": points}, {"points": VISIBLE})
    if name == "tapvid":
        write_tapvid(root / name, [sample])
    else:
        perception_test.write(root / name, "val", [sample], rate_hz=25.0, crf=5, gop=4)
    return sample


def read(root: Path, queries: str, **changes) -> dict[str, Sample]:
    request = replace(FOUR, queries=queries, **changes)
    return {sample.id: sample for sample in benchmarks.read_samples("points", root, "val", request)}


def shown(samples: dict[str, Sample]) -> dict[str, list[int]]:
    """Numbers of the frames of each clip, by what follows the video's name."""
    return {name.removeprefix("video_7"): numbers(sample.pixels) for name, sample in samples.items()}


BOTH = pytest.mark.parametrize("name", ["tapvid", "perception_test"])


@BOTH
def test_first_queries_every_track_where_it_is_first_visible(tmp_path, name):
    """The fourth track appears in the last frame, where no clip fits, the fifth never. By default, frame 0 queries."""
    written = write(tmp_path, name)
    (plain,) = benchmarks.read_samples("points", tmp_path, "val", FOUR)
    assert (plain.id, numbers(plain.pixels), plain.valid["points"].tolist()) == ("video_7", [0, 1, 2, 3], [[True] * 4])
    samples = read(tmp_path, "first")
    assert shown(samples) == {"@0": [0, 1, 2, 3], "@5": [5, 6, 7, 8], "@7": [7, 8, 9, 10]}
    assert samples["video_7@7"].valid["points"].tolist() == [[True, True, True, False]]
    for track, start in ((0, 0), (1, 5)):
        sample = samples[f"video_7@{start}"]
        assert sample.video == "video_7"
        assert np.allclose(sample.labels["points"], written.labels["points"][track : track + 1, start : start + 4], atol=2e-5)
    slow = read(tmp_path, "first", frames=3, rate_hz=5.0)
    assert shown(slow) == {"@0": [0, 5, 10], "@5": [5, 10, 15], "@7": [7, 12, 17]}


@BOTH
def test_strided_queries_all_visible_tracks_in_every_fifth_frame_both_ways(tmp_path, name):
    written = write(tmp_path, name)
    samples = read(tmp_path, "strided")
    forwards = {f"@{frame}": [frame, frame + 1, frame + 2, frame + 3] for frame in (0, 5, 10, 15)}
    backwards = {f"@{frame}b": [frame, frame - 1, frame - 2, frame - 3] for frame in (5, 10, 15)}
    assert shown(samples) == forwards | backwards
    back = samples["video_7@10b"]
    assert back.valid["points"].tolist() == [[True] * 4] * 2  # the third track has gone by then, and is not queried
    assert np.allclose(back.labels["points"], written.labels["points"][:2, [10, 9, 8, 7]], atol=2e-5)
    assert not samples["video_7@5b"].valid["points"][1, 1:].any()  # not visible before


def test_queries_are_those_of_a_slow_version_that_you_can_read():
    rng = seeds.numpy_rng(0, "visible")
    for _ in range(20):
        visible, points, offsets = rng.uniform(size=(6, 17)) < 0.3, rng.uniform(size=(6, 17, 2)), np.arange(3)
        first = {(np.nonzero(row)[0][0], q) for q, row in enumerate(visible) if row.any()}
        strided = {(frame, q) for frame in range(0, 17, 5) for q in range(6) if visible[q, frame]}
        for queries, wanted in (("first", first), ("strided", strided)):
            queried = set()
            for clip in query_clips("v", points, visible, offsets, replace(FOUR, queries=queries), ()):
                assert clip.visible[:, 0].all()
                for query in clip.points[:, 0]:
                    (q,) = np.nonzero((points[:, clip.frame_numbers[0]].astype(np.float32) == query).all(-1))[0]
                    queried.add((int(clip.frame_numbers[0]), int(q)))
            forwards = {(frame, q) for frame, q in wanted if frame + 2 < 17}
            assert queried == forwards | ({(frame, q) for frame, q in wanted if frame >= 2} if queries == "strided" else set())


def test_tap_vid_is_measured_on_where_perception_test_is_there_to_train_on(tmp_path):
    write(tmp_path, "perception_test")
    write(tmp_path, "tapvid")
    root = tmp_path / "perception_test"
    (root / "point_tracking_valid.json").rename(root / "point_tracking_train.json")
    assert benchmarks.find_benchmark("points", tmp_path).folder == root
    assert benchmarks.find_benchmark("points", tmp_path, "val").folder == tmp_path / "tapvid"
    assert [sample.id for sample in benchmarks.read_samples("points", tmp_path, "train", FOUR)] == ["video_7"]
    checks = benchmarks.check_benchmarks(tmp_path, max_bad_share=0.0)
    assert [(check.benchmark, check.split, bool(check.problems)) for check in checks] == [
        ("perception_test", "train", False),
        ("perception_test", "val", True),  # which nobody needs
        ("tapvid", "val", False),
    ]
    assert all(check.usable for check in checks)


@pytest.mark.parametrize("queries", ["first", "strided"])
def test_a_video_is_decoded_once_however_often_it_is_queried(tmp_path, monkeypatch, queries):
    write(tmp_path, "perception_test")
    opened, frames = [], video.decode_frames
    monkeypatch.setattr(video, "decode_frames", lambda source: opened.append(source) or frames(source))
    assert len(read(tmp_path, queries)) > 2 and len(opened) == 1
