"""FILLED-IN AND TRUE CLIPS -> FIDELITY: FID, KID, precision and recall of two sets of pictures by torch-fidelity.

The default features need no download: two small video encoders with random weights, one for frames and one for clips.
Their numbers compare models of this project with each other, not with the literature. Where weights are at hand, frames
are also measured on the literature's Inception features, clips on those of a checkpoint, such as a published encoder.
"""

from __future__ import annotations

import importlib
import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scaling4d.encoders import torchvision_shim
from scaling4d.encoders.arrays import check_expansion
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.mae.encoder import Backbone, BackboneConfig, initialise
from scaling4d.records import UserError

RANDOM_ENCODER = {"width": 128, "depth": 2, "heads": 4, "mlp": 512, "pixel_mean": 0.5, "pixel_scale": 2.0}  # ours
PATCH = (2, 8, 8)  # pt ph pw of the random encoders, which divides the clips of all profiles; ours
KID_SUBSETS, KID_SUBSET_SIZE = 100, 100  # torch-fidelity's default is 100 subsets of 1000; smaller ones are ours
NEIGHBOURS = 3  # of precision and recall; arXiv:1904.06991
BATCH = 64  # frames or clips in one pass of an encoder
INCEPTION_LAYER = "2048"  # the layer that defines FID, KID, precision and recall
FRAME_EXTRACTORS = ("frame", "inception")  # on single frames; the others are on clips
METRICS = ("fid", "kid", "precision", "recall")
DIGITS = 9  # the order of sums in linear algebra changes later ones, from one number of threads to another

Extractor = Callable[[Tensor], Tensor]  # uint8 `n T H W 3` (T = 1 for FRAME_EXTRACTORS) -> features `n D`


@dataclass(frozen=True)
class FidelityConfig:
    """Feature extractors.

    inception: file of torch-fidelity's Inception weights; empty: not measured.
    checkpoint: folder of a Checkpoint; empty: not measured.
    """

    inception: str
    checkpoint: str

    def files(self) -> dict[str, Path]:
        """File or folder of the weights by extractor; without the random encoders."""
        paths = {"inception": self.inception, "checkpoint": self.checkpoint}
        return {name: Path(path) for name, path in paths.items() if path}


def load_extractors(config: FidelityConfig, clip: tuple[int, int, int], seed: int, device: str = "cpu") -> dict[str, Extractor]:
    """Feature extractors by name on a device, in float32, for clips of T H W.

    Raises:
        UserError: weights are missing, damaged or of another model; patches do not divide the clip.
    """
    encoders = {}
    for name, size, patch in (("frame", (1, *clip[1:]), (1, *PATCH[1:])), ("clip", clip, PATCH)):
        encoder = Backbone(BackboneConfig(**RANDOM_ENCODER, clip=size, patch=patch))
        initialise(encoder, seed=seed)
        encoder.init_sincos_positions()
        encoders[name] = encoder
    if config.checkpoint:
        encoders["checkpoint"] = load_encoder(Path(config.checkpoint)).eval()
        encoders["checkpoint"].resize(clip)
    extractors: dict[str, Extractor] = {name: partial(_mean_token, encoder.to(device)) for name, encoder in encoders.items()}
    return extractors | ({"inception": load_inception(Path(config.inception), device)} if config.inception else {})


def _mean_token(encoder: Backbone, pixels: Tensor) -> Tensor:
    return torch.cat([encoder.features(part)[-1].mean(1) for part in pixels.split(BATCH)])


def load_inception(path: Path, device: str = "cpu") -> Extractor:
    """The Inception network of FID, from a file of weights in torch-fidelity's layout. No code in the file runs.

    Raises:
        UserError: no such file, not weights, or weights of another network.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; correct reconstruct.Fidelity.inception, or leave it empty")
    check_expansion(path)
    try:
        weights = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is not a file of weights alone: {str(error).splitlines()[0]}") from error
    torchvision_shim.declare_operators()
    network_of = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    with tempfile.NamedTemporaryFile(suffix=".pth") as checked:  # torch-fidelity unpickles: give it only tensors
        torch.save(weights, checked.name)
        try:
            network = network_of("inception", [INCEPTION_LAYER], feature_extractor_weights_path=checked.name)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not fit Inception: {' '.join(str(error).split())[:200]}") from error
    network.to(device)
    return lambda pixels: network(pixels[:, 0].permute(0, 3, 1, 2))[0]


def fidelity(features: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """`<extractor>_<metric>` of features `2 n D` (filled-in, true) by extractor, to DIGITS digits."""
    pairs = {f"{name}_{key}": value for name, pair in features.items() for key, value in compare(*pair).items()}
    return {key: None if value is None else float(f"{value:.{DIGITS}g}") for key, value in pairs.items()}


def compare(filled: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """METRICS of two sets of features `n D` in the same order; None where there are too few samples.

    fid, kid: 0 for equal sets; kid may be slightly negative. precision: share of the filled-in samples near true ones.
    recall: share of the true samples near filled-in ones.
    """
    if len(true) < NEIGHBOURS + 2:
        return dict.fromkeys(METRICS)
    torchvision_shim.declare_operators()  # torch-fidelity imports torchvision
    fid, kid, prc = (importlib.import_module(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "prc"))
    sets = [torch.from_numpy(features) for features in (filled, true)]
    doubles = [features.double() for features in sets]
    frechet = fid.fid_statistics_to_metric(*map(fid.fid_features_to_statistics, doubles), verbose=False)
    size = min(KID_SUBSET_SIZE, len(true))
    kernel = kid.kid_features_to_metric(*doubles, kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False)
    balls = prc.prc_features_to_metric(*sets, prc_neighborhood=NEIGHBOURS, save_cpu_ram=False, verbose=False)
    return {
        "fid": float(frechet[fid.KEY_METRIC_FID]),
        "kid": kernel[kid.KEY_METRIC_KID_MEAN],
        "precision": balls[prc.KEY_METRIC_PRECISION],
        "recall": balls[prc.KEY_METRIC_RECALL],
    }
