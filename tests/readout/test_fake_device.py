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
from small_tasks import CLIP, HEAD, TASK, WIDTH, sample

from scaling4d import config
from scaling4d.mae.device import to_device
from scaling4d.mae.encoder import Backbone, BackboneConfig
from scaling4d.pretrain.plan.plan import build
from scaling4d.readout.classifier import MeanPoolClassifier
from scaling4d.readout.heads import Head, HeadConfig
from scaling4d.readout.protocols import PROTOCOLS, Frozen, ReadoutConfig, ReadoutModel, ReadoutProtocol
from scaling4d.readout.stage import bind_task
from scaling4d.readout.tasks import TASKS
from scaling4d.readout.tasks.task import Task, collate
from scaling4d.readout.whitening import Whitening
from scaling4d.training.fit import Batch
from scaling4d.training.parallelize import DTYPES, ShardingConfig, parallelize

ROOT, CLIPS = Path(__file__).parents[2], 3
ENCODER = {"clip": CLIP, "patch": (2, 8, 8), "pixel_mean": 0.45, "pixel_scale": 4.0, "width": WIDTH, "depth": 4, "heads": 2}

pytestmark = pytest.mark.integration


def device_of(tensor: torch.Tensor) -> str:
    return tensor.device.type


def moved(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """A module in place of `module.to`, which fake weights refuse: they lie on the device from the start."""
    assert device == DEVICE
    return module


def encode_and_train(name: str) -> None:
    """Features of clips in two passes, steps of the head, and predictions for new clips, each on the device."""
    torch.nn.Module.to = moved
    task, samples = TASK[name], [sample(seed) for seed in range(CLIPS)]
    layout = {"compute": SimpleNamespace(device=DEVICE, compute="float32")}
    layout["sharding"] = ShardingConfig(shards=1, recompute="none", compile=False, packed=False, accumulate=1)
    protocol = Frozen(
        ReadoutConfig(None, name, task, 0, SimpleNamespace(ranks=1, feature_batch=2, feature_store=""), None, **layout)
    )
    with on_fake_gpu() as operations:
        with torch.device(DEVICE):  # weights alone
            encoder = Backbone(BackboneConfig(**ENCODER, mlp=32))
            head = Head(HEAD, task.queries(CLIP), features_width=WIDTH, frames=CLIP[0])
            model = ReadoutModel(None, Whitening.identity(WIDTH), head, task)
        source = protocol.features_of(encoder)
        pixels = [torch.from_numpy(one.pixels) for one in samples]
        keys = [source.add(clip) for clip in pixels]
        source.flush()
        features, target = source.stack(keys), collate([task.train_target(one) for one in samples])
        assert device_of(features) == "cpu" and len(features) == CLIPS
        with pytest.raises(RuntimeError):  # features of the CPU, weights of the device
            model(features, target)
        operations.waits.clear()  # for features
        train(model, Batch((features, target)), {"head": (list(head.named_parameters()), 1e-3)})
        assert operations.waits == []
        on_device = {key: to_device(value, DEVICE) for key, value in collate([task.target(one) for one in samples]).items()}
        encode, predict = protocol.evaluator(model, SimpleNamespace(source=source))
        assert device_of(predict(encode(pixels), on_device)) == DEVICE
        assert operations.waits == []


@pytest.mark.parametrize("name", list(TASK))
def test_encoder_and_head_compute_on_the_device_alone(name: str) -> None:
    assert exit_code(partial(encode_and_train, name)) == 0


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
def test_steps_of_every_tuned_point_wait_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for point in config.compose(["profile=paper"])["encoders"][name]:
        for task in TASK if name == "finetune" and point in ("S", "mae_st_B") else ["actions"]:
            assert exit_code(partial(tune, "paper", point, task, name)) == 0, (point, task)
