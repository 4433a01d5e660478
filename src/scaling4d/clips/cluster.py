"""Jobs on a Dask cluster: processes of this machine, or a scheduler that runs elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from scaling4d.clips.settings import WorkersConfig
from scaling4d.records import UserError

CONNECT_S = 5  # to a running scheduler
# Of a worker. Dask's own environment also sets MALLOC_TRIM_THRESHOLD_: memory of each picture is returned, +20 % time.
ONE_THREAD = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}
QUEUED = 4  # jobs that the scheduler holds for each thread: its memory does not grow with the number of videos


@contextmanager
def dask_client(workers: WorkersConfig) -> Iterator[Any]:
    """A Dask client of a running scheduler (UserError: no answer), or of one-thread processes here."""
    import dask
    from distributed import Client

    if workers.cluster:
        try:
            client = Client(workers.cluster, timeout=CONNECT_S)
        except (OSError, ValueError) as error:
            raise UserError(f"no Dask scheduler answers at {workers.cluster!r} ({error}); set clips.Workers.cluster") from error
    else:
        local = {"n_workers": workers.processes, "threads_per_worker": 1, "processes": True, "memory_limit": 0}
        local |= {
            "host": "127.0.0.1",
            "dashboard_address": None,
            "worker_dashboard_address": None,
            "silence_logs": logging.CRITICAL,
        }
        deaths = {"distributed.scheduler.allowed-failures": 1}  # of workers; then a job is tried once more alone
        with dask.config.set({"distributed.nanny.pre-spawn-environ": ONE_THREAD, **deaths}):
            client = Client(**local)
    with client:
        yield client


def run_jobs(client: Any, function: Callable, jobs: Iterable[tuple], title: str, *, total: int) -> Iterator[tuple[int, Any]]:
    """(index of the job, its future) as they finish, with a progress bar on stderr.

    Jobs of a dead worker run again. A job that several workers died with runs alone in the end: it may be innocent.
    Raises UserError: a worker lacks a package.
    """
    from distributed import KilledWorker, as_completed
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    waiting, killed, alone = iter(enumerate(jobs)), [], False
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task(title, total=total)
        running: dict[Any, tuple[int, tuple]] = {}
        finished = as_completed([])
        while True:
            ready = []
            if len(running) % QUEUED == 0:  # the number of workers, which may change, is a message to the scheduler
                limit = QUEUED * max(1, sum(client.ncores().values()))
                ready = list(islice(waiting, max(limit - len(running), 0)))
            if not running and not ready and killed:
                ready, alone = [killed.pop()], True
            submitted = {client.submit(function, *job, pure=False): (index, job) for index, job in ready}
            finished.update(submitted)
            running |= submitted
            if not running:
                return
            future = next(finished)
            index, job = running.pop(future)
            if isinstance(future.exception(), KilledWorker) and not alone:
                killed.append((index, job))
                continue
            if isinstance(future.exception(), ImportError):
                needed = "needed this package with its requirements on every worker; install it there, run again"
                raise UserError(f"{title}: a Dask worker answers {future.exception()}; {needed}") from future.exception()
            yield index, future
            progress.advance(bar)
