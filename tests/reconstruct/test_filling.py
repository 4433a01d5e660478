"""Filling in masked clips, and the fidelity of the result."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import nearness
import numpy as np
import pytest
import torch
from payload import Payload
from PIL import Image

from scaling4d import config, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders import torchvision_shim
from scaling4d.mae.models import METHODS, config_of
from scaling4d.reconstruct import stage
from scaling4d.reconstruct.fidelity import METRICS, Extractor, FidelityConfig, compare, load_extractors, load_inception
from scaling4d.reconstruct.stage import FillingConfig, fill_clips_on_rank, measurements, moving_pixels, reconstruct
from scaling4d.records import UserError
from scaling4d.training.distributed import run

FIDELITY = FidelityConfig(inception="", checkpoint="")
SCRIPT = """import scaling4d.cli, numpy as np; from scaling4d.reconstruct.fidelity import fidelity
print(fidelity({"clip": np.random.default_rng(0).normal(size=(2, 200, 384))}))"""


def clips(count: int = 70) -> torch.Tensor:
    return torch.randint(0, 256, (count, 4, 16, 16, 3), dtype=torch.uint8, generator=seeds.torch_rng(0, "a"))


def features(extract: Extractor, pixels: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return extract(pixels).numpy()


def test_equal_clips_have_no_distance_and_darker_ones_lie_farther_the_darker_they_are() -> None:
    extract = load_extractors(FIDELITY, (4, 16, 16), 0)["clip"]
    true = features(extract, clips())
    same, darker, dark = (compare(features(extract, (clips() * by).to(torch.uint8)), true) for by in (1.0, 0.9, 0.5))
    assert abs(same["fid"]) < 1e-6 and abs(same["kid"]) < 0.1 and same["precision"] == same["recall"] == 1
    assert 0 < darker["fid"] < dark["fid"] and 0 < darker["kid"] < dark["kid"]
    assert dark["precision"] == dark["recall"] == 0


def test_precision_falls_with_alien_clips_and_recall_with_missing_ones() -> None:
    near, far = np.split(seeds.numpy_rng(0, "features").normal(size=(50, 8)), [40])
    both = np.concatenate([near[:30], far + 50])
    alien, missing = compare(both, near), compare(near, both)
    assert alien["precision"] == pytest.approx(0.75) and alien["recall"] > 0.9
    assert missing["recall"] == pytest.approx(0.75) and missing["precision"] > 0.9


def test_features_of_clips_depend_on_the_order_of_frames_and_those_of_frames_do_not() -> None:
    extractors = load_extractors(FIDELITY, (4, 16, 16), 0)
    orders = clips(), clips().flip(1)
    frames = [features(extractors["frame"], p.flatten(0, 1)[:, None]).reshape(70, 4, -1).mean(1) for p in orders]
    assert nearness.near(*frames)
    assert not nearness.near(*(features(extractors["clip"], pixels) for pixels in orders), 1e-3)


@pytest.mark.integration
def test_fid_is_that_of_two_normal_distributions() -> None:
    a = seeds.numpy_rng(0, "normal").normal(size=(2000, 3))
    assert compare(a + [3, 0, 0], a)["fid"] == pytest.approx(9, rel=1e-3)
    assert compare(a * 2, a)["fid"] == pytest.approx(np.trace(np.cov(a.T)) + np.square(a.mean(0)).sum(), rel=1e-3)


def test_too_few_clips_have_no_distance() -> None:
    assert compare(np.ones((4, 8)), np.ones((4, 8))) == dict.fromkeys(METRICS)


@pytest.mark.integration
def test_fidelity_is_the_same_to_the_last_digit_with_any_number_of_threads() -> None:
    command, processes = [sys.executable, "-c", SCRIPT], []
    for threads in "14":
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    one, four = (process.communicate()[0] for process in processes)
    assert one == four != ""


@pytest.mark.integration
def test_inception_gives_features_of_frames_from_a_file_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_shim.declare_operators()
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    network = module.FeatureExtractorInceptionV3
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})  # a network with random weights
    with monkeypatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, weights: None)
        torch.save(network("random", ["2048"]).state_dict(), tmp_path / "weights.pth")
    first, second = features(load_inception(tmp_path / "weights.pth"), clips(2)[:, :1])
    assert first.shape == (2048,) and not np.array_equal(first, second)


HARMFUL = Payload(Path.touch, Path("touched"))


@pytest.mark.parametrize(("content", "message"), [
    (None, "no file "), ({"fc.bias": torch.ones(1)}, "does not fit Inception"), (HARMFUL, "is not a file of weights alone")
])  # fmt: skip
def test_a_file_without_weights_of_inception_is_refused_and_runs_nothing(content, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        torch.save(content, "weights.pth")
    with pytest.raises(UserError, match=message):
        load_inception(Path("weights.pth"))
    assert not Path("touched").exists()


def test_pixels_that_differ_from_their_median_over_the_clip_move() -> None:
    still = torch.full((1, 8, 4, 4, 3), 100, dtype=torch.uint8)
    still[:, :, 2, 3] += torch.arange(8, dtype=torch.uint8)[:, None]  # flickers by less than the limit
    assert not moving_pixels(still).any()
    still[:, 5, 1, 1] = 200
    assert moving_pixels(still).nonzero().tolist() == [[0, 5, 1, 1, 0]]


@pytest.mark.usefixtures("project")
def test_a_model_that_predicts_no_pixels_is_refused() -> None:
    folder = Path("artifacts/smoke/pretrain/raw")
    folder.mkdir(parents=True)
    Checkpoint("raw", "PixelTokens", {}, 0, 0, 0).write(folder, {})
    with pytest.raises(UserError, match="^raw is a PixelTokens, which predicts no pixels; needed a SimpleMAE or MAEST$"):
        reconstruct("raw", config.compose(["profile=smoke"]))
    shutil.rmtree(folder)


@pytest.mark.integration
@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(("point", "added"), [("nano", []), ("mae_st_tiny", ["+point@points.mae_st_tiny=mae_st_tiny"])])
def test_hidden_pixels_are_measured_and_shown_by_any_number_of_ranks(
    point: str, added: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.compose(["profile=smoke", "clips.Curation.listed=''", *added])
    folder = Path("artifacts/smoke/pretrain") / point
    ((method, values),) = settings["points"][point]["model"].items()
    model = METHODS[method](config_of(METHODS[method], values))
    model.initialise(0)
    folder.mkdir(parents=True, exist_ok=True)
    Checkpoint(point, method, asdict(model.config), 0, 0, 0).write(folder, model.state_dict())
    settings["reconstruct"]["Fidelity"]["checkpoint"] = str(folder)
    out = reconstruct(point, settings)
    measured = json.loads((out / "result.json").read_text())
    given = {"folder": folder, "clips": Path("artifacts/smoke/clips"), "extractors": FIDELITY, "seed": 0}
    one = FillingConfig("cpu", "float32", ranks=1, shards=1)
    filled, rows = run(fill_clips_on_rank, ranks=2, filling=replace(one, ranks=2), **given)
    assert np.array_equal(rows, np.asarray(Image.open(out / "filled.png")))
    rounded, _ = run(fill_clips_on_rank, ranks=1, filling=replace(one, compute="bfloat16"), **given)
    assert [clip.error for clip in rounded] == pytest.approx([clip.error for clip in filled], rel=0.05)
    monkeypatch.setattr(stage, "BATCH", 2)
    assert len(filled) == 18  # clips: two of the four ranks have a pass less
    sharded, sharded_rows = run(fill_clips_on_rank, ranks=4, filling=replace(one, ranks=4, shards=4), **given)
    assert [clip.error for clip in sharded] == pytest.approx([clip.error for clip in filled], rel=1e-4)
    assert np.abs(sharded_rows.astype(int) - rows).max() <= 1
    alone = measurements(filled)
    if measured["true_patch_statistics"]:
        assert method == "MAEST" and not alone.keys() & measured.keys()
    else:
        assert 0 < measured["masked_mse"] < measured["moving_mse"] < 1
        assert measured["psnr_db"] == pytest.approx(-10 * np.log10(measured["masked_mse"]))
        assert measured["frame_fid"] > 0 and measured["clip_fid"] > 0
        assert {f"{kind}_{metric}" for kind in ("frame", "clip", "checkpoint") for metric in METRICS} <= measured.keys()
        for name in ("masked_mse", "moving_mse"):
            assert alone[name] == pytest.approx(measured[name], rel=1e-5)
    assert measured["frames"] == measured["clips"] * 4
    assert Image.open(out / "filled.png").size == (8 * 64, 2 * 3 * 64)
    extractors = load_extractors(FidelityConfig("", str(folder)), (8, 32, 32), 0)  # clips of another size
    pixels = torch.zeros(2, 8, 32, 32, 3, dtype=torch.uint8)
    assert features(extractors["checkpoint"], pixels).shape == (2, model.encoder.width)
