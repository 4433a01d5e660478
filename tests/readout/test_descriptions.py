"""Files of strangers: whatever a description or a header says, the answer is one line at once, and little memory."""

import json
import resource
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from official import BACKBONE, DEPTH, with_head
from refusals import refused

from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.arrays import Npz
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.encoders.released import MAESTOptions
from scaling4d.features.inputs import read_array
from scaling4d.mae.models import MODELS
from scaling4d.readout.released_heads import from_4ds, from_mae_st, load_readout, read_readout
from scaling4d.reconstruct.fidelity import load_inception
from scaling4d.records import UserError
from scaling4d.show.trained import load_trained_readout

WITH_HEADS = ("depth", "cls_plain", "cls_vjepa", "given_queries", "point", "box")
NESTED = "[" * 100_000
MOST_S, MOST_MB = 1.5, 200  # ours; a second on a busy machine


@pytest.fixture
def quick() -> Iterator[None]:
    """The test's body takes no time and no memory to speak of."""
    load_encoder  # noqa: B018  (imported, with all libraries, before the clock starts)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - started < MOST_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024 * MOST_MB


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders by the name of their released file."""
    folder = tmp_path_factory.mktemp("converted")
    for name in WITH_HEADS[1:]:
        np.savez(folder / f"{name}.npz", **with_head(name))
    sources = [BACKBONE, DEPTH, *(folder / f"{name}.npz" for name in WITH_HEADS[1:])]
    return {name: from_4ds(source, folder / name) for name, source in zip(("backbone", *WITH_HEADS), sources, strict=True)}


def changed(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("key", "value", "message"), [
    ("heads", 0, "heads = 0; needed a number from 1 to 1,048,576"),
    ("width", -48, "width = -48; needed"),
    ("width", 2**40, "width = 1099511627776; needed"),
    ("depth", 10**9, "depth = 1000000000; needed a number from 1 to 1,000"),
    ("depth", True, "depth = True is a bool; needed a whole number"),
    ("mlp", "x", "mlp = 'x' is a str; needed a whole number"),
    ("mlp", 10**400, "mlp = 1000"),
    ("pixel_scale", float("nan"), "it has the number NaN"),
    ("pixel_scale", 0.0, "pixel_scale is 0.0; needed more than 0"),
    ("pixel_mean", None, "pixel_mean = None is a NoneType; needed a finite number"),
    ("clip", [8, 64], "clip = [8, 64] is a list; needed [a whole number, a whole number, a whole number]"),
    ("patch", [0, 8, 8], "patch = (0, 8, 8); needed numbers from 1"),
    ("patch", {"a": 1}, "patch = {'a': 1} is a dict; needed"),
    ("more", 1, "unknown setting more = 1"),
])  # fmt: skip
def test_a_config_of_impossible_sizes_is_refused(
    converted: dict, tmp_path: Path, quick: None, key: str, value: object, message: str
) -> None:
    folder = shutil.copytree(converted["backbone"], tmp_path / "folder")
    changed(folder / "config.json", lambda content: content["settings"].update({key: value}))
    assert message in refused(load_encoder, folder)


@pytest.mark.parametrize(
    "text", [NESTED, "{", "[]", "3", '{"name": 1}', '{"model": []}', "\xff", '{"a": NaN}', '{"name": "a", "model": "Backbone"}']
)
@pytest.mark.parametrize("name", ["config.json", "readout.json"])
def test_a_description_that_is_none_is_refused(converted: dict, tmp_path: Path, quick: None, text: str, name: str) -> None:
    folder = shutil.copytree(converted["backbone"], tmp_path / "folder")
    (folder / name).write_bytes(text.encode("latin-1"))
    work = Checkpoint.read if name == "config.json" else read_readout
    assert refused(work, folder).startswith(f"{folder / name} does not describe a")


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_config_of_another_model_is_refused(converted: dict, tmp_path: Path, quick: None, model: str) -> None:
    folder = shutil.copytree(converted["backbone"], tmp_path / "folder")
    changed(folder / "config.json", lambda content: content.update(model=model, settings={"clip": [8, 64, 64]}))
    assert f"config.json is not that of a {model} of this version" in refused(load_encoder, folder)


def test_a_large_config_is_compared_with_the_weights_without_building_it(converted: dict, tmp_path: Path, quick: None) -> None:
    folder = shutil.copytree(converted["backbone"], tmp_path / "folder")
    changed(folder / "config.json", lambda content: content["settings"].update(width=2**18, heads=1, mlp=2**20, depth=100))
    assert "weights do not fit Backbone" in refused(load_encoder, folder)


WRONG = (-1, 2**40, 10**400, 1.5, "x", None, [])
UNUSED = ("query_std", "out_scale", "stretched", "distance_bias")  # for which some of these are right


@pytest.mark.parametrize("name", WITH_HEADS)
def test_a_readout_of_impossible_settings_is_refused(converted: dict, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(converted[name], tmp_path / name)
    path, slowest = folder / "readout.json", 0.0
    text = path.read_text()
    for part in ("settings", "head", "queries"):
        whole = json.loads(text)["settings"]
        section = whole if part == "settings" else whole.get(part, {})
        for key in section if isinstance(section, dict) else ():
            for value in WRONG if key not in UNUSED else WRONG[4:6]:
                content = json.loads(text)
                (content["settings"] if part == "settings" else content["settings"][part])[key] = value
                path.write_text(json.dumps(content))
                started = time.monotonic()
                refused(lambda: load_readout(folder, read_readout(folder)))
                slowest = max(slowest, time.monotonic() - started)
    assert slowest < MOST_S


def test_a_readout_that_without_weights_is_refused(converted: dict, tmp_path: Path, quick: None) -> None:
    folder = shutil.copytree(converted["depth"], tmp_path / "folder")
    (folder / "readout.safetensors").unlink()
    assert "readout.safetensors is damaged" in refused(load_readout, folder, read_readout(folder))


@pytest.mark.parametrize("text", [NESTED, "[]", '{"encoder": 3}', "{}"])
def test_a_result_that_is_none_is_refused(tmp_path: Path, quick: None, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    refused(load_trained_readout, tmp_path)


# ---- headers ----


def npy_header(shape: str, dtype: str = "<f4", version: int = 1) -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text


@pytest.mark.parametrize("content", [
    npy_header("(100000000000, 4)"),
    npy_header("(-1, 4)") + bytes(16),
    npy_header("(1, 4)") + bytes(15),
    npy_header("(1, 4)") + bytes(17),
    npy_header("(1, 4)", "|O") + bytes(8),
    npy_header("(1, 4)", "|S9") + bytes(36),
    npy_header("(((((((((((((((((((((((((((") + bytes(4),
    npy_header("-" * 9000 + "1"),
    npy_header("(1, 4)", version=2)[:8] + b"\xff\xff\xff\x7f",
    b"\x93NUMPY\x09\x00",
    b"",
    b"PK\x03\x04",
])  # fmt: skip
def test_a_npy_whose_header_lies_is_refused(tmp_path: Path, quick: None, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    assert "is not a .npy of numbers" in refused(lambda: read_array(tmp_path / "a.npy", axes=2))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as out:
        out.writestr("a.npy", content)
    assert f"{tmp_path}/a.npz: a " in refused(Npz, tmp_path / "a.npz")


@pytest.fixture
def bombs(tmp_path: Path) -> None:
    for name in ("bomb.npz", "bomb.pth"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as out, out.open("a.npy", "w") as file:
            file.write(npy_header("(99614720,)"))
            for _ in range(95 * 4):
                file.write(bytes(2**20))


def test_a_zip_bomb_is_refused_before_it_is_expanded(tmp_path: Path, bombs: None, quick: None) -> None:
    npz, pth, out = tmp_path / "bomb.npz", tmp_path / "bomb.pth", tmp_path / "out"
    for load, *arguments in ((from_4ds, npz, out), (from_mae_st, pth, out, MAESTOptions()), (load_inception, pth)):
        with pytest.raises(UserError, match="would expand to 398.+ bytes, more than 100 times its size; refused"):
            load(*arguments)
    (tmp_path / "cut.pth").write_bytes(pth.read_bytes()[:-9])
    refused(from_mae_st, tmp_path / "cut.pth", tmp_path / "out", MAESTOptions())
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros((2**20,), np.float32))
    assert Npz(tmp_path / "zeros.npz").shapes == {"a": (2**20,)}  # small files may be of zeros


def test_a_pth_whose_options_are_impossible_is_refused(tmp_path: Path, quick: None) -> None:
    sizes = {"patch_embed.proj.weight": (48, 3, 2, 8, 8), "pos_embed_spatial": (1, 16, 48), "pos_embed_temporal": (1, 4, 48)}
    sizes |= {"blocks.0.mlp.fc1.weight": (96, 48), "decoder_embed.weight": (32, 48), "decoder_pred.weight": (3, 32)}
    torch.save({"model": {name: torch.zeros(size) for name, size in sizes.items()}}, tmp_path / "a.pth")
    for ratio, message in ((0.9, "predicted_frames = 0"), (1.5, ""), (float("nan"), "")):
        options = MAESTOptions(heads=3, decoder_heads=4, mask_ratio=ratio)
        assert message in refused(from_mae_st, tmp_path / "a.pth", tmp_path / "out", options)
