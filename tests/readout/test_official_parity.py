"""Converted published weights against outputs of the official code.

Every folder `4ds_*` and `mae_st_*` in tests/fixtures is tried, and in the folders that SCALING4D_FIXTURES names, if it is set.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from official import HERE, ROOTS, named
from torch import Tensor

from scaling4d import seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.features import layer_index, stretch
from scaling4d.encoders.released import check
from scaling4d.mae.build import load
from scaling4d.mae.resize import cubic_weights, resize
from scaling4d.readout import released
from scaling4d.readout.heads import AttentionReadout, Head, fourier
from scaling4d.records import MaskedTokens
from scaling4d.show import extract

FOLDERS = {named(path): path for root in ROOTS for path in sorted(root.iterdir())}
FOUR_DS = {name: path for name, path in FOLDERS.items() if path.name.startswith("4ds") and path.is_dir()}
MAE_ST = {
    f"{name}/{file.stem}": file
    for name, path in FOLDERS.items()
    if path.name.startswith("mae_st") and path.is_dir()
    for file in sorted(path.glob("*.npz"))
}
MODELS = {
    f"{name}/{file.stem.removesuffix('_params')}": file
    for name, path in FOUR_DS.items()
    for file in sorted(path.glob("*_params.npz"))
    if file.stem != "heads_params"
}
Compare = Callable[..., None]


def io_of(params: Path) -> dict[str, np.ndarray]:
    return dict(np.load(params.with_name(params.name.replace("_params", "_io")), allow_pickle=False))


@pytest.mark.parametrize("name", list(MODELS))
def test_features_of_a_converted_4ds_file_equal_the_official_ones(name: str, tmp_path: Path, agree: Compare) -> None:
    io = io_of(MODELS[name])
    released.from_4ds(MODELS[name], tmp_path / "it")
    np.save(tmp_path / "video.npy", io["video"])
    extract.features(tmp_path / "it", tmp_path / "video.npy", tmp_path / "f.npz", side_px=None, queries=None)
    found = np.load(tmp_path / "f.npz")
    wide = Checkpoint.read(tmp_path / "it").settings["width"] >= 384
    tolerance = 2e-7 if "lowvar" in name else 5e-5 if wide else 1e-5
    wanted = {key for key in io if key.startswith("layer_") or key == "output"}
    assert wanted == set(found)
    for key in sorted(wanted):
        agree(f"{name} {key}", np.abs(found[key].reshape(io[key].shape) - io[key]).max(), tolerance)
    if "extra_last_block_output" in io:
        encoder = load(tmp_path / "it")
        with torch.no_grad():
            last = encoder.blocks[-1](torch.from_numpy(found[max(wanted - {"output"})])).numpy()
        agree(f"{name} last block", np.abs(last - io["extra_last_block_output"]).max(), tolerance)


@pytest.mark.parametrize("name", [name for name, file in MODELS.items() if "readout_features_0.95" in io_of(file)])
def test_a_readout_reads_the_official_layer_stretched_in_time(name: str, agree: Compare) -> None:
    io = io_of(MODELS[name])
    layers = sorted(key for key in io if key.startswith("layer_"))
    for key in (key for key in io if key.startswith("readout_features_")):
        wanted = io[key]
        fraction = float(key.removeprefix("readout_features_"))
        layer = torch.from_numpy(io[layers[layer_index(depth=len(layers) - 1, fraction=fraction)]])
        B, T, n, D = wanted.shape
        found = stretch(layer.reshape(B, -1, n, D), T)
        agree(f"{name} {key}", np.abs(found.numpy() - wanted).max(), 5e-6)


@pytest.mark.parametrize("name", [name for name, path in FOUR_DS.items() if (path / "heads_params.npz").is_file()])
def test_stand_alone_readouts_equal_the_official_ones(name: str, agree: Compare) -> None:
    params, io = (np.load(FOUR_DS[name] / f"heads_{kind}.npz", allow_pickle=False) for kind in ("params", "io"))
    inputs, given = torch.from_numpy(io["inputs"]), torch.from_numpy(io["queries"])
    heads, d = params["cls_vjepa/params/key_embedding/bias"].shape
    common = {"features_width": inputs.shape[-1], "frames": inputs.shape[1], "width": heads * d, "heads": heads}

    def loaded(head: str, module: torch.nn.Module, parts: dict) -> torch.nn.Module:
        check({key: params[key].shape for key in params if key.startswith(f"{head}/")}, parts, name)
        state = {ours: part.ours(*(params[key] for key in part.sources)) for ours, part in parts.items()}
        module.load_state_dict({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()})
        return module

    for head, queries, plain in (("cls_vjepa", 1, False), ("cls_plain", 1, True), ("given_queries", 0, False)):
        settings = common | {"queries": queries, "query_width": given.shape[-1], "out": 7, "plain": plain}
        module = loaded(head, AttentionReadout(**settings), released.attention_readout(settings, f"{head}/params/"))
        with torch.no_grad():
            found = module(inputs) if queries else module(inputs, given)
        wanted = io[f"{head}/output"]
        agree(f"{name}/heads {head}", np.abs(found.numpy().reshape(wanted.shape) - wanted).max(), 5e-6)

    for head, values in (("point", 4), ("box", 4)):
        asked = torch.from_numpy(io[f"{head}/queries"])
        tiles = params[key].shape[0] if (key := f"{head}/params/temporal_tile_posenc/embeddings") in params else 1
        query_width = params[f"{head}/params/query_initializer/layers_1/Dense_0/bias"].shape[0]
        settings = common | {
            "learned": 0,
            "out": inputs.shape[1] // tiles * values,
            "coordinates": asked.shape[-1],
            "tiles": tiles,
            "fourier_bases": 16,
            "query_width": query_width,
            "query_std": 0.02,
            "time_init": "normal",
            "out_scale": 1.0,
            "stretched": True,
            "sharpness": (),
        }
        module = loaded(head, Head(**settings), released.tracking_readout(settings, f"{head}/params/"))
        with torch.no_grad():
            found = module(inputs, asked).permute(0, 2, 1, 3)  # B T Q values
        agree(f"{name}/heads {head} fourier", np.abs(fourier(asked, 16).numpy() - io[f"{head}/fourier"]).max(), 5e-6)
        if head == "box":
            agree(f"{name}/heads box", np.abs(found.numpy() - io["box/values"]).max(), 5e-6)
            continue
        place, visible, certain = found[..., :2].sigmoid(), found[..., 2:3], found[..., 3:4]
        agree(f"{name}/heads point", np.abs(place.numpy() - io["point/values"]).max(), 5e-6)
        agree(f"{name}/heads point visible", np.abs(visible.numpy() - io["point/logits_visible"]).max(), 5e-6)
        agree(f"{name}/heads point certain", np.abs(certain.numpy() - io["point/logits_certainty"]).max(), 5e-6)
        assert np.array_equal((visible.sigmoid() * certain.sigmoid() > 0.5).numpy(), io["point/visible"] > 0.5)


@pytest.mark.parametrize("name", [name for name, path in FOUR_DS.items() if (path / "resize_cases.npz").is_file()])
def test_time_and_positions_are_resized_as_jax_does(name: str, agree: Compare) -> None:
    cases = np.load(FOUR_DS[name] / "resize_cases.npz", allow_pickle=False)
    for case in sorted({key.rsplit("/", 1)[0] for key in cases}):
        x, y = torch.from_numpy(cases[f"{case}/x"]), cases[f"{case}/y"]
        if case.startswith("time"):
            agree(f"{name} {case} matrix", np.abs(cubic_weights(y.shape[1], x.shape[1]).numpy() - cases[f"{case}/W"]).max(), 5e-6)
            found = stretch(x, y.shape[1])
        else:
            found = resize(x.flatten(0, 2), x.shape[:3], y.shape[:3]).reshape(y.shape)
        agree(f"{name} {case}", np.abs(found.numpy() - y).max(), 5e-6)


def converted_mae_st(file: Path, out: Path) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """The fixture's official state dict, saved as the official code does, converted and loaded."""
    z = dict(np.load(file, allow_pickle=False))
    state = {key.removeprefix("state/"): torch.from_numpy(value) for key, value in z.items() if key.startswith("state/")}
    torch.save({"model": state, "epoch": 3}, out / "official.pth")
    decoder = state["decoder_embed.weight"].shape[0]
    heads = {} if state["patch_embed.proj.bias"].shape[0] != 48 else {"heads": 3, "decoder_heads": decoder // 8}
    raw = "pos_embed" in state  # `plain` also predicts raw pixels
    released.from_mae_st(out / "official.pth", out / "it", frames=z["video"].shape[2], normalise_target=not raw, **heads)
    model = load(out / "it")
    model.encoder.pixel_mean, model.encoder.pixel_scale = 0.0, 1.0  # the fixture's clips are random numbers, ready as they are
    return model, z


@pytest.mark.parametrize("name", list(MAE_ST))
def test_mae_st_loss_prediction_latent_and_gradient_equal_the_official_code(name: str, tmp_path: Path, agree: Compare) -> None:
    model, z = converted_mae_st(MAE_ST[name], tmp_path)
    video = torch.from_numpy(z["video"]).permute(0, 2, 3, 4, 1)  # B T H W C
    kept = torch.from_numpy(z["noise"]).argsort(dim=1)[:, : z["latent"].shape[1]]
    masked = MaskedTokens(kept, model.encoder.grid)
    loss = model(video, masked)
    loss.backward()
    found: dict[str, Tensor] = {
        "loss": loss.detach(),
        "pred": model.decode(video, masked).detach(),
        "latent": model.encode(video, masked)[:, model.encoder.first :].detach(),
        "grad_patch_proj": model.encoder.patch_embedding.weight.grad,
    }
    for key, value in found.items():
        wanted = z[key] if key != "grad_patch_proj" else z[key].transpose(0, 2, 3, 4, 1).reshape(value.shape)
        agree(f"{name} {key} (relative)", np.abs(value.numpy() - wanted).max() / np.abs(wanted).max(), 1e-5)


def test_a_fine_tuned_classifier_pools_all_tokens_but_the_first(tmp_path: Path) -> None:
    """Against a slow version of the official forward pass, on the fixture's encoder with a drawn classifier."""
    z = np.load(HERE / "mae_st_seed0/released.npz")
    state = {key.removeprefix("state/"): torch.from_numpy(z[key]) for key in z if key.startswith("state/")}
    state = {key: value for key, value in state.items() if "decoder" not in key and key != "mask_token"}
    state |= {
        "head.weight": torch.randn(5, 48, generator=seeds.stream(0, "head")),
        "head.bias": torch.randn(5, generator=seeds.stream(0, "bias")),
    }
    torch.save({"model_state": state}, tmp_path / "tuned.pth")
    released.from_mae_st(tmp_path / "tuned.pth", tmp_path / "it", heads=3)
    video = np.random.default_rng(0).random((2, 8, 32, 32, 3), np.float32)
    np.save(tmp_path / "video.npy", video)
    extract.features(tmp_path / "it", tmp_path / "video.npy", tmp_path / "f.npz", side_px=None, queries=None)

    s = {key: value.double() for key, value in state.items()}
    x = torch.from_numpy((video - 0.45) / 0.225).double().permute(0, 4, 1, 2, 3)
    x = torch.nn.functional.conv3d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=(2, 8, 8)).flatten(2).mT
    x = x + (s["pos_embed_temporal"][0][:, None] + s["pos_embed_spatial"][0][None]).flatten(0, 1)
    x = torch.cat([(s["cls_token"] + s["pos_embed_class"]).expand(2, 1, 48), x], dim=1)
    norm = lambda y, key: torch.nn.functional.layer_norm(y, (48,), s[f"{key}.weight"], s[f"{key}.bias"], 1e-6)  # noqa: E731
    linear = lambda y, key: y @ s[f"{key}.weight"].mT + s[f"{key}.bias"]  # noqa: E731
    for i in range(3):
        y = norm(x, f"blocks.{i}.norm1")
        q, k, v = (linear(y, f"blocks.{i}.attn.{n}").unflatten(-1, (3, 16)).transpose(1, 2) for n in "qkv")
        y = (q @ k.mT / 4).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        y = torch.nn.functional.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(y, f"blocks.{i}.mlp.fc2")
    wanted = linear(norm(x[:, 1:].mean(1), "norm"), "head")
    assert np.abs(np.load(tmp_path / "f.npz")["output"] - wanted.numpy()).max() < 1e-5
