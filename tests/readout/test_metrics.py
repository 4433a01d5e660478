"""Metrics against outputs of the reference implementations, against slow versions, and in known cases.

The outputs are `tapvid_*.npz`, `pose_epe_*.npz` and `depth_*.npz` in tests/fixtures and in the folders of
SCALING4D_FIXTURES.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from official import ROOTS, named

from scaling4d import seeds
from scaling4d.benchmarks.scannet import RANGE_M
from scaling4d.encoders.features import layer_index
from scaling4d.readout import metrics

Arrays = dict[str, np.ndarray]


def fixtures(kind: str) -> pytest.MarkDecorator:
    paths = [path for root in ROOTS for path in sorted(root.glob(f"{kind}_*.npz"))]
    assert paths, f"no {kind}_*.npz in {ROOTS}"
    return pytest.mark.parametrize("path", paths, ids=named)


def evaluated_frames(z: Arrays, mode: str, video: int) -> np.ndarray:
    """bool `Q T`, as TAP-Vid's evaluation: after the query (first, ours), or all frames but the query's (strided)."""
    queried, frames = z["query_points"][video, :, 0].astype(int)[:, None], np.arange(z["gt_occluded"].shape[-1])
    return frames > queried if mode == "first" else frames != queried


def tapvid_sums(z: Arrays, mode: str, *, video: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return metrics.track_sums(
        points=z["pred_tracks"][video] / metrics.RASTER_PX,
        visible=~z["pred_occluded"][video],
        true_points=z["gt_tracks"][video] / metrics.RASTER_PX,
        true_visible=~z["gt_occluded"][video],
        evaluated=evaluated_frames(z, mode, video),
    )


def of_video(sums: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    return metrics.track_metrics({name: (part.sum(), whole.sum()) for name, (part, whole) in sums.items()})


def reference(z: Arrays, prefix: str) -> Arrays:
    """The reference's metrics under our names."""
    renamed = {"average_pts_within_thresh": "delta_avg"}
    names = [key.removeprefix(prefix) for key in z if key.startswith(prefix)]
    return {renamed.get(name, name): z[f"{prefix}{name}"] for name in names if "/" not in name}


@fixtures("tapvid")
@pytest.mark.parametrize("mode", ["first", "strided"])
def test_track_metrics_equal_tapnets_of_videos_and_of_tracks_at_every_threshold(path: Path, mode: str) -> None:
    z = dict(np.load(path))
    for video in range(len(z["gt_occluded"])):
        sums = tapvid_sums(z, mode, video=video)
        for prefix, ours in ((f"{mode}/", of_video(sums)), (f"{mode}/trackwise/", metrics.track_metrics(sums))):
            expected = reference(z, prefix)
            assert len(expected) == 13 and expected.keys() == ours.keys()
            for name, values in expected.items():
                np.testing.assert_allclose(ours[name], values[video], rtol=1e-5, err_msg=f"{prefix}{name}")


@fixtures("pose_epe")
def test_relative_poses_and_their_errors_equal_kauldrons(path: Path) -> None:
    z = np.load(path)
    errors = [metrics.pose_end_point_error(p, t) for p, t in zip(z["pred"], z["target"], strict=True)]
    np.testing.assert_allclose(errors, z["epe"], rtol=1e-5)
    poses = np.tile(np.eye(4), (len(z["abs_poses"]), 1, 1))
    poses[:, :3] = z["abs_poses"]
    since = {"first": [(0, t) for t in range(len(poses))], "prev": [(t - 1, t) for t in range(1, len(poses))]}
    for given, to_world in (("c2w", poses), ("w2c", np.linalg.inv(poses))):
        for name, pairs in since.items():
            relative = [metrics.relative_pose(to_world, source=source, target=target) for source, target in pairs]
            np.testing.assert_allclose(relative, z[f"rel_{given}_raw_{name}"], rtol=1e-5, atol=1e-6)


@fixtures("depth")
def test_depth_errors_equal_kauldrons_in_the_range_that_readers_mark_as_valid(path: Path) -> None:
    z = np.load(path)
    low, high = RANGE_M
    assert np.array_equal(z["mask"], (z["target"] > low) & (z["target"] < high))
    for name, (total, count) in metrics.depth_errors(z["pred"], z["target"], z["mask"].astype(bool)).items():
        assert abs(total / count - z[f"{name.replace('_', '')}_masked_mean"]) < 1e-6


def test_a_point_at_a_threshold_is_not_within_it() -> None:
    true, seen = np.full((1, 1, 2), 0.25), np.ones((1, 1), bool)
    masks = {"visible": seen, "true_visible": seen, "evaluated": seen}
    measured = of_video(metrics.track_sums(points=true + [2 / metrics.RASTER_PX, 0], true_points=true, **masks))
    assert [measured[f"pts_within_{px}"] for px in metrics.TRACK_THRESHOLDS_PX] == [0, 0, 1, 1, 1]


