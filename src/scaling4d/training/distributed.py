"""Several processes working as one: on a CPU, results depend on their number and on nothing else of the machine.

A rank on a CPU computes with one thread, because bits depend on the number of threads; several ranks use the cores.
They are forked, so torch is imported once; the parent must not have computed with it before. In a process that torchrun started,
that process is the rank.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate, count, groupby, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from scaling4d.records import Preempted, UserError

T = TypeVar("T")

STARTED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun sets
STOP = (signal.SIGTERM, signal.SIGUSR1)  # what asks a run to save its state and stop
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
TOGETHER = 2**23  # numbers that ranks sum in one message
BEATS = 10  # how often a rank says where it is, until it counts as hanging


def run(work: Callable[..., T], *, ranks: int, device: str = "cpu", hang_s: float | None = None, **arguments: Any) -> T:
    """Call `work(rank=, ranks=, **arguments)` in every rank, inside a process group; return a copy of what rank 0 returns, or,
    in a process that torchrun started, what this rank returns.

    Args:
        device: cpu or cuda. hang_s: when no rank has moved for so long (see `at`), the run is ended and who hangs is named.
    Raises:
        UserError: as a rank raised it; a rank hangs; torchrun started another number of ranks.
        Preempted: as the ranks raised it.
        RuntimeError: a rank failed or was killed; the others are ended.
    """
    if started():
        return _join(work, ranks, device, hang_s, arguments)
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as meeting, _lifeline() as alive:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        given = (ranks, meeting, device, hang_s, arguments)
        children = [
            context.Process(target=_child, args=(work, rank, *given, pipes[rank][1], alive), daemon=True) for rank in range(ranks)
        ]
        for child in children:
            child.start()
        for _, sender in pipes:
            sender.close()
        try:
            with _handed_on(children):
                return _collect(children, [receiver for receiver, _ in pipes])
        finally:
            for child in children:
                child.kill()
                child.join()


def started() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return os.environ.keys() >= STARTED


def leads() -> bool:
    """Whether this process writes what the ranks made: the one that forks them, or rank 0 of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _collect(children: list, receivers: list) -> Any:
    first = None
    waiting = dict(zip(receivers, range(len(receivers)), strict=True))
    while waiting:
        for receiver in multiprocessing.connection.wait(list(waiting)):
            rank = waiting.pop(receiver)
            try:
                kind, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RuntimeError(_cause(children)) from None
            if kind == "refused":
                raise UserError(value)
            if kind == "preempted":
                raise Preempted(value)
            first = value if rank == 0 else first
    return first


def _cause(children: list) -> str:
    """Which rank ended the run: a killed one first, since the others fail when they miss it."""
    for child in children:
        child.join(timeout=1)
    ended = [(rank, child.exitcode) for rank, child in enumerate(children) if child.exitcode]
    rank, code = min(ended, key=lambda item: (item[1] > 0, item[0]))
    why = signal.Signals(-code).name if code < 0 else f"exit code {code}; its own message is above"
    return f"rank {rank} of {len(children)} ended without a result ({why})"


@contextmanager
def _lifeline() -> Iterator[tuple[int, int]]:
    """A pipe whose end in this process shows its ranks that it still lives."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


@contextmanager
def _handed_on(children: list) -> Iterator[None]:
    """While ranks work, a request to stop goes to all of them; those that have no answer to it end.

    Raises:
        Preempted: so they did.
    """
    asked = []

    def hand_on(number: int, _: object) -> None:
        asked.append(number)
        for child in children:
            if child.is_alive():
                os.kill(child.pid, number)

    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, hand_on) for number in STOP}
        yield
    except RuntimeError as error:
        if asked:
            raise Preempted("stopped between two states; the same command goes on from the last one, or begins") from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _child(
    work: Callable,
    rank: int,
    ranks: int,
    meeting: str,
    device: str,
    hang_s: float | None,
    arguments: dict,
    sender: Any,
    alive: tuple,
) -> None:
    for number in STOP:
        signal.signal(number, signal.SIG_DFL)  # the parent's handler is not this process's
    os.close(alive[1])
    threading.Thread(target=_leave_with_parent, args=(alive[0],), daemon=True).start()
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = dist.FileStore(f"{meeting}/store", ranks)
        _enter(store, rank, ranks, rank, device, hang_s, lambda hung: _send(sender, "refused", hung))
        _send(sender, "done", work(rank=rank, ranks=ranks, **arguments))
        dist.destroy_process_group()
    except UserError as error:
        _send(sender, "refused", str(error))
    except Preempted as preempted:
        _send(sender, "preempted", str(preempted))


def _leave_with_parent(end: int) -> None:
    os.read(end, 1)  # nothing is ever written: this returns when the last other end is closed, so when the parent is gone
    os._exit(1)


def _send(sender: Any, kind: str, value: Any) -> None:
    """By value: `sender.send` would hand over a tensor as a file that is gone when this process has ended."""
    sender.send_bytes(pickle.dumps((kind, value)))


def _join(work: Callable[..., T], ranks: int, device: str, hang_s: float | None, arguments: dict) -> T:
    rank, world, here = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world != ranks:
        raise UserError(
            f"torchrun started {world} ranks, and the settings are for {ranks}; set pretrain.Training.ranks={world}, or "
            f"readout.shared.Evaluation.ranks={world}"
        )
    if world == here and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives its ranks: those that are started again begin anew
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    _enter(
        store, rank, ranks, int(os.environ["LOCAL_RANK"]), device, hang_s, lambda hung: print(f"error: {hung}", file=sys.stderr)
    )
    result = work(rank=rank, ranks=ranks, **arguments)
    dist.destroy_process_group()
    return result


def _enter(
    store: dist.Store, rank: int, ranks: int, local: int, device: str, hang_s: float | None, tell: Callable[[str], None]
) -> None:
    torch.set_num_threads(1)
    _keep_freed_memory()
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} needs a GPU of its own, and this machine has {torch.cuda.device_count()}; set "
                "pretrain.Training.device to cpu, or readout.tuning.Tuning.device, or fewer ranks a machine"
            )
        torch.cuda.set_device(local)
    if hang_s is not None:
        watched = (dist.PrefixStore("watch", store), rank, ranks, hang_s, tell)
        threading.Thread(target=_watch, args=watched, daemon=True).start()
    patience = {} if hang_s is None else {"timeout": timedelta(seconds=4 * hang_s)}  # later than the watch, which knows more
    dist.init_process_group(BACKENDS[device], store=dist.PrefixStore("group", store), rank=rank, world_size=ranks, **patience)


def _keep_freed_memory() -> None:
    """What this process frees stays its own: handing pages back and forth took a quarter of a small model's step.

    Where the C library is not glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
            mallopt(parameter, value)


