"""Published encoders: tiny random ones of every kind, saved as transformers saves them."""

import json
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import refusals
import torch
from encoders.small_models import FRAMES, MODELS, PREDICTOR, SHAPE, save_model, tf
from nearness import near
from safetensors.torch import load_file
from torch import Tensor, nn

from scaling4d import artifacts, config, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.encoder import Encoder
from scaling4d.encoders.features import features_at_depth
from scaling4d.encoders.pretrained import load_encoder, set_clip
from scaling4d.encoders.stage import baseline
from scaling4d.encoders.transformers import FAMILIES, PretrainedEncoder, PretrainedEncoderConfig, default_clip, import_encoder
from scaling4d.mae.encoder import initialise
from scaling4d.mae.patches import patchify
from scaling4d.readout.stage import readout
from scaling4d.records import UserError
from scaling4d.show.predict import write_features
from scaling4d.training.distributed import run
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig, full_tensor, parallelize, reduce_gradients

VIDEO = ("videomae", "vjepa2", "videoprism_vision_model")
every_kind = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, nn.Module, object, tuple]]:
    """Folder, model, preprocessor and patch of a kind, made once."""
    made: dict[str, tuple] = {}

    def of(kind: str) -> tuple:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = (folder, *save_model(folder, kind))
        return made[kind]

    return of


def imported(folder: Path, clip: tuple = (FRAMES, 32, 32)) -> PretrainedEncoder:
    return import_encoder(folder, clip)[1]


def last_layer(encoder: PretrainedEncoder, pixels: Tensor) -> Tensor:
    """`B t n D`."""
    with torch.no_grad():
        return features_at_depth(encoder, pixels, 1.0)


def clips(side: int, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, FRAMES, side, side, 3), dtype=torch.uint8, generator=seeds.torch_rng(0, "clips", side))


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


