"""Labels that follow features through a clip."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_tasks import TASK
from torch import Tensor

from scaling4d import seeds
from scaling4d.encoders import propagation
from scaling4d.encoders.propagation import box_labels, boxes_around, propagate, propagated_boxes

FIXTURE = Path(__file__).parents[1] / "fixtures/rvm_propagation_seed0.npz"
SIDE = 8


def clip_of_a_square(steps: list[tuple[int, int]], size: int = 2) -> Tensor:
    """`t h w D`: a square with its corner at row, column of each step; each cell of it and of the ground has a look."""
    looks = torch.randn(size * size + SIDE * SIDE, 16, generator=seeds.torch_rng(0, "looks"))
    ground, square = looks[size * size :].unflatten(0, (SIDE, SIDE)), looks[: size * size].unflatten(0, (size, size))
    clip = ground.repeat(len(steps), 1, 1, 1)
    for frame, (row, column) in zip(clip, steps, strict=True):
        frame[row : row + size, column : column + size] = square
    return clip


def box(row: int, column: int, size: int = 2) -> list[float]:
    return [column / SIDE, row / SIDE, (column + size) / SIDE, (row + size) / SIDE]


STEPS = [(1, 1), (2, 1), (3, 2), (5, 4)]


def test_a_box_follows_the_features_of_a_moving_square() -> None:
    features, given = clip_of_a_square(STEPS).flatten(1, 2)[None], torch.tensor([[box(1, 1), box(5, 5)]])
    predicted = propagated_boxes(features, given, frames=8)  # two frames a step
    assert torch.allclose(predicted[0, 0], torch.tensor([box(*step) for step in STEPS for _ in range(2)]))
    assert torch.allclose(predicted[0, 1, :6], torch.tensor(box(5, 5)))  # it stays, until the square covers it


def test_features_that_are_the_same_in_every_step_repeat_the_first_box() -> None:
    """The trivial answer, which the task measures too."""
    still = clip_of_a_square([(1, 1)] * 4).flatten(1, 2)[None]
    given = torch.tensor([[[0.2, 0.3, 0.55, 0.6], [0.5, 0.1, 0.9, 0.35]]])
    target = {"boxes": given[:, :, None].repeat(1, 1, 8, 1)}
    predicted = TASK["boxes"].predict_propagated(still, target)
    assert predicted.shape == (1, 2, 8, 4)
    assert torch.equal(predicted, predicted[:, :, :1].expand_as(predicted))
    assert (predicted - target["boxes"]).abs().max() < 0.5 / SIDE  # half a token: labels are shares of its area


def test_a_lost_object_has_an_empty_box_and_a_label_is_the_share_of_a_tokens_area() -> None:
    labels = box_labels(torch.tensor([[0.0, 0.0, 0.1875, 0.125], [0.0, 0.0, 0.0, 0.0]]), SIDE, SIDE)
    assert labels[0, :3, 0].tolist() == [1.0, 0.5, 0.0] and labels.sum((0, 1)).tolist() == [1.5, 0.0]
    boxes = boxes_around(labels[None])
    assert boxes[0, 0].tolist() == [0.0, 0.0, 0.1875, 0.125] and boxes[1, 0].tolist() == [0.0] * 4


def test_propagation_is_that_of_a_loop_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a radius that forbids some tokens, and more steps than the context holds."""
    monkeypatch.setattr(propagation, "CONTEXT", 6)
    monkeypatch.setattr(propagation, "RADIUS", 2)
    rng = seeds.numpy_rng(0, "propagation")
    features, labels = rng.normal(size=(9, 4, 3, 6)), rng.uniform(size=(4, 3, 2))
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    expected: list[np.ndarray] = []
    for step in range(9):
        before = [(unit[0], labels)] * max(6 - step, 0)
        before += [(unit[s], expected[s]) for s in range(max(step - 6, 0), step)]
        out = np.zeros((4, 3, 2))
        for i, j in np.ndindex(4, 3):
            pairs = [(unit[step, i, j] @ unit[0, a, b], labels[a, b]) for a, b in np.ndindex(4, 3)]
            for seen, known in before:
                near = [(a, b) for a, b in np.ndindex(4, 3) if (a - i) ** 2 + (b - j) ** 2 < 4]
                pairs += [(unit[step, i, j] @ seen[a, b], known[a, b]) for a, b in near]
            pairs = sorted(pairs, key=lambda pair: -pair[0])[:7]
            weights = np.exp([cosine / 0.7 for cosine, _ in pairs])
            out[i, j] = sum(weight * label for weight, (_, label) in zip(weights, pairs, strict=True)) / weights.sum()
        expected.append(out)
    got = propagate(torch.from_numpy(features).float(), torch.from_numpy(labels).float())
    assert np.abs(got.numpy() - np.stack(expected)).max() < 1e-6


def test_propagation_is_that_of_the_official_code() -> None:
    """With RVM's own numbers, on more steps than the context holds and a row wider than the radius."""
    official = np.load(FIXTURE)
    got = propagate(torch.from_numpy(official["features"]), torch.from_numpy(official["labels"]))
    assert np.abs(got.numpy() - official["propagated"]).max() < 1e-6
