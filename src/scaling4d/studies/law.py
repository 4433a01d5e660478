"""The joint law of a folder of pretraining results, and predictions that are committed before their runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from scaling4d import artifacts, config
from scaling4d.provenance import life_of, parse_csv, text_with_sha256
from scaling4d.records import UserError, as_user_error, files_below, write_json
from scaling4d.studies.loss_law import DRAWS, MIN_RUNS, NAMES, LossLaw, fit_loss_law
from scaling4d.studies.markup import cell_text
from scaling4d.studies.plotting import draw_intervals, legend, log_x, style, subplots, to_svg
from scaling4d.studies.study import REPORTS, RUNS, Study, read_runs

FITTED = REPORTS / "isoflop"  # the study whose law `scaling4d plan` quotes
PREDICTIONS = config.EXPERIMENTS / "prediction"
NUMBER_WORDS = {
    "floor": "floor E",
    "size_scale": "scale of size A",
    "size_exponent": "exponent of size alpha",
    "data_scale": "scale of data B",
    "data_exponent": "exponent of data beta",
}
LAW_COLUMNS = ("number", "value", "low", "high", "low_of_runs", "high_of_runs", "identified")
OPTIMUM_COLUMNS = ("flops", "parameters", "parameters_low", "parameters_high", "loss", "bracketed")
PREDICTION_COLUMNS = (
    *("arm", "parameters", "clips_seen", "predicted", "low", "high", "measured", "inside"),
    *("miss_percent", "by_a_line_percent", "unchanged_percent"),
)
LEFT_OUT_COLUMNS = ("left_out", "runs", "floor", "size_exponent", "data_exponent", "best_size")
SHORTEST = 0.1  # of the runs, those with the fewest clips, which a row of the sensitivity leaves out; ours
BUDGETS = 24  # of a drawn frontier
STEPS = "pretrain.Training.steps"


@dataclass(frozen=True)
class TrainedRun:
    """A pretraining. arm, seed: of a study's run; of other results the point's name and its seed."""

    arm: str
    seed: int
    parameters: int
    clips_seen: int
    flops: float
    loss: float


def trained_runs(rows: Iterable[Mapping[str, str]]) -> list[TrainedRun]:
    """The pretrainings in the rows of a study's runs.csv."""
    trained, sizes = (row for row in rows if row["task"] == "pretrain"), ("seed", "parameters", "clips_seen")
    return [TrainedRun(r["arm"], *(int(r[key]) for key in sizes), float(r["flops"]), float(r["value"])) for r in trained]


def read_trained_runs(folder: Path) -> list[TrainedRun]:
    """Pretrainings of a study's folder (runs.csv), or of a folder with artifacts (summary.json at any depth).

    Raises:
        UserError: neither is there, or the artifacts are of several methods, whose losses do not compare.
    """
    if (folder / RUNS).is_file():
        return trained_runs(read_runs(folder))
    paths = [path for path in files_below(folder) if path.name == "summary.json"]
    if not paths:
        raise UserError(f"{folder} has no {RUNS} and no summary.json; needed a folder of reports/studies or of artifacts")
    with as_user_error(f"a summary.json below {folder} is not one of a pretraining"):
        summaries = [json.loads(path.read_text()) for path in paths]
        methods = sorted({summary["method"] for summary in summaries})
        if len(methods) > 1:
            message = f"{folder} has results of {' and '.join(methods)}, whose losses do not compare"
            raise UserError(f"{message}; give one method's folder")
        keys = ("point", "seed", "parameters", "clips_seen", "flops", "val_loss")
        return [TrainedRun(*(summary[key] for key in keys)) for summary in summaries]


@cache
def law_of_text(runs_csv: str, draws: int = DRAWS) -> LossLaw | None:
    """The law of the text of a runs.csv."""
    return fit_runs(trained_runs(parse_csv(runs_csv)), draws)


def predicting_runs(prediction: Mapping[str, Any]) -> str:
    """Text of the runs.csv that a prediction names, as it was then.

    Raises UserError: neither the disk nor a commit has it.
    """
    path = f"{prediction['source']}/{RUNS}"
    text = text_with_sha256(path, prediction["source_sha256"])
    if text is None or law_of_text(text) is None:
        raise UserError(f"no {path} of sha256 {prediction['source_sha256'][:12]} with runs for a law, on disk or in a commit")
    return text


