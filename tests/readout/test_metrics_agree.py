"""Our metrics against outputs of the reference implementations, against slow versions that you can read, and in known cases.

Every `tapvid_*.npz`, `pose_epe_*.npz` and `depth_*.npz` in tests/fixtures is tried, and in the folders of SCALING4D_FIXTURES.
"""

from pathlib import Path

import numpy as np
import pytest
from official import ROOTS, named

from scaling4d import seeds
from scaling4d.benchmarks.scannet import RANGE_M
from scaling4d.encoders.features import layer_index
from scaling4d.mae.resize import cubic_weights
from scaling4d.readout import metrics

Arrays = dict[str, np.ndarray]


def fixtures(kind: str) -> pytest.MarkDecorator:
    paths = [path for root in ROOTS for path in sorted(root.glob(f"{kind}_*.npz"))]
    assert paths, f"no {kind}_*.npz in {ROOTS}"
    return pytest.mark.parametrize("path", paths, ids=named)


def tapvid_sums(z: Arrays, mode: str, *, video: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    seen = ~z["gt_occluded"][video]
    return metrics.track_sums(
        points=z["pred_tracks"][video] / metrics.RASTER_PX,
        visible=~z["pred_occluded"][video],
        true_points=z["gt_tracks"][video] / metrics.RASTER_PX,
        true_visible=seen,
        evaluated=metrics.evaluated_frames(z["query_points"][video, :, 0], seen, mode=mode),
    )


def of_video(sums: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    return metrics.track_metrics({name: (part.sum(), whole.sum()) for name, (part, whole) in sums.items()})


def theirs(z: Arrays, prefix: str) -> Arrays:
    """The reference's metrics under our names."""
    mine = {"average_pts_within_thresh": "delta_avg"}
    names = [key.removeprefix(prefix) for key in z if key.startswith(prefix)]
    return {mine.get(name, name): z[f"{prefix}{name}"] for name in names if "/" not in name}


@fixtures("tapvid")
@pytest.mark.parametrize("mode", ["first", "strided"])
def test_track_metrics_equal_tapnets_of_videos_and_of_tracks_at_every_threshold(path: Path, mode: str) -> None:
    z = dict(np.load(path))
    for video in range(len(z["gt_occluded"])):
        sums = tapvid_sums(z, mode, video=video)
        for prefix, ours in ((f"{mode}/", of_video(sums)), (f"{mode}/trackwise/", metrics.track_metrics(sums))):
            wanted = theirs(z, prefix)
            assert len(wanted) == 13 and wanted.keys() == ours.keys()
            for name, values in wanted.items():
                np.testing.assert_allclose(ours[name], values[video], atol=1e-6, err_msg=f"{prefix}{name}")


@fixtures("pose_epe")
def test_pose_error_equals_kauldrons(path: Path) -> None:
    z = np.load(path)
    found = [metrics.pose_end_point_error(p, t) for p, t in zip(z["pred"], z["target"], strict=True)]
    np.testing.assert_allclose(found, z["epe"], rtol=1e-6)
    assert abs(np.mean(found) - z["mean_epe"]) < 1e-6


@fixtures("pose_epe")
@pytest.mark.parametrize("given", ["c2w", "w2c"])
@pytest.mark.parametrize("since", ["first", "prev"])
def test_relative_poses_equal_kauldrons(path: Path, given: str, since: str) -> None:
    z = np.load(path)
    poses = np.tile(np.eye(4), (len(z["abs_poses"]), 1, 1))
    poses[:, :3] = z["abs_poses"]
    to_world = poses if given == "c2w" else np.linalg.inv(poses)
    pairs = [(0, t) for t in range(len(poses))] if since == "first" else [(t - 1, t) for t in range(1, len(poses))]
    found = [metrics.relative_pose(to_world, source=source, target=target) for source, target in pairs]
    np.testing.assert_allclose(found, z[f"rel_{given}_raw_{since}"], atol=1e-6)
    away = [pose for pose, (source, target) in zip(found, pairs, strict=True) if source != target]  # else rounding is normalised
    wanted = z[f"rel_{given}_norm_{since}"][len(found) - len(away) :]
    np.testing.assert_allclose([metrics.unit_translation(pose) for pose in away], wanted, atol=1e-6)


@fixtures("depth")
def test_depth_errors_equal_kauldrons(path: Path) -> None:
    z = np.load(path)
    found = metrics.depth_errors(z["pred"], z["target"], z["mask"].astype(bool))
    for ours, reference in (("abs_rel", "absrel_masked_mean"), ("delta1", "delta1_masked_mean")):
        total, count = found[ours]
        assert abs(total / count - z[reference]) < 1e-6


@fixtures("depth")
def test_the_references_mask_is_the_range_that_readers_mark_as_valid(path: Path) -> None:
    z = np.load(path)
    low, high = RANGE_M
    assert np.array_equal(z["mask"], (z["target"] > low) & (z["target"] < high))


def tracks(seed: int = 0) -> Arrays:
    """A video of seven tracks that first appear at different frames, the first of them late, as in the reference's layout."""
    rng = seeds.numpy(seed, "tracks")
    hidden = rng.uniform(size=(1, 7, 16)) < 0.3
    first = np.array([6, 0, 3, 9, 2, 0, 12])
    hidden[0, np.arange(7)[:, None], np.arange(16)] |= np.arange(16) < first[:, None]
    hidden[0, np.arange(7), first] = False
    true = rng.uniform(0, 256, (1, 7, 16, 2))
    return {
        "query_points": np.concatenate([first[None, :, None], true[:, np.arange(7), first, ::-1]], -1),
        "gt_occluded": hidden,
        "gt_tracks": true,
        "pred_occluded": rng.uniform(size=(1, 7, 16)) < 0.3,
        "pred_tracks": true + rng.normal(0, 4, true.shape),
    }


def counted(z: Arrays, px: int, *, frames_of: dict[int, list[int]]) -> float:
    """Jaccard, point by point."""
    right = wrong = there = 0
    for q, frames in frames_of.items():
        for t in frames:
            shown, seen = not z["pred_occluded"][0, q, t], not z["gt_occluded"][0, q, t]
            near = np.hypot(*(z["pred_tracks"] - z["gt_tracks"])[0, q, t]) < px
            there += seen
            right += seen and shown and near
            wrong += shown and not (seen and near)
    return right / (there + wrong)


def test_what_comes_before_the_query_counts_in_strided_and_not_in_first() -> None:
    z = tracks()
    asked = z["query_points"][0, :, 0].astype(int)
    for mode, frames_of in (
        ("first", {q: list(range(at + 1, 16)) for q, at in enumerate(asked)}),
        ("strided", {q: [t for t in range(16) if t != at] for q, at in enumerate(asked)}),
    ):
        found = of_video(tapvid_sums(z, mode))
        for px in metrics.TRACK_THRESHOLDS_PX:
            assert abs(found[f"jaccard_{px}"] - counted(z, px, frames_of=frames_of)) < 1e-12


def test_legacy_counts_the_frames_before_the_query_as_the_notebook_does() -> None:
    """There the frame from which on to measure is looked up along the tracks: of the first track ever seen, number 0."""
    z = tracks()
    assert of_video(tapvid_sums(z, "legacy")) == of_video(tapvid_sums(z, "strided"))
    assert of_video(tapvid_sums(z, "legacy"))["average_jaccard"] < of_video(tapvid_sums(z, "first"))["average_jaccard"] - 0.02
    z["gt_occluded"][0, :2] = True
    asked = z["query_points"][0, :, 0].astype(int)
    index = np.where(~z["gt_occluded"][0])[0][0]
    assert index == 2
    frames_of = {q: [t for t in range(16) if t != asked[q]] for q in range(index, 7)}
    found = of_video(tapvid_sums(z, "legacy"))
    for px in metrics.TRACK_THRESHOLDS_PX:
        assert abs(found[f"jaccard_{px}"] - counted(z, px, frames_of=frames_of)) < 1e-12


def test_an_unknown_query_mode_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match="query mode 'last'; needed first, strided or legacy"):
        metrics.evaluated_frames(np.zeros(1), np.ones((1, 4), bool), mode="last")


def test_queries_in_frame_0_are_measured_alike_in_all_modes() -> None:
    z = tracks()
    z["query_points"][..., 0] = 0
    one, two, three = (of_video(tapvid_sums(z, mode)) for mode in ("first", "strided", "legacy"))
    assert one == two == three


def one_track(offset_px: float, *, seen: bool = True, shown: bool = True) -> dict[str, np.ndarray]:
    """A track of two frames, of which the second is predicted too far to the right."""
    true = np.full((1, 2, 2), 0.25)
    return of_video(
        metrics.track_sums(
            points=true + [offset_px / metrics.RASTER_PX, 0],
            visible=np.array([[True, shown]]),
            true_points=true,
            true_visible=np.array([[True, seen]]),
            evaluated=np.array([[False, True]]),
        )
    )


def test_a_point_at_a_threshold_is_not_within_it() -> None:
    found = one_track(2.0)
    assert [found[f"pts_within_{px}"] for px in metrics.TRACK_THRESHOLDS_PX] == [0, 0, 1, 1, 1]


def test_a_point_shown_too_far_off_is_missed_and_wrong_at_once() -> None:
    two = {"visible": np.array([[True, True, True]]), "true_visible": np.array([[True, True, True]])}
    true = np.full((1, 3, 2), 0.5)
    off = true + np.array([0, 0, 0.5])[None, :, None]
    evaluated = np.array([[False, True, True]])
    found = of_video(metrics.track_sums(points=off, true_points=true, evaluated=evaluated, **two))
    assert found["jaccard_16"] == 1 / 3 and found["pts_within_16"] == 1 / 2


def test_where_a_hidden_point_is_said_to_be_does_not_count_and_that_it_is_hidden_does() -> None:
    hidden = one_track(99.0, seen=False, shown=False)
    assert hidden["occlusion_accuracy"] == 1 and np.isnan(hidden["delta_avg"]) and np.isnan(hidden["average_jaccard"])
    shown = one_track(0.0, seen=False)
    assert shown["average_jaccard"] == 0 and shown["occlusion_accuracy"] == 0


def test_a_video_is_a_ratio_of_sums_and_not_a_mean_of_its_tracks() -> None:
    z = dict(np.load(ROOTS[0] / "tapvid_seed0.npz"))
    sums = tapvid_sums(z, "first")
    assert abs(np.mean(metrics.track_metrics(sums)["average_jaccard"]) - of_video(sums)["average_jaccard"]) > 1e-3


def turned(degrees: float, axis: int) -> np.ndarray:
    """`3 4`, about x (pitch), y (yaw) or z (roll)."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    pose = np.eye(3, 4)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    pose[a, a], pose[a, b], pose[b, a], pose[b, b] = c, -s, s, c
    return pose


def moved(*xyz: float) -> np.ndarray:
    return np.concatenate([np.eye(3), np.array(xyz)[:, None]], 1)


def test_pose_error_of_known_moves() -> None:
    still = np.eye(3, 4)
    assert metrics.pose_end_point_error(moved(1, 0, 0), still) == 1.0
    assert abs(metrics.pose_end_point_error(turned(10, axis=1), still) - 1.410) < 5e-4
    assert abs(metrics.pose_end_point_error(turned(10, axis=2), still) - 1.233) < 5e-4
    assert np.linalg.norm(turned(10, axis=1) - still) < 0.25  # the distance of the twelve numbers is something else


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 0.1, 10.0, 90.0, 179.99, 180.0])
@pytest.mark.parametrize("axis", range(3))
def test_rotation_error_is_the_angle_whatever_the_scale_of_the_prediction(degrees: float, axis: int) -> None:
    start = turned(33, axis=(axis + 1) % 3)
    pose = np.concatenate([turned(degrees, axis)[:, :3] @ start[:, :3] * 1.7, np.ones((3, 1))], 1)
    assert abs(metrics.rotation_error_deg(pose, start) - degrees) < 1e-7 + 1e-6 * (degrees > 170)


def test_translation_error_is_a_distance() -> None:
    assert metrics.translation_error(moved(4, 0, 0), moved(0, 3, 0)) == 5.0


def test_the_nearest_rotation_is_never_a_mirror() -> None:
    rng = seeds.numpy(0, "poses")
    for pose in rng.normal(size=(50, 3, 4)):
        rotation = metrics.nearest_rotation(pose)[:, :3]
        assert np.allclose(rotation @ rotation.T, np.eye(3)) and np.linalg.det(rotation) > 0
        others = [metrics.nearest_rotation(np.pad(rng.normal(size=(3, 3)), ((0, 0), (0, 1))))[:, :3] for _ in range(20)]
        assert min(np.linalg.norm(pose[:, :3] - other) for other in others) >= np.linalg.norm(pose[:, :3] - rotation)


def test_depth_that_is_not_valid_or_negative_is_treated_by_rule() -> None:
    true, valid = np.array([2.0, 2.0, 0.0, np.nan]), np.array([True, True, False, False])
    found = metrics.depth_errors(np.array([2.4, -1.0, 5.0, np.nan]), true, valid)
    assert found["abs_rel"] == (pytest.approx((0.4 + 3.0) / 2), 2.0)  # not clipped here
    assert found["delta1"] == (1.0, 2.0)


def test_a_clip_with_more_valid_pixels_weighs_more() -> None:
    near = metrics.depth_errors(np.full(3, 1.1), np.ones(3), np.ones(3, bool))["abs_rel"]
    far = metrics.depth_errors(np.array([2.0]), np.ones(1), np.ones(1, bool))["abs_rel"]
    assert (near[0] + far[0]) / (near[1] + far[1]) == pytest.approx(1.3 / 4, rel=1e-5)


def test_top1_counts_the_clips_whose_highest_score_is_right() -> None:
    assert metrics.top1(np.array([[0.1, 0.9], [0.8, 0.2], [-1.0, -2.0]]), np.array([1, 1, 0])) == (2.0, 3.0)


def test_box_overlaps_weigh_frames_or_objects_and_leave_out_what_is_not_there() -> None:
    """The first object is there in three frames, overlapping by 1, 1, 0.5; the second in one, by 0; the third never."""
    true = np.tile(np.array([0.0, 0.0, 0.5, 0.5]), (3, 4, 1))
    said = true.copy()
    said[0, 3, 2] = 0.25
    said[1] += 0.5
    present = np.array([[False, True, True, True], [False, False, True, False], [False] * 4])
    found = metrics.box_overlaps(said, true, present)
    assert found == {"mean_iou": (2.5, 4.0), "mean_iou_per_object": (pytest.approx(2.5 / 3), 2.0)}


def test_time_is_resized_as_jax_does() -> None:
    np.testing.assert_allclose(cubic_weights(16, 8)[0, :2].numpy(), [1.088235, -0.088235], atol=1e-6)
    np.testing.assert_allclose(cubic_weights(16, 8)[3, :5].numpy(), [-0.070312, 0.867188, 0.226562, -0.023438, 0], atol=1e-6)


def test_readouts_see_the_released_layer() -> None:
    assert [layer_index(depth=depth, fraction=0.95) for depth in (12, 24, 32, 48, 56)] == [11, 22, 30, 45, 53]
