"""Distillation: from visible tokens, a small encoder predicts their features in a large one that sees all tokens.

The released 4DS-B was distilled from 4DS-e; the recipe is not published. This recipe is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d.config import require_minima, require_sizes
from scaling4d.mae.encoder import Backbone, Method, MethodConfig
from scaling4d.records import MaskedTokens, UserError


@dataclass(frozen=True, kw_only=True)
class DistilledConfig(MethodConfig):
    """teacher: name of a pretrained point. teacher_width: D of its features. teacher_layer: the predicted layer."""

    teacher: str
    teacher_width: int
    teacher_layer: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "teacher_width")
        require_minima(self, {"teacher_layer": 0})


class Distilled(Method):
    """A student encoder with a linear layer that predicts its teacher's features. Ours: of neither paper.

    Args:
        teacher_encoder: the teacher; only training needs it, and it is no part of the model.
    """

    config_class = DistilledConfig

    def __init__(self, config: DistilledConfig, teacher_encoder: nn.Module | None = None) -> None:
        super().__init__(config)
        self.encoder = Backbone(config)
        if teacher_encoder is not None:
            sizes = (teacher_encoder.width, teacher_encoder.grid)
            if sizes != (config.teacher_width, self.encoder.grid) or teacher_encoder.depth < config.teacher_layer:
                raise UserError(
                    f"teacher {config.teacher} has width {sizes[0]}, grid {sizes[1]}, {teacher_encoder.depth + 1} layers; "
                    f"needed width {config.teacher_width}, grid {self.encoder.grid} and a layer {config.teacher_layer}"
                )
            teacher_encoder.requires_grad_(False)
        self.teacher_encoder = (teacher_encoder,)  # a tuple hides it from nn.Module, so that it is no submodule
        self.decoder = nn.Linear(config.width, config.teacher_width)

    def predict(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """`B K teacher_width`."""
        return self.decoder(self.encoder.last_tokens(pixels, masked))

    @torch.no_grad()
    def target(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """`B K teacher_width`: the teacher's features of the visible tokens, each with mean 0 and deviation 1."""
        (teacher,) = self.teacher_encoder
        layer = self.config.teacher_layer
        x = teacher.features(pixels, layer + 1)[layer]  # B N D
        x = x.gather(1, masked.ids_keep[..., None].expand(-1, -1, x.shape[-1]))  # B K D
        return F.layer_norm(x.float(), x.shape[-1:])

    def forward(self, pixels: Tensor, masked: MaskedTokens) -> Tensor:
        """Mean squared error of the predicted features (a scalar)."""
        return F.mse_loss(self.predict(pixels, masked).float(), self.target(pixels, masked))  # as in SimpleMAE.forward
