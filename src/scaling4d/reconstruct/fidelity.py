"""How near filled-in frames and clips lie to true ones as sets: FID, KID, precision and recall by torch-fidelity.

By default on features that need no download: those of small video encoders with fixed random weights that nobody trained, one for
frames and one for whole clips. These numbers compare models of this project with each other; they are not those of the
literature. Where its weights are at hand, frames are also measured on Inception's features, as the literature does it, and
clips on those of a checkpoint, such as a published encoder.
"""

from __future__ import annotations

import importlib
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from scaling4d import config, vision_operators
from scaling4d.mae.build import encoder_of, load
from scaling4d.mae.encoder import Encoder, initialise, sincos
from scaling4d.records import UserError

BATCH = 64  # frames at a time
INCEPTION_LAYER = "2048"  # the one that FID, KID, precision and recall are defined on
FRAMES = ("frame", "inception")  # extractors that see single frames; the others see whole clips
METRICS = ("fid", "kid", "precision", "recall")

Extractor = Callable[[Tensor], Tensor]


@config.configurable
@dataclass(frozen=True)
class Fidelity:
    """The untrained feature encoders: width, depth and heads of their blocks, patches in frames and pixels.

    inception: file of torch-fidelity's Inception weights; checkpoint: folder of a Checkpoint; empty: not measured.
    subsets, subset_size: of KID, smaller where there are fewer samples. neighbours: that make a ball of precision and recall.
    """

    width: int
    depth: int
    heads: int
    patch_frames: int
    patch_px: int
    inception: str
    checkpoint: str
    subsets: int
    subset_size: int
    neighbours: int

    def files(self) -> dict[str, Path]:
        """What the features are read from, by extractor."""
        found = {"inception": self.inception, "checkpoint": self.checkpoint}
        return {name: Path(path) for name, path in found.items() if path}

    def extractors(self, clip: tuple[int, int, int], seed: int) -> dict[str, Extractor]:
        """By name, from uint8 `n T H W 3` (T = 1 for those of FRAMES) to features `n D`.

        Raises:
            UserError: weights that are missing or that are not what they should be.
        """
        _, height, width = clip
        found = {
            "frame": _mean_token(self._untrained((1, height, width), (1, self.patch_px, self.patch_px), seed)),
            "clip": _mean_token(self._untrained(clip, (self.patch_frames, self.patch_px, self.patch_px), seed)),
        }
        if self.inception:
            found["inception"] = inception(Path(self.inception))
        if self.checkpoint:
            encoder = encoder_of(load(Path(self.checkpoint))).eval()
            encoder.resize(clip)
            found["checkpoint"] = _mean_token(encoder)
        return found

    def _untrained(self, clip: tuple[int, int, int], patch: tuple[int, int, int], seed: int) -> Encoder:
        encoder = Encoder(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp=4 * self.width,
            clip=clip,
            patch=patch,
            gelu="tanh",
            pixel_mean=0.5,
            pixel_scale=2.0,
        )
        initialise(encoder, seed=seed)
        with torch.no_grad():
            encoder.positions.copy_(sincos(encoder.grid, self.width))
        return encoder.requires_grad_(False)

    def compare(self, filled: Tensor, true: Tensor) -> dict[str, float | None]:
        """METRICS of two sets of features, each `n D`, in the same order; None where there are too few samples.

        fid, kid: 0 for equal sets (kid may be slightly below). precision: share of filled ones among the true ones; recall: share
        of the true ones among the filled ones.
        """
        if len(true) < self.neighbours + 2:
            return dict.fromkeys(METRICS)
        fid, kid, prc = (_metric(name) for name in ("fid", "kid", "prc"))
        statistics = (fid.fid_features_to_statistics(part.double()) for part in (filled, true))
        kernel = kid.kid_features_to_metric(
            filled.double(),
            true.double(),
            kid_subsets=self.subsets,
            kid_subset_size=min(self.subset_size, len(true)),
            verbose=False,
        )
        balls = prc.prc_features_to_metric(filled, true, prc_neighborhood=self.neighbours, save_cpu_ram=False, verbose=False)
        return {
            "fid": float(fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]),
            "kid": kernel[kid.KEY_METRIC_KID_MEAN],
            "precision": balls[prc.KEY_METRIC_PRECISION],
            "recall": balls[prc.KEY_METRIC_RECALL],
        }


def inception(path: Path) -> Extractor:
    """The network of the literature, with weights from a file in torch-fidelity's layout, which runs nothing of what it holds.

    Raises:
        UserError: no such file, not weights, or those of another network.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; correct reconstruct.Fidelity.inception, or leave it empty")
    try:
        weights = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is not a file of weights alone: {str(error).splitlines()[0]}") from error
    vision_operators.declare()
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    with tempfile.NamedTemporaryFile(suffix=".pth") as checked:  # it loads its file itself, and would run what a file holds
        torch.save(weights, checked.name)
        try:
            network = module.FeatureExtractorInceptionV3(
                "inception", [INCEPTION_LAYER], feature_extractor_weights_path=checked.name
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not fit Inception: {' '.join(str(error).split())[:200]}") from error
    return lambda pixels: network(pixels[:, 0].permute(0, 3, 1, 2))[0]


def _mean_token(encoder: nn.Module) -> Extractor:
    return lambda pixels: torch.cat([encoder.features(some)[-1].mean(1) for some in pixels.split(BATCH)])


def _metric(name: str) -> ModuleType:
    """One of torch-fidelity's metrics; importing it imports torchvision."""
    vision_operators.declare()
    return importlib.import_module(f"torch_fidelity.metric_{name}")