def law_of(*folders: Path, draws: int = DRAWS) -> LossLaw:
    """The law of the runs of one folder or several.

    Args:
        draws: as `fit_loss_law`; without any there are no intervals, and the fit takes a second.
    Raises:
        UserError: as `read_trained_runs`, or too few runs, sizes or numbers of clips.
    """
    runs = [run for folder in folders for run in read_trained_runs(folder)]
    alone = folders[0] / RUNS
    if law := law_of_text(alone.read_text(), draws) if len(folders) == 1 and alone.is_file() else fit_runs(runs, draws):
        return law
    sizes, clips = ({getattr(run, key) for run in runs} for key in ("parameters", "clips_seen"))
    names = f"{', '.join(map(str, folders))} {'have' if folders[1:] else 'has'}"
    raise UserError(
        f"{names} {len(runs)} runs of {len(sizes)} sizes with {len(clips)} numbers of clips; a law of size and data "
        f"needs {MIN_RUNS} runs of 3 sizes with 3 numbers of clips, such as those of `scaling4d study isoflop`"
    )


def fit_runs(runs: Sequence[TrainedRun], draws: int = DRAWS) -> LossLaw | None:
    """None as `fit_loss_law`. The same training in two studies counts once."""
    keys = ("parameters", "clips_seen", "flops", "loss")
    trainings = dict.fromkeys((run.seed, *(getattr(run, key) for key in keys)) for run in runs)
    return fit_loss_law(*([training[at] for training in trainings] for at in range(1, 1 + len(keys))), draws=draws)


def law_rows(law: LossLaw) -> Iterator[dict[str, Any]]:
    """Rows of law.csv: each number with its two 90 % intervals; of floor and exponents, whether they are identified."""
    for name in NAMES:
        fixed = None if name.endswith("scale") else law.identified(name)
        yield dict(zip(LAW_COLUMNS, (NUMBER_WORDS[name], *law.interval(name), *law.interval_of_runs(name), fixed), strict=True))


def left_out_rows(law: LossLaw) -> Iterator[dict[str, Any]]:
    """Rows of sensitivity.csv: the law without some runs. best_size: parameters, of the largest fitted budget."""
    every, largest = np.arange(len(law.losses)), np.array([law.flops.max()])

    def row(name: str, runs: int, fits: np.ndarray, reduce: Callable[..., Any]) -> dict[str, Any]:
        sizes = [law.optimum(largest, values)[0][0] for values in fits]
        numbers = [reduce(fits[:, NAMES.index(column)]) for column in LEFT_OUT_COLUMNS[2:-1]]
        return dict(zip(LEFT_OUT_COLUMNS, (name, runs, *map(float, numbers), round(reduce(sizes))), strict=True))

    yield row("no run", len(every), law.values[None], np.min)
    shortest = np.argsort(law.clips, kind="stable")[: math.ceil(SHORTEST * len(every))]
    yield row(f"the {len(shortest)} shortest", len(every) - len(shortest), law.fit_to(np.delete(every, shortest))[None], np.min)
    fits = np.array([law.fit_to(np.delete(every, left)) for left in every])
    yield row("any one, lowest", len(every) - 1, fits, np.min)
    yield row("any one, highest", len(every) - 1, fits, np.max)


def optimum_rows(law: LossLaw) -> Iterator[dict[str, Any]]:
    """Rows of optimum.csv: for each budget of the fitted runs the best size, its 90 % interval, and its loss.

    bracketed: of the budget's runs, a smaller and a larger encoder have a higher loss than the best one.
    """
    of_runs = np.array([_rounded(flops) for flops in law.flops])
    budgets = np.unique(of_runs)
    sizes, losses = law.optimum(budgets)
    low, high = law.optimum_interval(budgets)
    for flops, *in_parameters, loss in zip(budgets, sizes, low, high, losses, strict=True):
        measured = law.parameters[of_runs == flops]
        bracketed = measured.min() < measured[law.losses[of_runs == flops].argmin()] < measured.max()
        yield dict(zip(OPTIMUM_COLUMNS, (float(flops), *map(round, in_parameters), float(loss), bool(bracketed)), strict=True))


