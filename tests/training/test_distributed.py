"""Several one-thread processes as one."""

import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from interrupting import exit_code, free_port
from torch import nn

from scaling4d.records import Preempted, UserError
from scaling4d.training import distributed
from scaling4d.training.distributed import (
    STATES,
    StepVotes,
    WatchdogConfig,
    end_start,
    heartbeat,
    run,
    stop_requests,
    stop_watchdog,
)
from scaling4d.training.parallelize import reduce_gradients

pytestmark = pytest.mark.integration

SIZES = (3, 1, 2, 5)


def watching(start_s: float, hang_s: float | None = None) -> WatchdogConfig:
    return WatchdogConfig(start_s, start_s if hang_s is None else hang_s, Path(".runs/toy"))


def a_tensor(*, rank: int, ranks: int) -> torch.Tensor:
    return torch.arange(3)


def mean_gradients(*, rank: int, ranks: int) -> list[list[float]]:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in SIZES]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.arange(float(parameter.numel())) + 10 * number + rank
    unused = torch.nn.Parameter(torch.zeros(1))
    reduce_gradients(nn.ParameterList([unused, *parameters]))
    assert unused.grad is None
    return [parameter.grad.tolist() for parameter in parameters]


def refused(*, rank: int, ranks: int) -> None:
    if rank == 1:
        raise UserError("batch 3 does not divide; set batch to 4")
    dist.barrier()


def preempted(*, rank: int, ranks: int) -> None:
    with stop_requests() as requests:
        dist.barrier()
        if rank == 0:
            os.kill(os.getppid(), signal.SIGUSR1)  # which tells every rank
        while not requests:
            time.sleep(0.01)
    raise Preempted(f"stopped by {signal.Signals(requests[0]).name}")


def killed(*, rank: int, ranks: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hanging(*, rank: int, ranks: int) -> None:
    end_start()
    heartbeat(f"step 7, {'reading clips' if rank == 1 else 'computing'}", 14 if rank == 1 else 15)
    if rank == 1:
        time.sleep(60)
    dist.barrier()


def frozen(*, rank: int, ranks: int) -> None:
    end_start()
    heartbeat("step 7, computing", 15)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def slow(*, rank: int, ranks: int) -> str:
    for step in range(10):
        heartbeat("computing", step)
        time.sleep(0.1)
    stop_watchdog()
    time.sleep(1)
    return "done"


def group_timeouts(*, rank: int, ranks: int) -> list[float]:
    """Seconds: of the group at the start, after the first step, and of the group of training states."""
    states, default = dist.new_group(backend="gloo", group_desc=STATES), dist.group.WORLD

    def seconds(group: dist.ProcessGroup) -> float:
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    at_start = seconds(default)
    end_start()
    return [at_start, seconds(default), seconds(states)]


def answers(*, rank: int, ranks: int) -> list[list]:
    """Every rank's answers in five steps and at the end. Rank 1 is asked to stop; rank 2 writes state 7 longest."""
    votes = StepVotes()
    told = [votes.exchange(rank == 1 and step == 2, 7 if step >= rank else 0) for step in range(5)]
    told.append(votes.last(False))
    everyone: list = [None] * ranks
    dist.all_gather_object(everyone, told)
    return everyone


def recorder(*, rank: int, ranks: int) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("TORCH_FR", "TORCH_NCCL"))}


def twice(variables: dict[str, str]) -> None:
    """Two runs of the one process that torchrun started; the second one hangs."""
    os.environ |= variables
    run(lambda **_: stop_watchdog(), ranks=1, watchdog=watching(0.5))
    run(sleeping, ranks=1, watchdog=watching(0.5), path=Path())


def sleeping(*, rank: int, ranks: int, path: Path) -> None:
    (path / str(rank)).write_text(str(os.getpid()))
    time.sleep(60)


def test_gradients_become_their_mean() -> None:
    means = run(mean_gradients, ranks=2)
    assert means == [[10 * number + i + 0.5 for i in range(size)] for number, size in enumerate(SIZES)]


