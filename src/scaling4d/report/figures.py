"""The report's figures as svg, the same bytes for the same story."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from scaling4d.records import Result
from scaling4d.report.fits import held_out, spearman, trend
from scaling4d.report.story import Story, published

LOOK = {"frozen": ("tab:blue", "o", "-"), "finetune": ("tab:orange", "s", "--"), "classifier": ("tab:red", "^", ":")}
BASELINES = ((0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1, 2)), (0, (9, 2)), (0, (5, 1, 1, 1, 1, 1)))  # dashes, in order
OTHERS = ("tab:green", "tab:purple", "tab:brown", "tab:pink")  # points of other methods than the ladder's
STYLE = {
    "svg.hashsalt": "scaling4d",
    "svg.fonttype": "path",  # looks the same wherever it is opened
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


class Svg(str):
    """A drawing that a notebook shows as it is; `name`: of its file, see named."""

    name = ""

    def __repr__(self) -> str:
        return "a figure"

    def _repr_html_(self) -> str:
        return f'<div class="scaling4d" id="{self.name}">{self!s}</div>'


def named(figure: Callable[..., Svg]) -> Callable[..., Svg]:
    """Lets what a function draws carry the function's name, under which it is taken from the notebook, see drawn."""

    @wraps(figure)
    def under_its_name(*arguments: Any) -> Svg:
        picture = figure(*arguments)
        picture.name = figure.__name__
        return picture

    return under_its_name


def drawn(html: str) -> dict[str, str]:
    """The named figures of a page, as svg."""
    return dict(re.findall(r'<div class="scaling4d" id="(\w+)">(<svg.*?</svg>\n)</div>', html, re.DOTALL))


@named
def headline(story: Story) -> Svg:
    """A panel a task: our points against encoder parameters (above), 4DS as published (below, on its own axes)."""
    if not story.results:
        return _note("This profile has no benchmark, so there is no readout to draw.")
    paper = published()["4DS"]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, len(story.tasks), squeeze=False)
        for task, ours, theirs in zip(story.tasks, *panels, strict=True):
            _ours(ours, story, task)
            _theirs(theirs, paper, task)
        panels[0, 0].set_ylabel("ours: this run")
        panels[1, 0].set_ylabel("4DS as published: other data,\nother sizes, not comparable in value")
        legend(figure, panels.flat)

    return svg(draw, (2.5 * len(story.tasks) + 0.6, 6.6))


@named
def pretraining(story: Story) -> Svg:
    """Validation loss of the ladder against parameters and training FLOPs, with a power law and its band where one fits."""
    ladder = [story.summaries[point] for point in story.ladder]

    def draw(figure: Figure) -> None:
        panels = {"parameters": ("N", "encoder parameters"), "flops": ("C", "training FLOPs")}
        for axes, (key, (letter, name)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            x, y = [s[key] for s in ladder], [s["val_loss"] for s in ladder]
            axes.plot(x, y, "o", color="tab:blue", zorder=3, label="measured")
            for s in ladder:
                axes.annotate(s["point"], (s[key], s["val_loss"]), textcoords="offset points", xytext=(6, 5))
            axes.set_title("\n".join([_rank(x, y), *_law(axes, x, y, letter)]))
            log_x(axes, x, name)
            axes.margins(y=0.15)
            axes.set_ylabel("validation loss (MSE) ↓ lower is better")
        legend(figure, figure.axes)

    return svg(draw, (9.5, 4.4))


@named
def training_curves(story: Story) -> Svg:
    """Training loss against clips seen; a panel a method, whose losses measure different things."""

    def draw(figure: Figure) -> None:
        for axes, method in zip(figure.subplots(1, len(story.methods), squeeze=False)[0], story.methods, strict=True):
            mine = story.of_method(method)
            colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(mine)))
            for point, colour in zip(mine, colours, strict=True):
                lines = story.losses[point]
                x, y = [line["clips_seen"] for line in lines], [line["loss"] for line in lines]
                axes.plot(x, y, color=colour, lw=1.2, label=point)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(method)
            axes.set_xlabel("clips seen")
            axes.set_ylabel("training loss ↓ lower is better")
            axes.legend()

    return svg(draw, (9.5, 4))


