"""Perception Test, TAP-Vid: track points given in the first frame; average Jaccard, a mean over videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling4d.benchmarks.samples import QUERIES
from scaling4d.config import require_sizes, require_words
from scaling4d.readout import metrics
from scaling4d.readout.heads import Head, Queries
from scaling4d.readout.tasks.task import Metric, MetricSums, Target, Task, first_objects, pad, predict_in_chunks
from scaling4d.records import Sample

VALUES = 4  # x, y, visible, certain
TILES = 8  # released: copies of a query, each for frames / 8 frames
CERTAIN_PX = 6  # of the clip: a closer prediction counts as certain; scivid


@dataclass(frozen=True, kw_only=True)
class Points(Task):
    """Loss: Huber on the distance (weight 100) + visibility and certainty cross-entropies (0.1), as scivid trains.

    tracks: most points of a clip to train on, and points of a query chunk. certain: a point is predicted visible if it
    is probably visible and certain (released), or probably visible (false; ours, for coarse readouts, which are never
    certain). relative: predict the change of the given point (ours), not the point. queries_at: frames of a validation
    video in which points are given, see benchmarks.queries; in training frame 0.
    """

    tracks: int
    certain: bool
    relative: bool
    queries_at: str = field()  # no default

    metric: ClassVar = Metric("average_jaccard", "share", True)
    answer_patch: ClassVar = (TILES, 1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "tracks")
        require_words(self, {"queries_at": tuple(QUERIES)})
        if self.queries_at != "frame_0" and self.test_views[0] > 1:
            raise ValueError(
                f"test_views = {list(self.test_views)}; needed [1, 1] at queries_at = {self.queries_at!r}, all frames"
            )

    def queries(self, clip: tuple[int, int, int]) -> Queries:
        return Queries(coordinates=2, tiles=TILES, out=clip[0] // TILES * VALUES)

    def target(self, sample: Sample) -> Target:
        visible = sample.valid["points"]
        return {
            "points": pad(sample.labels["points"], self.tracks),
            "visible": pad(visible, self.tracks),
            "queried": pad(np.ones(len(visible), bool), self.tracks),
            "side_px": np.array(max(sample.pixels.shape[1:3]), np.float32),
        }

    def train_target(self, sample: Sample) -> Target:
        return first_objects(self.target(sample), self.tracks)

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """`B Q T 4`: x, y in 0..1, logits of visible and certain."""
        given = target["points"][:, :, 0]
        raw = predict_in_chunks(head, features, given, self.tracks)
        points = raw[..., :2] + given[:, :, None] if self.relative else raw[..., :2].sigmoid()
        return torch.cat([points, raw[..., 2:]], dim=-1)

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        queried = target["queried"][..., None].expand(target["visible"].shape)  # B Q T
        seen = (target["visible"] & queried).float()
        distance = (predicted[..., :2] - target["points"]).square().sum(-1).clamp(min=1e-12).sqrt()
        delta = 1 / target["side_px"][:, None, None]
        huber = torch.where(distance < delta, 0.5 * distance.square(), delta * (distance - delta / 2))
        visible = F.binary_cross_entropy_with_logits(predicted[..., 2], seen, reduction="none")
        near = (distance.detach() <= CERTAIN_PX * delta).float()
        certain = F.binary_cross_entropy_with_logits(predicted[..., 3], near, reduction="none")
        queried = queried.float()
        visible = (visible * queried).sum() / queried.sum().clamp(min=1)
        return 100 * (huber * seen).mean() + 0.1 * visible + 0.1 * (certain * seen).mean()

    def visible(self, predicted: np.ndarray) -> np.ndarray:
        """`Q T`: whether each point is predicted visible, and certain where `certain` is set."""
        probability = 1 / (1 + np.exp(-predicted[..., 2:].astype(np.float64)))
        return (probability.prod(-1) if self.certain else probability[..., 0]) > 0.5

    def measure(self, predicted: np.ndarray, target: Target) -> MetricSums:
        frames = np.arange(predicted.shape[1])
        evaluated = (frames > 0) & target["queried"][:, None]  # Q T: strictly after the query, as TAP-Vid's mode `first`
        truth = {"true_points": target["points"], "true_visible": target["visible"], "evaluated": evaluated}
        visible = self.visible(predicted)
        still = np.broadcast_to(target["points"][:, :1], target["points"].shape)
        answers = {"": (predicted[..., :2], visible), metrics.STANDING_STILL: (still, np.ones_like(visible))}
        clip = {}
        for end, (points, shown) in answers.items():
            sums = metrics.track_sums(points=points, visible=shown, **truth)
            clip |= {name + end: (float(part.sum()), float(total.sum())) for name, (part, total) in sums.items()}
        ratios = metrics.track_metrics(clip)
        for name in ("average_jaccard", "delta_avg"):  # of this clip; a result's: metrics.average_tracks_by_video
            clip[name] = (float(np.nan_to_num(ratios[name])), float(np.isfinite(ratios[name])))
        seen = target["visible"] & evaluated
        distance_px = metrics.RASTER_PX * np.linalg.norm(predicted[..., :2] - target["points"], axis=-1)
        still_px = metrics.RASTER_PX * np.linalg.norm(still - target["points"], axis=-1)
        for name, distance in (("distance_px256", distance_px), ("distance_px256_standing_still", still_px)):
            clip[name] = (float(distance[seen].sum()), float(seen.sum()))
        return clip
