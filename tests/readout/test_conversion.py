"""Published weights in, features out, and back: round trips, limits, and files that are refused."""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.testing

import scaling4d
from scaling4d import cli, seeds
from scaling4d.checkpoint import WEIGHTS, Checkpoint, load_tensors
from scaling4d.mae.encoder import Encoder, initialise
from scaling4d.mae.simple_mae import SimpleMAE
from scaling4d.readout import released
from scaling4d.records import UserError
from scaling4d.show import extract

FIXTURES = Path(__file__).parents[1] / "fixtures"
BACKBONE = FIXTURES / "4ds_seed0/backbone_params.npz"
DEPTH = FIXTURES / "4ds_seed0/depth_params.npz"


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path, allow_pickle=False))


@pytest.mark.parametrize("source", [BACKBONE, DEPTH], ids=["backbone", "depth"])
def test_there_and_back_gives_the_released_arrays_to_the_byte(source: Path, tmp_path: Path) -> None:
    released.from_4ds(source, tmp_path / "it")
    released.to_4ds(tmp_path / "it", tmp_path / "back.npz")
    before, after = arrays_of(source), arrays_of(tmp_path / "back.npz")
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert array.dtype == after[key].dtype
        assert array.shape == after[key].shape
        assert array.tobytes() == after[key].tobytes(), key


def test_a_tracking_readout_goes_there_and_back_and_answers_queries(tmp_path: Path) -> None:
    arrays = {key.replace("params/", "params/layers_0/", 1): value for key, value in arrays_of(BACKBONE).items()}
    heads = arrays_of(FIXTURES / "4ds_seed0/heads_params.npz")
    head = {key.replace("point/params/", released.HEAD): v for key, v in heads.items() if key.startswith("point/")}
    for key in head:  # the head reads 24 channels, this backbone has 48
        if "LayerNorm_0" in key:
            head[key] = np.tile(head[key], 2)
        elif "temporal_posenc" in key:
            head[key] = np.tile(head[key], (1, 1, 2))
        elif "embedding/kernel" in key:
            head[key] = np.tile(head[key], (2, 1, 1))
    np.savez(tmp_path / "both.npz", **arrays, **head)
    released.from_4ds(tmp_path / "both.npz", tmp_path / "it")
    released.to_4ds(tmp_path / "it", tmp_path / "back.npz")
    after = arrays_of(tmp_path / "back.npz")
    assert all(np.array_equal(after[key], value) for key, value in (arrays | head).items())
    np.save(tmp_path / "clip.npy", np.zeros((2, 6, 32, 48, 3), np.float32))
    np.save(tmp_path / "points.npy", np.random.default_rng(0).random((5, 2)))
    ask = {"side_px": None, "queries": tmp_path / "points.npy"}
    extract.features(tmp_path / "it", tmp_path / "clip.npy", tmp_path / "f.npz", **ask)
    assert np.load(tmp_path / "f.npz")["output"].shape == (2, 5, 6, 4)
    with pytest.raises(UserError, match="is asked by queries of 2 numbers, given none; correct --queries"):
        extract.features(tmp_path / "it", tmp_path / "clip.npy", tmp_path / "g.npz", side_px=None, queries=None)
    assert not (tmp_path / "g.npz").exists()


def test_the_encoder_of_a_pretrained_point_goes_into_the_released_layout(tmp_path: Path) -> None:
    shape = {"width": 48, "depth": 4, "heads": 3, "mlp": 96, "clip": (6, 32, 48), "patch": (2, 16, 16)}
    others = {"decode_blocks": 2, "masking": "random", "mask_ratio": 0.5, "loss_on": "all", "position_init": "normal"}
    settings = shape | others | {"coarse_patch": (2, 16, 16), "branch_init": "released", "pixel_mean": 0.0, "pixel_scale": 1.0}
    model = SimpleMAE(**settings)
    model.initialise(0)
    (tmp_path / "point").mkdir()
    Checkpoint("point", "SimpleMAE", settings, 150480, 1, 8).write(tmp_path / "point", model.state_dict())
    released.to_4ds(tmp_path / "point", tmp_path / "point.npz")
    released.from_4ds(tmp_path / "point.npz", tmp_path / "it")
    for name, weight in scaling4d.load(tmp_path / "it").state_dict().items():
        assert torch.equal(weight, model.encoder.state_dict()[name]), name


