"""Training steps of other libraries, at the size of ours: same clips, same share of hidden tokens, same update."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from scaling4d import seeds, vision_operators
from scaling4d.encoders.released import MAE_ST_MEAN, MAE_ST_STD, mae_st
from scaling4d.mae.mae_st import MAEST
from scaling4d.mae.masking import keep
from scaling4d.records import MaskedTokens
from scaling4d_bench import device as devices
from scaling4d_bench.steps import Step, step, updated

SAME_LOSS = 1e-4  # relative, at most: one model, so the difference is rounding


def let_torchvision_load() -> None:
    """Several peers import it, where it is installed; without its compiled part that fails."""
    if importlib.util.find_spec("torchvision"):
        vision_operators.declare()


def videomae(*, clips: int, mask_ratio: float, precision: str, device: torch.device, seed: int, **config: Any) -> Step:
    """`VideoMAEForPreTraining` of transformers at base size, its own default, with the attention that it picks itself (SDPA).

    Args:
        config: of VideoMAEConfig, where it is not to be the default.
    """
    let_torchvision_load()
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    wanted = VideoMAEConfig(**config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoMAEForPreTraining(wanted).to(device).train()
    side, rng = wanted.image_size, seeds.stream(seed, "bench")
    grid = (wanted.num_frames // wanted.tubelet_size, side // wanted.patch_size, side // wanted.patch_size)
    pixels = torch.randn(clips, wanted.num_frames, 3, side, side, generator=rng).to(device)  # B T C H W
    kept = keep("random", batch=clips, grid=grid, mask_ratio=mask_ratio, rng=rng).kept
    hidden = torch.ones(clips, torch.Size(grid).numel(), dtype=torch.bool).scatter(1, kept, False).to(device)  # B N

    def loss() -> Tensor:
        with devices.computing_in(precision, device):
            return model(pixels, bool_masked_pos=hidden).loss

    return step(loss, updated(model), clips)


def official_mae_st(folder: Path, settings: Mapping[str, Any]) -> nn.Module:
    """The model of a checkout of facebookresearch/mae_st, with the settings of a `MAEST`; runs that folder's code.

    Raises:
        ImportError: no such folder, or a library that its code needs is missing.
    """
    let_torchvision_load()
    if not (folder / "models_mae.py").is_file():
        raise ImportError(f"{folder} is no checkout of facebookresearch/mae_st: it has no models_mae.py")
    package = ModuleType("mae_st")  # as its modules call their parent, whatever the folder's name is
    package.__path__ = [str(folder)]
    sys.modules["mae_st"] = package
    code = importlib.import_module("mae_st.models_mae")
    frames, side, _ = settings["clip"]
    return code.MaskedAutoencoderViT(
        img_size=side,
        patch_size=settings["patch"][1],
        t_patch_size=settings["patch"][0],
        num_frames=frames,
        pred_t_dim=settings["predicted_frames"],
        embed_dim=settings["width"],
        depth=settings["depth"],
        num_heads=settings["heads"],
        mlp_ratio=settings["mlp"] / settings["width"],
        decoder_embed_dim=settings["decoder_width"],
        decoder_depth=settings["decoder_depth"],
        decoder_num_heads=settings["decoder_heads"],
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
        norm_pix_loss=settings["normalise_target"],
        sep_pos_embed=settings["separable_positions"],
        cls_embed=settings["class_token"],
    )


def official_step(model: nn.Module, *, clips: int, clip: tuple[int, int, int], mask_ratio: float, device: torch.device) -> Step:
    """A step of it; it draws its own masks from torch's global state."""
    frames, side, _ = clip
    pixels = torch.randn(clips, 3, frames, side, side, device=device)  # B C T H W
    return step(lambda: model(pixels, mask_ratio)[0], updated(model.to(device).train()), clips)


@torch.no_grad()
def loss_difference(ours: MAEST, theirs: nn.Module, settings: Mapping[str, Any], *, seed: int) -> float:
    """Relative, of one clip and mask; `ours` takes the official model's weights."""
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    parts = mae_st(settings)
    ours.load_state_dict(
        {name: torch.from_numpy(part.ours(*(state[key] for key in part.sources)).copy()) for name, part in parts.items()}
    )
    frames, side, _ = ours.encoder.clip
    pixels = torch.randint(0, 256, (1, frames, side, side, 3), dtype=torch.uint8, generator=seeds.stream(seed, "bench"))
    normalised = ((pixels.float() / 255 - MAE_ST_MEAN) / MAE_ST_STD).permute(0, 4, 1, 2, 3)  # B C T H W
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kept = torch.rand(1, ours.encoder.positions.table().shape[0]).argsort(dim=1)  # the official code draws likewise
        torch.manual_seed(seed)
        other = theirs(normalised, ours.mask_ratio)[0]
    count = ours.choose(1, seeds.stream(seed, "bench")).kept.shape[1]
    mine = ours(pixels, MaskedTokens(kept[:, :count].sort(dim=1).values, ours.encoder.grid))
    return float((mine - other).abs() / other)
