"""The one style of our figures, and the helpers that several figures share."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from scaling4d.studies.fits import Trend
from scaling4d.studies.words import metric_words

TITLE_WIDTH = 31  # letters that fit above a panel
LEGEND_LETTERS = 15  # of a legend that fit into an inch
STYLE = {
    "svg.hashsalt": "scaling4d",
    "svg.fonttype": "none",  # text stays text: a tenth of the bytes of outlines
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # measured with the widest; any other sans-serif fits
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Figures in our style, whatever the matplotlibrc of the machine; also a decorator."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def subplots(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure and its panels `rows columns`."""
    figure = Figure(figsize=inches, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def to_svg(figure: Figure) -> str:
    """Equal figures give equal bytes."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def panel_title(name: str, metric: str, unit: str, higher_is_better: bool) -> str:
    """Name; the metric's words (unit) in at most two lines, if words.WORDS has them; direction."""
    words = f"{metric_words(metric)}{f' ({unit})' if unit else ''}"
    direction = "↑ higher is better" if higher_is_better else "↓ lower is better"
    return "\n".join([name, *textwrap.wrap(words, TITLE_WIDTH), direction])


def log_x(axes: Axes, values: Sequence[float], name: str) -> None:
    """A logarithmic x axis around the values, with ticks such as 300 k, 1 M."""
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.6, max(values) * 1.6)
    decades = np.log10(max(values) / min(values))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 2 else (1,)))
    tick = _short if max(values) < 1e11 else lambda value: f"{value:.0e}".replace("e+", "e")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.xaxis.set_minor_locator(NullLocator())  # hundreds of small ticks are half of a figure's bytes
    axes.set_xlabel(name)


def draw_law(axes: Axes, x: Sequence[float], law: Trend, *, of_share: bool = False) -> None:
    """A power law with its 95 % band over the range of x. of_share: the law is that of 1 - y, and y is drawn."""
    grid = np.geomspace(min(x), max(x), 100)
    curve, low, high = (1 - y if of_share else y for y in (law(grid), *law.band(grid)))
    axes.plot(grid, curve, color="tab:blue", alpha=0.6, label="power law")
    axes.fill_between(grid, low, high, color="tab:blue", alpha=0.12, lw=0, label="its 95 % band")


def draw_intervals(axes: Axes, x: Sequence[float], values: Iterable[tuple[float, float, float]], **look: Any) -> None:
    """Values (value, low, high) with their intervals. look: of `errorbar`."""
    y, low, high = np.array([*values]).T
    axes.errorbar(x, y, (y - low, high - y), **{"ls": "none", "lw": 1, **look})


def legend(figure: Figure) -> None:
    """One legend for all panels, below them, in as many columns as the figure's width holds."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = int(LEGEND_LETTERS * figure.get_figwidth() / (max(map(len, handles), default=0) + 8))  # 8: a sample, and space
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(max(columns, 1), 6))


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.999 * size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"
