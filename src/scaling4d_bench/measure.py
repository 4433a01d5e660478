"""How everything in this room is measured: contestants do the same work in turns; medians, spread, ratios within one run."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from scaling4d.artifacts import processor
from scaling4d.records import write_json

WIDTH = 130  # of tables that do not go to a terminal
REASON = 160  # letters of why a contestant is not measured
CANNOT_LOAD = (ImportError, OSError, RuntimeError)  # what a library raises that is missing, or misses one itself


@dataclass(frozen=True)
class Contestant:
    """`work` does `units` of the same thing as the others and returns the seconds it took."""

    name: str
    work: Callable[[], float]
    units: float


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """The same work, returning its seconds."""

    def clocked() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return clocked


@dataclass(frozen=True)
class Raw:
    """By contestant, one number a repeat: seconds, and seconds that all threads of this process computed meanwhile."""

    seconds: dict[str, list[float]]
    cpu_s: dict[str, list[float]]


def race(contestants: Sequence[Contestant], *, repeats: int) -> Raw:
    """Call everyone once without counting, then once a repeat; who starts, turns.

    What slows the machine for a while then slows all of them; on a machine that others use too, trust `cpu_s`.
    """
    for contestant in contestants:
        contestant.work()
    raw = Raw({c.name: [] for c in contestants}, {c.name: [] for c in contestants})
    for repeat in range(repeats):
        first = repeat % len(contestants)
        for contestant in [*contestants[first:], *contestants[:first]]:
            start_s = time.process_time()
            raw.seconds[contestant.name].append(contestant.work())
            raw.cpu_s[contestant.name].append(time.process_time() - start_s)
    return raw


def rows(contestants: Sequence[Contestant], raw: Raw, *, ours: str) -> list[dict[str, Any]]:
    """Per contestant: units a second at the median time, at the quartiles (the spread), over that of `ours`; cpu_s a unit."""
    units = {contestant.name: contestant.units for contestant in contestants}
    base = units[ours] / float(np.median(raw.seconds[ours]))
    found = []
    for name, count in units.items():
        slow, middle, quick = (count / float(seconds) for seconds in np.percentile(raw.seconds[name], (75, 50, 25)))
        row = {"name": name, "per_s": middle, "per_s_low": slow, "per_s_high": quick, "over_ours": middle / base}
        found.append(row | {"cpu_s": float(np.median(raw.cpu_s[name])) / count})
    return found


def times_as_fast(raw: Raw, name: str, other: str) -> dict[str, float]:
    """How many times as fast as the other, who does the same work: the median over the repeats, and the quartiles."""
    low, middle, high = np.percentile(np.divide(raw.seconds[other], raw.seconds[name]), (25, 50, 75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def available(makers: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each maker returns, by name; and why not, in one line, for those whose library cannot be loaded."""
    made, missing = {}, {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except CANNOT_LOAD as error:
            missing[name] = " ".join(str(error).split())[:REASON] or type(error).__name__
    return made, missing


def machine() -> dict[str, Any]:
    """What the numbers depend on; not whose machine it is."""
    return {"cpu": processor() or platform.machine(), "cores": cores(), "system": f"{platform.system()} {platform.machine()}"}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch computes in so many threads here; a rank has one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plain(record: Any) -> dict[str, Any]:
    """A dataclass as JSON takes it."""
    return json.loads(json.dumps(asdict(record)))


def busy() -> float:
    """How many cores others keep busy right now, over the last minute; said aloud, since it spoils what follows."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"others compute on this machine: load {load:.1f} on {cores()} cores")
    return load


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of Python and of those that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(
    name: str,
    out: Path,
    *,
    settings: Mapping[str, Any],
    libraries: Mapping[str, str],
    raw: Mapping[str, Any],
    found: Mapping[str, Any],
    not_measured: Mapping[str, str],
) -> Path:
    """Write `<out>/<name>.json`: what was measured, on what, with which settings, and every single time."""
    out.mkdir(parents=True, exist_ok=True)
    path, partial = out / f"{name}.json", out / f".{name}.json.partial"
    content = {
        "bench": name,
        "machine": machine(),
        "versions": dict(libraries),
        "settings": dict(settings),
        "raw": dict(raw),
        "found": dict(found),
        "not_measured": dict(not_measured),
    }
    write_json(partial, content)
    partial.rename(path)
    return path


def show(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table on stdout; all columns but the first are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for line in lines:
        table.add_row(*line)
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def show_missing(not_measured: Mapping[str, str]) -> None:
    for name, reason in not_measured.items():
        print(f"{name}: not measured ({reason})")


def speed(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """A row of `rows` as text: units a second, their quartiles, over ours."""
    return f"{row['per_s']:.2f}", f"{row['per_s_low']:.2f} to {row['per_s_high']:.2f}", f"{row['over_ours']:.2f}"


@dataclass(frozen=True)
class Memory:
    """Of a process tree at one moment, in bytes. Pages that processes share are counted once in `total`."""

    time_s: float
    total: int
    peak_main: int
    peak_below: int  # of the largest process below the main one


@contextmanager
def memory(pid: int, *, every_s: float) -> Iterator[list[Memory]]:
    """A list that a thread fills while the block runs. Linux only: it reads /proc."""
    samples: list[Memory] = []
    over = threading.Event()

    def sample() -> None:
        peaks: dict[int, int] = {}
        while True:
            family = [pid, *_below(pid)]
            parts = [_fields(one, "smaps_rollup").get("Pss", 0) for one in family]
            for one in family:
                peaks[one] = max(peaks.get(one, 0), _fields(one, "status").get("VmHWM", 0))
            below = max((peak for one, peak in peaks.items() if one != pid), default=0)
            samples.append(Memory(time.perf_counter(), sum(parts), peaks[pid], below))
            if over.wait(every_s):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def slope_per_minute(samples: Sequence[Memory]) -> float:
    """Bytes a minute by which the total grows: a straight line by least squares through the samples."""
    times = np.array([sample.time_s for sample in samples]) / 60
    return float(np.polyfit(times - times[0], [sample.total for sample in samples], 1)[0])


def _below(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in path.read_text().split()]
        except OSError:  # it ended meanwhile
            continue
        for child in children:
            found += [child, *_below(child)]
    return found


def _fields(pid: int, name: str) -> dict[str, int]:
    """The lines `Key:  123 kB` of a file in /proc, in bytes; nothing if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    except OSError:
        return {}
    parts = (line.replace(":", " ").split() for line in lines)
    return {words[0]: 1024 * int(words[1]) for words in parts if len(words) == 3 and words[2] == "kB"}
