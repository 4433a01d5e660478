"""Training steps on random pixels: forward pass, backward pass, AdamW; ours, and those of other libraries.

The same fused AdamW at a learning rate of 0 steps all models, so every step is the same work. Ours start from
uint8 pixels and draw their masks; a peer receives the output of its own loader: normalised fp32 pixels, and its mask.
In bf16 ours compute `as_trained`, and peers under autocast.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from scaling4d import config, seeds
from scaling4d.encoders import torchvision_shim
from scaling4d.encoders.released import MAE_ST_MEAN, MAE_ST_STD, mae_st_weight_map
from scaling4d.mae.encoder import Method
from scaling4d.mae.mae_st import MAEST
from scaling4d.mae.masking import random_masking
from scaling4d.mae.models import METHODS, config_of
from scaling4d.pretrain.plan.dry_run import count_flops
from scaling4d.pretrain.settings import BETAS
from scaling4d.records import MaskedTokens
from scaling4d.training.optimizer import build_adamw
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig, parallelize
from scaling4d_bench import devices
from scaling4d_bench.measure import SEED

COMPUTE = {"fp32": "float32", "bf16": "bfloat16"}
SAME_LOSS = 1e-4  # largest relative difference of ours to the official MAE-ST; one model, so the difference is rounding
OFFICIAL_NAMES = {"pred_t_dim": "predicted_frames", "embed_dim": "width", "depth": "depth", "num_heads": "heads"}
OFFICIAL_NAMES |= {"decoder_embed_dim": "decoder_width", "decoder_depth": "decoder_depth", "decoder_num_heads": "decoder_heads"}
OFFICIAL_NAMES |= {"norm_pix_loss": "normalise_target", "sep_pos_embed": "separable_positions", "cls_embed": "class_token"}

Update = Callable[[Tensor], None]


@dataclass(frozen=True)
class TrainingStep:
    """clips: in a batch. flops: of a clip, three forward passes. run: a whole step."""

    clips: int
    flops: float
    run: Callable[[], None]

    def workload(self, device: torch.device) -> tuple[Callable[[], float], float, float]:
        """For devices.beside_limits."""
        return devices.timed(self.run, device), self.clips, self.flops


def settings_of(point: str) -> tuple[str, dict[str, Any]]:
    """Method of a file of experiments/point, and its settings at the clip size of profile paper."""
    settings = config.compose(["profile=paper"])
    if point not in settings["points"]:
        settings = config.compose(["profile=paper", f"+point@points.{point}={point}"])
    (item,) = settings["points"][point]["model"].items()
    return item


def build(point: str, changes: Mapping[str, Any], device: torch.device) -> Method:
    """The point with its initial weights. changes: of its settings, by name."""
    model = _model(point, changes)
    model.initialise(SEED)
    return model.to(device)


def on_meta(point: str, changes: Mapping[str, Any]) -> Method:
    """The point without weights."""
    with torch.device("meta"):
        return _model(point, changes)


def _model(point: str, changes: Mapping[str, Any]) -> Method:
    method, settings = settings_of(point)
    return METHODS[method](config_of(METHODS[method], settings | changes))


def adamw_update(model: nn.Module, *, weight_decay: float = 0.05, clip_norm: float | None = None) -> Update:
    """The backward pass from a loss and AdamW's update. clip_norm: None: no gradient is clipped."""
    adamw = build_adamw({"all": (list(model.named_parameters()), 0.0)}, betas=BETAS, weight_decay=weight_decay)

    def update(loss: Tensor) -> None:
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        adamw.step()
        adamw.zero_grad()

    return update


def masks_at_ratio(model: Method, clips: int, mask_ratio: float, rng: torch.Generator) -> MaskedTokens:
    """The model's own masking at another ratio. 0 hides one token, since a loss on hidden tokens needs one."""
    grid = model.encoder.grid
    given = {"grid": grid, "mask_ratio": mask_ratio or 1 / math.prod(grid), "round_down": model.config.round_visible_down}
    return random_masking(model.config.masking, batch=clips, rng=rng, **given)


def as_trained(model: Method, precision: str, device: torch.device, *, compiled: bool = False) -> Method:
    """The model, computing as in a training with one shard: in bf16 its blocks cast their weights, without autocast."""
    sharding = ShardingConfig(shards=1, recompute="none", compile=compiled, packed=False, accumulate=1)
    parallelize(model, sharding, ComputeConfig(device.type, COMPUTE[precision]), ranks=1)
    return model


def our_loss(model: Method, *, clips: int, mask_ratio: float, device: torch.device) -> Callable[[], Tensor]:
    """The loss of one of METHODS on random pixels. Its masks come from one stream, call after call."""
    pixels = torch.randint(0, 256, (clips, *model.encoder.clip, 3), dtype=torch.uint8, generator=seeds.torch_rng(SEED, "bench"))
    pixels, rng = pixels.to(device), seeds.torch_rng(SEED, "bench mask")

    def loss() -> Tensor:
        masked = masks_at_ratio(model, clips, mask_ratio, rng)
        return model(pixels, MaskedTokens(masked.ids_keep.to(device), masked.grid))

    return loss


def our_step(model: Method, update: Update, *, clips: int, mask_ratio: float, device: torch.device) -> TrainingStep:
    """A step of one of METHODS."""
    return training_step(our_loss(model, clips=clips, mask_ratio=mask_ratio, device=device), update, clips)


