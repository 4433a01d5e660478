"""Many jobs on a Dask cluster: this machine's own processes, or whatever scheduler runs somewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from scaling4d.clips.examine import Curation
from scaling4d.records import UserError

CONNECT_S = 5  # to a running scheduler
ONE_THREAD = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}
# of a worker; Dask's own also has MALLOC_TRIM_THRESHOLD_, which gives the memory of every picture back: a fifth more time
WAITING = 4  # jobs that the scheduler holds for each thread: its memory does not grow with the number of videos


@contextmanager
def workers(curation: Curation) -> Iterator[Any]:
    """A Dask client of the running scheduler `cluster`, or of as many one-thread processes as `workers` says."""
    import dask
    from distributed import Client, LocalCluster

    if curation.cluster:
        try:
            running = Client(curation.cluster, timeout=CONNECT_S)
        except (OSError, ValueError) as error:
            raise UserError(f"no Dask scheduler answers at {curation.cluster!r} ({error}); set clips.Curation.cluster") from error
        with running as client:
            yield client
        return
    with dask.config.set({"distributed.nanny.pre-spawn-environ": ONE_THREAD}):
        local = LocalCluster(
            n_workers=curation.workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            worker_dashboard_address=None,
            memory_limit=0,
            silence_logs=logging.CRITICAL,
        )
    with local, Client(local) as client:
        yield client


def finish(client: Any, work: Callable, jobs: Iterable[tuple], title: str, *, total: int) -> Iterator[tuple[int, Any]]:
    """(index of the job, its future) as they end, with a progress bar on stderr. A worker that dies costs its jobs' time only."""
    from distributed import as_completed
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    left = iter(enumerate(jobs))
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task(title, total=total)
        running: dict[Any, int] = {}
        ended = as_completed([])

        def top_up() -> None:
            """As many jobs as the workers that there are now can soon begin; more workers may have joined."""
            ahead = WAITING * max(1, sum(client.ncores().values()))
            for index, job in islice(left, max(ahead - len(running), 0)):
                future = client.submit(work, *job, pure=False)
                running[future] = index
                ended.add(future)

        top_up()
        while running:
            future = next(ended)
            yield running.pop(future), future
            progress.advance(bar)
            if len(running) % WAITING == 0:  # asking for the workers is a message to the scheduler
                top_up()
