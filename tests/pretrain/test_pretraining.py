"""Pretraining a point, and the encoders that it is compared with."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scaling4d import artifacts, checkpoint, config, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.clips import loader
from scaling4d.mae.build import encoder_of, load
from scaling4d.pretrain import loop
from scaling4d.pretrain.loop import pretrain
from scaling4d.pretrain.point import baseline, sections, start
from scaling4d.pretrain.settings import Training
from scaling4d.pretrain.validate import validate
from scaling4d.records import UserError
from scaling4d.training.distributed import run


def val_loss(*, rank: int, ranks: int, settings: dict) -> float:
    config.bind({"Training": settings["pretrain"]["Training"]}, sections("nano", settings))
    model = start("nano", settings, settings["seed"])
    return validate(model, Path("artifacts/smoke/clips"), config.build(Training), seed=0, rank=rank, ranks=ranks)


def test_training_lowers_the_loss_and_says_what_made_it(project: Path, changed: Callable) -> None:
    settings = changed("pretrain.Training.steps", 60)
    folder = pretrain("nano", settings)
    losses = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"]
    assert losses[-1]["clips_seen"] == 60 * settings["pretrain"]["Training"]["batch"]
    saved, summary = Checkpoint.read(folder), json.loads((folder / "summary.json").read_text())
    assert saved.step == 60 and saved.parameters == sum(p.numel() for p in encoder_of(load(folder)).parameters())
    assert summary["val_loss"] < losses[0]["loss"]
    made = json.loads((folder / "provenance.json").read_text())
    assert made["overrides"]["pretrain.Training.steps"] == 60 and len(made["inputs"]["clips"]) == 64
    assert "SimpleMAE.width = 32" in (folder / "operative_config.gin").read_text()
    assert list((project / ".runs").glob("pretrain-nano-*.json"))


@pytest.mark.parametrize("point", ["nano", "mae_st_tiny"])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(changed: Callable, point: str) -> None:
    shas = []
    for seed in (0, 0, 1):
        changed("pretrain.Training.steps", 4)
        shas.append(checkpoint.weights_sha256(pretrain(point, changed("seed", seed))))
    assert shas[0] == shas[1] != shas[2]


def test_a_student_learns_its_teachers_features_and_keeps_no_teacher(changed: Callable) -> None:
    teacher = pretrain("nano", changed("pretrain.Training.steps", 4))
    folder = pretrain("nano_distilled", changed("pretrain.Training.steps", 60))
    losses = [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    student = load(folder)
    config.bind(sections("nano_distilled", config.read()))
    with torch.no_grad():
        taught = start("nano_distilled", config.read(), 0)  # with its teacher, which a loaded student has not
        batch = next(loader.every(Path("artifacts/smoke/clips"), split="val", batch=16, rank=0, ranks=1))
        masked = student.choose(len(batch.ids), seeds.stream(0, "m"))
        found, wanted = student.predict(batch.pixels, masked), taught.target(batch.pixels, masked)
        others = taught.target(batch.pixels.roll(1, 0), masked)  # the same places in other clips
    assert (found - wanted).square().mean() < 0.9 * (found - others).square().mean()
    assert not [name for name in student.state_dict() if "taught_by" in name]
    assert {name: p.shape for name, p in encoder_of(student).named_parameters()} == {
        name: p.shape for name, p in encoder_of(load(teacher)).named_parameters()
    }
    made = json.loads((folder / "provenance.json").read_text())
    assert made["inputs"]["teacher"] == artifacts.sha256(teacher)


def test_the_target_is_the_teachers_feature_of_the_same_token_in_sight_of_the_whole_clip(changed: Callable) -> None:
    teacher = encoder_of(load(pretrain("nano", changed("pretrain.Training.steps", 4))))
    settings = config.read()
    config.bind(sections("nano_distilled", settings))
    model = start("nano_distilled", settings, 0)
    clip = torch.randint(0, 256, (2, 16, 64, 64, 3), dtype=torch.uint8)
    masked = model.choose(2, seeds.stream(0, "m"))
    found, layer = model.target(clip, masked), teacher.features(clip)[3]
    for b in range(2):
        for k, token in enumerate(masked.kept[b].tolist()):
            x = layer[b, token]
            assert torch.allclose(found[b, k], (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt(), atol=1e-5)


def test_a_teacher_that_is_missing_or_does_not_fit_is_refused(project: Path, changed: Callable) -> None:
    changed("distilled.nano_distilled.Distilled.teacher", "nobody")
    with pytest.raises(UserError, match="nobody is not a checkpoint"):
        pretrain("nano_distilled", config.read())
    pretrain("nano", changed("pretrain.Training.steps", 4))
    changed("distilled.nano_distilled.Distilled.teacher", "nano")
    settings = changed("distilled.nano_distilled.Distilled.teacher_width", 288)
    with pytest.raises(UserError, match=r"teacher nano has width 32, grid \(8, 8, 8\), 5 layers; needed width 288, grid"):
        pretrain("nano_distilled", settings)


def test_the_untrained_baseline_is_the_point_before_its_first_step(project: Path) -> None:
    settings = config.read()
    folder = baseline("untrained_nano", settings)
    config.bind(sections("nano", settings))
    first = start("nano", settings, settings["seed"]).state_dict()
    for name, value in load(folder).state_dict().items():
        assert torch.equal(value, first[name]), name


def test_the_pixel_baseline_is_the_clip_itself(project: Path) -> None:
    tokens = load(baseline("pixels", config.read()))
    clip = torch.randint(0, 256, (1, 16, 64, 64, 3), dtype=torch.uint8)
    (layer,) = tokens.features(clip)
    assert torch.allclose(layer.std(), (clip / 255 * 4).std(), rtol=1e-4)
    assert layer.shape == (1, 512, 384)


def test_validation_loss_does_not_depend_on_the_ranks(project: Path) -> None:
    settings = config.read()
    one, three = (run(val_loss, ranks=ranks, settings=settings) for ranks in (1, 3))
    assert abs(one - three) < 1e-5 * one


def test_a_capped_validation_does_not_depend_on_the_ranks_and_is_of_fewer_clips(project: Path, changed: Callable) -> None:
    every = run(val_loss, ranks=1, settings=config.read())
    settings = changed("pretrain.Training.val_clips", 5)
    one, three = (run(val_loss, ranks=ranks, settings=settings) for ranks in (1, 3))
    assert abs(one - three) < 1e-5 * one and one != every


def test_a_teacher_computes_in_the_type_of_the_run(changed: Callable) -> None:
    pretrain("nano", changed("pretrain.Training.steps", 4))
    assert run(teachers_type, ranks=1, settings=changed("pretrain.Training.compute", "bfloat16")) == {"torch.bfloat16"}
    folder = pretrain("nano_distilled", config.read())
    assert json.loads((folder / "summary.json").read_text())["val_loss"] < 2


def teachers_type(*, rank: int, ranks: int, settings: dict) -> set[str]:
    model = loop._model(loop.prepare("nano_distilled", settings), ranks)
    return {str(p.dtype) for teacher in model.taught_by for p in teacher.parameters()}


def test_a_batch_that_does_not_divide_is_refused_and_nothing_is_written(project: Path, changed: Callable) -> None:
    settings = changed("pretrain.Training.batch", 7)
    with pytest.raises(UserError, match=r"^a batch of 7 clips does not divide among 2 ranks in 1 parts each; set batch .+$"):
        pretrain("nano", settings | {"profile": "smoke"})
    assert not list((project / ".resume").glob("partial-*"))


def test_a_gradient_that_is_not_finite_stops_before_the_update_and_names_the_clips(changed: Callable) -> None:
    with pytest.raises(UserError, match=r"^step \d+: the gradient is (nan|inf); clips .+; lower pretrain.Training.rate_"):
        pretrain("nano", changed("pretrain.Training.rate_times_width", 1e9))


def test_a_point_with_two_methods_is_refused(project: Path) -> None:
    settings = config.read()
    settings["points"]["nano"]["MAEST"] = {}
    with pytest.raises(UserError, match=r"^points.nano has SimpleMAE, MAEST; needed exactly one of SimpleMAE, MAEST$"):
        config.bind({"SimpleMAE": settings["points"]["nano"]["SimpleMAE"]})
        start("nano", settings, 0)


def test_a_method_that_is_not_the_one_that_is_declared_is_refused(changed: Callable) -> None:
    wanted = r"^points.nano is for SimpleMAE, and points.nano.method is 'MAEST'; set it to SimpleMAE$"
    with pytest.raises(UserError, match=wanted):
        pretrain("nano", changed("points.nano.method", "MAEST"))


def test_a_result_is_named_on_another_file_system_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def apart(path: Path, new: Path) -> Path:
        if path.parts[0] != new.parts[0]:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))
        return rename(path, new)

    wanted = checkpoint.weights_sha256(baseline("untrained_nano", config.read()))
    monkeypatch.setattr(Path, "rename", apart)
    folder = baseline("untrained_nano", config.read())
    assert checkpoint.weights_sha256(folder) == wanted
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    assert not list(artifacts.PARTIAL.glob("partial-*"))


def test_weights_that_find_no_room_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.+model.safetensors cannot be written: .+; free space there, and run the same .+$"):
        checkpoint.save_tensors(tmp_path / "nowhere/model.safetensors", {"a": torch.ones(1)})