def turned(degrees: float, axis: int) -> np.ndarray:
    """`3 4`, about x (pitch), y (yaw) or z (roll)."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    pose = np.eye(3, 4)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    pose[a, a], pose[a, b], pose[b, a], pose[b, b] = c, -s, s, c
    return pose


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 0.1, 10.0, 90.0, 179.99, 180.0])
@pytest.mark.parametrize("axis", range(3))
def test_rotation_error_is_the_angle_whatever_the_scale_of_the_prediction(degrees: float, axis: int) -> None:
    start = turned(33, axis=(axis + 1) % 3)
    pose = np.concatenate([turned(degrees, axis)[:, :3] @ start[:, :3] * 1.7, np.ones((3, 1))], 1)
    assert abs(metrics.rotation_error_deg(pose, start) - degrees) < 1e-7 + 1e-6 * (degrees > 170)


def test_the_nearest_rotation_is_never_a_mirror() -> None:
    rng = seeds.numpy_rng(0, "poses")
    for pose in rng.normal(size=(50, 3, 4)):
        rotation = metrics.nearest_rotation(pose)[:, :3]
        assert np.allclose(rotation @ rotation.T, np.eye(3)) and np.linalg.det(rotation) > 0
        others = [metrics.nearest_rotation(np.pad(rng.normal(size=(3, 3)), ((0, 0), (0, 1))))[:, :3] for _ in range(20)]
        assert min(np.linalg.norm(pose[:, :3] - other) for other in others) >= np.linalg.norm(pose[:, :3] - rotation)


def test_invalid_depth_is_left_out_and_negative_depth_is_clipped_for_delta1() -> None:
    true, valid = np.array([2.0, 2.0, 0.0, np.nan]), np.array([True, True, False, False])
    measured = metrics.depth_errors(np.array([2.4, -1.0, 5.0, np.nan]), true, valid)
    assert measured["abs_rel"] == (pytest.approx((0.4 + 3.0) / 2), 2.0)  # not clipped here
    assert measured["delta1"] == (1.0, 2.0)


def test_box_overlaps_weigh_frames_or_objects_and_leave_absent_ones_out() -> None:
    """The first object is there in three frames, overlapping by 1, 1, 0.5; the second in one, by 0; the third never."""
    true = np.tile(np.array([0.0, 0.0, 0.5, 0.5]), (3, 4, 1))
    predicted = true.copy()
    predicted[0, 3, 2] = 0.25
    predicted[1] += 0.5
    present = np.array([[False, True, True, True], [False, False, True, False], [False] * 4])
    measured = metrics.box_overlaps(predicted, true, present)
    assert measured == {"mean_iou": (2.5, 4.0), "mean_iou_per_object": (pytest.approx(2.5 / 3), 2.0)}


@pytest.mark.parametrize(("box", "true_box", "iou", "generalised"), [
    ((0, 0, 2, 2), (0, 0, 2, 2), 1, 1),  # the same
    ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7, 1 / 7 - 2 / 9),  # overlap: 1 of 7, in a square of 9
    ((0, 0, 1, 1), (2, 0, 3, 1), 0, -1 / 3),  # apart: 2 of 3 are covered
    ((0, 0, 1, 1), (9, 9, 10, 10), 0, -98 / 100),  # far apart
    ((1, 1, 2, 2), (0, 0, 4, 4), 1 / 16, 1 / 16),  # one in the other
    ((1, 1, 1, 3), (0, 0, 4, 4), 0, 0),  # a line in a box
    ((5, 0, 5, 4), (0, 0, 4, 4), 0, -4 / 20),  # a line beside a box
    ((2, 2, 0, 0), (0, 0, 4, 4), 0, 0),  # turned inside out
    ((1, 1, 1, 1), (1, 1, 1, 1), 0, 0),  # two points at one place
    ((1, 1, 1, 1), (3, 3, 3, 3), 0, -1),  # two points
])  # fmt: skip
def test_iou_and_generalised_iou_of_boxes_by_hand_with_finite_gradients(box, true_box, iou, generalised) -> None:
    boxes = torch.tensor(box, dtype=torch.float32, requires_grad=True)
    both = metrics.box_ious(boxes, torch.tensor(true_box, dtype=torch.float32))
    assert [value.item() for value in both] == pytest.approx([iou, generalised])
    both[1].backward()
    assert boxes.grad.isfinite().all()


def test_generalised_iou_pulls_a_box_that_is_apart_towards_the_true_one() -> None:
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0], requires_grad=True)
    metrics.box_ious(boxes, torch.tensor([2.0, 0.0, 3.0, 1.0]))[1].backward()
    assert boxes.grad[2] > 0  # to the right


def test_readouts_see_the_released_layer() -> None:
    assert [layer_index(depth=depth, fraction=0.95) for depth in (12, 24, 32, 48, 56)] == [11, 22, 30, 45, 53]
