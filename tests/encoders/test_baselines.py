"""Encoders to compare with that need no download: a point before its first step, and raw pixels."""

from pathlib import Path

import pytest
import torch

from scaling4d import config
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.load import load_model
from scaling4d.encoders.stage import baseline
from scaling4d.pretrain.settings import bind_pretrain
from scaling4d.records import UserError

pytestmark = pytest.mark.integration


def test_the_untrained_baseline_is_the_point_before_its_first_step(project: Path) -> None:
    folder = baseline("untrained_nano", config.read())
    model = bind_pretrain("nano", config.read()).build()
    model.to_empty(device="cpu").initialise(0)
    weights = load_model(folder).state_dict()
    assert weights.keys() == model.state_dict().keys() and Checkpoint.read(folder).step == 0
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_the_pixel_baseline_is_the_clip_itself(project: Path) -> None:
    clip = torch.randint(0, 256, (1, 8, 64, 64, 3), dtype=torch.uint8)
    (layer,) = load_model(baseline("pixels", config.read())).features(clip)
    assert layer.shape == (1, 512, 192)
    assert torch.allclose(layer.std(), (clip / 255 * 4).std(), rtol=1e-4)


def test_an_unknown_baseline_names_the_known_ones(project: Path) -> None:
    with pytest.raises(
        UserError, match="^unknown baseline 'noise'; needed pixels, untrained_<point>, or one of encoders.pretrained$"
    ):
        baseline("noise", config.read())
