"""Encoders that others published: tiny random ones of every kind, saved as transformers saves them."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scaling4d import artifacts, config, seeds, vision_operators
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.features import at_depth
from scaling4d.encoders.pretrained import FAMILIES, baseline, load_encoder, take_over
from scaling4d.mae.encoder import initialise
from scaling4d.mae.patches import patchify
from scaling4d.readout.classifier import classify
from scaling4d.readout.train import readout
from scaling4d.records import UserError
from scaling4d.show.extract import features
from scaling4d.training.distributed import run
from scaling4d.training.parallelize import Sharding, reduce, settle, whole

vision_operators.declare()
import transformers as tf  # noqa: E402  after the declaration, without which it cannot be imported

FRAMES = 4
SHAPE = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
MLP = {"intermediate_size": 48}
TEXT = {**SHAPE, **MLP, "vocab_size": 40, "max_position_embeddings": 8, "projection_size": 24}
CROPPED = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}


def _dinov2() -> tuple:
    known = tf.Dinov2Config(**SHAPE, image_size=42, patch_size=14)  # positions 3 x 3, pictures 2 x 2, as released
    return tf.Dinov2Model(known), tf.BitImageProcessor(crop_size={"height": 28, "width": 28}), (1, 14, 14)


def _registers() -> tuple:
    known = tf.Dinov2WithRegistersConfig(**SHAPE, image_size=32, patch_size=8, num_register_tokens=3)
    return tf.Dinov2WithRegistersModel(known), tf.BitImageProcessor(**CROPPED), (1, 8, 8)


def _dinov3() -> tuple:
    known = tf.DINOv3ViTConfig(**SHAPE, **MLP, image_size=16, patch_size=8, num_register_tokens=2)
    return tf.DINOv3ViTModel(known), tf.DINOv3ViTImageProcessor(**SQUARE), (1, 8, 8)


def _siglip() -> tuple:
    vision = {**SHAPE, **MLP, "image_size": 32, "patch_size": 8}
    return tf.SiglipModel(tf.SiglipConfig(vision_config=vision, text_config=TEXT)), tf.SiglipImageProcessor(**SQUARE), (1, 8, 8)


def _siglip2() -> tuple:
    vision = {**SHAPE, **MLP, "num_patches": 9, "patch_size": 8}
    model = tf.Siglip2Model(tf.Siglip2Config(vision_config=vision, text_config=TEXT))
    return model, tf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16), (1, 8, 8)


def _videomae() -> tuple:
    decoder = {"decoder_hidden_size": 12, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    known = tf.VideoMAEConfig(
        **SHAPE, **MLP, **decoder, decoder_intermediate_size=24, image_size=32, patch_size=8, num_frames=FRAMES
    )
    return tf.VideoMAEForPreTraining(known), tf.VideoMAEImageProcessor(**CROPPED), (2, 8, 8)


def _vjepa2() -> tuple:
    predictor = {"pred_hidden_size": 12, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "pred_num_mask_tokens": 2}
    known = tf.VJEPA2Config(**SHAPE, **predictor, crop_size=32, patch_size=8, frames_per_clip=8)
    return tf.VJEPA2Model(known), tf.VJEPA2VideoProcessor(crop_size=32), (2, 8, 8)


def _videoprism() -> tuple:
    shape = {"hidden_size": 24, "num_attention_heads": 2, "num_spatial_layers": 2, "num_temporal_layers": 1}
    known = tf.VideoPrismVisionConfig(**shape, **MLP, image_size=36, num_frames=FRAMES)
    size = {"height": 36, "width": 36}
    return tf.VideoPrismVisionModel(known), tf.LlavaOnevisionVideoProcessor(size=size, do_normalize=False), (1, 18, 18)


MODELS: dict[str, Callable[[], tuple]] = {
    "dinov2": _dinov2,
    "dinov2_with_registers": _registers,
    "dinov3_vit": _dinov3,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "videomae": _videomae,
    "vjepa2": _vjepa2,
    "videoprism_vision_model": _videoprism,
}
VIDEO = ("videomae", "vjepa2", "videoprism_vision_model")
every_kind = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, nn.Module, object, tuple]]:
    """Folder, model, preprocessor and patch of a kind, made once; no weight is left at a value that hides a mistake."""
    made: dict[str, tuple] = {}

    def of(kind: str) -> tuple:
        if kind not in made:
            torch.manual_seed(0)
            model, processor, patch = MODELS[kind]()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.1 * torch.randn_like(weight))
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            made[kind] = (folder, model.eval(), processor, patch)
        return made[kind]

    return of


def clips(side: int, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, FRAMES, side, side, 3), dtype=torch.uint8, generator=seeds.stream(0, "clips", side))


def as_the_model_sees(kind: str, processor: object, pixels: Tensor, **resize: bool) -> dict[str, Tensor]:
    """What the model's own preprocessor makes of clips, a picture of an image model being one frame."""
    pictures = pixels.movedim(-1, 2)  # B T C H W
    if kind in ("vjepa2", "videoprism_vision_model"):
        return dict(processor(list(pictures), return_tensors="pt", do_sample_frames=False, **resize))
    given = [list(clip) for clip in pictures] if kind == "videomae" else list(pictures.flatten(0, 1))
    return dict(processor(given, return_tensors="pt", **resize))


