"""Fill in masked validation clips and measure what was filled in."""

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

from scaling4d import artifacts, checkpoint, config, seeds
from scaling4d.clips import loader
from scaling4d.mae.build import load
from scaling4d.mae.simple_mae import hidden_pixels
from scaling4d.reconstruct.fidelity import FRAMES, Extractor, Fidelity
from scaling4d.records import MaskedTokens, write_json
from scaling4d.training.distributed import gather, run

BATCH = 8


@config.configurable
@dataclass(frozen=True)
class Filling:
    """mask_ratio: of random masking, for all methods. shown: clips in the picture. frames: of each, compared and shown."""

    ranks: int
    mask_ratio: float
    shown: int
    frames: int


def reconstruct(point: str, settings: Mapping[str, Any]) -> Path:
    """The `reconstruct` stage of one point: `result.json` and `filled.png` (input, masked, filled in).

    masked_mse and psnr_db are over hidden pixels in 0..1; frame_fid, clip_kid, ... compare filled-in frames and clips with true
    ones, see `fidelity`.
    """
    started = time.time()
    keys = ["profile", "seed", "reconstruct"]
    mine = config.declared(settings, keys)
    config.bind(mine["reconstruct"])
    filling = config.build(Filling)
    home = artifacts.home(settings)
    folder = home / "pretrain" / point
    final = home / "reconstruct" / point
    with artifacts.folder(final) as out:
        fidelity = config.build(Fidelity)
        arguments = {"folder": folder, "clips": home / "clips", "filling": filling, "fidelity": fidelity, "seed": mine["seed"]}
        rows = run(_work, ranks=filling.ranks, **arguments)
        torch.set_num_threads(1)
        masked_mse = float(np.mean([row.error for row in rows]))
        write_json(
            out / "result.json",
            {
                "point": point,
                "masked_mse": masked_mse,
                "psnr_db": float(-10 * np.log10(masked_mse)),
                **_fidelity(rows, fidelity),
                "clips": len(rows),
                "frames": len(rows) * filling.frames,
                "seed": mine["seed"],
                "checkpoint_sha256": checkpoint.weights_sha256(folder),
            },
        )
        _picture([row.strips for row in rows[: filling.shown]]).save(out / "filled.png", optimize=True)
        inputs = {"checkpoint": artifacts.sha256(folder), "clips": artifacts.sha256(home / "clips")}
        inputs |= {f"{name}_features": artifacts.sha256(path) for name, path in fidelity.files().items()}
        artifacts.write_provenance(out, stage="reconstruct", settings=settings, keys=keys, room="reconstruct", inputs=inputs)
    artifacts.write_run(f"reconstruct-{point}", artifacts.sha256(final), started=started)
    return final


class Row(NamedTuple):
    """One clip. error: mean over its hidden pixels.

    strips: input, masked, filled in, each uint8 `frames H W 3`; of a rank's first clips alone.
    features: by extractor, of the filled-in and of the true clip, each `1 D`, or `frames D`.
    """

    error: float
    strips: tuple[np.ndarray, ...]
    features: dict[str, tuple[np.ndarray, np.ndarray]]


@torch.no_grad()
def _work(*, rank: int, ranks: int, folder: Path, clips: Path, filling: Filling, fidelity: Fidelity, seed: int) -> list[Row]:
    model = load(folder)
    model.masking, model.mask_ratio = "random", filling.mask_ratio
    extractors = fidelity.extractors(model.encoder.clip, seed)
    rows: list[Row] = []
    for batch in loader.every(clips, split="val", batch=BATCH, rank=rank, ranks=ranks):
        chosen = [model.choose(1, seeds.stream(seed, "fill_mask", name)) for name in batch.ids]
        masked = MaskedTokens(torch.cat([m.kept for m in chosen]), chosen[0].grid)
        true = batch.pixels.float() / 255
        hidden = hidden_pixels(masked, model.encoder.clip, model.encoder.patch)  # B T H W 1
        guess = model.reconstruct(batch.pixels, masked)
        error = ((guess - true).square() * hidden).mean(-1).sum((1, 2, 3)) / hidden.sum((1, 2, 3, 4))
        filled = _bytes(torch.where(hidden.bool(), guess, true))
        at = torch.linspace(0, true.shape[1] - 1, filling.frames).round().long()
        features = {
            name: (_features(extract, name, filled, at), _features(extract, name, batch.pixels, at))
            for name, extract in extractors.items()
        }
        strips = [part[:, at].numpy() for part in (batch.pixels, _bytes(true * (1 - hidden) + 0.5 * hidden), filled)]
        for i, one in enumerate(error.tolist()):
            shown = tuple(part[i] for part in strips) if len(rows) < filling.shown else ()
            rows.append(Row(one, shown, {name: (x[i], y[i]) for name, (x, y) in features.items()}))
    return gather(rows)


def _features(extract: Extractor, name: str, pixels: Tensor, at: Tensor) -> np.ndarray:
    """uint8 `B T H W 3` -> `B 1 D`, or `B frames D` of the frames `at`."""
    parts = pixels[:, at].flatten(0, 1)[:, None] if name in FRAMES else pixels  # n T H W 3
    return extract(parts).unflatten(0, (len(pixels), -1)).numpy()


def _fidelity(rows: list[Row], fidelity: Fidelity) -> dict[str, float | None]:
    """`<extractor>_<metric>` over all clips."""
    found = {}
    for name in rows[0].features:
        filled, true = (torch.from_numpy(np.concatenate([row.features[name][i] for row in rows])) for i in (0, 1))
        found |= {f"{name}_{metric}": value for metric, value in fidelity.compare(filled, true).items()}
    return found


def _bytes(x: Tensor) -> Tensor:
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def _picture(clips: list[tuple[np.ndarray, ...]]) -> Image.Image:
    """For every clip three strips of frames: input, masked, filled in."""
    strips = [np.concatenate(list(part), axis=1) for parts in clips for part in parts]
    return Image.fromarray(np.concatenate(strips, axis=0))
