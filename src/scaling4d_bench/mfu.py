"""`scaling4d bench mfu`: model FLOPs utilization and memory of training steps, beside those of `scaling4d plan`."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from scaling4d.encoders.features import FeatureEncoder, layer_index
from scaling4d.pretrain.plan.closed_form import GIB, PLAIN, USABLE, StepLayout, clips_that_fit, features_flops, flops, memory
from scaling4d.pretrain.plan.performance import CASES, step_seconds
from scaling4d.pretrain.plan.work import Work, frozen_work, work_of
from scaling4d.training.gpus import GPUS, Gpu
from scaling4d_bench import devices, measure, steps
from scaling4d_bench.measure import Measurements

POINTS = ("S", "B", "L", "H")
BLOCKS = {"": False, ", compiled": True}  # suffix of a row's name -> whether its blocks are compiled
LIBRARIES = ("torch", "numpy", "xformers", "triton")
COLUMNS = {
    "": "{name}",
    "batch": "{clips}",
    "clips/s": "{per_s:.1f}",
    "MFU": "{mfu:.1%}",
    "plan": "{planned_mfu[1]:.0%} to {planned_mfu[0]:.0%}",
    "GiB": "{gib:.1f}",
    "formula": "{formula_gib:.1f}",
}


def bench(
    out: Path,
    *,
    clips: int,
    repeats: int,
    precision: str,
    points: Sequence[str] = POINTS,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Measure one point after the other, print a table, write `<out>/mfu.json` (on a GPU with its name).

    The steps compute as `steps.as_trained`.

    MFU: FLOPs of three forward passes over the time of a step and the GPU's stated bfloat16 peak. A device that no plan
    knows is compared with an H100.

    Args:
        clips: a batch; a point that the GPU cannot hold with it gets the most clips that fit. changes: of the settings
            of every point.
    """
    device = devices.prepare()
    gpu = gpu_of(device)
    given = {"clips": clips, "repeats": repeats, "precision": precision, "peak_of": gpu.name}
    measurements, rows = Measurements("mfu", given | devices.settings(device), LIBRARIES), []
    for point in points:
        work = work_of(steps.on_meta(point, changes or {}))
        layout = StepLayout(1, False) if precision == "bf16" else StepLayout(1, False, sizes=PLAIN)
        batch = min(clips, clips_that_fit(work, layout, usable_bytes=USABLE * gpu.memory_bytes))
        plan = planned(work, layout, gpu, clips=batch)
        for suffix, compiled in BLOCKS.items():
            turn = partial(
                measured_step,
                point,
                changes or {},
                clips=batch,
                compiled=compiled,
                precision=precision,
                device=device,
                repeats=repeats,
            )
            for name, row in measurements.load({point + suffix: turn}).items():
                measurements.raw[name] = row.pop("seconds")
                row |= {"mfu": row["per_s"] * row["flops_per_clip"] / gpu.bf16_flop_per_s, "name": name, "clips": batch}
                rows.append(row | plan)
    measurements.results["rows"] = rows
    shown = [row | {"formula_gib": row["formula_bytes"] / GIB} for row in rows]
    shown = [row | ({"gib": row["bytes"] / GIB} if row["bytes"] else {}) for row in shown]
    measure.table(f"training steps in {precision}; MFU of the peak of {gpu.name}", shown, COLUMNS)
    return measurements.write(out)


def gpu_of(device: torch.device) -> Gpu:
    """The GPU by its driver's name; an H100 where no plan knows it."""
    name = devices.settings(device)["device"]
    return next((gpu for gpu in GPUS.values() if gpu.name.split()[0] in name), GPUS["h100"])


def planned(work: Work, layout: StepLayout, gpu: Gpu, *, clips: int) -> dict[str, Any]:
    """By formulas, of one GPU: `planned_mfu` in bfloat16, the fast and the slow case; `formula_bytes` of the layout."""
    row = {"formula_bytes": memory(work, layout, clips=clips)["total"]}
    ideal_s = flops(work, recompute=False)["model"] * clips / gpu.bf16_flop_per_s
    seconds = [
        sum(step_seconds(work, StepLayout(1, False), gpu, case, clips=clips, replicas=1).values()) for case in CASES.values()
    ]
    return row | {"planned_mfu": [ideal_s / value for value in seconds]}


def measured_features(
    point: str, changes: Mapping[str, Any], *, clips: int, precision: str, device: torch.device, repeats: int
) -> dict[str, Any]:
    """As measured_step, of frozen features of the point's encoder, whose weights are random, in the precision."""
    dtype, before = devices.DTYPES[precision], _allocated_before(device)
    model = FeatureEncoder(steps.on_meta(point, changes).encoder).to(dtype).to_empty(device=device).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    pixels = torch.randint(0, 256, (clips, *model.encoder.clip, 3), dtype=torch.uint8, device=device)
    with torch.no_grad():
        seconds = measure.take_turns({point: devices.timed(partial(model, pixels), device)}, repeats=repeats).seconds[point]
    flops_per_clip = features_flops(frozen_work(model.encoder, layer_index(depth=model.encoder.depth)))
    row = {"seconds": seconds, "per_s": clips / float(np.median(seconds)), "flops_per_clip": flops_per_clip, "clips": clips}
    parameters = sum(weight.numel() for weight in model.parameters())
    return row | {"parameters": parameters, "bytes": _peak(device) - before}


def measured_step(
    point: str,
    changes: Mapping[str, Any],
    *,
    clips: int,
    compiled: bool,
    precision: str,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """Seconds of each turn, clips a second at their median, FLOPs of a clip, and the allocator's peak (0 on a CPU)."""
    torch.compiler.reset()  # torch compiles a function for 8 shapes at most, and all blocks share theirs
    before = _allocated_before(device)
    model = steps.build(point, changes, device)
    flops_per_clip = flops(work_of(model), recompute=False)["model"]
    steps.as_trained(model, precision, device, compiled=compiled)
    loss = steps.our_loss(model, clips=clips, mask_ratio=model.config.mask_ratio, device=device)
    update = steps.adamw_update(model)
    run = devices.timed(lambda: update(loss()), device)
    seconds = measure.take_turns({point: run}, repeats=repeats).seconds[point]
    row = {"seconds": seconds, "per_s": clips / float(np.median(seconds)), "flops_per_clip": flops_per_clip}
    return row | {"bytes": _peak(device) - before}


def _allocated_before(device: torch.device) -> int:
    """Bytes of tensors on a GPU (0 on a CPU) before the peak is counted. A wrapped model leaves by the collector."""
    gc.collect()
    if device.type == "cpu":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
