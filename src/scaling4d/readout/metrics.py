"""Metrics of the five benchmarks as pure functions; each gives a sum and a count, so that means are never means of means.

Coordinates are x y in 0..1 of (width, height). Sources are in the docstrings.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

TRACK_THRESHOLDS_PX = (1, 2, 4, 8, 16)  # TAP-Vid: of a raster of RASTER_PX x RASTER_PX
RASTER_PX = 256
TRACK_AVERAGES = ("average_jaccard", "delta_avg", "occlusion_accuracy")
CUBE = np.stack(np.meshgrid([-5.0, 5.0], [-5.0, 5.0], [0.0, 10.0], indexing="ij"), axis=-1).reshape(8, 3)


def top1(scores: np.ndarray, classes: np.ndarray) -> tuple[float, float]:
    """Right answers and clips. scores: `B K`, the highest is the answer. classes: `B`."""
    return float((scores.argmax(-1) == classes).sum()), float(len(classes))


def evaluated_frames(query_frames: np.ndarray, true_visible: np.ndarray, *, mode: str) -> np.ndarray:
    """bool `Q T`: the frames that TAP-Vid measures of tracks that were asked about in `query_frames` (`Q`, rounded).

    Args:
        mode: "first", only what comes after the query; "strided", all but the query's frame; "legacy", what the Perception Test
            notebook does when it says "first": the frames before the query are not left out, but all tracks before the first one
            that is ever visible are. Use it to compare with numbers from that notebook, which also predicts all points visible.
    Source: tapnet's compute_tapvid_metrics; "legacy": its older version, which indexes tracks where it means frames.
    """
    asked = np.round(query_frames).astype(int)[:, None]
    frames = np.arange(true_visible.shape[1])
    if mode == "first":
        return frames > asked
    if mode == "strided":
        return frames != asked
    if mode == "legacy":
        ever = true_visible.any(1)
        return (frames != asked) & (np.cumsum(ever) > 0)[:, None]
    raise ValueError(f"query mode {mode!r}; needed first, strided or legacy")


def track_sums(
    *, points: np.ndarray, visible: np.ndarray, true_points: np.ndarray, true_visible: np.ndarray, evaluated: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sum and count (`Q` each) of what TAP-Vid measures, track by track: `occlusion_accuracy`, and for each threshold in pixels
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
    """Ratios of sums and counts (of any one shape), and `average_jaccard` and `delta_avg` over the thresholds; 0/0 is NaN."""
    with np.errstate(invalid="ignore"):
        ratios = {name: np.asarray(part, float) / whole for name, (part, whole) in sums.items()}
    return ratios | {
        "average_jaccard": np.mean([ratios[f"jaccard_{px}"] for px in TRACK_THRESHOLDS_PX], axis=0),
        "delta_avg": np.mean([ratios[f"pts_within_{px}"] for px in TRACK_THRESHOLDS_PX], axis=0),
    }


def tracks_by_video(table: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums and counts `V 2` by metric, in which the averages of tracks are those of whole videos, not of their clips.

    They are taken from track_sums, if the table has them; a video in which nothing is measured has the weight 0, others 1.
    Source: tapnet and kauldron, which average over videos; kauldron leaves those without a denominator out.
    """
    names = [f"{kind}_{px}" for kind in ("jaccard", "pts_within") for px in TRACK_THRESHOLDS_PX] + ["occlusion_accuracy"]
    if not set(names) <= set(table):
        return dict(table)
    ratios = track_metrics({name: tuple(table[name].T) for name in names})
    rest = {name: pairs for name, pairs in table.items() if name not in names}
    return rest | {name: np.stack([np.nan_to_num(ratios[name]), np.isfinite(ratios[name])], -1) for name in TRACK_AVERAGES}


def box_iou(boxes: np.ndarray, true_boxes: np.ndarray) -> np.ndarray:
    """`... 4` x1 y1 x2 y2 -> `...` intersection over union; a box turned inside out has no area."""
    low = np.maximum(boxes[..., :2], true_boxes[..., :2])
    high = np.minimum(boxes[..., 2:], true_boxes[..., 2:])
    both = np.prod(np.clip(high - low, 0, None), axis=-1)
    area = np.prod(np.clip(boxes[..., 2:] - boxes[..., :2], 0, None), axis=-1)
    true_area = np.prod(np.clip(true_boxes[..., 2:] - true_boxes[..., :2], 0, None), axis=-1)
    return both / np.maximum(area + true_area - both, 1e-12)


def box_overlaps(boxes: np.ndarray, true_boxes: np.ndarray, present: np.ndarray) -> dict[str, tuple[float, float]]:
    """Sums and counts of IoU: `mean_iou` over all objects and frames together, `mean_iou_per_object` over means of objects.

    Args:
        boxes, true_boxes: `Q T 4`. present: bool `Q T`, labelled and not given (the first frame is).
    Source: InternVideo-Next's account of 4DS's protocol (all objects and frames but the first); objects each with the same
    weight as in Perception Test's notebook.
    """
    iou = box_iou(boxes, true_boxes)
    of_objects = [one[there].mean() for one, there in zip(iou, present, strict=True) if there.any()]
    return {
        "mean_iou": (float(iou[present].sum()), float(present.sum())),
        "mean_iou_per_object": (float(sum(of_objects)), float(len(of_objects))),
    }


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


def unit_translation(pose: np.ndarray) -> np.ndarray:
    """`3 4` with a translation of length 1, or about 0 where it was. Source: kauldron's RelativePoses, eps 1e-7."""
    return np.concatenate([pose[:, :3], pose[:, 3:] / (np.linalg.norm(pose[:, 3]) + 1e-7)], axis=1)


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


def rotation_error_deg(pose: np.ndarray, true_pose: np.ndarray) -> float:
    """Angle between the rotations of two `3 4`, 0..180; of the nearest rotation where a prediction is none."""
    turn = nearest_rotation(pose)[:, :3] @ nearest_rotation(true_pose)[:, :3].T
    sine = np.linalg.norm([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    return float(np.degrees(np.arctan2(sine, np.trace(turn) - 1)))


def translation_error(pose: np.ndarray, true_pose: np.ndarray) -> float:
    """Distance between the translations of two `3 4`, in units of the scene."""
    return float(np.linalg.norm(pose[:, 3] - true_pose[:, 3]))


def interval(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator, *, draws: int) -> tuple[float, float]:
    """95 % interval of sum/count by resampling videos (`V` sums and counts) with replacement."""
    chosen = rng.integers(0, len(sums), size=(draws, len(sums)))
    values = sums[chosen].sum(1) / np.maximum(counts[chosen].sum(1), 1e-12)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
