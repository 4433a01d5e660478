"""Clips from files, and baselines that need no download."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused

from scaling4d import config, video
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.load import load_model
from scaling4d.encoders.stage import baseline
from scaling4d.features.inputs import first_clip, read_clips
from scaling4d.features.windows import WindowSettings
from scaling4d.pretrain.settings import bind_pretrain
from scaling4d.records import UserError


def test_a_video_without_a_clip_is_refused(tmp_path: Path) -> None:
    video.encode(tmp_path / "a.mp4", np.zeros((20, 32, 96, 3), np.uint8), rate_hz=10, crf=1, gop=3)
    settings = WindowSettings((99, 8, 8), 5.0, 1.0, "crop")
    assert refused(first_clip, tmp_path / "a.mp4", settings) == f"{tmp_path / 'a.mp4'} is too short; needed 99 frames at 5 Hz"
    assert refused(first_clip, tmp_path / "b.mp4", settings) == f"no file {tmp_path / 'b.mp4'}"


def test_clips_of_bytes_and_of_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    for dtype, expected in ((np.uint8, torch.uint8), (np.float64, torch.float32)):
        np.save(tmp_path / "clip.npy", np.ones((2, 6, 30, 50, 3), dtype))
        assert torch.equal(read_clips(tmp_path / "clip.npy"), torch.ones(2, 6, 30, 50, 3, dtype=expected))


@pytest.mark.parametrize(("array", "message"), [
    (np.zeros((6, 32, 48, 3), np.float32), "holds float32 numbers (6, 32, 48, 3); needed numbers in 5 axes"),
    (np.full((1, 6, 32, 48, 3), 255.0, np.float32), "values from 255.0 to 255.0; needed floats in 0..1, or uint8"),
    (np.zeros((1, 6, 32, 48, 1), np.float32), "needed B T H W 3, float in 0..1 or uint8"),
    (np.zeros((0, 6, 32, 48, 3), np.float32), "needed B T H W 3, float in 0..1 or uint8"),
    (np.zeros((1, 6, 32, 48, 3), np.int32), "needed B T H W 3, float in 0..1 or uint8"),
    (np.full((1, 6, 32, 48, 3), np.nan, np.float32), "values from nan to nan; needed floats in 0..1, or uint8"),
    (np.array([{}], dtype=object), "is not a .npy of numbers"),
])  # fmt: skip
def test_arrays_that_are_no_clips_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=re.escape(message)):
        read_clips(tmp_path / "clip.npy")


@pytest.mark.integration
def test_the_untrained_baseline_is_the_point_before_its_first_step(project: Path) -> None:
    folder = baseline("untrained_nano", config.read())
    model = bind_pretrain("nano", config.read()).build()
    model.to_empty(device="cpu").initialise(0)
    weights = load_model(folder).state_dict()
    assert weights.keys() == model.state_dict().keys() and Checkpoint.read(folder).step == 0
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.integration
def test_the_pixel_baseline_is_the_clip_itself(project: Path) -> None:
    clip = torch.randint(0, 256, (1, 8, 64, 64, 3), dtype=torch.uint8)
    (layer,) = load_model(baseline("pixels", config.read())).features(clip)
    assert layer.shape == (1, 512, 192)
    assert torch.allclose(layer.std(), (clip / 255 * 4).std(), rtol=1e-4)