def test_the_commands_convert_both_ways_and_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    run = lambda *words: typer.testing.CliRunner().invoke(cli.app, [str(word) for word in words])  # noqa: E731
    assert run("convert", "4ds", BACKBONE, tmp_path / "it").output == f"wrote {tmp_path / 'it'}\n"
    assert run("convert", "4ds", tmp_path / "it", tmp_path / "back.npz").exit_code == 0
    assert np.array_equal(arrays_of(tmp_path / "back.npz")[KEY], arrays_of(BACKBONE)[KEY])
    assert str(run("convert", "5ds", BACKBONE, tmp_path / "new").exception) == "unknown kind '5ds'; needed 4ds or mae_st"
    assert str(run("convert", "mae_st", tmp_path / "none.pth", tmp_path / "new").exception) == f"no file {tmp_path / 'none.pth'}"
    assert not (tmp_path / "new").exists()


def test_load_gives_the_encoder_in_python(tmp_path: Path) -> None:
    released.from_4ds(BACKBONE, tmp_path / "it")
    encoder = scaling4d.load(tmp_path / "it")
    assert isinstance(encoder, Encoder)
    assert Checkpoint.read(tmp_path / "it").parameters == sum(p.numel() for p in encoder.parameters()) == 150480
    with pytest.raises(UserError, match="^0 checkpoints are called 'nothing'; needed a folder, such as "):
        scaling4d.load("nothing")


def test_another_size_resizes_the_positions_and_the_same_size_leaves_them(tmp_path: Path) -> None:
    released.from_4ds(BACKBONE, tmp_path / "it")
    encoder = scaling4d.load(tmp_path / "it")
    before = encoder.positions.clone()
    encoder.resize((6, 32, 48))
    assert torch.equal(encoder.positions, before)
    encoder.resize((12, 64, 64))
    assert encoder.grid == (6, 4, 4)
    assert len(encoder.features(torch.zeros(1, 12, 64, 64, 3))) == 5
    with pytest.raises(UserError, match=r"clip T H W = \(12, 60, 64\) does not divide into patches"):
        encoder.resize((12, 60, 64))


def test_a_video_file_gives_features_of_its_first_frames(tmp_path: Path) -> None:
    released.from_4ds(BACKBONE, tmp_path / "it")
    videos = sorted((Path(__file__).parents[2] / "experiments/pocket/videos/phone").glob("*.mp4"))
    run = typer.testing.CliRunner().invoke(
        cli.app, ["features", str(tmp_path / "it"), str(videos[0]), "--out", str(tmp_path / "f.npz"), "--side-px", "64"]
    )
    assert run.output == f"wrote {tmp_path / 'f.npz'}: layer_00, layer_01, layer_02, layer_03, layer_04\n"
    assert np.load(tmp_path / "f.npz")["layer_00"].shape == (1, 3 * 4 * 4, 48)


# ---------------------------------------------------------------- memory


def big_npz(path: Path) -> tuple[int, int]:
    """A 4DS-like file of many alike layers: its size and its largest array's, in bytes."""
    width, depth, mlp = 512, 12, 4096
    rng = np.random.default_rng(0)
    shapes = {
        "params/encoder/patch_embedding/Conv_0/kernel": (2, 16, 16, 3, width),
        "params/encoder/patch_embedding/Conv_0/bias": (width,),
        "params/encoder/posenc/embeddings": (8, 14, 14, width),
    }
    for i in range(depth):
        block = f"params/processor/layers_{i}"
        shapes |= {f"{block}/{norm}/{part}": (width,) for norm in ("attention_norm", "mlp_norm") for part in ("scale", "bias")}
        shapes |= {f"{block}/attention/{n}/kernel": (width, 8, 64) for n in ("query", "key", "value")}
        shapes |= {f"{block}/attention/{n}/bias": (8, 64) for n in ("query", "key", "value")}
        shapes |= {
            f"{block}/attention/out/kernel": (8, 64, width),
            f"{block}/attention/out/bias": (width,),
            f"{block}/mlp/dense_in/kernel": (width, mlp),
            f"{block}/mlp/dense_in/bias": (mlp,),
            f"{block}/mlp/dense_out/kernel": (mlp, width),
            f"{block}/mlp/dense_out/bias": (width,),
        }
    with zipfile.ZipFile(path, "w") as out:
        for key, shape in shapes.items():
            with out.open(f"{key}.npy", "w") as file:
                np.lib.format.write_array(file, rng.random(shape, np.float32))
    return path.stat().st_size, max(4 * int(np.prod(shape)) for shape in shapes.values())


