"""`scaling4d bench costs`: time and memory of training as one quantity grows, beside their formulas."""

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
from torch.profiler import ProfilerActivity, profile

from scaling4d.mae.encoder import Method
from scaling4d.pretrain.plan.closed_form import GIB, PLAIN, StepLayout, flops, memory
from scaling4d.pretrain.plan.work import work_of
from scaling4d_bench import devices, measure, steps
from scaling4d_bench.measure import Measurements, Timings

POINT, BATCH = "S", 2
HEAD_WIDTH = 64
MUCH = 0.15  # an exponent this far above the formula's is marked
LIBRARIES = ("torch", "numpy")
FORMULAS = {"seconds": "flops", "bytes": "bytes_by_formula"}  # measured quantity -> the formula that it should follow
COLUMNS = {
    "": "{name}, {first[value]} to {last[value]}",
    "seconds": "{first[seconds]:.2f} to {last[seconds]:.2f}",
    "exponent": "{exponents[seconds]:.2f}",
    "of FLOPs": "{exponents[flops]:.2f}",
    "GiB": "{first_gib:.2f} to {last_gib:.2f}",
    "exponent ": "{exponents[bytes]:.2f}",
    "of the formula": "{exponents[bytes_by_formula]:.2f}",
}


@dataclass(frozen=True)
class TrainingCase:
    """A training. changes: of the point's settings. batch: clips a step."""

    changes: Mapping[str, Any]
    batch: int = BATCH
    steps: int = 1


Axis = tuple[tuple[int, ...], Callable[[int], TrainingCase]]  # values of a quantity, and the training at a value
AXES: Mapping[str, Axis] = {
    "clips seen": ((2, 4, 8, 16), lambda n: TrainingCase({}, steps=n // BATCH)),
    "clips a step": ((1, 2, 4, 8), lambda n: TrainingCase({}, batch=n)),
    "frames": ((8, 16, 32, 64), lambda n: TrainingCase({"clip": [n, 224, 224]})),
    "side in pixels": ((128, 224, 320, 448), lambda n: TrainingCase({"clip": [16, n, n]})),
    "depth": ((6, 12, 24, 48), lambda n: TrainingCase({"depth": n})),
    "width": ((192, 384, 768, 1152), lambda n: TrainingCase({"width": n, "heads": n // HEAD_WIDTH, "mlp": 4 * n})),
}


def bench(out: Path, *, repeats: int, axes: Mapping[str, Axis] = AXES) -> Path:
    """Measure in fp32, print a table, write `<out>/costs.json` (on a GPU with its name)."""
    device = devices.prepare()
    settings = {"point": POINT, "batch": BATCH, "repeats": repeats, "much": MUCH} | devices.settings(device)
    measurements, lines = Measurements("costs", settings, LIBRARIES), []
    for name, (values, case_of) in axes.items():
        timings, results = along(POINT, {value: case_of(value) for value in values}, device, repeats=repeats)
        measurements.raw[name], measurements.results[name] = timings, results
        first, *_, last = results["rows"]
        gib = {"first_gib": first["bytes"] / GIB, "last_gib": last["bytes"] / GIB}
        lines.append({"name": name, "first": first, "last": last, "exponents": results["exponents"], **gib})
    measure.table("what grows with what: cost = a * value^exponent", lines, COLUMNS)
    for line in lines:
        for quantity, formula in FORMULAS.items():
            measured, expected = line["exponents"][quantity], line["exponents"][formula]
            if measured - expected > MUCH:
                print(f"{line['name']}: {quantity} grow faster than their arithmetic ({measured:.2f}, {expected:.2f})")
    return measurements.write(out)


def along(point: str, cases: Mapping[int, TrainingCase], device: torch.device, *, repeats: int) -> tuple[Timings, dict[str, Any]]:
    """Times along an axis; and by value time, FLOPs, memory and the formula's memory, each with its exponent."""
    rows = [{"value": value, "bytes": peak_bytes(point, case, device)} for value, case in cases.items()]
    runs = {}
    for row, (value, case) in zip(rows, cases.items(), strict=True):
        model = steps.build(point, case.changes, device)
        runs[str(value)], work = devices.timed(training(model, case, device), device), work_of(model)
        row["flops"] = case.steps * case.batch * flops(work, recompute=False)["total"]
        row["bytes_by_formula"] = memory(work, StepLayout(1, False, sizes=PLAIN), clips=case.batch)["total"]
    timings = measure.take_turns(runs, repeats=repeats)
    for row in rows:
        row["low"], row["seconds"], row["high"] = map(float, np.percentile(timings.seconds[str(row["value"])], (25, 50, 75)))
    quantities = (*FORMULAS, *FORMULAS.values())
    return timings, {"rows": rows, "exponents": {key: exponent(list(cases), [row[key] for row in rows]) for key in quantities}}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """b of y = a x^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def training(model: Method, case: TrainingCase, device: torch.device) -> Callable[[], None]:
    given = {"clips": case.batch, "mask_ratio": model.config.mask_ratio, "device": device}
    step = steps.our_step(model, steps.adamw_update(model), **given)

    def run() -> None:
        for _ in range(case.steps):
            step.run()

    return run


def peak_bytes(point: str, case: TrainingCase, device: torch.device) -> int:
    """Peak bytes of tensors while the training runs twice, as torch's allocator of the device counts them."""

    def train_twice() -> None:
        run = training(steps.build(point, case.changes, device), case, device)
        run()
        run()

    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        train_twice()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_twice()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        changes = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in changes))
