"""Clips are filled in on a device that computes nothing: what mixes devices or waits fails."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import DEVICE, exit_code, on_fake_gpu

from scaling4d import config
from scaling4d.mae.device import to_device
from scaling4d.pretrain.plan.plan import build
from scaling4d.reconstruct import stage
from scaling4d.records import ClipBatch, MaskedTokens
from scaling4d.training.parallelize import ShardingConfig, parallelize

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_the_project")]

CLIPS = 3


def fill_in(point: str, shards: int) -> None:
    model = build(point, config.compose(["profile=pocket"]))
    visible, T, H, W = model.visible_token_count, *model.encoder.clip
    stage.random_masking = lambda *_, batch, grid, **__: MaskedTokens(torch.zeros(batch, visible, dtype=torch.int64), grid)
    sharding = ShardingConfig(shards, recompute="none", compile=False, packed=False, accumulate=1)
    with on_fake_gpu(2) as operations, torch.no_grad():
        parallelize(model, sharding, SimpleNamespace(device=DEVICE, compute="bfloat16"), ranks=2)
        model.to_empty(device=DEVICE)
        pixels = torch.zeros(CLIPS, T, H, W, 3, dtype=torch.uint8)
        predicted, hidden = stage.fill(model, ClipBatch(pixels, ("a",) * CLIPS, (0.0,) * CLIPS), 0)
        moving = stage.moving_pixels(to_device(pixels, DEVICE))
        assert (predicted.shape, predicted.dtype) == ((CLIPS, T, H, W, 3), torch.float32)
        assert hidden.shape == moving.shape == (CLIPS, T, H, W, 1)
        assert {one.device.type for one in (predicted, hidden, moving)} == {DEVICE}
        assert operations.waits == [] and operations.linear_dtypes == {torch.bfloat16}


@pytest.mark.parametrize(("point", "shards"), [("nano", 1), ("mae_st_tiny", 2)])
def test_clips_are_filled_in_on_the_device_alone(point: str, shards: int) -> None:
    assert exit_code(partial(fill_in, point, shards)) == 0
