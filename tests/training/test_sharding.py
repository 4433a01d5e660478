"""One model on many ranks: the same weights at the start, the same gradients and losses, the same bits again."""

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import toy
from nearness import near
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from toy import CPU, PLAIN, Toy, batch_of, build_sharded

from scaling4d import artifacts, checkpoint
from scaling4d.checkpoint import load_tensors, save_tensors
from scaling4d.training.distributed import run
from scaling4d.training.optimizer import build_adamw, named_state
from scaling4d.training.parallelize import (
    blocks_of,
    full_tensor,
    reduce_gradients,
    save_weights,
    set_last_microbatch,
)
from scaling4d.training.resume import CheckpointManager

pytestmark = pytest.mark.integration

FINGERPRINT = {"run": "toy", "profile": "smoke"}


def gradients(*, rank: int, ranks: int, compute: str = "float32", method: str = "SimpleMAE", **sharding: object) -> tuple:
    """First weights and a step's gradients, each as full tensors by name."""
    given = {"compute": replace(CPU, compute=compute), "method": method}
    model = build_sharded(replace(PLAIN, **sharding), ranks=ranks, **given)
    first = {name: full_tensor(p.detach()).clone() for name, p in model.named_parameters()}
    model(*batch_of(model, 0, rank=rank, ranks=ranks)).backward()
    reduce_gradients(model)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    return first, {name: full_tensor(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("method", "ranks", "shards"), [("SimpleMAE", 4, 4), ("SimpleMAE", 4, 2), ("MAEST", 2, 2)])
def test_sharded_first_weights_are_those_of_one_rank_and_gradients_nearly(method: str, ranks: int, shards: int) -> None:
    first, sharded = run(gradients, ranks=ranks, method=method, shards=shards)
    alone, plain = run(gradients, ranks=1, method=method)
    for name, gradient in plain.items():
        assert torch.equal(first[name], alone[name]), name
        assert near(sharded[name], gradient, 1e-4), name


def means_of_copies(*, rank: int, ranks: int, method: str, accumulate: int, **changes: object) -> tuple[dict, dict, list[int]]:
    """Gradients of a batch; the same summed in one message after it; of each message, how many weights had none yet."""
    model, absent = build_sharded(PLAIN, ranks=ranks, method=method, **changes), []
    all_reduce = dist.all_reduce

    def note(*arguments: object, **named: object) -> object:
        absent.append(sum(p.grad is None for p in model.parameters()))
        return all_reduce(*arguments, **named)

    def backward(announced: bool) -> None:
        for part in range(accumulate):
            if announced:
                set_last_microbatch(model, part + 1 == accumulate)
            model(*batch_of(model, part, rank=rank, ranks=ranks)).backward()

    backward(False)
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    dist.all_reduce(flat)
    means = (flat / ranks).split([p.numel() for p in model.parameters()])
    before = {name: mean.view_as(p).clone() for (name, p), mean in zip(model.named_parameters(), means, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", note)
        for _ in range(2):
            model.zero_grad()
            absent.clear()
            backward(True)
            reduce_gradients(model)
    return {name: p.grad for name, p in model.named_parameters()}, before, absent


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "ranks", "accumulate"), [
    ("SimpleMAE", 1, 1), ("SimpleMAE", 2, 1), ("SimpleMAE", 2, 2), ("SimpleMAE", 4, 1), ("MAEST", 2, 1)
])  # fmt: skip
def test_copies_sum_the_gradients_of_a_block_while_they_compute_the_one_before(
    method: str, ranks: int, accumulate: int, compute: str
) -> None:
    given = {"method": method, "accumulate": accumulate, "compute": replace(CPU, compute=compute)}
    overlapped, before, absent = run(means_of_copies, ranks=ranks, **given)
    for name, gradient in before.items():
        assert torch.equal(overlapped[name], gradient) if ranks < 4 else near(overlapped[name], gradient, 1e-5), name
    blocks = 5 if method == "MAEST" else 4
    assert len(absent) == (blocks + 1 if ranks > 1 else 0)
    if ranks > 1 and accumulate == 1:
        assert absent == sorted(set(absent), reverse=True) and absent[-1] == 0  # each before the next block's gradients
    if accumulate == 2:
        assert not any(absent)


def kept_weights(*, rank: int, ranks: int) -> list[bool]:
    """Which weights of a model are still there when the model is gone, after a batch on several ranks."""
    model = build_sharded(PLAIN, ranks=ranks)
    set_last_microbatch(model, True)
    model(*batch_of(model, 0, rank=rank, ranks=ranks)).backward()
    reduce_gradients(model)
    weights = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    return [weight() is not None for weight in weights]


def test_copies_of_a_model_that_is_gone_keep_no_weights() -> None:
    assert not any(run(kept_weights, ranks=2))


def registrations(*, rank: int, ranks: int, method: str) -> list[str]:
    """Names that are registered with FSDP while a model is built, trained for two steps and asked to predict."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        register = torch.distributed.fsdp.register_fsdp_forward_method
        patch.setattr(
            torch.distributed.fsdp,
            "register_fsdp_forward_method",
            lambda model, name: (names.append(name), register(model, name)),
        )
        model = build_sharded(replace(PLAIN, shards=2), ranks=ranks, method=method)
        for step in range(2):
            inputs = batch_of(model, step, rank=rank, ranks=ranks)
            model(*inputs).backward()
            with torch.no_grad():
                model.reconstruct(*inputs)
    return names


@pytest.mark.parametrize("method", ["SimpleMAE", "MAEST"])
def test_methods_that_gather_weights_are_registered_once(method: str) -> None:
    names = run(registrations, ranks=2, method=method)
    assert "reconstruct" in names and len(names) == len(set(names))


def fsdp_groups(state: object) -> list:
    """Torch 2.10, of requirements-cuda.lock, has one or none."""
    return state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else list(filter(None, [state._fsdp_param_group]))


def sizes_between_parts(*, rank: int, ranks: int, shards: int) -> tuple[int, int, int]:
    """After a part that is not the last: numbers of full gradients, of values in a rank's shards, of parameters."""
    model = build_sharded(replace(PLAIN, shards=shards), ranks=ranks)
    set_last_microbatch(model, False)
    model(*batch_of(model, 0, rank=rank, ranks=ranks)).backward()
    states = [part._get_fsdp_state() for part in model.modules() if hasattr(part, "_get_fsdp_state")]
    groups = [group for state in states for group in fsdp_groups(state)]
    full = sum(param.unsharded_accumulated_grad is not None for group in groups for param in group.fsdp_params)
    reduced = sum(p.grad.to_local().numel() for p in model.parameters() if p.grad is not None)
    waiting = sum(group._partial_reduce_output.numel() for group in groups if group._partial_reduce_output is not None)
    return full, reduced + waiting, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shards", [4, 2])
def test_between_the_parts_of_a_batch_gradients_lie_in_shards(shards: int) -> None:
    full, values, parameters = run(sizes_between_parts, ranks=4, shards=shards)
    assert full == 0
    assert parameters // shards <= values < 1.1 * parameters / shards  # first axes are rounded up


@pytest.mark.parametrize("sharding", [
    {"recompute": "block"},
    {"packed": True},
    pytest.param({"compile": True}, marks=pytest.mark.slow),
    pytest.param({"compile": True, "recompute": "block"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_how_a_block_is_computed_does_not_change_its_gradients(sharding: dict) -> None:
    _, others = run(gradients, ranks=2, shards=2, **sharding)
    _, plain = run(gradients, ranks=2, shards=2)
    for name, gradient in plain.items():
        assert near(others[name], gradient, 1e-4), name


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
@pytest.mark.parametrize("method", ["SimpleMAE", "MAEST"])
def test_compiled_blocks_that_see_other_numbers_of_tokens_stay_graphs_of_fixed_shapes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def note(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        shapes.append([x.shape if isinstance(x, torch.Tensor) else x for x in inputs])
        return graph.forward

    def validate(clips: int) -> None:
        with torch.no_grad():
            model(*batch_of(model, 0, rank=0, ranks=1, size=clips))

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note))
    model = build_sharded(replace(PLAIN, compile=True), ranks=1, method=method)
    for step in range(2):
        model(*batch_of(model, step, rank=0, ranks=1)).backward()
    assert len(shapes) == 2  # blocks before and after other tokens join
    for clips in (16, 5, 1):  # a validation: full batches, the last one, a picture or a rank without clips
        validate(clips)
    model(*batch_of(model, 2, rank=0, ranks=1)).backward()
    assert len(shapes) == 8  # all that a training needs; torch's limit is as many
    assert all(isinstance(size, int) for inputs in shapes for shape in inputs for size in shape)


def fsdp2_gradients(*, rank: int, ranks: int, method: str) -> dict:
    """A step of bfloat16 under FSDP2 with one shard, torch's own way to cast weights: gradients by name."""
    model = build_sharded(PLAIN, ranks=ranks, method=method)
    mesh, blocks = init_device_mesh("cpu", (1,)), blocks_of(model)
    for part in (*blocks, model):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=part in blocks)
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model(*batch_of(model, 0, rank=rank, ranks=ranks)).backward()
    return {name: full_tensor(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("sharding", [
    {},
    {"recompute": "block"},
    {"packed": True},
])  # fmt: skip
@pytest.mark.parametrize("method", ["SimpleMAE", "MAEST"])
def test_cast_weights_have_the_gradients_of_fsdp2_to_the_bit(method: str, sharding: dict) -> None:
    _, ours = run(gradients, ranks=1, compute="bfloat16", method=method, **sharding)
    theirs = run(fsdp2_gradients, ranks=1, method=method)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name


def test_compiled_blocks_see_their_cast_weights() -> None:
    _, compiled = run(gradients, ranks=1, compute="bfloat16", compile=True)
    _, plain = run(gradients, ranks=1, compute="bfloat16")
    _, exact = run(gradients, ranks=1)
    for name, gradient in plain.items():
        assert not torch.equal(compiled[name], exact[name]), name
        assert near(compiled[name], gradient, 0.02), name


def test_after_a_pass_a_models_weights_are_its_own_again_also_where_it_failed() -> None:
    model = build_sharded(PLAIN, ranks=1, compute=replace(CPU, compute="bfloat16"))
    pixels, masked = batch_of(model, 0, rank=0, ranks=1)
    model(pixels, masked)
    with pytest.raises(RuntimeError):
        model(pixels[..., :1], masked)
    assert all(isinstance(module.weight, torch.nn.Parameter) for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def saved(*, rank: int, ranks: int, shards: int) -> dict:
    """All tensors of a run, moments too, in full; written as the state of step 5."""
    tensors = _tensors(ranks, shards)
    for number, value in enumerate(tensors.values()):
        value.mul_(1 + number).add_(number)  # unlike any initial value
    manager = CheckpointManager("toy", FINGERPRINT, keep_latest_k=1, asynchronous=False)
    manager.save(5, {"step": 5}, tensors)
    return {name: full_tensor(value).clone() for name, value in tensors.items()}


def loaded(*, rank: int, ranks: int, shards: int) -> dict:
    tensors = _tensors(ranks, shards)
    manager = CheckpointManager("toy", FINGERPRINT, keep_latest_k=1, asynchronous=False)
    assert manager.load(tensors) == {"step": 5}
    return {name: full_tensor(value).clone() for name, value in tensors.items()}


def _tensors(ranks: int, shards: int) -> dict[str, torch.Tensor]:
    model = build_sharded(replace(PLAIN, shards=shards), ranks=ranks)
    adamw = build_adamw({"all": (list(model.named_parameters()), 0.0)}, betas=(0.9, 0.95), weight_decay=0.05)
    return named_state(model, adamw)


def test_a_state_saved_on_four_ranks_loads_exactly_on_others() -> None:
    before = run(saved, ranks=4, shards=4)
    for ranks, shards in ((2, 2), (1, 1), (4, 2)):
        after = run(loaded, ranks=ranks, shards=shards)
        assert after.keys() == before.keys() and len(after) % 3 == 0
        for name, value in before.items():
            assert torch.equal(after[name], value), (ranks, name)


def weights_in_files(*, rank: int, ranks: int, shards: int, folder: Path) -> tuple[dict, list[int]]:
    """Writes a model's weights; gives them in full, and the number of whole weights that each rank held at once."""
    model, held = build_sharded(replace(PLAIN, shards=shards), ranks=ranks), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", lambda path, tensors: (held.append(len(tensors)), save_tensors(path, tensors)))
        save_weights(model, folder if rank == 0 else None)
    most = [0] * ranks
    dist.all_gather_object(most, max(held, default=0))
    return {name: full_tensor(value).clone() for name, value in model.state_dict().items()}, most


@pytest.mark.parametrize("shards", [1, 2])
def test_ranks_write_large_weights_into_files_of_their_own(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 8000)
    expected, most = run(weights_in_files, ranks=2, shards=shards, folder=Path())
    index = json.loads(Path(checkpoint.INDEX).read_text())
    files = sorted(path.name for path in Path().glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 4 and index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    assert index["metadata"]["sha256"] == {name: artifacts.sha256(Path(name)) for name in files}
    assert all(0 < number < len(expected) / 2 for number in most)  # every rank wrote, and held a part alone
    state = checkpoint.weights(Path())
    assert all(torch.equal(state[name], value) for name, value in expected.items()) and state.keys() == expected.keys()
    assert {name: file for file in files for name in load_tensors(Path(file))} == index["weight_map"]
    assert checkpoint.weights_sha256(Path()) == artifacts.sha256(Path(checkpoint.INDEX))


def test_small_weights_are_one_file_without_an_index() -> None:
    expected, most = run(weights_in_files, ranks=2, shards=2, folder=Path())
    assert [path.name for path in Path().glob("model*")] == ["model.safetensors"] and most == [len(expected), 0]


@pytest.mark.parametrize("sharding", [{"shards": 2, "accumulate": 2}, pytest.param({"shards": 4}, marks=pytest.mark.slow)])
def test_losses_in_shards_are_those_of_one_rank_and_each_run_to_the_bit(sharding: dict) -> None:
    alone = Toy(steps=4, save_every=9, ranks=1)
    sharded = replace(alone, ranks=4, sharding=replace(PLAIN, **sharding))
    expected, first, second = map(toy.train, (alone, sharded, sharded))
    assert first == second
    losses, plain = ([line["loss"] for line in json.loads(result["losses.json"])] for result in (first, expected))
    assert losses == pytest.approx(plain, rel=1e-5) and len(losses) == alone.steps
