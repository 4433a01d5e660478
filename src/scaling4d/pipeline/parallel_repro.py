"""`python -m scaling4d.pipeline.parallel_repro JOBS`: the result of `dvc repro`, to the byte, with JOBS stages at once.

DVC runs one stage after the other. Here a `dvc repro` of its own runs each stage as soon as its inputs are made.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter

Graph = Mapping[str, set[str]]  # stage -> the stages that it needs


def parse_dag(dot: str) -> Graph:
    """The graph in the output of `dvc dag --dot`: a line `"stage";` a stage, `"needed" -> "stage";` an edge."""
    graph: dict[str, set[str]] = {}
    for line in dot.splitlines():
        match line.split('"')[1::2]:
            case [stage]:
                graph.setdefault(stage, set())
            case [needed, stage]:
                graph.setdefault(stage, set()).add(needed)
    return graph


def chain_lengths(graph: Graph) -> dict[str, int]:
    """By stage, the length of the longest chain of stages that need it."""
    lengths = dict.fromkeys(graph, 0)
    for stage in reversed([*TopologicalSorter(graph).static_order()]):
        for needed in graph[stage]:
            lengths[needed] = max(lengths[needed], lengths[stage] + 1)
    return lengths


def run_graph(graph: Graph, jobs: int, execute: Callable[[str], None]) -> None:
    """Execute all stages, at most `jobs` at a time.

    Of the stages that can start, the one with the longest chain behind it starts first, then the first by name. An
    exception of `execute` ends the run after the running stages.
    """
    lengths, sorter = chain_lengths(graph), TopologicalSorter(graph)
    sorter.prepare()
    ready: list[str] = []
    running: dict[Future, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=lambda stage: (-lengths[stage], stage))
            while ready and len(running) < jobs:
                stage = ready.pop(0)
                running[pool.submit(execute, stage)] = stage
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                sorter.done(running.pop(done))


def repro(stage: str) -> None:
    """Run one stage with DVC."""
    subprocess.run(["dvc", "--wait-for-lock", "repro", "--single-item", stage], check=True)


def main(jobs: str) -> None:
    """Run all stages of dvc.yaml. Exits with one line for a wrong JOBS or a failed command; after Ctrl-C with 130."""
    if not jobs.isdecimal() or int(jobs) < 1:
        sys.exit(f"error: JOBS is {jobs!r}; needed a whole number from 1 up")
    try:
        dot = subprocess.run(["dvc", "dag", "--dot"], check=True, stdout=subprocess.PIPE, text=True).stdout
        run_graph(parse_dag(dot), int(jobs), repro)
    except KeyboardInterrupt:  # the running stages have it too, and have ended
        sys.exit(128 + signal.SIGINT)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{' '.join(error.cmd)}` failed; its output above has the reason")


if __name__ == "__main__":
    main(sys.argv[1])