MEASURE = """
import sys
from pathlib import Path
import scaling4d, scaling4d.mae.build
from scaling4d.readout import released


def held(what):  # VmRSS: now, VmHWM: at most so far; getrusage would count what the parent process held
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))


before = held("VmRSS")
{work}
print(held("VmHWM") - before)
"""
WORK = "released.{}(Path(sys.argv[1]), Path(sys.argv[2]))"
LOAD = "sum(float(p.detach().sum()) for p in scaling4d.load(sys.argv[1]).parameters())"


def test_converting_holds_a_few_tensors_and_never_the_whole_file(tmp_path: Path) -> None:
    size, largest = big_npz(tmp_path / "big.npz")
    for call, source, out in (("from_4ds", "big.npz", "it"), ("to_4ds", "it", "back.npz")):
        command = [sys.executable, "-c", MEASURE.format(work=WORK.format(call)), str(tmp_path / source), str(tmp_path / out)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        grown = int(run.stdout)
        print(f"{call}: {grown / 2**20:.0f} MiB more, the file has {size / 2**20:.0f}, its largest array {largest / 2**20:.0f}")
        mapped = size if call == "to_4ds" else 0  # pages of the mapped file, which the system may drop
        assert grown < mapped + 0.25 * size


def test_converting_works_under_a_memory_limit_below_the_files_size(tmp_path: Path) -> None:
    """Of 0.6 of the file beyond what the libraries hold: enough for a few tensors, too little for the whole."""
    size, largest = big_npz(tmp_path / "big.npz")
    idle = subprocess.run(
        [sys.executable, "-c", "import scaling4d.readout.released as p\nprint(open('/proc/self/statm').read().split()[5])"],
        capture_output=True,
        text=True,
        check=True,
    )
    data_pages = int(idle.stdout)  # what the libraries hold before anything is read
    limit = data_pages * resource.getpagesize() + int(0.6 * size)
    code = f"import resource\nresource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))\n" + MEASURE.format(
        work=WORK.format("from_4ds")
    )
    command = [sys.executable, "-c", code, str(tmp_path / "big.npz"), str(tmp_path / "it")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr[-500:]
    assert 0.6 * size > 1.3 * largest


def test_loading_holds_one_copy_of_the_weights(tmp_path: Path) -> None:
    size, _ = big_npz(tmp_path / "big.npz")
    released.from_4ds(tmp_path / "big.npz", tmp_path / "it")
    command = [sys.executable, "-c", MEASURE.format(work=LOAD), str(tmp_path / "it")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"loaded: {int(run.stdout) / 2**20:.0f} MiB more for {size / 2**20:.0f} MiB of weights")
    assert 0.9 * size < int(run.stdout) < 1.3 * size


def test_changing_a_loaded_model_leaves_its_file_alone(tmp_path: Path) -> None:
    released.from_4ds(BACKBONE, tmp_path / "it")
    before = (tmp_path / "it" / WEIGHTS).read_bytes()
    initialise(scaling4d.load(tmp_path / "it"), seed=1)
    assert (tmp_path / "it" / WEIGHTS).read_bytes() == before


# ---------------------------------------------------------------- refusals


def changed(change: Callable[[dict[str, np.ndarray]], None], path: Path) -> Path:
    arrays = arrays_of(BACKBONE)
    change(arrays)
    np.savez(path, **arrays)
    return path


KEY = "params/processor/layers_2/mlp/dense_in/kernel"
REFUSED = {
    "missing": (lambda a: a.pop(KEY), f"lacks {KEY}; needed an array (48, 96)"),
    "extra": (
        lambda a: a.update({"params/more": np.zeros(3, np.float32)}),
        "has params/more (3,), which this model does not have",
    ),
    "shape": (lambda a: a.update({KEY: np.zeros((48, 97), np.float32)}), f"{KEY} is (48, 97); needed (48, 96)"),
    "kind": (lambda a: a.update({KEY: np.zeros((48, 96))}), f"{KEY} is float64; needed float32"),
    "objects": (
        lambda a: a.update({KEY: np.array([{}], dtype=object)}),
        f"{KEY} holds Python objects, which only pickle could read; needed plain float32",
    ),
    "another": (
        lambda a: a.pop("params/encoder/posenc/embeddings"),
        "lacks params/encoder/posenc/embeddings; needed an array of 4 axes, as the released 4DS files have it",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_4ds_file_that_is_not_one_is_refused_and_nothing_written(case: str, tmp_path: Path) -> None:
    change, said = REFUSED[case]
    source = changed(change, tmp_path / "bad.npz")
    with pytest.raises(UserError) as error:
        released.from_4ds(source, tmp_path / "it")
    assert said in str(error.value)
    assert str(source) in str(error.value)
    assert not (tmp_path / "it").exists()


def test_bytes_that_are_not_those_of_the_shape_are_refused(tmp_path: Path) -> None:
    for shape, name in (((10**7, 10**7), "huge"), ((-1, 96), "negative"), ((48, 95), "long")):
        header = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
        header = b"\x93NUMPY\x01\x00" + (128 - 10).to_bytes(2, "little") + header.ljust(128 - 11) + b"\n"
        with zipfile.ZipFile(BACKBONE) as given, zipfile.ZipFile(tmp_path / "bad.npz", "w") as out:
            for member in given.namelist():
                data = given.read(member)
                out.writestr(member, header + data[128:] if member == f"{KEY}.npy" else data)
        with pytest.raises(UserError, match=rf"bad.npz: {KEY} "):
            released.from_4ds(tmp_path / "bad.npz", tmp_path / name)
        assert not (tmp_path / name).exists()


def test_damaged_compressed_data_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "small.npz", **arrays_of(BACKBONE))
    data = bytearray((tmp_path / "small.npz").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    (tmp_path / "small.npz").write_bytes(data)
    with pytest.raises(UserError, match="small.npz: params/.* is damaged"):
        released.from_4ds(tmp_path / "small.npz", tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("dear")
    torch.save({"model": official_state()}, tmp_path / "official.pth")
    released.from_4ds(BACKBONE, tmp_path / "it")
    np.save(tmp_path / "clip.npy", np.zeros((1, 6, 32, 48, 3), np.float32))
    for attempt in (
        lambda out: released.from_4ds(BACKBONE, out),
        lambda out: released.from_mae_st(tmp_path / "official.pth", out, heads=3, decoder_heads=4),
        lambda out: released.to_4ds(tmp_path / "it", out),
        lambda out: extract.features(tmp_path / "it", tmp_path / "clip.npy", out, side_px=None, queries=None),
    ):
        with pytest.raises(UserError, match=r"mine exists; choose another name or remove it$"):
            attempt(tmp_path / "mine")
        with pytest.raises(UserError, match=r"^no folder .*/none to write it in; make it first$"):
            attempt(tmp_path / "none/it")
    assert (tmp_path / "mine/file").read_text() == "dear"


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_a_truncated_npz_is_refused(share: float, tmp_path: Path) -> None:
    whole = BACKBONE.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="cut.npz is not an npz file, or is cut short"):
        released.from_4ds(tmp_path / "cut.npz", tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_a_flipped_byte_is_found_and_nothing_written(tmp_path: Path) -> None:
    data = bytearray(BACKBONE.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flip.npz").write_bytes(data)
    with pytest.raises(UserError, match="flip.npz: params/.* is damaged"):
        released.from_4ds(tmp_path / "flip.npz", tmp_path / "it")
    assert not (tmp_path / "it").exists()


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def official_state() -> dict[str, torch.Tensor]:
    z = np.load(FIXTURES / "mae_st_seed0/released.npz", allow_pickle=False)
    return {key.removeprefix("state/"): torch.from_numpy(z[key]) for key in z if key.startswith("state/")}


def test_a_pth_with_a_payload_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": official_state(), "args": Evil()}, "evil.pth")
    Path("plain.pth").write_bytes(pickle.dumps({"model": Evil()}))
    Path("page.pth").write_text("<html>not found</html>")
    for name in ("evil.pth", "plain.pth", "page.pth"):
        with pytest.raises(UserError, match=f"^{name} is no checkpoint of torch, or holds more than tensors: refused, since"):
            released.from_mae_st(Path(name), Path("it"), heads=3, decoder_heads=4)
    for name, content in (("empty.pth", b""), ("stop.pth", b"\x80\x02."), ("cut.pth", Path("evil.pth").read_bytes()[:3000])):
        Path(name).write_bytes(content)
        with pytest.raises(UserError, match=f"^{name} is n"):
            released.from_mae_st(Path(name), Path("it"), heads=3, decoder_heads=4)
    assert {path.suffix for path in tmp_path.iterdir()} == {".pth"}


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda s: s.pop("norm.bias"), {"heads": 3, "decoder_heads": 4}, "lacks norm.bias; needed an array (48,)"),
        (
            lambda s: s.update(more=torch.zeros(2)),
            {"heads": 3, "decoder_heads": 4},
            "has more (2,), which this model does not have",
        ),
        (lambda s: None, {}, "width 48 is none of mae_st's own (768, 1024, 1280); give --heads"),
        (lambda s: None, {"heads": 3}, "width 32 is none of mae_st's own (512); give --decoder-heads"),
        (lambda s: None, {"heads": 7, "decoder_heads": 4}, "width 48 does not divide into 7 heads; correct --heads"),
        (
            lambda s: s.update({"norm.bias": s["norm.bias"].half()}),
            {"heads": 3},
            "norm.bias is torch.float16 (torch.strided); needed dense torch.float32",
        ),
        (
            lambda s: s.update({"norm.bias": torch.zeros(1).expand(10**9)}),
            {},
            "norm.bias has 4 bytes; needed those of (1000000000,)",
        ),
        (lambda s: s.clear(), {}, "has no state dict; needed one at the top, below 'model' or below 'model_state'"),
    ],
)
def test_a_mae_st_checkpoint_that_is_not_one_is_refused(
    change: Callable[[dict], None], options: dict[str, int], said: str, tmp_path: Path
) -> None:
    state = official_state()
    change(state)
    torch.save({"model": state}, tmp_path / "bad.pth")
    with pytest.raises(UserError) as error:
        released.from_mae_st(tmp_path / "bad.pth", tmp_path / "it", **options)
    assert said in str(error.value)
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((6, 32, 48, 3), np.float32), "holds float32 numbers (6, 32, 48, 3); needed numbers in 5 axes"),
        (np.full((1, 6, 32, 48, 3), 255.0, np.float32), "values from 255.0 to 255.0; needed floats in 0..1, or uint8"),
        (np.zeros((1, 6, 32, 48, 1), np.float32), "needed B T H W 3, float in 0..1 or uint8"),
        (np.zeros((1, 6, 30, 48, 3), np.float32), "does not divide into patches"),
        (np.zeros((0, 6, 32, 48, 3), np.float32), "needed B T H W 3, float in 0..1 or uint8"),
        (np.full((1, 6, 32, 48, 3), np.nan, np.float32), "values from nan to nan; needed floats in 0..1, or uint8"),
        (np.array([{}], dtype=object), "is not a .npy of numbers"),
    ],
)
def test_clips_that_are_none_are_refused(array: np.ndarray, said: str, tmp_path: Path) -> None:
    released.from_4ds(BACKBONE, tmp_path / "it")
    np.save(tmp_path / "clip.npy", array, allow_pickle=True)
    with pytest.raises(UserError) as error:
        extract.features(tmp_path / "it", tmp_path / "clip.npy", tmp_path / "f.npz", side_px=None, queries=None)
    assert said in str(error.value)
    assert not (tmp_path / "f.npz").exists()


