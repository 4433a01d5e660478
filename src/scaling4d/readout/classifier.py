"""MAE-ST's fine-tuning for actions: the whole encoder with a mean-pooling classifier, mixup and cutmix.

Source: arXiv:2205.09113 and facebookresearch/mae_st. readout.augment changes single clips before they are mixed.
torchvision's MixUp and CutMix draw from torch's global state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d import seeds
from scaling4d.mae.encoder import LAYER_NORM_EPS, initialise

MIXUP, CUTMIX, LABEL_SMOOTHING = 0.8, 1.0, 0.1  # of mae_st's fine-tuning


class MeanPoolClassifier(nn.Module):
    """Mean over tokens, norm, dropout, linear."""

    def __init__(self, *, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, classes)

    @torch.no_grad()
    def initialise(self, encoder: nn.Module, seed: int) -> None:
        """As mae_st's code: the encoder's own last norm, if it has one, and a linear layer close to zero."""
        initialise(self, seed=seed)
        nn.init.trunc_normal_(self.linear.weight, std=2e-5, generator=seeds.torch_rng(seed, "init", "classifier"))
        if hasattr(encoder, "norm"):
            self.norm.load_state_dict(encoder.norm.state_dict())

    def forward(self, tokens: Tensor) -> Tensor:
        """`B N D` -> `B classes`."""
        return self.linear(self.dropout(self.norm(tokens.mean(1))))


class ClassifierModel(nn.Module):
    """Encoder and classifier."""

    def __init__(self, encoder: nn.Module, head: MeanPoolClassifier) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pixels: Tensor, soft_labels: Tensor) -> Tensor:
        """Pixels `B T H W C`, probabilities `B classes` -> cross entropy."""
        return F.cross_entropy(self.scores(pixels), soft_labels)

    def scores(self, pixels: Tensor) -> Tensor:
        """`B classes`."""
        return self.head(self.encoder.last_tokens(pixels)[:, self.encoder.prefix_tokens :].float())


def layer_decay_groups(
    model: ClassifierModel, learning_rate: float, layer_decay: float
) -> dict[str, tuple[list[tuple[str, nn.Parameter]], float]]:
    """For training.optimizer: the head's rate, then `layer_decay` times it for each block, from the last one on."""
    blocks = model.encoder.blocks
    depth = len(blocks)
    groups = {"head": (list(model.head.named_parameters()), learning_rate)}
    for number in reversed(range(depth)):
        named = [(f"blocks.{number}.{name}", p) for name, p in blocks[number].named_parameters()]
        groups[f"block_{number}"] = (named, learning_rate * layer_decay ** (depth - number))
    embedding = [(name, p) for name, p in model.encoder.named_parameters() if not name.startswith("blocks.")]
    groups["embedding"] = (embedding, learning_rate * layer_decay ** (depth + 1))
    return groups


def mix_clips(
    pixels: Tensor,
    actions: Tensor,
    classes: int,
    rng: np.random.Generator,
    *,
    mixup: float = MIXUP,
    cutmix: float = CUTMIX,
    label_smoothing: float = LABEL_SMOOTHING,
) -> tuple[Tensor, Tensor]:
    """Clips in 0..255, `B T H W C`, and `B` classes -> float clips in 0..1 and soft labels `B classes`.

    Each clip is mixed with the clip at the opposite place of the batch: as a weighted mean (mixup), or in a rectangle
    of all frames (cutmix). With both, each is used for half of the batches. Source: arXiv:1710.09412, arXiv:1905.04899.
    Args:
        mixup, cutmix: of their Beta distributions; 0: not used. label_smoothing: probability spread over all classes.
    """
    labels = torch.full((len(actions), classes), label_smoothing / classes)
    labels[torch.arange(len(actions)), actions] += 1 - label_smoothing
    x = pixels.float() / 255
    cut = mixup == 0 or (cutmix > 0 and rng.random() < 0.5)
    lam, other = float(rng.beta(*2 * [cutmix if cut else mixup])), x.flip(0)
    if cut:
        height, width = x.shape[2:4]
        (top, left), (bottom, right) = random_rectangle(height, width, 1 - lam, rng)
        x = x.clone()
        x[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        x = lam * x + (1 - lam) * other
    return x, lam * labels + (1 - lam) * labels.flip(0)


def random_rectangle(height: int, width: int, area: float, rng: np.random.Generator) -> list[list[int]]:
    """[top, left], [bottom, right] of about this share of the picture, centred anywhere and clipped to it."""
    sides, size = np.array([height, width]), np.array([height, width]) * np.sqrt(area)
    centre = rng.uniform(0, sides)
    corners = np.stack([centre - size / 2, centre + size / 2])
    return np.clip(corners, 0, sides).round().astype(int).tolist()