@torch.no_grad()
def hidden_states(kind: str, model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """As transformers returns them, with all tokens; VideoPrism's frames and places as `B T*n D`."""
    if kind == "videoprism_vision_model":
        out = model(**inputs, output_hidden_states=True)
        states = [*out.hidden_states[:-1], out.last_temporal_hidden_state]  # it puts its normed output last
        spatial = [state.reshape(2, -1, state.shape[-1]) for state in states[:-1]]
        return [*spatial, states[-1].reshape(2, -1, FRAMES, 24).transpose(1, 2).flatten(1, 2)]
    if kind == "vjepa2":
        return list(model(**inputs, skip_predictor=True, output_hidden_states=True).hidden_states)
    network = {"siglip": "vision_model", "siglip2": "vision_model", "videomae": "videomae"}.get(kind, "")
    return list(model.get_submodule(network)(**inputs, output_hidden_states=True).hidden_states)


@every_kind
def test_features_are_the_hidden_states_of_transformers_without_extra_tokens(published, agree, kind):
    folder, model, processor, (pt, ph, pw) = published(kind)
    _, encoder = take_over(folder, (FRAMES, 32, 32))
    encoder.resize((FRAMES, encoder.side_px, encoder.side_px))  # as the model sees it, so that nothing is resized
    pixels = clips(encoder.side_px)
    resize = {} if kind == "siglip2" else {"do_resize": False}
    theirs = hidden_states(kind, model, as_the_model_sees(kind, processor, pixels, **resize))
    with torch.no_grad():
        ours = encoder.features(pixels)
    t, h, w = encoder.grid
    assert (t, h, w) == (FRAMES // pt, encoder.side_px // ph, encoder.side_px // pw)
    assert len(ours) == len(theirs) == encoder.depth + 1
    error = 0.0
    for mine, state in zip(ours, theirs, strict=True):
        patches = state if kind in VIDEO else state[:, -h * w :].reshape(2, t * h * w, -1)
        assert mine.shape == (2, t * h * w, encoder.width)
        error = max(error, float((mine - patches).abs().max() / patches.abs().max()))
    agree(f"{kind}, every layer against transformers, relative", error, 1e-6)
    assert not torch.allclose(ours[-1], ours[-2])


@every_kind
def test_layers_stop_at_the_one_that_is_asked_for(published, kind):
    folder, *_ = published(kind)
    _, encoder = take_over(folder, (FRAMES, 32, 32))
    counted = []
    for block in (m for m in encoder.network.modules() if isinstance(m, nn.ModuleList) for m in m):
        block.register_forward_hook(lambda *_: counted.append(1))
    with torch.no_grad():
        two, all_of_them = encoder.features(clips(32), 2), encoder.features(clips(32))
    assert len(two) == 2 and len(counted) == 1 + encoder.depth
    assert all(torch.equal(a, b) for a, b in zip(two, all_of_them, strict=False))
    with torch.no_grad():
        assert at_depth(encoder, clips(32), 1.0).shape == (2, encoder.grid[0], encoder.grid[1] * encoder.grid[2], 24)


@every_kind
@pytest.mark.parametrize("side", [20, 64])
def test_pictures_of_another_size_are_resized_as_the_models_own_preprocessor_does(published, agree, kind, side):
    folder, _, processor, patch = published(kind)
    _, encoder = take_over(folder, (FRAMES, side, side))
    assert encoder.resample == {2: "bilinear", 3: "bicubic"}[int(processor.resample)]
    pixels = clips(side)
    if kind == "vjepa2":  # resizes to more and cuts the middle out; our clips are cut already
        inputs = as_the_model_sees(kind, processor, pixels, size={"height": 32, "width": 32})
    elif kind in ("dinov2", "dinov2_with_registers", "videomae"):
        inputs = as_the_model_sees(kind, processor, pixels, size={"shortest_edge": encoder.side_px})
    else:
        inputs = as_the_model_sees(kind, processor, pixels)
    theirs = next(value for name, value in inputs.items() if name in ("pixel_values", "pixel_values_videos"))
    ours = encoder.seen(pixels)
    if kind == "siglip2":
        ours = patchify(ours.flatten(0, 1).movedim(1, -1)[:, None], patch)
    agree(
        f"{kind}, {side} px resized and normalised as its preprocessor does",
        (ours.reshape(theirs.shape) - theirs).abs().max(),
        1e-6,
    )


class Read(nn.Module):
    """An encoder and the least of heads."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        _, self.encoder = take_over(folder, (FRAMES, 32, 32))
        self.head = nn.Linear(self.encoder.width, 3)
        initialise(self.head, seed=0)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(at_depth(self.encoder, pixels, 1.0).mean((1, 2))).square().mean()


def gradients(*, rank: int, ranks: int, folder: Path, compute: str, **sharding: object) -> dict[str, Tensor]:
    """Of a step, whole, by name."""
    model = Read(folder)
    plain = {"shards": 1, "recompute": "none", "recompute_every": 1, "compile": False, "packed": False, "accumulate": 1}
    settle(model, Sharding(**plain | sharding), ranks=ranks, device="cpu", compute=compute)
    model(clips(32, 2)[rank * 2 // ranks : (rank + 1) * 2 // ranks]).backward()
    reduce(model)
    assert len(model.encoder.blocks) == model.encoder.depth
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@every_kind
def test_in_shards_a_published_encoder_learns_as_it_does_whole(published, kind):
    folder, *_ = published(kind)
    wanted = run(gradients, ranks=1, folder=folder, compute="float32")
    found = run(gradients, ranks=2, folder=folder, compute="float32", shards=2, recompute="block")
    rough = run(gradients, ranks=2, folder=folder, compute="bfloat16", shards=2)
    assert found.keys() == wanted.keys() == rough.keys() and len(wanted) > 30
    size = max(grad.norm() for grad in wanted.values())
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() < 1e-4 * grad.norm() + 1e-6 * size, name
        assert (rough[name] - grad).norm() < 0.2 * grad.norm() + 0.02 * size, name


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in VIDEO])
def test_image_models_see_each_frame_alone(published, kind):
    folder, *_ = published(kind)
    _, encoder = take_over(folder, (FRAMES, 32, 32))
    pixels = clips(32, 1)
    changed = pixels.clone()
    changed[:, 2] = 255 - changed[:, 2]
    with torch.no_grad():
        before, after = (at_depth(encoder, x, 1.0)[0] for x in (pixels, changed))
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.allclose(before[2], after[2])


@pytest.mark.parametrize("kind", VIDEO)
def test_video_models_see_frames_together(published, kind):
    folder, *_ = published(kind)
    _, encoder = take_over(folder, (FRAMES, 32, 32))
    pixels = clips(32, 1)
    changed = pixels.clone()
    changed[:, -1] = 255 - changed[:, -1]
    with torch.no_grad():
        before, after = (at_depth(encoder, x, 1.0)[0, 0] for x in (pixels, changed))
    assert not torch.allclose(before, after)


def test_features_are_the_same_at_every_call_even_in_training(published):
    folder, *_ = published("dinov3_vit")  # it moves its positions about in training
    _, encoder = take_over(folder, (FRAMES, 32, 32))
    encoder.train()
    with torch.no_grad():
        first, second = (encoder.features(clips(32))[-1] for _ in range(2))
    assert torch.equal(first, second)


def test_floats_mean_what_bytes_mean(published):
    _, encoder = take_over(published("siglip")[0], (FRAMES, 32, 32))
    assert torch.allclose(encoder.seen(clips(32)), encoder.seen(clips(32) / 255), atol=1e-6)


# ---------------------------------------------------------------- the stage


@pytest.fixture
def listed(project: Path, changed: Callable) -> Callable[..., dict]:
    """Settings with one published encoder, `tiny`."""

    def make(source: Path | str, revision: str = "", clip: tuple = (16, 64, 64)) -> dict:
        values = {"source": str(source), "revision": revision, "clip": list(clip)}
        return changed("encoders.pretrained", {"tiny": {"Pretrained": values}})

    return make


@pytest.fixture
def no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that no profile has is no error here."""
    monkeypatch.setattr(config, "overrides", lambda *_: {})


@every_kind
def test_the_stage_takes_over_what_features_need(published, kind, listed, project, no_rules):
    source, _, processor, _ = published(kind)
    folder = baseline("tiny", listed(source, clip=(FRAMES, 32, 32)))
    assert folder == Path("artifacts/smoke/pretrain/tiny")
    encoder, (_, fresh) = load_encoder(folder), take_over(source, (FRAMES, 32, 32))
    assert not any(weight.is_meta for weight in [*encoder.parameters(), *encoder.buffers()])
    with torch.no_grad():
        assert torch.equal(encoder.features(clips(32))[-1], fresh.features(clips(32))[-1])
    unused = ("network.head.", "network.predictor.", "text", "decoder")
    assert not [name for name in load_file(folder / "model.safetensors") if name.startswith(unused)]
    saved = Checkpoint.read(folder)
    assert saved.parameters == sum(weight.numel() for weight in encoder.parameters())
    assert saved.settings["std"] == (list(processor.image_std) if processor.do_normalize else [1, 1, 1])
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["inputs"]["model.safetensors"] == artifacts.sha256(source / "model.safetensors")
    assert "Pretrained.source" in (folder / "operative_config.gin").read_text()


def test_taking_over_again_gives_the_same_bytes(published, listed, no_rules):
    settings = listed(published("vjepa2")[0], clip=(FRAMES, 32, 32))
    assert artifacts.sha256(baseline("tiny", settings)) == artifacts.sha256(baseline("tiny", settings))


def test_weights_in_several_files_and_of_half_precision_are_read(published, tmp_path):
    source, model, *_ = published("dinov2")
    model = type(model)(model.config)
    model.load_state_dict(published("dinov2")[1].state_dict())
    model.half().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "preprocessor_config.json").write_text((source / "preprocessor_config.json").read_text())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    _, encoder = take_over(tmp_path, (FRAMES, 32, 32))
    _, exact = take_over(source, (FRAMES, 32, 32))
    with torch.no_grad():
        half, full = (e.features(clips(32))[-1] for e in (encoder, exact))
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.02


def test_a_model_of_the_hub_that_was_downloaded_before_needs_no_network(published, listed, no_rules, monkeypatch, tmp_path):
    import huggingface_hub

    revision = "0123456789" * 4
    snapshot = tmp_path / "models--owner--name/snapshots" / revision
    snapshot.mkdir(parents=True)
    copy(published("dinov2")[0], snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub = artifacts.sha256(baseline("tiny", listed("owner/name", revision)) / "model.safetensors")
    assert hub == artifacts.sha256(baseline("tiny", listed(snapshot)) / "model.safetensors")


def test_a_python_caller_loads_it_like_any_other(published, listed, no_rules):
    import scaling4d

    folder = baseline("tiny", listed(published("videomae")[0], clip=(FRAMES, 32, 32)))
    encoder = scaling4d.load(folder)
    assert encoder.features(clips(64, 1))[0].shape == (1, 2 * 4 * 4, 24)
    with pytest.raises(UserError, match=r"^clip T H W = \(8, 32, 32\) does not suit a videomae; needed 4 frames, height = width"):
        encoder.resize((8, 32, 32))


@pytest.mark.parametrize("kind", ["siglip", "vjepa2"])
def test_a_readout_is_trained_on_a_published_encoder_like_on_any_other(published, kind, listed, no_rules, actions, tmp_path):
    settings = listed(published(kind)[0])
    folder = baseline("tiny", settings)
    frozen = readout("tiny", "actions", "frozen", settings)
    assert (frozen.encoder, frozen.examples) == ("tiny", 8)
    assert frozen.parameters == Checkpoint.read(folder).parameters
    assert frozen.checkpoint_sha256 == artifacts.sha256(folder / "model.safetensors")
    assert readout("tiny", "actions", "finetune", settings).parameters == frozen.parameters
    np.save(tmp_path / "clips.npy", np.zeros((1, 16, 64, 64, 3), np.uint8))
    head = Path("artifacts/smoke/readout/tiny/actions/frozen")
    said = features(head, tmp_path / "clips.npy", tmp_path / "out.npz", side_px=None, queries=None)
    assert said == ["layer_00", "layer_01", "layer_02", "layer_03", "output"]


def test_a_classifier_takes_encoders_of_this_project_alone(published, listed, no_rules):
    settings = listed(published("dinov2")[0])
    baseline("tiny", settings)
    with pytest.raises(UserError, match="^tiny is no encoder of this project, .*; take it out of encoders.classifier$"):
        classify("tiny", settings)


# ---------------------------------------------------------------- refusals


def copy(source: Path, out: Path, *, without: str = "") -> Path:
    for path in source.iterdir():
        if not (without and re.search(without, path.name)):
            (out / path.name).write_bytes(path.read_bytes())
    return out


def refused(source: Path, said: str, clip: tuple = (FRAMES, 32, 32)) -> None:
    with pytest.raises(UserError, match=said) as caught:
        take_over(source, clip)
    assert "\n" not in str(caught.value)


def test_a_kind_that_is_not_known_is_refused(published, tmp_path):
    folder = copy(published("dinov2")[0], tmp_path)
    (folder / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}}')
    refused(
        folder, r"config.json has model_type 'bert'; needed one of dinov2, dinov2_with_registers, dinov3_vit, siglip, .*vjepa2"
    )


def test_pickles_are_refused_and_named(published, tmp_path):
    folder = copy(published("dinov2")[0], tmp_path, without="safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    refused(folder, r"has no model\*.safetensors, but pytorch_model.bin, which could run code; convert it first$")


def test_weights_that_are_missing_are_refused_and_not_drawn(published, tmp_path):
    folder = copy(published("siglip")[0], tmp_path)
    weights = load_file(folder / "model.safetensors")
    gone = [name for name in weights if name.endswith("layers.1.mlp.fc1.weight") and "vision" in name]
    save_file(
        {name: value for name, value in weights.items() if name not in gone}, folder / "model.safetensors", {"format": "pt"}
    )
    refused(folder, r"lacks 1 tensors of a siglip of this shape, the first encoder.layers.1.mlp.fc1.weight; needed the whole")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "wide", r"cannot be read as a dinov2: .*expected int, got str"),
        ("num_attention_heads", 0, r"cannot be read as a dinov2: .*zero$"),
        ("hidden_act", "exec", r"cannot be read as a dinov2: "),
        ("patch_size", 56, r"a dinov2 of patches \(1, 56, 56\) shown 4 frames of 28 px has no token$"),
        (
            "hidden_size",
            48,
            r"lacks \d+ tensors of a dinov2 of this shape, the first embeddings.cls_token; needed the whole encoder$",
        ),
        ("num_hidden_layers", 4, r"lacks 18 tensors of a dinov2 of this shape, the first encoder.layer.3."),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(published, tmp_path, key, value, said):
    refused(rewritten(published("dinov2")[0], tmp_path, "config.json", key, value), said)


def test_code_that_a_config_names_is_not_looked_for(published, tmp_path):
    """transformers can fetch attention from the hub and run it, if the config says so."""
    folder = rewritten(published("dinov2")[0], tmp_path, "config.json", "attn_implementation", "someone/kernel")
    folder = rewritten(
        folder, tmp_path, "config.json", "auto_map", {"AutoModel": "someone.Model", "AutoConfig": "someone.Config"}
    )
    made, encoder = take_over(folder, (FRAMES, 32, 32))
    assert not {"attn_implementation", "auto_map"} & {*made["values"]}
    assert encoder.network.config._attn_implementation == "sdpa"


def rewritten(source: Path, out: Path, name: str, key: str, value: object) -> Path:
    folder = source if source == out else copy(source, out)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {key: value}))
    return folder


