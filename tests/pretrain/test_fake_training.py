"""Training steps and validation of every point on a device that computes nothing: what mixes devices or waits fails."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import DEVICE, STEPS, Operations, exit_code, on_fake_gpu, train
from torch._subclasses.fake_tensor import DataDependentOutputException

from scaling4d import config
from scaling4d.clips.loader import augment
from scaling4d.mae.encoder import Method
from scaling4d.pretrain import validate
from scaling4d.pretrain.plan.plan import build
from scaling4d.pretrain.settings import PretrainConfig, bind_point, points_of
from scaling4d.pretrain.stage import param_groups
from scaling4d.records import Augmentation, ClipBatch, MaskedTokens
from scaling4d.training.fit import Batch, ChangedClips
from scaling4d.training.parallelize import DTYPES, blocks_of, parallelize

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_the_project")]

CLIPS = 2  # of a rank at once
PROFILES = sorted(path.stem for path in (Path(__file__).parents[2] / "experiments/profile").glob("*.yaml"))


def visible(model: Method, clips: int) -> MaskedTokens:
    return MaskedTokens(torch.zeros(clips, model.visible_token_count, dtype=torch.int64), model.encoder.grid)


def pixels_of(model: Method, clips: int) -> torch.Tensor:
    return torch.zeros(clips, *model.encoder.clip, 3, dtype=torch.uint8)


def move_to_device(model: Method, pretraining: PretrainConfig, compute: str) -> None:
    """In shards, as the point's settings say."""
    for teacher in getattr(model, "teacher_encoder", ()):
        teacher.to_empty(device=DEVICE)
    layout = replace(pretraining.sharding, compile=False)
    parallelize(model, layout, SimpleNamespace(device=DEVICE, compute=compute), ranks=pretraining.training.ranks)
    model.to_empty(device=DEVICE)


