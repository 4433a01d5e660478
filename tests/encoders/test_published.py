"""Encoders that others released as files of their own: the official code's features, recognised files, refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from scaling4d import artifacts, config
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders import published
from scaling4d.encoders.encoder import Encoder
from scaling4d.encoders.export import export_program
from scaling4d.encoders.stage import baseline
from scaling4d.mae.vit import VideoViTConfig
from scaling4d.readout.stage import readout

FIXTURES = Path(__file__).parents[1] / "fixtures"
CLIPS = {"VideoMAE2": (4, 16, 16), "VJEPA": (16, 16, 16), "VJEPA21": (4, 48, 32)}
FILES = {"VideoMAE2": "vit_b_k710_dl_from_giant.pth", "VJEPA": "vitl16.pth.tar", "VJEPA21": "vjepa2_1_vitb_dist_vitG_384.pt"}
TOLERANCE = {"VideoMAE2": 2e-6, "VJEPA": 2e-6, "VJEPA21": 5e-6}  # of 2, 2 and 12 blocks
every_vit = pytest.mark.parametrize("kind", CLIPS)


@pytest.fixture(autouse=True)
def tiny_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files do not tell the number of heads, and the fixtures have no official width."""
    monkeypatch.setitem(published.VIT_HEADS, 22, 2)
    monkeypatch.setitem(published.VJEPA21_HEADS, 14, 2)


def arrays(kind: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{kind.lower()}_seed0.npz") as file:
        return dict(file)


def weights(kind: str) -> dict[str, Tensor]:
    return {k.removeprefix("weights/"): torch.from_numpy(v) for k, v in arrays(kind).items() if k.startswith("weights/")}


def official(kind: str, folder: Path, change: Callable[[dict], object] = lambda state: None) -> Path:
    """A file in the layout of the official code. change: of its tensors."""
    state = weights(kind)
    change(state)
    if kind == "VideoMAE2":
        content: dict = {"module": state}
    else:
        section = "target_encoder" if kind == "VJEPA" else "ema_encoder"
        state = {f"module.backbone.{key}": value for key, value in state.items()}
        other = {key: torch.zeros_like(value) for key, value in state.items()}
        content = {"encoder": other, "predictor": {}, "opt": {"state": {0: {"step": 3}}}, section: state, "epoch": 300}
    torch.save(content, folder / FILES[kind])
    return folder / FILES[kind]


def hub_folder(folder: Path, **shape: object) -> Path:
    """VideoMAE v2 as OpenGVLab has it on the hub."""
    model = {"img_size": 16, "patch_size": 8, "embed_dim": 22, "depth": 2, "num_heads": 2, "num_frames": 4} | shape
    names = {"AutoModel": "modeling_videomaev2.VideoMAEv2"}
    content = {"model_type": "VideoMAEv2_Base", "auto_map": names, "model_config": model}
    (folder / "config.json").write_text(json.dumps(content))
    seen = {"image_mean": list(published.IMAGENET_MEAN), "image_std": list(published.IMAGENET_STD), "size": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))
    state = {f"model.{key}": value for key, value in weights("VideoMAE2").items() if not key.startswith("head.")}
    save_file(state, folder / "model.safetensors")
    return folder


@torch.no_grad()
def relative_error(encoder: Encoder, kind: str, prefix: str) -> float:
    """Largest error of any layer against the official outputs, by the layer's largest value."""
    expected = arrays(kind)
    output, error = encoder(torch.from_numpy(expected[f"{prefix}pixels"])), 0.0
    assert len(output.hidden_states) == encoder.depth + 1 == sum(key.startswith(f"{prefix}state_") for key in expected)
    for number, state in enumerate(output.hidden_states):
        true = torch.from_numpy(expected[f"{prefix}state_{number}"])
        assert state.shape == true.shape
        error = max(error, float((state - true).abs().max() / true.abs().max()))
    assert output.last_hidden_state is output.hidden_states[-1]
    return error


# ---- VideoMAE v2, V-JEPA and V-JEPA 2.1 ----


@every_vit
def test_every_layer_of_a_published_vit_is_that_of_the_official_code(kind: str, tmp_path: Path, agree: Callable) -> None:
    encoder = Encoder.from_pretrained(official(kind, tmp_path), clip=CLIPS[kind])
    assert type(encoder.model).__name__ == kind
    assert encoder.mean == (0.485, 0.456, 0.406) and encoder.scale == (1 / 0.229, 1 / 0.224, 1 / 0.225)
    agree(f"{kind}, every layer against the official code, relative", relative_error(encoder, kind, ""), TOLERANCE[kind])


@every_vit
def test_positions_for_another_clip_are_those_of_the_official_code(kind: str, tmp_path: Path, agree: Callable) -> None:
    encoder = Encoder.from_pretrained(official(kind, tmp_path), clip=CLIPS[kind])
    encoder.resize(arrays(kind)["larger_pixels"].shape[1:4])
    agree(f"{kind}, larger clips against the official code, relative", relative_error(encoder, kind, "larger_"), TOLERANCE[kind])


