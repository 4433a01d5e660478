"""`python -m scaling4d.ahead JOBS`: what `dvc repro` does, to the byte, with JOBS stages at a time.

DVC runs one stage after the other. Here each runs by a `dvc repro` of its own, as soon as those that it waits for are done.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter

Graph = Mapping[str, set[str]]  # stage -> those that it waits for


def parse(dot: str) -> Graph:
    """Of what `dvc dag --dot` prints: a line `"stage";` for each, and `"stage" -> "one that waits for it";`."""
    found: dict[str, set[str]] = {}
    for line in dot.splitlines():
        match line.split('"')[1::2]:
            case [stage]:
                found.setdefault(stage, set())
            case [stage, waiting]:
                found.setdefault(waiting, set()).add(stage)
    return found


def chains(graph: Graph) -> dict[str, int]:
    """How many stages in a row wait for each."""
    length = dict.fromkeys(graph, 0)
    for stage in reversed([*TopologicalSorter(graph).static_order()]):
        for needed in graph[stage]:
            length[needed] = max(length[needed], length[stage] + 1)
    return length


def run(graph: Graph, jobs: int, execute: Callable[[str], None]) -> None:
    """Execute all stages, at most `jobs` at a time.

    Of those that could begin, the one with the longest chain behind it does, then the first by name. What `execute` raises ends
    the run when the stages under way are done.
    """
    length, sorter = chains(graph), TopologicalSorter(graph)
    sorter.prepare()
    ready: list[str] = []
    running: dict[Future, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=lambda stage: (-length[stage], stage))
            while ready and len(running) < jobs:
                stage = ready.pop(0)
                running[pool.submit(execute, stage)] = stage
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                sorter.done(running.pop(done))


def repro(stage: str) -> None:
    subprocess.run(["dvc", "--wait-for-lock", "repro", "--single-item", stage], check=True)


def main(jobs: str) -> None:
    if not jobs.isdecimal() or int(jobs) < 1:
        sys.exit(f"error: JOBS is {jobs!r}; needed a whole number from 1 up")
    try:
        dot = subprocess.run(["dvc", "dag", "--dot"], check=True, stdout=subprocess.PIPE, text=True).stdout
        run(parse(dot), int(jobs), repro)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{' '.join(error.cmd)}` failed; why, it says above")


if __name__ == "__main__":
    main(sys.argv[1])
