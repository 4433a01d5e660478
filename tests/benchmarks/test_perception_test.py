"""Perception Test, points and objects: what is written is read back, and the traps of the real download."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.writers import write_objects
from numbered import CLIP, H264, T, in_square, left_out, missing, numbers, pictures, read, refused, three_boxes

from scaling4d import seeds
from scaling4d.benchmarks import perception_test, perception_test_objects
from scaling4d.records import Sample

POINTS, OBJECTS = "point_tracking", "object_tracking"
BOTH = pytest.mark.parametrize(("benchmark", "kind"), [(perception_test, POINTS), (perception_test_objects, OBJECTS)])


@pytest.fixture
def points(tmp_path: Path) -> Sample:
    visible = np.ones((4, T), bool)
    visible[1, 2:4] = visible[2, 0] = False
    xy = seeds.numpy_rng(0, "points").uniform(0.1, 0.9, (4, T, 2)).astype(np.float32)
    sample = Sample("video_7", "video_7", pictures(height=32, width=48), {"points": xy}, {"points": visible})
    perception_test.write(tmp_path, "val", [sample], **H264)
    return sample


@pytest.fixture
def objects(tmp_path: Path) -> Sample:
    write_objects(tmp_path, "val", [three_boxes("video_7")], **H264)
    return three_boxes("video_7")


def edit(root: Path, kind: str, change: Callable[[dict], None]) -> None:
    path = root / f"{kind}_valid.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))  # which may hold NaN


def edit_track(root: Path, kind: str, number: int = 0, **changes) -> None:
    edit(root, kind, lambda entries: entries["video_7"][kind][number].update(changes))


def test_perception_test_reads_back_the_tracks_of_frame_0(tmp_path, points):
    (sample,) = read(perception_test, tmp_path, "val")
    expected = in_square(points.labels["points"])
    visible = points.valid["points"] & ((expected >= 0) & (expected < 1)).all(-1)
    started = visible[:, 0]
    assert not started[2] and started.any()
    assert np.array_equal(sample.valid["points"], visible[started])
    assert np.allclose(sample.labels["points"][visible[started]], expected[started][visible[started]], atol=2e-5)
    assert (sample.labels["points"][~visible[started]] == 0).all()
    (slow,) = read(perception_test, tmp_path, "val", replace(CLIP, frames=3, rate_hz=4.0))
    assert numbers(sample.pixels) == list(range(T)) and numbers(slow.pixels) == [0, 2, 4]


@pytest.mark.parametrize(("frames", "transposed"), [(3, False), (3, True), (2, False)])
def test_perception_test_takes_points_y_then_x_as_2_by_n_and_as_n_by_2(tmp_path, points, frames, transposed):
    """Two frames are ambiguous, and read as 2 by n."""
    yx = np.array([[0.2, 0.3, 0.4], [0.5, 0.6, 0.7]])[:, :frames]
    edit_track(tmp_path, POINTS, frame_ids=list(range(frames)), points=(yx.T if transposed else yx).tolist())
    (sample,) = read(perception_test, tmp_path, "val")
    assert np.allclose(sample.labels["points"][0, :frames], in_square(yx[::-1].T), atol=1e-6)
    assert sample.valid["points"][0].tolist() == [True] * frames + [False] * (T - frames)


def test_perception_test_tracks_without_frames_or_numbers_change_no_other_track(tmp_path, points):
    edit_track(tmp_path, POINTS, frame_ids=[], points=[])
    (before,) = read(perception_test, tmp_path, "val")
    for ids, yx in (([0, 1], [[np.nan] * 2, [0.5] * 2]), ([-T, 10**7], [[0.5] * 2] * 2)):  # or without frames of this video
        edit_track(tmp_path, POINTS, frame_ids=ids, points=yx)
        (after,) = read(perception_test, tmp_path, "val")
        assert np.array_equal(before.labels["points"], after.labels["points"])


def test_objects_are_labelled_once_a_second_x_then_y_and_valid_only_there(tmp_path):
    write_objects(tmp_path, "val", [three_boxes("video_7", 17)], **H264)
    stored = [[0.3, 0.1, 0.5, 0.4], [0.4, 0.2, 0.6, 0.5], [0.5, 0.3, 0.7, 0.6]]
    edit_track(tmp_path, OBJECTS, frame_ids=[0, 8, 16], bounding_boxes=stored, initial_tracking_box=[1, 0, 0])
    (sample,) = read(perception_test_objects, tmp_path, "val", replace(CLIP, frames=9, rate_hz=4.0))
    assert np.nonzero(sample.valid["boxes"][0])[0].tolist() == [0, 4, 8]
    assert np.allclose(sample.labels["boxes"][0, [0, 4, 8]], in_square(np.array(stored)), atol=1e-6)
    assert numbers(sample.pixels)[4] == 8


def test_objects_whose_tracking_starts_later_are_not_queried_in_frame_0(tmp_path, objects):
    """The box marked by a 1 is where to start, which is not always the first one."""
    edit_track(tmp_path, OBJECTS, initial_tracking_box=[0, 0, 1, 0, 0, 0])
    (sample,) = read(perception_test_objects, tmp_path, "val")
    assert sample.valid["boxes"].tolist() == [[True] * 3 + [False] * 3]  # the second object alone


def test_objects_outside_the_square_or_without_an_inside_are_not_valid(tmp_path, objects):
    outside, inverted = [[1.1, 0.2, 1.4, 0.4], [0.0, 0.2, 0.16, 0.4]], [0.5, 0.5, 0.3, 0.6]
    boxes = [[0.3, 0.3, 0.5, 0.5], *outside, inverted, [np.nan] * 4, [-1, -1, 2, 2]]
    edit_track(tmp_path, OBJECTS, bounding_boxes=boxes)
    (sample,) = read(perception_test_objects, tmp_path, "val")
    assert sample.valid["boxes"][0].tolist() == [True, False, False, False, False, True]
    assert sample.labels["boxes"][0, 5].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("boxes", "expected"), [
    ([[0.4, 0.4, 0.6, 0.6]], "no object of video_7 is labelled in a later frame"),
    ([], "no object of video_7 starts in the first frame's square"),
])  # fmt: skip
def test_objects_that_are_not_labelled_again_or_never_give_no_sample_by_rule(tmp_path, objects, boxes, expected):
    changes = {"frame_ids": [0] * len(boxes), "bounding_boxes": boxes, "initial_tracking_box": [1] * len(boxes)}
    for number in range(3):
        edit_track(tmp_path, OBJECTS, number, **changes)
    ((video_id, bad, why),) = left_out(perception_test_objects, tmp_path, "val")
    assert (video_id, bad) == ("video_7", False) and expected in why


@BOTH
def test_tracks_may_be_in_the_file_of_all_tasks_and_videos_without_any_are_passed_over(tmp_path, request, benchmark, kind):
    request.getfixturevalue("points" if kind == POINTS else "objects")

    def add(entries: dict) -> None:
        metadata = entries["video_7"]["metadata"]
        entries["video_8"] = {"metadata": metadata, kind: [], "other_tracking": [{}]}
        entries["video_9"] = {"metadata": metadata, "mc_question": []}

    edit(tmp_path, kind, add)
    (tmp_path / f"{kind}_valid.json").rename(tmp_path / "all_valid.json")
    samples = benchmark.open_split(tmp_path, "val", CLIP)
    assert samples.layout == "all_valid.json" and [sample.id for sample in samples] == ["video_7"]


def test_perception_test_refuses_what_does_not_fit(tmp_path, points):
    refused("ends before frame 6; lower frames or raise rate_hz", perception_test, tmp_path, "val", replace(CLIP, frames=16))
    (tmp_path / "videos/video_7.mp4").unlink()
    assert missing(perception_test, tmp_path, "val").endswith("lacks 1 of 1 videos of val, the first is video_7.mp4")


@pytest.mark.parametrize(("kind", "changes", "expected"), [
    (POINTS, {"points": [[0.1], [0.2]]}, r"track 0 of video_7 has points \(2, 1\) for 6 frames; needed 2 x 6"),
    (POINTS, {"points": [["a"], ["b"]]}, "a track of video_7 needs frame_ids and points as numbers"),
    (OBJECTS, {"bounding_boxes": [[0.1] * 4]}, r"object 0 of video_7 has boxes \(1, 4\) for 6 frames; needed 6 x 4"),
    (OBJECTS, {"bounding_boxes": "none"}, "an object of video_7 needs frame_ids and bounding_boxes as numbers"),
])  # fmt: skip
def test_tracks_that_do_not_fit_are_refused(tmp_path, request, kind, changes, expected):
    request.getfixturevalue("points" if kind == POINTS else "objects")
    benchmark = perception_test if kind == POINTS else perception_test_objects
    edit_track(tmp_path, kind, **({"frame_ids": list(range(T))} | changes))
    refused(expected, benchmark, tmp_path, "val")
    edit(tmp_path, kind, lambda entries: entries["video_7"].update({kind: []}))
    refused(f"{kind}_valid.json has no {kind.replace('_', ' ')}", benchmark, tmp_path, "val")


@pytest.mark.parametrize(("change", "expected"), [
    (lambda e: e["video_7"]["metadata"].update(resolution=3), "_valid.json: the metadata of video_7 needs a frame_rate"),
    (lambda e: e["video_7"]["metadata"].update(num_frames=10**9), "_valid.json: the metadata of video_7 needs num_frames in 1"),
    (lambda e: e.update({"../x": e["video_7"]}), "object_tracking_valid.json: '../x' is not the name of a video"),
])  # fmt: skip
def test_entries_that_name_no_video_or_one_without_length_are_refused(tmp_path, objects, change, expected):
    edit(tmp_path, OBJECTS, change)
    refused(expected, perception_test_objects, tmp_path, "val")
