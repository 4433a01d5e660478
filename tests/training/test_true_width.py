"""A slice of point j at its true width: one step in shards, its state on another mesh, its export, and a readout."""

import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling4d import checkpoint, seeds
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.load import load_model
from scaling4d.mae.simple_mae import SimpleMAE, SimpleMAEConfig
from scaling4d.readout.heads import Head, HeadConfig, Queries
from scaling4d.training.distributed import run
from scaling4d.training.optimizer import build_adamw, named_state
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig, parallelize, reduce_gradients, save_weights
from scaling4d.training.resume import CheckpointManager

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GIB, MOST_GIB = 2**30, 23  # of all ranks together, 21.5 at the most so far
WIDTH, MLP, HEADS = 4096, 32768, 32  # of experiments/point/j.yaml
DEPTH = 2  # of 64: weights, gradients and moments of the two alone take 10.3 GiB
CLIP = (4, 32, 32)  # 8 tokens, 4 of them visible, and 4 coarse ones
MODEL = {"clip": CLIP, "patch": (2, 16, 16), "coarse_patch": (4, 16, 16), "decode_blocks": 1, "depth": DEPTH}
MODEL |= {"masking": "random", "mask_ratio": 0.5, "position_init": "normal", "branch_init": "released", "qk_norm": False}
J = SimpleMAEConfig(**MODEL, width=WIDTH, heads=HEADS, mlp=MLP, pixel_mean=0.0, pixel_scale=1.0)
SHARDING = ShardingConfig(shards=1, recompute="none", compile=False, packed=False, accumulate=1)
COMPUTE = ComputeConfig(device="cpu", compute="bfloat16")
RUN = {"run": "slice of j", "profile": "paper"}
Digest = dict[str, int]


def model_on(ranks: int, shards: int) -> SimpleMAE:
    """Without weights yet, in its place on the ranks."""
    with torch.device("meta"):
        model = SimpleMAE(J)
    parallelize(model, replace(SHARDING, shards=shards), COMPUTE, ranks=ranks)
    return model.to_empty(device="cpu")


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return build_adamw({"all": (list(model.named_parameters()), 1e-4)}, betas=(0.9, 0.95), weight_decay=0.05)


def digest(tensors: Mapping[str, Tensor]) -> Digest:
    """By name, the sum of all bits as integers: the same for every way in which ranks share the values."""
    sums = {}
    for name, value in tensors.items():
        local = (value.to_local() if hasattr(value, "to_local") else value).detach()
        total = torch.zeros((), dtype=torch.int64)
        for part in local.flatten().split(2**24):
            total += part.view(torch.int32).sum(dtype=torch.int64)
        if hasattr(value, "to_local"):
            dist.all_reduce(total)
        sums[name] = int(total)
    return sums


def peak_bytes() -> int:
    """Of all ranks together, each at its own peak, with what they share: more than they take at once."""
    total = torch.tensor(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    dist.all_reduce(total)
    return int(total)


def train_and_save(*, rank: int, ranks: int) -> tuple[Digest, Digest, float, int]:
    """One step in shards from sharded first weights, and an asynchronous save. First weights, state, loss, peak."""
    model = model_on(ranks, ranks)
    started = time.process_time()
    model.initialise(0)
    print(f"rank {rank}: first weights took {time.process_time() - started:.0f} s of its CPU")
    first = digest(dict(model.named_parameters()))
    pixels = torch.randint(0, 256, (1, *CLIP, 3), dtype=torch.uint8, generator=seeds.torch_rng(0, "pixels", rank))
    loss = model(pixels, model.draw_mask(1, seeds.torch_rng(0, "mask", rank)))
    loss.backward()
    reduce_gradients(model)
    adamw = optimizer_of(model)  # after the backward pass, whose peak its moments would raise
    adamw.step()
    adamw.zero_grad()
    state, manager = named_state(model, adamw), CheckpointManager("slice", RUN, keep_latest_k=1, asynchronous=True)
    manager.save(1, {"step": 1}, state)
    manager.wait()
    manager.close()
    return first, digest(state), loss.item(), peak_bytes()


def reload_and_export(*, rank: int, ranks: int, folder: Path) -> tuple[Digest, int, int]:
    """The state on another mesh, its weights as a Checkpoint folder. State, step, peak."""
    model = model_on(ranks, ranks)
    state = named_state(model, optimizer_of(model))
    manager = CheckpointManager("slice", RUN, keep_latest_k=1, asynchronous=False)
    started = time.process_time()
    progress = manager.load(state)
    print(f"rank {rank}: a saved state took {time.process_time() - started:.0f} s of its CPU")
    manager.close()
    loaded = digest(state)
    save_weights(model, folder if rank == 0 else None)
    return loaded, progress["step"], peak_bytes()


def test_a_slice_of_j_goes_from_sharded_weights_to_a_readout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", GIB)  # of 5 GB, so that every rank writes files of its own
    folder = tmp_path / "j"
    folder.mkdir()
    first, state, loss, peak = run(train_and_save, ranks=2)
    weights = {name.removeprefix("weight."): value for name, value in state.items() if name.startswith("weight.")}
    assert 0 < loss < float("inf") and weights.keys() == first.keys()
    assert all(weights[name] != first[name] for name in first if name.endswith("weight") and "norm" not in name)
    loaded, step, peak_of_reload = run(reload_and_export, ranks=4, folder=folder)
    assert step == 1 and loaded == state and (folder / checkpoint.INDEX).is_file()
    print(f"peak {peak / GIB:.1f} GiB of training, {peak_of_reload / GIB:.1f} GiB of reloading")
    assert max(peak, peak_of_reload) < MOST_GIB * GIB

    Checkpoint("j", "SimpleMAE", asdict(J), parameters=0, step=1, clips_seen=2).write_config(folder)
    model = load_model(folder).requires_grad_(False)
    assert digest(dict(model.named_parameters())) == weights
    pixels = torch.randint(0, 256, (3, *CLIP, 3), dtype=torch.uint8, generator=seeds.torch_rng(0, "clips"))
    features = model.encoder.last_tokens(pixels).unflatten(1, (2, 4))  # B t h*w D
    shape = {"width": 32, "heads": 4, "fourier_bases": 4, "query_width": 24, "query_std": 1.0, "time_init": "sincos"}
    head = Head(
        HeadConfig(**shape, out_scale=1.0, stretched=False, distance_bias=()),
        Queries(learned=1, out=3),
        features_width=WIDTH,
        frames=CLIP[0],
    )
    head.initialise(0)
    adam, losses = torch.optim.Adam(head.parameters(), lr=1e-3), []
    for _ in range(30):
        loss_of_head = nn.functional.cross_entropy(head(features).flatten(1), torch.arange(3))
        adam.zero_grad()
        loss_of_head.backward()
        adam.step()
        losses.append(loss_of_head.item())
    assert losses[-1] < 0.5 * losses[0]
