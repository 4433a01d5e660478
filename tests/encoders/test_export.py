"""Exported programs give the output of the encoder, for any batch and clip length; a refusal is one line."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_encoder
import torch
from commands import invoke, refused_command
from torch import Tensor

from scaling4d import seeds
from scaling4d.encoders import export as exporting
from scaling4d.encoders.encoder import Encoder

CLIP = (4, 32, 48)
ONE_TABLE = {"separable_positions": False, "class_token": False}
MODELS = {
    "4ds": ("Backbone", {}),
    "mae_st": ("MAESTEncoder", {}),
    "mae_st, one table": ("MAESTEncoder", ONE_TABLE),
    "pixels": ("PixelTokens", {}),
}
PUBLISHED = ("dinov2", "videomae")  # kinds of transformers
ANY = ("--any-length",)
NEEDS_ONNX = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnxruntime", "onnxscript"))), reason="needs the extra `export`"
)


def saved(folder: Path, name: str) -> Path:
    if name in PUBLISHED:
        from encoders.small_models import save_model

        save_model(folder, name)
        return folder
    model, changes = MODELS.get(name, (name, {}))
    return small_encoder.checkpoint(folder, model, noise=0.2, clip=CLIP, **changes)


export, refused = partial(invoke, "export"), partial(refused_command, "export")


def clips_of(batch: int, frames: int, *size: int) -> Tensor:
    rng = seeds.torch_rng(0, "clips", batch)
    return torch.randint(0, 256, (batch, frames, *(size or CLIP[1:]), 3), dtype=torch.uint8, generator=rng)


@torch.no_grad()
def expected_of(folder: Path, clips: Tensor) -> tuple[Tensor, Tensor]:
    encoder = Encoder.from_pretrained(folder)
    if clips.shape[1] != encoder.clip[0]:
        encoder.resize(tuple(clips.shape[1:4]))
    output = encoder(clips)
    return output.last_hidden_state, output.pooled


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(kind, marks=pytest.mark.integration) for kind in PUBLISHED)])
def test_a_saved_program_gives_the_encoders_output_for_any_batch(tmp_path: Path, name: str) -> None:
    folder, out = saved(tmp_path / "checkpoint", name), tmp_path / "encoder.pt2"
    assert export(folder, "--torch", out).output == f"wrote {out}\n"
    program, clip = torch.export.load(out).module(), Encoder.from_pretrained(folder).clip
    for batch in (1, 2, 5):
        clips = clips_of(batch, *clip)
        for ours, expected in zip(program(clips), expected_of(folder, clips), strict=True):
            assert torch.allclose(ours, expected, atol=1e-5) if name in PUBLISHED else torch.equal(ours, expected)


def test_a_program_of_half_precision_weights_computes_in_float32_and_leaves_the_encoder(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(saved(tmp_path / "checkpoint", "4ds")).half()
    folder, out = encoder.save_pretrained(tmp_path / "half"), tmp_path / "encoder.pt2"
    assert export(folder, "--torch", out).exit_code == 0
    clips = clips_of(2, CLIP[0])
    with torch.no_grad():
        expected = Encoder.from_pretrained(folder).float()(clips)
    ours = torch.export.load(out).module()(clips)
    assert ours[0].dtype == torch.float32 and torch.equal(ours[0], expected.last_hidden_state)
    exporting.export_program(encoder, any_length=False)
    assert encoder.dtype == torch.float16
    training = Encoder.from_pretrained(saved(tmp_path / "again", "4ds")).train()
    exporting.export_program(training, any_length=False)
    assert training.model.training


@pytest.mark.parametrize("name", ["4ds", "mae_st", "mae_st, one table"])
def test_a_program_of_any_length_gives_what_a_resized_encoder_gives(tmp_path: Path, name: str) -> None:
    folder, out = saved(tmp_path / "checkpoint", name), tmp_path / "encoder.pt2"
    assert export(folder, "--torch", out, "--any-length").exit_code == 0
    program = torch.export.load(out).module()
    for batch, frames in ((2, 4), (1, 6), (3, 32)):
        clips = clips_of(batch, frames)
        for ours, expected in zip(program(clips), expected_of(folder, clips), strict=True):
            assert torch.allclose(ours, expected, atol=1e-5)


@NEEDS_ONNX
@pytest.mark.parametrize(
    ("name", "words"),
    [("mae_st", ANY), ("4ds", ANY), *((name, ()) for name in ("mae_st", "4ds", "VideoMAE2", "VJEPA21"))]
    + [pytest.param(kind, (), marks=pytest.mark.slow) for kind in ("VJEPA", "RVM", *PUBLISHED)],
)
def test_onnxruntime_gives_the_encoders_output(tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    import onnxruntime

    folder, out = saved(tmp_path / "checkpoint", name), tmp_path / "encoder.onnx"
    assert export(folder, "--onnx", out, *words).exit_code == 0
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # no threads that could wait for each other in C
    session = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])
    frames, *size = Encoder.from_pretrained(folder).clip
    for batch, times in ((1, 1), (3, 2 if words else 1)):
        clips = clips_of(batch, times * frames, *size)
        results = session.run(["last_hidden_state", "pooled"], {"clips": clips.numpy()})
        for ours, expected in zip(results, expected_of(folder, clips), strict=True):
            assert np.allclose(ours, expected.numpy(), atol=1e-4)


@NEEDS_ONNX
def test_an_encoder_that_is_too_large_for_one_onnx_file_is_refused_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = saved(tmp_path / "checkpoint", "4ds"), tmp_path / "a.onnx"
    monkeypatch.setattr(exporting, "MOST_ONNX_BYTES", 1000)
    monkeypatch.setattr(exporting, "export_program", None)
    message = f"--onnx {out}: the weights have 0.0 GB, one .onnx file holds 0.0 GB; --torch writes the same program"
    assert refused(folder, "--onnx", out) == message and not out.exists()


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    folder = saved(tmp_path / "checkpoint", "pixels")
    onnx, wrong = tmp_path / "a.onnx", tmp_path / "a.pth"
    assert refused(folder) == "nothing to write; give --torch FILE.pt2, --onnx FILE.onnx or both"
    assert refused(folder, "--onnx", onnx) == f"--onnx {onnx}: needed onnxscript; pip install 'scaling4d[export]'"
    assert refused(folder, "--torch", wrong) == f"--torch {wrong}; needed a new file that ends with .pt2"
    assert refused(folder, "--onnx", wrong) == f"--onnx {wrong}; needed a new file that ends with .onnx"
    file, absent = tmp_path / "a.pt2", tmp_path / "none/a.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(exporting.Encoder, "from_pretrained", None)  # refused before anything is loaded
        message = f"--onnx {absent}: no folder {tmp_path / 'none'}; make it first"
        assert refused(folder, "--torch", file, "--onnx", absent) == message
    one = "a PixelTokens is exported for clips of 4 frames only; leave out --any-length"
    assert refused(folder, "--torch", tmp_path / "a.pt2", "--any-length") == one
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
