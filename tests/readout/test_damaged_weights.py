"""Whatever a checkpoint's files hold, an encoder or a readout is loaded or refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from damage import ACCEPTED, REFUSED, SIZES, files_below
from official import BACKBONE, DEPTH, official_state, with_head
from small_encoder import CLIPS, trained

import scaling4d
from scaling4d.encoders.released import MAESTOptions
from scaling4d.features.inputs import read_array, read_clips
from scaling4d.readout.released_heads import from_4ds, from_mae_st, load_readout, read_readout, to_4ds

OPTIONS = MAESTOptions(heads=3, decoder_heads=4)  # of the fixture


def written(work: Callable, *arguments: object, out: Path) -> None:
    """Run work that writes a new file or folder, and remove it. Refused: nothing is left."""
    try:
        work(*arguments)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    finally:
        assert not out.exists() and not list(out.parent.glob(f".{out.name}.partial*"))


@SIZES
def test_a_damaged_checkpoint_is_loaded_or_refused(tmp_path: Path, endures: Callable, copies: int) -> None:
    folders, out = [trained(tmp_path / name, name) for name in ("SimpleMAE", "MAEST")], tmp_path / "out"

    def read(path: Path) -> None:
        folder = folders["MAEST" in path.parts]
        encoder = scaling4d.Encoder.from_pretrained(folder)
        assert encoder(encoder.preprocess(CLIPS)).pooled.shape == (2, 24)
        written(encoder.save_pretrained, out, out=out)

    counts = endures("checkpoints", files_below(*folders, *(folder.parents[1] / "clips" for folder in folders)), read, copies)
    assert counts[REFUSED] and counts[ACCEPTED]


@SIZES
def test_a_damaged_readout_of_released_weights_is_loaded_or_refused(tmp_path: Path, endures: Callable, copies: int) -> None:
    np.savez(tmp_path / "point.npz", **with_head("point"))
    np.savez(tmp_path / "cls.npz", **with_head("cls_plain"))
    sources = [DEPTH, tmp_path / "point.npz", tmp_path / "cls.npz"]
    folders = [from_4ds(source, tmp_path / f"folder{number}") for number, source in enumerate(sources)]

    def read(path: Path) -> None:
        scaling4d.Encoder.from_pretrained(path.parent)
        if readout := read_readout(path.parent):
            load_readout(path.parent, readout)
        written(to_4ds, path.parent, tmp_path / "out.npz", out=tmp_path / "out.npz")

    counts = endures("readouts of released weights", files_below(*folders), read, copies)
    assert counts[REFUSED] and counts[ACCEPTED]


@SIZES
def test_a_damaged_released_file_is_converted_or_refused(tmp_path: Path, endures: Callable, copies: int) -> None:
    np.savez(tmp_path / "point.npz", **with_head("point"))
    shutil.copy(BACKBONE, tmp_path / "backbone.npz")
    torch.save({"model": official_state(), "epoch": 1}, tmp_path / "official.pth")
    out = tmp_path / "out"

    def read(path: Path) -> None:
        if path.suffix == ".npz":
            written(from_4ds, path, out, out=out)
            scaling4d.Encoder.from_pretrained(path)
        else:
            written(from_mae_st, path, out, OPTIONS, out=out)

    counts = endures("released .npz and .pth", files_below(tmp_path), read, copies)
    assert counts[REFUSED] and counts[ACCEPTED]


@SIZES
def test_damaged_arrays_are_read_or_refused(tmp_path: Path, endures: Callable, copies: int) -> None:
    np.save(tmp_path / "clips.npy", np.random.default_rng(0).random((2, 4, 8, 8, 3), np.float32))
    np.save(tmp_path / "queries.npy", np.random.default_rng(0).random((2, 4), np.float32))

    def read(path: Path) -> None:
        read_clips(path) if path.stem == "clips" else read_array(path, axes=2)

    counts = endures("arrays .npy", files_below(tmp_path), read, copies)
    assert counts[REFUSED] and counts[ACCEPTED]


@SIZES
def test_a_damaged_model_of_transformers_is_loaded_or_refused(tmp_path: Path, endures: Callable, copies: int) -> None:
    from encoders.small_models import save_model

    for kind in ("dinov2", "videomae", "siglip2"):
        save_model(tmp_path / kind, kind)

    def read(path: Path) -> None:
        encoder = scaling4d.Encoder.from_pretrained(path.parent, clip=(4, 28, 28) if path.parent.name == "dinov2" else None)
        frames = torch.zeros(1, *encoder.clip, 3, dtype=torch.uint8)
        assert encoder(frames).pooled.shape == (1, encoder.width)

    counts = endures("models of transformers", files_below(tmp_path), read, copies)
    assert counts[REFUSED] and counts[ACCEPTED]