def law_text(law: LossLaw, *, parameters: float | None, clips: float | None, flops: float | None) -> str:
    """The law's numbers and, for a size with clips or FLOPs, the predicted loss; for FLOPs alone the best size."""
    lines = [f"loss = E + A (N / n)^-alpha + B (D / d)^-beta, over {len(law.flops)} runs; in brackets 90 %, of noise and of runs"]
    for row in law_rows(law):
        unclear = "  not identified" if row["identified"] is False else ""
        value, *ends = (cell_text(row[column]) for column in LAW_COLUMNS[1:-1])
        lines.append(f"  {row['number']}: {value} [{', '.join(ends[:2])}] [{', '.join(ends[2:])}]{unclear}")
    if flops and not parameters:
        (size,), (loss,) = law.optimum(np.array([flops]))
        (low,), (high,) = law.optimum_interval(np.array([flops]))
        text = f"best size for {flops:.3g} FLOPs: {size:,.0f} parameters [{low:,.0f}, {high:,.0f}], loss {cell_text(loss)}"
        at_limit = {size, low, high} & {*law.sizes[[0, -1]]}
        lines.append(f"{text}{'; at a limit of the search, so not identified' if at_limit else ''}")
        parameters = size
    if parameters and flops:
        clips = flops / float(law.flops_per_clip(np.array([parameters]))[0])
    if parameters and clips:
        lines.append(prediction_text(law, parameters, clips))
    return "\n".join(lines)


def prediction_text(law: LossLaw, parameters: float, clips: float) -> str:
    """The predicted loss of a size and a number of clips, in a line; its interval if the law has draws."""
    loss = cell_text(float(law.loss(np.array([parameters]), np.array([clips]))[0]))
    ends = f" [{', '.join(map(cell_text, law.prediction(parameters, clips)[1:]))}]" if len(law.draws) else ""
    where = "" if law.inside(parameters, clips) else "; outside the fitted range"
    return f"{parameters:,.0f} parameters, {clips:,.0f} clips: loss {loss}{ends}{where}"


# ---- predictions before a run ----


def write_prediction(study: Study, source: Path) -> Path:
    """Predict losses of a study by the law of another study's folder; commit the file before the runs.

    Arms are left out whose size some study has measured with as many clips, and those to which the law does not apply:
    baselines, encoders of another method, and trainings that do not begin with random weights.
    Raises:
        UserError: as `law_of`, the study already has results or a committed prediction, an arm changes more than
            its steps, or nothing is left to predict.
    """
    path = PREDICTIONS / f"{study.name}.json"
    if (study.folder / RUNS).is_file():
        raise UserError(f"{study.folder / RUNS} has the results already; a prediction is made before them")
    if life_of(path.as_posix()):
        raise UserError(f"a commit has {path}; a prediction is made once")
    if not (source / RUNS).is_file():
        raise UserError(f"{source} has no {RUNS}; --predict needs the folder of a study, whose runs the audit can find again")
    measured = {(run.parameters, run.clips_seen) for runs in REPORTS.glob(f"*/{RUNS}") for run in read_trained_runs(runs.parent)}
    law, rows = law_of(source), []
    for arm in study.arms:
        if others := [change for change in arm.overrides if not change.startswith(f"{STEPS}=")]:
            message = f"arm {arm.name} changes {', '.join(others)}"
            raise UserError(f"{message}; a law of size and clips predicts arms that change {STEPS} at most")
        settings = config.compose(arm.settings(study.seeds[0]))
        is_simple_mae = "SimpleMAE" in settings["points"].get(arm.encoder, {}).get("model", {})
        if is_simple_mae and (sizes := _sizes(arm.encoder, settings)) not in measured:
            rows.append(dict(zip(PREDICTION_COLUMNS[:6], (arm.name, *sizes, *law.prediction(*sizes)), strict=True)))
    if not rows:
        raise UserError(f"every size of study {study.name} is measured with as many clips; a prediction is made before the runs")
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"source": str(source), "source_sha256": artifacts.sha256(source / RUNS), "arms": rows})
    return path