@named
def methods(story: Story) -> Svg:
    """Each point of another method or masking beside the ladder's point nearest in size: readouts and filled-in pixels."""
    others = [point for method in story.methods for point in story.of_method(method) if point not in story.ladder]
    if not others:
        return _note(f"This profile has one method and one masking only ({story.methods[0]}).")
    names = list(dict.fromkeys(name for point in others for name in (_nearest(story, point), point)))
    ticks = [_described_point(story, name) for name in names]
    places = dict(zip(names, range(len(names)), strict=True))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(story.tasks) + 1, squeeze=False)[0]
        for axes, task in zip(panels, story.tasks, strict=False):
            for protocol, shift in (("frozen", -0.15), ("finetune", 0.0), ("classifier", 0.15)):
                mine = [r for name in names if (r := story.result(name, task, protocol))]
                _bars(axes, [places[r.encoder] + shift for r in mine], mine, protocol, line="none")
            axes.set_title(title(task, *_described(story, task)))
        filled = [name for name in names if name in story.fidelity]
        mse = [story.fidelity[name]["masked_mse"] for name in filled]
        panels[-1].plot([places[name] for name in filled], mse, "D", color="tab:green")
        panels[-1].set_title(title("filled-in pixels", "hidden-pixel MSE", "", False))
        for axes in panels:
            axes.set_xticks(range(len(names)), ticks, fontsize=7)
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.margins(y=0.25)
        legend(figure, panels)

    return svg(draw, (max(2.2, 0.55 * len(names) + 1.1) * (len(story.tasks) + 1), 3.9))


