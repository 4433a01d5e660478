"""MAE-ST beyond what the official fixtures show."""

import pytest
import torch

from scaling4d import seeds
from scaling4d.mae.mae_st import MAEST
from scaling4d.mae.patches import patchify, unpatchify

SETTINGS = {
    "width": 48,
    "depth": 2,
    "heads": 3,
    "mlp": 96,
    "decoder_width": 24,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "clip": (16, 16, 16),
    "patch": (2, 8, 8),
    "separable_positions": True,
    "class_token": True,
    "predicted_frames": 8,
    "masking": "random",
    "mask_ratio": 0.75,
    "normalise_target": False,
    "position_init": "normal",
    "branch_init": "released",
    "pixel_mean": 0.0,
    "pixel_scale": 1.0,
}


def clips() -> torch.Tensor:
    return torch.rand(2, 16, 16, 16, 3, generator=seeds.stream(0, "clips"))


@pytest.mark.parametrize("normalised", [False, True])
def test_a_perfect_prediction_fills_in_the_predicted_frames_and_repeats_them_until_the_next(
    normalised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = MAEST(**SETTINGS | {"normalise_target": normalised}), clips()
    model.initialise(0)
    monkeypatch.setattr(model, "decode", lambda pixels, masked: model.target(pixels))
    filled = model.reconstruct(x, model.choose(2, seeds.stream(0, "m")))
    shown = [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 12, 15]  # the official choice is linspace(0, 15, 8), truncated
    assert filled.shape == x.shape
    assert torch.allclose(filled, x[:, shown], atol=1e-5)


def test_initial_values_are_the_official_codes() -> None:
    model = MAEST(**SETTINGS | {"width": 192, "mlp": 768})
    model.initialise(0)
    block = model.encoder.blocks[0]
    for part in block.qkv.weight.chunk(3):
        assert 0.95 < part.abs().max() / (6 / (192 + 192)) ** 0.5 <= 1
    assert 0.95 < block.mlp_in.weight.abs().max() / (6 / (192 + 768)) ** 0.5 <= 1
    assert 0.95 < model.encoder.patch_embedding.weight.abs().max() / (6 / (384 + 192)) ** 0.5 <= 1
    for weight in (
        model.encoder.positions.spatial,
        model.encoder.positions.temporal,
        model.encoder.class_token,
        model.mask_token,
    ):
        assert 0.012 < weight.std() < 0.028
    assert not model.decoder_class_token.any()
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert all((p == 1).all() for name, p in model.named_parameters() if name.endswith("norm.weight"))


def test_the_loss_is_over_hidden_tokens_alone() -> None:
    model, x = MAEST(**SETTINGS), clips()
    model.initialise(0)
    masked = model.choose(2, seeds.stream(0, "m"))
    with torch.no_grad():
        error = (model.decode(x, masked) - model.target(x)).square().mean(-1)
        total = sum(error[b, token].item() for b in range(2) for token in range(32) if token not in masked.kept[b])
        assert abs(model(x, masked).item() - total / (2 * (32 - masked.kept.shape[1]))) < 1e-6
    assert torch.equal(unpatchify(patchify(x, (2, 8, 8)), (16, 16, 16), (2, 8, 8)), x)


def test_it_computes_in_bfloat16_under_autocast() -> None:
    model = MAEST(**SETTINGS)
    model.initialise(0)
    pixels = torch.randint(0, 256, (2, 16, 16, 16, 3), dtype=torch.uint8, generator=seeds.stream(0, "p"))
    masked = model.choose(2, seeds.stream(0, "m"))
    exact = model(pixels, masked)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(pixels, masked)
    assert found.item() == pytest.approx(exact.item(), rel=0.05) and found.item() != exact.item()
