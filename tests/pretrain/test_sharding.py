"""One model on many ranks: the same weights at the start, the same losses, the same bits again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from scaling4d import config, seeds
from scaling4d.checkpoint import weights
from scaling4d.mae.attention import aligned, attention
from scaling4d.pretrain.loop import pretrain
from scaling4d.pretrain.point import build, sections, start
from scaling4d.records import MaskedTokens, UserError
from scaling4d.training import optimizer
from scaling4d.training.distributed import run
from scaling4d.training.parallelize import Sharding, last_part, mine, reduce, spread, whole
from scaling4d.training.resume import State, tensors_of

PLAIN = {"shards": 1, "recompute": "none", "recompute_every": 1, "compile": False, "packed": False, "accumulate": 1}


def settled(*, ranks: int, compute: str, point: str, settings: dict, sharding: dict) -> nn.Module:
    """A point's model in its place with first weights."""
    config.bind(sections(point, settings))
    model = build(point, settings)
    spread(
        model,
        Sharding(**PLAIN | sharding),
        ranks=ranks,
        device="cpu",
        compute=compute,
        initialise=lambda: model.initialise(0),
    )
    return model


def gradients(*, rank: int, ranks: int, compute: str = "float32", **given: object) -> tuple[dict, dict]:
    """First weights and a step's gradients, whole, by name."""
    model = settled(ranks=ranks, compute=compute, **given)
    first = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    pixels = torch.randint(0, 256, (4, *model.encoder.clip, 3), dtype=torch.uint8, generator=seeds.stream(0, "p"))
    masked = model.choose(4, seeds.stream(0, "m"))
    mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    model(pixels[mine], MaskedTokens(masked.kept[mine], masked.grid)).backward()
    reduce(model)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    return first, {name: whole(p.grad) for name, p in model.named_parameters()}


def saved(*, rank: int, ranks: int, folder: Path, **given: object) -> dict:
    """All tensors of a run, moments too, whole; written as the state of step 5."""
    tensors = _all(ranks=ranks, filled=True, **given)
    state = State(folder, keep=1, asynchronous=False, rank=rank, ranks=ranks)
    state.save(5, {"step": 5}, tensors)
    return {name: whole(value).clone() for name, value in tensors.items()}


def loaded(*, rank: int, ranks: int, folder: Path, **given: object) -> dict:
    tensors = _all(ranks=ranks, filled=False, **given)
    assert State(folder, keep=1, asynchronous=False, rank=rank, ranks=ranks).load(tensors) == {"step": 5}
    return {name: whole(value).clone() for name, value in tensors.items()}


def _all(*, ranks: int, filled: bool, **given: object) -> dict:
    model = settled(ranks=ranks, compute="float32", **given)
    adamw, _ = optimizer.adamw({"all": (list(model.named_parameters()), 0.0)}, betas=(0.9, 0.95), weight_decay=0.05)
    optimizer.moments(adamw)
    tensors = tensors_of(model, adamw)
    for number, value in enumerate(tensors.values() if filled else ()):
        value.mul_(1 + number).add_(number)  # what no initial value is
    return tensors


@pytest.mark.parametrize(("point", "ranks", "shards"), [("nano", 4, 4), ("nano", 4, 2), ("mae_st_tiny", 2, 2)])
def test_sharded_first_weights_are_those_of_one_rank_and_gradients_nearly(
    project: Path, point: str, ranks: int, shards: int
) -> None:
    settings = config.read()
    first, grads = run(gradients, ranks=ranks, point=point, settings=settings, sharding={"shards": shards})
    _, wanted = run(gradients, ranks=1, point=point, settings=settings, sharding={})
    config.bind(sections(point, settings))
    for name, p in start(point, settings, 0).named_parameters():
        assert torch.equal(first[name], p), name
        assert torch.allclose(grads[name], wanted[name], rtol=1e-3, atol=1e-6), name


def kept_between_parts(*, rank: int, ranks: int, **given: object) -> tuple[int, int]:
    """Numbers of whole gradients that a rank holds after a part that is not the last, and of those in its shards."""
    model = settled(ranks=ranks, compute="float32", **given)
    masked = model.choose(2, seeds.stream(0, "m"))
    last_part(model, False)
    model(torch.zeros(2, *model.encoder.clip, 3, dtype=torch.uint8), masked).backward()
    groups = [
        group
        for part in model.modules()
        if hasattr(part, "_get_fsdp_state")
        for group in part._get_fsdp_state()._fsdp_param_groups
    ]
    whole_ones = sum(param.unsharded_accumulated_grad is not None for group in groups for param in group.fsdp_params)
    reduced = sum(mine(p.grad).numel() for p in model.parameters() if p.grad is not None)
    waiting = sum(group._partial_reduce_output.numel() for group in groups if group._partial_reduce_output is not None)
    return whole_ones, reduced + waiting


