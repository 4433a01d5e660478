"""Released weights to Checkpoint folders and back: round trips, limits of memory, and refusals."""

import argparse
import json
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_encoder
import torch
from commands import invoke, refused_command
from official import BACKBONE, DEPTH, arrays_of, official_state, with_head
from payload import Payload
from peak_memory import grown, in_a_new_process, needs_proc

import scaling4d
from scaling4d import checkpoint
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.encoders.released import MAESTOptions, four_ds_weight_map
from scaling4d.mae.encoder import BackboneConfig
from scaling4d.readout import released_heads
from scaling4d.readout.released_heads import from_4ds, from_mae_st, to_4ds
from scaling4d.records import UserError
from scaling4d.show.predict import write_features

KEY, POSITIONS = "params/processor/layers_2/mlp/dense_in/kernel", "params/encoder/posenc/embeddings"
HEADS = MAESTOptions(heads=3, decoder_heads=4)  # of the fixture


@pytest.mark.parametrize("name", ["backbone", "depth", "cls_plain", "cls_vjepa", "given_queries", "point", "box"])
def test_there_and_back_gives_the_released_arrays_to_the_byte(name: str, tmp_path: Path) -> None:
    before = {"backbone": arrays_of(BACKBONE), "depth": arrays_of(DEPTH)}.get(name) or with_head(name)
    np.savez(tmp_path / "released.npz", **before)
    from_4ds(tmp_path / "released.npz", tmp_path / "folder")
    to_4ds(tmp_path / "folder", tmp_path / "back.npz")
    after = arrays_of(tmp_path / "back.npz")
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert (array.dtype, array.shape, array.tobytes()) == (after[key].dtype, after[key].shape, after[key].tobytes()), key
    from_4ds(tmp_path / "back.npz", tmp_path / "again")
    for file in (tmp_path / "folder").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    readout = released_heads.read_readout(tmp_path / "folder")
    kinds = {"backbone": None, "depth": "depth", "point": "tracking", "box": "tracking"}
    assert (readout and readout.kind) == kinds.get(name, "attention")
    if readout and readout.kind == "attention":
        assert (readout.settings["plain"], readout.settings["queries"] == 0) == (name == "cls_plain", name == "given_queries")


@pytest.mark.parametrize("shard_bytes", [checkpoint.SHARD_BYTES, 20_000])
def test_the_encoder_of_a_pretrained_point_goes_into_the_released_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    sizes = {"width": 48, "depth": 4, "heads": 3, "mlp": 96, "clip": (6, 32, 48), "pixel_mean": 0.0, "pixel_scale": 1.0}
    to_4ds(small_encoder.checkpoint(tmp_path / "point", "SimpleMAE", noise=1.0, **sizes), tmp_path / "point.npz")
    from_4ds(tmp_path / "point.npz", tmp_path / "folder")
    expected = small_encoder.model("SimpleMAE", noise=1.0, **sizes).encoder.state_dict()
    for name, weight in scaling4d.Encoder.from_pretrained(tmp_path / "folder").model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_the_commands_convert_both_ways_and_refuse_unknown_kinds(tmp_path: Path) -> None:
    assert invoke("convert", "4ds", BACKBONE, tmp_path / "folder").output == f"wrote {tmp_path / 'folder'}\n"
    assert invoke("convert", "4ds", tmp_path / "folder", tmp_path / "back.npz").exit_code == 0
    assert np.array_equal(arrays_of(tmp_path / "back.npz")[KEY], arrays_of(BACKBONE)[KEY])
    torch.save({"model": official_state()}, tmp_path / "official.pth")
    options = ("--heads", 3, "--decoder-heads", 4, "--mask-ratio", 0.8)
    assert invoke("convert", "mae_st", tmp_path / "official.pth", tmp_path / "mae", *options).exit_code == 0
    assert Checkpoint.read(tmp_path / "mae").settings["mask_ratio"] == 0.8
    assert refused_command("convert", "5ds", BACKBONE, tmp_path / "new") == "unknown kind '5ds'; needed 4ds or mae_st"
    assert refused_command("convert", "mae_st", tmp_path / "none.pth", tmp_path / "new") == f"no file {tmp_path / 'none.pth'}"
    folder = refused_command("convert", "4ds", tmp_path / "mae", tmp_path / "new")
    assert folder == f"{tmp_path / 'mae'} is a folder; to write it as released, OUT must end with .npz"
    refused = "a 4ds file states its own shape; leave out --heads and --mask-ratio, of mae_st alone"
    assert refused_command("convert", "4ds", BACKBONE, tmp_path / "new", "--heads", 3, "--mask-ratio", 0.9) == refused
    assert not (tmp_path / "new").exists()