def test_a_tensor_outlives_the_rank_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = multiprocessing.connection.wait
    monkeypatch.setattr(multiprocessing.connection, "wait", lambda pipes: time.sleep(1) or wait(pipes))
    assert run(a_tensor, ranks=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("work", "error", "message"), [
    (refused, UserError, "^batch 3 does not divide; set batch to 4$"),
    (preempted, Preempted, "^stopped by SIGUSR1$"),
    (killed, RuntimeError, r"rank 1 of 2 ended without a result \(SIGKILL\)"),
])  # fmt: skip
def test_the_end_of_one_rank_ends_all_and_its_reason_reaches_the_caller(work: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(work, ranks=2)


@pytest.mark.parametrize(
    ("work", "who"), [(hanging, "1 of 3 hangs at step 7, reading clips"), (frozen, "2 of 3 said nothing after")]
)
def test_a_rank_that_hangs_is_named_and_ends_the_others(work: Callable, who: str) -> None:
    with pytest.raises(UserError, match=f"^rank {who}.*; if it is only slow, raise hang_s, 1 s$"):
        run(work, ranks=3, watchdog=watching(60, 1))


def test_a_rank_that_never_joins_ends_the_run_within_the_time_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    run_rank = distributed._run_rank
    late = lambda work, store, rank, report, **more: time.sleep(60 * rank) or run_rank(work, store, rank, report, **more)  # noqa: E731
    monkeypatch.setattr(distributed, "_run_rank", late)
    started = time.monotonic()
    with pytest.raises(UserError, match="^rank 1 of 2 said nothing after the start; if it is only slow, raise start_s, 1 s$"):
        run(a_tensor, ranks=2, watchdog=watching(1, 60))
    assert time.monotonic() - started < 10


def test_after_the_first_step_groups_wait_for_as_long_as_a_step_may_take() -> None:
    assert run(group_timeouts, ranks=2, watchdog=watching(40, 20)) == [120, 60, 1800]


def test_all_ranks_learn_a_step_later_that_one_is_to_stop_and_that_all_have_written() -> None:
    stops, states = [False] * 3 + [True, False], [0, 0, 0, 7, 7]
    assert run(answers, ranks=3) == [[*zip(stops, states, strict=True), False]] * 3


def test_a_rank_that_moves_or_has_no_watchdog_does_not_hang() -> None:
    assert run(slow, ranks=2, watchdog=watching(0.7)) == "done"


def test_the_second_run_of_a_process_is_watched_as_the_first(capfd: pytest.CaptureFixture) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    assert exit_code(lambda: twice(ranks)) == 1
    assert "error: rank 0 of 1 hangs at the start; if it is only slow, raise start_s, 0.5 s" in capfd.readouterr().err


def test_ranks_end_with_their_parent(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=run, args=(sleeping,), kwargs={"ranks": 2, "path": tmp_path})
    parent.start()
    while len(list(tmp_path.iterdir())) < 2 or not all(path.read_text() for path in tmp_path.iterdir()):
        time.sleep(0.01)
    parent.kill()
    parent.join()
    for path in tmp_path.iterdir():
        while Path(f"/proc/{path.read_text()}").exists():
            time.sleep(0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_rank_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"^rank \d needs a GPU of its own, and this machine has 0; set device to cpu, or .+$"):
        run(a_tensor, ranks=2, device="cuda")


def test_another_number_of_ranks_than_torchrun_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match="^torchrun started 1 ranks, needed 4; start 4, or set ranks to 1$"):
        run(a_tensor, ranks=4)


def test_ranks_on_gpus_record_their_last_operations_for_a_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    init = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda _backend, **arguments: init("gloo", **arguments))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert run(recorder, ranks=2, watchdog=watching(60)) == {}
    assert run(recorder, ranks=2, device="cuda", watchdog=watching(60)) == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{Path.cwd()}/.runs/toy/nccl_trace_rank_",
    }
    with pytest.raises(UserError, match="raise start_s, 0.5 s; NCCL's last operations: torchfrtrace .runs/toy$"):
        run(sleeping, ranks=2, device="cuda", watchdog=watching(0.5), path=Path())
