"""Readouts on a device that computes nothing: what mixes devices or waits fails."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_tasks
import torch
from fake_gpu import DEVICE, exit_code, on_fake_gpu, train
from small_tasks import TASK, sample

from scaling4d import config
from scaling4d.encoders.features import MemoryFeatures
from scaling4d.mae.device import to_device
from scaling4d.pretrain.plan.plan import build
from scaling4d.pretrain.settings import points_of
from scaling4d.readout.classifier import MeanPoolClassifier
from scaling4d.readout.heads import HeadConfig
from scaling4d.readout.linear import RegressionSums, solve_dual
from scaling4d.readout.protocols import PROTOCOLS, Frozen, ReadoutConfig, ReadoutModel, ReadoutProtocol
from scaling4d.readout.stage import bind_task
from scaling4d.readout.tasks import TASKS
from scaling4d.readout.tasks.task import Task, collate
from scaling4d.readout.whitening import Whitening
from scaling4d.training.fit import Batch
from scaling4d.training.parallelize import DTYPES, ShardingConfig, parallelize

ROOT, CLIPS = Path(__file__).parents[2], 3

pytestmark = pytest.mark.integration


def device_of(tensor: torch.Tensor) -> str:
    return tensor.device.type


def moved(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """In place of `module.to`: fake weights come to the device without values."""
    assert device == DEVICE
    return module.to_empty(device=device)


def encode_and_train(profile: str, point: str, task: str, **changes: object) -> None:
    """Features of clips in two passes, steps of the head, and predictions for new clips, each on the device.

    The encoder computes in bfloat16, in shards as the profile's settings say, the head in float32.
    """
    os.chdir(ROOT)
    torch.nn.Module.to, MemoryFeatures._any_rank_has_clips = moved, lambda _, answer: answer
    settings = config.compose([f"profile={profile}"])
    bound, encoder = bind_task(task, Frozen, settings), build(point, settings).encoder
    small_tasks.CLIP = encoder.clip
    sharding = replace(bound[ShardingConfig], compile=False, **changes)
    evaluation = SimpleNamespace(ranks=max(sharding.shards, 2), feature_batch=2, feature_store="")
    layout = {"compute": SimpleNamespace(device=DEVICE, compute="bfloat16"), "sharding": sharding}
    recipe = bound[Frozen.recipe_class]
    protocol = Frozen(ReadoutConfig(None, task, bound[TASKS[task]], 0, evaluation, recipe, bound[HeadConfig], **layout))
    samples = [sample(seed) for seed in range(CLIPS)]
    with on_fake_gpu(evaluation.ranks) as operations:
        source = protocol.features_of(encoder.requires_grad_(False))
        pixels = [torch.from_numpy(one.pixels) for one in samples]
        keys = [source.add(clip) for clip in pixels]
        source.flush()
        features, target = source.stack(keys), collate([protocol.config.task.train_target(one) for one in samples])
        assert device_of(features) == "cpu" and features.dtype == torch.float32 and len(features) == CLIPS
        assert operations.linear_dtypes == {torch.bfloat16}
        operations.linear_dtypes.clear()
        with torch.device(DEVICE):  # weights alone
            model = ReadoutModel(None, Whitening.identity(encoder.width), protocol.config.new_head(encoder), protocol.config.task)
        with pytest.raises(RuntimeError):  # features of the CPU, weights of the device
            model(features, target)
        operations.waits.clear()  # for features
        train(model, Batch((features, target)), protocol.param_groups(model))
        assert operations.waits == []
        assert operations.linear_dtypes == {torch.float32}
        targets = collate([protocol.config.task.target(one) for one in samples])
        on_device = {key: to_device(value, DEVICE) for key, value in targets.items()}
        encode, predict = protocol.evaluator(model, SimpleNamespace(source=source))
        assert device_of(predict(encode(pixels), on_device)) == DEVICE
        assert operations.waits == []


def solve_linear_probes() -> None:
    with on_fake_gpu(1):
        x, y, counts = torch.randn(4, 3, 6), torch.randn(4, 3, 2), torch.ones(4, 3, dtype=torch.bool)
        sums = RegressionSums(3, 6, 2, DEVICE)
        sums.add(x, y, counts)
        for probe in [
            sums.means(),
            *sums.over_ranks().solve(),
            *solve_dual(to_device(x[:, 0], DEVICE), to_device(y[:, 0], DEVICE)),
        ]:
            assert device_of(probe.weight) == device_of(probe.offset) == DEVICE
            assert device_of(probe(to_device(x, DEVICE))) == DEVICE


def test_linear_probes_are_solved_on_the_device() -> None:
    assert exit_code(solve_linear_probes) == 0


@pytest.mark.parametrize("task", list(TASK))
def test_encoder_and_head_compute_on_the_device_alone(task: str) -> None:
    assert exit_code(partial(encode_and_train, "pocket", "nano", task, shards=2)) == 0


def test_a_point_of_the_paper_computes_features_in_shards() -> None:
    assert exit_code(partial(encode_and_train, "paper", "S", "actions")) == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_frozen_point_computes_on_the_device_alone(in_the_project: None) -> None:
    settings = config.compose(["profile=paper"])
    for point in points_of(settings):
        for task in TASK if point in ("S", "j") else ["actions"]:
            assert exit_code(partial(encode_and_train, "paper", point, task)) == 0, (point, task)


class Clips(list):
    """A training set of samples, all of them in every batch."""

    def __init__(self, task: Task) -> None:
        super().__init__(sample(seed) for seed in range(CLIPS))
        self.task = task

    def batch(self, indices: list[int], epochs: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pixels = torch.stack([torch.from_numpy(one.pixels) for one in self])
        return pixels, collate([self.task.train_target(one) for one in self])


def fine_tuned(protocol: ReadoutProtocol, encoder: torch.nn.Module) -> torch.nn.Module:
    """A protocol's model without values."""
    if isinstance(protocol.config.head, HeadConfig):
        head = protocol.config.new_head(encoder)
        return ReadoutModel(encoder, Whitening.identity(encoder.width), head, protocol.config.task)
    return protocol.build(encoder, None)


