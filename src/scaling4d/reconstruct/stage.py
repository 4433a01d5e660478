"""Stage `reconstruct`: fill in the hidden pixels of masked validation clips and measure them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scaling4d import artifacts, checkpoint, config, provenance, seeds
from scaling4d.clips import loader
from scaling4d.encoders.load import load_model
from scaling4d.mae.masking import hidden_pixels, random_masking
from scaling4d.reconstruct.fidelity import FRAME_EXTRACTORS, Extractor, FidelityConfig, fidelity, load_extractors
from scaling4d.records import MaskedTokens, write_json
from scaling4d.training.distributed import gather_round_robin, run

MASK_RATIO = 0.9  # of random masking, one for all methods; MAE-ST, arXiv:2205.09113
FRAMES = 4  # of a clip, evenly spaced: in the picture and in the set of frames; ours
CLIPS_SHOWN = 2
BATCH = 8


@dataclass(frozen=True)
class FillingConfig:
    """ranks: one-thread processes that share the clips."""

    ranks: int

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks = {self.ranks}; needed 1 or more")


class FilledClip(NamedTuple):
    """error: mean squared error over the hidden pixels, in 0..1.

    strips: input, masked and filled-in, each uint8 `FRAMES H W 3`; empty but for a rank's first CLIPS_SHOWN clips.
    features: by extractor, of the filled-in and of the true clip, `2 1 D`, or of their frames, `2 FRAMES D`.
    """

    error: float
    strips: tuple[np.ndarray, ...]
    features: dict[str, np.ndarray]


def reconstruct(point: str, settings: Mapping[str, Any]) -> Path:
    """The stage `reconstruct` of one point: `result.json` and `filled.png` (input, masked, filled in).

    masked_mse and psnr_db are over hidden pixels in 0..1. frame_fid, clip_kid, ... are described in `fidelity`.
    """
    started = time.time()
    bound = config.bind(settings, ["profile", "seed", "reconstruct"], FillingConfig, FidelityConfig)
    seed, ranks, extractors = bound.declared["seed"], bound[FillingConfig].ranks, bound[FidelityConfig]
    home = artifacts.home(settings)
    folder, clips, final = home / "pretrain" / point, home / "clips", home / "reconstruct" / point
    with provenance.atomic_folder(final) as out:
        filled = run(fill_clips, ranks=ranks, folder=folder, clips=clips, extractors=extractors, seed=seed)
        features = {name: np.concatenate([clip.features[name] for clip in filled], axis=1) for name in filled[0].features}
        masked_mse = float(np.mean([clip.error for clip in filled]))
        result = {
            "point": point,
            "masked_mse": masked_mse,
            "psnr_db": float(-10 * np.log10(masked_mse)),
            **fidelity(features),
            "clips": len(filled),
            "frames": len(filled) * FRAMES,
            "seed": seed,
            "checkpoint_sha256": checkpoint.weights_sha256(folder),
        }
        write_json(out / "result.json", result)
        strips = [np.concatenate(list(strip), axis=1) for clip in filled[:CLIPS_SHOWN] for strip in clip.strips]
        Image.fromarray(np.concatenate(strips, axis=0)).save(out / "filled.png", optimize=True)
        inputs = {"checkpoint": artifacts.sha256(folder), "clips": artifacts.sha256(clips)}
        inputs |= {f"{name}_features": artifacts.sha256(path) for name, path in extractors.files().items()}
        content = artifacts.evidence("reconstruct", bound, code=artifacts.code_hash("reconstruct"), inputs=inputs)
        artifacts.write_evidence(out, content, bound.operative)
    artifacts.write_run(f"reconstruct-{point}", artifacts.sha256(final), started=started)
    return final


@torch.no_grad()
def fill_clips(*, rank: int, ranks: int, folder: Path, clips: Path, extractors: FidelityConfig, seed: int) -> list[FilledClip]:
    """Fill in this rank's validation clips. Returns those of all ranks, in the order of the clips."""
    model = load_model(folder)
    clip, patch, grid = model.encoder.clip, model.encoder.patch, model.encoder.grid
    masking = {"batch": 1, "grid": grid, "mask_ratio": MASK_RATIO, "round_down": model.round_visible_down}
    features_of = load_extractors(extractors, clip, seed)
    shown = torch.linspace(0, clip[0] - 1, FRAMES).round().long()
    results: list[FilledClip] = []
    for batch in loader.eval_batches(clips, split="val", batch=BATCH, rank=rank, ranks=ranks):
        masks = [random_masking("random", **masking, rng=seeds.stream(seed, "fill_mask", name)) for name in batch.ids]
        masked = MaskedTokens(torch.cat([mask.ids_keep for mask in masks]), grid)
        true, hidden = batch.pixels.float() / 255, hidden_pixels(masked, clip, patch)  # B T H W 3, B T H W 1
        predicted = model.reconstruct(batch.pixels, masked)
        error = ((predicted - true).square() * hidden).mean(-1).sum((1, 2, 3)) / hidden.sum((1, 2, 3, 4))
        filled = _to_uint8(torch.where(hidden.bool(), predicted, true))
        features = {}
        for name, extract in features_of.items():
            pair = [_features(extract, name, pixels, shown) for pixels in (filled, batch.pixels)]
            features[name] = np.stack(pair, axis=1)  # B 2 n D
        strips = [part[:, shown].numpy() for part in (batch.pixels, _to_uint8(true * (1 - hidden) + 0.5 * hidden), filled)]
        for i, clip_error in enumerate(error.tolist()):
            clip_strips = tuple(strip[i] for strip in strips) if len(results) < CLIPS_SHOWN else ()
            results.append(FilledClip(clip_error, clip_strips, {name: values[i] for name, values in features.items()}))
    return gather_round_robin(results)


def _features(extract: Extractor, name: str, pixels: Tensor, shown: Tensor) -> np.ndarray:
    """uint8 `B T H W 3` -> `B 1 D`, or `B FRAMES D` of the frames `shown`."""
    parts = pixels[:, shown].flatten(0, 1)[:, None] if name in FRAME_EXTRACTORS else pixels  # n T H W 3
    return extract(parts).unflatten(0, (len(pixels), -1)).numpy()


def _to_uint8(x: Tensor) -> Tensor:
    return (x * 255).round().clamp(0, 255).to(torch.uint8)
