"""A frozen encoder in shards on two ranks: the features of one rank, and no rank that waits for another's passes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_encoder
import torch
from nearness import near
from torch import Tensor

from scaling4d import seeds
from scaling4d.encoders.features import MemoryFeatures
from scaling4d.readout import data
from scaling4d.readout.data import RankSplit, evaluate
from scaling4d.readout.protocols import Frozen, ReadoutConfig
from scaling4d.records import Sample
from scaling4d.training.distributed import WatchdogConfig, gather_round_robin, run
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig

pytestmark = pytest.mark.integration

CLIP = (4, 16, 16)
FRAME = {"clip": CLIP, "patch": (2, 8, 8), "pixel_mean": 0.45, "pixel_scale": 4.0}
CHANGES = {"PixelTokens": FRAME, "Backbone": FRAME | {"width": 16, "depth": 6, "mlp": 32}}
WATCHDOG = WatchdogConfig(60.0, 60.0, Path(".runs"))
PLAIN = ShardingConfig(shards=1, recompute="none", compile=False, packed=False, accumulate=1)


def build(kind: str = "Backbone") -> torch.nn.Module:
    return small_encoder.model(kind, **CHANGES[kind]).requires_grad_(False)


def source_of(
    encoder: torch.nn.Module, *, ranks: int, shards: int, batch: int, store: Path | None, compute: str
) -> MemoryFeatures:
    evaluation = SimpleNamespace(ranks=ranks, feature_batch=batch, feature_store=str(store) if store else "")
    layout = {"compute": ComputeConfig(device="cpu", compute=compute), "sharding": replace(PLAIN, shards=shards)}
    folder = store.parent / "encoder" if store else None
    return Frozen(ReadoutConfig(folder, "actions", None, 0, evaluation, None, **layout)).features_of(encoder)


def clips(count: int) -> list[Tensor]:
    rng = seeds.torch_rng(0, "clips")
    return [torch.randint(256, (*CLIP, 3), generator=rng, dtype=torch.uint8) for _ in range(count)]


def encoded(
    *,
    rank: int,
    ranks: int,
    parts: list[list[int]],
    shards: int = 1,
    batch: int = 2,
    store: Path | None = None,
    compute: str = "float32",
    kind: str = "Backbone",
) -> tuple[dict[int, Tensor], int]:
    """Features of all clips, by number, and passes of the first rank. parts: numbers of the clips of each rank."""
    encoder = build(kind)
    sizes, compute_features = [], encoder.features
    encoder.features = lambda pixels, layers=None: sizes.append(len(pixels)) or compute_features(pixels, layers)
    source = source_of(encoder, ranks=ranks, shards=shards, batch=batch, store=store, compute=compute)
    keys = [source.add(clips(12)[number]) for number in parts[rank]]
    source.flush()
    own = source.stack(keys) if keys else ()
    return dict(gather_round_robin(list(zip(parts[rank], own, strict=True)))), sizes


UNEQUAL = [[[*range(9)], [9, 10, 11]], [[0], [*range(1, 12)]], [[], [*range(12)]]]


@pytest.mark.parametrize("parts", UNEQUAL)
def test_features_in_shards_are_those_of_one_rank_and_unequal_shares_do_not_hang(parts: list[list[int]]) -> None:
    expected, _ = run(encoded, ranks=1, parts=[[*range(12)]])
    sharded, sizes = run(encoded, ranks=2, watchdog=WATCHDOG, parts=parts, shards=2)
    assert sharded.keys() == expected.keys()
    assert all(near(sharded[number], features, 1e-5) and features.std() > 0.1 for number, features in expected.items())
    assert len(sizes) == max(-(-len(part) // 2) for part in parts)  # of a rank as of the busiest one


def test_an_encoder_without_blocks_takes_part() -> None:
    expected, _ = run(encoded, ranks=1, parts=[[*range(12)]], kind="PixelTokens")
    sharded, _ = run(encoded, ranks=2, watchdog=WATCHDOG, parts=UNEQUAL[0], shards=2, kind="PixelTokens")
    assert all(torch.equal(sharded[number], features) for number, features in expected.items())


def test_bfloat16_is_near_and_stored_as_float32() -> None:
    expected, _ = run(encoded, ranks=1, parts=[[*range(12)]])
    for ranks, parts, shards in ((1, [[*range(12)]], 1), (2, UNEQUAL[0], 2)):
        rounded, _ = run(encoded, ranks=ranks, watchdog=WATCHDOG, parts=parts, shards=shards, compute="bfloat16")
        for number, features in expected.items():
            assert rounded[number].dtype == torch.float32
            assert near(rounded[number], features, 0.05) and not torch.equal(rounded[number], features)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small_encoder.checkpoint(tmp_path / "encoder", "Backbone", **CHANGES["Backbone"])
    return tmp_path / "store"


def test_each_rank_writes_its_own_shards_and_stored_clips_need_no_pass_of_any_rank(store: Path) -> None:
    first, sizes = run(encoded, ranks=2, watchdog=WATCHDOG, parts=UNEQUAL[0], shards=2, store=store)
    assert len(list(store.rglob("*.safetensors"))) == 2 and len(sizes) == 5
    again, sizes = run(encoded, ranks=2, watchdog=WATCHDOG, parts=UNEQUAL[0][::-1], shards=2, store=store)
    assert sizes == [] and len(list(store.rglob("*.safetensors"))) == 2
    assert all(torch.equal(again[number], features) for number, features in first.items())
    (next(store.rglob("*.safetensors"))).unlink()  # one rank has its clips, the other computes
    again, sizes = run(encoded, ranks=2, watchdog=WATCHDOG, parts=UNEQUAL[0], shards=2, store=store)
    assert sizes and all(near(again[number], features, 1e-5) for number, features in first.items())


class FewSamples:
    """A split of as many samples as the rank has."""

    def __init__(self, count: int) -> None:
        self.count = count

    def by_index(self) -> Iterator[tuple[int, list[Sample]]]:
        for number, pixels in enumerate(clips(self.count)):
            yield number, [Sample(f"v{number}", f"v{number}", pixels.numpy(), {})]


def evaluated(*, rank: int, ranks: int, counts: tuple[int, int]) -> list[str]:
    source = source_of(build(), ranks=ranks, shards=2, batch=2, store=None, compute="float32")
    task = SimpleNamespace(pools=False, test_views=(1, 1), target=lambda _: {"t": torch.zeros(1).numpy()}, measure=lambda *_: {})
    split = RankSplit("actions", "val", 0, task, Path(), 0.0, CLIP, rank, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.RankSplit, "samples", lambda _: FewSamples(counts[rank]))
        videos, *_ = evaluate(split, source.encode, lambda x, _: x.mean((1, 2, 3)), size=4, flush=source.flush)
    return gather_round_robin(videos)


@pytest.mark.parametrize("counts", [(9, 2), (1, 8), (4, 4)])
def test_an_evaluation_of_unequal_shares_does_not_hang(counts: tuple[int, int]) -> None:
    assert len(run(evaluated, ranks=2, watchdog=WATCHDOG, counts=counts)) == sum(counts)