def _sizes(point: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Encoder parameters of a point, and the clips that it sees."""
    from scaling4d.pretrain.plan.plan import build

    training = config.section(settings, "pretrain.Training")
    parameters = sum(p.numel() for p in build(point, settings).encoder.parameters())
    return parameters, training["steps"] * training["batch"]


def read_prediction(name: str) -> dict[str, Any] | None:
    """What `write_prediction` wrote for a study; None: nothing."""
    path = PREDICTIONS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def outcome_rows(prediction: Mapping[str, Any], runs: Sequence[TrainedRun]) -> Iterator[dict[str, Any]]:
    """Rows of predicted.csv: every predicted arm; of those that ran the mean of their losses, and misses in percent.

    inside: `2 of 3`, seeds whose loss lies in the interval, which is one run's. by_a_line_percent, unchanged_percent:
    the miss of a straight line, in logarithms, through the two longest shorter runs of the size among those that
    predict, and of the longest one's loss; losses of several seeds are averaged.
    Raises UserError: an arm ran with another size or number of clips than it was predicted for.
    """
    losses: dict[int, dict[int, list[float]]] = {}  # parameters -> clips -> of the predicting runs
    for run in sorted(trained_runs(parse_csv(predicting_runs(prediction))), key=lambda run: run.clips_seen):
        losses.setdefault(run.parameters, {}).setdefault(run.clips_seen, []).append(run.loss)
    for row in map(dict, prediction["arms"]):
        measured = [run for run in runs if run.arm == row["arm"]]
        if other := [run for run in measured if (run.parameters, run.clips_seen) != (row["parameters"], row["clips_seen"])]:
            ran = f"{other[0].parameters} parameters with {other[0].clips_seen} clips"
            raise UserError(f"{row['arm']} was predicted for {row['parameters']} with {row['clips_seen']}, and ran as {ran}")
        if not measured:
            yield row
            continue
        mean, inside = fmean(run.loss for run in measured), sum(row["low"] <= run.loss <= row["high"] for run in measured)
        row |= {"measured": mean, "inside": f"{inside} of {len(measured)}"}
        row["miss_percent"] = 100 * (mean / row["predicted"] - 1)
        shorter = [(clips, some) for clips, some in losses.get(row["parameters"], {}).items() if clips < row["clips_seen"]]
        if len(same := shorter[-2:]) == 2:
            (x, y), at = np.log([[clips for clips, _ in same], [fmean(each) for _, each in same]]), math.log(row["clips_seen"])
            line = math.exp(y[1] + (y[1] - y[0]) / (x[1] - x[0]) * (at - x[1]))
            row |= {"by_a_line_percent": 100 * (mean / line - 1), "unchanged_percent": 100 * (mean / math.exp(y[1]) - 1)}
        yield row


# ---- figure ----


@style()
def law_figure(runs: Sequence[TrainedRun], law: LossLaw, predicted: Sequence[Mapping[str, Any]]) -> str:
    """Left: loss over size, a curve for each budget, and the optimum. Right: the best size for every budget.

    predicted: rows of `outcome_rows`, drawn with their intervals beside the measured losses.
    """
    figure, ((curves, frontier),) = subplots(1, 2, (9.6, 4.2))
    budgets = sorted({_rounded(run.flops) for run in runs})
    shown = [*law.parameters, *(run.parameters for run in runs)]
    sizes = np.geomspace(min(shown) / 1.3, max(shown) * 1.3, 100)
    for number, budget in enumerate(budgets):
        color = f"C{number % 10}"
        some = [run for run in runs if _rounded(run.flops) == budget]
        points = [run.parameters for run in some], [run.loss for run in some]
        curves.plot(*points, "o", color=color, ms=4, label=f"{budget:.2g} FLOPs")
        curves.plot(sizes, law.loss(sizes, budget / law.flops_per_clip(sizes)), color=color, lw=1)
    for row in predicted:
        look = {"fmt": "_", "color": "0.3", "capsize": 3, "label": "predicted before the run, 90 %"}
        draw_intervals(curves, [row["parameters"]], [(row["predicted"], row["low"], row["high"])], **look)
        if "measured" in row:
            curves.plot(row["parameters"], row["measured"], "kx", ms=5, label="its outcome")
    fitted = np.geomspace(law.flops.min(), law.flops.max(), BUDGETS)
    beyond = np.geomspace(law.flops.max(), 2 * max(*budgets, law.flops.max()), BUDGETS)
    grid = np.concatenate([fitted, beyond])
    best, losses = law.optimum(grid)
    low, high = law.optimum_interval(grid)
    parts = {
        "best size of a budget": (slice(BUDGETS), "k--"),
        "the same, beyond the fitted budgets": (slice(BUDGETS, None), "k:"),
    }
    for label, (part, look) in parts.items():
        curves.plot(best[part], losses[part], look, lw=1, label=label)
        frontier.plot(grid[part], best[part], look, lw=1)
    log_x(curves, shown, "encoder parameters")
    curves.set_title("validation loss of pretraining\n↓ lower is better")
    frontier.fill_between(grid, low, high, color="0.5", alpha=0.2, lw=0, label="its 90 % interval")
    frontier.set_yscale("log")
    log_x(frontier, [*grid], "training FLOPs")
    frontier.set_title("best size of a budget, encoder parameters")
    legend(figure)
    return to_svg(figure)


def _rounded(flops: float) -> float:
    """A budget in two digits: whole steps make runs of one budget differ a little."""
    return float(f"{flops:.1e}")
