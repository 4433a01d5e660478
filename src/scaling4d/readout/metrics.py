"""Metrics of the five benchmarks as pure functions; each gives a sum and a count, so that means are never means of means.

Coordinates are x y in 0..1 of (width, height). Sources: FACTS in the docstrings (tapnet, kauldron).
"""

from __future__ import annotations

import numpy as np

TRACK_THRESHOLDS = tuple(k / 256 for k in (1, 2, 4, 8, 16))  # TAP-Vid: pixels of a 256 x 256 raster
CUBE = np.stack(np.meshgrid([-5.0, 5.0], [-5.0, 5.0], [0.0, 10.0], indexing="ij"), axis=-1).reshape(8, 3)


def track_metrics(
    *, points: np.ndarray, visible: np.ndarray, true_points: np.ndarray, true_visible: np.ndarray, evaluated: np.ndarray
) -> dict[str, float]:
    """Average Jaccard, position accuracy and occlusion accuracy of one video.

    Args:
        points, true_points: `Q T 2`. visible, true_visible, evaluated: bool `Q T`; the query's frame is not evaluated.
    Source: tapnet's compute_tapvid_metrics: strict `<`, mean over five thresholds; 0/0 counts as 0.
    """
    squared = ((points - true_points) ** 2).sum(-1)  # Q T
    seen = true_visible & evaluated
    jaccards, within = [], []
    for threshold in TRACK_THRESHOLDS:
        close = squared < threshold**2
        true_positive = (close & seen & visible).sum()
        false_positive = (visible & evaluated & (~true_visible | ~close)).sum()
        jaccards.append(_ratio(true_positive, seen.sum() + false_positive))
        within.append(_ratio((close & seen).sum(), seen.sum()))
    agree = ((visible == true_visible) & evaluated).sum()
    return {
        "average_jaccard": float(np.mean(jaccards)),
        "delta_avg": float(np.mean(within)),
        "occlusion_accuracy": _ratio(agree, evaluated.sum()),
    }


def box_iou(boxes: np.ndarray, true_boxes: np.ndarray) -> np.ndarray:
    """`... 4` x1 y1 x2 y2 -> `...` intersection over union; a box turned inside out has no area."""
    low = np.maximum(boxes[..., :2], true_boxes[..., :2])
    high = np.minimum(boxes[..., 2:], true_boxes[..., 2:])
    both = np.prod(np.clip(high - low, 0, None), axis=-1)
    area = np.prod(np.clip(boxes[..., 2:] - boxes[..., :2], 0, None), axis=-1)
    true_area = np.prod(np.clip(true_boxes[..., 2:] - true_boxes[..., :2], 0, None), axis=-1)
    return both / np.maximum(area + true_area - both, 1e-12)


def depth_errors(depth_m: np.ndarray, true_m: np.ndarray, valid: np.ndarray) -> dict[str, tuple[float, float]]:
    """Sums and counts over the valid pixels: absolute relative error, and share within a factor of 1.25.

    Source: kauldron's MeanAbsoluteRelativeError (eps 1e-6) and Delta1 (prediction clipped at 0).
    """
    predicted, true = depth_m[valid].astype(np.float64), true_m[valid].astype(np.float64)
    clipped = np.clip(predicted, 0, None)
    ratio = np.maximum(clipped, true) / (np.minimum(clipped, true) + 1e-6)
    count = float(valid.sum())
    return {
        "abs_rel": (float((np.abs(predicted - true) / (true + 1e-6)).sum()), count),
        "delta1": (float((ratio < 1.25).sum()), count),
    }


def relative_pose(camera_to_world: np.ndarray, *, source: int, target: int) -> np.ndarray:
    """`T 4 4` -> `3 4`: takes points of the target camera to the source camera. Source: kauldron's RelativePoses."""
    return (np.linalg.inv(camera_to_world[source]) @ camera_to_world[target])[:3]


def pose_end_point_error(pose: np.ndarray, true_pose: np.ndarray) -> float:
    """Mean distance of the eight corners of a 10-unit cube before the camera, moved by `3 4` pose and true pose.

    Source: kauldron's PoseEndPointError (x, y in -5..5, z in 0..10).
    """
    moved = CUBE @ pose[:, :3].T + pose[:, 3]
    true = CUBE @ true_pose[:, :3].T + true_pose[:, 3]
    return float(np.linalg.norm(moved - true, axis=-1).mean())


def nearest_rotation(pose: np.ndarray) -> np.ndarray:
    """`3 4` with its left 3x3 replaced by the nearest rotation (SVD)."""
    u, _, vt = np.linalg.svd(pose[:, :3])
    return np.concatenate([u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt, pose[:, 3:]], axis=1)


def interval(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator, *, draws: int) -> tuple[float, float]:
    """95 % interval of sum/count by resampling videos (`V` sums and counts) with replacement."""
    chosen = rng.integers(0, len(sums), size=(draws, len(sums)))
    values = sums[chosen].sum(1) / np.maximum(counts[chosen].sum(1), 1e-12)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
