"""Features in memory and in the store on disk."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import small_encoder
import torch
from nearness import near
from torch import Tensor

from scaling4d import artifacts, config, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders import features
from scaling4d.encoders.features import FeatureEncoder, FeatureStore, MemoryFeatures
from scaling4d.encoders.stage import baseline
from scaling4d.mae.encoder import Backbone
from scaling4d.readout.stage import readout


@pytest.fixture
def encoder() -> Backbone:
    return small_encoder.model("Backbone", clip=(4, 16, 16), patch=(2, 8, 8), depth=6, pixel_mean=0.0, pixel_scale=1.0)


@pytest.fixture
def clips() -> list[Tensor]:
    rng = seeds.torch_rng(0, "clips")
    return [torch.randint(256, (4, 16, 16, 3), generator=rng, dtype=torch.uint8) for _ in range(5)]


@pytest.fixture
def passes(encoder: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every pass of the encoder."""
    sizes, compute = [], encoder.features

    def counted(pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        sizes.append(len(pixels))
        return compute(pixels, layers)

    monkeypatch.setattr(encoder, "features", counted)
    return sizes


@pytest.fixture
def open_store(encoder: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FeatureStore]:
    """Opens the store of the encoder as it is now."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()

    def open_(**passes: object) -> FeatureStore:
        Checkpoint("e", "Backbone", {}, parameters=0, step=0, clips_seen=0).write(tmp_path / "encoder", encoder.state_dict())
        return FeatureStore(tmp_path / "store", tmp_path / "encoder", FeatureEncoder(encoder), **passes)

    return open_


def through(source: MemoryFeatures, clips: list[Tensor]) -> Tensor:
    keys = [source.add(clip) for clip in clips]
    source.flush()
    return source.stack(keys)


def computed(encoder: Backbone, clips: list[Tensor]) -> Tensor:
    return through(MemoryFeatures(FeatureEncoder(encoder)), clips)


def test_stored_features_equal_the_encoders_and_the_next_readout_needs_no_pass(encoder, clips, passes, open_store) -> None:
    expected = computed(encoder, clips)
    del passes[:]
    first = through(open_store(), [*clips, clips[0]])  # a clip that comes twice is computed once
    assert len(passes) == len(clips) and torch.equal(first, torch.cat([expected, expected[:1]]))
    again = through(open_store(), clips[::-1])
    assert len(passes) == len(clips) and torch.equal(again, expected.flip(0))


def test_only_new_clips_are_computed_and_a_shard_is_hashed_at_first_use(clips, passes, open_store, monkeypatch) -> None:
    store = open_store()
    through(store, clips[:3])
    through(open_store(), clips)
    assert len(passes) == len(clips) and len(list(store.folder.iterdir())) == 2
    hashed, sha256, again = [], artifacts.sha256, open_store()
    monkeypatch.setattr(features.artifacts, "sha256", lambda path: hashed.append(path) or sha256(path))
    for _ in range(2):
        again.encode(clips[4:])
        assert len(hashed) == 1


def test_a_shard_is_written_when_enough_is_new(encoder, clips, open_store, monkeypatch) -> None:
    monkeypatch.setattr(features, "SHARD_BYTES", 2 * 8 * 24 * 4)  # two clips
    store = open_store()
    stored = through(store, clips)
    assert len(list(store.folder.iterdir())) == 3 and torch.equal(stored, computed(encoder, clips))


def test_features_are_the_same_before_and_after_they_are_written(encoder, clips, open_store) -> None:
    store, expected = open_store(), computed(encoder, clips)
    assert torch.equal(store.encode(clips), expected) and list(store.folder.iterdir()) == []
    store.flush()
    assert len(list(store.folder.iterdir())) == 1 and store.new == {} and torch.equal(store.encode(clips), expected)


@pytest.mark.parametrize("batch", [2, 3, 5, 9])
def test_in_batches_a_pass_takes_several_clips_and_the_last_one_the_rest(encoder, clips, passes, open_store, batch) -> None:
    expected = computed(encoder, clips)
    for source in (MemoryFeatures(FeatureEncoder(encoder), batch=batch), open_store(batch=batch)):
        del passes[:]
        assert near(through(source, clips), expected, 1e-5) and passes == [len(clips[i : i + batch]) for i in range(0, 5, batch)]
        assert near(source.encode(clips), expected, 1e-5)


def test_a_damaged_shard_is_named_and_computed_again(encoder, clips, passes, open_store) -> None:
    store, expected = open_store(), computed(encoder, clips)
    del passes[:]
    through(store, clips)
    (shard,) = store.folder.iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{shard} is damaged; its clips are computed again"):
        stored = through(open_store(), clips)
    assert len(passes) == 2 * len(clips) and torch.equal(stored, expected)
    (store.folder / f"{'0' * 64}.safetensors").write_bytes(b"half of a sha")
    with pytest.warns(UserWarning, match="0.safetensors is damaged; its clips are computed again"):
        assert torch.equal(through(open_store(), clips), expected)


def test_an_interrupted_write_leaves_nothing_and_the_next_readout_starts_anew(encoder, clips, passes, open_store, monkeypatch):
    def interrupted(path: Path, tensors: dict[str, Tensor]) -> None:
        path.write_bytes(b"half of a sha")
        raise KeyboardInterrupt

    store = open_store()
    with monkeypatch.context() as patch:
        patch.setattr(features, "save_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            through(store, clips)
    assert list(store.folder.iterdir()) == []
    killed = store.folder / "shard.partial-0123abcd"
    killed.mkdir()
    (killed / "shard").write_bytes(b"half of a sha")
    del passes[:]
    assert torch.equal(through(open_store(), clips), computed(encoder, clips)) and len(passes) == 2 * len(clips)
    assert not killed.exists()


def test_other_weights_code_and_libraries_have_folders_of_their_own(encoder, tmp_path, open_store, monkeypatch) -> None:
    modules = {"scaling4d.mae.encoder": "a", "scaling4d.readout.stage": "b"}
    monkeypatch.setattr(features.code_hashes, "running", lambda package: {"modules": modules})
    first = open_store().folder
    modules["scaling4d.readout.stage"] = "c"
    assert open_store().folder == first
    modules["scaling4d.mae.encoder"] = "d"
    second = open_store().folder
    with monkeypatch.context() as patch:
        patch.setattr(features.metadata, "version", lambda name: f"another {name}")
        third = open_store().folder
    assert open_store().folder == second
    with torch.no_grad():
        encoder.patch_embedding.bias += 1
    folders = [open_store().folder, open_store(compute="bfloat16").folder, open_store(batch=2).folder]
    encoder.resize((4, 32, 16))
    assert len({first, second, third, *folders, open_store().folder}) == 7


@pytest.mark.integration
def test_a_readout_is_the_same_without_a_store_and_with_a_new_or_incomplete_one(project: Path, changed: Callable, actions: None):
    baseline("untrained_nano", config.read())

    def trained(folder: str) -> list[str]:
        changed("readout.Evaluation.ranks", 2)
        readout("untrained_nano", "actions", "frozen", changed("readout.Evaluation.feature_store", folder))
        out = project / "artifacts/smoke/readout/untrained_nano/actions/frozen"
        return [artifacts.sha256(out / name) for name in ("head.safetensors", "result.json")]

    def shards() -> list[Path]:
        return sorted((project / "store").rglob("*.safetensors"))

    expected = trained("")
    assert not (project / "store").exists()
    assert trained("store") == expected
    full = shards()
    for path in full[::2]:
        path.unlink()
    assert trained("store") == expected and shards() == full and len(full) == 2  # of two ranks
    shutil.rmtree(project / "store")
