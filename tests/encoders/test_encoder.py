"""scaling4d.Encoder: every kind of checkpoint, what its output means, and its way to disk, to the hub and back."""

import importlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import small_encoder
import torch
from refusals import refused
from small_encoder import CLIP, CLIPS, trained
from torch import Tensor

import scaling4d
from scaling4d import artifacts, checkpoint, video
from scaling4d.checkpoint import Checkpoint, weights_sha256
from scaling4d.encoders import hub, released
from scaling4d.encoders.card import write_model_card
from scaling4d.encoders.encoder import Encoder
from scaling4d.encoders.load import load_model
from scaling4d.encoders.released import MAESTOptions
from scaling4d.readout.released_heads import from_4ds, from_mae_st
from scaling4d.records import write_json

FIXTURES = Path(__file__).parents[1] / "fixtures"


@torch.no_grad()
def output_of(encoder: Encoder, clips: Tensor = CLIPS) -> list[Tensor]:
    output = encoder(clips)
    return [*output.hidden_states, output.last_hidden_state, output.pooled]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


# ---- the output ----


@pytest.mark.parametrize("name", ["SimpleMAE", "MAEST"])
def test_the_output_is_the_input_of_each_block_and_the_output_of_the_last(tmp_path: Path, name: str) -> None:
    folder = trained(tmp_path, name)
    encoder, backbone = Encoder.from_pretrained(folder), load_model(folder).encoder
    with torch.no_grad():
        output, x, inputs = encoder(CLIPS), backbone.embed_tokens(CLIPS), []
        for block in backbone.blocks:
            inputs.append(x)
            x = block(x)
    tokens = slice(backbone.prefix_tokens, None)
    assert len(output.hidden_states) == encoder.depth + 1 and output.last_hidden_state.shape == (2, 3 * 2 * 3, encoder.width)
    assert equal([x[:, tokens] for x in (inputs[0], *inputs)], list(output.hidden_states))
    assert equal(list(output.hidden_states), backbone.features(CLIPS))
    assert torch.equal(output.last_hidden_state, x[:, tokens]) and torch.equal(output.pooled, x[:, tokens].mean(1))
    assert equal([x[:, tokens] for x in (*inputs, x)], list(output.block_outputs))


def test_the_outputs_of_the_blocks_are_those_of_a_copied_output_too(tmp_path: Path) -> None:
    for folder in (trained(tmp_path), small_encoder.checkpoint(tmp_path / "pixels", "PixelTokens", clip=CLIP)):
        with torch.no_grad():
            output = Encoder.from_pretrained(folder)(CLIPS)
        states = tuple(state.clone() for state in output.hidden_states)
        copied = replace(output, last_hidden_state=output.last_hidden_state.clone(), hidden_states=states)
        assert equal(list(copied.block_outputs), list(output.block_outputs))


def test_an_encoder_is_in_evaluation_mode_and_can_be_trained(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(str(trained(tmp_path)))
    assert not encoder.training
    encoder(CLIPS / 255).pooled.sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters())


