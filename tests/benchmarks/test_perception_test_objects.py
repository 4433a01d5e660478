"""Perception Test's objects: what is written is read back, and the traps of the real download."""

import json
from pathlib import Path

import numpy as np
import pytest
from numbered import H264, SIDE, T, numbers, pictures

from scaling4d import seeds
from scaling4d.benchmarks import perception_test_objects
from scaling4d.records import Sample, UserError

CLIP = {"frames": T, "rate_hz": 8.0, "side_px": SIDE}


def write_objects(root: Path, *, frames: int = T) -> Sample:
    rng = seeds.numpy(0, "objects")
    corner = rng.uniform(0.3, 0.5, (3, frames, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.2, (3, frames, 2))], -1).astype(np.float32)
    there = np.ones((3, frames), bool)
    there[1, 3:] = False
    there[2, 0] = False
    sample = Sample("video_7", "video_7", pictures(frames, height=32, width=48), {"boxes": boxes}, {"boxes": there})
    perception_test_objects.write(root, "val", [sample], **H264)
    return sample


def edit_object(root: Path, number: int = 0, **changes) -> None:
    path = root / "object_tracking_valid.json"
    entries = json.loads(path.read_text())
    entries["video_7"]["object_tracking"][number] |= changes
    path.write_text(json.dumps(entries))  # which may hold NaN


def in_square(boxes: np.ndarray) -> np.ndarray:
    """Of the central square of 32 x 48."""
    return np.clip(boxes * [1.5, 1, 1.5, 1] - [0.25, 0, 0.25, 0], 0, 1)


def test_objects_that_start_in_frame_0_are_read_back(tmp_path):
    written = write_objects(tmp_path)
    assert perception_test_objects.count(tmp_path, "val") == 1
    (read,) = perception_test_objects.read(tmp_path, "val", **CLIP)
    valid = written.valid["boxes"][:2]
    assert np.array_equal(read.valid["boxes"], valid)
    assert np.allclose(read.labels["boxes"][valid], in_square(written.labels["boxes"])[:2][valid], atol=2e-5)
    assert (read.labels["boxes"][~valid] == 0).all() and numbers(read.pixels) == list(range(T))


def test_objects_are_x_then_y_by_corners_with_a_start_box_marked_by_a_one(tmp_path):
    written = write_objects(tmp_path)
    track = json.loads((tmp_path / "object_tracking_valid.json").read_text())["video_7"]["object_tracking"][1]
    assert np.allclose(track["bounding_boxes"], written.labels["boxes"][1, :3], atol=1e-5)  # points are y then x, these are not
    assert (track["frame_ids"], track["initial_tracking_box"]) == ([0, 1, 2], [1, 0, 0])
    assert track["timestamps"] == [0, 125_000, 250_000]


def test_objects_are_labelled_once_a_second_and_valid_only_there(tmp_path):
    write_objects(tmp_path, frames=17)
    stored = [[0.3, 0.3, 0.5, 0.5], [0.4, 0.4, 0.6, 0.6], [0.5, 0.5, 0.7, 0.7]]
    edit_object(tmp_path, frame_ids=[0, 8, 16], bounding_boxes=stored, initial_tracking_box=[1, 0, 0])
    read = next(perception_test_objects.read(tmp_path, "val", frames=9, rate_hz=4.0, side_px=SIDE))
    assert np.nonzero(read.valid["boxes"][0])[0].tolist() == [0, 4, 8]
    assert np.allclose(read.labels["boxes"][0, [0, 4, 8]], in_square(np.array(stored)), atol=1e-6)
    assert numbers(read.pixels)[4] == 8


def test_objects_whose_tracking_starts_later_are_not_asked_about_in_frame_0(tmp_path):
    """The box marked by a 1 is where to start, which is not always the first one."""
    write_objects(tmp_path)
    edit_object(tmp_path, initial_tracking_box=[0, 0, 1, 0, 0, 0])
    (read,) = perception_test_objects.read(tmp_path, "val", **CLIP)
    assert read.valid["boxes"].tolist() == [[True] * 3 + [False] * 3]  # the second object alone


def test_objects_outside_the_square_or_without_an_inside_are_not_there(tmp_path):
    write_objects(tmp_path)
    boxes = [
        [0.3, 0.3, 0.5, 0.5],
        [1.1, 0.2, 1.4, 0.4],
        [0.0, 0.2, 0.16, 0.4],
        [0.5, 0.5, 0.3, 0.6],
        [np.nan] * 4,
        [-1, -1, 2, 2],
    ]
    edit_object(tmp_path, bounding_boxes=boxes)
    read = next(perception_test_objects.read(tmp_path, "val", **CLIP))
    assert read.valid["boxes"][0].tolist() == [True, False, False, False, False, True]
    assert read.labels["boxes"][0, 5].tolist() == [0, 0, 1, 1]


def test_objects_that_are_never_labelled_again_give_no_sample_by_rule(tmp_path):
    write_objects(tmp_path)
    for number in range(3):
        edit_object(tmp_path, number, frame_ids=[0], bounding_boxes=[[0.4, 0.4, 0.6, 0.6]], initial_tracking_box=[1])
    skipped = []
    assert list(perception_test_objects.read(tmp_path, "val", **CLIP, skipped=skipped)) == []
    assert [(item.id, item.bad) for item in skipped] == [("video_7", False)]
    assert "no object of video_7 is labelled in a later frame" in skipped[0].why
    for number in range(3):
        edit_object(tmp_path, number, frame_ids=[], bounding_boxes=[], initial_tracking_box=[])
    assert list(perception_test_objects.read(tmp_path, "val", **CLIP, skipped=skipped)) == []
    assert "no object of video_7 starts in the first frame's square" in skipped[1].why


def test_objects_are_found_in_the_file_of_all_tasks_and_videos_without_any_are_passed_over(tmp_path):
    write_objects(tmp_path)
    path = tmp_path / "object_tracking_valid.json"
    entries = json.loads(path.read_text())
    entries["video_8"] = {"metadata": entries["video_7"]["metadata"], "object_tracking": [], "point_tracking": [{}]}
    entries["video_9"] = {"metadata": entries["video_7"]["metadata"], "mc_question": []}
    (tmp_path / "all_valid.json").write_text(json.dumps(entries))
    path.unlink()
    assert perception_test_objects.layout(tmp_path, "val") == "all_valid.json"
    assert perception_test_objects.count(tmp_path, "val") == 1
    assert [sample.id for sample in perception_test_objects.read(tmp_path, "val", **CLIP)] == ["video_7"]


def test_objects_refuse_what_does_not_fit(tmp_path):
    write_objects(tmp_path)
    edit_object(tmp_path, bounding_boxes=[[0.1, 0.2, 0.3, 0.4]])
    with pytest.raises(UserError, match=r"object 0 of video_7 has boxes \(1, 4\) for 6 frames; needed 6 x 4"):
        list(perception_test_objects.read(tmp_path, "val", **CLIP))
    edit_object(tmp_path, bounding_boxes="none")
    with pytest.raises(UserError, match="an object of video_7 needs frame_ids and bounding_boxes as numbers"):
        list(perception_test_objects.read(tmp_path, "val", **CLIP))
    path = tmp_path / "object_tracking_valid.json"
    entries = json.loads(path.read_text())
    entries["video_7"]["object_tracking"] = []
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="object_tracking_valid.json has no object tracking"):
        perception_test_objects.count(tmp_path, "val")
    with pytest.raises(UserError, match=r"needed object_tracking_train.json \(tracks by video_id\)"):
        perception_test_objects.count(tmp_path, "train")
