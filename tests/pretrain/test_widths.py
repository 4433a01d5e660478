"""Learning-rate transfer, as the coordinate check of Tensor Programs V (arXiv:2203.03466) shows it.

By `rate_times_width` a few steps change features as much at every width; by one rate for all, more at a larger width.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling4d import config, seeds
from scaling4d.mae.models import METHODS, config_of
from scaling4d.pretrain.settings import BETAS
from scaling4d.pretrain.stage import param_groups
from scaling4d.training.optimizer import build_adamw

HEAD, CLIPS, STEPS = 64, 8, 4
LONG = [pytest.mark.slow, pytest.mark.timeout(1800)]
WIDTH = 64  # at which one rate for all widths is that of the rule
MODEL = {"clip": [4, 32, 32], "patch": [2, 8, 8], "coarse_patch": [4, 16, 16], "depth": 2, "decode_blocks": 1}
MODEL |= {"masking": "random", "mask_ratio": 0.75, "pixel_mean": 0.45, "pixel_scale": 4.0}
MODEL |= {"position_init": "normal", "branch_init": "released", "qk_norm": False}


def feature_updates(width: int, *, rate_times_width: float, embedding_rate: float) -> tuple[float, Tensor]:
    """Mean size of the features (the output of the last block) at the start, and of their change after each step."""
    shape = {"width": width, "heads": width // HEAD, "mlp": 4 * width}
    model = METHODS["SimpleMAE"](config_of(METHODS["SimpleMAE"], MODEL | shape))
    model.initialise(0)
    training = SimpleNamespace(rate_times_width=rate_times_width, embedding_rate=embedding_rate)
    groups = param_groups(model, SimpleNamespace(training=training, model=SimpleNamespace(width=width)))
    adamw = build_adamw(groups, betas=BETAS, weight_decay=0.05)
    coarse = torch.rand(CLIPS, 3, 2, 8, 8, generator=seeds.torch_rng(0, "pixels"))
    pixels = (F.interpolate(coarse, (4, 32, 32)) * 255).byte().permute(0, 2, 3, 4, 1).contiguous()  # B T H W C
    first, changes = None, []
    for step in range(STEPS + 1):
        with torch.no_grad():
            features = model.encoder.last_tokens(pixels)  # B N D
        first = features if first is None else first
        changes.append((features - first).abs().mean())
        loss = model(pixels, model.draw_mask(CLIPS, seeds.torch_rng(0, "mask", step)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    return float(first.abs().mean()), torch.stack(changes[1:])


def rates(width: int | None) -> dict[str, float]:
    """The default profile's rates; or its rate of the matrices at one width, as the numbers for another width."""
    training = config.section(config.compose([]), "pretrain.Training")
    scale = 1.0 if width is None else width / WIDTH
    return {"rate_times_width": scale * training["rate_times_width"], "embedding_rate": training["embedding_rate"]}


@pytest.mark.integration
@pytest.mark.parametrize("widths", [(64, 128, 256), pytest.param((384, 768, 1536, 4096), marks=LONG)])
def test_features_change_as_much_at_every_width(widths: tuple[int, ...]) -> None:
    sizes, changes = zip(*(feature_updates(width, **rates(None)) for width in widths), strict=True)
    assert max(sizes) < 1.2 * min(sizes)
    for of_step in zip(*changes, strict=True):
        assert max(of_step) < 1.5 * min(of_step)


@pytest.mark.integration
@pytest.mark.parametrize("widths", [(64, 128, 256), pytest.param((384, 768, 1536), marks=LONG)])
def test_by_one_rate_for_all_widths_features_change_more_at_a_larger_one(widths: tuple[int, ...]) -> None:
    changes = [feature_updates(width, **rates(width))[1] for width in widths]
    for of_step in zip(*changes, strict=True):
        assert list(of_step) == sorted(of_step) and of_step[-1] > 1.6 * of_step[0]
