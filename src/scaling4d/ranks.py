"""Several one-thread processes working as one: results depend on their number and on nothing else of the machine.

A rank computes with one thread, because bits depend on the number of threads; several ranks use the cores.
They are forked, so torch is imported once; the parent must not have computed with it before.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaling4d.records import UserError

T = TypeVar("T")


def run(work: Callable[..., T], *, ranks: int, **arguments: Any) -> T:
    """Call `work(rank=, ranks=, **arguments)` in every rank, inside a gloo process group; return a copy of what rank 0 returns.

    Raises:
        UserError: as a rank raised it.
        RuntimeError: a rank failed or was killed; the others are ended.
    """
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as meeting:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        children = [
            context.Process(
                target=_child, args=(work, rank, ranks, f"file://{meeting}/store", pipes[rank][1], arguments), daemon=True
            )
            for rank in range(ranks)
        ]
        for child in children:
            child.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect(children, [receiver for receiver, _ in pipes])
        finally:
            for child in children:
                child.kill()
                child.join()


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


def _child(work: Callable, rank: int, ranks: int, meeting: str, sender: Any, arguments: dict) -> None:
    try:
        _enter(rank, ranks, meeting)
        _send(sender, "done", work(rank=rank, ranks=ranks, **arguments))
        dist.destroy_process_group()
    except UserError as error:
        _send(sender, "refused", str(error))


def _send(sender: Any, kind: str, value: Any) -> None:
    """By value: `sender.send` would hand over a tensor as a file that is gone when this process has ended."""
    sender.send_bytes(pickle.dumps((kind, value)))


def _enter(rank: int, ranks: int, meeting: str) -> None:
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)


def parallel(module: nn.Module, *, some_unused: bool = False) -> nn.Module:
    """The module, called alike in every rank; its gradients become their mean over the ranks.

    some_unused: parameters exist that do not reach the loss.
    """
    return DistributedDataParallel(module, gradient_as_bucket_view=True, find_unused_parameters=some_unused)


def gather(values: list) -> list:
    """What every rank holds, joined: one item of every rank in turn, as long as it has any."""
    lists: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, values)
    nothing = object()
    return [value for row in zip_longest(*lists, fillvalue=nothing) for value in row if value is not nothing]