@pytest.mark.parametrize("shards", [4, 2])
def test_between_the_parts_of_a_batch_gradients_lie_in_shards(project: Path, shards: int) -> None:
    settings = config.read()
    whole_ones, values = run(kept_between_parts, ranks=4, point="nano", settings=settings, sharding={"shards": shards})
    config.bind(sections("nano", settings))
    parameters = sum(p.numel() for p in start("nano", settings, 0).parameters())
    assert whole_ones == 0
    assert parameters // shards <= values < 1.1 * parameters / shards  # first axes are rounded up


@pytest.mark.parametrize(
    "sharding",
    [
        {"recompute": "block"},
        {"recompute": "selective", "recompute_every": 3},
        {"packed": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
        pytest.param({"compile": True, "recompute": "selective"}, marks=pytest.mark.slow),
    ],
)
def test_how_a_block_is_computed_does_not_change_what(project: Path, sharding: dict) -> None:
    settings = config.read()
    _, found = run(gradients, ranks=2, point="nano", settings=settings, sharding=sharding | {"shards": 2})
    _, wanted = run(gradients, ranks=2, point="nano", settings=settings, sharding={"shards": 2})
    for name, grad in wanted.items():
        assert torch.allclose(found[name], grad, rtol=1e-4, atol=1e-7), name


def test_recomputed_blocks_are_called_twice_and_every_other_one_is_where_so_set(project: Path) -> None:
    settings = config.read()
    calls = run(calls_by_block, ranks=1, settings=settings, sharding={"recompute": "block", "recompute_every": 2})
    assert calls == [2, 1, 2, 1]


def calls_by_block(*, rank: int, ranks: int, settings: dict, sharding: dict) -> list[int]:
    config.bind(sections("nano", settings))
    model = build("nano", settings)
    calls = [0] * len(model.encoder.blocks)
    for i, block in enumerate(model.encoder.blocks):
        block.mlp_in.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    place = {"ranks": 1, "device": "cpu", "compute": "float32", "initialise": lambda: model.initialise(0)}
    spread(model, Sharding(**PLAIN | sharding), **place)
    model(torch.zeros(1, *model.encoder.clip, 3, dtype=torch.uint8), model.choose(1, seeds.stream(0, "m"))).backward()
    return calls


def test_bfloat16_computes_nearly_the_same_with_float32_weights(project: Path) -> None:
    settings = config.read()
    first, found = run(gradients, ranks=2, compute="bfloat16", point="nano", settings=settings, sharding={})
    exact, wanted = run(gradients, ranks=1, point="nano", settings=settings, sharding={})
    for name, grad in wanted.items():
        assert torch.equal(first[name], exact[name])
        assert 0 < (found[name] - grad).norm() < 0.1 * grad.norm(), name


def test_packed_clips_do_not_see_each_other() -> None:
    q, k, v = (torch.randn(3, n, 2, 4, generator=seeds.stream(0, str(n))) for n in (5, 7, 7))
    assert torch.allclose(attention(q, k, v, packed=True), attention(q, k, v), atol=1e-6)


def test_queries_of_any_width_are_laid_out_as_a_gpus_kernels_need_them() -> None:
    q, k, v = (torch.randn(2, n, 3, 19, generator=seeds.stream(0, str(n))) for n in (5, 7, 7))
    longer = aligned(q, k, v)
    assert {x.shape[-1] for x in longer} == {24}
    assert torch.allclose(attention(*longer, scale=19**-0.5)[..., :19], attention(q, k, v), atol=1e-6)
    assert aligned(k[..., :16])[0].shape[-1] == 16


@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (1, 1), (4, 2)])
def test_a_state_saved_on_four_ranks_loads_exactly_on_others(project: Path, tmp_path: Path, ranks: int, shards: int) -> None:
    given = {"folder": tmp_path / "state", "point": "nano", "settings": config.read()}
    wanted = run(saved, ranks=4, sharding={"shards": 4}, **given)
    found = run(loaded, ranks=ranks, sharding={"shards": shards}, **given)
    assert found.keys() == wanted.keys() and len(found) % 3 == 0
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def curve(changed: Callable, **values: object) -> tuple[list[float], dict]:
    """Losses and weights of a short run with these settings."""
    settings = changed("pretrain.Training.log_every", 1)
    for key, value in values.items():
        settings = changed(key.replace("__", "."), value)
    folder = pretrain("nano", settings)
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()], weights(folder)


