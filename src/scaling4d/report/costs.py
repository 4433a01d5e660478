"""How time and memory of training grow, from the json of `scaling4d bench costs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from scaling4d.report.figures import Svg, named, svg

MEASURED = Path("reports/bench/costs.json")
GIB = 2**30
ROWS = (  # what was measured, its unit, what the axis says, the formula, what the legend calls it
    ("seconds", 1.0, "seconds", "flops", "FLOPs at one speed"),
    ("bytes", GIB, "GiB at the peak", "bytes_by_formula", "formula"),
)


@named
def costs(path: Path = MEASURED) -> Svg:
    """A column for each thing that grows; time with its quartiles above, memory below, dashed what the formulas say."""
    told = json.loads(path.read_text())

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(ROWS), len(told["found"]), squeeze=False)
        for (name, axis), column in zip(told["found"].items(), panels.T, strict=True):
            for axes, (what, unit, label, formula, called) in zip(column, ROWS, strict=True):
                _panel(axes, axis, what, unit, formula, called)
                axes.set_xlabel(name)
                if column[0] is panels[0, 0]:
                    axes.set_ylabel(label)
                    axes.legend(loc="upper left")
        settings = told["settings"]
        figure.suptitle(
            f"point {settings['point']}, batches of {settings['batch']} where not said otherwise, fp32, {settings['device']}, "
            f"{settings['threads']} thread(s); median and quartiles of {settings['repeats']} turns"
        )

    return svg(draw, (2.1 * len(told["found"]) + 0.6, 5.2))


def _panel(axes: Axes, axis: Mapping[str, Any], what: str, unit: float, formula: str, called: str) -> None:
    rows = axis["rows"]
    x, y, said = (np.array([row[key] for row in rows]) for key in ("value", what, formula))
    if what == "seconds":
        said = said * np.exp(np.mean(np.log(y / said)))  # FLOPs at the speed that was measured on average
        low, high = (np.array([row[key] for row in rows]) for key in ("low", "high"))
        axes.errorbar(x, y, (y - low, high - y), fmt="none", color="tab:blue")
    axes.plot(x, y / unit, "o", color="tab:blue")
    axes.plot(x, said / unit, "--", color="tab:gray", label=called)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(FixedLocator(list(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(value) for value in x])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    grown = axis["exponents"]
    axes.set_title(f"exponent {grown[what]:.2f} (dashed {grown[formula]:.2f})")