@pytest.mark.integration
def test_importing_the_package_needs_no_torch_and_converting_no_training_loop() -> None:
    code = "import sys, scaling4d; assert 'torch' not in sys.modules\n"
    code += "import scaling4d.readout.released_heads; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "scaling4d.encoders.released" in modules
    assert not [name for name in modules if name.startswith(("scaling4d.training", "scaling4d.pretrain"))]


def test_options_saved_in_a_file_count(tmp_path: Path) -> None:
    saved = argparse.Namespace(norm_pix_loss=False, mask_ratio=0.75, decoder_num_heads=4, output_dir="somewhere")
    torch.save({"model": official_state(), "args": saved}, tmp_path / "official.pth")
    from_mae_st(tmp_path / "official.pth", tmp_path / "folder", MAESTOptions(heads=3))
    settings = Checkpoint.read(tmp_path / "folder").settings
    assert (settings["normalise_target"], settings["mask_ratio"], settings["decoder_heads"]) == (False, 0.75, 4)


def test_a_classifier_named_as_in_pyslowfast_and_an_encoder_alone_are_converted(tmp_path: Path) -> None:
    encoder = {key: value for key, value in official_state().items() if "decoder" not in key and key != "mask_token"}
    head = {"head.projection.weight": torch.ones(5, 48), "head.projection.bias": torch.zeros(5)}
    for name, state, kind in (("alone", encoder, None), ("tuned", encoder | head, "classes")):
        torch.save({"model_state": state}, tmp_path / f"{name}.pth")
        from_mae_st(tmp_path / f"{name}.pth", tmp_path / name, HEADS)
        readout = released_heads.read_readout(tmp_path / name)
        assert (readout and readout.kind) == kind
        assert len(scaling4d.Encoder.from_pretrained(tmp_path / name)(torch.zeros(1, 8, 32, 32, 3)).hidden_states) == 4


# ---- predictions ----


def test_a_tracking_readout_answers_queries_and_refuses_to_do_without(tmp_path: Path) -> None:
    np.savez(tmp_path / "both.npz", **with_head("point"))
    from_4ds(tmp_path / "both.npz", tmp_path / "folder")
    np.save(tmp_path / "clip.npy", np.zeros((2, 6, 32, 48, 3), np.float32))
    np.save(tmp_path / "points.npy", np.random.default_rng(0).random((5, 2)))
    np.save(tmp_path / "outside.npy", np.full((5, 2), 1.5))
    inputs = (tmp_path / "folder", tmp_path / "clip.npy")
    write_features(*inputs, tmp_path / "f.npz", side_px=None, queries=tmp_path / "points.npy")
    assert np.load(tmp_path / "f.npz")["output"].shape == (2, 5, 6, 4)
    for queries, message in (
        (None, "the readout takes queries of 2 numbers, given none; correct --queries$"),
        (tmp_path / "outside.npy", "values from 1.5 to 1.5; needed places in 0..1 of the picture$"),
    ):
        with pytest.raises(UserError, match=message):
            write_features(*inputs, tmp_path / "g.npz", side_px=None, queries=queries)
    assert not (tmp_path / "g.npz").exists()


def test_a_depth_readout_takes_only_clips_of_its_own_size(tmp_path: Path) -> None:
    from_4ds(DEPTH, tmp_path / "folder")
    np.save(tmp_path / "turned.npy", np.zeros((1, 6, 48, 32, 3), np.float32))
    with pytest.raises(UserError, match=r"clips T H W = \(6, 48, 32\); this readout predicts for \(6, 32, 48\) only"):
        write_features(tmp_path / "folder", tmp_path / "turned.npy", tmp_path / "f.npz", side_px=None, queries=None)


# ---- memory ----