def test_options_that_were_saved_along_count(tmp_path: Path) -> None:
    options = argparse.Namespace(norm_pix_loss=False, mask_ratio=0.75, decoder_num_heads=4, output_dir="somewhere")
    torch.save({"model": official_state(), "args": options}, tmp_path / "official.pth")
    released.from_mae_st(tmp_path / "official.pth", tmp_path / "it", heads=3)
    settings = Checkpoint.read(tmp_path / "it").settings
    assert (settings["normalise_target"], settings["mask_ratio"], settings["decoder_heads"]) == (False, 0.75, 4)


def test_a_classifier_named_as_pyslowfast_does_and_an_encoder_alone_are_taken(tmp_path: Path) -> None:
    encoder = {key: value for key, value in official_state().items() if "decoder" not in key and key != "mask_token"}
    head = {"head.projection.weight": torch.ones(5, 48), "head.projection.bias": torch.zeros(5)}
    for name, state, wanted in (("alone", encoder, None), ("tuned", encoder | head, "classes")):
        torch.save({"model_state": state}, tmp_path / f"{name}.pth")
        released.from_mae_st(tmp_path / f"{name}.pth", tmp_path / name, heads=3)
        found = released.read_readout(tmp_path / name)
        assert (found and found.kind) == wanted
        assert len(scaling4d.load(tmp_path / name).features(torch.zeros(1, 8, 32, 32, 3))) == 4


