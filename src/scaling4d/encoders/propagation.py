"""Label propagation: labels of a clip's first frame follow the similarity of features through the clip. Nothing learns.

Numbers and context are those of RVM's evaluation on DAVIS 2017 (arXiv:2512.13684; google-deepmind/representations4d at
75aca300, `colabs/rvm_evaluation_demo.ipynb`); DINO (arXiv:2104.14294) evaluates alike, with 5 neighbours of 7 frames
within 12 tokens. Ours: labels are boxes, and predictions are boxes around the propagated labels.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor
from torch.nn import functional as F

CONTEXT = 20  # time steps before a step, beside the first one; copies of the first stand for those before the clip
TEMPERATURE = 0.7  # of the softmax over cosines
NEIGHBOURS = 7  # most similar tokens of the context
RADIUS = 20  # tokens of the CONTEXT steps are nearer than this, in tokens; those of the first step may be anywhere
RASTER = 16  # cells of a token's side in which a box around labels is measured; ours: pixels of DAVIS's patches
SHARE_OF_MAXIMUM = 0.5  # labels of a box, by the largest of its object in the step; ours


def propagate(features: Tensor, labels: Tensor) -> Tensor:
    """Carry labels of the first step through a clip.

    Args:
        features: `t h w D`.
        labels: `h w Q`, any numbers, of the first step.
    Returns:
        `t h w Q`; the first step is predicted from itself.
    """
    t, h, w, _ = features.shape
    tokens, first = F.normalize(features.flatten(1, 2), dim=-1), labels.flatten(0, 1)  # t n D, n Q
    rows, columns = torch.meshgrid(*(torch.arange(side, device=features.device) for side in (h, w)), indexing="ij")
    places = torch.stack([rows, columns], -1).flatten(0, 1).float()  # n 2
    near = torch.cdist(places, places) < RADIUS  # n n
    allowed = torch.cat([torch.ones_like(near), near.repeat(1, CONTEXT)], dim=1)  # n m
    context = deque([(tokens[0], first)] * CONTEXT, maxlen=CONTEXT)
    propagated = []
    for step in tokens:
        steps, shares = zip((tokens[0], first), *context, strict=True)
        cosines = (step @ torch.cat(steps).T).masked_fill(~allowed, -math.inf)  # n m
        nearest, ids = cosines.topk(min(NEIGHBOURS, cosines.shape[1]), dim=1)
        weights = (nearest / TEMPERATURE).softmax(1)  # n k
        propagated.append((weights[..., None] * torch.cat(shares)[ids]).sum(1))  # n Q
        context.append((step, propagated[-1]))
    return torch.stack(propagated).unflatten(1, (h, w))


def box_labels(boxes: Tensor, h: int, w: int) -> Tensor:
    """Boxes `Q 4`, x1 y1 x2 y2 in 0..1 -> `h w Q`: the share of each token's area that lies in the box."""

    def overlaps(low: Tensor, high: Tensor, cells: int) -> Tensor:  # `Q` -> `cells Q`
        edges = torch.arange(cells + 1, device=boxes.device)[:, None] / cells
        return (torch.minimum(edges[1:], high) - torch.maximum(edges[:-1], low)).clamp(min=0) * cells

    x1, y1, x2, y2 = boxes.unbind(-1)
    return overlaps(y1, y2, h)[:, None] * overlaps(x1, x2, w)[None]


def boxes_around(labels: Tensor) -> Tensor:
    """Labels `t h w Q` -> boxes `Q t 4` around all places with at least SHARE_OF_MAXIMUM.

    Labels are interpolated linearly between the tokens' centres, as in the evaluation on DAVIS. An object without
    labels has the box 0 0 0 0.
    """
    _, h, w, _ = labels.shape
    maps = F.interpolate(labels.permute(3, 0, 1, 2), (h * RASTER, w * RASTER), mode="bilinear")  # Q t H W
    largest = labels.amax((1, 2)).T[..., None, None]  # Q t 1 1
    inside = (maps >= SHARE_OF_MAXIMUM * largest) & (largest > 0)

    def extent(there: Tensor) -> tuple[Tensor, Tensor]:  # bool `Q t cells` -> first and last edge, `Q t`, in 0..1
        edges = torch.arange(there.shape[-1] + 1, device=there.device) / there.shape[-1]
        low = torch.where(there, edges[:-1], 1.0).amin(-1)
        return torch.where(there.any(-1), low, 0.0), torch.where(there, edges[1:], 0.0).amax(-1)

    (x1, x2), (y1, y2) = extent(inside.any(2)), extent(inside.any(3))
    return torch.stack([x1, y1, x2, y2], dim=-1)


def propagated_boxes(features: Tensor, given: Tensor, frames: int) -> Tensor:
    """Boxes of the first frame `B Q 4` -> `B Q T 4`. features: `B t h*w D`, h = w. A step's box is that of its frames.

    Clips one by one: similarities to CONTEXT steps take memory.
    """
    t, n = features.shape[1:3]
    side = math.isqrt(n)  # clips are square
    steps = torch.arange(frames, device=features.device) * t // frames
    boxes = [
        boxes_around(propagate(clip.unflatten(1, (side, side)), box_labels(first, side, side)))
        for clip, first in zip(features, given, strict=True)
    ]
    return torch.stack(boxes)[:, :, steps]
