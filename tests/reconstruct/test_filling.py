"""Filling in masked clips."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scaling4d import config, seeds
from scaling4d.pretrain.loop import pretrain
from scaling4d.reconstruct.fidelity import Fidelity, frechet_distance
from scaling4d.reconstruct.fill import reconstruct


def frames(name: str) -> torch.Tensor:
    return torch.randint(0, 256, (70, 32, 32, 3), dtype=torch.uint8, generator=seeds.stream(0, name))


def test_equal_frames_have_no_distance_and_darker_ones_have_one() -> None:
    torch.set_num_threads(1)
    encoder = Fidelity(width=32, depth=1, heads=2, patch_px=8).encoder(32, 0)
    true = frames("a")
    darker, dark = (true * 0.9).to(torch.uint8), (true * 0.5).to(torch.uint8)
    assert abs(frechet_distance(true, true, encoder)) < 1e-6
    assert 0 < frechet_distance(darker, true, encoder) < frechet_distance(dark, true, encoder)


@pytest.mark.parametrize("point", ["nano", "mae_st_tiny"])
def test_hidden_pixels_are_measured_and_shown(project: Path, point: str) -> None:
    settings = config.read()
    settings["pretrain"]["Training"]["steps"] = 2
    pretrain(point, settings)
    folder = reconstruct(point, settings)
    measured = json.loads((folder / "result.json").read_text())
    assert measured["psnr_db"] == pytest.approx(-10 * np.log10(measured["masked_mse"]))
    assert 0 < measured["masked_mse"] < 1 and measured["frechet_distance"] > 0
    assert measured["frames"] == measured["clips"] * 4
    assert Image.open(folder / "filled.png").size == (4 * 64, 2 * 3 * 64)
    again = reconstruct(point, settings)
    assert json.loads((again / "result.json").read_text()) == measured
