"""Features that stay on disk."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scaling4d import artifacts, config, seeds
from scaling4d.encoders import store
from scaling4d.encoders.features import Features, layer_index, together
from scaling4d.encoders.store import Store, opened
from scaling4d.mae.encoder import Encoder, initialise
from scaling4d.pretrain.point import baseline
from scaling4d.readout.classifier import classify
from scaling4d.readout.train import readout
from scaling4d.records import UserError

LAYER = layer_index(depth=6, fraction=0.95)


@pytest.fixture
def encoder() -> Encoder:
    made = Encoder(
        width=24, depth=6, heads=2, mlp=48, clip=(4, 16, 16), patch=(2, 8, 8), gelu="tanh", pixel_mean=0.0, pixel_scale=1.0
    )
    initialise(made, seed=0)
    return made


@pytest.fixture
def clips() -> list[Tensor]:
    rng = seeds.stream(0, "clips")
    return [torch.randint(256, (4, 16, 16, 3), generator=rng, dtype=torch.uint8) for _ in range(5)]


@pytest.fixture
def passes(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every pass of the encoder."""
    seen, features = [], encoder.features

    def counted(pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        seen.append(len(pixels))
        return features(pixels, layers)

    monkeypatch.setattr(encoder, "features", counted)
    return seen


def kept(encoder: Encoder, folder: Path, *, layers: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Store:
    return Store(folder, encoder, layers=layers, wanted=LAYER, dtype=dtype)


def through(inputs: Store | Features, clips: list[Tensor]) -> list[Tensor]:
    added = [inputs.add(clip) for clip in clips]
    inputs.flush()
    return inputs.ready(added)


def test_stored_features_are_those_of_the_encoder_bit_for_bit_and_the_next_readout_needs_no_pass(
    encoder: Encoder, clips: list[Tensor], passes: list[int], tmp_path: Path
) -> None:
    wanted = through(Features(encoder, 0.95), clips)
    del passes[:]
    first = through(kept(encoder, tmp_path), [*clips, clips[0]])  # a clip that comes twice is seen once
    assert len(passes) == len(clips) and all(map(torch.equal, first, [*wanted, wanted[0]]))
    again = through(kept(encoder, tmp_path), clips[::-1])
    assert len(passes) == len(clips) and all(map(torch.equal, again, wanted[::-1]))


def test_only_clips_that_are_new_are_computed(encoder: Encoder, clips: list[Tensor], passes: list[int], tmp_path: Path) -> None:
    through(kept(encoder, tmp_path), clips[:3])
    through(kept(encoder, tmp_path), clips)
    assert len(passes) == len(clips) and len(list(tmp_path.iterdir())) == 2


def test_a_sweep_over_stored_depths_costs_no_second_pass(
    encoder: Encoder, clips: list[Tensor], passes: list[int], tmp_path: Path
) -> None:
    through(kept(encoder, tmp_path, layers=(0, 2)), clips)
    of_two = Store(tmp_path, encoder, layers=(), wanted=2, dtype=torch.float32)
    found = through(of_two, clips)
    assert len(passes) == len(clips)
    wanted = [encoder.features(clip[None])[2].unflatten(1, (2, 4))[0] for clip in clips]
    assert all(map(torch.equal, found, wanted))


def test_a_small_shard_is_written_whenever_enough_is_new(
    encoder: Encoder, clips: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 2 * 8 * 24 * 4)  # two clips
    found = through(kept(encoder, tmp_path), clips)
    assert len(list(tmp_path.iterdir())) == 3 and all(map(torch.equal, found, through(Features(encoder, 0.95), clips)))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_takes_half_the_room_and_readouts_compute_in_float32(
    encoder: Encoder, clips: list[Tensor], tmp_path: Path, name: str
) -> None:
    dtype = store.DTYPES[name]
    found = through(kept(encoder, tmp_path, dtype=dtype), clips)
    exact = torch.stack(through(Features(encoder, 0.95), clips))
    assert found[0].dtype == dtype and together(found, range(5)).dtype == torch.float32
    torch.testing.assert_close(together(found, range(5)), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_damaged_shard_is_named_and_computed_again(
    encoder: Encoder, clips: list[Tensor], passes: list[int], tmp_path: Path
) -> None:
    wanted = through(kept(encoder, tmp_path), clips)
    (shard,) = tmp_path.iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    wanted = [rows.clone() for rows in wanted]  # they lie in the file
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{shard} is damaged; its clips are computed again"):
        found = through(kept(encoder, tmp_path), clips)
    assert len(passes) == 2 * len(clips) and all(map(torch.equal, found, wanted))


def test_other_weights_other_models_and_other_numbers_have_folders_of_their_own(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointed: Callable[[Encoder, Path], Path]
) -> None:
    code = tmp_path / "readout.json"
    code.write_text('{"modules": {"scaling4d.mae.encoder": "a", "scaling4d.readout.train": "b"}}')
    monkeypatch.setattr(store, "CODE", code)

    def folder(dtype: str = "float32") -> Path:
        saved = checkpointed(encoder, tmp_path / "encoder")
        return opened(tmp_path / "store", saved, encoder, layers=[1], wanted=1, dtype=dtype).folder

    first = folder()
    assert folder() == first != folder("float16")
    code.write_text('{"modules": {"scaling4d.mae.encoder": "a", "scaling4d.readout.train": "c"}}')
    assert folder() == first
    code.write_text('{"modules": {"scaling4d.mae.encoder": "d"}}')
    second = folder()
    assert second != first
    with monkeypatch.context() as patch:
        patch.setattr(store.metadata, "version", lambda name: f"another {name}")
        assert folder() not in (first, second)
    assert folder() == second
    with torch.no_grad():
        encoder.patch_embedding.bias += 1
    assert folder() not in (first, second)
    with pytest.raises(UserError, match="feature_dtype = 'int8'; needed one of float32, float16, bfloat16; set readout.shared"):
        folder("int8")


@pytest.fixture
def checkpointed() -> Callable[[Encoder, Path], Path]:
    from scaling4d.checkpoint import Checkpoint

    def write(encoder: Encoder, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        Checkpoint("e", "Encoder", {}, parameters=0, step=0, clips_seen=0).write(folder, encoder.state_dict())
        return folder

    return write


def test_a_shard_is_hashed_when_it_is_first_used_and_not_before(
    encoder: Encoder, clips: list[Tensor], passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for clip in clips[:3]:
        through(kept(encoder, tmp_path), [clip])
    hashed, sha256 = [], store.artifacts.sha256
    monkeypatch.setattr(store.artifacts, "sha256", lambda path: hashed.append(path) or sha256(path))
    again = kept(encoder, tmp_path)
    assert hashed == []
    for _ in range(2):
        assert torch.equal(again.of(again.add(clips[1])), through(Features(encoder, 0.95), clips[1:2])[0])
        assert len(hashed) == 1


def test_an_interrupted_write_leaves_nothing_and_the_next_readout_starts_anew(
    encoder: Encoder, clips: list[Tensor], passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, tensors: dict[str, Tensor]) -> None:
        path.write_bytes(b"half of a sha")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            through(kept(encoder, tmp_path), clips)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "partial-killed").mkdir()  # what a kill leaves
    (tmp_path / "partial-killed/shard").write_bytes(b"half of a sha")
    del passes[:]
    assert all(map(torch.equal, through(kept(encoder, tmp_path), clips), through(Features(encoder, 0.95), clips)))
    assert len(passes) == 2 * len(clips)


def test_a_shard_that_is_no_shard_is_named_and_passed_over(encoder: Encoder, clips: list[Tensor], tmp_path: Path) -> None:
    (tmp_path / f"{'0' * 64}.safetensors").write_bytes(b"half of a sha")
    with pytest.warns(UserWarning, match="0.safetensors is damaged; its clips are computed again"):
        found = through(kept(encoder, tmp_path), clips)
    assert all(map(torch.equal, found, through(Features(encoder, 0.95), clips)))


def test_features_are_looked_up_when_they_are_used_wherever_they_lie(
    encoder: Encoder, clips: list[Tensor], tmp_path: Path
) -> None:
    here = kept(encoder, tmp_path)
    stored = here.ready([here.add(clip) for clip in clips])
    wanted = through(Features(encoder, 0.95), clips)
    assert list(tmp_path.iterdir()) == [] and all(map(torch.equal, stored, wanted))  # not on disk yet
    here.flush()
    assert len(list(tmp_path.iterdir())) == 1 and here.new == {} and all(map(torch.equal, stored, wanted))


def test_a_readout_is_the_same_whether_its_store_is_new_full_damaged_or_gone(
    project: Path, changed: Callable, actions: None
) -> None:
    baseline("untrained_nano", config.read())

    def trained(folder: str) -> list[str]:
        changed("readout.shared.Evaluation.ranks", 2)
        readout("untrained_nano", "actions", "frozen", changed("readout.shared.Evaluation.feature_store", folder))
        out = project / "artifacts/smoke/readout/untrained_nano/actions/frozen"
        return [artifacts.sha256(out / name) for name in ("head.safetensors", "result.json")]

    def shards() -> list[Path]:
        return sorted((project / "store").rglob("*.safetensors"))

    wanted = trained("")
    assert not (project / "store").exists()
    assert trained("store") == wanted
    full = shards()
    assert full and trained("store") == wanted and shards() == full
    for path in full[::2]:
        path.unlink()
    assert trained("store") == wanted and shards() == full
    shutil.rmtree(project / "store")
    assert trained("store") == wanted and shards() == full
    shutil.rmtree(project / "store")


def test_a_readout_of_other_classes_than_the_benchmarks_is_refused_in_one_line(
    project: Path, changed: Callable, actions: None
) -> None:
    baseline("untrained_nano", config.read())
    changed("readout.tasks.actions.Actions.classes", 3)
    settings = changed("readout.shared.Evaluation.ranks", 2)
    expected = "^data/benchmarks/ssv2 has 8 classes; set readout.tasks.actions.Actions.classes = 3 to that$"
    with pytest.raises(UserError, match=expected):
        readout("untrained_nano", "actions", "frozen", settings)
    with pytest.raises(UserError, match=expected):
        classify("untrained_nano", settings)