def test_a_damaged_file_is_refused(published, tmp_path):
    folder = copy(published("dinov2")[0], tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999])
    refused(folder, r"cannot be read as a dinov2: ")


def test_a_folder_that_does_not_say_how_pictures_are_seen_is_refused(published, tmp_path):
    folder = copy(published("dinov2")[0], tmp_path, without="processor")
    refused(folder, r"does not say how the model sees a picture; needed one of preprocessor_config.json, ")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("resample", 1, "resample = 1; needed 2 .bilinear. or 3 .bicubic.$"),
        ("do_rescale", False, "do_rescale = False, rescale_factor = 0.0039.*; needed 1 / 255$"),
        ("crop_size", {"height": 28, "width": 42}, "pictures of .*; needed squares$"),
        ("crop_size", None, "cannot be read as a dinov2: "),
        ("image_std", [0.2, 0.2], "image_mean = .*, image_std = .*; needed a number for each of three channels, std above 0$"),
    ],
)
def test_a_preprocessor_that_we_do_not_repeat_is_refused(published, tmp_path, key, value, said):
    refused(rewritten(published("dinov2")[0], tmp_path, "preprocessor_config.json", key, value), said)


def test_vjepa2_at_a_side_for_which_its_positions_would_be_wrong_is_refused(published, tmp_path):
    size = {"height": 48, "width": 48}
    folder = rewritten(published("vjepa2")[0], tmp_path, "video_preprocessor_config.json", "crop_size", size)
    refused(folder, "a vjepa2 of crop_size = 32 cannot see 48 px; its files disagree$")