def tune(profile: str, point: str, task: str, name: str, **changes: object) -> None:
    """Steps of a fine-tuning, in shards as the profile's settings say: encoders in bfloat16, heads in float32."""
    os.chdir(ROOT)
    settings, kind = config.compose([f"profile={profile}"]), PROTOCOLS[name]
    bound, encoder = bind_task(task, kind, settings), build(point, settings).encoder
    small_tasks.CLIP, MeanPoolClassifier.initialise = encoder.clip, lambda *_: None
    sharding = replace(bound[ShardingConfig], compile=False, **changes)
    recipe = replace(bound[kind.recipe_class], batch=CLIPS)
    evaluation = SimpleNamespace(ranks=1)
    protocol = kind(ReadoutConfig(None, task, bound[TASKS[task]], 0, evaluation, recipe, bound.configs.get(HeadConfig)))
    with torch.device("meta"):
        model = fine_tuned(protocol, encoder)
    ranks = max(sharding.shards, 2)
    with on_fake_gpu(ranks) as operations:
        compute = SimpleNamespace(device=DEVICE, compute="bfloat16")
        parallelize(model, sharding, compute, ranks=ranks, float32_modules=[model.head])
        model.to_empty(device=DEVICE)
        batch = protocol.batch(Clips(protocol.config.task), 0, 0)
        train(model, batch, protocol.param_groups(model), clip_norm=protocol.clip_norm)
        assert operations.waits == []
        assert operations.linear_dtypes == set(DTYPES.values())


@pytest.mark.parametrize(("task", "name"), [*((task, "finetune") for task in TASK), ("actions", "classifier")])
def test_steps_of_a_tuning_wait_for_nothing(task: str, name: str) -> None:
    assert exit_code(partial(tune, "pocket", "nano", task, name, shards=2, recompute="block")) == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["finetune", "classifier"])
def test_steps_of_every_tuned_point_wait_for_nothing(name: str, in_the_project: None) -> None:
    for point in config.compose(["profile=paper"])["encoders"][name]:
        for task in TASK if name == "finetune" and point in ("S", "mae_st_B") else ["actions"]:
            assert exit_code(partial(tune, "paper", point, task, name)) == 0, (point, task)
