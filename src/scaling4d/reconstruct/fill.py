"""Fill in masked validation clips and measure what was filled in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scaling4d import artifacts, checkpoint, config, seeds
from scaling4d.clips import loader
from scaling4d.mae.build import load
from scaling4d.mae.simple_mae import hidden_pixels
from scaling4d.ranks import gather, run
from scaling4d.reconstruct.fidelity import Fidelity, frechet_distance
from scaling4d.records import MaskedTokens, write_json

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

    masked_mse and psnr_db are over hidden pixels in 0..1; frechet_distance compares filled-in frames with true ones.
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
        rows = run(_work, ranks=filling.ranks, folder=folder, clips=home / "clips", filling=filling, seed=mine["seed"])
        torch.set_num_threads(1)
        errors = np.array([row[0] for row in rows])
        filled, true = (torch.cat([torch.from_numpy(row[i]) for row in rows]) for i in (1, 2))
        masked_mse = float(errors.mean())
        write_json(
            out / "result.json",
            {
                "point": point,
                "masked_mse": masked_mse,
                "psnr_db": float(-10 * np.log10(masked_mse)),
                "frechet_distance": frechet_distance(filled, true, fidelity.encoder(true.shape[1], mine["seed"])),
                "clips": len(rows),
                "frames": len(true),
                "seed": mine["seed"],
                "checkpoint_sha256": checkpoint.weights_sha256(folder),
            },
        )
        _picture(rows[: filling.shown]).save(out / "filled.png", optimize=True)
        inputs = {"checkpoint": artifacts.sha256(folder), "clips": artifacts.sha256(home / "clips")}
        artifacts.write_provenance(out, stage="reconstruct", settings=settings, keys=keys, room="reconstruct", inputs=inputs)
    artifacts.write_run(f"reconstruct-{point}", artifacts.sha256(final), started=started)
    return final


@torch.no_grad()
def _work(*, rank: int, ranks: int, folder: Path, clips: Path, filling: Filling, seed: int) -> list[tuple]:
    """A row a clip: masked error, filled-in frames, true frames, masked frames (uint8 `frames H W 3`)."""
    model = load(folder)
    model.masking, model.mask_ratio = "random", filling.mask_ratio
    rows = []
    for batch in loader.every(clips, split="val", batch=BATCH, rank=rank, ranks=ranks):
        chosen = [model.choose(1, seeds.stream(seed, "fill_mask", name)) for name in batch.ids]
        masked = MaskedTokens(torch.cat([m.kept for m in chosen]), chosen[0].grid)
        true = batch.pixels.float() / 255
        hidden = hidden_pixels(masked, model.encoder.clip, model.encoder.patch)  # B T H W 1
        guess = model.reconstruct(batch.pixels, masked)
        error = ((guess - true).square() * hidden).mean(-1).sum((1, 2, 3)) / hidden.sum((1, 2, 3, 4))
        filled = torch.where(hidden.bool(), guess, true)
        at = torch.linspace(0, true.shape[1] - 1, filling.frames).round().long()
        parts = [_bytes(x[:, at]) for x in (filled, true, true * (1 - hidden) + 0.5 * hidden)]
        rows.extend(zip(error.tolist(), *parts, strict=True))
    return gather(rows)


def _bytes(x: Tensor) -> np.ndarray:
    return (x * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _picture(rows: list[tuple]) -> Image.Image:
    """For every clip three strips of frames: input, masked, filled in."""
    strips = [np.concatenate(list(part), axis=1) for _, filled, true, masked in rows for part in (true, masked, filled)]
    return Image.fromarray(np.concatenate(strips, axis=0))
