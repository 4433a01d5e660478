"""MAE-ST's fine-tuning classifier."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from scaling4d import config, seeds
from scaling4d.mae.encoder import Encoder, initialise
from scaling4d.mae.mae_st import MAESTEncoder
from scaling4d.pretrain.point import baseline
from scaling4d.readout.classifier import Classes, Classifier, Tuned, classify, layers, mixed, rectangle
from scaling4d.records import UserError

PLAIN = {
    "steps": 2,
    "batch": 4,
    "learning_rate": 1e-3,
    "layer_decay": 0.75,
    "weight_decay": 0.05,
    "betas": (0.9, 0.999),
    "warmup_steps": 1,
    "clip_norm": 1.0,
    "dropout": 0.5,
    "drop_path": 0.2,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
}
ACTIONS = torch.tensor([0, 3, 4, 1])


def tuned() -> Tuned:
    shape = {"width": 24, "depth": 3, "heads": 2, "mlp": 48, "clip": (4, 16, 16), "patch": (2, 8, 8)}
    model = Tuned(Encoder(**shape, gelu="tanh", pixel_mean=0.0, pixel_scale=1.0), Classes(width=24, classes=5, dropout=0.0))
    initialise(model, seed=0)
    return model


def clips(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 4, 16, 16, 3), dtype=torch.uint8, generator=seeds.stream(0, "clips"))


def test_without_mixing_clips_and_classes_stay() -> None:
    x, shares = mixed(clips(), ACTIONS, Classifier(**PLAIN), 5, seeds.numpy(0, "mix"))
    assert torch.equal(x, clips() / 255)
    assert torch.equal(shares, torch.nn.functional.one_hot(ACTIONS, 5).float())


def test_smoothing_gives_all_classes_their_part() -> None:
    _, shares = mixed(clips(), ACTIONS, Classifier(**PLAIN | {"label_smoothing": 0.1}), 5, seeds.numpy(0, "mix"))
    assert torch.allclose(shares[0], torch.tensor([0.92, 0.02, 0.02, 0.02, 0.02]))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_classes_are_mixed_as_the_pixels_are(kind: str) -> None:
    black_and_white = torch.cat([torch.zeros(1, 4, 16, 16, 3), torch.full((1, 4, 16, 16, 3), 255.0)]).to(torch.uint8)
    seen = set()
    for draw in range(20):
        x, shares = mixed(
            black_and_white, torch.tensor([0, 1]), Classifier(**PLAIN | {kind: 1.0}), 2, seeds.numpy(0, "mix", draw)
        )
        assert torch.allclose(x.mean((1, 2, 3, 4)), shares[:, 1], atol=1e-5)
        assert torch.equal(x, x[:, :1].expand_as(x))  # all frames alike
        assert (kind == "cutmix") == bool(((x == 0) | (x == 1)).all())
        seen.add(round(shares[0, 0].item(), 3))
    assert len(seen) > 10


def test_a_rectangle_lies_in_the_picture_and_has_about_its_share_when_inside() -> None:
    areas = []
    for draw in range(200):
        (top, left), (bottom, right) = rectangle(40, 60, 0.25, seeds.numpy(0, "cut", draw))
        assert 0 <= top <= bottom <= 40
        assert 0 <= left <= right <= 60
        areas.append((bottom - top) * (right - left) / 2400)
    assert 0.22 < max(areas) < 0.28
    assert min(areas) < 0.15


def test_learning_rates_fall_from_the_head_to_the_patches_and_nothing_is_left_out() -> None:
    model, recipe = tuned(), Classifier(**PLAIN)
    parts = layers(model, recipe)
    rates = [rate / recipe.learning_rate for _, rate in parts.values()]
    assert list(parts) == ["head", "block_2", "block_1", "block_0", "embedding"]
    assert np.allclose(rates, [0.75**n for n in range(5)])
    assert sum(p.numel() for named, _ in parts.values() for _, p in named) == sum(p.numel() for p in model.parameters())


def test_a_dropped_branch_is_left_out_for_some_clips_in_training_only_and_the_others_make_up_for_it() -> None:
    block = tuned().encoder.blocks[0]
    x = torch.randn(4000, 2, 24, generator=seeds.stream(0, "x"))
    block.drop_path = 0.25
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        block.eval()
        assert torch.equal(block._dropped(x), x)
        block.train()
        dropped = block._dropped(x)
    left_out = (dropped == 0).all(-1).all(-1)
    assert 0.22 < left_out.float().mean() < 0.28
    assert torch.allclose(dropped[~left_out], x[~left_out] / 0.75)


def test_the_classifier_starts_from_the_encoders_last_norm_and_from_no_opinion() -> None:
    head = Classes(width=24, classes=5, dropout=0.0)
    encoder = MAESTEncoder(
        width=24,
        depth=1,
        heads=2,
        mlp=48,
        clip=(4, 16, 16),
        patch=(2, 8, 8),
        separable_positions=True,
        class_token=True,
        pixel_mean=0.0,
        pixel_scale=1.0,
    )
    torch.nn.init.normal_(encoder.norm.weight, generator=seeds.stream(0, "norm"))
    head.initialise(encoder, 0)
    assert torch.equal(head.norm.weight, encoder.norm.weight)
    assert 1e-5 < head.linear.weight.std() < 3e-5
    assert not head.linear.bias.any()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("readout.classifier.Classifier.batch", 5, "classifier batch 5 does not divide over 2 ranks"),
        ("readout.classifier.Classifier.batch", 2, "classifier batch 2 leaves one clip to each of 2 ranks, with nothing to mix"),
        ("readout.tasks.actions.Actions.views", ["backwards"], "readout.tasks.actions: views = ['backwards']"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    project: Path, changed: Callable, key: str, value: object, said: str
) -> None:
    changed("readout.shared.Evaluation.ranks", 2)
    baseline("untrained_nano", config.read())
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        classify("untrained_nano", changed(key, value))
    assert not list((project / ".resume").glob("partial-*"))


def test_pixels_are_no_encoder(project: Path) -> None:
    baseline("pixels", config.read())
    with pytest.raises(UserError, match="^pixels are no encoder"):
        classify("pixels", config.read())


def test_a_classifier_learns_a_few_clips_by_heart() -> None:
    model, x = tuned(), clips()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(x / 255, {"shares": torch.nn.functional.one_hot(ACTIONS, 5).float()})
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert model.eval().scores(x).argmax(1).tolist() == ACTIONS.tolist()
