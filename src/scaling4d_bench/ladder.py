"""`scaling4d bench pretrain --ladder`: training steps of the default profile's SimpleMAE points, as it trains them.

One thread computes. The share of the peak is that of CPU seconds, which hardly count other work on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from scaling4d import config
from scaling4d.mae.models import METHODS, config_of
from scaling4d.pretrain.plan.closed_form import flops_per_clip
from scaling4d.training import distributed
from scaling4d.training.observe import matrix_product
from scaling4d_bench import measure, steps
from scaling4d_bench.measure import Measurements

CPU = torch.device("cpu")
STEPS = 10  # of a turn
PRODUCT, SIDE = "matrix product", 1024  # as in training.observe.peak_flops
FACTS = ("clip", "patch", "coarse_patch", "masking", "mask_ratio", "width", "depth")
COLUMNS = {
    "": "{name}",
    "parameters": "{parameters:,}",
    "clip": "{clip}",
    "patch": "{patch}",
    "hidden": "{mask_ratio:.0%}",
    "batch": "{batch}",
    "clips/s": "{per_s:.1f}",
    "quartiles": "{per_s_low:.1f} to {per_s_high:.1f}",
    "CPU ms": "{cpu_ms:.2f}",
    "MFLOP": "{mflop:.0f}",
    "of the peak": "{share_of_peak:.0%}",
}


def bench(out: Path, *, repeats: int) -> Path:
    """Measure, print a table, write `<out>/ladder.json`."""
    measurements = Measurements("ladder", {"repeats": repeats, "threads": 1, "precision": "fp32"}, ("torch", "numpy"))
    torch.set_num_threads(1)
    distributed.keep_freed_memory()  # as a rank of the trainer does
    settings = config.compose([])
    models = {name: point["model"].get("SimpleMAE") for name, point in settings["points"].items()}
    points = {name: point_step(given, settings["pretrain"]["Training"]) for name, given in models.items() if given}
    product, product_flops = matrix_product(CPU, torch.float32, side=SIDE)
    work = {name: run for name, (run, _) in points.items()} | {PRODUCT: product}
    runs = {name: measure.timed(lambda run=run: [run() for _ in range(STEPS)]) for name, run in work.items()}
    timings = measure.take_turns(runs, repeats=repeats)
    units = {name: STEPS * facts["batch"] for name, (_, facts) in points.items()} | {PRODUCT: STEPS * product_flops}
    *speeds, peak = measure.throughput(timings, units)
    rows = [row | points[row["name"]][1] for row in speeds]
    for row in rows:
        row["share_of_peak"] = row["flops_per_clip"] / row["cpu_s"] * peak["cpu_s"]
    measurements.raw["turns"] = timings
    measurements.results.update(rows=rows, product_flop_per_s=1 / peak["cpu_s"])
    lines = [row | {"cpu_ms": 1e3 * row["cpu_s"], "mflop": row["flops_per_clip"] / 1e6} for row in rows]
    measure.table("training steps in fp32 by one thread; CPU ms and MFLOP of a clip", lines, COLUMNS)
    print(f"{PRODUCT} in the same turns: {1e-9 / peak['cpu_s']:.1f} GFLOP/s of CPU time")
    return measurements.write(out)


def point_step(given: Mapping[str, Any], training: Mapping[str, Any]) -> tuple[Callable[[], None], dict[str, Any]]:
    """A step of one point: masks, loss, gradients and their clipping, AdamW. And the point's shape, batch and cost."""
    model = METHODS["SimpleMAE"](config_of(METHODS["SimpleMAE"], given))
    model.initialise(measure.SEED)
    update = steps.adamw_update(model, weight_decay=training["weight_decay"], clip_norm=training["clip_norm"])
    shares = {"clips": training["batch"], "mask_ratio": given["mask_ratio"]}
    step = steps.our_step(model, update, **shares, device=CPU)
    counts = {"parameters": sum(p.numel() for p in model.encoder.parameters()), "flops_per_clip": flops_per_clip(model)}
    return step.run, {name: given[name] for name in FACTS} | {"batch": training["batch"]} | counts
