"""Metrics of the benchmarks as pure functions.

Most give a sum and a count, so a clip weighs by its number of measurements. Two are means of means: TAP-Vid's averages
over videos, and `mean_iou_per_object` over objects.

Coordinates are x y in 0..1 of (width, height).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

TRACK_THRESHOLDS_PX = (1, 2, 4, 8, 16)  # TAP-Vid: of a raster of RASTER_PX x RASTER_PX
RASTER_PX = 256
TRACK_AVERAGES = ("average_jaccard", "delta_avg", "occlusion_accuracy")
STANDING_STILL = "_standing_still"  # ends the names of the trivial answer's metrics: every point stays and is visible
CUBE = np.stack(np.meshgrid([-5.0, 5.0], [-5.0, 5.0], [0.0, 10.0], indexing="ij"), axis=-1).reshape(8, 3)


def track_sums(
    *, points: np.ndarray, visible: np.ndarray, true_points: np.ndarray, true_visible: np.ndarray, evaluated: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums and counts (`Q` each) of TAP-Vid, track by track: `occlusion_accuracy`, and for each threshold in pixels
    `jaccard_<px>` and `pts_within_<px>`. Sum them up over the tracks of a video, then take `track_metrics`.

    Args:
        points, true_points: `Q T 2`. visible, true_visible, evaluated: bool `Q T`.
    Source: tapnet's compute_tapvid_metrics: strict `<`; a point that is shown too far off is a false positive, too.
    """
    squared = ((points - true_points) ** 2).sum(-1)  # Q T
    seen = true_visible & evaluated
    sums = {"occlusion_accuracy": (((visible == true_visible) & evaluated).sum(1), evaluated.sum(1))}
    for px in TRACK_THRESHOLDS_PX:
        close = squared < (px / RASTER_PX) ** 2
        false_positive = visible & evaluated & (~true_visible | ~close)
        sums[f"jaccard_{px}"] = ((close & seen & visible).sum(1), seen.sum(1) + false_positive.sum(1))
        sums[f"pts_within_{px}"] = ((close & seen).sum(1), seen.sum(1))
    return sums


def track_metrics(sums: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Ratios of sums and counts, with `average_jaccard` and `delta_avg` over the thresholds; 0/0 is NaN."""
    with np.errstate(invalid="ignore"):
        ratios = {name: np.asarray(total, float) / count for name, (total, count) in sums.items()}
    return ratios | {
        "average_jaccard": np.mean([ratios[f"jaccard_{px}"] for px in TRACK_THRESHOLDS_PX], axis=0),
        "delta_avg": np.mean([ratios[f"pts_within_{px}"] for px in TRACK_THRESHOLDS_PX], axis=0),
    }


def average_tracks_by_video(table: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums and counts `V 2` by metric, in which the averages of tracks are those of whole videos, not of their clips.

    They come from track_sums, if the table has them, also under names that end in STANDING_STILL. A video in which
    nothing is measured has the weight 0, others 1.
    Source: tapnet and kauldron, which average over videos; kauldron leaves those without a denominator out.
    """
    averaged = dict(table)
    names = [f"{kind}_{px}" for kind in ("jaccard", "pts_within") for px in TRACK_THRESHOLDS_PX] + ["occlusion_accuracy"]
    for end in ("", STANDING_STILL):
        if {name + end for name in names} <= set(table):
            ratios = track_metrics({name: tuple(averaged.pop(name + end).T) for name in names})
            for name in TRACK_AVERAGES:
                averaged[name + end] = np.stack([np.nan_to_num(ratios[name]), np.isfinite(ratios[name])], -1)
    return averaged


def box_ious(boxes: Tensor, true_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """`... 4` x1 y1 x2 y2 -> `...` IoU, 0..1, and generalised IoU, -1..1; a box turned inside out has no area.

    Generalised: less the share of the smallest rectangle around both that neither covers (arXiv:1902.09630).
    """
    (low, high), (true_low, true_high) = (box.split(2, -1) for box in (boxes, true_boxes))
    inner = (torch.maximum(low, true_low), torch.minimum(high, true_high))
    outer = (torch.minimum(low, true_low), torch.maximum(high, true_high))
    sides = ((b - a).clamp(min=0) for a, b in (inner, outer, (low, high), (true_low, true_high)))
    both, around, area, true_area = (side[..., 0] * side[..., 1] for side in sides)
    union = area + true_area - both
    iou = both / union.clamp(min=1e-12)
    return iou, iou - (around - union) / around.clamp(min=1e-12)


def box_overlaps(boxes: np.ndarray, true_boxes: np.ndarray, present: np.ndarray) -> dict[str, tuple[float, float]]:
    """Sums and counts of IoU: `mean_iou` over all objects and frames, `mean_iou_per_object` over means of objects.

    Args:
        boxes, true_boxes: `Q T 4`. present: bool `Q T`, labelled, without the frame of the queries (the first).
    Source: InternVideo-Next's account of 4DS's protocol (all objects and frames but the first); Perception Test's
    notebook (objects each with the same weight).
    """
    iou = box_ious(torch.tensor(boxes), torch.tensor(true_boxes))[0].numpy()
    of_objects = [one[there].mean() for one, there in zip(iou, present, strict=True) if there.any()]
    return {
        "mean_iou": (float(iou[present].sum()), float(present.sum())),
        "mean_iou_per_object": (float(sum(of_objects)), float(len(of_objects))),
    }


def depth_errors(depth_m: np.ndarray, true_m: np.ndarray, valid: np.ndarray) -> dict[str, tuple[float, float]]:
    """Sums and counts over the valid pixels: AbsRel (`abs_rel`), and the share within a factor of 1.25 (`delta1`).

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
    moved, true = (CUBE @ p[:, :3].T + p[:, 3] for p in (pose, true_pose))
    return float(np.linalg.norm(moved - true, axis=-1).mean())


def nearest_rotation(pose: np.ndarray) -> np.ndarray:
    """`3 4` with its left 3x3 replaced by the nearest rotation (SVD)."""
    u, _, vt = np.linalg.svd(pose[:, :3])
    return np.concatenate([u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt, pose[:, 3:]], axis=1)


def rotation_error_deg(pose: np.ndarray, true_pose: np.ndarray) -> float:
    """Angle between the rotations of two `3 4`, 0..180; of the nearest rotation where a prediction is none."""
    turn = nearest_rotation(pose)[:, :3] @ nearest_rotation(true_pose)[:, :3].T
    sine = np.linalg.norm([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    return float(np.degrees(np.arctan2(sine, np.trace(turn) - 1)))


def interval(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator, *, draws: int) -> tuple[float, float]:
    """95 % interval of sum/count by resampling videos (`V` sums and counts) with replacement."""
    chosen = rng.integers(0, len(sums), size=(draws, len(sums)))
    values = sums[chosen].sum(1) / np.maximum(counts[chosen].sum(1), 1e-12)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
