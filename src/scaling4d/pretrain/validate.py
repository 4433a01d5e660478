"""How well a model fills in clips that it was not trained on."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from scaling4d import seeds
from scaling4d.clips import loader
from scaling4d.mae.simple_mae import hidden_pixels
from scaling4d.pretrain.settings import Training
from scaling4d.records import MaskedTokens
from scaling4d.training.distributed import at

BATCH = 16
SHOWN = 4  # frames of a picture


@torch.no_grad()
def validate(model: nn.Module, clips: Path, training: Training, *, seed: int, rank: int, ranks: int) -> float:
    """Mean loss over `val_clips` validation clips, each hidden by the same masks whatever the ranks and the model.

    A rank that has no clips left takes part for the sake of those whose weights it holds, and counts for nothing.
    """
    device, total = next(model.parameters()).device, torch.zeros(2, dtype=torch.float64)
    found = loader.every(clips, split="val", batch=BATCH, rank=rank, ranks=ranks, most=training.val_clips)
    seen = loader.count(clips, "val")
    for number in range(-(-min(training.val_clips or seen, seen) // (BATCH * ranks))):
        at(f"validation, batch {number}")
        batch = next(found, None)
        ids = batch.ids if batch else ("",)
        pixels = batch.pixels if batch else torch.zeros(1, *model.encoder.clip, 3, dtype=torch.uint8)
        for draw in range(training.masks_per_clip):
            chosen = [model.choose(1, seeds.stream(seed, "val_mask", name, draw)) for name in ids]
            masked = MaskedTokens(torch.cat([m.kept for m in chosen]).to(device), chosen[0].grid)
            loss = model(pixels.to(device), masked).item()
            if batch:
                total += torch.tensor([loss * len(ids), len(ids)], dtype=torch.float64)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


@torch.no_grad()
def picture(model: nn.Module, clips: Path, *, seed: int) -> Tensor | None:
    """float `3H 4W C` in 0..1: frames of the first validation clip, what the encoder sees of them, and what it fills in; None:
    the model predicts no pixels. Every rank takes part."""
    if not hasattr(model, "reconstruct"):
        return None
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "reconstruct")
    device = next(model.parameters()).device
    batch = next(loader.every(clips, split="val", batch=1, rank=0, ranks=1, most=1))
    masked = model.choose(1, seeds.stream(seed, "val_mask", batch.ids[0], 0))
    pixels = batch.pixels.to(device)
    filled = model.reconstruct(pixels, MaskedTokens(masked.kept.to(device), masked.grid)).float().cpu()
    true = batch.pixels / 255
    seen = true * (1 - hidden_pixels(masked, model.encoder.clip, model.encoder.patch))
    at = torch.linspace(0, true.shape[1] - 1, SHOWN).long()
    return torch.cat([torch.cat(list(clip[0, at]), dim=1) for clip in (true, seen, filled)])
