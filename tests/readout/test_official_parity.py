"""Converted published weights against outputs of the official code, in folders `4ds_*` and `mae_st_*` of all roots."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from official import ROOTS, arrays_of, named, official_state
from torch import Tensor

from scaling4d import seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.features import layer_index
from scaling4d.encoders.load import load_model
from scaling4d.encoders.released import MAESTOptions, WeightMap, check_shapes
from scaling4d.mae.resize import cubic_weights, resize
from scaling4d.readout.heads import Head, HeadConfig, Queries, fourier_embedding, stretch_time
from scaling4d.readout.released_heads import (
    TRACKING,
    ReleasedReadout,
    attention_weight_map,
    from_4ds,
    from_mae_st,
    tracking_weight_map,
)
from scaling4d.records import MaskedTokens
from scaling4d.show.predict import write_features

FOLDERS = {named(path): path for root in ROOTS for path in sorted(root.iterdir())}
FOUR_DS = {name: path for name, path in FOLDERS.items() if path.name.startswith("4ds") and path.is_dir()}
MAE_ST_FOLDERS = [(name, path) for name, path in FOLDERS.items() if path.name.startswith("mae_st") and path.is_dir()]
MAE_ST = {f"{name}/{file.stem}": file for name, path in MAE_ST_FOLDERS for file in sorted(path.glob("*.npz"))}
PARAMS = [(name, file) for name, path in FOUR_DS.items() for file in sorted(path.glob("*_params.npz"))]
MODELS = {f"{name}/{file.stem.removesuffix('_params')}": file for name, file in PARAMS if file.stem != "heads_params"}
Compare = Callable[..., None]


def io_of(params: Path) -> dict[str, np.ndarray]:
    """Inputs and outputs of the official code beside its parameters."""
    return arrays_of(params.with_name(params.name.replace("_params", "_io")))


@pytest.mark.parametrize("name", list(MODELS))
def test_features_of_a_converted_4ds_file_equal_the_official_ones(name: str, tmp_path: Path, agree: Compare) -> None:
    io = io_of(MODELS[name])
    from_4ds(MODELS[name], tmp_path / "folder")
    np.save(tmp_path / "video.npy", io["video"])
    write_features(tmp_path / "folder", tmp_path / "video.npy", tmp_path / "f.npz", side_px=None, queries=None)
    features = np.load(tmp_path / "f.npz")
    wide = Checkpoint.read(tmp_path / "folder").settings["width"] >= 384
    tolerance = 2e-7 if "lowvar" in name else 5e-5 if wide else 1e-5
    keys = {key for key in io if key.startswith("layer_") or key == "output"}
    assert keys | {"last_hidden_state"} == set(features)
    for key in sorted(keys):
        agree(f"{name} {key}", np.abs(features[key].reshape(io[key].shape) - io[key]).max(), tolerance)
    if "extra_last_block_output" in io:
        encoder = load_model(tmp_path / "folder")
        with torch.no_grad():
            last = encoder.blocks[-1](torch.from_numpy(features[max(keys - {"output"})])).numpy()
        agree(f"{name} last block", np.abs(last - io["extra_last_block_output"]).max(), tolerance)


@pytest.mark.parametrize("name", [name for name, file in MODELS.items() if "readout_features_0.95" in io_of(file)])
def test_a_readout_reads_the_official_layer_stretched_in_time(name: str, agree: Compare) -> None:
    io = io_of(MODELS[name])
    layers = sorted(key for key in io if key.startswith("layer_"))
    for key in (key for key in io if key.startswith("readout_features_")):
        fraction, (B, T, n, D) = float(key.removeprefix("readout_features_")), io[key].shape
        layer = torch.from_numpy(io[layers[layer_index(depth=len(layers) - 1, fraction=fraction)]])
        stretched = stretch_time(layer.reshape(B, -1, n, D), T)
        agree(f"{name} {key}", np.abs(stretched.numpy() - io[key]).max(), 5e-6)


@pytest.mark.parametrize("name", [name for name, path in FOUR_DS.items() if (path / "heads_params.npz").is_file()])
def test_stand_alone_readouts_equal_the_official_ones(name: str, agree: Compare) -> None:
    params, io = (arrays_of(FOUR_DS[name] / f"heads_{kind}.npz") for kind in ("params", "io"))
    inputs, given = torch.from_numpy(io["inputs"]), torch.from_numpy(io["queries"])
    heads, d = params["cls_vjepa/params/key_embedding/bias"].shape
    size = {"features_width": inputs.shape[-1], "frames": inputs.shape[1]}

    def loaded(head: str, module: torch.nn.Module, weights: WeightMap) -> torch.nn.Module:
        check_shapes({key: params[key].shape for key in params if key.startswith(f"{head}/")}, {head: weights}, name)
        state = {ours: entry.to_ours(*(params[key] for key in entry.arrays)) for ours, entry in weights.items()}
        module.load_state_dict({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()}, assign=True)
        return module.requires_grad_(False)

    for head, queries, plain in (("cls_vjepa", 1, False), ("cls_plain", 1, True), ("given_queries", 0, False)):
        query_width = 0 if queries else given.shape[-1]
        shape = {"queries": queries, "query_width": query_width, "width": heads * d, "heads": heads, "out": 7, "plain": plain}
        settings = size | shape
        module = ReleasedReadout("attention", settings, 0.95).build()
        module = loaded(head, module, attention_weight_map(settings, f"{head}/params/"))
        output, expected = module(inputs) if queries else module(inputs, given), io[f"{head}/output"]
        agree(f"{name}/heads {head}", np.abs(output.numpy().reshape(expected.shape) - expected).max(), 5e-6)

    for head, values in (("point", 4), ("box", 4)):
        places, prefix = torch.from_numpy(io[f"{head}/queries"]), f"{head}/params/"
        tiles = params[key].shape[0] if (key := f"{prefix}temporal_tile_posenc/embeddings") in params else 1
        query_width = params[f"{prefix}query_initializer/layers_1/Dense_0/bias"].shape[0]
        head_config = HeadConfig(width=heads * d, heads=heads, query_width=query_width, **TRACKING)
        queries = Queries(out=inputs.shape[1] // tiles * values, coordinates=places.shape[-1], tiles=tiles)
        settings = size | {"head": asdict(head_config), "queries": asdict(queries)}
        module = loaded(head, Head(head_config, queries, **size), tracking_weight_map(settings, prefix))
        output = module(inputs, places).permute(0, 2, 1, 3)  # B T Q values
        embedded = fourier_embedding(places, 16)
        agree(f"{name}/heads {head} fourier", np.abs(embedded.numpy() - io[f"{head}/fourier"]).max(), 5e-6)
        if head == "box":
            agree(f"{name}/heads box", np.abs(output.numpy() - io["box/values"]).max(), 5e-6)
            continue
        point, visible, certain = output[..., :2].sigmoid(), output[..., 2:3], output[..., 3:4]
        for key, ours in {"values": point, "logits_visible": visible, "logits_certainty": certain}.items():
            agree(f"{name}/heads point {key}", np.abs(ours.numpy() - io[f"point/{key}"]).max(), 5e-6)
        assert np.array_equal((visible.sigmoid() * certain.sigmoid() > 0.5).numpy(), io["point/visible"] > 0.5)


@pytest.mark.parametrize("name", [name for name, path in FOUR_DS.items() if (path / "resize_cases.npz").is_file()])
def test_time_and_positions_are_resized_as_jax_does(name: str, agree: Compare) -> None:
    cases = arrays_of(FOUR_DS[name] / "resize_cases.npz")
    for case in sorted({key.rsplit("/", 1)[0] for key in cases}):
        x, y = torch.from_numpy(cases[f"{case}/x"]), cases[f"{case}/y"]
        if case.startswith("time"):
            agree(f"{name} {case} matrix", np.abs(cubic_weights(y.shape[1], x.shape[1]).numpy() - cases[f"{case}/W"]).max(), 5e-6)
            resized = stretch_time(x, y.shape[1])
        else:
            resized = resize(x.flatten(0, 2), x.shape[:3], y.shape[:3]).reshape(y.shape)
        agree(f"{name} {case}", np.abs(resized.numpy() - y).max(), 5e-6)


def converted_mae_st(file: Path, out: Path) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """The fixture's official state dict, saved as the official code does, converted and loaded."""
    z = arrays_of(file)
    state = {key.removeprefix("state/"): torch.from_numpy(value) for key, value in z.items() if key.startswith("state/")}
    torch.save({"model": state, "epoch": 3}, out / "official.pth")
    decoder = state["decoder_embed.weight"].shape[0]
    heads = {} if state["patch_embed.proj.bias"].shape[0] != 48 else {"heads": 3, "decoder_heads": decoder // 8}
    raw = "pos_embed" in state  # `plain` also predicts raw pixels
    options = MAESTOptions(frames=z["video"].shape[2], normalise_target=not raw, **heads)
    model = load_model(from_mae_st(out / "official.pth", out / "folder", options))
    model.encoder.pixel_mean, model.encoder.pixel_scale = 0.0, 1.0  # the fixture's clips are random numbers, ready as they are
    return model, z


@pytest.mark.parametrize("name", list(MAE_ST))
def test_mae_st_loss_prediction_latent_and_gradient_equal_the_official_code(name: str, tmp_path: Path, agree: Compare) -> None:
    model, z = converted_mae_st(MAE_ST[name], tmp_path)
    video = torch.from_numpy(z["video"]).permute(0, 2, 3, 4, 1)  # B T H W C
    masked = MaskedTokens(torch.from_numpy(z["noise"]).argsort(dim=1)[:, : z["latent"].shape[1]], model.encoder.grid)
    loss = model(video, masked)
    loss.backward()
    values: dict[str, Tensor] = {
        "loss": loss.detach(),
        "pred": model.predict_patches(video, masked).detach(),
        "latent": model.encode(video, masked)[:, model.encoder.prefix_tokens :].detach(),
        "grad_patch_proj": model.encoder.patch_embedding.weight.grad,
    }
    for key, value in values.items():
        expected = z[key] if key != "grad_patch_proj" else z[key].transpose(0, 2, 3, 4, 1).reshape(value.shape)
        agree(f"{name} {key} (relative)", np.abs(value.numpy() - expected).max() / np.abs(expected).max(), 1e-5)


def test_a_fine_tuned_classifier_pools_all_tokens_but_the_first(tmp_path: Path) -> None:
    """Normed after pooling, from the encoder that agrees with the official one, with a drawn classifier."""
    state = {key: value for key, value in official_state().items() if "decoder" not in key and key != "mask_token"}
    drawn = {"head.weight": (5, 48), "head.bias": (5,)}
    state |= {key: torch.randn(shape, generator=seeds.torch_rng(0, key)) for key, shape in drawn.items()}
    torch.save({"model_state": state}, tmp_path / "tuned.pth")
    from_mae_st(tmp_path / "tuned.pth", tmp_path / "folder", MAESTOptions(heads=3))
    np.save(tmp_path / "video.npy", np.random.default_rng(0).random((2, 8, 32, 32, 3), np.float32))
    write_features(tmp_path / "folder", tmp_path / "video.npy", tmp_path / "f.npz", side_px=None, queries=None)
    encoder = load_model(tmp_path / "folder")
    assert (encoder.pixel_mean, encoder.pixel_scale) == (0.45, pytest.approx(1 / 0.225))
    with torch.no_grad():
        pooled = encoder.last_tokens(torch.from_numpy(np.load(tmp_path / "video.npy")))[:, 1:].mean(1)
    pooled = torch.nn.functional.layer_norm(pooled, (48,), state["norm.weight"], state["norm.bias"], 1e-6)
    scores = pooled @ state["head.weight"].mT + state["head.bias"]
    assert np.abs(np.load(tmp_path / "f.npz")["output"] - scores.numpy()).max() < 1e-5