def test_vjepa_21_of_either_section_with_its_own_norms_gives_the_outputs_of_the_official_code(
    tmp_path: Path, agree: Callable
) -> None:
    """Its encoders of students are the moving average, those of teachers the target encoder."""
    content = torch.load(official("VJEPA21", tmp_path), weights_only=True)
    content["target_encoder"] = content.pop("ema_encoder")
    torch.save(content, tmp_path / "vjepa2_1_vitG_384.pt")
    encoder = Encoder.from_pretrained(tmp_path / "vjepa2_1_vitG_384.pt", clip=CLIPS["VJEPA21"])
    expected, norms, error = arrays("VJEPA21"), weights("VJEPA21"), 0.0
    with torch.no_grad():
        states = encoder(torch.from_numpy(expected["pixels"])).hidden_states
    for number, layer in enumerate((3, 6, 9, 12)):
        scale, shift = (norms[f"norms_block.{number}.{name}"].float() for name in ("weight", "bias"))
        output = F.layer_norm(states[layer], (14,), scale, shift, 1e-6)
        error = max(error, float((output - torch.from_numpy(expected[f"normed_{layer}"])).abs().max()))
    agree("V-JEPA 2.1, outputs of four layers against the official code", error, 3e-5)


@pytest.mark.parametrize(("kind", "clip", "grid"), [
    ("VJEPA21", (64, 384, 384), (32, 24, 24)), ("VideoMAE2", (16, 224, 224), (8, 28, 28))
])  # fmt: skip
def test_a_file_takes_the_clips_of_its_training_unless_told(kind: str, clip: tuple, grid: tuple, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(official(kind, tmp_path))
    assert encoder.clip == clip and encoder.grid == grid


def test_a_side_of_one_patch_is_at_place_0_for_vjepa_21(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(official("VJEPA21", tmp_path), clip=(4, 16, 32))
    with torch.no_grad():
        assert encoder(torch.zeros(1, 4, 16, 32, 3)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("section", ["module", "model", ""])
@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone."])
def test_files_of_pretraining_distillation_and_finetuning_are_the_same_encoder(section: str, prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{key}": value for key, value in weights("VideoMAE2").items()}
    if prefix == "encoder.":
        state |= {"decoder.blocks.0.norm1.weight": torch.zeros(4), "mask_token": torch.zeros(1, 1, 4)}
    torch.save({section: state, "epoch": 3} if section else state, tmp_path / "v2.pth")
    encoder = Encoder.from_pretrained(tmp_path / "v2.pth", clip=CLIPS["VideoMAE2"])
    assert relative_error(encoder, "VideoMAE2", "") < 2e-6


def test_videomae_2_on_the_hub_is_read_from_its_safetensors_without_its_code(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(hub_folder(tmp_path))
    assert encoder.clip == CLIPS["VideoMAE2"]
    assert relative_error(encoder, "VideoMAE2", "") < 2e-6
    encoder = Encoder.from_pretrained(hub_folder(tmp_path, img_size=24), clip=(6, 24, 24))
    assert relative_error(encoder, "VideoMAE2", "larger_") < 2e-6


def test_weights_of_half_precision_are_read(tmp_path: Path) -> None:
    halved = official("VideoMAE2", tmp_path, lambda state: state.update({key: v.half() for key, v in state.items()}))
    encoder = Encoder.from_pretrained(halved, clip=CLIPS["VideoMAE2"])
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}
    assert 1e-6 < relative_error(encoder, "VideoMAE2", "") < 0.01


@every_vit
def test_a_published_vit_is_saved_loaded_exported_and_computes_in_bfloat16(kind: str, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(official(kind, tmp_path), clip=CLIPS[kind])
    again = Encoder.from_pretrained(encoder.save_pretrained(tmp_path / "saved"))
    assert again.checkpoint.name == FILES[kind].split(".")[0] and again.clip == CLIPS[kind]
    assert again.rate_hz == encoder.rate_hz == {"VideoMAE2": 7.5, "VJEPA": 7.5, "VJEPA21": 4.0}[kind]
    assert relative_error(again, kind, "") < TOLERANCE[kind]
    pixels = torch.from_numpy(arrays(kind)["pixels"])
    with torch.no_grad():
        expected, got = again(pixels).last_hidden_state, export_program(again, any_length=False).module()(pixels)[0]
        assert torch.allclose(got, expected, atol=1e-5)
        rough = again.to(torch.bfloat16)(pixels / 255).last_hidden_state
    assert rough.dtype == torch.bfloat16 and (rough - expected).abs().max() < 0.1 * expected.abs().max()


@every_vit
def test_pictures_are_shown_as_the_official_code_shows_them(kind: str, tmp_path: Path) -> None:
    """Source: `resize_clip` and `CenterCrop` of VideoMAEv2 and jepa: OpenCV's bilinear filter, then the centre."""
    cv2 = pytest.importorskip("cv2")
    encoder = Encoder.from_pretrained(official(kind, tmp_path), clip=CLIPS[kind])
    frames, height, width = encoder.clip
    pictures = np.random.default_rng(0).integers(0, 256, (frames, 5 * height, 10 * width, 3), np.uint8)
    resized = np.stack([cv2.resize(picture, (2 * width, height), interpolation=cv2.INTER_LINEAR) for picture in pictures])
    difference = encoder.preprocess(pictures)[0].int() - torch.from_numpy(resized[:, :, width // 2 : -width // 2]).int()
    assert difference.abs().max() <= 1  # OpenCV rounds its weights


@pytest.mark.integration
@every_vit
def test_the_stage_imports_a_released_file_and_a_readout_is_trained_on_it(
    kind: str, tmp_path: Path, actions: object, changed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "overrides", lambda *_: {})
    source = official(kind, tmp_path)
    values = {"source": str(source), "revision": "", "clip": [16, 64, 64]}
    settings = changed("encoders.pretrained", {"tiny": {"Pretrained": values}})
    folder = baseline("tiny", settings)
    saved, provenance = Checkpoint.read(folder), json.loads((folder / "provenance.json").read_text())
    assert saved.model == kind and saved.settings["clip"] == [16, 64, 64]
    assert provenance["inputs"] == {source.name: artifacts.sha256(source)}
    frozen = readout("tiny", "actions", "frozen", settings)
    assert frozen.parameters == saved.parameters == sum(p.numel() for p in Encoder.from_pretrained(folder).parameters())
    assert readout("tiny", "actions", "finetune", settings).parameters == frozen.parameters


# ---- refusals ----


SCALE, GAMMA, QKV = "blocks.0.attn.scale", "blocks.1.gamma_1", "blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("VideoMAE2", lambda s: s.pop("blocks.1.mlp.fc2.weight"), "lacks blocks.1.mlp.fc2.weight; needed an array (22, 96)"),
    ("VideoMAE2", lambda s: s.update({SCALE: torch.ones(2)}), f"has {SCALE} (2,), which this model does not have"),
    ("VideoMAE2", lambda s: s.update({GAMMA: torch.ones(22)}), f"has {GAMMA} (22,), which this model does not have"),
    ("VideoMAE2", lambda s: s.update({QKV: torch.ones(66, 9)}), f": {QKV} is (66, 9); needed (66, 22)"),
    ("VideoMAE2", lambda s: s.update({QKV: torch.ones(66, 22).long()}), "is torch.int64 (torch.strided); needed dense"),
    ("VideoMAE2", lambda s: s.pop("patch_embed.proj.weight"), "has 0 tensors patch_embed.proj.weight; needed that of one"),
    ("VJEPA", lambda s: s.pop("pos_embed"), "has neither VideoMAE v2's blocks.0.attn.q_bias, V-JEPA's pos_embed nor V-JEPA 2"),
    ("VJEPA21", lambda s: s.update(cls_token=torch.zeros(1, 1, 14)), "has cls_token (1, 1, 14), which this model does not have"),
    ("VJEPA21", lambda s: s.pop("patch_embed.proj.bias"), "lacks patch_embed.proj.bias; needed an array (14,)"),
    ("VJEPA", lambda s: s.update(pos_embed=torch.zeros(1, 32, 22)), "pos_embed is not V-JEPA's for 16 frames of 16 px; V-JEPA 2"),
    ("VJEPA", lambda s: s.update(pos_embed=torch.zeros(1, 8192, 22)), "pos_embed is not V-JEPA's for 16 frames of 256 px; "),
    ("VJEPA", lambda s: s.update(cls_token=torch.zeros(1, 1, 22)), "has cls_token (1, 1, 22), which this model does not have"),
])  # fmt: skip
def test_a_file_of_another_model_is_refused(kind: str, change: Callable, message: str, tmp_path: Path) -> None:
    text = refused(Encoder.from_pretrained, official(kind, tmp_path, change))
    assert text.startswith(str(tmp_path)) and message in text


def test_a_width_without_known_heads_a_damaged_file_and_a_foreign_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(published.VIT_HEADS, 22)
    file = official("VJEPA", tmp_path)
    assert refused(Encoder.from_pretrained, file) == f"{file}: width 22 is none of the official ones (384, 768, 1024, 1280, 1408)"
    file.write_bytes(file.read_bytes()[:4000])
    assert refused(Encoder.from_pretrained, file).startswith(f"{file} is not a")
    hub_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "VideoMAEv2_Base"}))
    message = refused(Encoder.from_pretrained, tmp_path)
    assert "has no model_config with num_heads, num_frames and img_size; needed VideoMAE v2's" in message
    (tmp_path / "model.safetensors").unlink()
    assert refused(Encoder.from_pretrained, tmp_path) == f"{tmp_path} has no model*.safetensors; needed the encoder's weights"


def test_an_impossible_config_is_refused_before_the_model_is_built() -> None:
    values = {"clip": (2, 8, 8), "patch": (2, 8, 8), "width": 22, "depth": 1, "heads": 2, "mlp": 8}
    colours = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    VideoViTConfig(**values, **colours)
    for changes, message in (({"heads": 3}, "width 22 does not divide into 3 heads"), ({"std": (0.0, 1.0, 1.0)}, "std = ")):
        with pytest.raises(ValueError, match=f"^{message}"):
            VideoViTConfig(**{**values, **colours, **changes})
