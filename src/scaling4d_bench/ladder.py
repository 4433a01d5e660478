"""`scaling4d bench pretrain --ladder`: training steps of the default profile's points, beside those of a revision.

One thread computes at a time. The share of the peak and the ratios to a revision are those of CPU seconds, which hardly
count what others compute on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import scaling4d
from scaling4d.provenance import git_or_error
from scaling4d.records import UserError
from scaling4d_bench import measure
from scaling4d_bench.ladder_worker import PRODUCT
from scaling4d_bench.measure import Measurements, Timings

WORKER = Path(__file__).with_name("ladder_worker.py")
COLUMNS = {  # of a row and `shown`
    "": "{name}",
    "parameters": "{parameters:,}",
    "clip": "{shape[clip]}",
    "patch": "{shape[patch]}",
    "hidden": "{mask_ratio:.0%}",
    "batch": "{batch}",
    "clips/s": "{per_s:.1f}",
    "quartiles": "{per_s_low:.1f} to {per_s_high:.1f}",
    "CPU ms": "{cpu_ms:.2f}",
    "MFLOP": "{mflop:.0f}",
    "of the peak": "{share_of_peak:.0%}",
}


class Checkout:
    """The measuring process of one checkout. `with` starts and ends it.

    Args:
        root: of the checkout. source: its folder `src`.
    Attributes:
        facts: the worker's first line.
    """

    def __init__(self, name: str, root: Path, source: Path) -> None:
        self.name, self.root, self.source = name, root, source

    def __enter__(self) -> Self:
        env = os.environ | {"PYTHONPATH": str(self.source), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-P", str(WORKER)], cwd=self.root, env=env, **pipes)
        self.facts = self._answer()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def turn(self, name: str) -> tuple[float, float]:
        """Seconds and CPU seconds of a turn of a point, or of the matrix product."""
        print(name, file=self.process.stdin, flush=True)
        return tuple(self._answer())

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            reason = self.process.communicate()[1].strip().splitlines() or ["no output"]
            raise UserError(f"the steps of {self.name} cannot be measured: {reason[-1]}")
        return json.loads(line)


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A temporary git worktree of a revision. Raises UserError for a revision that git does not know."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkout"
        git_or_error("worktree", "add", "--quiet", "--detach", str(path), revision)
        try:
            yield path
        finally:
            git_or_error("worktree", "remove", "--force", str(path))


def bench(out: Path, *, repeats: int, against: str | None) -> Path:
    """Measure, print a table, write `<out>/ladder.json`.

    Args:
        against: a git revision, whose code is measured in alternating turns on the points of its own default profile.
    """
    settings = {"repeats": repeats, "threads": 1, "precision": "fp32"} | ({"against": against} if against else {})
    measurements = Measurements("ladder", settings, ("torch", "numpy"))
    with ExitStack() as stack:
        source = Path(scaling4d.__file__).parents[1]
        ours = stack.enter_context(Checkout("this code", Path.cwd(), source))
        runs, facts = {name: (ours, name) for name in ours.facts["points"]}, dict(ours.facts["points"])
        if against:
            root = stack.enter_context(worktree(against))
            theirs = stack.enter_context(Checkout(against, root, root / "src"))
            facts |= {f"{name}, {against}": point for name, point in theirs.facts["points"].items()}
            runs |= {f"{name}, {against}": (theirs, name) for name in theirs.facts["points"]}
        timings = take_turns(runs | {PRODUCT: (ours, PRODUCT)}, repeats=repeats)
        steps, product_flops = ours.facts["steps"], ours.facts["product_flops"]
    units = {name: steps * point["batch"] for name, point in facts.items()} | {PRODUCT: steps * product_flops}
    *speeds, peak = measure.throughput(timings, units)
    rows = [row | facts[row["name"]] for row in speeds]
    for row in rows:
        row["share_of_peak"] = row["flops_per_clip"] / row["cpu_s"] * peak["cpu_s"]
    pairs = [(name, f"{name}, {against}") for name in facts if f"{name}, {against}" in facts]
    per_clip = Timings({name: [s / units[name] for s in cpu_s] for name, cpu_s in timings.cpu_s.items()}, {})
    ratios = [{"of": a, "over": b, **measure.speedup(per_clip, a, b)} for a, b in pairs]
    measurements.raw["turns"] = timings
    measurements.results.update(rows=rows, product_flop_per_s=1 / peak["cpu_s"], ratios=ratios)
    measure.table("training steps in fp32 by one thread; CPU ms and MFLOP of a clip", [row | shown(row) for row in rows], COLUMNS)
    print(f"{PRODUCT} in the same turns: {1e-9 / peak['cpu_s']:.1f} GFLOP/s of CPU time")
    for ratio in ratios:
        text = "{of}: {median:.2f} times the clips per CPU second of {over} (quartiles {low:.2f} to {high:.2f})"
        print(text.format_map(ratio) + ("" if facts[ratio["of"]] == facts[ratio["over"]] else "; their shapes differ"))
    return measurements.write(out)


def take_turns(runs: Mapping[str, tuple[Checkout, str]], *, repeats: int) -> Timings:
    """`measure.take_turns` of points by name, with the CPU seconds of the processes that compute."""
    cpu_s: dict[str, list[float]] = {name: [] for name in runs}

    def seconds(name: str) -> Callable[[], float]:
        checkout, point = runs[name]

        def run() -> float:
            spent, cpu = checkout.turn(point)
            cpu_s[name].append(cpu)
            return spent

        return run

    timings = measure.take_turns({name: seconds(name) for name in runs}, repeats=repeats)
    return Timings(timings.seconds, {name: values[1:] for name, values in cpu_s.items()})  # the first turn does not count


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Texts and units of COLUMNS that a row of ladder.json lacks."""
    shape = {name: "x".join(map(str, row[name])) for name in ("clip", "patch")}
    return {"shape": shape, "cpu_ms": 1e3 * row["cpu_s"], "mflop": row["flops_per_clip"] / 1e6}
