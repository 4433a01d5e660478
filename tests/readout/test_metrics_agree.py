"""Our metrics against outputs of the reference implementations (tests/fixtures)."""

from pathlib import Path

import numpy as np

from scaling4d.mae.resize import cubic_weights
from scaling4d.readout import metrics
from scaling4d.readout.features import layer_index

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_track_metrics_equal_tapnet() -> None:
    z = np.load(FIXTURES / "tapvid_seed0.npz")
    frames = np.arange(z["gt_occluded"].shape[2])
    asked_at = np.round(z["query_points"][0, :, 0])[:, None]
    for mode, evaluated in (("first", frames > asked_at), ("strided", frames != asked_at)):
        found = metrics.track_metrics(
            points=z["pred_tracks"][0] / 256,
            visible=~z["pred_occluded"][0],
            true_points=z["gt_tracks"][0] / 256,
            true_visible=~z["gt_occluded"][0],
            evaluated=evaluated,
        )
        assert abs(found["average_jaccard"] - z[f"{mode}/average_jaccard"][0]) < 1e-6
        assert abs(found["delta_avg"] - z[f"{mode}/average_pts_within_thresh"][0]) < 1e-6
        assert abs(found["occlusion_accuracy"] - z[f"{mode}/occlusion_accuracy"][0]) < 1e-6


def test_pose_error_equals_kauldron() -> None:
    z = np.load(FIXTURES / "pose_epe_seed0.npz")
    found = [metrics.pose_end_point_error(p, t) for p, t in zip(z["pred"], z["target"], strict=True)]
    np.testing.assert_allclose(found, z["epe"], rtol=1e-6)


def test_pose_error_of_known_moves() -> None:
    still = np.eye(3, 4)
    moved = still.copy()
    moved[0, 3] = 1.0
    yaw = np.deg2rad(10)
    turned = np.array([[np.cos(yaw), 0, np.sin(yaw), 0], [0, 1, 0, 0], [-np.sin(yaw), 0, np.cos(yaw), 0]])
    assert metrics.pose_end_point_error(moved, still) == 1.0
    assert abs(metrics.pose_end_point_error(turned, still) - 1.410) < 5e-4


def test_depth_errors_equal_kauldron() -> None:
    z = np.load(FIXTURES / "depth_seed0.npz")
    found = metrics.depth_errors(z["pred"], z["target"], z["mask"].astype(bool))
    for ours, theirs in (("abs_rel", "absrel_masked_mean"), ("delta1", "delta1_masked_mean")):
        total, count = found[ours]
        assert abs(total / count - z[theirs]) < 1e-6


def test_time_is_resized_as_jax_does() -> None:
    np.testing.assert_allclose(cubic_weights(16, 8)[0, :2].numpy(), [1.088235, -0.088235], atol=1e-6)
    np.testing.assert_allclose(cubic_weights(16, 8)[3, :5].numpy(), [-0.070312, 0.867188, 0.226562, -0.023438, 0], atol=1e-6)


def test_readouts_see_the_released_layer() -> None:
    assert [layer_index(depth=depth, fraction=0.95) for depth in (12, 24, 32, 48, 56)] == [11, 22, 30, 45, 53]
