"""Filling in masked clips."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scaling4d import config, seeds, vision_operators
from scaling4d.pretrain.loop import pretrain
from scaling4d.reconstruct import fidelity
from scaling4d.reconstruct.fidelity import METRICS, Fidelity, inception
from scaling4d.reconstruct.fill import reconstruct
from scaling4d.records import UserError

SMALL = {"width": 32, "depth": 1, "heads": 2, "patch_frames": 2, "patch_px": 8, "inception": "", "checkpoint": ""}
FIDELITY = Fidelity(**SMALL, subsets=10, subset_size=50, neighbours=3)


def clips(name: str, count: int = 70) -> torch.Tensor:
    torch.set_num_threads(1)
    return torch.randint(0, 256, (count, 4, 16, 16, 3), dtype=torch.uint8, generator=seeds.stream(0, name))


def of(extract: fidelity.Extractor, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return extract(pixels)


def test_equal_clips_have_no_distance_and_darker_ones_lie_farther_the_darker_they_are() -> None:
    extract = FIDELITY.extractors((4, 16, 16), 0)["clip"]
    true = of(extract, clips("a"))
    same, darker, dark = (FIDELITY.compare(of(extract, (clips("a") * by).to(torch.uint8)), true) for by in (1.0, 0.9, 0.5))
    assert abs(same["fid"]) < 1e-6 and abs(same["kid"]) < 0.02 and same["precision"] == same["recall"] == 1
    assert 0 < darker["fid"] < dark["fid"] and 0 < darker["kid"] < dark["kid"]
    assert dark["precision"] == dark["recall"] == 0


def test_precision_falls_with_alien_clips_and_recall_with_missing_ones() -> None:
    near, far = torch.randn(40, 8, generator=seeds.stream(0, "near")), torch.full((10, 8), 50.0)
    far = far + torch.randn(10, 8, generator=seeds.stream(0, "far"))
    both = torch.cat([near[:30], far])
    alien, missing = FIDELITY.compare(both, near), FIDELITY.compare(near, both)
    assert alien["precision"] == pytest.approx(0.75) and alien["recall"] > 0.9
    assert missing["recall"] == pytest.approx(0.75) and missing["precision"] > 0.9


def test_the_order_of_frames_is_seen_in_clips_and_not_in_frames() -> None:
    found = FIDELITY.extractors((4, 16, 16), 0)
    true = clips("a")
    backwards = true.flip(1)
    as_frames = [of(found["frame"], part.flatten(0, 1)[:, None]).unflatten(0, (70, 4)).mean(1) for part in (true, backwards)]
    assert torch.allclose(*as_frames, atol=1e-5)
    assert not torch.allclose(of(found["clip"], true), of(found["clip"], backwards), atol=1e-3)


def test_fid_is_that_of_two_normal_distributions() -> None:
    a = torch.randn(2000, 3, generator=seeds.stream(0, "normal"))
    shifted = FIDELITY.compare(a + torch.tensor([3.0, 0.0, 0.0]), a)
    assert shifted["fid"] == pytest.approx(9, rel=1e-3)
    doubled = FIDELITY.compare(a * 2, a)
    assert doubled["fid"] == pytest.approx(float(torch.cov(a.T).trace() + a.mean(0).square().sum()), rel=1e-3)


def test_too_few_clips_have_no_distance() -> None:
    assert FIDELITY.compare(torch.ones(4, 8), torch.ones(4, 8)) == dict.fromkeys(METRICS)


def test_a_checkpoint_gives_features_of_clips_of_another_size(project: Path) -> None:
    settings = config.read()
    settings["pretrain"]["Training"]["steps"] = 1
    folder = pretrain("nano", settings)
    extract = Fidelity(**SMALL | {"checkpoint": str(folder)}, subsets=1, subset_size=2, neighbours=3).extractors((8, 32, 32), 0)
    pixels = torch.zeros(2, 8, 32, 32, 3, dtype=torch.uint8)
    assert of(extract["checkpoint"], pixels).shape == (2, 32)


def test_inception_gives_features_of_frames_from_a_file_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(4)
    vision_operators.declare()
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    network = module.FeatureExtractorInceptionV3
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})  # a network with random weights
    with monkeypatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, weights: None)
        torch.save(network("random", ["2048"]).state_dict(), tmp_path / "weights.pth")
    found = of(inception(tmp_path / "weights.pth"), clips("a", 2)[:, :1])
    assert found.shape == (2, 2048) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no file "), ({"fc.bias": torch.ones(1)}, "does not fit Inception"), (Path, "")]
)
def test_a_file_that_is_no_weights_of_inception_is_refused_and_runs_nothing(
    content: object, message: str, tmp_path: Path
) -> None:
    path, touched = tmp_path / "weights.pth", tmp_path / "touched"
    if content is Path:
        message = "is not a file of weights alone"
        torch.save(Harmful(touched), path)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        inception(path)
    assert not touched.exists()


class Harmful:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("point", ["nano", "mae_st_tiny"])
def test_hidden_pixels_are_measured_and_shown(project: Path, point: str) -> None:
    settings = config.read()
    settings["pretrain"]["Training"]["steps"] = 2
    pretrain(point, settings)
    folder = reconstruct(point, settings)
    measured = json.loads((folder / "result.json").read_text())
    assert measured["psnr_db"] == pytest.approx(-10 * np.log10(measured["masked_mse"]))
    assert 0 < measured["masked_mse"] < 1
    assert measured["frame_fid"] > 0 and measured["clip_fid"] > 0
    assert {f"{kind}_{metric}" for kind in ("frame", "clip") for metric in METRICS} <= measured.keys()
    assert measured["frames"] == measured["clips"] * 4
    assert Image.open(folder / "filled.png").size == (4 * 64, 2 * 3 * 64)
    again = reconstruct(point, settings)
    assert json.loads((again / "result.json").read_text()) == measured
