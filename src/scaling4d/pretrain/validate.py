"""How well a model fills in clips that it was not trained on, and what its encoder's features are worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling4d import seeds
from scaling4d.clips import loader
from scaling4d.mae.device import to_device
from scaling4d.mae.masking import hidden_pixels
from scaling4d.pretrain.probes import linear_probe
from scaling4d.pretrain.settings import HIGHER_IS_BETTER, PretrainConfig, probe_metric
from scaling4d.pretrain.trained_features import RankMe, TrainedFeatures
from scaling4d.records import MaskedTokens
from scaling4d.training.distributed import heartbeat
from scaling4d.training.fit import Callback, StepResult
from scaling4d.training.observe import TrainingLog

BATCH = 16


class Validation(Callback):
    """Validates every `validate_every` steps, but not after the last one. With `keep_best` it holds the best weights.

    They are one more copy of the weights, sharded as the model is, on its device.
    Attributes:
        lines: so far, each {"step"} and the measures.
        best_weights: of the step of the best line, by name; empty without `keep_best`.
    """

    def __init__(self, model: nn.Module, pretraining: PretrainConfig, log: TrainingLog) -> None:
        self.model, self.pretraining, self.log = model, pretraining, log
        self.lines: list[dict[str, Any]] = []
        self.best_weights: dict[str, Tensor] = {}
        if pretraining.training.keep_best:
            self.best_weights = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}

    def after_step(self, result: StepResult) -> None:
        every = self.pretraining.training.validate_every
        if every and result.step % every == 0 and not result.last:
            measures = measure(self.model, self.pretraining)
            self.lines.append({"step": result.step, **measures})
            self.log.validation(result.step, measures, picture(self.model, self.pretraining))
            if self.best_weights and self._best() is self.lines[-1]:
                for name, weight in self.model.state_dict().items():  # of FSDP the shards, also after a pass
                    self.best_weights[name].copy_(weight)

    def finish(self) -> dict[str, Any]:
        """Measure the last weights. With `keep_best`, give the model those of the best step.

        Returns the measures of the model's weights, and their step.
        """
        step, measures = self.pretraining.training.steps, measure(self.model, self.pretraining)
        self.log.validation(step, measures, picture(self.model, self.pretraining))
        last = {"step": step, **measures}
        best = self._best(last) if self.best_weights else last
        if best is not last:
            for name, weight in self.model.state_dict().items():
                weight.copy_(self.best_weights[name])
        return best

    def _best(self, *more: dict[str, Any]) -> dict[str, Any]:
        """The best line, the first one of equals."""
        name = self.pretraining.training.keep_best
        sign = -1 if HIGHER_IS_BETTER[name] else 1
        return min([*self.lines, *more], key=lambda line: sign * line[name])

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines = state["lines"]

    def tensors(self) -> dict[str, Tensor]:
        return {f"best.{name}": weight for name, weight in self.best_weights.items()}


def measure(model: nn.Module, pretraining: PretrainConfig) -> dict[str, float]:
    """The measures of a model by name: `val_loss`; of a training with `validate_every`, also its encoder's."""
    training, measures = pretraining.training, {"val_loss": validate(model, pretraining)}
    if training.validate_every:
        measures["rankme"] = rankme(model, pretraining)
        measures |= {probe_metric(task): linear_probe(model, pretraining, task) for task in training.probe_tasks}
    return measures


@torch.no_grad()
def validate(model: nn.Module, pretraining: PretrainConfig) -> float:
    """Mean loss over `val_clips` validation clips. Their masks are the same for all ranks, and for
    all models with the same token grid, strategy and mask ratio.

    The CPU waits for the device once, after the last batch.
    """
    device = next(model.parameters()).device.type
    total = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of clips
    for ids, pixels in _val_batches(model, pretraining):
        for draw in range(pretraining.training.masks_per_clip):
            masks = [model.draw_mask(1, seeds.torch_rng(pretraining.seed, "val_mask", name, draw)) for name in ids or ("",)]
            masked = MaskedTokens(to_device(torch.cat([m.ids_keep for m in masks]), device), masks[0].grid)
            loss = model(to_device(pixels, device), masked)
            if ids:
                total[0] += loss.double() * len(ids)
                total[1] += len(ids)
    total = total.cpu()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def rankme(model: nn.Module, pretraining: PretrainConfig) -> float:
    """Effective rank of the features of `val_clips` validation clips, all tokens of each; at most clips and D."""
    features, sums = TrainedFeatures(model), RankMe(model.encoder.width)
    device = next(model.parameters()).device
    for ids, pixels in _val_batches(model, pretraining):
        encoded = features(pixels.to(device))
        sums.add(encoded[: len(ids)])
    return sums.effective_rank()


def _val_batches(model: nn.Module, pretraining: PretrainConfig) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Ids and pixels `B T H W C` of this rank's validation clips, as many batches on every rank.

    A rank without clips left takes part for the ranks that need its weights: it gets a black clip, and no ids.
    """
    clips, training, ranks = pretraining.clips, pretraining.training, dist.get_world_size()
    share = {"batch": BATCH, "rank": dist.get_rank(), "ranks": ranks, "max_clips": training.val_clips}
    batches = loader.eval_batches(clips, split="val", frames=pretraining.model.clip[0], **share)
    available = loader.count_clips(clips, "val")
    for number in range(-(-min(training.val_clips or available, available) // (BATCH * ranks))):
        heartbeat(f"validation, batch {number}")
        batch = next(batches, None)
        yield (batch.ids, batch.pixels) if batch else ((), torch.zeros(1, *model.encoder.clip, 3, dtype=torch.uint8))


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
    masked = model.draw_mask(1, seeds.torch_rng(pretraining.seed, "val_mask", batch.ids[0], 0))
    pixels = batch.pixels.to(device)
    filled = model.reconstruct(pixels, MaskedTokens(masked.ids_keep.to(device), masked.grid)).float().cpu()
    true = batch.pixels / 255
    visible = true * (1 - hidden_pixels(masked, model.encoder.clip, model.encoder.patch))
    frames = torch.linspace(0, true.shape[1] - 1, 4).long()
    return torch.cat([torch.cat(list(clip[0, frames]), dim=1) for clip in (true, visible, filled)])
