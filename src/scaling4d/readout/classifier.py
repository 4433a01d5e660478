"""The fine-tuning of MAE-ST: the whole encoder with a mean-pooling classifier, for actions.

Source: arXiv:2205.09113 and facebookresearch/mae_st. Not done here: RandAugment and random erasing (our actions tell left from
right and up from down), random crops and time windows, repeated augmentation, and testing over several views (a clip of a
benchmark is read once, at one place).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d import artifacts, benchmarks, config, log, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.features import Pixels
from scaling4d.mae.build import ENCODERS, METHODS, encoder_of, load
from scaling4d.mae.encoder import LAYER_NORM_EPS, initialise
from scaling4d.readout import views
from scaling4d.readout.split import Evaluation, Lessons, Share, judged, reread
from scaling4d.readout.tasks import actions
from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.train import Found, batch_of, result_of, write
from scaling4d.readout.tune import KEYS, Means, Parts, Target, about, fit, means_of, placed, saving_of, state_of
from scaling4d.records import Result, UserError
from scaling4d.training.distributed import gather, leads, run
from scaling4d.training.parallelize import gathered, whole

TASK, PROTOCOL = "actions", "classifier"
JUDGED = 8  # clips at a time


@config.configurable
@dataclass(frozen=True)
class Classifier:
    """How encoder and classifier are trained together.

    layer_decay: the learning rate of a block is that of the next one times this; the head has learning_rate.
    dropout: before the last layer. drop_path: of the last block, rising from 0 at the first. mixup, cutmix: of their Beta
    distributions, 0 is none; with both, each is used for half of the batches. label_smoothing: share given to all classes alike.
    """

    steps: int
    batch: int
    learning_rate: float
    layer_decay: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    clip_norm: float
    dropout: float
    drop_path: float
    mixup: float
    cutmix: float
    label_smoothing: float


class Classes(nn.Module):
    """Mean over tokens, norm, dropout, linear."""

    def __init__(self, *, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, classes)

    @torch.no_grad()
    def initialise(self, encoder: nn.Module, seed: int) -> None:
        """As mae_st's code starts it: the encoder's own last norm, if it has one, and a linear layer of next to nothing."""
        initialise(self, seed=seed)
        nn.init.trunc_normal_(self.linear.weight, std=2e-5, generator=seeds.stream(seed, "init", "classifier"))
        if hasattr(encoder, "norm"):
            self.norm.load_state_dict(encoder.norm.state_dict())

    def forward(self, tokens: Tensor) -> Tensor:
        """`B N D` -> `B classes`."""
        return self.linear(self.dropout(self.norm(tokens.mean(1))))


class Tuned(nn.Module):
    """Encoder and classifier."""

    def __init__(self, encoder: nn.Module, head: Classes) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pixels: Tensor, target: Target) -> Tensor:
        """Pixels `B T H W C`, `shares` of the classes `B classes` -> cross entropy."""
        return F.cross_entropy(self.scores(pixels), target["shares"])

    def scores(self, pixels: Tensor) -> Tensor:
        """`B classes`."""
        first = getattr(self.encoder, "first", 0)  # after the class token, if there is one
        return self.head(last_tokens(self.encoder, pixels)[:, first:].float())


def last_tokens(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """What leaves the last block, a class token included; the list of features ends before."""
    x = encoder.tokens(pixels)
    for block in encoder.blocks:
        x = block(x)
    return x


def classify(encoder: str, settings: Mapping[str, Any]) -> Result:
    """The `classifier` protocol of the `readout` stage: Checkpoint in, `result.json` and the trained head out.

    Raises:
        UserError: unknown encoder, a baseline without blocks, a missing checkpoint, a benchmark that cannot be read, or settings
            that cannot be.
        Preempted: it was asked to stop, and the next call goes on where it stopped.
    """
    started = time.time()
    keys = ["profile", "seed", "readout.shared", f"readout.tasks.{TASK}", f"readout.{PROTOCOL}", *KEYS]
    mine = config.declared(settings, keys)
    saving = saving_of(settings)
    config.bind(*(mine[key] for key in keys[2:]))
    evaluation, recipe, asked = config.build(Evaluation), config.build(Classifier), config.build(Actions)
    views.check(TASK, asked.views, asked.test_views)
    _check(recipe, evaluation.ranks)
    means = means_of(saving, ranks=evaluation.ranks, batch=recipe.batch)
    home = artifacts.home(settings)
    folder = home / "pretrain" / encoder
    saved = Checkpoint.read(folder)
    if saved.model == "PixelTokens":
        raise UserError("pixels are no encoder: there is nothing to fine-tune; take them out of encoders.classifier")
    if saved.model not in METHODS | ENCODERS:
        raise UserError(f"{encoder} is no encoder of this project, as this protocol needs; take it out of encoders.classifier")
    final = home / "readout" / encoder / TASK / PROTOCOL
    inputs = {}
    if leads():
        benchmark = benchmarks.folder(TASK, Path(evaluation.data))
        inputs = {"checkpoint": artifacts.sha256(folder), "benchmark": artifacts.sha256(benchmark)}
        if saving.every:
            means = replace(means, about=about(f"{encoder}/{TASK}/{PROTOCOL}", PROTOCOL, mine, inputs))
    found = run(
        _work,
        ranks=evaluation.ranks,
        device=means.tuning.device,
        hang_s=evaluation.hang_s,
        folder=folder,
        asked=asked,
        evaluation=evaluation,
        recipe=recipe,
        means=means,
        seed=mine["seed"],
    )
    draws = evaluation.bootstrap_draws
    result = result_of(saved, folder, TASK, PROTOCOL, asked, found.videos, found.sums, mine["seed"], draws)
    if leads():
        made = {"settings": settings, "keys": keys, "room": PROTOCOL, "inputs": inputs}
        write(final, result, found, made, state=state_of(means), started=started)
    return result


def _check(recipe: Classifier, ranks: int) -> None:
    if recipe.batch % ranks:
        raise UserError(f"classifier batch {recipe.batch} does not divide over {ranks} ranks; set Classifier.batch to a multiple")
    if recipe.batch == ranks and (recipe.mixup > 0 or recipe.cutmix > 0):
        raise UserError(
            f"classifier batch {recipe.batch} leaves one clip to each of {ranks} ranks, with nothing to mix it with; set "
            "Classifier.batch to more, or Classifier.mixup and Classifier.cutmix to 0"
        )


def _work(
    *, rank: int, ranks: int, folder: Path, asked: Actions, evaluation: Evaluation, recipe: Classifier, means: Means, seed: int
) -> Found:
    actions.check(asked, Path(evaluation.data))
    tuned = _tuned(folder, asked, recipe)
    for number, block in enumerate(tuned.encoder.blocks):
        block.drop_path = recipe.drop_path * number / max(len(tuned.encoder.blocks) - 1, 1)
    tuned.head.initialise(tuned.encoder, seed)
    learned, seen = (Share(TASK, split, asked, evaluation, tuned.encoder.clip, rank, ranks) for split in benchmarks.SPLITS)
    lessons = reread(learned)
    tuned = placed(tuned.train(), means, ranks)
    fit(
        tuned,
        layers(tuned, recipe),
        lambda step: _lesson(lessons, recipe, asked.classes, step, rank=rank, ranks=ranks, seed=seed),
        recipe,
        means,
        log.Steps(f"{folder.name} {PROTOCOL}", recipe.steps),
        what=PROTOCOL,
        rank=rank,
        ranks=ranks,
        seed=seed,
    )
    tensors = {name: whole(value).cpu() for name, value in tuned.head.state_dict().items()}
    device = means.tuning.device
    tuned = gathered(tuned, lambda: _tuned(folder, asked, recipe), compute=means.tuning.compute, device=device).eval()
    videos, sums, _ = judged(seen, Pixels(), lambda pixels, _: tuned.scores(pixels.to(device)), size=JUDGED)
    return Found(gather(videos), gather(sums), tensors, {"train": learned.all_skipped(), "val": seen.all_skipped()})


def _tuned(folder: Path, asked: Actions, recipe: Classifier) -> Tuned:
    encoder = encoder_of(load(folder))
    return Tuned(encoder, Classes(width=encoder.width, classes=asked.classes, dropout=recipe.dropout))


def _lesson(
    lessons: Lessons, recipe: Classifier, classes: int, step: int, *, rank: int, ranks: int, seed: int
) -> tuple[Tensor, Target]:
    pixels, target = lessons.batch(batch_of(step, recipe.batch // ranks, len(lessons), seed, rank))
    x, shares = mixed(pixels, target["action"], recipe, classes, seeds.numpy(seed, "mix", rank, step))
    return x, {"shares": shares}


def layers(tuned: Tuned, recipe: Classifier) -> Parts:
    """Parameters by learning rate: the head's, then each block's from the last to the first, then what comes before them."""
    depth = len(tuned.encoder.blocks)
    parts: Parts = {"head": (list(tuned.head.named_parameters()), recipe.learning_rate)}
    for number in reversed(range(depth)):
        rate = recipe.learning_rate * recipe.layer_decay ** (depth - number)
        parts[f"block_{number}"] = (
            [(f"blocks.{number}.{n}", p) for n, p in tuned.encoder.blocks[number].named_parameters()],
            rate,
        )
    before = [(n, p) for n, p in tuned.encoder.named_parameters() if not n.startswith("blocks.")]
    parts["embedding"] = (before, recipe.learning_rate * recipe.layer_decay ** (depth + 1))
    return parts


def mixed(pixels: Tensor, actions: Tensor, recipe: Classifier, classes: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """uint8 `B T H W C` and `B` classes -> float clips in 0..1 and `B classes` shares.

    Each clip is mixed with the one at the other end of the batch: all of it by a share (mixup), or a rectangle of all frames
    (cutmix). Source: arXiv:1710.09412, arXiv:1905.04899.
    """
    shares = torch.full((len(actions), classes), recipe.label_smoothing / classes)
    shares[torch.arange(len(actions)), actions] += 1 - recipe.label_smoothing
    x = pixels.float() / 255
    if recipe.mixup == 0 and recipe.cutmix == 0:
        return x, shares
    cut = recipe.mixup == 0 or (recipe.cutmix > 0 and rng.random() < 0.5)
    kept = float(rng.beta(*2 * [recipe.cutmix if cut else recipe.mixup]))
    other = x.flip(0)
    if cut:
        (top, left), (bottom, right) = rectangle(x.shape[2], x.shape[3], 1 - kept, rng)
        x = x.clone()
        x[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / (x.shape[2] * x.shape[3])
    else:
        x = kept * x + (1 - kept) * other
    return x, kept * shares + (1 - kept) * shares.flip(0)


def rectangle(height: int, width: int, area: float, rng: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners (top, left), (bottom, right) of about this share of the picture, centred anywhere and cut off at its rim."""
    size = np.array([height, width]) * np.sqrt(area)
    centre = rng.uniform(0, [height, width])
    low = np.clip(centre - size / 2, 0, [height, width]).round().astype(int)
    high = np.clip(centre + size / 2, 0, [height, width]).round().astype(int)
    return tuple(low.tolist()), tuple(high.tolist())
