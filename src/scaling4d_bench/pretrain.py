"""`scaling4d bench pretrain`: clips a second of training steps, beside VideoMAE and the official MAE-ST."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.autograd.profiler import profile

from scaling4d_bench import devices, measure, steps
from scaling4d_bench.measure import Measurements
from scaling4d_bench.steps import TrainingStep

LIBRARIES = ("torch", "numpy", "transformers", "timm", "xformers")
OFFICIAL, VIDEOMAE = "official MAE-ST B, 90 %", "VideoMAE base, 90 %"  # 90 %: its own share
COLUMNS = {"": "{name}", "batch": "{clips}", "clips/s": "{per_s:.2f}", "quartiles": measure.SPEED["quartiles"]}
COLUMNS |= {"GFLOP a clip": "{gflop:.0f}", "of the peak": "{share_of_peak:.0%}"}
OPERATIONS = {  # kind of work -> parts of the names of torch's operations; the first match counts
    "attention": ("dot_product", "efficient_attention", "flash", "softmax"),
    "AdamW": ("adam",),
    "matrix products": ("addmm", "bmm", "::mm", "::linear", "conv"),
    "GELU": ("gelu",),
    "norms": ("layer_norm",),
    "gathers, copies": ("index", "gather", "scatter", "copy", "cat", "fill", "zero", "clone"),
    "by element, sums": ("add", "mul", "sub", "div", "sum", "mean", "pow", "sqrt", "var"),
    "other": ("",),
}


@dataclass(frozen=True)
class StepGroup:
    """Steps that take turns.

    makers: functions that make a step from clips, precision and device. pairs: names whose ratio is printed.
    """

    makers: Mapping[str, Callable[..., TrainingStep]]
    pairs: Sequence[tuple[str, str]] = ()


def standard_groups(mae_st: Path | None) -> dict[str, StepGroup]:
    """Ours beside VideoMAE, ours beside MAE-ST."""
    coarse = {"coarse_patch": [4, 32, 32]}  # 196 coarse tokens instead of 784; neither is published
    maest = {f"MAE-ST {point}, 90 %": partial(steps.point_step, f"mae_st_{point}", 0.9, {}) for point in ("B", "L")}
    of_b = {
        "SimpleMAE B, 95 %": partial(steps.point_step, "B", 0.95, {}),
        "SimpleMAE B, 90 %": partial(steps.point_step, "B", 0.9, {}),
        "SimpleMAE B, 95 %, 196 coarse tokens": partial(steps.point_step, "B", 0.95, coarse),
        "SimpleMAE B, 90 %, 196 coarse tokens": partial(steps.point_step, "B", 0.9, coarse),
    }
    first, videomae = partial(steps.point_step, "S", 0.95, {}), partial(steps.videomae, mask_ratio=0.9)
    beside_videomae = {"SimpleMAE S, 95 %": first, **of_b, VIDEOMAE: videomae}
    beside_maest = maest | {OFFICIAL: partial(steps.official_step, mae_st)}
    return {
        "beside VideoMAE": StepGroup(beside_videomae, [(name, VIDEOMAE) for name in of_b]),
        "beside MAE-ST": StepGroup(beside_maest, [("MAE-ST B, 90 %", OFFICIAL)]),
    }


def bench(out: Path, *, clips: int, repeats: int, precisions: Sequence[str], mae_st: Path | None) -> Path:
    """Measure, print a table for each group and precision, write `<out>/pretrain.json` (on a GPU with its name)."""
    device = devices.prepare()
    settings = {"clips": clips, "repeats": repeats, "precisions": list(precisions)} | devices.settings(device)
    measurements = Measurements("pretrain", settings, LIBRARIES)
    for name, group in standard_groups(mae_st).items():
        for precision in precisions:
            title, given = f"{name}, {precision}", {"clips": clips, "precision": precision, "device": device}
            made = measurements.load({n: partial(make, **given) for n, make in group.makers.items()}, f", {precision}")
            workloads = {name: step.workload(device) for name, step in made.items()}
            timings, rows, limits = devices.beside_limits(workloads, precision=precision, device=device, repeats=repeats)
            for row in rows:
                step = made[row["name"]]
                row |= {"clips": step.clips, "flops_per_clip": step.flops, "parts": time_by_operation(step.run, device)}
            pairs = [pair for pair in group.pairs if set(pair) <= set(made)]
            ratios = [{"of": a, "over": b, **measure.speedup(timings, a, b)} for a, b in pairs]
            measurements.raw[title] = timings
            measurements.results[title] = {"rows": rows, "limits": limits, "ratios": ratios}
            measure.table(title, [row | {"gflop": row["flops_per_clip"] / 1e9} for row in rows], COLUMNS)
            devices.print_limits(limits)
            for ratio in ratios:
                text = "{of}: {median:.2f} times the clips/s of {over} (quartiles {low:.2f} to {high:.2f})"
                print(text.format_map(ratio))
            kinds = [kind for kind in OPERATIONS if any(kind in row["parts"] for row in rows)]
            columns = {"": "{name}", **{kind: f"{{parts[{kind}]:.0%}}" for kind in kinds}}
            measure.table("where a step's time goes", rows, columns)
    return measurements.write(out)


def time_by_operation(run: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Share of the time of two steps by kind of operation, the largest first: of the calling thread, or of the GPU."""
    gpu = device.type == "cuda"
    with profile(use_device="cuda" if gpu else None, use_kineto=False) as profiler:
        run()
        run()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + (event.self_device_time_total if gpu else event.self_cpu_time_total)
    total = sum(spent.values())
    return {kind: time / total for kind, time in sorted(spent.items(), key=lambda item: -item[1]) if time}


def kind_of(operation: str) -> str:
    return next(kind for kind, words in OPERATIONS.items() if any(word in operation.lower() for word in words))