def test_an_encoder_tells_its_clip_its_tokens_and_its_normalisation(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(trained(tmp_path))
    assert (encoder.clip, encoder.grid, encoder.width, encoder.depth) == (CLIP, (3, 2, 3), 24, 3)
    assert (encoder.mean, encoder.scale, encoder.rate_hz) == (0.4, 2.0, 5.0)
    assert (encoder.device, encoder.dtype, encoder.half().dtype) == (torch.device("cpu"), torch.float32, torch.float16)


def test_clips_are_taken_to_the_device_of_the_weights(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(trained(tmp_path)).to("meta")
    assert encoder.device.type == encoder(CLIPS).pooled.device.type == encoder.preprocess(CLIPS).device.type == "meta"


def test_another_size_is_refused_until_the_encoder_is_resized(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    encoder, large = Encoder.from_pretrained(folder), torch.zeros(1, 12, 64, 64, 3, dtype=torch.uint8)
    assert refused(encoder, large) == (
        "clips T H W = (12, 64, 64); this encoder takes (6, 32, 48): "
        "encoder.preprocess(video) makes them, or encoder.resize((12, 64, 64)) takes clips of this size"
    )
    encoder.resize((12, 64, 64))
    assert encoder(large).last_hidden_state.shape == (1, 6 * 4 * 4, 24) and encoder.preprocess(CLIPS, rate_hz=2.4).shape[1] == 12
    assert equal(output_of(encoder, large), output_of(Encoder.from_pretrained(folder, clip=(12, 64, 64)), large))
    assert equal(output_of(encoder, large), output_of(Encoder.from_pretrained(encoder.save_pretrained(tmp_path / "new")), large))
    assert refused(encoder.resize, (12, 60, 64)).startswith("clip T H W = (12, 60, 64) does not divide into patches")
    for clip in ((64, 64), (6, 0, 64), (6.0, 32.0, 48.0), 16):
        message = f"clip = {clip}; needed three integers T H W, each 1 or more"
        assert refused(encoder.resize, clip) == refused(Encoder.from_pretrained, folder, clip=clip) == message
    other = "side_px = 64 is for models of transformers; this encoder takes a clip's own H W"
    assert refused(encoder.resize, (6, 64, 64), side_px=64) == other


@pytest.mark.parametrize("name", ["SimpleMAE", "MAEST"])
def test_positions_are_interpolated_from_those_of_the_checkpoint_whatever_came_between(tmp_path: Path, name: str) -> None:
    folder = trained(tmp_path, name)
    encoder, large = Encoder.from_pretrained(folder), torch.rand(1, 12, 64, 64, 3)
    for clip in ((2, 16, 16), (12, 64, 64)):
        encoder.resize(clip)
    assert equal(output_of(encoder, large), output_of(Encoder.from_pretrained(folder, clip=(12, 64, 64)), large))
    encoder.resize((2, 16, 16))
    refused(encoder.resize, (12, 60, 64))
    assert (encoder.clip, encoder.grid) == ((2, 16, 16), (1, 1, 1)) and encoder(torch.rand(1, 2, 16, 16, 3)).pooled.shape[1] == 24
    encoder.resize(CLIP)
    assert equal(output_of(encoder), output_of(Encoder.from_pretrained(folder)))
    with torch.no_grad():
        for weight in encoder.model.parameters():
            weight.add_(1)
    before = encoder.model.position_table().clone()
    encoder.resize((6, 16, 16))
    encoder.resize(CLIP)
    assert torch.allclose(encoder.model.position_table().mean(0), before.mean(0), atol=0.5)  # of the trained ones


@pytest.mark.parametrize("name", ["SimpleMAE", "MAEST"])
def test_frozen_weights_stay_frozen_after_a_resize(tmp_path: Path, name: str) -> None:
    encoder = Encoder.from_pretrained(trained(tmp_path, name)).requires_grad_(False)
    encoder.resize((12, 64, 64))
    assert not any(weight.requires_grad for weight in encoder.parameters())
    encoder.requires_grad_(True).resize(CLIP)
    assert all(weight.requires_grad for weight in encoder.parameters())


def test_a_clip_of_a_file_is_read_at_the_encoders_rate_or_not_at_all(tmp_path: Path) -> None:
    encoder, path = Encoder.from_pretrained(trained(tmp_path)), tmp_path / "a.mp4"
    video.encode(
        path, np.arange(60, dtype=np.uint8)[:, None, None, None] * np.full((48, 64, 3), 4, np.uint8), rate_hz=10, crf=10, gop=8
    )
    expected = scaling4d.read_video(path, start_s=1.0, rate_hz=5.0, frames=6)
    assert np.array_equal(encoder.read_video(path, start_s=1.0), expected) and encoder.preprocess(expected).shape == (1, *CLIP, 3)
    fixes = "lower start_s, or call encoder.resize to take clips of fewer frames"
    assert refused(encoder.read_video, path, start_s=100).endswith(fixes)
    encoder.rate_hz = None
    needed = "needed encoder.rate_hz, the frames per second that you choose"
    assert refused(encoder.read_video, path) == f"the checkpoint nano does not tell its clips' rate; {needed}"


# ---- kinds of checkpoints ----


def test_a_released_4ds_file_gives_what_its_converted_folder_gives(tmp_path: Path) -> None:
    for name in ("backbone", "depth"):
        source = FIXTURES / f"4ds_seed0/{name}_params.npz"
        direct, converted = (Encoder.from_pretrained(path) for path in (source, from_4ds(source, tmp_path / name)))
        clips = torch.rand(1, *direct.clip, 3)
        assert equal(output_of(direct, clips), output_of(converted, clips)) and direct.rate_hz is None
        assert direct.provenance["inputs"] == converted.provenance["inputs"] == {source.name: artifacts.sha256(source)}


def test_an_official_mae_st_file_gives_what_its_converted_folder_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = dict(np.load(FIXTURES / "mae_st_seed0/released.npz"))
    state = {key.removeprefix("state/"): torch.from_numpy(value) for key, value in arrays.items() if key.startswith("state/")}
    source = tmp_path / "official.pth"
    torch.save({"model": state}, source)
    assert "is none of mae_st's own (768, 1024, 1280); give --heads" in refused(Encoder.from_pretrained, source)
    monkeypatch.setitem(released.MAE_ST_HEADS, len(state["norm.weight"]), 3)
    monkeypatch.setitem(released.MAE_ST_DECODER_HEADS, len(state["decoder_norm.weight"]), 4)
    direct = Encoder.from_pretrained(source)
    converted = Encoder.from_pretrained(from_mae_st(source, tmp_path / "folder", MAESTOptions(heads=3, decoder_heads=4)))
    clips = torch.rand(1, *direct.clip, 3)
    assert equal(output_of(direct, clips), output_of(converted, clips))
    assert direct.rate_hz == converted.rate_hz == Checkpoint.read(tmp_path / "folder").rate_hz == 7.5
    assert "| frames per second | 7.5 |" in (tmp_path / "folder/README.md").read_text()


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["dinov2", "videomae"])
def test_models_of_transformers_load_from_their_own_folders_and_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from encoders.small_models import save_model

    _, processor, _ = save_model(tmp_path / "theirs", kind)
    clip = {"dinov2": (16, 28, 28), "videomae": (4, 32, 32)}[kind]
    encoder = Encoder.from_pretrained(tmp_path / "theirs")
    assert encoder.clip == clip and encoder.rate_hz == {"dinov2": None, "videomae": 7.5}[kind]
    assert np.allclose(encoder.mean, processor.image_mean) and np.allclose(encoder.scale, 1 / np.array(processor.image_std))
    clips = encoder.preprocess(np.zeros((16, 50, 40, 3), np.uint8)[: clip[0]])
    output = encoder(clips)
    assert len(output.hidden_states) == 4 and torch.equal(output.hidden_states[-1], output.last_hidden_state)
    again = Encoder.from_pretrained(encoder.save_pretrained(tmp_path / "ours"))
    assert equal(output_of(again, clips), output_of(encoder, clips)) and again.mean == encoder.mean
    assert again.bfloat16().dtype == torch.bfloat16 and (again.mean, again.scale) == (encoder.mean, encoder.scale)
    monkeypatch.setattr(hub, "download", lambda *_: shutil.copytree(tmp_path / "theirs", tmp_path / "snapshots/0123abc"))
    of_hub = Encoder.from_pretrained("owner/small")
    assert of_hub.checkpoint.name == "small" and equal(output_of(of_hub, clips), output_of(encoder, clips))
    assert of_hub.provenance["settings"] == {"source": "owner/small", "revision": "0123abc"}
    assert encoder.provenance["settings"] == {"source": "theirs"} and "model.safetensors" in encoder.provenance["inputs"]
    assert (
        "`import`" not in (tmp_path / "ours/README.md").read_text()
        and '| stage | `"import"` |' in (tmp_path / "ours/README.md").read_text()
    )


def test_raw_pixels_are_an_encoder_of_any_size_that_patches_divide(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(small_encoder.checkpoint(tmp_path / "pixels", "PixelTokens", clip=CLIP))
    assert torch.equal(encoder(CLIPS).last_hidden_state, encoder(CLIPS).hidden_states[0])
    encoder.resize((4, 64, 32))
    assert (encoder.clip, encoder.grid) == ((4, 64, 32), (2, 4, 2))
    assert refused(encoder.resize, [6, 30, 32]).startswith("clip T H W = (6, 30, 32) does not divide into patches (2, 16, 16)")


# ---- the rate of the clips ----


def test_the_rate_is_that_of_the_training_until_it_is_set_and_stays_with_its_copy(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(trained(tmp_path, rate_hz=12.5))
    assert encoder.rate_hz == Encoder.from_pretrained(encoder.save_pretrained(tmp_path / "copy")).rate_hz == 12.5
    encoder.rate_hz = 3.0
    assert Encoder.from_pretrained(encoder.save_pretrained(tmp_path / "slower")).rate_hz == 3.0


def test_a_training_of_mae_st_has_no_rate_of_the_released_one(tmp_path: Path) -> None:
    folder = trained(tmp_path, "MAEST", rate_hz=None)
    assert Encoder.from_pretrained(folder).rate_hz is None
    write_json(folder / "provenance.json", {"stage": "convert"})  # as of a folder that was converted without a rate
    assert Encoder.from_pretrained(folder).rate_hz == 7.5
    write_json(folder / "provenance.json", {"stage": "baseline"})
    assert Encoder.from_pretrained(folder).rate_hz is None  # an untrained one
    encoder = Encoder.from_pretrained(folder)
    copy = encoder.save_pretrained(tmp_path / "encoder")  # the encoder alone, as a released file that a stage imported
    assert Encoder.from_pretrained(copy).rate_hz == 7.5


def test_a_rate_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    messages = {0: "rate_hz = 0; needed more than 0, or none", "4": "rate_hz = '4' is a str; needed a finite number"}
    for value, message in messages.items():
        content = json.loads((folder / "config.json").read_text()) | {"rate_hz": value}
        (folder / "config.json").write_text(json.dumps(content))
        assert message in refused(Encoder.from_pretrained, folder)


# ---- to disk and back ----


@pytest.mark.parametrize("name", ["SimpleMAE", "MAEST"])
def test_a_saved_encoder_gives_the_same_features_without_its_decoder(tmp_path: Path, name: str) -> None:
    encoder = Encoder.from_pretrained(trained(tmp_path, name))
    folder = encoder.save_pretrained(str(tmp_path / "saved"))
    again = Encoder.from_pretrained(folder)
    assert equal(output_of(again), output_of(encoder))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors", "provenance.json"]
    saved = Checkpoint.read(folder)
    assert (saved.name, saved.step, saved.clips_seen) == ("nano", 7, 112)
    assert saved.parameters == sum(weight.numel() for weight in encoder.parameters())
    encoder.resize((8, *CLIP[1:]))
    longer = Checkpoint.read(encoder.save_pretrained(tmp_path / "longer"))
    assert longer.parameters == sum(weight.numel() for weight in encoder.parameters()) > saved.parameters
    assert again.provenance == encoder.provenance


def test_large_weights_are_several_files_and_a_missing_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2000)
    encoder = Encoder.from_pretrained(trained(tmp_path))
    folder = encoder.save_pretrained(tmp_path / "saved")
    assert not (folder / "model.safetensors").exists()
    assert equal(output_of(Encoder.from_pretrained(folder)), output_of(encoder))
    first, second, *_, last = sorted(folder.glob("model-*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    assert refused(Encoder.from_pretrained, folder).startswith(f"{last} is damaged: ")
    second.unlink()
    count = int(first.stem.rpartition("-")[2])
    problem = f"{folder} lacks {second.name} of the {count} files that model.safetensors.index.json names"
    assert refused(Encoder.from_pretrained, folder) == f"{problem}; fetch or train the checkpoint again"
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}')
    message = f"{folder}/model.safetensors.index.json is damaged: weight_map does not name files beside it"
    assert refused(Encoder.from_pretrained, folder) == message


def test_the_model_card_says_what_provenance_says(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(trained(tmp_path))
    text = (encoder.save_pretrained(tmp_path / "saved") / "README.md").read_text()
    facts = ["# nano", "Backbone with", "6 x 32 x 48", "| frames per second | 5 |", "mean 0.4, scale 2", "7 steps, 112 clips"]
    facts += ['| stage | `"pretrain"` |', '| code | `"c0de"` |']
    facts += ["| settings.pretrain.Training.steps | `7` |", "| settings.seed | `0` |"]
    assert [fact for fact in facts if fact not in text] == [] and encoder.provenance["inputs"]["clips"] in text
    assert "scaling4d.Encoder.from_pretrained(" in text
    encoder.provenance, encoder.rate_hz = {}, None
    text = (encoder.save_pretrained(tmp_path / "bare") / "README.md").read_text()
    assert "the checkpoint had no provenance.json" in text and "| frames per second | not known |" in text
    given = "encoder.rate_hz = RATE_HZ  # frames per second that you choose: those of its clips are not known\nvideo = "
    assert given in text and "None" not in text
    assert not (tmp_path / "bare/provenance.json").exists()


@pytest.mark.parametrize(("name", "inputs", "words"), [
    ("Backbone", {}, "An untrained encoder of video, Backbone with 7,000 random parameters, to compare trained ones with. It "),
    ("MAESTEncoder", {"a.pth": "5ha"}, "A published encoder of video, MAESTEncoder with 7,000 parameters. It "),
    ("PixelTokens", {}, "Raw pixels as an encoder of video, PixelTokens without parameters, to compare trained ones with. It "),
])  # fmt: skip
def test_the_model_card_of_a_baseline_says_what_it_is(tmp_path: Path, name: str, inputs: dict[str, str], words: str) -> None:
    described = Checkpoint("theirs", name, {"clip": CLIP}, 7000, step=0, clips_seen=0)
    write_model_card(tmp_path, described, {"stage": "baseline", "inputs": inputs}, mean=0.5, scale=2.0)
    text = (tmp_path / "README.md").read_text()
    assert words in text and "masked-autoencoder" not in text


@pytest.mark.parametrize("change", [lambda w: w.add_(0.01), lambda w: w.data.mul_(0.9), lambda w: w.copy_(w.flip(0))])
def test_a_changed_encoder_is_not_saved_as_the_one_that_was_loaded(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    source = trained(tmp_path)
    encoder = Encoder.from_pretrained(source)
    encoder.resize((12, 64, 64))
    assert Encoder.from_pretrained(encoder.save_pretrained(tmp_path / "resized")).provenance["stage"] == "pretrain"
    with torch.no_grad():
        change(encoder.model.blocks[1].mlp_out.weight)
    folder = encoder.save_pretrained(tmp_path / "changed")
    changed, text, sha256 = Encoder.from_pretrained(folder), (folder / "README.md").read_text(), weights_sha256(source)
    settings, inputs = {"donor": "nano"}, {"model.safetensors": sha256}
    assert changed.provenance == {"stage": "changed", "settings": settings, "inputs": inputs} and changed.rate_hz == 5.0
    assert (changed.checkpoint.step, changed.checkpoint.clips_seen) == (0, 0)
    assert '| stage | `"changed"` |' in text and sha256 in text and "112 clips" not in text and "c0de" not in text
    assert Encoder.from_pretrained(changed.save_pretrained(tmp_path / "copy")).provenance == changed.provenance
    encoder.provenance = {"stage": "ours"}
    assert Encoder.from_pretrained(encoder.save_pretrained(tmp_path / "stated")).provenance == {"stage": "ours"}


def test_a_folder_is_made_with_its_parents_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(trained(tmp_path))
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new/folder/saved"):
        assert equal(output_of(Encoder.from_pretrained(encoder.save_pretrained(folder))), output_of(encoder))
    (tmp_path / "file").touch()
    needed = f"no folder {tmp_path / 'file'} to write saved in; make it first"
    assert refused(encoder.save_pretrained, tmp_path / "file/saved") == needed


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(trained(tmp_path))
    encoder.save_pretrained(tmp_path / "saved")
    assert (
        refused(encoder.save_pretrained, tmp_path / "saved") == f"{tmp_path / 'saved'} exists; choose another name or remove it"
    )
    for provenance in ({"settings": [1], "code": "no object"}, {"settings": {"a": float("inf")}}):
        encoder.provenance = provenance
        assert refused(encoder.save_pretrained, tmp_path / "bad").startswith("provenance.json of nano is not one of scaling4d: ")
        assert not (tmp_path / "bad").exists()


# ---- refusals ----


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load = Encoder.from_pretrained
    nothing = "; needed one, or owner/name of a model on the Hugging Face hub"
    assert refused(load, "nothing") == f"no folder or file nothing{nothing}"
    assert refused(load, "artifacts/smoke/nothing") == f"no folder or file artifacts/smoke/nothing{nothing}"
    (tmp_path / "empty").mkdir()
    assert refused(load, tmp_path / "empty") == f"{tmp_path}/empty is not a checkpoint: needed config.json and model.safetensors"
    (tmp_path / "model.bin").touch()
    files = "a .npz of 4DS or RVM, a .pth of MAE-ST or VideoMAE v2, a .pth.tar of V-JEPA or a .pt of V-JEPA 2.1"
    needed = f"needed a folder with config.json and model.safetensors, {files}"
    assert refused(load, "model.bin") == f"model.bin is a file; {needed}"
    folder = trained(tmp_path)
    revision = f"revision = 'main' is of a model on the hub; {folder} is on this disk: leave out revision"
    assert refused(load, folder, revision="main") == revision
    both = "owner/nano@main names a revision, and revision = 'v1' another; needed one of them"
    assert refused(load, "owner/nano@main", revision="v1") == both
    (folder / "provenance.json").write_text("{")
    assert refused(load, folder).startswith(f"{folder / 'provenance.json'} is damaged: ")
    (folder / "config.json").write_text("{")
    assert refused(load, folder).startswith(f"{folder / 'config.json'} is damaged: ")


# ---- the hub ----


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a hub's models, which functions of the signatures of huggingface_hub's read and write."""
    real, models = importlib.import_module("huggingface_hub"), tmp_path / "models"
    models.mkdir()
    hub, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")

    HfHubHTTPError = real.errors.HfHubHTTPError  # noqa: N806
    TransportError = HfHubHTTPError.__bases__[0]  # noqa: N806

    def create_repo(target: str, *, private: bool | None, exist_ok: bool) -> str:
        if target == "nobody/here":
            raise TransportError("Connection\nrefused")
        target = target if "/" in target else f"owner/{target}"  # the account's, as the real client has it
        (models / target).mkdir(parents=True, exist_ok=exist_ok)
        (models / target / f"private is {private}").touch()
        return f"https://hub/{target}"

    def upload_folder(*, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, models / repo_id, dirs_exist_ok=True)
        (models / repo_id / "message").write_text(commit_message)

    def snapshot_download(source: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if not (models / source).is_dir() or revision not in (None, "v1"):
            raise OSError(f"404: no {source} at {revision}")
        cache = tmp_path / "cache" / source / "snapshots/0123abc"
        for pattern in allow_patterns:
            for path in (models / source).glob(pattern):
                cache.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache)
        return str(cache)

    def with_real_signature(function: Callable) -> Callable:
        signature = inspect.signature(getattr(real, function.__name__))

        def call(*args: Any, **kwargs: Any) -> Any:
            signature.bind(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    hub.errors, errors.HfHubHTTPError = errors, HfHubHTTPError
    for function in (create_repo, upload_folder, snapshot_download):
        setattr(hub, function.__name__, with_real_signature(function))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return models


def test_an_encoder_goes_to_the_hub_and_comes_back(tmp_path: Path, models: Path) -> None:
    encoder = Encoder.from_pretrained(trained(tmp_path))
    assert encoder.push_to_hub("owner/nano", private=True, commit_message="first") == "https://hub/owner/nano"
    assert (models / "owner/nano/message").read_text() == "first" and (models / "owner/nano/private is True").exists()
    (models / "owner/nano/code.py").write_text("raise SystemExit")
    again = Encoder.from_pretrained("owner/nano", revision="v1")
    assert equal(output_of(again), output_of(Encoder.from_pretrained("owner/nano@v1")))
    assert "no owner/nano at v2" in refused(Encoder.from_pretrained, "owner/nano@v2")
    assert equal(output_of(again), output_of(encoder)) and again.rate_hz == 5.0 and again.provenance == encoder.provenance
    assert again.checkpoint.name == encoder.checkpoint.name
    files = sorted(path.name for path in (tmp_path / "cache/owner/nano/snapshots/0123abc").iterdir())
    assert files == ["config.json", "model.safetensors", "provenance.json"]


def test_what_the_hub_refuses_is_one_line(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = Encoder.from_pretrained(trained(tmp_path))
    assert refused(encoder.push_to_hub, "nobody/here") == "nobody/here cannot be uploaded (Connection refused)"
    assert refused(encoder.push_to_hub, "name") == "name is no model of the Hugging Face hub; needed owner/name"
    assert not [*models.iterdir()]
    missing = "no folder owner/nano here, and owner/nano cannot be downloaded (404: no owner/nano at None)"
    assert refused(Encoder.from_pretrained, "owner/nano") == missing
    (models / "owner/nano").mkdir(parents=True)
    assert "owner/nano at v2 cannot be downloaded (404: no owner/nano at v2)" in refused(
        Encoder.from_pretrained, "owner/nano", revision="v2"
    )


def test_without_huggingface_hub_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    needed = "on the Hugging Face hub: needed huggingface_hub; pip install 'scaling4d[hub]'"
    assert refused(Encoder.from_pretrained, "owner/nano") == f"no folder owner/nano here, and owner/nano {needed}"
    assert refused(Encoder.from_pretrained(trained(tmp_path)).push_to_hub, "owner/nano") == f"owner/nano {needed}"


def test_the_interface_is_what_the_package_names() -> None:
    assert scaling4d.Encoder is Encoder and set(scaling4d.__all__) == {"Encoder", "EncoderOutput", "read_video"}
    with pytest.raises(AttributeError, match="module 'scaling4d' has no attribute 'load'"):
        scaling4d.load  # noqa: B018
