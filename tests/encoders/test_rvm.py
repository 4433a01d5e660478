"""RVM: frames and states of the official code, streams, and files that are not RVM's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from torch import Tensor

from scaling4d import config
from scaling4d.encoders.encoder import Encoder
from scaling4d.encoders.export import export_program
from scaling4d.encoders.stage import baseline
from scaling4d.mae import rvm
from scaling4d.readout.stage import readout

FIXTURE = Path(__file__).parents[1] / "fixtures/rvm_seed0.npz"
CLIP = (3, 16, 16)
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def positions_of_four_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rvm, "BASE_GRID", (2, 2))


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    with np.load(FIXTURE) as file:
        return dict(file)


def released_file(official: dict[str, np.ndarray], folder: Path, **changes: np.ndarray | None) -> Path:
    """A file as released, decoder included. changes: arrays by key, with __ for /; None: without it."""
    arrays = {key.removeprefix("weights/"): array for key, array in official.items() if key.startswith("weights/")}
    arrays |= {key.replace("__", "/"): array for key, array in changes.items()}
    np.savez(folder / "rvm.npz", **{key: array for key, array in arrays.items() if array is not None})
    return folder / "rvm.npz"


def error(got: Tensor, true: np.ndarray) -> float:
    assert got.numel() == true.size
    return float(np.abs(got.detach().numpy().reshape(true.shape) - true).max() / np.abs(true).max())


@pytest.mark.parametrize("size", ["", "larger_"])
@torch.no_grad()
def test_frames_and_states_are_those_of_the_official_code(official: dict, size: str, tmp_path: Path, agree: Callable) -> None:
    pixels = torch.from_numpy(official[f"{size}pixels"])
    encoder = Encoder.from_pretrained(released_file(official, tmp_path), clip=pixels.shape[1:4])
    output = encoder(pixels)
    assert len(output.hidden_states) == encoder.depth + 1 == 5  # two blocks of the frame encoder, two of the core
    layers = {"tokens": 0, "block_0": 1, "block_1": 2, "features": -1}
    worst = max(error(output.hidden_states[number], official[size + name]) for name, number in layers.items())
    agree(f"RVM {size}frames and states against the official code, relative", worst, TOLERANCE)
    assert (encoder.mean, encoder.scale) == (0.0, 1.0)


@torch.no_grad()
def test_a_stream_of_frames_has_the_states_of_the_official_code_and_the_features_of_a_clip(
    official: dict, tmp_path: Path
) -> None:
    encoder = Encoder.from_pretrained(released_file(official, tmp_path), clip=CLIP)
    pixels, state, steps = torch.from_numpy(official["pixels"]), None, []
    for t in range(3):
        features, state = encoder.step(pixels[:, t], state)
        assert error(state, official["state"][:, t]) < TOLERANCE
        steps.append(features)
    assert torch.allclose(torch.cat(steps, 1), encoder(pixels).last_hidden_state, atol=1e-5)
    assert torch.allclose(encoder.step(pixels[0, 0].numpy())[0], steps[0][:1], atol=1e-5)  # one picture H W 3


def test_frames_that_a_stream_does_not_take_are_one_line(official: dict, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(released_file(official, tmp_path), clip=CLIP)
    frame, (T, H, W) = torch.from_numpy(official["pixels"])[0, 0], CLIP
    for wrong, message in {
        "floats": (frame.float(), "video has floats from "),
        "size": (frame[: H // 2], f"frame H W = ({H // 2}, {W}); this encoder takes ({H}, {W}); encoder.resize(({T}, H, W))"),
        "a batch of clips": (frame[None, None], "frame has 5 axes; needed H W 3 or B H W 3"),
    }.values():
        assert refused(encoder.step, wrong).startswith(message)


@torch.no_grad()
def test_later_frames_do_not_change_features_and_earlier_ones_do(official: dict, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(released_file(official, tmp_path), clip=CLIP)
    pixels = torch.from_numpy(official["pixels"])
    changed = pixels.clone()
    changed[:, 1] = 255 - changed[:, 1]
    difference = (
        (encoder(pixels).last_hidden_state - encoder(changed).last_hidden_state).abs().unflatten(1, (3, 4)).amax((0, 2, 3))
    )
    assert difference[0] == 0 and difference[1] > 1e-3 and difference[2] > 1e-3


@torch.no_grad()
def test_entries_up_to_a_layer_are_those_of_all_layers(official: dict, tmp_path: Path) -> None:
    model = Encoder.from_pretrained(released_file(official, tmp_path), clip=CLIP).model
    pixels = torch.from_numpy(official["pixels"])
    whole = model.features(pixels)
    for layers in range(1, 6):
        some = model.features(pixels, layers)
        assert len(some) == layers and all(torch.equal(a, b) for a, b in zip(some, whole, strict=False))


def test_rvm_is_saved_loaded_exported_and_computes_in_bfloat16(official: dict, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(released_file(official, tmp_path))
    assert encoder.clip == (16, 256, 256) and encoder.grid == (16, 32, 32)
    encoder.resize(CLIP)
    folder = encoder.save_pretrained(tmp_path / "saved")
    assert not [name for name in load_file(folder / "model.safetensors") if "decoder" in name]
    again, pixels = Encoder.from_pretrained(folder), torch.from_numpy(official["pixels"])
    with torch.no_grad():
        expected, exported = again(pixels).last_hidden_state, export_program(again, any_length=False).module()(pixels)[0]
        assert error(expected, official["features"]) < TOLERANCE and torch.allclose(exported, expected, atol=1e-5)
        rough = again.to(torch.bfloat16)(pixels).last_hidden_state
    assert rough.dtype == torch.bfloat16 and (rough - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.integration
def test_a_readout_is_trained_on_a_released_rvm(
    official: dict, tmp_path: Path, actions: object, changed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "overrides", lambda *_: {})
    values = {"source": str(released_file(official, tmp_path)), "revision": "", "clip": [16, 64, 64]}
    settings = changed("encoders.pretrained", {"tiny": {"Pretrained": values}})
    baseline("tiny", settings)
    frozen = readout("tiny", "actions", "frozen", settings)
    assert readout("tiny", "actions", "finetune", settings).parameters == frozen.parameters


@pytest.mark.parametrize(("key", "value", "message"), [
    ("encoder__layers_1__mlp__dense_in__bias", None, "lacks encoder/layers_1/mlp/dense_in/bias; needed an array (48,)"),
    ("rnn_core__state_reset__kernel", None, "lacks rnn_core/state_reset/kernel; needed an array (24, 24)"),
    ("rnn_core__input_reset__kernel", (24, 9), ": rnn_core/input_reset/kernel is (24, 9); needed (24, 24)"),
    ("encoder__layers_0__attention__query__kernel", (24, 2, 5), "heads 2 x 5, 3 x 8; needed 1 frame, 3 channels, and heads"),
    ("tokenizer__patch_embedding__Conv_0__kernel", (8, 8, 3, 24), "Conv_0/kernel is (8, 8, 3, 24); needed an array of 5 axes"),
])  # fmt: skip
def test_a_file_that_is_no_rvm_is_refused(official: dict, key: str, value: object, message: str, tmp_path: Path) -> None:
    array = None if value is None else np.zeros(value, np.float32)
    file = released_file(official, tmp_path, **{key: array})
    refusal = refused(Encoder.from_pretrained, file)
    assert refusal.startswith(str(file)) and message in refusal
