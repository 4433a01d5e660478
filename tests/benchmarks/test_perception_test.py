"""Perception Test: what is written is read back, and the traps of the real download."""

import json
from pathlib import Path

import numpy as np
import pytest
from numbered import CLIP, H264, SIDE, T, numbers, pictures

from scaling4d import seeds
from scaling4d.benchmarks import perception_test
from scaling4d.records import Sample, UserError, write_json


def write_perception_test(root: Path) -> Sample:
    rng = seeds.numpy(0, "points")
    seen = np.ones((4, T), bool)
    seen[1, 2:4] = False
    seen[2, 0] = False
    points = rng.uniform(0.1, 0.9, (4, T, 2)).astype(np.float32)
    sample = Sample("video_7", "video_7", pictures(height=32, width=48), {"points": points}, {"points": seen})
    perception_test.write(root, "val", [sample], **H264)
    return sample


def edit_track(root: Path, **changes) -> None:
    path = root / "point_tracking_valid.json"
    entries = json.loads(path.read_text())
    entries["video_7"]["point_tracking"][0] |= changes
    path.write_text(json.dumps(entries))  # which may hold NaN


def test_perception_test_reads_back_the_tracks_of_frame_0(tmp_path):
    written = write_perception_test(tmp_path)
    (read,) = perception_test.read(tmp_path, "val", **CLIP)
    expected = written.labels["points"] * [1.5, 1] - [0.25, 0]  # of the central square of 32 x 48
    visible = written.valid["points"] & ((expected >= 0) & (expected < 1)).all(-1)
    kept = visible[:, 0]
    assert not kept[2] and kept.any()
    assert np.array_equal(read.valid["points"], visible[kept])
    assert np.allclose(read.labels["points"][visible[kept]], expected[kept][visible[kept]], atol=2e-5)
    assert (read.labels["points"][~visible[kept]] == 0).all()


def test_perception_test_file_lists_only_visible_frames_as_y_then_x(tmp_path):
    written = write_perception_test(tmp_path)
    entry = json.loads((tmp_path / "point_tracking_valid.json").read_text())["video_7"]
    assert entry["metadata"]["resolution"] == [32, 48]
    track = entry["point_tracking"][1]
    assert track["frame_ids"] == [0, 1, 4, 5]
    assert np.allclose(track["points"], written.labels["points"][1][[0, 1, 4, 5]][:, ::-1].T, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_perception_test_takes_points_as_2_by_n_and_as_n_by_2(tmp_path, transposed):
    write_perception_test(tmp_path)
    yx = np.array([[0.2, 0.3, 0.4], [0.5, 0.6, 0.7]])
    edit_track(tmp_path, frame_ids=[0, 1, 2], points=(yx.T if transposed else yx).tolist())
    read = next(perception_test.read(tmp_path, "val", **CLIP))
    assert np.allclose(read.labels["points"][0, :3], np.stack([yx[1] * 1.5 - 0.25, yx[0]], -1), atol=1e-6)
    assert read.valid["points"][0].tolist() == [True] * 3 + [False] * 3


def test_perception_test_two_frames_are_ambiguous_and_read_as_2_by_n(tmp_path):
    write_perception_test(tmp_path)
    edit_track(tmp_path, frame_ids=[0, 1], points=[[0.2, 0.3], [0.5, 0.6]])
    read = next(perception_test.read(tmp_path, "val", **CLIP))
    assert np.allclose(read.labels["points"][0, :2], [[0.5, 0.2], [0.65, 0.3]], atol=1e-6)


def test_perception_test_frames_are_taken_by_number_and_rate(tmp_path):
    write_perception_test(tmp_path)
    read = next(perception_test.read(tmp_path, "val", frames=3, rate_hz=4.0, side_px=SIDE))
    assert numbers(read.pixels) == [0, 2, 4]


def test_perception_test_videos_without_tracks_are_left_out(tmp_path):
    write_perception_test(tmp_path)
    path = tmp_path / "point_tracking_valid.json"
    entries = json.loads(path.read_text())
    entries["video_8"] = {"metadata": entries["video_7"]["metadata"]}  # other tasks only: no key
    entries["video_9"] = {"metadata": entries["video_7"]["metadata"], "point_tracking": []}
    write_json(path, entries)
    assert perception_test.count(tmp_path, "val") == 1
    assert [sample.id for sample in perception_test.read(tmp_path, "val", **CLIP)] == ["video_7"]


def test_perception_test_empty_and_broken_tracks(tmp_path):
    write_perception_test(tmp_path)
    edit_track(tmp_path, frame_ids=[], points=[])
    (before,) = perception_test.read(tmp_path, "val", **CLIP)  # the other tracks
    edit_track(tmp_path, frame_ids=[0, 1, 2], points=[[float("nan")] * 3, [0.5] * 3])
    (after,) = perception_test.read(tmp_path, "val", **CLIP)
    assert np.array_equal(before.labels["points"], after.labels["points"])
    edit_track(tmp_path, frame_ids=[0], points=[["a"], ["b"]])
    with pytest.raises(UserError, match="a track of video_7 needs frame_ids and points as numbers"):
        list(perception_test.read(tmp_path, "val", **CLIP))


def test_perception_test_refuses_what_does_not_fit(tmp_path):
    write_perception_test(tmp_path)
    with pytest.raises(UserError, match="ends before frame 6; lower clip.frames"):
        next(perception_test.read(tmp_path, "val", frames=16, rate_hz=8.0, side_px=SIDE))
    edit_track(tmp_path, frame_ids=[0, 1, 2], points=[[0.1], [0.2]])
    with pytest.raises(UserError, match=r"track 0 of video_7 has points \(2, 1\) for 3 frames; needed 2 x 3"):
        next(perception_test.read(tmp_path, "val", **CLIP))
    (tmp_path / "videos/video_7.mp4").unlink()
    with pytest.raises(UserError, match="lacks 1 of 1 videos of val, the first is video_7.mp4"):
        perception_test.count(tmp_path, "val")
    with pytest.raises(UserError, match="needed point_tracking_train.json"):
        perception_test.count(tmp_path, "train")


def test_perception_test_tracks_are_found_in_the_file_of_all_tasks(tmp_path):
    write_perception_test(tmp_path)
    (before,) = perception_test.read(tmp_path, "val", **CLIP)
    (tmp_path / "point_tracking_valid.json").rename(tmp_path / "all_valid.json")
    assert perception_test.layout(tmp_path, "val") == "all_valid.json"
    (after,) = perception_test.read(tmp_path, "val", **CLIP)
    assert np.array_equal(before.labels["points"], after.labels["points"])
