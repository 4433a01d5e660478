"""Stage `reconstruct`: fill in the hidden pixels of masked validation clips and measure them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scaling4d import artifacts, checkpoint, config, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.clips import loader
from scaling4d.config import StageConfig, require_minima
from scaling4d.encoders.load import build_model, load_model
from scaling4d.mae.device import to_device
from scaling4d.mae.encoder import Method
from scaling4d.mae.masking import hidden_pixels, random_masking
from scaling4d.mae.models import MODELS
from scaling4d.provenance import atomic_folder
from scaling4d.reconstruct.fidelity import FRAME_EXTRACTORS, Extractor, FidelityConfig, fidelity, load_extractors
from scaling4d.records import ClipBatch, MaskedTokens, UserError, remedy, write_json
from scaling4d.training import distributed
from scaling4d.training.distributed import gather_round_robin
from scaling4d.training.launch import Job, LaunchConfig, launch, snapshot_content
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig, parallelize
from scaling4d.training.resume import fingerprint_of, state_folder

MASK_RATIO = 0.9  # of random masking, one for all methods; MAE-ST, arXiv:2205.09113
FRAMES = 4  # of a clip, evenly spaced, in the set of frames; ours
CLIPS_SHOWN, FRAMES_SHOWN = 2, 8  # at most so many frames of a clip, evenly spaced; ours
MOVING = 0.08  # difference from the median over the clip from which on a pixel moves, in 0..1; ours
MOVING_SHARE = 0.15  # of a shown clip's pixels, as nearly as the split has it: something moves, and most does not; ours
BATCH = 8


@dataclass(frozen=True)
class FillingConfig(ComputeConfig):
    """ranks: one-thread processes that share the clips. shards: ranks that share a copy of the weights (FSDP)."""

    ranks: int
    shards: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_minima(self, {"ranks": 1, "shards": 1})
        if self.ranks % self.shards:
            raise ValueError(f"{self.ranks} ranks do not divide into copies of {self.shards} shards; set shards to a divisor")

    @property
    def sharding(self) -> ShardingConfig:
        return ShardingConfig(self.shards, recompute="none", compile=False, packed=False, accumulate=1)


class FilledClip(NamedTuple):
    """Measurements of a clip. Errors are squared, in 0..1.

    error: mean over the hidden pixels. moving_error, moving_pixels: sum over the hidden pixels that move, their number.
    moving_share: of all pixels. features: by extractor, of the filled-in and of the true clip, `2 1 D`, or of their
    frames, `2 FRAMES D`.
    """

    error: float
    moving_error: float
    moving_pixels: int
    moving_share: float
    features: dict[str, np.ndarray]


def reconstruct(point: str, settings: Mapping[str, Any]) -> Path | int:
    """The stage `reconstruct` of one point, by ranks that run where reconstruct.Launch says.

    Writes `result.json` and `filled.png` (three rows of frames a clip: input, masked, filled in). masked_mse, psnr_db
    and moving_mse are over hidden pixels in 0..1. frame_fid, clip_kid, ... are described in `fidelity`. A model that
    takes each patch's mean and deviation from the true pixels is not measured.
    Returns the folder; or an exit code, where another process wrote it.
    """
    bound, home = bind_reconstruct(settings), artifacts.home(settings)
    if not hasattr(model := MODELS.get(Checkpoint.read(home / "pretrain" / point).model), "reconstruct"):
        kind = getattr(model, "__name__", "published encoder")
        raise UserError(f"{point} is a {kind}, which predicts no pixels; needed a SimpleMAE or MAEST")
    provenance = _provenance_of(point, bound, home) if distributed.is_main() else None
    if distributed.launched_by_torchrun():
        return _start_ranks(point, bound, home, provenance)
    filling, content = bound[FillingConfig], {"point": point, "settings": settings, "evidence": provenance}
    state = state_folder("reconstruct", fingerprint_of(f"reconstruct {point}", provenance))
    where = {"ranks": filling.ranks, "processes": 1, "device": filling.device, "content": content, "state": state}
    where["written"] = partial(artifacts.is_written, home / "reconstruct" / point, provenance)
    exit_code = launch(Job(f"reconstruct-{point}", ("reconstruct", point), "reconstruct.Launch", **where), bound[LaunchConfig])
    return _start_ranks(point, bound, home, provenance) if exit_code is None else exit_code


def reconstruct_launched(snapshot: Path) -> Path | None:
    """In a rank that a launcher started: `reconstruct` by its snapshot. None: another rank failed with a UserError."""
    with snapshot_content(snapshot) as content:
        if content is None:
            return None
        settings = content["settings"]
        return _start_ranks(content["point"], bind_reconstruct(settings), artifacts.home(settings), content["evidence"])


def _provenance_of(point: str, bound: StageConfig, home: Path) -> dict[str, Any]:
    """Content of provenance.json."""
    inputs = {"checkpoint": artifacts.sha256(home / "pretrain" / point), "clips": artifacts.sha256(home / "clips")}
    inputs |= {f"{name}_features": artifacts.sha256(path) for name, path in bound[FidelityConfig].files().items()}
    return artifacts.provenance_of("reconstruct", bound, code=artifacts.code_hash("reconstruct"), inputs=inputs)


def _start_ranks(point: str, bound: StageConfig, home: Path, provenance: Mapping[str, Any] | None) -> Path:
    """Run the ranks, write the folder. provenance: content of provenance.json; None: this process does not write."""
    started, seed = time.time(), bound.declared["seed"]
    filling, extractors = bound[FillingConfig], bound[FidelityConfig]
    folder, clips, final = home / "pretrain" / point, home / "clips", home / "reconstruct" / point
    given = {"folder": folder, "clips": clips, "extractors": extractors, "seed": seed, "filling": filling}
    filled, rows = distributed.run(fill_clips_on_rank, ranks=filling.ranks, device=filling.device, **given)
    if not distributed.is_main():
        return final
    model, _ = build_model(folder)
    with atomic_folder(final) as out:
        result = {
            "point": point,
            "true_patch_statistics": model.true_patch_statistics,
            **({} if model.true_patch_statistics else measurements(filled)),
            "clips": len(filled),
            "frames": len(filled) * FRAMES,
            "seed": seed,
            "checkpoint_sha256": checkpoint.weights_sha256(folder),
        }
        write_json(out / "result.json", result)
        Image.fromarray(rows).save(out / "filled.png", optimize=True)
        artifacts.write_provenance(out, provenance, bound.operative)
    artifacts.write_run(f"reconstruct-{point}", artifacts.sha256(final), started=started)
    return final


def bind_reconstruct(settings: Mapping[str, Any]) -> StageConfig:
    """Settings of the stage, checked. Raises UserError: settings that the stage refuses."""
    keys, unrecorded = ["profile", "seed", "reconstruct.Filling", "reconstruct.Fidelity"], {"reconstruct.Launch": LaunchConfig}
    return config.bind(settings, keys, FillingConfig, FidelityConfig, unrecorded=unrecorded)


def measurements(filled: Sequence[FilledClip]) -> dict[str, float | None]:
    """Errors and fidelity of a split. moving_mse: None where no hidden pixel moves."""
    features = {name: np.concatenate([clip.features[name] for clip in filled], axis=1) for name in filled[0].features}
    masked_mse, moving = float(np.mean([clip.error for clip in filled])), sum(clip.moving_pixels for clip in filled)
    return {
        "masked_mse": masked_mse,
        "psnr_db": float(-10 * np.log10(masked_mse)),
        "moving_mse": sum(clip.moving_error for clip in filled) / moving if moving else None,
        **fidelity(features),
    }


@remedy(loader.ClipsError, "run `dvc repro clips`")
@torch.no_grad()
def fill_clips_on_rank(
    *, rank: int, ranks: int, folder: Path, clips: Path, extractors: FidelityConfig, seed: int, filling: FillingConfig
) -> tuple[list[FilledClip], np.ndarray]:
    """Fill in this rank's validation clips, with as many passes as the other ranks: FSDP needs all of them in each.

    Returns the clips of all ranks, in their order, and the picture.
    """
    device, model = filling.device, load_model(folder)
    parallelize(model, filling.sharding, filling, ranks=ranks)
    model.to(device)
    features_of = load_extractors(extractors, model.encoder.clip, seed, device)
    frames = torch.linspace(0, model.encoder.clip[0] - 1, FRAMES).round().long()
    results: list[FilledClip] = []
    batches = loader.eval_batches(clips, split="val", frames=model.encoder.clip[0], batch=BATCH, rank=rank, ranks=ranks)
    for _ in range(0, loader.count_clips(clips, "val"), BATCH * ranks):
        batch = next(batches, None)
        predicted, hidden = fill(model, batch or _black_clip(model), seed)
        if batch is None:
            continue
        pixels = to_device(batch.pixels, device)
        true, moving = pixels.float() / 255, moving_pixels(pixels)
        error = (predicted - true).square().mean(-1, keepdim=True) * hidden  # B T H W 1
        pairs = (_to_uint8(torch.where(hidden.bool(), predicted, true)), pixels)
        features = {
            name: np.stack([_features(extract, name, shown, frames) for shown in pairs], axis=1)  # B 2 n D
            for name, extract in features_of.items()
        }
        for i in range(len(true)):
            sums = error[i].sum() / hidden[i].sum(), error[i][moving[i]].sum(), (hidden[i].bool() & moving[i]).sum()
            own = {name: values[i] for name, values in features.items()}
            results.append(FilledClip(*(value.item() for value in (*sums, moving[i].float().mean())), own))
    filled = gather_round_robin(results)
    numbers = np.argsort([abs(clip.moving_share - MOVING_SHARE) for clip in filled], kind="stable")[:CLIPS_SHOWN]
    return filled, np.concatenate([picture(model, clips, number, len(filled), seed) for number in sorted(numbers.tolist())])


def _black_clip(model: Method) -> ClipBatch:
    return ClipBatch(torch.zeros(1, *model.encoder.clip, 3, dtype=torch.uint8), ids=("",), start_s=(0.0,))


def fill(model: Method, batch: ClipBatch, seed: int) -> tuple[Tensor, Tensor]:
    """Every pixel as predicted, `B T H W 3` in 0..1, and 1 at hidden pixels, `B T H W 1`, on the model's device.

    A clip's mask is its own.
    """
    encoder, device = model.encoder, next(model.parameters()).device.type
    masking = {"batch": 1, "grid": encoder.grid, "mask_ratio": MASK_RATIO, "round_down": model.config.round_visible_down}
    masks = [random_masking("random", **masking, rng=seeds.torch_rng(seed, "fill_mask", name)) for name in batch.ids]
    masked = MaskedTokens(to_device(torch.cat([mask.ids_keep for mask in masks]), device), encoder.grid)
    return model.reconstruct(to_device(batch.pixels, device), masked).float(), hidden_pixels(masked, encoder.clip, encoder.patch)


def moving_pixels(pixels: Tensor) -> Tensor:
    """uint8 `B T H W 3` -> bool `B T H W 1`: pixels that differ by more than MOVING from their median over the clip."""
    x = pixels.float() / 255
    return (x - x.median(1, keepdim=True).values).abs().mean(-1, keepdim=True) > MOVING


@torch.no_grad()
def picture(model: Method, clips: Path, number: int, count: int, seed: int) -> np.ndarray:
    """uint8 `3*H n*W 3` of the validation clip of this number among `count`: rows input, masked, filled in."""
    (batch,) = loader.eval_batches(clips, split="val", frames=model.encoder.clip[0], batch=1, rank=number, ranks=count)
    predicted, hidden = fill(model, batch, seed)
    true = batch.pixels.to(predicted.device).float() / 255
    frames = torch.linspace(0, true.shape[1] - 1, min(FRAMES_SHOWN, true.shape[1])).round().long()
    rows = (true, true * (1 - hidden) + 0.5 * hidden, torch.where(hidden.bool(), predicted, true))
    return np.concatenate([np.concatenate(list(_to_uint8(row[0, frames]).cpu().numpy()), axis=1) for row in rows])


def _features(extract: Extractor, name: str, pixels: Tensor, frames: Tensor) -> np.ndarray:
    """uint8 `B T H W 3` -> `B 1 D`, or `B FRAMES D` of these frames."""
    parts = pixels[:, frames].flatten(0, 1)[:, None] if name in FRAME_EXTRACTORS else pixels  # n T H W 3
    return extract(parts).unflatten(0, (len(pixels), -1)).cpu().numpy()


def _to_uint8(x: Tensor) -> Tensor:
    return (x * 255).round().clamp(0, 255).to(torch.uint8)
