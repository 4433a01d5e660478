"""The report's figures as svg. Equal results give equal bytes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from scaling4d.records import Result
from scaling4d.report.run_results import RunResults
from scaling4d.report.tables import published
from scaling4d.report.verdict import trivial_answer
from scaling4d.studies.fits import held_out, spearman, trend
from scaling4d.studies.plotting import draw_intervals, draw_law, legend, log_x, panel_title, style, subplots, to_svg
from scaling4d.studies.words import encoder_words, measure

MEASURED_COSTS = Path("reports/bench/costs.json")
LOOK = {"frozen": ("tab:blue", "o", "-"), "finetune": ("tab:orange", "s", "--"), "classifier": ("tab:red", "^", ":")}
BASELINES = ((0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1, 2)), (0, (9, 2)), (0, (5, 1, 1, 1, 1, 1)))  # dashes, in order
TRIVIAL_LINE = (0, (1, 1))
OTHERS = ("tab:green", "tab:purple", "tab:brown", "tab:pink")  # points of other methods than the ladder's
COSTS = (  # measured, its unit, y label, formula, name of the formula in the legend
    ("seconds", 1.0, "seconds", "flops", "FLOPs at one speed"),
    ("bytes", 2**30, "GiB at the peak", "bytes_by_formula", "formula"),
)


@style()
def headline(run: RunResults) -> str:
    """A panel for each task: our points over encoder parameters (above), 4DS as published (below, on its own axes)."""
    if not run.results:
        return _note("This profile has no benchmark, so there is no readout to draw.")

    figure, panels = subplots(2, len(run.tasks), (2.5 * len(run.tasks) + 0.6, 6.6))
    for task, ours, theirs in zip(run.tasks, *panels, strict=True):
        _our_panel(ours, run, task)
        _published_panel(theirs, task)
    panels[0, 0].set_ylabel("ours")
    panels[1, 0].set_ylabel("4DS as published: other data,\nother sizes, not comparable in value")
    legend(figure)
    return to_svg(figure)


@style()
def label_efficiency(run: RunResults) -> str:
    """A panel for each task with linear probes: their metric over the number of labelled clips, for every encoder."""
    probes = {(r.encoder, r.task): _linear_probes(r) for r in run.results if r.protocol == "frozen"}
    tasks = [task for task in run.tasks if any(probes.get((encoder, task)) for encoder in run.ladder)]
    if not tasks:
        return _note("This profile has no readout with linear probes.")
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(run.ladder)))
    looks = {name: {"color": colour, "marker": "o"} for name, colour in zip(run.ladder, colours, strict=True)}
    others = [point for point in run.trained if point not in run.ladder]
    looks |= {name: {"color": colour, "marker": "D"} for name, colour in zip(others, cycle(OTHERS), strict=False)}
    for name, dashes in zip(run.baselines, cycle(BASELINES), strict=False):
        looks[name] = {"color": "0.35", "marker": "s", "ls": dashes}

    figure, (panels,) = subplots(1, len(tasks), (4.7 * len(tasks), 4.2))
    for axes, task in zip(panels, tasks, strict=True):
        places = list(max((probes.get((name, task), {}) for name in looks), key=len))
        for name, look in looks.items():
            values = probes.get((name, task), {})
            x = [places.index(clips) for clips in values]
            axes.plot(x, list(values.values()), label=encoder_words(name), ms=4, lw=1.2, **look)
        axes.set_xticks(range(len(places)), places)
        axes.set_xlabel("labelled clips of the linear probe")
        axes.set_title(_task_title(run, task))
        axes.margins(x=0.08, y=0.12)
    legend(figure)
    return to_svg(figure)


def _linear_probes(r: Result) -> dict[str, float]:
    """The metric of the linear probes by the number of labelled clips, few to many; `all`: the training split."""
    name = re.compile(rf"{r.metric}_linear(?:_(\d+))?")
    names = {other: match for other in r.others if (match := name.fullmatch(other))}
    by_clips = {int(match[1]) if match[1] else math.inf: r.others[other] for other, match in names.items()}
    return {"all" if clips == math.inf else f"{clips:,}": value for clips, value in sorted(by_clips.items())}


@style()
def pretraining(run: RunResults) -> str:
    """Validation loss of the ladder over parameters and training FLOPs, with a power law and its band if one fits."""
    ladder = [run.summaries[point] for point in run.ladder]

    figure, panels = subplots(1, 2, (9.5, 4.4))
    columns = (("parameters", "N", "encoder parameters"), ("flops", "C", "training FLOPs"))
    for axes, (key, letter, name) in zip(panels[0], columns, strict=True):
        x, y = [s[key] for s in ladder], [s["val_loss"] for s in ladder]
        axes.plot(x, y, "o", color="tab:blue", zorder=3, label="measured")
        for s in ladder:
            axes.annotate(s["point"], (s[key], s["val_loss"]), textcoords="offset points", xytext=(6, 5))
        rho, fit, test = spearman(x, y), trend(x, y), held_out(x, y)
        title = "too few points for a trend" if rho is None else f"Spearman {rho:+.2f}"
        if fit:
            draw_law(axes, x, fit)
            low, high = fit.interval("exponent")
            title += f"\nL = E + A · {letter}^-α, α = {fit.exponent:.2f}, 95 %: {low:.2g} to {high:.2g}"
        if fit and test:
            predicted, look = (test.predicted, test.low, test.high), {"color": "tab:red", "marker": "x"}
            draw_intervals(axes, [test.x * 1.12], [predicted], label="predicted from the others", **look)
        axes.set_title(title)
        log_x(axes, x, name)
        axes.margins(y=0.15)
        axes.set_ylabel("validation loss (MSE) ↓ lower is better")
    legend(figure)
    return to_svg(figure)


@style()
def training_curves(run: RunResults) -> str:
    """Training loss over clips seen. Each method has a panel, because losses of different methods do not compare.

    Below, a row for each measure of validations during training, if there were any.
    """
    figure, panels = subplots(1 + len(run.measures), len(run.methods), (9.5, 4 + 3 * len(run.measures)))
    for (axes, *below), method in zip(panels.T, run.methods, strict=True):
        points = run.of_method(method)
        for point, colour in zip(points, mpl.colormaps["viridis"](np.linspace(0, 0.9, len(points))), strict=True):
            lines = run.losses[point]
            x, y = [line["clips_seen"] for line in lines], [line["loss"] for line in lines]
            axes.plot(x, y, color=colour, lw=1.2, label=point)
            for measured, name in zip(below, run.measures, strict=True):
                values = {line["step"]: line[name] for line in run.validations.get(point, ()) if name in line}
                batch = lines[-1]["clips_seen"] / lines[-1]["step"]
                measured.plot([step * batch for step in values], list(values.values()), "o-", color=colour, ms=3, lw=1.2)
        for measured, name in zip(below, run.measures, strict=True):
            measured.set_xlabel("clips seen")
            measured.set_ylabel(measure(name))
        _plain_log_y(axes, (1, 1.5, 2, 3, 5, 7))
        axes.set_title(method)
        axes.set_xlabel("clips seen")
        axes.set_ylabel("training loss ↓ lower is better")
        axes.legend()
    return to_svg(figure)


@style()
def methods(run: RunResults) -> str:
    """Points of other methods or maskings beside the ladder's point nearest in size: readouts and filled-in pixels."""
    others = [point for method in run.methods for point in run.of_method(method) if point not in run.ladder]
    if not others:
        return _note(f"This profile has one method and one masking only ({run.methods[0]}).")
    sizes = {point: np.log(run.summaries[point]["parameters"]) for point in run.trained}
    names: list[str] = []
    for point in others:  # nearest: by ratio
        nearest = min(run.ladder, key=lambda name: abs(sizes[name] - sizes[point]))  # noqa: B023
        names += [name for name in (nearest, point) if name not in names]
    ticks = []
    for name in names:
        size = f"{run.summaries[name]['parameters'] / 1e6:.2f} M"
        ticks.append("\n".join(filter(None, (name, run.summaries[name]["method"], run.masking(name), size))))

    figure, (panels,) = subplots(1, len(run.tasks) + 1, (max(2.2, 0.55 * len(names) + 1.1) * (len(run.tasks) + 1), 3.9))
    for axes, task in zip(panels, run.tasks, strict=False):
        for protocol, shift in (("frozen", -0.15), ("finetune", 0.0), ("classifier", 0.15)):
            results = [r for name in names if (r := run.result(name, task, protocol))]
            _draw_results(axes, [names.index(r.encoder) + shift for r in results], results, protocol, run)
        axes.set_title(_task_title(run, task))
    filled = [name for name in names if "masked_mse" in run.fidelity.get(name, {})]
    mse = [run.fidelity[name]["masked_mse"] for name in filled]
    panels[-1].plot([names.index(name) for name in filled], mse, "D", color="tab:green")
    panels[-1].set_title("filled-in pixels\nsquared error of\nhidden pixels\n↓ lower is better")
    for axes in panels:
        axes.set_xticks(range(len(names)), ticks, fontsize=7)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.margins(y=0.25)
    legend(figure)
    return to_svg(figure)


