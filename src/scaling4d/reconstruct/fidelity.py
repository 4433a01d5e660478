"""Frechet distance of frames by torch-fidelity, on features that need no download.

The features are those of a small video encoder with fixed random weights that nobody trained: the distance compares models
of this project with each other; it is not the Inception FID of the literature.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scaling4d import config
from scaling4d.mae.encoder import Encoder, initialise, sincos


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


class Frames(Dataset):
    """uint8 `n H W 3` -> items uint8 `3 H W`, as torch-fidelity wants them."""

    def __init__(self, frames: Tensor) -> None:
        self.frames = frames.permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        return self.frames[index]


def frechet_distance(frames: Tensor, true_frames: Tensor, encoder: Encoder) -> float:
    """Between two sets of frames, each uint8 `n H W 3`, on the encoder's mean token."""
    fidelity = _torch_fidelity()

    class Features(fidelity.FeatureExtractorBase):
        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("mean_token",)

        def forward(self, images: Tensor) -> tuple[Tensor]:
            clips = images.permute(0, 2, 3, 1)[:, None]  # B 1 H W 3
            return (encoder.features(clips)[-1].mean(1).double(),)

    fidelity.register_feature_extractor("untrained-encoder", Features)
    measured = fidelity.calculate_metrics(
        input1=Frames(frames),
        input2=Frames(true_frames),
        fid=True,
        feature_extractor="untrained-encoder",
        feature_layer_fid="mean_token",
        batch_size=64,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    return float(measured["frechet_inception_distance"])


@cache
def _operators() -> torch.library.Library | None:
    """Declares what torchvision needs to be imported beside a CPU build of torch; the cache keeps it alive."""
    library = Path(importlib.util.find_spec("torchvision").origin).parent / "_C.so"
    try:
        torch.ops.load_library(library)
        return None
    except OSError:
        declared = torch.library.Library("torchvision", "DEF")
        declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return declared


def _torch_fidelity() -> ModuleType:
    """torch-fidelity, which imports torchvision."""
    _operators()
    return importlib.import_module("torch_fidelity")
