"""MAE-ST beyond what the official fixtures show."""

import pytest
import small_encoder
import torch
from nearness import near

from scaling4d import seeds
from scaling4d.mae.mae_st import MAEST

SHAPE = {"width": 48, "depth": 2, "heads": 3, "mlp": 96, "clip": (16, 16, 16), "patch": (2, 8, 8)}
SHAPE |= {"pixel_mean": 0.0, "pixel_scale": 1.0, "mask_ratio": 0.75, "decoder_width": 24, "predicted_frames": 8}


def build(**changes: object) -> MAEST:
    return small_encoder.model("MAEST", **SHAPE | {"normalise_target": False} | changes)


def clips() -> torch.Tensor:
    return torch.rand(2, 16, 16, 16, 3, generator=seeds.torch_rng(0, "clips"))


@pytest.mark.parametrize("normalised", [False, True])
def test_a_perfect_prediction_shows_its_frames_until_the_next(normalised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(normalise_target=normalised), clips()
    monkeypatch.setattr(model, "predict_patches", lambda pixels, masked: model.target(pixels))
    filled = model.reconstruct(x, model.draw_mask(2, seeds.torch_rng(0, "m")))
    shown = [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 12, 15]  # the official choice is linspace(0, 15, 8), truncated
    assert filled.shape == x.shape
    assert near(filled, x[:, shown])


def test_initial_values_are_the_official_codes() -> None:
    model = build(width=192, mlp=768)
    block = model.encoder.blocks[0]
    for part in block.qkv.weight.chunk(3):
        assert 0.95 < part.abs().max() / (6 / (192 + 192)) ** 0.5 <= 1
    assert 0.95 < block.mlp_in.weight.abs().max() / (6 / (192 + 768)) ** 0.5 <= 1
    assert 0.95 < model.encoder.patch_embedding.weight.abs().max() / (6 / (384 + 192)) ** 0.5 <= 1
    positions = model.encoder.positions
    for weight in (positions.spatial, positions.temporal, model.encoder.class_token, model.mask_token):
        assert 0.012 < weight.std() < 0.028
    assert not model.decoder_class_token.any()
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert all((p == 1).all() for name, p in model.named_parameters() if name.endswith("norm.weight"))
