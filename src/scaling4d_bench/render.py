"""`scaling4d bench render`: CPU time to draw a labelled clip of each kind, and an unlabelled video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from scaling4d import config
from scaling4d.scenes.dataset import RenderConfig, SceneSpec, draw_sample, draw_video
from scaling4d.scenes.scene import KINDS
from scaling4d_bench import measure
from scaling4d_bench.measure import SEED, Measurements

COLUMNS = {"": "{name}", "CPU ms": "{cpu_ms:.0f}", "a second": "{per_s:.1f}", "quartiles": measure.SPEED["quartiles"]}
LIBRARIES = ("numpy", "trimesh", "embreex")


def bench(out: Path, *, clips: int, repeats: int) -> Path:
    """Draw `clips` of each kind in each turn, by the project's settings; print a table, write `<out>/render.json`."""
    bound = config.bind(config.read(), ["render"], RenderConfig)
    measurements = Measurements("render", {"clips": clips, "repeats": repeats, **asdict(bound[RenderConfig])}, LIBRARIES)
    drawings: dict[str, tuple[Callable[[SceneSpec], object], str]] = {kind: (draw_sample, kind) for kind in KINDS}
    drawings["video"] = (draw_video, "corpus")
    runs = {
        name: measure.timed(partial(_draw, draw, [SceneSpec(SEED, kind, index, bound[RenderConfig]) for index in range(clips)]))
        for name, (draw, kind) in drawings.items()
    }
    timings = measure.take_turns(runs, repeats=repeats)
    rows = measure.throughput(timings, dict.fromkeys(runs, clips))
    measurements.raw["seconds"], measurements.results["rows"] = timings, rows
    measure.table("drawing, one process", [row | {"cpu_ms": 1000 * row["cpu_s"]} for row in rows], COLUMNS)
    return measurements.write(out)


def _draw(draw: Callable[[SceneSpec], object], specs: list[SceneSpec]) -> None:
    for spec in specs:
        draw(spec)