@pytest.mark.parametrize(("kind", "side"), [("dinov2", 70), ("dinov3_vit", 48), ("vjepa2", 48)])
def test_pictures_of_another_side_are_seen_as_transformers_sees_them(published, agree, kind, side):
    """Of V-JEPA 2 as a model whose config has this side."""
    folder, model, processor, (pt, ph, pw) = published(kind)
    encoder = imported(folder)
    set_clip(encoder, frames=2 * FRAMES, side_px=side)
    assert encoder.clip == (2 * FRAMES, side, side) and encoder.grid == (2 * FRAMES // pt, side // ph, side // pw)
    if kind == "vjepa2":
        larger = tf.VJEPA2Model(tf.VJEPA2Config(**SHAPE, **PREDICTOR, crop_size=side, patch_size=8, frames_per_clip=8))
        larger.load_state_dict(model.state_dict())
        model = larger.eval()
    pixels = torch.cat([clips(side), clips(side).flip(1)], dim=1)
    states = hidden_states(kind, model, as_the_model_sees(kind, processor, pixels, do_resize=False, do_center_crop=False))
    tokens = side // ph * (side // pw) * (encoder.grid[0] if kind in VIDEO else 1)
    with torch.no_grad():
        ours = encoder.features(pixels)[-1]
    expected = states[-1][:, -tokens:].reshape(2, -1, 24)
    agree(f"{kind} at {side} px", (ours - expected).abs().max().item() / expected.abs().max().item(), 1e-5)


def test_a_side_that_a_published_encoder_does_not_take_is_refused(published) -> None:
    for kind, needed in (("videomae", "32, its own"), ("dinov3_vit", "a multiple of 8")):
        with pytest.raises(UserError, match=f"^side_px = 44 does not suit a {kind} of patches .*; needed {needed}$"):
            set_clip(imported(published(kind)[0]), side_px=44)


@every_kind
def test_features_are_the_hidden_states_of_transformers_without_extra_tokens(published, agree, kind):
    folder, model, processor, (pt, ph, pw) = published(kind)
    encoder = imported(folder)
    encoder.resize((FRAMES, encoder.side_px, encoder.side_px))  # as the model sees it, so that nothing is resized
    pixels = clips(encoder.side_px)
    resize = {} if kind == "siglip2" else {"do_resize": False}
    states = hidden_states(kind, model, as_the_model_sees(kind, processor, pixels, **resize))
    with torch.no_grad():
        layers = encoder.features(pixels)
    t, h, w = encoder.grid
    assert (t, h, w) == (FRAMES // pt, encoder.side_px // ph, encoder.side_px // pw)
    assert len(layers) == len(states) == encoder.depth + 1
    error = 0.0
    for layer, state in zip(layers, states, strict=True):
        patches = state if kind in VIDEO else state[:, -h * w :].reshape(2, t * h * w, -1)
        assert layer.shape == (2, t * h * w, encoder.width)
        error = max(error, float((layer - patches).abs().max() / patches.abs().max()))
    agree(f"{kind}, every layer against transformers, relative", error, 1e-6)
    assert not torch.allclose(layers[-1], layers[-2])


@every_kind
def test_no_block_runs_after_the_last_layer_that_is_needed(published, kind):
    encoder = imported(published(kind)[0])
    counted = []
    for block in (m for m in encoder.network.modules() if isinstance(m, nn.ModuleList) for m in m):
        block.register_forward_hook(lambda *_: counted.append(1))
    with torch.no_grad():
        two, layers = encoder.features(clips(32), 2), encoder.features(clips(32))
    assert len(two) == 2 and len(counted) == 1 + encoder.depth
    assert all(torch.equal(a, b) for a, b in zip(two, layers, strict=False))
    assert last_layer(encoder, clips(32)).shape == (2, encoder.grid[0], encoder.grid[1] * encoder.grid[2], 24)


@every_kind
@pytest.mark.parametrize("side", [20, 64])
def test_pictures_of_another_size_are_resized_as_the_models_own_preprocessor_does(published, agree, kind, side):
    folder, _, processor, patch = published(kind)
    encoder = imported(folder, (FRAMES, side, side))
    assert encoder.resample == {2: "bilinear", 3: "bicubic"}[int(processor.resample)]
    pixels = clips(side)
    if kind == "vjepa2":  # resizes to more and cuts the middle out; our clips are cut already
        inputs = as_the_model_sees(kind, processor, pixels, size={"height": 32, "width": 32})
    elif kind in ("dinov2", "dinov2_with_registers", "videomae"):
        inputs = as_the_model_sees(kind, processor, pixels, size={"shortest_edge": encoder.side_px})
    else:
        inputs = as_the_model_sees(kind, processor, pixels)
    expected = next(value for name, value in inputs.items() if name in ("pixel_values", "pixel_values_videos"))
    x = encoder.preprocess(pixels)
    if kind == "siglip2":
        x = patchify(x.flatten(0, 1).movedim(1, -1)[:, None], patch)
    error = (x.reshape(expected.shape) - expected).abs().max()
    agree(f"{kind}, {side} px resized and normalised as its preprocessor does", error, 1e-6)


class LinearProbe(nn.Module):
    """An encoder and a linear head."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = imported(folder)
        self.head = nn.Linear(self.encoder.width, 3)
        initialise(self.head, seed=0)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(features_at_depth(self.encoder, pixels, 1.0).mean((1, 2))).square().mean()


def gradients(*, rank: int, ranks: int, folder: Path, compute: str, **changes: object) -> dict[str, Tensor]:
    """Full gradients of a step, by name."""
    model = LinearProbe(folder)
    plain = {"shards": 1, "recompute": "none", "compile": False, "packed": False, "accumulate": 1}
    parallelize(
        model, ShardingConfig(**plain | changes), ComputeConfig("cpu", compute), ranks=ranks, float32_modules=[model.head]
    )
    model(clips(32, 2)[rank * 2 // ranks : (rank + 1) * 2 // ranks]).backward()
    reduce_gradients(model)
    assert len(model.encoder.blocks) == model.encoder.depth
    return {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.integration
@every_kind
def test_a_sharded_published_encoder_has_the_gradients_of_a_plain_one(published, kind):
    folder, *_ = published(kind)
    plain = run(gradients, ranks=1, folder=folder, compute="float32")
    sharded = run(gradients, ranks=2, folder=folder, compute="float32", shards=2, recompute="block")
    rough = run(gradients, ranks=2, folder=folder, compute="bfloat16", shards=2)
    cast = run(gradients, ranks=1, folder=folder, compute="bfloat16", recompute="block")
    assert sharded.keys() == plain.keys() == rough.keys() == cast.keys() and len(plain) > 30
    largest = max(gradient.norm() for gradient in plain.values())
    for name, gradient in plain.items():
        assert (sharded[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6 * largest, name
        assert (rough[name] - gradient).norm() < 0.2 * gradient.norm() + 0.02 * largest, name
        assert (cast[name] - gradient).norm() < 0.2 * gradient.norm() + 0.02 * largest, name


def test_features_are_the_same_at_every_call_and_for_bytes_and_floats(published):
    encoder = imported(published("dinov3_vit")[0]).train()  # its training mode moves positions
    assert torch.equal(last_layer(encoder, clips(32)), last_layer(encoder, clips(32)))
    assert near(last_layer(encoder, clips(32)), last_layer(encoder, clips(32) / 255))


# ---- the stage ----


@pytest.fixture
def listed(project: Path, changed: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Settings with one published encoder, `tiny`, which no profile has."""
    monkeypatch.setattr(config, "overrides", lambda *_: {})

    def make(source: Path | str, revision: str = "", clip: tuple = (16, 64, 64)) -> dict:
        values = {"source": str(source), "revision": revision, "clip": list(clip)}
        return changed("encoders.pretrained", {"tiny": {"Pretrained": values}})

    return make


@pytest.mark.integration
@every_kind
def test_the_stage_imports_what_features_need_and_gives_the_same_bytes_twice(published, kind, listed):
    source, _, processor, _ = published(kind)
    settings = listed(source, clip=(FRAMES, 32, 32))
    folder = baseline("tiny", settings)
    assert folder == Path("artifacts/smoke/pretrain/tiny")
    sha256, encoder = artifacts.sha256(folder), load_encoder(folder).eval()
    assert "A published encoder of video, Pretrained" in (folder / "README.md").read_text()
    assert artifacts.sha256(baseline("tiny", settings)) == sha256
    assert not any(weight.is_meta for weight in [*encoder.parameters(), *encoder.buffers()])
    assert torch.equal(last_layer(encoder, clips(32)), last_layer(imported(source), clips(32)))
    unused = ("network.head.", "network.predictor.", "text", "decoder")
    assert not [name for name in load_file(folder / "model.safetensors") if name.startswith(unused)]
    saved = Checkpoint.read(folder)
    assert saved.parameters == sum(weight.numel() for weight in encoder.parameters())
    assert saved.settings["std"] == (list(processor.image_std) if processor.do_normalize else [1, 1, 1])
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["inputs"]["model.safetensors"] == artifacts.sha256(source / "model.safetensors")
    assert "Pretrained.source" in (folder / "operative_config.gin").read_text()


def test_weights_in_several_files_and_of_half_precision_are_read(published, tmp_path):
    source, model, processor, _ = published("dinov2")
    deepcopy(model).half().save_pretrained(tmp_path, max_shard_size="20KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    half, full = (last_layer(imported(folder), clips(32)) for folder in (tmp_path, source))
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.02


@pytest.mark.integration
def test_a_model_of_the_hub_that_was_downloaded_before_needs_no_network(published, listed, monkeypatch, tmp_path):
    import huggingface_hub

    revision = "0123456789" * 4
    snapshot = tmp_path / "models--owner--name/snapshots" / revision
    snapshot.mkdir(parents=True)
    copy(published("dinov2")[0], snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub = artifacts.sha256(baseline("tiny", listed("owner/name", revision)) / "model.safetensors")
    assert hub == artifacts.sha256(baseline("tiny", listed(snapshot)) / "model.safetensors")


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["siglip", "vjepa2"])
def test_a_readout_is_trained_on_a_published_encoder_like_on_any_other(published, kind, listed, actions, tmp_path):
    settings = listed(published(kind)[0])
    folder = baseline("tiny", settings)
    frozen = readout("tiny", "actions", "frozen", settings)
    assert (frozen.encoder, frozen.examples) == ("tiny", 8)
    assert frozen.parameters == Checkpoint.read(folder).parameters
    assert frozen.checkpoint_sha256 == artifacts.sha256(folder / "model.safetensors")
    assert readout("tiny", "actions", "finetune", settings).parameters == frozen.parameters
    np.save(tmp_path / "clips.npy", np.zeros((1, 16, 64, 64, 3), np.uint8))
    head = Path("artifacts/smoke/readout/tiny/actions/frozen")
    names = write_features(head, tmp_path / "clips.npy", tmp_path / "out.npz", side_px=None, queries=None)
    assert names == ["layer_00", "layer_01", "layer_02", "layer_03", "last_hidden_state", "output"]


@pytest.mark.parametrize("kind", ["dinov2", "vjepa2"])
def test_a_saved_encoder_keeps_the_side_to_which_it_was_resized(published, kind, tmp_path):
    encoder = Encoder.from_pretrained(published(kind)[0], clip=(FRAMES, 56, 56))
    encoder.resize((FRAMES, 56, 56), side_px=56)
    again = Encoder.from_pretrained(encoder.save_pretrained(tmp_path / "saved"))
    assert (again.clip, again.grid) == (encoder.clip, encoder.grid) and again.grid[1] == 56 // published(kind)[3][1]
    with torch.no_grad():
        assert torch.equal(again(clips(56)).last_hidden_state, encoder(clips(56)).last_hidden_state)


# ---- refusals ----


def copy(source: Path, out: Path, *, without: str = "") -> Path:
    for path in source.iterdir():
        if not (without and re.search(without, path.name)):
            (out / path.name).write_bytes(path.read_bytes())
    return out


def refused(source: Path, message: str, clip: tuple = (FRAMES, 32, 32)) -> None:
    assert re.search(message, refusals.refused(imported, source, clip))


def rewritten(source: Path, out: Path, name: str, key: str, value: object) -> Path:
    folder = source if source == out else copy(source, out)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {key: value}))
    return folder


def test_a_damaged_preprocessor_is_refused_where_no_clip_is_given(published, tmp_path):
    folder = rewritten(published("dinov2")[0], tmp_path, PREPROCESSOR, "image_mean", [[1], 2, 3])
    with pytest.raises(UserError, match=r"^.* cannot be read as a dinov2: float\(\) argument must be [^\n]+$"):
        default_clip(folder)


def test_pickles_are_refused_and_named(published, tmp_path):
    folder = copy(published("dinov2")[0], tmp_path, without="safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    refused(folder, r"has no model\*.safetensors, but pytorch_model.bin, which could run code; convert it first$")


CONFIG, PREPROCESSOR, VIDEO_PREPROCESSOR = "config.json", "preprocessor_config.json", "video_preprocessor_config.json"


@pytest.mark.parametrize(("kind", "file", "key", "value", "message"), [
    ("dinov2", CONFIG, "model_type", "bert", r"config.json has model_type 'bert'; needed one of dinov2, .*vjepa2"),
    ("dinov2", CONFIG, "hidden_size", "wide", r"cannot be read as a dinov2: .*expected int, got str"),
    ("dinov2", CONFIG, "num_attention_heads", 0, r"cannot be read as a dinov2: .*zero$"),
    ("dinov2", CONFIG, "hidden_act", "exec", r"cannot be read as a dinov2: "),
    ("dinov2", CONFIG, "patch_size", 56, r"a dinov2 of patches \(1, 56, 56\) shown 4 frames of 28 px has no token$"),
    ("dinov2", CONFIG, "hidden_size", 48, r"lacks \d+ tensors of a dinov2 of this shape, the first embeddings.cls_token; "),
    ("dinov2", CONFIG, "num_hidden_layers", 4, r"lacks 18 tensors of a dinov2 of this shape, the first encoder.layer.3."),
    ("dinov2", PREPROCESSOR, "resample", 1, "resample = 1; needed 2 .bilinear. or 3 .bicubic.$"),
    ("dinov2", PREPROCESSOR, "do_rescale", False, "do_rescale = False, rescale_factor = 0.0039.*; needed 1 / 255$"),
    ("dinov2", PREPROCESSOR, "crop_size", {"height": 28, "width": 42}, "pictures of .*; needed squares$"),
    ("dinov2", PREPROCESSOR, "crop_size", None, "cannot be read as a dinov2: "),
    ("dinov2", PREPROCESSOR, "image_std", [0.2, 0.2], "image_mean = .*, image_std = .*; needed a number for each of three"),
    ("vjepa2", VIDEO_PREPROCESSOR, "crop_size", {"height": 48, "width": 48}, "crop_size = 32 cannot see 48 px; its files"),
])  # fmt: skip
def test_files_that_do_not_fit_together_are_refused_in_one_line(published, tmp_path, kind, file, key, value, message):
    refused(rewritten(published(kind)[0], tmp_path, file, key, value), message)


def test_code_that_a_config_names_is_not_looked_for(published, tmp_path):
    """transformers can fetch attention from the hub and run it, if the config says so."""
    folder = rewritten(published("dinov2")[0], tmp_path, "config.json", "attn_implementation", "someone/kernel")
    named = {"AutoModel": "someone.Model", "AutoConfig": "someone.Config"}
    folder = rewritten(folder, tmp_path, "config.json", "auto_map", named)
    encoder_config, encoder = import_encoder(folder, (FRAMES, 32, 32))
    assert not {"attn_implementation", "auto_map"} & {*encoder_config.values}
    assert encoder.network.config._attn_implementation == "sdpa"


def test_a_damaged_file_and_a_folder_without_preprocessor_are_refused(published, tmp_path):
    folder = copy(published("dinov2")[0], tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999])
    refused(folder, r"cannot be read as a dinov2: ")
    (folder / PREPROCESSOR).unlink()
    refused(folder, r"does not say how the model sees a picture; needed one of preprocessor_config.json, ")


@pytest.mark.parametrize(("kind", "clip", "needed"), [
    ("vjepa2", (3, 32, 32), "a multiple of 2 frames"),
    ("videomae", (8, 32, 32), "4 frames"),
    ("dinov2", (4, 32, 48), "a multiple of 1 frames"),
])  # fmt: skip
def test_clips_that_do_not_suit_the_model_are_refused(published, kind, clip, needed):
    message = re.escape(f"clip T H W = {clip} does not suit a {kind}; needed {needed}, height = width")
    refused(published(kind)[0], f"^{message}$", clip)


@pytest.mark.integration
@pytest.mark.parametrize(("source", "revision", "message"), [
    ("no/such", "", "^encoders.pretrained.tiny: no folder or file no/such; needed one, or a model of the hub with its commit"),
    ("owner/name", "main", "Pretrained.revision = 'main'; needed a commit of 40 hex digits, or '' for a folder or file$"),
    ("owner/name", "0" * 40, "^encoders.pretrained.tiny: owner/name at 0{12} cannot be downloaded .*Pretrained.source"),
])  # fmt: skip
def test_sources_that_cannot_be_had_are_refused_in_one_line(listed, project, monkeypatch, source, revision, message):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert re.search(message, refusals.refused(baseline, "tiny", listed(source, revision)))
    assert not list((project / ".resume").glob("*.partial-*"))


@pytest.mark.parametrize(("lock", "install"), [
    ((), r"pip install 'scaling4d\[baselines\]'"),
    (("requirements.lock",), r"pip install -c requirements.lock -e '\.\[baselines\]'"),
])  # fmt: skip
def test_without_transformers_the_extra_is_named(published, monkeypatch, tmp_path, lock, install):
    monkeypatch.setitem(sys.modules, "transformers", None)
    source = published("dinov2")[0]
    monkeypatch.chdir(tmp_path)
    for name in lock:
        Path(name).touch()
    refused(source, rf"^published encoders need transformers \(.*\); run {install}$")


def test_the_tests_know_every_kind():
    same = {"siglip_vision_model": "siglip", "siglip2_vision_model": "siglip2"}
    assert {same.get(kind, kind) for kind in FAMILIES} == set(MODELS)


@pytest.mark.parametrize(("changes", "message"), [
    ({"values": {"num_hidden_layers": 10**9}}, "num_hidden_layers = 1000000000; needed at most 1,000"),
    ({"values": {"hidden_sizes": [96, 2**40]}}, "hidden_sizes = 1099511627776; needed at most 1,048,576"),
    ({"values": {"layer_norm_eps": float("nan")}}, "layer_norm_eps = nan; needed at most .+"),
    ({"kind": "dinov"}, "kind = 'dinov'; needed .+; did you mean dinov2[?]"),
    ({"side_px": 0}, "side_px = 0; needed a number from 1 to 1,048,576"),
    ({"std": (0.0, 1.0, 1.0)}, r"std = \(0.0, 1.0, 1.0\); needed numbers above 0"),
])  # fmt: skip
def test_an_encoder_of_impossible_sizes_is_refused_before_it_is_built(changes: dict, message: str) -> None:
    values = {"kind": "dinov2", "values": {}, "clip": (2, 28, 28), "side_px": 28, "resample": "bicubic"}
    values |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    PretrainedEncoderConfig(**values)
    with pytest.raises(ValueError, match=f"^{message}$"):
        PretrainedEncoderConfig(**values | changes)
