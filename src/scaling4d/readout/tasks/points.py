"""Perception Test, TAP-Vid: follow points given in the first frame; average Jaccard, a mean over videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling4d import config
from scaling4d.readout import metrics
from scaling4d.readout.heads import Head
from scaling4d.readout.tasks.task import Measure, first, in_parts, pad
from scaling4d.records import Sample

VALUES = 4  # x, y, visible, certain
CERTAIN_PX = 6  # a prediction within 6 of RASTER_PX pixels counts as certain


@config.configurable
@dataclass(frozen=True)
class Points:
    """tracks: at most so many a clip are learned, and so many are asked about at a time.

    tiles: a query is asked so often, each time for frames / tiles frames (released: 8).

    certain: a point counts as shown if it is likely to be visible and (released) certain to be near; false: visible alone (ours),
    for readouts so coarse that they are never certain. relative: predict what is added to the given point (ours), not the point.
    queries: in which frames of a validation video points are asked about, see benchmarks.queries; in training it is frame 0.

    Loss: Huber on the distance (weight 100) + visibility and certainty cross-entropies (0.1), as scivid trains its readout.
    """

    tracks: int
    tiles: int
    rate_hz: float
    views: tuple[str, ...]
    certain: bool
    relative: bool
    queries: str

    primary: ClassVar = Measure("average_jaccard", "share", True)
    test_views: ClassVar = (1, 1)

    def head(self, *, features_width: int, clip: tuple[int, int, int]) -> Head:
        out = clip[0] // self.tiles * VALUES
        return config.build(
            Head, features_width=features_width, frames=clip[0], learned=0, out=out, coordinates=2, tiles=self.tiles
        )

    def target(self, sample: Sample) -> dict[str, np.ndarray]:
        visible = sample.valid["points"]
        return {
            "points": pad(sample.labels["points"], self.tracks),
            "visible": pad(visible, self.tracks),
            "asked": pad(np.ones(len(visible), bool), self.tracks),
            "side_px": np.array(max(sample.pixels.shape[1:3]), np.float32),
        }

    def lesson(self, target: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return first(target, self.tracks)

    def predict(self, head: Head, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        """`B Q T 4`: x, y in 0..1, logits of visible and certain."""
        given = target["points"][:, :, 0]
        raw = in_parts(head, features, given, self.tracks)
        points = raw[..., :2] + given[:, :, None] if self.relative else raw[..., :2].sigmoid()
        return torch.cat([points, raw[..., 2:]], dim=-1)

    def loss(self, predicted: Tensor, target: dict[str, Tensor]) -> Tensor:
        asked = target["asked"][..., None].expand(target["visible"].shape)  # B Q T
        seen = (target["visible"] & asked).float()
        distance = (predicted[..., :2] - target["points"]).square().sum(-1).clamp(min=1e-12).sqrt()
        delta = 1 / target["side_px"][:, None, None]
        huber = torch.where(distance < delta, 0.5 * distance.square(), delta * (distance - delta / 2))
        visible = F.binary_cross_entropy_with_logits(predicted[..., 2], seen, reduction="none")
        near = (distance.detach() <= CERTAIN_PX / metrics.RASTER_PX).float()
        certain = F.binary_cross_entropy_with_logits(predicted[..., 3], near, reduction="none")
        asked = asked.float()
        visible = (visible * asked).sum() / asked.sum().clamp(min=1)
        return 100 * (huber * seen).mean() + 0.1 * visible + 0.1 * (certain * seen).mean()

    def measure(self, predicted: np.ndarray, target: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
        shown = 1 / (1 + np.exp(-predicted[..., 2:].astype(np.float64)))
        evaluated = metrics.evaluated_frames(np.zeros(len(predicted)), target["visible"], mode="first")
        evaluated &= target["asked"][:, None]
        sums = metrics.track_sums(
            points=predicted[..., :2],
            visible=(shown.prod(-1) if self.certain else shown[..., 0]) > 0.5,
            true_points=target["points"],
            true_visible=target["visible"],
            evaluated=evaluated,
        )
        clip = {name: (float(part.sum()), float(whole.sum())) for name, (part, whole) in sums.items()}
        ratios = metrics.track_metrics({name: tuple(map(np.float64, pair)) for name, pair in clip.items()})
        averages = {name: ratios[name] for name in ("average_jaccard", "delta_avg")}  # a result's: metrics.tracks_by_video
        seen = target["visible"] & evaluated
        distance_px = metrics.RASTER_PX * np.linalg.norm(predicted[..., :2] - target["points"], axis=-1)
        still_px = metrics.RASTER_PX * np.linalg.norm(target["points"][:, :1] - target["points"], axis=-1)
        return {
            **clip,
            **{name: (float(np.nan_to_num(value)), float(np.isfinite(value))) for name, value in averages.items()},
            "distance_px256": (float(distance_px[seen].sum()), float(seen.sum())),
            "distance_px256_standing_still": (float(still_px[seen].sum()), float(seen.sum())),
        }
