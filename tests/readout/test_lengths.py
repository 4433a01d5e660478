"""Readouts of clips of another length and size than the encoder was trained on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_encoder
import small_tasks
import torch
from small_tasks import HEAD, TASK

from scaling4d import checkpoint, config
from scaling4d.encoders.features import features_at_depth
from scaling4d.encoders.pretrained import load_encoder, set_clip
from scaling4d.encoders.stage import baseline
from scaling4d.mae.encoder import Backbone
from scaling4d.mae.resize import resize
from scaling4d.readout.heads import Head
from scaling4d.readout.stage import readout
from scaling4d.records import UserError
from scaling4d.show.stage import choose_samples, predict
from scaling4d.show.trained import load_trained_readout

POCKET = Path(__file__).parents[2] / "experiments/pocket/benchmarks"
TRAINED, SHOWN = (8, 16, 16), (16, 32, 32)
LENGTH = {"Evaluation.frames": 16, "Evaluation.side_px": 96, "Evaluation.train_items": 16, "Evaluation.val_items": 8}


@pytest.fixture
def encoder() -> Backbone:
    return small_encoder.model("Backbone", clip=TRAINED, patch=(2, 8, 8))


def test_zero_leaves_an_encoder_as_it_is_and_other_numbers_interpolate_its_positions(encoder: Backbone) -> None:
    before = encoder.positions.detach().clone()
    set_clip(encoder)
    assert encoder.clip == TRAINED and torch.equal(encoder.positions, before)
    set_clip(encoder, frames=16)
    assert (encoder.clip, encoder.grid) == ((16, 16, 16), (8, 2, 2))
    assert torch.equal(encoder.positions, resize(before, (4, 2, 2), (8, 2, 2)))
    set_clip(encoder, side_px=32)
    assert (encoder.clip, encoder.grid) == (SHOWN, (8, 4, 4))


@pytest.mark.parametrize("name", list(TASK))
def test_answers_and_targets_of_every_task_have_the_size_of_the_clip(
    name: str, encoder: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_tasks, "CLIP", SHOWN)
    set_clip(encoder, frames=SHOWN[0], side_px=SHOWN[1])
    task = TASK[name]
    task.check_clip(encoder.clip)
    samples = [small_tasks.sample(seed) for seed in range(2)]
    features = features_at_depth(encoder, torch.from_numpy(np.stack([sample.pixels for sample in samples])))
    assert features.shape == (2, 8, 16, 24)
    head = Head(HEAD, task.queries(encoder.clip), features_width=encoder.width, frames=encoder.clip[0])
    head.initialise(0)
    target = small_tasks.targets_of(task, 2)
    predicted = task.predict(head, features, target)
    T, H, W = SHOWN
    shapes = {"actions": (3,), "boxes": (4, T, 4), "depth": (T, H, W), "points": (6, T, 4), "pose": (3, 4)}
    assert predicted.shape == (2, *shapes[name]) and task.loss(predicted, target).isfinite()
    measured = task.measure(predicted[0].detach().numpy(), {key: value[0].numpy() for key, value in target.items()})
    assert np.isfinite(measured[task.metric.name]).all()


@pytest.mark.parametrize(("name", "clip"), [("points", (12, 32, 32)), ("depth", (15, 32, 32)), ("depth", (16, 36, 36))])
def test_clips_that_answers_do_not_divide_are_refused(name: str, clip: tuple[int, int, int]) -> None:
    message = rf"^clips T H W = .{', '.join(map(str, clip))}. do not divide into answers of {name.capitalize()}, .*to multiples$"
    with pytest.raises(UserError, match=message):
        TASK[name].check_clip(clip)


@pytest.fixture
def longer(changed: Callable) -> Callable[[str], dict]:
    """Settings of a task of the pocket's clips: 16 frames at 8 Hz, 96 px."""

    def of(task: str) -> dict:
        changed("readout.Evaluation.data", str(POCKET))
        changed(f"readout.tasks.{task}.{task.capitalize()}.rate_hz", 8.5 if task == "points" else 8.0)
        for key, value in LENGTH.items():
            settings = changed(f"readout.{key}", value)
        return settings

    return of


@pytest.mark.integration
@pytest.mark.parametrize("task", list(TASK))
def test_a_frozen_readout_of_longer_and_larger_clips_is_trained_measured_and_shown(task: str, longer: Callable) -> None:
    settings = longer(task)
    folder = Path("artifacts/smoke/readout/untrained_nano") / task / "frozen"
    baseline("untrained_nano", config.read())
    result = readout("untrained_nano", task, "frozen", settings)
    assert result.examples > 0 and np.isfinite(result.value)
    assert ("mean_iou_propagated" in result.others) == (task == "boxes")
    head = checkpoint.load_tensors(folder / "head.safetensors")
    assert head["readout.temporal_positions"].shape[0] == 16
    trained = load_trained_readout(folder)
    assert trained.encoder.clip == (16, 96, 96) and load_encoder(trained.checkpoint).clip == (8, 64, 64)
    (sample,) = choose_samples(trained, 1)
    assert sample.pixels.shape == (16, 96, 96, 3) and predict(trained, sample)[1][1] > 0


@pytest.mark.integration
def test_fine_tuning_goes_on_at_the_length_and_size_of_the_frozen_readout(longer: Callable) -> None:
    settings = longer("actions")
    baseline("untrained_nano", config.read())
    for protocol in ("frozen", "finetune", "classifier"):
        assert np.isfinite(readout("untrained_nano", "actions", protocol, settings).value)


@pytest.mark.integration
@pytest.mark.parametrize(("key", "value", "message"), [
    ("frames", -8, "readout.Evaluation: frames = -8; needed a number from 0 to 1,048,576"),
    ("side_px", 60, r"clip T H W = \(8, 60, 60\) does not divide into patches \(1, 8, 8\); set them to multiples"),
    ("frames", 9, r"clips T H W = \(9, 64, 64\) do not divide into answers of Depth"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_one_line(key: str, value: int, message: str, longer: Callable, changed: Callable) -> None:
    longer("depth")
    for other in ("frames", "side_px"):
        changed(f"readout.Evaluation.{other}", 0)
    baseline("untrained_nano", config.read())
    with pytest.raises(UserError, match=f"^{message}"):
        readout("untrained_nano", "depth", "frozen", changed(f"readout.Evaluation.{key}", value))
