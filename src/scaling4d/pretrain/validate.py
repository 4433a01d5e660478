"""How well a model fills in clips that it was not trained on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling4d import seeds
from scaling4d.clips import loader
from scaling4d.mae.device import to_device
from scaling4d.mae.masking import hidden_pixels
from scaling4d.pretrain.settings import PretrainConfig
from scaling4d.records import MaskedTokens
from scaling4d.training.distributed import heartbeat
from scaling4d.training.fit import Callback, StepResult
from scaling4d.training.observe import TrainingLog

BATCH = 16


class Validation(Callback):
    """Validates every `validate_every` steps, but not after the last one.

    Attributes:
        lines: so far, each {"step", "val_loss"}.
    """

    def __init__(self, model: nn.Module, pretraining: PretrainConfig, log: TrainingLog) -> None:
        self.model, self.pretraining, self.log = model, pretraining, log
        self.lines: list[dict[str, Any]] = []

    def after_step(self, result: StepResult) -> None:
        every = self.pretraining.training.validate_every
        if every and result.step % every == 0 and not result.last:
            val_loss = validate(self.model, self.pretraining)
            self.lines.append({"step": result.step, "val_loss": val_loss})
            self.log.validation(result.step, val_loss, picture(self.model, self.pretraining))

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines = state["lines"]


@torch.no_grad()
def validate(model: nn.Module, pretraining: PretrainConfig) -> float:
    """Mean loss over `val_clips` validation clips. Their masks are the same for all ranks, and for
    all models with the same token grid, strategy and mask ratio.

    A rank without clips left takes part for the ranks that need its weights, and counts for nothing. The CPU waits for
    the device once, after the last batch.
    """
    clips, training, seed, ranks = pretraining.clips, pretraining.training, pretraining.seed, dist.get_world_size()
    share = {"batch": BATCH, "rank": dist.get_rank(), "ranks": ranks, "max_clips": training.val_clips}
    batches = loader.eval_batches(clips, split="val", frames=pretraining.model.clip[0], **share)
    available = loader.count_clips(clips, "val")
    device = next(model.parameters()).device.type
    total = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of clips
    for number in range(-(-min(training.val_clips or available, available) // (BATCH * ranks))):
        heartbeat(f"validation, batch {number}")
        batch = next(batches, None)
        ids = batch.ids if batch else ("",)
        pixels = batch.pixels if batch else torch.zeros(1, *model.encoder.clip, 3, dtype=torch.uint8)
        for draw in range(training.masks_per_clip):
            masks = [model.draw_mask(1, seeds.stream(seed, "val_mask", name, draw)) for name in ids]
            masked = MaskedTokens(to_device(torch.cat([m.ids_keep for m in masks]), device), masks[0].grid)
            loss = model(to_device(pixels, device), masked)
            if batch:
                total[0] += loss.double() * len(ids)
                total[1] += len(ids)
    total = total.cpu()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


@torch.no_grad()
def picture(model: nn.Module, pretraining: PretrainConfig) -> Tensor | None:
    """float `3H 4W C` in 0..1: frames of the first validation clip, their visible patches, and the reconstruction.

    None: the model predicts no pixels. Every rank takes part.
    """
    if not hasattr(model, "reconstruct"):
        return None
    device = next(model.parameters()).device
    share = {"batch": 1, "rank": 0, "ranks": 1, "max_clips": 1}
    batch = next(loader.eval_batches(pretraining.clips, split="val", frames=pretraining.model.clip[0], **share))
    masked = model.draw_mask(1, seeds.stream(pretraining.seed, "val_mask", batch.ids[0], 0))
    pixels = batch.pixels.to(device)
    filled = model.reconstruct(pixels, MaskedTokens(masked.ids_keep.to(device), masked.grid)).float().cpu()
    true = batch.pixels / 255
    visible = true * (1 - hidden_pixels(masked, model.encoder.clip, model.encoder.patch))
    frames = torch.linspace(0, true.shape[1] - 1, 4).long()
    return torch.cat([torch.cat(list(clip[0, frames]), dim=1) for clip in (true, visible, filled)])