def point_step(
    point: str, mask_ratio: float, changes: Mapping[str, Any], *, clips: int, precision: str, device: torch.device
) -> TrainingStep:
    """A step of a file of experiments/point at another share of hidden tokens, with changed settings."""
    model = as_trained(build(point, changes, device), precision, device)
    return our_step(model, adamw_update(model), clips=clips, mask_ratio=mask_ratio, device=device)


def training_step(loss: Callable[[], Tensor], update: Update, clips: int) -> TrainingStep:
    """A step from the function that computes its loss; one more forward pass counts the FLOPs."""
    with torch.no_grad():
        forward = count_flops(loss)
    return TrainingStep(clips, 3 * forward / clips, lambda: update(loss()))


# ---- peers ----


def videomae(
    *, clips: int, mask_ratio: float, precision: str, device: torch.device, config: Mapping[str, Any] | None = None
) -> TrainingStep:
    """`VideoMAEForPreTraining` of transformers at base size, its own default, with its own choice of attention (SDPA).

    Args:
        config: values of VideoMAEConfig that differ from the default.
    """
    let_torchvision_load()
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = VideoMAEConfig(**config or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = VideoMAEForPreTraining(config).to(device).train()
    side, rng = config.image_size, seeds.torch_rng(SEED, "bench")
    grid = (config.num_frames // config.tubelet_size, side // config.patch_size, side // config.patch_size)
    pixels = torch.randn(clips, config.num_frames, 3, side, side, generator=rng).to(device)  # B T C H W
    ids_keep = random_masking("random", batch=clips, grid=grid, mask_ratio=mask_ratio, rng=rng).ids_keep
    hidden = torch.ones(clips, torch.Size(grid).numel(), dtype=torch.bool).scatter(1, ids_keep, False).to(device)  # B N

    def loss() -> Tensor:
        with devices.autocast(precision, device):
            return model(pixels, bool_masked_pos=hidden).loss

    return training_step(loss, adamw_update(model), clips)


def let_torchvision_load() -> None:
    """Several peers import torchvision where it is installed; without its compiled part the import fails."""
    if importlib.util.find_spec("torchvision"):
        torchvision_shim.declare_operators()


def official_mae_st(folder: Path, settings: Mapping[str, Any]) -> nn.Module:
    """The model of a checkout of facebookresearch/mae_st, with the settings of a `MAEST`; runs that folder's code.

    Raises:
        ImportError: no such folder, or a library that its code needs is missing.
    """
    let_torchvision_load()
    if not (folder / "models_mae.py").is_file():
        raise ImportError(f"{folder} is no checkout of facebookresearch/mae_st: it has no models_mae.py")
    package = ModuleType("mae_st")  # its modules import their parent by this name, whatever the folder's name
    package.__path__ = [str(folder)]
    sys.modules["mae_st"] = package
    code = importlib.import_module("mae_st.models_mae")
    sizes = {name: settings[ours] for name, ours in OFFICIAL_NAMES.items()}
    clip, patch, ratio = settings["clip"], settings["patch"], settings["mlp"] / settings["width"]
    sizes |= {"num_frames": clip[0], "img_size": clip[1], "t_patch_size": patch[0], "patch_size": patch[1], "mlp_ratio": ratio}
    return code.MaskedAutoencoderViT(norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6), **sizes)


def official_step(folder: Path | None, *, clips: int, precision: str, device: torch.device) -> TrainingStep:
    """A step of the official MAE-ST B, after a check that ours has the same loss with its weights.

    It draws its own masks from torch's global state.
    """
    if folder is None:
        raise ImportError("no checkout of facebookresearch/mae_st was given: --mae-st FOLDER")
    if precision != "fp32":
        raise ImportError("its pretraining computes in fp32")
    _, settings = settings_of("mae_st_B")
    model = official_mae_st(folder, settings)
    difference = loss_difference(build("mae_st_B", {}, torch.device("cpu")), model, settings)
    print(f"official MAE-ST B: its loss of one clip and ours differ by {difference:.0e} of it")
    if difference > SAME_LOSS:
        raise RuntimeError(f"its loss differs from ours by {difference:.1e} of it")
    frames, side, _ = settings["clip"]
    pixels = torch.randn(clips, 3, frames, side, side, device=device)  # B C T H W
    return training_step(lambda: model(pixels, settings["mask_ratio"])[0], adamw_update(model.to(device).train()), clips)


@torch.no_grad()
def loss_difference(ours: MAEST, theirs: nn.Module, settings: Mapping[str, Any]) -> float:
    """Relative, of one clip and mask; `ours` receives the official model's weights."""
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    weights = {
        name: entry.to_ours(*(state[key] for key in entry.arrays)) for name, entry in mae_st_weight_map(ours.config).items()
    }
    ours.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
    frames, side, _ = ours.encoder.clip
    pixels = torch.randint(0, 256, (1, frames, side, side, 3), dtype=torch.uint8, generator=seeds.torch_rng(SEED, "bench"))
    normalised = ((pixels.float() / 255 - MAE_ST_MEAN) / MAE_ST_STD).permute(0, 4, 1, 2, 3)  # B C T H W
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        order = torch.rand(1, ours.encoder.positions.table().shape[0]).argsort(dim=1)  # as the official code draws
        torch.manual_seed(SEED)
        their_loss = theirs(normalised, settings["mask_ratio"])[0]
    ids_keep = order[:, : ours.visible_token_count].sort(dim=1).values
    our_loss = ours(pixels, MaskedTokens(ids_keep, ours.encoder.grid))
    return float((our_loss - their_loss).abs() / their_loss)
