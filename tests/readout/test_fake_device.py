"""A frozen readout on a device that computes nothing, where tensors of two devices in one operation are an error."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from small_tasks import CLIP, HEAD, TASK, WIDTH, sample
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from scaling4d.mae.device import to_device
from scaling4d.mae.encoder import Encoder, EncoderConfig
from scaling4d.readout.heads import Head
from scaling4d.readout.protocols import Frozen, ReadoutConfig, ReadoutModel
from scaling4d.readout.tasks.task import collate
from scaling4d.readout.whitening import Whitening
from scaling4d.training import fit
from scaling4d.training.fit import Batch, _accumulate_gradients
from scaling4d.training.optimizer import build_adamw
from scaling4d.training.parallelize import ShardingConfig

DEVICE, CLIPS = "fakegpu", 3
ENCODER = {"clip": CLIP, "patch": (2, 8, 8), "pixel_mean": 0.45, "pixel_scale": 4.0, "width": WIDTH, "depth": 4, "heads": 2}


def device_of(tensor: torch.Tensor) -> str:
    return tensor.device.type


def moved(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """A module in place of `module.to`, which fake weights refuse: they lie on the device from the start."""
    assert device == DEVICE
    return module


def encode_and_train(name: str) -> None:
    """Features of clips in two passes, a step of the head, and predictions for new clips, each on the device."""
    _setup_privateuseone_for_python_backend(DEVICE)
    fit.reduce_gradients = lambda _: None  # there are no other ranks
    torch.nn.Module.to = moved
    task, samples = TASK[name], [sample(seed) for seed in range(CLIPS)]
    layout = {"compute": SimpleNamespace(device=DEVICE, compute="float32")}
    layout["sharding"] = ShardingConfig(shards=1, recompute="none", compile=False, packed=False, accumulate=1)
    protocol = Frozen(
        ReadoutConfig(None, name, task, 0, SimpleNamespace(ranks=1, feature_batch=2, feature_store=""), None, **layout)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(DEVICE):  # weights alone
            encoder = Encoder(EncoderConfig(**ENCODER, mlp=32))
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
        adamw = build_adamw({"head": (list(head.named_parameters()), 1e-3)}, betas=(0.9, 0.999), weight_decay=0.1)
        loss = _accumulate_gradients(model, Batch((features, target)), SimpleNamespace(device=DEVICE, accumulate=1))
        adamw.step()
        assert {device_of(loss), *(device_of(weight.grad) for weight in head.parameters())} == {DEVICE}
        on_device = {key: to_device(value, DEVICE) for key, value in collate([task.target(one) for one in samples]).items()}
        encode, predict = protocol.evaluator(model, SimpleNamespace(source=source))
        assert device_of(predict(encode(pixels), on_device)) == DEVICE


@pytest.mark.integration
@pytest.mark.parametrize("name", list(TASK))
def test_encoder_and_head_compute_on_the_device_alone(name: str) -> None:
    """In a process of its own: autograd's threads are those of the devices that it knew at its first backward pass."""
    subprocess.run([sys.executable, __file__, name], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)


if __name__ == "__main__":
    encode_and_train(sys.argv[1])
