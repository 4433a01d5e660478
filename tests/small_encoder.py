"""Models that compute in milliseconds: their settings without a clip, and their Checkpoint folders."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from scaling4d import seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders import published
from scaling4d.mae.encoder import initialise
from scaling4d.mae.models import METHODS, MODELS, config_of, encoder_of
from scaling4d.records import write_json

FRAME = {"patch": (2, 16, 16), "pixel_mean": 0.4, "pixel_scale": 2.0}
SIZES = {"width": 24, "depth": 3, "heads": 2, "mlp": 48}
MAE_ST = {"separable_positions": True, "class_token": True}
METHOD = {"masking": "random", "mask_ratio": 0.5, "position_init": "normal", "branch_init": "released"}
DECODER = {"decoder_width": 12, "decoder_depth": 1, "decoder_heads": 2, "predicted_frames": 3, "normalise_target": True}
OFFICIAL = SIZES | {"patch": FRAME["patch"], "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
SETTINGS = {
    "PixelTokens": FRAME,
    "Backbone": FRAME | SIZES,
    "MAESTEncoder": FRAME | SIZES | MAE_ST,
    "SimpleMAE": FRAME | SIZES | METHOD | {"coarse_patch": (2, 16, 16), "decode_blocks": 2},
    "MAEST": FRAME | SIZES | MAE_ST | METHOD | DECODER,
    "VideoMAE2": OFFICIAL,
    "VJEPA": OFFICIAL,
    "VJEPA21": OFFICIAL,
    "RVM": SIZES | {"patch": (1, 16, 16), "core_depth": 2, "core_heads": 2, "core_mlp": 48},
}
CLIP = (6, 32, 48)
CLIPS = torch.randint(0, 256, (2, *CLIP, 3), dtype=torch.uint8, generator=seeds.torch_rng(0, "clips"))


def model(name: str, *, noise: float = 0.0, **changes: object) -> nn.Module:
    """With initial weights of seed 0, which are 0 in published models. noise: deviation of what is added to each."""
    model_class = (MODELS | published.MODELS)[name]
    made = model_class(config_of(model_class, SETTINGS[name] | changes))
    made.initialise(0) if name in METHODS else initialise(made, seed=0)
    with torch.no_grad():
        for tensor in made.state_dict().values() if name in published.MODELS else ():
            tensor.zero_()
        for key, weight in made.named_parameters():
            weight.add_(noise * torch.randn(weight.shape, generator=seeds.torch_rng(0, key)))
    return made


def checkpoint(folder: Path, name: str, rate_hz: float | None = None, *, noise: float = 0.0, **changes: object) -> Path:
    """A new Checkpoint folder of such a model, named as the folder, after seven steps."""
    made = model(name, noise=noise, **changes)
    folder.mkdir(parents=True)
    count = sum(weight.numel() for weight in encoder_of(made).parameters())
    saved = Checkpoint(folder.name, name, SETTINGS[name] | changes, count, step=7, clips_seen=112, rate_hz=rate_hz)
    saved.write(folder, made.state_dict())
    return folder


def trained(folder: Path, name: str = "SimpleMAE", rate_hz: float | None = 5.0) -> Path:
    """A Checkpoint folder as stage pretrain leaves it in artifacts/."""
    pretrained = checkpoint(folder / "artifacts/smoke/pretrain/nano", name, rate_hz, noise=0.1, clip=CLIP)
    settings = {"seed": 0, "pretrain.Training": {"steps": 7}}
    provenance = {"stage": "pretrain", "settings": settings, "inputs": {"clips": "c11b5"}, "code": {"sha256": "c0de"}}
    write_json(pretrained / "provenance.json", provenance)
    return pretrained


def learn(model: nn.Module, loss_of: Callable[[], torch.Tensor], *, steps: int) -> list[float]:
    """The loss of every step of Adam on one batch."""
    adam, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        loss = loss_of()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses
