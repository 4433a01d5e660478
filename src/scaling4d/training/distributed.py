"""Several processes as one: forked ranks on this machine, or those that torchrun started.

A rank on a CPU computes with one thread, because bits depend on the number of threads; several ranks use the cores.
Results depend on the number of ranks and on no other property of the machine. Forked ranks import torch once; the
parent must not have computed with it before.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scaling4d.provenance import work_folder
from scaling4d.records import Preempted, UserError, on_one_line

T = TypeVar("T")

STATES = "training states"  # description of the group of resume.CheckpointManager
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # requests to save the state and stop
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
HEARTBEATS = 10  # reports of a rank within start_s or hang_s, the shorter
GROUP_TIMEOUT = 3  # timeout of process groups over start_s or hang_s: the watchdog, which knows more, ends a run first
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}  # torch's own size
DUMP = "nccl_trace_rank_"  # torch's own name of a rank's file, without its number


@dataclass(frozen=True)
class WatchdogConfig:
    """Seconds of standstill of all ranks (see `heartbeat`), after which a run ends and names the ranks that hang.

    start_s: until the first step is done: imports, rendezvous, sharded weights, the first batch. hang_s: afterwards,
    see `end_start`. folder: for dumps of NCCL's flight recorder, a file a rank.
    """

    start_s: float
    hang_s: float
    folder: Path


def run(
    work: Callable[..., T], *, ranks: int, device: str = "cpu", watchdog: WatchdogConfig | None = None, **arguments: Any
) -> T:
    """Call `work(rank=, ranks=, **arguments)` in every rank, inside a process group.

    Args:
        device: cpu or cuda. watchdog: None: ranks may hang for ever.
    Returns:
        A copy of rank 0's result; in a process that torchrun started, this rank's result.
    Raises:
        UserError: a rank raised it, a rank hangs, or torchrun started another number of ranks.
        Preempted: the ranks raised it.
        RuntimeError: a rank failed or was killed; the others are ended.
    """
    run_rank = partial(_run_rank, partial(work, ranks=ranks, **arguments), ranks=ranks, device=device, watchdog=watchdog)
    if launched_by_torchrun():
        return _run_torchrun_rank(run_rank, ranks, watchdog)
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()
    sys.stderr.flush()
    alive = os.pipe()  # its end in this process shows the ranks that their parent lives
    with work_folder("scaling4d-ranks", Path(tempfile.gettempdir())) as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        children = [
            context.Process(target=_run_forked_rank, args=(run_rank, rank, folder, sender, alive), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]

        def forward(number: int) -> None:
            for child in children:
                if child.is_alive():
                    os.kill(child.pid, number)

        for child in children:
            child.start()
        for _, sender in pipes:
            sender.close()
        try:
            with stop_requests(forward) as requests:
                return _collect(children, [receiver for receiver, _ in pipes])
        except RuntimeError as error:
            if requests:  # a rank without a handler has ended
                message = "stopped between two states; the same command continues from the last one, or begins"
                raise Preempted(message) from error
            raise
        finally:
            for child in children:
                child.kill()
                child.join()
            for end in alive:
                os.close(end)


def launched_by_torchrun() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def is_main() -> bool:
    """Whether this process writes results: the parent of forked ranks, or rank 0 of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def _collect(children: list, receivers: list) -> Any:
    """The result of rank 0, once all ranks have ended."""
    first = None
    waiting = dict(zip(receivers, range(len(receivers)), strict=True))
    while waiting:
        for receiver in multiprocessing.connection.wait(list(waiting)):
            rank = waiting.pop(receiver)
            try:
                kind, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RuntimeError(_failure(children)) from None
            if kind == "refused":
                raise UserError(value)
            if kind == "preempted":
                raise Preempted(value)
            first = value if rank == 0 else first
    return first


def _failure(children: list) -> str:
    """Names the rank that ended the run: a killed one first, since the others fail without it."""
    for child in children:
        child.join(timeout=1)
    ended = [(rank, child.exitcode) for rank, child in enumerate(children) if child.exitcode]
    rank, code = min(ended, key=lambda item: (item[1] > 0, item[0]))
    why = signal.Signals(-code).name if code < 0 else f"exit code {code}; its own message is above"
    return f"rank {rank} of {len(children)} ended without a result ({why})"


def _run_forked_rank(run_rank: Callable, rank: int, folder: Path, sender: Any, alive: tuple[int, int]) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # the parent's handler is not this process's
    os.close(alive[1])
    threading.Thread(target=_exit_with_parent, args=(alive[0],), daemon=True).start()

    def send(kind: str, value: Any) -> None:  # `sender.send` would pass a tensor as a file that vanishes with this process
        sender.send_bytes(pickle.dumps((kind, value)))

    try:
        send("done", run_rank(dist.FileStore(f"{folder}/store"), rank, partial(send, "refused")))
    except UserError as error:
        send("refused", str(error))
    except Preempted as preempted:
        send("preempted", str(preempted))


def _exit_with_parent(end: int) -> None:
    os.read(end, 1)  # nobody writes: this returns when the last other end is closed, so when the parent is gone
    os._exit(1)


def _run_torchrun_rank(run_rank: Callable[..., T], ranks: int, watchdog: WatchdogConfig | None) -> T:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != ranks:
        raise UserError(f"torchrun started {world} ranks, needed {ranks}; start {ranks}, or set ranks to {world}")
    try:
        store, _, _ = next(dist.rendezvous("env://", **_timeout(watchdog and watchdog.start_s)))
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        problem = f"rank {rank} of {ranks} has no answer at {address} ({str(error).splitlines()[0]})"
        raise UserError(f"{problem}; start the other ranks, or raise start_s") from error
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives its ranks: restarted ranks begin anew
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return run_rank(store, rank, lambda message: print(f"error: {on_one_line(message)}", file=sys.stderr))


def _run_rank(
    work: Callable[..., T],
    store: dist.Store,
    rank: int,
    report: Callable,
    *,
    ranks: int,
    device: str,
    watchdog: WatchdogConfig | None,
) -> T:
    """Work in a process group. report: called with the reason before the watchdog ends this process."""
    global _progress, _watchdog  # noqa: PLW0603
    _progress, _watchdog = [0, "the start", True], watchdog
    if os.environ.get("LOCAL_WORLD_SIZE", str(ranks)) == str(ranks) and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    torch.set_num_threads(1)
    keep_freed_memory()
    if device == "cuda":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        if local_rank >= gpus:
            problem = f"rank {rank} needs a GPU of its own, and this machine has {gpus}"
            raise UserError(f"{problem}; set device to cpu, or fewer ranks a machine")
        torch.cuda.set_device(local_rank)
        if watchdog is not None:
            watchdog.folder.mkdir(parents=True, exist_ok=True)
            os.environ |= FLIGHT_RECORDER | {"TORCH_FR_DUMP_TEMP_FILE": f"{watchdog.folder.resolve()}/{DUMP}"}
    if watchdog is not None:
        watched = (_progress, dist.PrefixStore("watch", store), rank, ranks, watchdog, device == "cuda", report)
        threading.Thread(target=_watch, args=watched, daemon=True).start()
    backend, store = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", dist.PrefixStore("group", store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=ranks, **_timeout(watchdog and GROUP_TIMEOUT * watchdog.start_s)
    )
    result = work(rank=rank)
    stop_watchdog()
    dist.destroy_process_group()
    return result


def _timeout(seconds: float | None) -> dict[str, timedelta]:
    return {} if seconds is None else {"timeout": timedelta(seconds=seconds)}


def keep_freed_memory() -> None:
    """Tell glibc to keep freed pages for this process: to return them took a quarter of a small training step."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
            mallopt(parameter, value)


# of this process in its run, for the watchdog: a number, words, and whether it is starting; empty: none watches
_progress: list[Any] = []
_watchdog: WatchdogConfig | None = None


def heartbeat(what: str, number: int | None = None) -> None:
    """Tell the watchdog about progress: in words, and by a number that never falls (None: as before)."""
    if _progress:
        _progress[:2] = (_progress[0] if number is None else number, what)


def end_start() -> None:
    """After the first step: shorten the time-outs of the watchdog and of the process groups to `hang_s`.

    The group of the training states keeps its time, since ranks wait there for files.
    Source: torchtitan, which shortens the time-out of its groups after the first step, too.
    """
    if _progress and _watchdog:
        _progress[2] = False
        for group in dist.distributed_c10d._world.pg_map:
            if group.group_desc != STATES:
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=GROUP_TIMEOUT * _watchdog.hang_s), group)


def stop_watchdog() -> None:
    """From now on this rank may take any time."""
    _progress.clear()


def _watch(
    progress: list[Any],
    store: dist.Store,
    rank: int,
    ranks: int,
    watchdog: WatchdogConfig,
    nccl: bool,
    report: Callable[[str], None],
) -> None:
    """End this process when it has stood still for too long, and name the ranks that all wait for."""
    former, since, snapshots = tuple(progress), time.monotonic(), []
    for beat in count():
        now = tuple(progress)
        if not now:
            return
        name, limit_s = ("start_s", watchdog.start_s) if now[2] else ("hang_s", watchdog.hang_s)
        try:
            store.set(str(rank), json.dumps([beat, *now[:2]]))
            if now != former:
                former, since, snapshots = now, time.monotonic(), []
            elif time.monotonic() - since > limit_s:
                if nccl and not snapshots:  # before the first verdict, which ends all ranks
                    _dump_flight_recorder(watchdog.folder / f"{DUMP}{rank}")
                keys = map(str, range(ranks))
                snapshots.append([tuple(json.loads(store.get(k))) if store.check([k]) else (0, 0, "the start") for k in keys])
            if len(snapshots) > 3:  # time enough for every living rank to report
                verdict = f"{describe_hang(snapshots[0], snapshots[-1])}; if it is only slow, raise {name}, {limit_s:g} s"
                verdict += f"; NCCL's last operations: torchfrtrace {watchdog.folder}" if nccl else ""
                report(store.compare_set("verdict", "", verdict).decode())  # the first rank's: ended ranks report nothing
                os._exit(1)
        except dist.DistError as error:
            report(f"rank 0 of {ranks}, which keeps the ranks' progress, does not answer ({str(error).splitlines()[0]})")
            os._exit(1)
        time.sleep(min(watchdog.start_s, watchdog.hang_s) / HEARTBEATS)


def _dump_flight_recorder(path: Path) -> None:
    """Write NCCL's last operations in this process, as torch does when NCCL itself times out. Untested on a GPU."""
    if dump := getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None):
        with suppress(OSError):
            path.write_bytes(dump())


def describe_hang(before: list[tuple[int, int, str]], after: list[tuple[int, int, str]]) -> str:
    """Name the hanging ranks: silent ones, else the least advanced. An entry: beats, number and words of progress."""
    silent = [rank for rank, (then, now) in enumerate(zip(before, after, strict=True)) if then[0] == now[0]]
    least = min(number for _, number, _ in after)
    hanging = silent or [rank for rank, (_, number, _) in enumerate(after) if number == least]
    verb = "said nothing after" if silent else "hangs at" if len(hanging) == 1 else "hang at"
    return f"rank{'s' * (len(hanging) > 1)} {', '.join(map(str, hanging))} of {len(after)} {verb} {after[hanging[0]][2]}"


@contextmanager
def stop_requests(handle: Callable[[int], object] = int, *, more: tuple[signal.Signals, ...] = ()) -> Iterator[list[int]]:
    """A list that receives the signals that ask this process to stop. In a thread other than the main one: none.

    Args:
        handle: called with each of them. more: signals beside STOP_SIGNALS.
    """
    requests: list[int] = []

    def receive(number: int, _: object) -> None:
        requests.append(number)
        handle(number)

    numbers = (*STOP_SIGNALS, *more) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StepVotes:
    """Whether any rank got a request to stop, and the state whose files all ranks have written.

    Known a step later: no step waits for the answer of other machines.
    """

    def __init__(self) -> None:
        self.votes, self.pending = torch.zeros(2, dtype=torch.float64), None

    def exchange(self, stop: bool, written: int) -> tuple[bool, int]:
        """Any `stop` and the least `written` that the ranks gave to the call before. Every rank takes part."""
        answer = self._answer()
        self.votes = torch.tensor([stop, -written], dtype=torch.float64)
        self.pending = dist.all_reduce(self.votes, op=dist.ReduceOp.MAX, async_op=True)
        return answer

    def last(self, stop: bool) -> bool:
        """Whether this request, or that of the call before, reached any rank."""
        before, _ = self.exchange(stop, 0)
        return self._answer()[0] or before

    def _answer(self) -> tuple[bool, int]:
        if self.pending:
            self.pending.wait()
        self.pending = None
        stop, written = self.votes.tolist()
        return bool(stop), -int(written)


def gather_round_robin(values: list) -> list:
    """The lists of all ranks as one: an item of every rank in turn."""
    lists: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, values)
    absent = object()
    return [value for row in zip_longest(*lists, fillvalue=absent) for value in row if value is not absent]