WAYS = {
    "one": {"pretrain__Training__ranks": 1},
    "two": {"pretrain__Training__ranks": 2},
    "four": {"pretrain__Training__ranks": 4},
    "fsdp": {"pretrain__Training__ranks": 4, "points__nano__Sharding__shards": 4},
    "hsdp": {"pretrain__Training__ranks": 4, "points__nano__Sharding__shards": 2, "points__nano__Sharding__accumulate": 2},
    "parts": {"pretrain__Training__ranks": 2, "points__nano__Sharding__accumulate": 4},
}


@pytest.mark.parametrize(
    ("ways", "steps"),
    [(("one", "hsdp"), 3), pytest.param(tuple(WAYS), 12, marks=pytest.mark.slow)],
)
def test_losses_are_the_same_on_any_ranks_and_each_run_to_the_bit(changed: Callable, ways: tuple[str, ...], steps: int) -> None:
    short = {"pretrain__Training__steps": steps, "points__nano__Sharding__accumulate": 1, "points__nano__Sharding__shards": 1}
    wanted, _ = curve(changed, **short | WAYS["one"])
    for way in ways[1:]:
        (found, first), (again, second) = (curve(changed, **short | WAYS[way]) for _ in range(2))
        assert found == pytest.approx(wanted, rel=1e-5), way
        assert found == again and all(torch.equal(first[name], second[name]) for name in first), way


def test_a_running_mean_of_the_weights_is_what_is_saved(changed: Callable) -> None:
    short = {"pretrain__Training__steps": 1, "pretrain__Training__ranks": 1, "pretrain__Training__batch": 8}
    _, last = curve(changed, **short)
    _, mean = curve(changed, **short | {"pretrain__Training__ema": 0.75})
    settings = config.read()
    config.bind(sections("nano", settings))
    for name, p in start("nano", settings, settings["seed"]).named_parameters():
        assert torch.allclose(mean[name], 0.75 * p + 0.25 * last[name], atol=1e-7), name


def test_rates_grow_with_the_batch(changed: Callable) -> None:
    changed("pretrain.Training.steps", 1)
    changed("pretrain.Training.ranks", 1)
    changed("pretrain.Training.batch", 8)
    rates = []
    for at in (8, 4):
        folder = pretrain("nano", changed("pretrain.Training.rates_at_batch", at))
        rates.append(json.loads((folder / "losses.jsonl").read_text())["lr"])
    assert rates[1] == pytest.approx(2 * rates[0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("points.nano.Sharding.shards", 3, "2 ranks do not divide into copies of 3 shards; set Sharding.shards to a divisor"),
        ("points.nano.Sharding.accumulate", 3, "a batch of 8 clips does not divide among 2 ranks in 3 parts each; set .+"),
        ("points.nano.Sharding.recompute", "some", "Sharding.recompute 'some' of every 1 blocks; needed none, block or .+"),
        ("pretrain.Training.compute", "float8", "pretrain.Training.compute = 'float8'; needed float32 or bfloat16"),
        (
            "pretrain.Training.device",
            "cuda",
            r"rank \d needs a GPU of its own, and this machine has 0; set pretrain.Training.device to cpu, .+",
        ),
        ("pretrain.Training.repeats", 3, "a batch of 8 clips does not divide among 2 ranks, each clip 3 times; set batch to .+"),
        (
            "pretrain.Training.crop",
            [0.5, 0.1],
            r"crop is \[0.5, 0.1\], needed 0 < smallest <= largest <= 1; set pretrain.Training.+",
        ),
        ("pretrain.Training.log_every", 0, "pretrain.Training.log_every is 0; needed 1 or more"),
        ("pretrain.Training.val_clips", -1, "pretrain.Training.val_clips is -1; needed 0 or more"),
        ("pretrain.Running.workers", -1, "workers is -1, needed 0 or more; set pretrain.Running.workers"),
        ("pretrain.Running.keep", 0, "pretrain.Running.keep is 0; needed 1 or more"),
        ("pretrain.Training.ema", 1.0, r"pretrain.Training.ema = 1.0; needed 0 \(none\) or a share below 1, such as 0.999"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changed: Callable, key: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        pretrain("nano", changed(key, value))


@pytest.mark.parametrize("key", ["repeats", "crop", "log_every"])
def test_what_can_be_refused_before_a_rank_is_started_is(changed: Callable, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr("scaling4d.pretrain.loop.in_ranks", lambda *_, **__: pytest.fail("a rank was started"))
    with pytest.raises(UserError):
        pretrain("nano", changed(f"pretrain.Training.{key}", {"repeats": 0, "crop": [0.0, 1.0], "log_every": 0}[key]))