@pytest.fixture(scope="module")
def big_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4DS-like file of many equal layers."""
    shape = {"width": 384, "depth": 8, "heads": 8, "mlp": 3072, "clip": (16, 224, 224), "patch": (2, 16, 16)}
    weights = four_ds_weight_map(BackboneConfig(**shape, pixel_mean=0.0, pixel_scale=1.0), "params/")
    path, rng = tmp_path_factory.mktemp("big") / "big.npz", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as out:
        for key, shape in ((key, shape) for entry in weights.values() for key, shape in entry.arrays.items()):
            with out.open(f"{key}.npy", "w") as file:
                np.lib.format.write_array(file, rng.random(shape, np.float32))
    return path


def bytes_of_conversions(npz: Path, folder: Path, back: Path) -> tuple[int, int, int]:
    """Of converting a file there and back, and of loading its encoder."""
    there, again = grown(lambda: from_4ds(npz, folder)), grown(lambda: to_4ds(folder, back))
    return there, again, grown(lambda: sum(float(p.detach().sum()) for p in load_encoder(folder).parameters()))


@pytest.mark.integration
@needs_proc
def test_converting_holds_a_few_tensors_and_loading_one_copy(big_npz: Path, tmp_path: Path) -> None:
    sizes = in_a_new_process(bytes_of_conversions, big_npz, tmp_path / "folder", tmp_path / "back.npz")
    size = big_npz.stat().st_size
    there, back, loaded = (one / size for one in sizes)
    print(f"of {size / 2**20:.0f} MiB: in {there:.0%}, back {back:.0%}, loaded {loaded:.0%} more")
    assert there < 0.25
    assert back < 1.25  # pages of the mapped file, which the system may drop
    assert 0.9 < loaded < 1.3


# ---- refusals ----


def without_kernel(arrays: dict) -> None:
    """A readout that is none of the released ones."""
    arrays.clear()
    arrays |= with_head("point")
    del arrays["params/layers_2/attention_readout/Dense_2/kernel"]


REFUSED: dict[str, tuple[Callable[[dict], object], str]] = {
    "missing": (lambda a: a.pop(KEY), f"lacks {KEY}; needed an array (48, 96)"),
    "superfluous": (lambda a: a.update({"params/more": np.zeros(3, np.float32)}), "has params/more (3,), which this model does"),
    "shape": (lambda a: a.update({KEY: np.zeros((48, 97), np.float32)}), f"{KEY} is (48, 97); needed (48, 96)"),
    "dtype": (lambda a: a.update({KEY: np.zeros((48, 96))}), f"{KEY} is float64; needed float32"),
    "objects": (lambda a: a.update({KEY: np.array([{}], dtype=object)}), f"{KEY} holds Python objects, which only pickle"),
    "another model": (lambda a: a.pop(POSITIONS), f"lacks {POSITIONS}; needed an array of 4 axes, as the released files have it"),
    "another readout": (without_kernel, ", params/layers_2/: lacks attention_readout/Dense_2/kernel; needed an array of"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_4ds_file_that_is_not_one_is_refused_and_nothing_written(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    arrays = arrays_of(BACKBONE)
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError) as error:
        from_4ds(tmp_path / "bad.npz", tmp_path / "folder")
    assert message in str(error.value) and str(tmp_path / "bad.npz") in str(error.value)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(("save", "start", "length", "message"), [
    (np.savez, 0.5, 1, "bad.npz: params/.* is damaged"),
    (np.savez_compressed, 0.5, 200, "bad.npz: params/.* is damaged"),
    (np.savez, 0.3, None, "bad.npz is not an npz file, or is cut short"),
    (np.savez, 0.999, None, "bad.npz is not an npz file, or is cut short"),
])  # fmt: skip
def test_a_damaged_npz_is_refused(save: Callable, start: float, length: int | None, message: str, tmp_path: Path) -> None:
    save(tmp_path / "bad.npz", **arrays_of(BACKBONE))
    data = (tmp_path / "bad.npz").read_bytes()
    first = int(start * len(data))
    rest = b"" if length is None else bytes(255 - b for b in data[first : first + length]) + data[first + length :]
    (tmp_path / "bad.npz").write_bytes(data[:first] + rest)
    with pytest.raises(UserError, match=message):
        from_4ds(tmp_path / "bad.npz", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_existing_files_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("dear")
    torch.save({"model": official_state()}, tmp_path / "official.pth")
    from_4ds(BACKBONE, tmp_path / "folder")
    np.save(tmp_path / "clip.npy", np.zeros((1, 6, 32, 48, 3), np.float32))
    for attempt in (
        lambda out: from_4ds(BACKBONE, out),
        lambda out: from_mae_st(tmp_path / "official.pth", out, HEADS),
        lambda out: to_4ds(tmp_path / "folder", out),
        lambda out: write_features(tmp_path / "folder", tmp_path / "clip.npy", out, side_px=None, queries=None),
    ):
        with pytest.raises(UserError, match=r"mine exists; choose another name or remove it$"):
            attempt(tmp_path / "mine")
        with pytest.raises(UserError, match=r"^no folder .*/none to write folder in; make it first$"):
            attempt(tmp_path / "none/folder")
    assert (tmp_path / "mine/file").read_text() == "dear"


def test_a_pth_with_a_payload_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = Payload(Path.touch, Path("executed"))
    torch.save({"model": official_state(), "args": evil}, "evil.pth")
    Path("plain.pth").write_bytes(pickle.dumps({"model": evil}))
    Path("page.pth").write_text("<html>not found</html>")
    for name in ("evil.pth", "plain.pth", "page.pth"):
        with pytest.raises(UserError, match=f"^{name} is no checkpoint of torch, or holds more than tensors: refused, since"):
            from_mae_st(Path(name), Path("folder"), HEADS)
    for name, content in (("empty.pth", b""), ("stop.pth", b"\x80\x02."), ("cut.pth", Path("evil.pth").read_bytes()[:3000])):
        Path(name).write_bytes(content)
        with pytest.raises(UserError, match=f"^{name} is n"):
            from_mae_st(Path(name), Path("folder"), HEADS)
    assert {path.suffix for path in tmp_path.iterdir()} == {".pth"}


@pytest.mark.parametrize(("change", "options", "message"), [
    (lambda s: s.pop("norm.bias"), (3, 4), "lacks norm.bias; needed an array (48,)"),
    (lambda s: s.update(more=torch.zeros(2)), (3, 4), "has more (2,), which this model does not have"),
    (lambda s: None, (), "width 48 is none of mae_st's own (768, 1024, 1280); give --heads"),
    (lambda s: None, (3,), "width 32 is none of mae_st's own (512); give --decoder-heads"),
    (lambda s: None, (7, 4), "width 48 does not divide into 7 heads; correct --heads"),
    (lambda s: s.update({"norm.bias": s["norm.bias"].half()}), (3,), "norm.bias is torch.float16 (torch.strided); needed"),
    (lambda s: s.update({"norm.bias": torch.zeros(1).expand(10**9)}), (), "norm.bias has 4 bytes; needed those of (1000"),
    (lambda s: s.clear(), (), "has no state dict; needed one at the top, below 'model' or below 'model_state'"),
])  # fmt: skip
def test_a_mae_st_checkpoint_that_is_not_one_is_refused(change: Callable, options: tuple, message: str, tmp_path: Path) -> None:
    state = official_state()
    change(state)
    torch.save({"model": state}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=re.escape(message)):
        from_mae_st(tmp_path / "bad.pth", tmp_path / "folder", MAESTOptions(*options))
    assert not (tmp_path / "folder").exists()


def test_an_encoder_that_the_released_layout_cannot_describe_is_refused(tmp_path: Path) -> None:
    from_4ds(BACKBONE, tmp_path / "folder")
    path = tmp_path / "folder/config.json"
    content = json.loads(path.read_text())
    content["settings"]["pixel_mean"] = 0.45
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"takes pixels as \(x - 0.45\) \* 1.0; the released 4DS layout"):
        to_4ds(tmp_path / "folder", tmp_path / "back.npz")
    content["settings"] |= {"pixel_mean": 0.0, "qk_norm": True}
    path.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="has norms of queries and keys; the released 4DS layout takes an encoder with qk_norm false$"
    ):
        to_4ds(tmp_path / "folder", tmp_path / "back.npz")
    path.write_text(json.dumps(content | {"model": "MAEST"}))
    with pytest.raises(UserError, match="holds a MAEST; the released 4DS layout takes a Backbone, or the one in a SimpleMAE$"):
        to_4ds(tmp_path / "folder", tmp_path / "back.npz")
    assert not (tmp_path / "back.npz").exists()