@pytest.mark.parametrize(
    ("kind", "clip", "needed"),
    [
        ("vjepa2", (3, 32, 32), "a multiple of 2 frames"),
        ("videomae", (8, 32, 32), "4 frames"),
        ("dinov2", (4, 32, 48), "a multiple of 1 frames"),
    ],
)
def test_clips_that_do_not_suit_the_model_are_refused(published, kind, clip, needed):
    said = re.escape(f"clip T H W = {clip} does not suit a {kind}; needed {needed}, height = width")
    refused(published(kind)[0], f"^{said}$", clip)


@pytest.mark.parametrize(
    ("source", "revision", "said"),
    [
        ("no/such", "", "^encoders.pretrained.tiny: no folder no/such; needed a folder, or a model of the hub with its commit"),
        ("owner/name", "main", "Pretrained.revision = 'main'; needed a commit of 40 hex digits, or '' for a folder$"),
        (
            "owner/name",
            "0" * 40,
            "^encoders.pretrained.tiny: owner/name at 000000000000 cannot be downloaded .*Pretrained.source",
        ),
    ],
)
def test_sources_that_cannot_be_had_are_refused_in_one_line(listed, project, no_rules, monkeypatch, source, revision, said):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=said) as caught:
        baseline("tiny", listed(source, revision))
    assert "\n" not in str(caught.value)
    assert not list((project / ".resume").glob("partial-*"))


def test_without_transformers_the_extra_is_named(published, monkeypatch):
    folder, *_ = published("dinov2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(
        folder,
        r"^published encoders need transformers \(.*\); install it with: pip install -c requirements.lock -e '.\[baselines\]'",
    )


def test_the_tests_know_every_kind():
    same = {"siglip_vision_model": "siglip", "siglip2_vision_model": "siglip2"}
    assert {same.get(kind, kind) for kind in FAMILIES} == set(MODELS)
