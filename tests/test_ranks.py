"""Several one-thread processes as one."""

import multiprocessing.connection
import os
import signal
import time

import pytest
import torch

from scaling4d import ranks
from scaling4d.ranks import gather, parallel
from scaling4d.records import UserError


def a_tensor(*, rank: int, ranks: int) -> torch.Tensor:
    return torch.arange(3)


def averaged(*, rank: int, ranks: int) -> list[float]:
    linear = torch.nn.Linear(2, 1, bias=False)
    together = parallel(linear)
    together(torch.tensor([[float(rank), 1.0]])).sum().backward()
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


def test_gradients_become_their_mean() -> None:
    assert ranks.run(averaged, ranks=3) == [1.0, 1.0]


def test_a_tensor_outlives_the_rank_that_made_it(monkeypatch) -> None:
    wait = multiprocessing.connection.wait
    monkeypatch.setattr(multiprocessing.connection, "wait", lambda pipes: time.sleep(1) or wait(pipes))
    assert ranks.run(a_tensor, ranks=1).tolist() == [0, 1, 2]


def test_gathered_items_come_back_in_order() -> None:
    assert ranks.run(gathered, ranks=3, items=7) == [0, 10, 20, 30, 40, 50, 60]


def test_what_a_rank_refuses_reaches_the_caller() -> None:
    with pytest.raises(UserError, match="^batch 3 does not divide; set batch to 4$"):
        ranks.run(refusing, ranks=2)


def test_a_killed_rank_is_named_and_ends_the_others() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 ended without a result \(SIGKILL\)"):
        ranks.run(killed, ranks=2)