@pytest.mark.parametrize("head", ["cls_plain", "given_queries"])
def test_every_kind_of_released_readout_is_found_by_its_arrays(head: str, tmp_path: Path) -> None:
    arrays = {key.replace("params/", "params/layers_0/", 1): value for key, value in arrays_of(BACKBONE).items()}
    heads = arrays_of(FIXTURES / "4ds_seed0/heads_params.npz")
    arrays |= {key.replace(f"{head}/params/", released.HEAD): v for key, v in heads.items() if key.startswith(f"{head}/")}
    np.savez(tmp_path / "both.npz", **arrays)
    released.from_4ds(tmp_path / "both.npz", tmp_path / "it")
    released.to_4ds(tmp_path / "it", tmp_path / "back.npz")
    after = arrays_of(tmp_path / "back.npz")
    assert all(np.array_equal(after[key], value) for key, value in arrays.items())
    settings = released.read_readout(tmp_path / "it").settings
    assert (settings["plain"], settings["queries"] == 0) == (head == "cls_plain", head == "given_queries")


def test_a_depth_readout_takes_only_clips_of_its_own_size(tmp_path: Path) -> None:
    released.from_4ds(DEPTH, tmp_path / "it")
    np.save(tmp_path / "turned.npy", np.zeros((1, 6, 48, 32, 3), np.float32))
    with pytest.raises(UserError, match=r"clips T H W = \(6, 48, 32\); this readout answers for \(6, 32, 48\) only"):
        extract.features(tmp_path / "it", tmp_path / "turned.npy", tmp_path / "f.npz", side_px=None, queries=None)


