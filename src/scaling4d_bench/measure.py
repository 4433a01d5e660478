"""Measuring, for all benchmarks: workloads take turns in one run; medians, quartiles, ratios; tables, JSON, memory."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import InitVar, asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from scaling4d.artifacts import processor
from scaling4d.records import write_json

SEED = 0
WIDTH = 130  # of tables that are not printed on a terminal
MAX_REASON = 160  # characters
CANNOT_LOAD = (ImportError, AttributeError, OSError, RuntimeError)  # of a missing or other library
SPEED = {  # columns of a table of `throughput`
    "": "{name}",
    "clips/s": "{per_s:.2f}",
    "quartiles": "{per_s_low:.2f} to {per_s_high:.2f}",
    "times ours": "{over_ours:.2f}",
}


@dataclass(frozen=True)
class Timings:
    """By workload, one number a turn: seconds, and seconds of computing by all threads of this process."""

    seconds: dict[str, list[float]]
    cpu_s: dict[str, list[float]]


@dataclass(frozen=True)
class Measurements:
    """Content of a benchmark's JSON file.

    settings: with a GPU as "device", the file's name ends with the GPU's. raw: every single time. results: all figures
    that follow. not_measured: workloads -> the reason why not. versions: of Python and of the installed libraries.
    """

    bench: str
    settings: dict[str, Any]
    libraries: InitVar[Sequence[str]]
    raw: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {"python": platform.python_version()})

    def __post_init__(self, libraries: Sequence[str]) -> None:
        load = os.getloadavg()[0]
        if load > 0.5:
            print(f"others compute on this machine: load {load:.1f} on {cores()} cores")
        self.settings.update(load_before=load, seed=SEED)
        for name in libraries:
            with suppress(metadata.PackageNotFoundError):
                self.versions[name] = metadata.version(name)

    def load(self, loaders: Mapping[str, Callable[[], Any]], suffix: str = "") -> dict[str, Any]:
        """Results of the loaders by name. `not_measured` receives libraries that cannot be loaded."""
        loaded = {}
        for name, load in loaders.items():
            try:
                loaded[name] = load()
            except CANNOT_LOAD as error:
                self.not_measured[name + suffix] = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        return loaded

    def write(self, out: Path) -> Path:
        """Print what is not measured, and write `<out>/<bench>.json`."""
        for name, reason in self.not_measured.items():
            print(f"{name}: not measured ({reason})")
        device, system = self.settings.get("device", "cpu"), f"{platform.system()} {platform.machine()}"
        name = self.bench if device == "cpu" else f"{self.bench}-{device.replace(' ', '-').lower()}"
        machine = {"cpu": processor() or platform.machine(), "cores": cores(), "system": system}
        out.mkdir(parents=True, exist_ok=True)
        partial = out / f".{name}.json.partial"
        write_json(partial, asdict(self) | {"bench": name, "machine": machine})
        return partial.rename(out / f"{name}.json")


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def timed(work: Callable[[], object], wait: Callable[[], object] = int) -> Callable[[], float]:
    """The same work, returning its seconds. wait: for a device to finish, before the work and as a part of it."""

    def run() -> float:
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    return run


def take_turns(runs: Mapping[str, Callable[[], float]], *, repeats: int) -> Timings:
    """Run every workload once without counting, then once a repeat; another one is first in every repeat.

    A temporary slowdown of the machine then slows all of them; on a machine that others use too, trust `cpu_s`.

    Args:
        runs: by workload, a function that returns its seconds.
    """
    for run in runs.values():
        run()
    timings, names = Timings({name: [] for name in runs}, {name: [] for name in runs}), list(runs)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in [*names[first:], *names[:first]]:
            start_s = time.process_time()
            timings.seconds[name].append(runs[name]())
            timings.cpu_s[name].append(time.process_time() - start_s)
    return timings


def throughput(timings: Timings, units: Mapping[str, float]) -> list[dict[str, Any]]:
    """Per workload: units a second at the median time, at its quartiles, over the median of the first; cpu_s a unit.

    Args:
        units: of work in a turn, by workload.
    """
    rows: list[dict[str, Any]] = []
    for name, seconds in timings.seconds.items():
        low, median, high = (units[name] / float(s) for s in np.percentile(seconds, (75, 50, 25)))
        row = {"name": name, "per_s": median, "per_s_low": low, "per_s_high": high}
        row["over_ours"] = median / (rows[0] if rows else row)["per_s"]
        rows.append(row | {"cpu_s": float(np.median(timings.cpu_s[name])) / units[name]})
    return rows


def speedup(timings: Timings, name: str, base: str) -> dict[str, float]:
    """How many times as fast as `base` on the same work: median and quartiles of the ratios within one repeat."""
    low, median, high = np.percentile(np.divide(timings.seconds[base], timings.seconds[name]), (25, 50, 75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print a table. columns: heading -> format of a row; a cell stays empty where the row lacks the value."""
    from rich.console import Console
    from rich.table import Table

    console, lines = Console(), Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        lines.add_column(column, justify="right" if number else "left")
    for row in rows:
        cells = dict.fromkeys(columns, "")
        for column, text in columns.items():
            with suppress(KeyError):
                cells[column] = text.format_map(row)
        lines.add_row(*cells.values())
    (console if console.is_terminal else Console(width=WIDTH)).print(lines)


def process_memory(pid: int) -> dict[int, tuple[int, int]]:
    """Bytes of a process and of all below it, by pid: now, where processes share the bytes of a page, and at the peak.

    Linux only: it reads /proc.
    """
    import psutil

    memory, tree = {}, [psutil.Process(pid)]
    tree += tree[0].children(recursive=True)
    for process in tree:
        with suppress(psutil.Error, OSError, TypeError):  # it ended meanwhile
            now = process.memory_full_info().pss
            peak = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]
            memory[process.pid] = (now, max(now, 1024 * int(peak)))  # the kernel's peak may lag by some pages
    return memory