@style()
def costs(path: Path = MEASURED_COSTS) -> str:
    """A column for each axis of growth: time with its quartiles above, memory below, the formulas dashed."""
    bench = json.loads(path.read_text())

    figure, panels = subplots(len(COSTS), len(bench["results"]), (2.1 * len(bench["results"]) + 0.6, 5.2))
    for (name, axis), column in zip(bench["results"].items(), panels.T, strict=True):
        for axes, (measured, unit, label, formula, formula_name) in zip(column, COSTS, strict=True):
            x, y, predicted = (np.array([row[key] for row in axis["rows"]]) for key in ("value", measured, formula))
            if measured == "seconds":
                predicted = predicted * np.exp(np.mean(np.log(y / predicted)))  # FLOPs at the average measured speed
                low, high = (np.array([row[key] for row in axis["rows"]]) for key in ("low", "high"))
                axes.errorbar(x, y, (y - low, high - y), fmt="none", color="tab:blue")
            axes.plot(x, y / unit, "o", color="tab:blue")
            axes.plot(x, predicted / unit, "--", color="tab:gray", label=formula_name)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(list(x)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticklabels([str(value) for value in x])
            _plain_log_y(axes, (1, 2, 5))
            exponents = axis["exponents"]
            axes.set_title(f"exponent {exponents[measured]:.2f} (dashed {exponents[formula]:.2f})")
            axes.set_xlabel(name)
            if column[0] is panels[0, 0]:
                axes.set_ylabel(label)
                axes.legend(loc="upper left")
    settings = bench["settings"]
    figure.suptitle(
        f"point {settings['point']}, batches of {settings['batch']} unless the axis differs, fp32, {settings['device']}, "
        f"{settings['threads']} thread(s); median and quartiles of {settings['repeats']} turns"
    )
    return to_svg(figure)


def draw_figures(run: RunResults) -> dict[str, str]:
    """svg by name."""
    drawn = (headline, label_efficiency, pretraining, training_curves, methods)
    return {figure.__name__: figure(run) for figure in drawn} | {"costs": costs()}


def _our_panel(axes: Axes, run: RunResults, task: str) -> None:
    """Points with intervals, baselines and the trivial answer (`_draw_trivial`) as horizontal lines.

    With a study of seeds, frozen readouts are drawn as mean and standard deviation, and this run's values beside them.
    """
    ladder, results = set(run.ladder), [r for r in run.results if r.task == task]
    baselines = dict(zip(run.baselines, cycle(BASELINES), strict=False))
    names = dict.fromkeys([*run.trained, *(r.encoder for r in results)])  # the points, then published encoders
    others = dict(zip((name for name in names if name not in ladder | baselines.keys()), cycle(OTHERS), strict=False))
    for protocol, (colour, _, line) in LOOK.items():
        if points := [r for r in results if r.protocol == protocol and r.encoder in ladder]:
            _draw_results(axes, [r.parameters for r in points], points, protocol, run)
            sizes = sorted({r.parameters for r in points})
            means = [np.mean([_drawn(run, r)[0] for r in points if r.parameters == size]) for size in sizes]
            axes.plot(sizes, means, color=colour, ls=line, lw=1.2, zorder=2)
    for r in results:
        value, low, high = _drawn(run, r)
        if r.encoder in baselines:
            axes.axhline(value, color="0.35", lw=1.2, ls=baselines[r.encoder], label=encoder_words(r.encoder))
            if run.fresh_seed_study:
                axes.axhspan(low, high, color="0.35", alpha=0.12, lw=0, label="standard deviation of a baseline")
        elif r.encoder not in ladder:
            look = {"color": others[r.encoder], "marker": "D" if r.protocol == "frozen" else LOOK[r.protocol][1], "ms": 5}
            draw_intervals(axes, [r.parameters], [(value, low, high)], label=_of_method(run, r), **look)
        if run.fresh_seed_study and r.protocol == "frozen" and r.encoder not in baselines:
            axes.plot(r.parameters, r.value, "x", color="black", ms=4.5, zorder=4, label=f"seed {run.seed}, this run")
    largest = next((r for point in reversed(run.ladder) if (r := run.result(point, task, "frozen"))), None)
    if largest and (trivial := trivial_answer(run, largest)):
        _draw_trivial(axes, trivial.value)
    axes.set_title(_task_title(run, task))
    log_x(axes, [r.parameters for r in results if r.encoder not in baselines], "encoder parameters")


def _draw_trivial(axes: Axes, value: float) -> None:
    """A line, if it lies near the encoders; else an arrow and the value at that edge, and the y axis stays theirs."""
    low, high = axes.get_ylim()
    near = 0.2 * (high - low)
    axes.axhline(value, color="tab:red", lw=1, ls=TRIVIAL_LINE, label="trivial answer")
    if low - near <= value <= high + near:
        return
    above, room = value > high, 0.12 * (high - low)  # of the text
    axes.set_ylim((low, high + room) if above else (low - room, high))
    place = {"x": 0.98, "y": 0.99 if above else 0.01, "ha": "right", "va": "top" if above else "bottom"}
    text = f"{'↑' if above else '↓'} off axis: trivial {value:.3g}"
    axes.text(**place, s=text, color="tab:red", fontsize=8, transform=axes.transAxes)


def _drawn(run: RunResults, r: Result) -> tuple[float, float, float]:
    """Value, low and high: over seeds the mean and one standard deviation, else the interval over validation videos."""
    measured = run.fresh_seed_study and r.protocol == "frozen" and run.fresh_seed_study.of(r.encoder, r.task, r.metric)
    if not measured:
        return r.value, r.low, r.high
    return measured.mean, measured.mean - measured.deviation, measured.mean + measured.deviation


def _published_panel(axes: Axes, task: str) -> None:
    paper = published()["4DS"]
    curves = paper["tasks"].get(task)
    if curves is None:
        axes.text(0.5, 0.5, "not in the paper", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    for protocol, (colour, marker, line) in LOOK.items():
        if values := curves.get(protocol):
            x = [paper["sizes"][size] for size in values]
            look = {"color": colour, "marker": marker, "ls": line, "ms": 4, "lw": 1.2, "mfc": "white"}
            axes.plot(x, list(values.values()), label=f"4DS, {protocol}", **look)
    axes.set_title(panel_title(curves["benchmark"], curves["metric"], curves["unit"], curves["higher_is_better"]))
    log_x(axes, list(paper["sizes"].values()), "parameters")


def _draw_results(axes: Axes, x: Sequence[float], results: Sequence[Result], protocol: str, run: RunResults) -> None:
    if results:
        color, marker, _ = LOOK[protocol]
        look = {"color": color, "marker": marker, "ms": 4.5, "zorder": 3}
        label = f"{protocol}, 95 % interval over videos"
        if run.fresh_seed_study and protocol == "frozen":
            seeds = run.fresh_seed_study.of(results[0].encoder, results[0].task, results[0].metric).seeds
            label = f"{protocol}, mean of {seeds} seeds, standard deviation"
        draw_intervals(axes, x, [_drawn(run, r) for r in results], label=label, **look)


def _plain_log_y(axes: Axes, ticks: Iterable[float]) -> None:
    """A logarithmic y axis with numbers such as 0.02 at some multiples of every power of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=tuple(ticks)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _of_method(run: RunResults, r: Result) -> str:
    """`mae_st_tiny (MAEST, 0.13 M), frozen` of another method's point; `vjepa2_l, frozen` of a published encoder."""
    summary = run.summaries.get(r.encoder)
    method = f" ({summary['method']}, {r.parameters / 1e6:.2f} M)" if summary else ""
    return f"{r.encoder}{method}, {r.protocol}"


def _task_title(run: RunResults, task: str) -> str:
    r = next(r for r in run.results if r.task == task)
    return panel_title(task, r.metric, r.unit, r.higher_is_better)


@style()
def _note(text: str) -> str:
    figure = Figure(figsize=(9.5, 0.6), layout="constrained")
    figure.text(0.02, 0.5, text, va="center", fontsize=10)
    return to_svg(figure)
