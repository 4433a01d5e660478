"""`scaling4d bench costs`: time and memory of training as one thing grows, and whether they grow as their formulas do."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity

from scaling4d.pretrain.plan.closed_form import PLAIN, flops, memory
from scaling4d.pretrain.plan.work import work_of
from scaling4d_bench import device as devices
from scaling4d_bench import measure, steps
from scaling4d_bench.measure import Contestant

POINT, BATCH = "S", 2
HEAD_WIDTH = 64
MUCH = 0.15  # an exponent this far above the formula's is marked
LIBRARIES = ("torch", "numpy")
QUANTITIES = ("seconds", "flops", "bytes", "bytes_by_formula")


@dataclass(frozen=True)
class Case:
    """What is trained: settings of the point that are changed, clips a step, steps."""

    changes: Mapping[str, Any]
    batch: int = BATCH
    steps: int = 1


@dataclass(frozen=True)
class Axis:
    """What grows, through these values; how a value becomes a case."""

    values: Sequence[int]
    case: Callable[[int], Case]


AXES = {
    "clips seen": Axis((2, 4, 8, 16), lambda n: Case({}, steps=n // BATCH)),
    "clips a step": Axis((1, 2, 4, 8), lambda n: Case({}, batch=n)),
    "frames": Axis((8, 16, 32, 64), lambda n: Case({"clip": [n, 224, 224]})),
    "side in pixels": Axis((128, 224, 320, 448), lambda n: Case({"clip": [16, n, n]})),
    "depth": Axis((6, 12, 24, 48), lambda n: Case({"depth": n})),
    "width": Axis((192, 384, 768, 1152), lambda n: Case({"width": n, "heads": n // HEAD_WIDTH, "mlp": 4 * n})),
}


def bench(out: Path, *, repeats: int, point: str = POINT, axes: Mapping[str, Axis] = AXES, seed: int = 0) -> Path:
    """Measure in fp32, print a table, write `<out>/costs.json` (on a GPU with its name).

    Args:
        point: that everything starts from, at the clip size of profile paper.
    """
    load, device = measure.busy(), devices.best()
    raw: dict[str, Any] = {}
    found: dict[str, Any] = {}
    with measure.threads(measure.cores()):
        for name, axis in axes.items():
            raw[name], found[name] = along(point, axis, device, repeats=repeats, seed=seed)
        settings = devices.settings(device)
    _show(found)
    settings |= {"point": point, "batch": BATCH, "repeats": repeats, "seed": seed, "load_before": load, "much": MUCH}
    name, libraries = devices.file_name("costs", device), measure.versions(LIBRARIES)
    return measure.write(name, out, settings=settings, libraries=libraries, raw=raw, found=found, not_measured={})


def along(point: str, axis: Axis, device: torch.device, *, repeats: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raw seconds along an axis; and by value time, FLOPs, memory and what the formula says of it, each with its exponent."""
    cases = {value: axis.case(value) for value in axis.values}
    peaks = {value: peak_bytes(point, case, device, seed=seed) for value, case in cases.items()}
    contestants, formulas = [], []
    for value, case in cases.items():
        model = steps.model(point, case.changes, device=device, seed=seed)
        contestants.append(Contestant(str(value), devices.clocked(_training(model, case, device, seed), device), case.steps))
        work = work_of(model)
        formulas.append(
            {
                "flops": case.steps * case.batch * flops(work, recompute=False)["total"],
                "bytes_by_formula": memory(work, clips=case.batch, shards=1, recompute=False, sizes=PLAIN)["total"],
            }
        )
    raw = measure.race(contestants, repeats=repeats)
    rows = []
    for value, formula in zip(axis.values, formulas, strict=True):
        low, middle, high = (float(s) for s in np.percentile(raw.seconds[str(value)], (25, 50, 75)))
        rows.append({"value": value, "seconds": middle, "low": low, "high": high, "bytes": peaks[value], **formula})
    exponents = {what: exponent(axis.values, [row[what] for row in rows]) for what in QUANTITIES}
    return measure.plain(raw), {"rows": rows, "exponents": exponents}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """b of y = a x^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _training(model: nn.Module, case: Case, device: torch.device, seed: int) -> Callable[[], None]:
    one = steps.ours(
        model,
        steps.updated(model),
        clips=case.batch,
        mask_ratio=model.mask_ratio,
        precision="fp32",
        device=device,
        seed=seed,
    )

    def run() -> None:
        for _ in range(case.steps):
            one.run()

    return run


def peak_bytes(point: str, case: Case, device: torch.device, *, seed: int) -> int:
    """What tensors hold at most while training twice through, as torch's allocator of the device counts it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _train_twice(point, case, device, seed)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        _train_twice(point, case, device, seed)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        seen.export_chrome_trace(str(trace))
        changes = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in changes))


def _train_twice(point: str, case: Case, device: torch.device, seed: int) -> None:
    model = steps.model(point, case.changes, device=device, seed=seed)
    run = _training(model, case, device, seed)
    run()
    run()


def _show(found: Mapping[str, Any]) -> None:
    lines = []
    for name, axis in found.items():
        first, last, grown = axis["rows"][0], axis["rows"][-1], axis["exponents"]
        lines.append(
            (
                f"{name}, {first['value']} to {last['value']}",
                f"{first['seconds']:.2f} to {last['seconds']:.2f}",
                f"{grown['seconds']:.2f}",
                f"{grown['flops']:.2f}",
                f"{first['bytes'] / 2**30:.2f} to {last['bytes'] / 2**30:.2f}",
                f"{grown['bytes']:.2f}",
                f"{grown['bytes_by_formula']:.2f}",
            )
        )
    columns = ("", "seconds", "exponent", "of FLOPs", "GiB", "exponent", "of the formula")
    measure.show("what grows with what: cost = a * value^exponent", columns, lines)
    for name, axis in found.items():
        grown = axis["exponents"]
        for what, formula in (("seconds", "flops"), ("bytes", "bytes_by_formula")):
            if grown[what] - grown[formula] > MUCH:
                print(f"{name}: {what} grow faster than their arithmetic ({grown[what]:.2f}, {grown[formula]:.2f})")