@named
def reconstructions(story: Story) -> Svg:
    """For each clip three rows: input, masked, filled in; the points side by side."""
    columns = min(6, len(story.points))
    rows = -(-len(story.points) // columns)

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in panels:
            axes.set_axis_off()
        for axes, point in zip(panels, story.points, strict=False):
            found = story.fidelity[point]
            axes.imshow(imread(story.pictures[point]), interpolation="none")
            size = _millions(story.summaries[point]["parameters"])
            axes.set_title(f"{point}, {size}\nMSE {found['masked_mse']:.4f}, {found['psnr_db']:.1f} dB", fontsize=8.5)
        figure.suptitle("rows of every clip, from above: input, masked (hidden is grey), filled in", fontsize=9)

    heights = {imread(path).shape[:2] for path in story.pictures.values()}
    ratio = max(height / width for height, width in heights)
    return svg(draw, (2.1 * columns, rows * (2.1 * ratio + 0.6) + 0.3))


FIGURES = (headline, pretraining, training_curves, methods, reconstructions)  # of a story; the notebook shows each


def _ours(axes: Axes, story: Story, task: str) -> None:
    ladder = set(story.ladder)
    mine = [r for r in story.results if r.task == task]
    baselines = dict(zip(story.baselines, cycle(BASELINES), strict=False))
    names = dict.fromkeys([*story.trained, *(r.encoder for r in mine)])  # the points, then encoders that others published
    others = dict(zip((name for name in names if name not in ladder | baselines.keys()), cycle(OTHERS), strict=False))
    sizes = [r.parameters for r in mine if r.encoder not in baselines]
    for protocol in LOOK:
        _bars(axes, None, [r for r in mine if r.protocol == protocol and r.encoder in ladder], protocol)
    for r in mine:
        if r.encoder in baselines:
            axes.axhline(r.value, color="0.35", lw=1.2, ls=baselines[r.encoder], label=r.encoder.replace("_", " "))
        elif r.encoder not in ladder:
            error, marker = [[r.value - r.low], [r.high - r.value]], "D" if r.protocol == "frozen" else LOOK[r.protocol][1]
            label = f"{r.encoder}, {r.protocol}"
            axes.errorbar(
                r.parameters, r.value, error, color=others[r.encoder], marker=marker, ms=5, lw=1, ls="none", label=label
            )
    axes.set_title(title(task, *_described(story, task)))
    log_x(axes, sizes, "encoder parameters")


def _theirs(axes: Axes, paper: dict, task: str) -> None:
    known = paper["tasks"].get(task)
    if known is None:
        axes.text(0.5, 0.5, "not in the paper", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    for protocol, (colour, marker, line) in LOOK.items():
        if protocol not in known:
            continue
        x, y = [paper["sizes"][size] for size in known[protocol]], list(known[protocol].values())
        axes.plot(x, y, color=colour, marker=marker, ls=line, ms=4, lw=1.2, mfc="white")
    axes.set_title(title(known["benchmark"], known["metric"], known["unit"], known["higher_is_better"]))
    log_x(axes, list(paper["sizes"].values()), "parameters")


def _bars(axes: Axes, x: Sequence[float] | None, results: Iterable[Result], protocol: str, line: str | None = None) -> None:
    """Values with their intervals; a line through the mean of the points of one size."""
    results = list(results)
    if not results:
        return
    colour, marker, style = LOOK[protocol]
    x = [r.parameters for r in results] if x is None else x
    values = np.array([r.value for r in results])
    error = np.array([[r.value - r.low for r in results], [r.high - r.value for r in results]])
    axes.errorbar(x, values, error, color=colour, marker=marker, ms=4.5, lw=1, ls="none", label=protocol, zorder=3)
    if line is None:
        sizes = sorted(set(x))
        means = [values[[at == size for at in x]].mean() for size in sizes]
        axes.plot(sizes, means, color=colour, ls=style, lw=1.2, zorder=2)


def _described(story: Story, task: str) -> tuple[str, str, bool]:
    r = next(r for r in story.results if r.task == task)
    return r.metric, r.unit, r.higher_is_better


def title(name: str, metric: str, unit: str, higher_is_better: bool) -> str:
    way = "↑ higher is better" if higher_is_better else "↓ lower is better"
    return f"{name}\n{metric}{f' ({unit})' if unit else ''}\n{way}"


def _rank(x: Sequence[float], y: Sequence[float]) -> str:
    rho = spearman(x, y)
    return f"Spearman {rho:+.2f}" if rho is not None else "too few points for a trend"


def _law(axes: Axes, x: Sequence[float], y: Sequence[float], letter: str) -> list[str]:
    """Draw the power law with its 95 % band and what the smaller points predict for the largest; the law in words."""
    found = trend(x, y)
    if found is None:
        return []
    grid = np.geomspace(min(x), max(x), 100)
    axes.plot(grid, found.law(grid), color="tab:blue", alpha=0.6, label="power law")
    axes.fill_between(grid, *found.band(grid), color="tab:blue", alpha=0.12, lw=0, label="its 95 % band")
    tested = held_out(x, y)
    if tested is not None:
        error = [[tested.predicted - tested.low], [tested.high - tested.predicted]]
        axes.errorbar(
            tested.x * 1.12,
            tested.predicted,
            error,
            color="tab:red",
            marker="x",
            lw=1,
            ls="none",
            label="predicted from the others",
        )
    law = found.law
    return [f"L = {law.floor:.4g} + {law.scale:.3g} · ({letter} / {law.unit:.3g})^-{law.exponent:.2f}"]


def _described_point(story: Story, point: str) -> str:
    parts = (point, story.summaries[point]["method"], story.masking(point), _millions(story.summaries[point]["parameters"]))
    return "\n".join(filter(None, parts))


def _nearest(story: Story, point: str) -> str:
    """The ladder's point whose number of parameters is nearest by ratio."""
    size = np.log(story.summaries[point]["parameters"])
    return min(story.ladder, key=lambda name: abs(np.log(story.summaries[name]["parameters"]) - size))


def log_x(axes: Axes, values: Sequence[float], name: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.6, max(values) * 1.6)
    decades = np.log10(max(values) / min(values))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 2 else (1,)))
    form = _short if max(values) < 1e11 else lambda value: f"{value:.0e}".replace("e+", "e")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name)


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.999 * size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def _millions(parameters: float) -> str:
    return f"{parameters / 1e6:.2f} M"


def legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One for all panels."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=6)


def _note(text: str) -> Svg:
    return svg(lambda figure: figure.text(0.02, 0.5, text, va="center", fontsize=10), (9.5, 0.6))


def svg(draw: Callable[[Figure], None], inches: tuple[float, float]) -> Svg:
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the machine's own matplotlibrc says
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    whole = text.getvalue()
    return Svg(whole[whole.index("<svg") :])
