"""Several one-thread processes as one."""

import multiprocessing.connection
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from scaling4d.records import UserError
from scaling4d.training import distributed
from scaling4d.training.distributed import at, average_gradients, gather, unwatched


def a_tensor(*, rank: int, ranks: int) -> torch.Tensor:
    return torch.arange(3)


def averaged(*, rank: int, ranks: int) -> list[float]:
    linear = torch.nn.Linear(2, 1, bias=False)
    linear(torch.tensor([[float(rank), 1.0]])).sum().backward()
    unused = torch.nn.Parameter(torch.zeros(1))
    average_gradients([unused, *linear.parameters()])
    assert unused.grad is None
    return linear.weight.grad[0].tolist()


def gathered(*, rank: int, ranks: int, items: int) -> list[int]:
    return gather([10 * i for i in range(rank, items, ranks)])


def refusing(*, rank: int, ranks: int) -> None:
    if rank == 1:
        raise UserError("batch 3 does not divide; set batch to 4")
    torch.distributed.barrier()


def killed(*, rank: int, ranks: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def hanging(*, rank: int, ranks: int) -> None:
    at(f"step 7, {'reading clips' if rank == 1 else 'computing'}", 14 if rank == 1 else 15)
    if rank == 1:
        time.sleep(60)
    torch.distributed.barrier()


def stopped(*, rank: int, ranks: int) -> None:
    at("step 7, computing", 15)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    torch.distributed.barrier()


def slow(*, rank: int, ranks: int) -> str:
    for step in range(10):
        at("computing", step)
        time.sleep(0.1)
    unwatched()
    time.sleep(1)
    return "done"


def alone(*, rank: int, ranks: int, path: Path) -> None:
    (path / str(rank)).write_text(str(os.getpid()))
    time.sleep(60)


def test_gradients_become_their_mean() -> None:
    assert distributed.run(averaged, ranks=3) == [1.0, 1.0]


def several(*, rank: int, ranks: int) -> list[list[float]]:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 1, 2, 5)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.arange(float(parameter.numel())) + 10 * number + rank
    average_gradients(parameters)
    return [parameter.grad.tolist() for parameter in parameters]


@pytest.mark.parametrize("together", [1, 4, 100])
def test_gradients_sent_in_several_messages_each_find_their_place(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(distributed, "TOGETHER", together)
    found = distributed.run(several, ranks=2)
    assert found == [[10 * number + i + 0.5 for i in range(size)] for number, size in enumerate((3, 1, 2, 5))]


def test_a_tensor_outlives_the_rank_that_made_it(monkeypatch) -> None:
    wait = multiprocessing.connection.wait
    monkeypatch.setattr(multiprocessing.connection, "wait", lambda pipes: time.sleep(1) or wait(pipes))
    assert distributed.run(a_tensor, ranks=1).tolist() == [0, 1, 2]


def test_gathered_items_come_back_in_order() -> None:
    assert distributed.run(gathered, ranks=3, items=7) == [0, 10, 20, 30, 40, 50, 60]


def test_what_a_rank_refuses_reaches_the_caller() -> None:
    with pytest.raises(UserError, match="^batch 3 does not divide; set batch to 4$"):
        distributed.run(refusing, ranks=2)


def test_a_killed_rank_is_named_and_ends_the_others() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 ended without a result \(SIGKILL\)"):
        distributed.run(killed, ranks=2)


@pytest.mark.parametrize(
    ("work", "who"), [(hanging, "1 of 3 hangs at step 7, reading clips"), (stopped, "2 of 3 said nothing after")]
)
def test_a_rank_that_hangs_is_named_and_ends_the_others(work, who: str) -> None:
    with pytest.raises(UserError, match=f"^rank {who}.*; if it is only slow, raise hang_s, 1 s, in its settings$"):
        distributed.run(work, ranks=3, hang_s=1.0)


def test_a_rank_that_gets_on_or_is_not_watched_does_not_hang() -> None:
    assert distributed.run(slow, ranks=2, hang_s=0.7) == "done"


def test_ranks_end_with_their_parent(tmp_path: Path) -> None:
    settings = {"ranks": 2, "path": tmp_path}
    parent = multiprocessing.get_context("fork").Process(target=distributed.run, args=(alone,), kwargs=settings)
    parent.start()
    while len(list(tmp_path.iterdir())) < 2 or not all(path.read_text() for path in tmp_path.iterdir()):
        time.sleep(0.01)
    parent.kill()
    parent.join()
    for path in tmp_path.iterdir():
        while Path(f"/proc/{path.read_text()}").exists():
            time.sleep(0.01)
