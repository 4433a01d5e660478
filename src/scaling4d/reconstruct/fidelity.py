"""Frechet distance of frames by torch-fidelity, on features that need no download.

The features are those of a small video encoder with fixed random weights that nobody trained: the distance compares models
of this project with each other; it is not the Inception FID of the literature.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from scaling4d import config, vision_operators
from scaling4d.mae.encoder import Encoder, initialise, sincos

BATCH = 64  # frames at a time


@config.configurable
@dataclass(frozen=True)
class Fidelity:
    """The untrained feature encoder: width, depth and heads of its blocks, side of its patches in pixels."""

    width: int
    depth: int
    heads: int
    patch_px: int

    def encoder(self, side_px: int, seed: int) -> Encoder:
        encoder = Encoder(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp=4 * self.width,
            clip=(1, side_px, side_px),
            patch=(1, self.patch_px, self.patch_px),
            gelu="tanh",
            pixel_mean=0.5,
            pixel_scale=2.0,
        )
        initialise(encoder, seed=seed)
        with torch.no_grad():
            encoder.positions.copy_(sincos(encoder.grid, self.width))
        return encoder.requires_grad_(False)


@torch.no_grad()
def frechet_distance(frames: Tensor, true_frames: Tensor, encoder: Encoder) -> float:
    """Between two sets of frames, each uint8 `n H W 3`, on the mean token of each frame."""
    fid = _metric_fid()
    statistics = []
    for part in (frames, true_frames):
        features = torch.cat([encoder.features(some[:, None])[-1].mean(1) for some in part.split(BATCH)])  # n D
        statistics.append(fid.fid_features_to_statistics(features))
    return float(fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID])


def _metric_fid() -> ModuleType:
    """torch-fidelity's Frechet distance; importing it imports torchvision."""
    vision_operators.declare()
    return importlib.import_module("torch_fidelity.metric_fid")
