"""Our models against outputs of the official code on random weights (tests/fixtures)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scaling4d.mae.encoder import Encoder
from scaling4d.mae.mae_st import MAEST
from scaling4d.records import MaskedTokens

FIXTURES = Path(__file__).parents[1] / "fixtures"


def four_ds_state(arrays: dict[str, np.ndarray], depth: int) -> dict[str, Tensor]:
    """The released flax layout as our state dict."""
    a = {key.removeprefix("params/"): torch.from_numpy(value) for key, value in arrays.items()}
    width = a["encoder/patch_embedding/Conv_0/bias"].shape[0]
    state = {
        "patch_embedding.weight": a["encoder/patch_embedding/Conv_0/kernel"].reshape(-1, width).T,
        "patch_embedding.bias": a["encoder/patch_embedding/Conv_0/bias"],
        "positions": a["encoder/posenc/embeddings"].reshape(-1, width),
    }
    for i in range(depth):
        there, here = f"processor/layers_{i}", f"blocks.{i}"
        parts = [a[f"{there}/attention/{name}/kernel"].reshape(width, width).T for name in ("query", "key", "value")]
        state[f"{here}.qkv.weight"] = torch.cat(parts)
        state[f"{here}.qkv.bias"] = torch.cat([a[f"{there}/attention/{n}/bias"].reshape(-1) for n in ("query", "key", "value")])
        state[f"{here}.out.weight"] = a[f"{there}/attention/out/kernel"].reshape(width, width).T
        state[f"{here}.out.bias"] = a[f"{there}/attention/out/bias"]
        for norm in ("attention_norm", "mlp_norm"):
            state[f"{here}.{norm}.weight"], state[f"{here}.{norm}.bias"] = a[f"{there}/{norm}/scale"], a[f"{there}/{norm}/bias"]
        for ours, theirs in (("mlp_in", "dense_in"), ("mlp_out", "dense_out")):
            state[f"{here}.{ours}.weight"] = a[f"{there}/mlp/{theirs}/kernel"].T
            state[f"{here}.{ours}.bias"] = a[f"{there}/mlp/{theirs}/bias"]
    return state


@pytest.mark.parametrize(("name", "tolerance"), [("backbone", 1e-5), ("backbone_lowvar", 2e-7)])
def test_every_layer_equals_the_released_4ds_code(name: str, tolerance: float) -> None:
    params = dict(np.load(FIXTURES / f"4ds_seed0/{name}_params.npz"))
    io = np.load(FIXTURES / f"4ds_seed0/{name}_io.npz")
    encoder = Encoder(
        width=48, depth=4, heads=3, mlp=96, clip=(6, 32, 48), patch=(2, 16, 16), gelu="tanh", pixel_mean=0.0, pixel_scale=1.0
    )
    encoder.load_state_dict(four_ds_state(params, 4))
    with torch.no_grad():
        layers = encoder.features(torch.from_numpy(io["video"]))
        last = encoder.blocks[-1](layers[-1])
    worst = 0.0
    for index, layer in enumerate([*layers, last]):
        key = f"layer_{index:02d}" if index < len(layers) else "extra_last_block_output"
        worst = max(worst, np.abs(layer.numpy().reshape(io[key].shape) - io[key]).max())
    print(f"{name}: max error {worst:.1e}, tolerance {tolerance:.0e}")
    assert worst < tolerance


def mae_st_state(a: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict (separable positions, class tokens) as ours."""
    flat = lambda w: w.permute(0, 2, 3, 4, 1).flatten(1)  # noqa: E731  D C pt ph pw -> D P
    state = {
        "encoder.patch_embedding.weight": flat(a["patch_embed.proj.weight"]),
        "encoder.patch_embedding.bias": a["patch_embed.proj.bias"],
        "encoder.class_token": a["cls_token"][0],
        "mask_token": a["mask_token"][0],
        "decoder_class_token": a["decoder_cls_token"][0],
        "decoder_embedding.weight": a["decoder_embed.weight"],
        "decoder_embedding.bias": a["decoder_embed.bias"],
    }
    for ours, theirs in (("encoder.positions", "pos_embed"), ("decoder_positions", "decoder_pos_embed")):
        state[f"{ours}.temporal"], state[f"{ours}.spatial"] = a[f"{theirs}_temporal"][0], a[f"{theirs}_spatial"][0]
        state[f"{ours}.class_token"] = a[f"{theirs}_class"][0]
    for part in ("weight", "bias"):
        state |= {f"encoder.norm.{part}": a[f"norm.{part}"], f"decoder_norm.{part}": a[f"decoder_norm.{part}"]}
        state[f"decoder.{part}"] = a[f"decoder_pred.{part}"]
        for ours, theirs, depth in (("encoder.blocks", "blocks", 3), ("decoder_blocks", "decoder_blocks", 2)):
            for i in range(depth):
                there, here = f"{theirs}.{i}", f"{ours}.{i}"
                state[f"{here}.qkv.{part}"] = torch.cat([a[f"{there}.attn.{n}.{part}"] for n in "qkv"])
                state[f"{here}.out.{part}"] = a[f"{there}.attn.proj.{part}"]
                state[f"{here}.attention_norm.{part}"] = a[f"{there}.norm1.{part}"]
                state[f"{here}.mlp_norm.{part}"] = a[f"{there}.norm2.{part}"]
                state[f"{here}.mlp_in.{part}"] = a[f"{there}.mlp.fc1.{part}"]
                state[f"{here}.mlp_out.{part}"] = a[f"{there}.mlp.fc2.{part}"]
    return state


def test_mae_st_loss_prediction_latent_and_gradient_equal_the_official_code() -> None:
    z = np.load(FIXTURES / "mae_st_seed0/released.npz")
    model = MAEST(
        width=48,
        depth=3,
        heads=3,
        mlp=192,
        decoder_width=32,
        decoder_depth=2,
        decoder_heads=4,
        clip=(8, 32, 32),
        patch=(2, 8, 8),
        predicted_frames=4,
        mask_ratio=0.9,
        normalise_target=True,
        position_init="normal",
        branch_init="released",
        pixel_mean=0.0,
        pixel_scale=1.0,
    )
    model.load_state_dict(mae_st_state({k.removeprefix("state/"): torch.from_numpy(z[k]) for k in z if k.startswith("state/")}))
    video = torch.from_numpy(z["video"]).permute(0, 2, 3, 4, 1)  # B T H W C
    kept = torch.from_numpy(z["noise"]).argsort(dim=1)[:, : z["latent"].shape[1]]
    masked = MaskedTokens(kept, (4, 4, 4))
    loss = model(video, masked)
    loss.backward()
    found = {
        "loss": loss.detach(),
        "pred": model.decode(video, masked).detach(),
        "latent": model.encode(video, masked)[:, 1:].detach(),
        "grad_patch_proj": model.encoder.patch_embedding.weight.grad,
    }
    for key, value in found.items():
        wanted = z[key] if key != "grad_patch_proj" else z[key].transpose(0, 2, 3, 4, 1).reshape(48, -1)
        error = np.abs(value.numpy() - wanted).max() / np.abs(wanted).max()
        print(f"mae_st {key}: relative error {error:.1e}, tolerance 1e-05")
        assert error < 1e-5
