"""`scaling4d bench render`: CPU time to draw a labelled clip of each kind, and an unlabelled video."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from scaling4d import config
from scaling4d.scenes.dataset import RenderConfig, SceneSpec, draw_sample, draw_video
from scaling4d.scenes.scene import KINDS
from scaling4d_bench import measure
from scaling4d_bench.measure import SEED, Measurements

COLUMNS = {"": "{name}", "CPU ms": "{cpu_ms:.0f}", "a second": "{per_s:.1f}", "quartiles": measure.SPEED["quartiles"]}
CLIPS = 8  # of each kind in a turn
LIBRARIES = ("numpy", "trimesh", "embreex")


def bench(out: Path, *, repeats: int) -> Path:
    """Draw CLIPS of each kind in each turn, by the project's settings; print a table, write `<out>/render.json`."""
    bound = config.bind(config.read(), ["render"], RenderConfig)
    measurements = Measurements("render", {"clips": CLIPS, "repeats": repeats, **asdict(bound[RenderConfig])}, LIBRARIES)
    runs = {}
    for kind in (*KINDS, "corpus"):
        name, draw = ("video", draw_video) if kind == "corpus" else (kind, draw_sample)
        specs = [SceneSpec(SEED, kind, index, bound[RenderConfig]) for index in range(CLIPS)]
        runs[name] = measure.timed(lambda draw=draw, specs=specs: list(map(draw, specs)))
    timings = measure.take_turns(runs, repeats=repeats)
    rows = measure.throughput(timings, dict.fromkeys(runs, CLIPS))
    measurements.raw["seconds"], measurements.results["rows"] = timings, rows
    measure.table("drawing, one process", [row | {"cpu_ms": 1000 * row["cpu_s"]} for row in rows], COLUMNS)
    return measurements.write(out)