def test_only_what_the_released_layout_can_say_is_written_in_it(tmp_path: Path) -> None:
    released.from_4ds(BACKBONE, tmp_path / "it")
    path = tmp_path / "it/config.json"
    described = json.loads(path.read_text())
    described["settings"]["pixel_mean"] = 0.45
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"takes pixels as \(x - 0.45\) \* 1.0 and gelu 'tanh'; the released 4DS layout"):
        released.to_4ds(tmp_path / "it", tmp_path / "back.npz")
    assert not (tmp_path / "back.npz").exists()


def test_weights_of_two_conversions_are_equal_to_the_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        released.from_4ds(DEPTH, tmp_path / name)
    for file in (WEIGHTS, released.READOUT_WEIGHTS, released.READOUT):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert load_tensors(tmp_path / "a" / WEIGHTS)["positions"].shape == (18, 48)


def test_drawn_weights_survive_the_way_through_the_released_layout(tmp_path: Path) -> None:
    released.from_4ds(BACKBONE, tmp_path / "it")
    encoder = scaling4d.load(tmp_path / "it")
    initialise(encoder, seed=3)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn(p.shape, generator=seeds.stream(0, "noise")))
    Checkpoint.read(tmp_path / "it").write(tmp_path / "it", encoder.state_dict())
    released.to_4ds(tmp_path / "it", tmp_path / "new.npz")
    released.from_4ds(tmp_path / "new.npz", tmp_path / "again")
    for name, weight in scaling4d.load(tmp_path / "again").state_dict().items():
        assert torch.equal(weight, encoder.state_dict()[name]), name
