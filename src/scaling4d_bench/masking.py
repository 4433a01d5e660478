"""`scaling4d bench masking`: time saved by hidden tokens in MAE-ST and SimpleMAE, beside loading the clips."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from scaling4d_bench import devices, loader, measure, steps, videos
from scaling4d_bench.measure import Measurements

POINTS = {"B": {"MAE-ST": "mae_st_B", "SimpleMAE": "B"}, "L": {"MAE-ST": "mae_st_L", "SimpleMAE": "L"}}
RATIOS = (0.0, 0.75, 0.9, 0.95)  # shares of hidden tokens
FILES, SECONDS, SIZE_PX = 4, 12.0, (360, 640)  # made-up videos to load from
BATCHES, WORKERS = 4, 4  # of loader.BATCH clips: the loading in each turn; processes that load
LIBRARIES = ("torch", "numpy", "av", "torchdata", "xformers")
LOADING = "loading"
COLUMNS = {
    "hidden": "{name}",
    "clips/s": "{per_s:.2f}",
    "quartiles": measure.SPEED["quartiles"],
    "times as fast": "{times_as_fast[median]:.2f}",
    "by FLOPs": "{times_as_fast_by_arithmetic:.2f}",
    "with loading": "{times_as_fast_with_loading:.2f}",
    "times the first": "{times_first_method_unhidden[median]:.2f}",
    "of the peak": "{share_of_peak:.0%}",
}


def bench(out: Path, *, clips: int, repeats: int, precision: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Measure, print a table for each size, write `<out>/masking-<precision>.json` (on a GPU with its name).

    Each method's times are compared with its own at the first of RATIOS, and with the first method's.

    Args:
        changes: of the settings of the points, by method.
    """
    device = devices.prepare()
    settings = {"clips": clips, "repeats": repeats, "precision": precision, "workers": WORKERS} | devices.settings(device)
    settings["shards"] = f"made up: {FILES} x {SECONDS:g} s of {SIZE_PX} px"
    measurements = Measurements(f"masking-{precision}", settings, LIBRARIES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = videos.curated(Path(scratch), files=FILES, seconds=SECONDS, size_px=SIZE_PX)
        for size, methods in POINTS.items():
            hidden = {}
            for method, point in methods.items():
                model = steps.as_trained(steps.build(point, (changes or {}).get(method, {}), device), precision, device)
                update = steps.adamw_update(model)
                for ratio in RATIOS:
                    given = {"clips": clips, "mask_ratio": ratio, "device": device}
                    hidden[f"{method}, {ratio:.0%}"] = (method, ratio, steps.our_step(model, update, **given))
            workloads = {name: step.workload(device) for name, (_, _, step) in hidden.items()}
            workloads[LOADING] = (partial(loader.load, folder, BATCHES, WORKERS), BATCHES * loader.BATCH, 0)
            timings, rows, limits = devices.beside_limits(workloads, precision=precision, device=device, repeats=repeats)
            loading = rows.pop()
            loading_s, unhidden = 1 / loading["per_s"], {}
            for row in rows:
                method, ratio, step = hidden[row["name"]]
                base = unhidden.setdefault(method, row)
                row |= {"method": method, "mask_ratio": ratio, "flops_per_clip": step.flops}
                row |= {
                    "times_as_fast": measure.speedup(timings, row["name"], base["name"]),
                    "times_as_fast_by_arithmetic": base["flops_per_clip"] / step.flops,
                    "times_as_fast_with_loading": (1 / base["per_s"] + loading_s) / (1 / row["per_s"] + loading_s),
                    "times_first_method_unhidden": measure.speedup(timings, row["name"], rows[0]["name"]),
                }
            measurements.raw[size] = timings
            measurements.results[size] = {"rows": rows, "loading": loading, "limits": limits}
            title = f"{size}, {precision}, batches of {clips}; {WORKERS} processes load"
            measure.table(title, [*rows, loading], COLUMNS)
            devices.print_limits(limits)
    print("with loading: first a batch is loaded, then the step runs")
    return measurements.write(out)
