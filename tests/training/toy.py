"""A toy: a small masked autoencoder, trained on random clips by `fit`, here or in a process that is interrupted."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from interrupting import exit_code
from torch import Tensor, nn

from scaling4d import seeds
from scaling4d.checkpoint import save_tensors
from scaling4d.mae.models import METHODS, config_of
from scaling4d.records import MaskedTokens, file_system_errors
from scaling4d.training import distributed
from scaling4d.training.fit import Batch, FitConfig, fit
from scaling4d.training.observe import TrainingLog
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig, full_tensor, parallelize
from scaling4d.training.resume import CheckpointManager, fingerprint, remove_state, state_folder

RESULT, LOG = Path("result"), Path(".runs/toy")
FRAME = {"clip": (4, 16, 16), "patch": (2, 8, 8), "pixel_mean": 0.45, "pixel_scale": 4.0}
BACKBONE = FRAME | {"width": 16, "depth": 4, "heads": 2, "mlp": 32}
METHOD = BACKBONE | {"masking": "random", "mask_ratio": 0.5, "position_init": "sincos", "branch_init": "released"}
SETTINGS = {
    "SimpleMAE": METHOD | {"coarse_patch": (4, 16, 8), "decode_blocks": 2},
    "MAEST": METHOD
    | {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2, "predicted_frames": 4, "normalise_target": True}
    | {"separable_positions": True, "class_token": True},
}
PLAIN = ShardingConfig(shards=1, recompute="none", compile=False, packed=False, accumulate=1)
CPU = ComputeConfig(device="cpu", compute="float32")


@dataclass(frozen=True)
class Toy:
    """A training. interrupt: called by rank `who` before it computes step `at`. slow_s: rank 1 pauses in every step.

    each_step: called by every rank with its number and a step, before it computes that.
    """

    steps: int = 8
    ranks: int = 2
    batch: int = 8
    sharding: ShardingConfig = PLAIN
    save_every: int = 2
    keep_latest_k: int = 2
    asynchronous: bool = False
    clip_norm: float = 1.0
    interrupt: Callable[[], None] | None = None
    at: int = 0
    who: int = 0
    slow_s: float = 0.0
    each_step: Callable[[int, int], None] = lambda rank, step: None

    @property
    def fingerprint(self) -> dict:
        settings = {"profile": "smoke", "steps": self.steps, "clip_norm": self.clip_norm}
        return fingerprint("toy", settings=settings, inputs={}, code_sha256="0" * 64)

    @property
    def folder(self) -> Path:
        return state_folder("toy", self.fingerprint)

    @property
    def fit(self) -> FitConfig:
        optimizer = {"betas": (0.9, 0.95), "weight_decay": 0.05, "warmup_steps": 2, "clip_norm": self.clip_norm, "seed": 0}
        cadence = {"log_every": 1, "save_every": self.save_every, "accumulate": self.sharding.accumulate}
        return FitConfig(
            name="toy", steps=self.steps, batch=self.batch, rate_setting="toy.rate", device="cpu", **optimizer, **cadence
        )


def build(method: str = "SimpleMAE") -> nn.Module:
    """A model on meta."""
    with torch.device("meta"):
        return METHODS[method](config_of(METHODS[method], SETTINGS[method]))


def build_sharded(sharding: ShardingConfig, *, ranks: int, compute: ComputeConfig = CPU, method: str = "SimpleMAE") -> nn.Module:
    """A model in its place on the ranks, with its first weights."""
    model = build(method)
    parallelize(model, sharding, compute, ranks=ranks)
    model.to_empty(device="cpu").initialise(0)
    return model


def batch_of(model: nn.Module, step: int, *, rank: int, ranks: int, size: int = 8) -> tuple[Tensor, MaskedTokens]:
    """A rank's part of a step's random clips and masks."""
    pixels = torch.randint(0, 256, (size, *model.encoder.clip, 3), dtype=torch.uint8, generator=seeds.torch_rng(0, "p", step))
    masked = model.draw_mask(size, seeds.torch_rng(0, "m", step))
    part = slice(rank * size // ranks, (rank + 1) * size // ranks)
    return pixels[part], MaskedTokens(masked.ids_keep[part], masked.grid)


def train(toy: Toy) -> dict[str, bytes]:
    """Train here, or go on, and remove the state at the end; see `written`."""
    distributed.run(_train, ranks=toy.ranks, toy=toy)
    remove_state(toy.folder)
    return written()


@file_system_errors()
def _train(*, rank: int, ranks: int, toy: Toy) -> None:
    model = build_sharded(toy.sharding, ranks=ranks)
    log = TrainingLog(toy.fit, folder=LOG)
    manager = CheckpointManager("toy", toy.fingerprint, keep_latest_k=toy.keep_latest_k, asynchronous=toy.asynchronous)

    def batch(step: int) -> Batch:
        if toy.interrupt and rank == toy.who and step == toy.at:
            toy.interrupt()
        time.sleep(toy.slow_s * (rank == 1))
        toy.each_step(rank, step)
        return Batch(batch_of(model, step, rank=rank, ranks=ranks, size=toy.batch))

    groups = {"all": (list(model.named_parameters()), 0.01)}
    run = {"param_groups": groups, "callbacks": (log,), "manager": manager}
    progress = fit(model, lambda start: map(batch, count(start)), toy.fit, **run)
    weights = {name: full_tensor(value) for name, value in model.state_dict().items()}
    if rank == 0:
        RESULT.mkdir(exist_ok=True)
        save_tensors(RESULT / "model.safetensors", weights)
        (RESULT / "losses.json").write_text(json.dumps(log.lines))
        (RESULT / "ranks.json").write_text(json.dumps(progress.ranks))
    manager.close()


def written() -> dict[str, bytes]:
    """What must be equal to the byte: weights and losses."""
    return {name: (RESULT / name).read_bytes() for name in ("model.safetensors", "losses.json")}


def steps_computed() -> list[int]:
    """Of all attempts, a step again if it was computed again."""
    path = LOG / "timings.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


def attempt(toy: Toy, *, at: int = 0, interrupt: Callable[[], None] | None = None, most_bytes: int | None = None) -> int:
    """Exit code of a training in a process of its own; rank 0 calls `interrupt` before it computes step `at`."""
    return exit_code(lambda: train(replace(toy, at=at, interrupt=interrupt)), most_bytes=most_bytes)