_place: tuple[int, str] | None = (0, "the start")  # of this process, for its watch


def at(what: str, number: int | None = None) -> None:
    """Say where this rank is, for the case that one hangs: in words, and by a number that never falls (None: as before)."""
    global _place  # noqa: PLW0603
    _place = (_place[0] if number is None and _place else number or 0, what)


def unwatched() -> None:
    """From here on this rank may take as long as it needs."""
    global _place  # noqa: PLW0603
    _place = None


def _watch(store: dist.Store, rank: int, ranks: int, hang_s: float, tell: Callable[[str], None]) -> None:
    """Ends this process when it has stood still for `hang_s`, and says for which ranks everyone waits."""
    place, since, seen = _place, time.monotonic(), []
    for beat in count():
        now = _place
        if now is None:
            return
        try:
            store.set(str(rank), json.dumps([beat, *now]))
            if now != place:
                place, since, seen = now, time.monotonic(), []
            elif time.monotonic() - since > hang_s:
                seen.append(_places(store, ranks))
            if len(seen) > 3:  # time enough for everyone who lives to say so
                verdict = f"{behind(seen[0], seen[-1])}; if it is only slow, raise hang_s, {hang_s:g} s, in its settings"
                tell(store.compare_set("verdict", "", verdict).decode())  # that of the first: who has ended says nothing
                os._exit(1)
        except dist.DistError as error:
            tell(f"rank 0 of {ranks}, where the ranks say how far they are, does not answer ({str(error).splitlines()[0]})")
            os._exit(1)
        time.sleep(hang_s / BEATS)


def _places(store: dist.Store, ranks: int) -> list[tuple[int, int, str]]:
    """Of every rank: how often it said where it is, and that."""
    return [tuple(json.loads(store.get(str(rank)))) if store.check([str(rank)]) else (0, 0, "the start") for rank in range(ranks)]


def behind(before: list[tuple[int, int, str]], after: list[tuple[int, int, str]]) -> str:
    """Who hangs, in words: ranks that say nothing any more, else those that got less far than others."""
    silent = [rank for rank, (then, now) in enumerate(zip(before, after, strict=True)) if then[0] == now[0]]
    least = min(number for _, number, _ in after)
    found = silent or [rank for rank, (_, number, _) in enumerate(after) if number == least]
    does = "said nothing after" if silent else "hangs at" if len(found) == 1 else "hang at"
    return f"rank{'s' * (len(found) > 1)} {', '.join(map(str, found))} of {len(after)} {does} {after[found[0]][2]}"


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every gradient becomes its mean over the ranks, which all call this after the same backward pass.

    Source: what torch's DistributedDataParallel does; it takes a second to import, and its sums after the first step depend on
    when that was, so that a resumed run would have other bits.
    """
    if dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    first = list(accumulate((g.numel() for g in gradients), initial=0))
    for _, group in groupby(zip(gradients, first, strict=False), lambda item: item[1] // TOGETHER):
        some = [gradient for gradient, _ in group]
        flat = torch.cat([gradient.flatten() for gradient in some])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(some, flat.split([gradient.numel() for gradient in some]), strict=True):
            gradient.copy_(mean.view_as(gradient))


@contextmanager
def stop_wanted() -> Iterator[list[int]]:
    """A list that stays empty until someone asks this process to save its state and stop."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in STOP}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def anyone(wanted: list[int]) -> bool:
    """Whether someone asked any rank: all ranks stop after the same step."""
    flag = torch.tensor([float(bool(wanted))])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def stopped(step: int, steps: int) -> str:
    """What a run says that saved its state and stops."""
    return f"stopped after step {step} of {steps}, as asked; the same command goes on from there"


def gather(values: list) -> list:
    """What every rank holds, joined: one item of every rank in turn, as long as it has any."""
    lists: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, values)
    nothing = object()
    return [value for row in zip_longest(*lists, fillvalue=nothing) for value in row if value is not nothing]
