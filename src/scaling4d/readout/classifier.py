"""The fine-tuning of MAE-ST: the whole encoder with a mean-pooling classifier, for actions.

Source: arXiv:2205.09113 and facebookresearch/mae_st. Not done here: RandAugment and random erasing (our actions tell left from
right and up from down), random crops and time windows, repeated augmentation, and testing over several views (a clip of a
benchmark is read once, at one place).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d import artifacts, benchmarks, checkpoint, config, log, optimizer, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.mae.build import ENCODERS, METHODS, encoder_of, load
from scaling4d.mae.encoder import LAYER_NORM_EPS, initialise
from scaling4d.ranks import at, average_gradients, gather, run
from scaling4d.readout import views
from scaling4d.readout.features import Pixels
from scaling4d.readout.split import Evaluation, Lessons, Share, Sums, judged, reread, write_skipped
from scaling4d.readout.tasks import actions
from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.train import HEAD, batch_of, result_of
from scaling4d.records import Result, UserError

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

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Pixels `B T H W C`, shares of the classes `B classes` -> cross entropy."""
        return F.cross_entropy(self.scores(pixels), target)

    def scores(self, pixels: Tensor) -> Tensor:
        """`B classes`."""
        first = getattr(self.encoder, "first", 0)  # after the class token, if there is one
        return self.head(last_tokens(self.encoder, pixels)[:, first:])


def last_tokens(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """What leaves the last block, a class token included; the list of features ends before."""
    x = encoder.tokens(pixels)
    for block in encoder.blocks:
        x = block(x)
    return x


def classify(encoder: str, settings: Mapping[str, Any]) -> Result:
    """The `classifier` protocol of the `readout` stage: Checkpoint in, `result.json` and the trained head out.

    Raises:
        UserError: unknown encoder, a baseline without blocks, a missing checkpoint, or a benchmark that cannot be read.
    """
    started = time.time()
    keys = ["profile", "seed", "readout.shared", f"readout.tasks.{TASK}", f"readout.{PROTOCOL}"]
    mine = config.declared(settings, keys)
    config.bind(mine["readout.shared"], mine[f"readout.tasks.{TASK}"], mine[f"readout.{PROTOCOL}"])
    evaluation, recipe, asked = config.build(Evaluation), config.build(Classifier), config.build(Actions)
    views.check(TASK, asked.views, asked.test_views)
    home = artifacts.home(settings)
    folder = home / "pretrain" / encoder
    saved = Checkpoint.read(folder)
    if saved.model == "PixelTokens":
        raise UserError("pixels are no encoder: there is nothing to fine-tune; take them out of encoders.classifier")
    if saved.model not in METHODS | ENCODERS:
        raise UserError(f"{encoder} is no encoder of this project, as this protocol needs; take it out of encoders.classifier")
    final = home / "readout" / encoder / TASK / PROTOCOL
    with artifacts.folder(final) as out:
        videos, sums = run(
            _work,
            ranks=evaluation.ranks,
            hang_s=evaluation.hang_s,
            folder=folder,
            asked=asked,
            evaluation=evaluation,
            recipe=recipe,
            seed=mine["seed"],
            out=out,
        )
        result = result_of(saved, folder, TASK, PROTOCOL, asked, videos, sums, mine["seed"], evaluation.bootstrap_draws)
        result.write(out / "result.json")
        inputs = {
            "checkpoint": artifacts.sha256(folder),
            "benchmark": artifacts.sha256(benchmarks.folder(TASK, Path(evaluation.data))),
        }
        artifacts.write_provenance(out, stage="readout", settings=settings, keys=keys, room=PROTOCOL, inputs=inputs)
    artifacts.write_run(f"readout-{encoder}-{TASK}-{PROTOCOL}", artifacts.sha256(final), started=started)
    return result


def _work(
    *, rank: int, ranks: int, folder: Path, asked: Actions, evaluation: Evaluation, recipe: Classifier, seed: int, out: Path
) -> tuple[list[str], list[Sums]]:
    if recipe.batch % ranks:
        raise UserError(f"classifier batch {recipe.batch} does not divide over {ranks} ranks; set Classifier.batch to a multiple")
    if recipe.batch == ranks and (recipe.mixup > 0 or recipe.cutmix > 0):
        raise UserError(
            f"classifier batch {recipe.batch} leaves one clip to each of {ranks} ranks, with nothing to mix it with; set "
            "Classifier.batch to more, or Classifier.mixup and Classifier.cutmix to 0"
        )
    actions.check(asked, Path(evaluation.data))
    encoder = encoder_of(load(folder))
    for number, block in enumerate(encoder.blocks):
        block.drop_path = recipe.drop_path * number / max(len(encoder.blocks) - 1, 1)
    head = Classes(width=encoder.width, classes=asked.classes, dropout=recipe.dropout)
    head.initialise(encoder, seed)
    tuned = Tuned(encoder, head)
    learned, seen = (Share(TASK, split, asked, evaluation, encoder.clip, rank, ranks) for split in benchmarks.SPLITS)
    lines = log.Steps(f"{folder.name} {PROTOCOL}", recipe.steps)
    _train(tuned.train(), reread(learned), recipe, asked.classes, lines, rank=rank, ranks=ranks, seed=seed)
    tuned.eval()
    videos, sums, _ = judged(seen, Pixels(), lambda pixels, _: tuned.scores(pixels), size=JUDGED)
    left_out, also = learned.all_skipped(), seen.all_skipped()
    if rank == 0:
        checkpoint.save_tensors(out / HEAD, head.state_dict())
        write_skipped(out, train=left_out, val=also)
    return gather(videos), gather(sums)


def _train(
    tuned: Tuned,
    lessons: Lessons,
    recipe: Classifier,
    classes: int,
    lines: log.Steps,
    *,
    rank: int,
    ranks: int,
    seed: int,
) -> None:
    adamw, peaks = optimizer.adamw(layers(tuned, recipe), betas=recipe.betas, weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        at(f"classifier step {step}")
        pixels, target = lessons.batch(batch_of(step, recipe.batch // ranks, len(lessons), seed, rank))
        x, shares = mixed(pixels, target["action"], recipe, classes, seeds.numpy(seed, "mix", rank, step))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seeds.numpy(seed, "drop", rank, step).integers(2**31)))  # dropout and stochastic depth
            loss = tuned(x, shares)
        loss.backward()
        average_gradients(tuned.parameters())
        grad = nn.utils.clip_grad_norm_(tuned.parameters(), recipe.clip_norm)
        if not torch.isfinite(grad):
            raise UserError(f"classifier step {step}: the gradient is {grad.item()}; lower Classifier.learning_rate")
        optimizer.set_rate(adamw, peaks, optimizer.warmup_cosine(step, steps=recipe.steps, warmup=recipe.warmup_steps))
        adamw.step()
        adamw.zero_grad()
        if rank == 0:
            lr = adamw.param_groups[0]["lr"]
            lines.line(step + 1, loss=loss.item(), lr=lr, grad=grad.item(), clips=(step + 1) * recipe.batch)


def layers(tuned: Tuned, recipe: Classifier) -> dict[str, tuple[list[tuple[str, nn.Parameter]], float]]:
    """Parameters by learning rate: the head's, then each block's from the last to the first, then what comes before them."""
    depth = len(tuned.encoder.blocks)
    parts: dict[str, tuple[list[tuple[str, nn.Parameter]], float]] = {
        "head": (list(tuned.head.named_parameters()), recipe.learning_rate)
    }
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
