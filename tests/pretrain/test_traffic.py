"""The collectives of the real training loop, as every rank of a world that does not exist calls them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from scaling4d.pretrain.plan.closed_form import StepLayout, traffic
from scaling4d.pretrain.plan.plan import build, settings_of
from scaling4d.pretrain.plan.work import work_of
from scaling4d.records import MaskedTokens
from scaling4d.training.fit import Batch, Callback, FitConfig, StepResult, fit
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig, parallelize

pytestmark = pytest.mark.integration

RING = {  # operation -> what a GPU of a ring of n sends of its input
    "allgather_base": lambda n: n - 1,
    "reduce_scatter_base": lambda n: (n - 1) / n,
    "allreduce": lambda n: 2 * (n - 1) / n,
}
Collective = tuple[str, tuple[int, ...], int]  # operation, ranks of the group, bytes of this rank's input


class Recorder(TorchDispatchMode):
    """Notes every collective in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again as the operations on its shard
        name = operation.__name__.split(".")[0].strip("_")
        if operation.namespace == "c10d":
            values = args[1] if "base" in name else args[0]  # behind the output
            group = next(dist.ProcessGroup.unbox(value) for value in args if "ProcessGroup" in str(value))
            self._record(name, group, values if isinstance(values, list) else [values])
        elif operation.namespace == "_c10d_functional" and name != "wait_tensor":
            self._record(name, dist.distributed_c10d._resolve_process_group(args[-1]), [args[0]])
        return operation(*args, **(kwargs or {}))

    def _record(self, name: str, group: dist.ProcessGroup, values: list[torch.Tensor]) -> None:
        size = sum(value.numel() * value.element_size() for value in values)
        self.collectives.append((name.replace("all_reduce", "allreduce"), tuple(dist.get_process_group_ranks(group)), size))


class OneStep(Callback):
    """Records the second step, and ends the training."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def after_step(self, result: StepResult) -> bool:
        if result.step == 1:
            self.recorder.__enter__()
        else:
            self.recorder.__exit__(None, None, None)
        return result.step == 2


def collectives_of(point: str, rank: int, shards: int, replicas: int, microbatches: int) -> list[Collective]:
    """A step of `fit` on fake tensors, in a process of its own, since torch remembers a rank's place in a mesh."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks, step = shards * replicas, OneStep()
    model = build(point, settings_of(point))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    sharding = ShardingConfig(shards, "none", compile=False, packed=False, accumulate=microbatches)
    parallelize(model, sharding, ComputeConfig(device="cpu", compute="bfloat16"), ranks=ranks)

    def batches(start: int) -> Iterator[Batch]:
        while True:
            ids_keep = torch.zeros(microbatches, model.visible_token_count, dtype=torch.int64)
            pixels = torch.empty(microbatches, *model.encoder.clip, 3, dtype=torch.uint8)
            yield Batch((pixels, MaskedTokens(ids_keep, model.encoder.grid)))

    numbers = {"steps": 9, "batch": ranks * microbatches, "accumulate": microbatches, "warmup_steps": 0, "seed": 0}
    given = {"weight_decay": 0.05, "betas": (0.9, 0.95), "clip_norm": 1.0, "log_every": 9, "save_every": 9}
    config = FitConfig(name="fake", rate_setting="", device="cpu", **numbers, **given)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        groups = {"all": (list(model.named_parameters()), 0.0)}
        fit(model, batches, config, param_groups=groups, callbacks=[step])
    return step.recorder.collectives


@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize(("point", "ranks", "shards", "replicas", "microbatches"), [
    ("nano", (0, 1, 8, 255), 8, 32, 1),
    ("nano", (0, 255), 8, 32, 2),
    ("nano", (0, 255), 256, 1, 1),
    ("nano", (0, 255), 1, 256, 1),
    ("nano", (0, 255), 1, 256, 2),
    ("mae_st_tiny", (0, 255), 8, 32, 1),
    pytest.param("j", (0, 1, 8, 255), 8, 32, 1, marks=pytest.mark.slow),
    pytest.param("nano", range(256), 8, 32, 1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
])  # fmt: skip
def test_all_ranks_call_the_same_collectives_and_send_the_bytes_of_the_plan(
    point: str, ranks: tuple[int, ...], shards: int, replicas: int, microbatches: int
) -> None:
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as apart:
        arguments = [(point, rank, shards, replicas, microbatches) for rank in ranks]
        sequences = dict(zip(ranks, apart.starmap(collectives_of, arguments, chunksize=1), strict=True))
    first = [(name, len(group), size) for name, group, size in sequences[ranks[0]]]
    for rank, sequence in sequences.items():
        assert [(name, len(group), size) for name, group, size in sequence] == first
        assert all(rank in group for _, group, _ in sequence)
    for (one, ours), (other, theirs) in combinations(sequences.items(), 2):
        for (_, group, _), (_, their_group, _) in zip(ours, theirs, strict=True):
            assert (group == their_group) == (other in group) == (one in their_group)  # nobody waits for an absent rank
    planned = traffic(work_of(build(point, settings_of(point))), StepLayout(shards, False, microbatches), replicas=replicas)
    sent = {"shards_bytes": 0.0, "replicas_bytes": 0.0}
    for name, group, size in sequences[ranks[0]]:
        within = shards > 1 and group[1] - group[0] == 1
        sent["shards_bytes" if within else "replicas_bytes"] += size * RING[name](len(group))
    assert sent == pytest.approx(planned, rel=1e-12)