def step_and_validate(profile: str, point: str, compute: str, **changes: object) -> None:
    settings = config.compose([f"profile={profile}"])
    pretraining = bind_point(point, settings)
    pretraining = replace(pretraining, sharding=replace(pretraining.sharding, **changes))
    model, accumulate = build(point, settings), pretraining.sharding.accumulate
    for teacher in getattr(model, "teacher_encoder", ()):
        teacher.to(DTYPES[compute])
    with on_fake_gpu(pretraining.training.ranks) as operations:
        move_to_device(model, pretraining, compute)
        change = partial(augment, augmentation=Augmentation((1, 0, *2 * [model.encoder.clip[1] // 2]), True, True))
        clips = ChangedClips(pixels_of(model, CLIPS * accumulate), (change,) * CLIPS * accumulate)
        batch = Batch((clips, visible(model, CLIPS * accumulate)))
        train(model, batch, param_groups(model, pretraining), accumulate=accumulate)
        assert operations.waits == []
        assert operations.linear_dtypes == {DTYPES[compute]}
        validate_and_show(model, pretraining, operations)


def validate_and_show(model: Method, pretraining: PretrainConfig, operations: Operations) -> None:
    """Two batches of a validation, which waits for the device once, after the last; then a picture."""
    model.draw_mask, calls = lambda batch, rng: visible(model, batch), []
    model.register_forward_hook(lambda *_: calls.append(len(operations.waits)))
    clips = [ClipBatch(pixels_of(model, validate.BATCH), ("a",) * validate.BATCH, (0.0,) * validate.BATCH)] * 2
    one_clip = [ClipBatch(pixels_of(model, 1), ("a",), (0.0,))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate.loader, "eval_batches", lambda *_, **__: iter(clips))
        patch.setattr(validate.loader, "count_clips", lambda *_: 2 * validate.BATCH * pretraining.training.ranks)
        training = replace(pretraining.training, val_clips=0)
        with pytest.raises(DataDependentOutputException):  # a fake sum has no value
            validate.validate(model, replace(pretraining, training=training))
        assert calls == [0] * 2 * training.masks_per_clip and len(operations.waits) == 1
        patch.setattr(validate.loader, "eval_batches", lambda *_, **__: iter(one_clip))
        shown = validate.picture(model, pretraining)
        assert shown is None or shown.device.type == "cpu"
        patch.setattr(validate.loader, "eval_batches", lambda *_, **__: iter(clips))
        with pytest.raises(DataDependentOutputException):
            validate.rankme(model, replace(pretraining, training=training))


@pytest.mark.parametrize(("profile", "points"), [
    ("smoke", ()),
    ("pocket", ("mae_st_tiny",)),
    *(pytest.param(profile, (), marks=[pytest.mark.slow, pytest.mark.timeout(3600)]) for profile in PROFILES),
])  # fmt: skip
def test_steps_of_every_point_wait_for_nothing_and_validation_waits_once(profile: str, points: tuple[str, ...]) -> None:
    for point in points or points_of(config.compose([f"profile={profile}"])):
        for compute in DTYPES:
            assert exit_code(partial(step_and_validate, profile, point, compute)) == 0, (point, compute)


@pytest.mark.parametrize("changes", [{"shards": 2, "recompute": "block", "accumulate": 2}, {"packed": True}])
def test_other_layouts_wait_for_nothing(changes: dict) -> None:
    assert exit_code(partial(step_and_validate, "smoke", "nano", "bfloat16", **changes)) == 0


def step_with_copies() -> None:
    settings = config.compose(["profile=smoke"])
    pretraining, model = bind_point("nano", settings), build("nano", settings)
    with on_fake_gpu(pretraining.training.ranks):
        move_to_device(model, pretraining, "float32")
        computing, clips, masked = (
            torch.get_device_module(DEVICE).current_stream(),
            pixels_of(model, CLIPS),
            visible(model, CLIPS),
        )
        train(model, Batch((clips, masked)), param_groups(model, pretraining))
        copied = [tuple(clips.shape), tuple(masked.ids_keep.shape)] * STEPS
        assert (computing.copied, computing.used) == ([], copied)
        (copies,) = {stream for stream in computing.waited if stream.copied}
        assert copies.copied == copied and computing not in copies.waited
        assert computing.waited.count(copies) == len(copied)


def test_clips_are_copied_beside_the_computing_which_waits_for_its_own() -> None:
    assert exit_code(step_with_copies) == 0


def step_in_copies_of_shards() -> None:
    settings = config.compose(["profile=smoke"])
    pretraining, model = bind_point("nano", settings), build("nano", settings)
    pretraining = replace(pretraining, sharding=replace(pretraining.sharding, shards=2))
    pretraining = replace(pretraining, training=replace(pretraining.training, ranks=4))
    with on_fake_gpu(4) as operations:
        move_to_device(model, pretraining, "bfloat16")
        computing = torch.get_device_module(DEVICE).current_stream()
        train(model, Batch((pixels_of(model, CLIPS), visible(model, CLIPS))), param_groups(model, pretraining))
        of_blocks = [(stream, waits) for stream, waits in operations.all_reduces if stream is not computing]
        (stream,) = {stream for stream, _ in of_blocks}
        messages = len(blocks_of(model)) + 1  # a block's, and one of all other weights
        assert [waits for _, waits in of_blocks] == [step for step in range(STEPS) for _ in range(messages)]
        assert computing.waited.count(stream) == STEPS


def test_copies_of_shards_sum_gradients_beside_the_backward_pass_which_waits_once_at_its_end() -> None:
    assert exit_code(step_in_copies_of_shards) == 0


def log_every_step() -> None:
    settings = config.compose(["profile=smoke"])
    pretraining, model = bind_point("nano", settings), build("nano", settings)
    with on_fake_gpu(pretraining.training.ranks):
        move_to_device(model, pretraining, "float32")
        batch = Batch((pixels_of(model, CLIPS), visible(model, CLIPS)))
        with pytest.raises(DataDependentOutputException):
            train(model, batch, param_groups(model, pretraining), log_every=1)


def test_a_step_that_logs_waits() -> None:
    assert exit_code(log_every_step) == 0
