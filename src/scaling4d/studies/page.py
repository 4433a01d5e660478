"""Locks of a study's runs in; runs.csv, table.csv, fits.csv, tasks.csv, figures, study.json and study.html out."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling4d import artifacts
from scaling4d.provenance import parse_csv, read_lock, to_csv, write_text
from scaling4d.records import UserError, is_of_finder, json_text
from scaling4d.studies import law as laws
from scaling4d.studies import study as studies
from scaling4d.studies.fits import held_out, left_out_error, spearman, trend
from scaling4d.studies.law import TrainedRun
from scaling4d.studies.loss_law import LossLaw
from scaling4d.studies.markup import NOTHING, cell_text, csv_cell_text, deviation_format, html_figure, html_page, html_table
from scaling4d.studies.plotting import draw_law, legend, log_x, panel_title, style, subplots, to_svg
from scaling4d.studies.study import REPORTS, UNMEASURED, Study
from scaling4d.studies.words import WORDS, measure_head, metric_words

PANELS = 4  # of a row of a figure
SIGNAL = "signal.csv"
LAW, OPTIMUM, LEFT_OUT, PREDICTED = "law.csv", "optimum.csv", "sensitivity.csv", "predicted.csv"
LAW_AFTER, OPTIMUM_AFTER, LEFT_OUT_AFTER = "law_after.csv", "optimum_after.csv", "sensitivity_after.csv"
FITS, TASKS, INDEX, PAGE = "fits.csv", "tasks.csv", "index.html", "study.html"
REFERENCES = re.compile(r" \[[a-z_.]+: [^]]*\]")  # of a sentence of findings.md: the rows of table.csv, or the figure
FIT_COLUMNS = (
    *("task", "ladder", "metric", "points", "floor", "floor_low", "floor_high", "exponent", "exponent_low", "exponent_high"),
    *("identified", "largest", "measured", "predicted", "predicted_low", "predicted_high", "inside"),
)
TASK_COLUMNS = (
    *("task", "ladder", "arms", "better_with_size", "spearman_of_loss", "lowest_of_a_seed", "highest_of_a_seed"),
    *("error_by_size", "error_by_loss", "better_predictor"),
)
AXES = {"parameters": "encoder parameters", "flops": "training FLOPs", "clips_seen": "clips seen"}
Row = Mapping[str, Any]
PREDICTORS_EXPLAINED = (
    "better with size: the last arm beside the first. reconstruct: an error of pixels, as the loss of pretraining is. "
    "spearman of loss: rank correlation of validation loss and task error over the arms, of the means and of single seeds. error "
    "by size, error by loss: root mean square over the arms of the error of a straight line through the other arms, over the "
    "logarithm of the ladder's size or over the loss. A predictor is better where its error is lower for the means and for every "
    "single seed, and lower than that of the mean of the other arms. A task that does not rise has none."
)
LAW_EXPLAINED = (
    "N: encoder parameters. D: clips seen. n, d: their geometric means over the fitted runs. low, high: of a parametric "
    "bootstrap. low of runs, high of runs: of fits to as many runs, drawn with replacement. An exponent is identified where in "
    "both intervals the ends differ by a factor of four at most and none is a limit of the search; the floor likewise. Where "
    "losses were predicted, the law is that of the predicting study."
)
PREDICTED_EXPLAINED = (
    "low, high: 90 % interval of one run. measured: the mean over the seeds, empty where an arm did not run. inside: seeds "
    "whose loss lies in the interval. miss: measured over predicted. by a line, unchanged: the same for a straight line "
    "through the two longest shorter runs of the size, in logarithms, and for the loss of the longest."
)
OPTIMUM_EXPLAINED = (
    "bracketed: of the budget's runs, a smaller and a larger encoder have a higher loss than the best one. Elsewhere the best "
    "size is the law's alone."
)
LEFT_OUT_EXPLAINED = "Fits without some of the runs. best size: parameters, of the largest fitted budget."
SIGNAL_EXPLAINED = (
    "signal: the standard deviation of the arms' means, less the part that noise has in it. noise: the deviation of a seed, "
    "without the seed's effect on all arms."
)
RUNS_CAPTION = (
    "A dot for each seed, a line at the mean of each arm. The baseline is the arm {base}; each band around its mean is the seed "
    "noise of the arm's difference at 95 %."
)
LAWS_CAPTION = (
    "Every seed over the {size}, with a power law and its 95 % band where one fits. There is no baseline: sizes are compared "
    "with each other."
)
CSV_TABLES = {  # file -> heading of its table on the page
    FITS: "Power laws over all seeds, and the prediction of the largest size by the others",
    TASKS: "Each task: whether it rises beyond the noise of seeds, and whether size or loss predicts it better",
    SIGNAL: "Signal to noise of each task over {arms}",
    PREDICTED: "Losses that were predicted before these runs",
    LAW: "Loss over size N and clips seen D: E + A (N / n)^-alpha + B (D / d)^-beta, with 90 % intervals",
    OPTIMUM: "Best size of a budget, with its 90 % interval",
    LEFT_OUT: "What the law owes to single runs",
    LAW_AFTER: "The law of the predicting runs and of these together",
    OPTIMUM_AFTER: "Best size of a budget by both together",
    LEFT_OUT_AFTER: "What that law owes to single runs",
}
CSV_EXPLAINED = {SIGNAL: SIGNAL_EXPLAINED, TASKS: PREDICTORS_EXPLAINED, LAW: LAW_EXPLAINED, PREDICTED: PREDICTED_EXPLAINED}
CSV_EXPLAINED |= dict.fromkeys((LEFT_OUT, LEFT_OUT_AFTER), LEFT_OUT_EXPLAINED)
CSV_EXPLAINED |= dict.fromkeys((OPTIMUM, OPTIMUM_AFTER), OPTIMUM_EXPLAINED)
LAW_CAPTION = (
    "Left: validation loss over the encoder's size; a colour is a budget of training FLOPs, its curve the fitted law. Right: the "
    "size with the lowest loss for every budget, with its 90 % interval; dotted: beyond the fitted budgets. There is no "
    "baseline: sizes and budgets are compared with each other."
)
ONE_SEED = "One seed: no spread, no noise. Losses compare only between arms that predict the same target."
EXPLAINED = (
    "Mean over {seeds} seeds ± their standard deviation. In brackets: the difference to {base}, seed by seed, and the seed noise "
    "of such a difference at 95 %: the larger one of two limits, by the deviation of all arms together and by those of the two "
    "arms alone (Welch). * marks a difference larger than the noise. The noise is of training and readout seeds alone. Losses "
    "compare only between arms that predict the same target."
)


def write_study(study: Study, cache: Path, run_facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write all files of the study's folder but locks/ and findings.md. Equal locks give equal bytes.

    Args:
        cache: DVC's. A run whose results it lacks keeps its former rows, if its lock is unchanged, or has those of the
            same experiment in another study.
        run_facts: `arm-seed` -> experiment and, for runs of this clone, seconds and cpu_seconds. Other facts stay.
    Raises:
        UserError: a run without a lock or without results.
    """
    folder, facts_json, findings = study.folder, study.folder / studies.FACTS, study.folder / studies.FINDINGS
    former = json.loads(facts_json.read_text()) if facts_json.is_file() else {"runs": {}, "files": {}}
    former_rows, rows, locks, facts = studies.read_runs(folder), [], {}, {}
    for run, (arm, seed) in study.runs.items():
        path = study.lock(run)
        if not path.is_file():
            raise UserError(f"no {path}; run `{study.command}`")
        locks[run], known = read_lock(path), {"experiment": "", **former["runs"].get(run, {})}
        given = run_facts.get(run, known)
        facts[run] = (known if given["experiment"] == known["experiment"] else {}) | given
        numbers = studies.run_numbers(arm, seed, locks[run], cache, facts[run]["experiment"])
        if numbers is None and studies.is_recorded(folder, former["files"], run):
            numbers = [row for row in former_rows if row["arm"] == arm.name and row["seed"] == str(seed)]
        if not numbers and (recorded := studies.recorded_run(facts[run]["experiment"])):
            numbers = [{**row, "arm": arm.name} for row in recorded[1]]
        if not numbers:
            raise UserError(f"DVC's cache lacks results that {path} names; run `{study.command}`")
        rows += numbers
    files = {studies.RUNS: to_csv(studies.RUN_COLUMNS, rows)}
    rows = parse_csv(files[studies.RUNS])
    files |= tables(study, rows)
    files["runs.svg"] = runs_figure(study, rows, studies.study_table(rows, study.base))
    files |= {f"laws_{ladder}.svg": laws_figure(study, rows, ladder) for ladder in study.ladders}
    if LAW in files:
        files["law.svg"] = laws.law_figure(*fitted_law(study, rows))
    content = studies.study_facts(study, locks, facts)
    text = findings.read_text() if findings.is_file() else ""
    files[PAGE] = study_page(study, rows, files, text, content["code"])
    for name, text in files.items():
        write_text(folder / name, text)
    current = {*map(study.lock, study.runs), *(folder / name for name in files)}
    for path in {*(folder / studies.LOCKS).glob("*.lock"), *folder.glob("*.svg")} - current:
        path.unlink()  # of an arm, seed or ladder that the study no longer has
    written = sorted(path for path in folder.rglob("*") if path.is_file() and path != facts_json and not is_of_finder(path.name))
    content["files"] = {path.relative_to(folder).as_posix(): artifacts.sha256(path) for path in written}
    write_text(facts_json, json_text(content))
    write_text(REPORTS / INDEX, index_page())


def tables(study: Study, rows: Sequence[Row]) -> dict[str, str]:
    """All csv files that follow from the rows of runs.csv, by name."""
    files = {studies.TABLE: to_csv(studies.TABLE_COLUMNS, studies.study_table(rows, study.base))}
    # Of the first ladder, or of a study without one all arms: baselines far from the ladder would count as signal.
    arms = next((tuple(arms) for _, arms in study.ladders.values()), tuple(arm.name for arm in study.arms))
    if signals := [*studies.signal_rows([row for row in rows if row["arm"] in arms])]:
        files[SIGNAL] = to_csv(studies.SIGNAL_COLUMNS, signals)
    if study.ladders:
        files |= {FITS: to_csv(FIT_COLUMNS, fit_rows(study, rows)), TASKS: to_csv(TASK_COLUMNS, task_rows(study, rows))}
    runs, law, outcome = fitted_law(study, rows)
    if law:
        files |= _law_files(law, (LAW, OPTIMUM, LEFT_OUT))
    if outcome:
        files[PREDICTED] = to_csv(laws.PREDICTION_COLUMNS, outcome)
        predicting = laws.trained_runs(parse_csv(laws.predicting_runs(laws.read_prediction(study.name))))
        if after := laws.fit_runs([*predicting, *runs]):  # the law with its outcome
            files |= _law_files(after, (LAW_AFTER, OPTIMUM_AFTER, LEFT_OUT_AFTER))
    return files


def _law_files(law: LossLaw, names: tuple[str, str, str]) -> dict[str, str]:
    tables = (
        (laws.LAW_COLUMNS, laws.law_rows),
        (laws.OPTIMUM_COLUMNS, laws.optimum_rows),
        (laws.LEFT_OUT_COLUMNS, laws.left_out_rows),
    )
    return {name: to_csv(columns, rows_of(law)) for name, (columns, rows_of) in zip(names, tables, strict=True)}


def fitted_law(study: Study, rows: Sequence[Row]) -> tuple[list[TrainedRun], LossLaw | None, list[dict[str, Any]]]:
    """Trained runs; the law of size and data, of a predicted study the predicting one; rows of predicted.csv.

    Without a law where the study asks for none or, without a prediction, has too few runs.
    """
    if not study.law:
        return [], None, []
    runs, prediction = laws.trained_runs(rows), laws.read_prediction(study.name)
    if prediction:
        law = laws.law_of_text(laws.predicting_runs(prediction))
        return runs, law, [*laws.outcome_rows(prediction, runs)]
    return runs, laws.law_of_text(to_csv(studies.RUN_COLUMNS, rows)), []


# ---- laws, for studies with ladders ----


def fit_rows(study: Study, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Rows of fits.csv: for each task and ladder the law of all seeds, and the largest size predicted by the others.

    1 - value is fitted where higher is better: such metrics are shares. Columns stay empty where no law fits.
    """
    for ladder in study.ladders:
        for task, points in _ladder(study, rows, ladder).items():
            metric, higher = points[0]["metric"], points[0]["higher_is_better"]
            sizes, errors = [point["x"] for point in points], [point["error"] for point in points]
            row = {"task": task, "ladder": ladder, "metric": f"1 - {metric}" if higher else metric, "points": len(points)}
            if fit := trend(sizes, errors):
                for name in ("floor", "exponent"):
                    low, high = fit.interval(name)
                    row |= {name: getattr(fit, name), f"{name}_low": low, f"{name}_high": high}
                row["identified"] = fit.identified
            if test := held_out(sizes, errors):
                row |= {"largest": test.x, "measured": test.measured, "predicted": test.predicted}
                row |= {"predicted_low": test.low, "predicted_high": test.high, "inside": test.inside}
            yield row


def task_rows(study: Study, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Rows of tasks.csv: for each task and ladder whether it rises, and whether size or loss predicts it better.

    better_with_size: the last arm beside the first, by the noise of seeds (`noise_limit`); None with one seed.
    better_predictor: of a task that rises; "not told" where seeds disagree, or the mean of other arms predicts as well.
    spearman_of_loss: of validation loss and error, +1 where a lower loss is a better task. error_by_size,
    error_by_loss: `left_out_error` of a line over the logarithm of the ladder's size, and over the loss. All are of
    means over seeds. A task that some run of the ladder lacks has no row.
    """
    for ladder, (_, arms) in study.ladders.items():
        tasks, errors, sizes = _ladder(study, rows, ladder), {}, {}
        for task, points in tasks.items():
            sizes |= {point["arm"]: point["x"] for point in points}
            errors[task] = {arm: {point["seed"]: point["error"] for point in points if point["arm"] == arm} for arm in arms}
        every = {(arm, seed) for arm in arms for seed in study.seeds}
        errors = {task: by_arm for task, by_arm in errors.items() if {(a, s) for a in by_arm for s in by_arm[a]} >= every}
        losses = errors.pop("pretrain", None)
        for task, by_arm in errors.items() if losses else ():
            mean_losses, means = ([fmean(values[arm].values()) for arm in arms] for values in (losses, by_arm))
            of_seeds = (([losses[arm][s] for arm in arms], [by_arm[arm][s] for arm in arms]) for s in study.seeds)
            pairs = [(mean_losses, means), *of_seeds]
            of_means, *single = (spearman(*pair) for pair in pairs)
            known = [rho for rho in single if rho is not None]
            values = [[by_arm[arm][s] for s in study.seeds] for arm in arms]
            limit = studies.noise_limit(values, values[0], values[-1])
            gain = means[0] - means[-1]
            rises = None if limit is None else "yes" if gain > limit else "within noise" if gain >= -limit else "no"
            row = {"task": task, "ladder": ladder, "arms": len(arms), "better_with_size": rises}
            row |= {"spearman_of_loss": of_means}
            row |= {"lowest_of_a_seed": min(known, default=None), "highest_of_a_seed": max(known, default=None)}
            logs = [math.log(sizes[arm]) for arm in arms]
            by_size, by_loss = ([left_out_error(x, y) for x, y in some] for some in ([(logs, y) for _, y in pairs], pairs))
            row |= {"error_by_size": by_size[0], "error_by_loss": by_loss[0]}
            yield row | {"better_predictor": _better_predictor(by_size, by_loss, means) if rises == "yes" else None}


def _better_predictor(by_size: Sequence[float], by_loss: Sequence[float], means: Sequence[float]) -> str:
    """by_size, by_loss: errors for the means, then for every seed. means: of the arms."""
    winners = {"size" if size < loss else "loss" for size, loss in zip(by_size, by_loss, strict=True)}
    of_the_others = math.sqrt(fmean((fmean([*means[:at], *means[at + 1 :]]) - mean) ** 2 for at, mean in enumerate(means)))
    return winners.pop() if len(winners) == 1 and min(by_size[0], by_loss[0]) < of_the_others else "not told"


def _ladder(study: Study, rows: Sequence[Row], name: str) -> dict[str, list[dict[str, Any]]]:
    """By task: the rows of a ladder's runs, with numbers as numbers, `x` for the size and `error`, which is best at 0.

    Raises:
        UserError: a run without that size, such as one of an untrained encoder.
    """
    x, arms = study.ladders[name]
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if row["arm"] in arms):
        if not row[x]:
            arm = row["arm"]
            raise UserError(f"ladder {name} of study {study.name} has arm {arm}, which has no {x}; take it from the ladder")
        value, higher = float(row["value"]), row["higher_is_better"] == "True"
        numbers = {"x": float(row[x]), "seed": int(row["seed"]), "value": value, "error": 1 - value if higher else value}
        tasks.setdefault(row["task"], []).append({**row, **numbers, "higher_is_better": higher})
    return tasks


# ---- figures ----


@style()
def runs_figure(study: Study, rows: Sequence[Row], table: Sequence[Row]) -> str:
    """A panel for each task of two arms or more: a dot for each seed, a line at each mean, and a band of seed noise."""
    arms = [arm.name for arm in study.arms]
    every = list(dict.fromkeys(row["task"] for row in rows))
    tasks = [task for task in every if sum(row["task"] == task for row in table) > 1] or every

    figure, panels = _task_panels(len(tasks), max(2.4, 0.42 * len(arms) + 1.1), 3.6)
    for axes, task in zip(panels, tasks, strict=True):
        runs, means = ([row for row in some if row["task"] == task] for some in (rows, table))
        for row in runs:
            axes.plot(arms.index(row["arm"]), float(row["value"]), "o", color="tab:blue", ms=4, alpha=0.55, label="a seed")
        for row in means:
            place = arms.index(row["arm"])
            axes.plot([place - 0.3, place + 0.3], [row["mean"]] * 2, color="tab:blue", lw=1.6, label="mean of the seeds")
        middle = next((row["mean"] for row in means if row["arm"] == study.base), None)
        for row in (row for row in means if row["noise"] is not None):
            place, ends = arms.index(row["arm"]), (middle - row["noise"], middle + row["noise"])
            label = f"{study.base} ± seed noise of a difference, 95 %"
            axes.fill_between((place - 0.45, place + 0.45), *ends, color="0.5", alpha=0.15, lw=0, label=label)
        axes.set_xticks(range(len(arms)), [arm.replace("_", " ") for arm in arms], rotation=35, ha="right", fontsize=8)
        axes.set_xlim(-0.6, len(arms) - 0.4)
        axes.set_title(_task_title(runs[0], higher_is_better=runs[0]["higher_is_better"] == "True"))
        axes.margins(y=0.15)
    legend(figure)
    return to_svg(figure)


@style()
def laws_figure(study: Study, rows: Sequence[Row], name: str) -> str:
    """A panel for each task over a kind of size: every seed, the law with its band, Spearman's correlation."""
    tasks, (x, _) = _ladder(study, rows, name), study.ladders[name]

    figure, panels = _task_panels(len(tasks), 2.7, 4.2)
    for axes, points in zip(panels, tasks.values(), strict=True):
        sizes, values, errors = ([point[key] for point in points] for key in ("x", "value", "error"))
        higher, law = points[0]["higher_is_better"], "no power law"
        axes.plot(sizes, values, "o", color="tab:blue", ms=4, alpha=0.55, label="a seed")
        if fit := trend(sizes, errors):
            draw_law(axes, sizes, fit, of_share=higher)
            law = "exponent {:.2f} [{:.2f}, {:.2f}]".format(fit.exponent, *fit.interval("exponent"))
            law += "" if fit.identified else ",\nnot identified"
        rho = spearman(sizes, values)
        title = _task_title(points[0], higher_is_better=higher)
        axes.set_title(f"{title}\n{law}" + ("" if rho is None else f"\nSpearman {rho:+.2f}"))
        log_x(axes, sizes, AXES[x])
        axes.margins(y=0.15)
    legend(figure)
    return to_svg(figure)


def _task_panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with rows of up to PANELS panels, of a width and height in inches."""
    columns = min(count, PANELS)
    lines = -(-count // columns)
    figure, panels = subplots(lines, columns, (width * columns, height * lines + 0.3))
    for axes in panels.flat[count:]:
        axes.set_axis_off()
    return figure, [*panels.flat[:count]]


def _task_title(row: Row, *, higher_is_better: bool) -> str:
    return panel_title(row["task"].replace("_", " "), row["metric"], row["unit"], higher_is_better)


# ---- pages ----


def study_page(study: Study, rows: Sequence[Row], files: Mapping[str, str], findings: str, code: Mapping[str, str]) -> str:
    """Question, findings, table, laws, figures and arms on one page.

    Args:
        rows: of runs.csv. files: texts of the other csv files by name; figures are linked. code: of study.json.
    """
    table = studies.study_table(rows, study.base)
    tasks = {row["task"]: row["metric"] for row in table}
    cells = {(row["arm"], row["task"]): _cell(row) for row in table}
    head = ("arm", *(f"{task.replace('_', ' ')}\n{measure_head(metric)}" for task, metric in tasks.items()))
    body = [[arm.name, *(cells.get((arm.name, task), NOTHING) for task in tasks)] for arm in study.arms]
    settings = [[arm.name, arm.encoder, ", ".join(arm.overrides) or f"profile {arm.profile} as it is"] for arm in study.arms]
    parts = [f"<h1>{html.escape(study.name.replace('_', ' '))}</h1><p>{html.escape(study.question)}</p>"]
    if findings:
        items = (f"<li>{html.escape(REFERENCES.sub('', block))}</li>" for block in paragraphs(findings))
        parts.append(f"<h2>Findings</h2><ul>{''.join(items)}</ul>")
    several = EXPLAINED.format(base=study.base, seeds=len(study.seeds))
    parts.append(f"<h2>Table</h2>{html_table(head, body)}<p>{several if study.seeds[1:] else ONE_SEED}</p>")
    over = f"the arms of ladder {next(iter(study.ladders))}" if study.ladders else "all arms"
    for name, heading in CSV_TABLES.items():
        if name in files:
            head, *lines = csv.reader(files[name].splitlines())
            named = WORDS if name == SIGNAL else ()  # the others keep the metric's key
            cells = [[metric_words(text) if text in named else csv_cell_text(text) for text in line] for line in lines]
            table_html = html_table([column.replace("_", " ") for column in head], cells)
            parts.append(f"<h2>{heading.format(arms=over)}</h2>{table_html}<p>{CSV_EXPLAINED.get(name, '')}</p>")
    captions = {"law": LAW_CAPTION} if LAW in files else {}
    captions |= {"runs": RUNS_CAPTION.format(base=study.base) if study.seeds[1:] else "A line for each arm, of one seed."}
    captions |= {f"laws_{ladder}": LAWS_CAPTION.format(size=AXES[x]) for ladder, (x, _) in study.ladders.items()}
    parts += [html_figure(f"{name}.svg", name.replace("_", " "), text) for name, text in captions.items()]
    parts.append(f"<h2>Arms</h2>{html_table(('arm', 'encoder', 'settings'), settings)}")
    made = f"Code: {code_text(code)}. Again: <code>{study.command}</code>."
    parts.append(f"<p>{made} <a href='../index.html'>All studies</a></p>")
    return html_page(f"study {study.name}", "\n".join(parts))


def _cell(row: Row) -> str:
    text = cell_text(row["mean"])
    if row["deviation"] is not None:
        spec = deviation_format(row["deviation"])
        text = f"{row['mean']:{spec}} ± {row['deviation']:{spec}}"
    if row["noise"] is not None:
        sign, mark = "+" if row["difference"] > 0 else "", " *" if row["beyond_noise"] else ""
        text += f"\n({sign}{cell_text(row['difference'])} ± {cell_text(row['noise'])}){mark}"
    return text


def paragraphs(findings: str) -> list[str]:
    """The paragraphs of findings.md in one line each, without headings."""
    text = "\n".join(line for line in findings.splitlines() if not line.startswith("#"))
    return [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]


def code_text(code: Mapping[str, str]) -> str:
    """The packages that make numbers, with the first digits of their hashes. code: of study.json."""
    hashes = {Path(path).stem: md5[:7] for path, md5 in sorted(code.items())}
    return ", ".join(f"{package} {md5}" for package, md5 in hashes.items() if package not in UNMEASURED)


def index_page() -> str:
    """Every study with its finding, seeds and code, and the CPU hours of all. A shared experiment counts once."""
    parts, seconds = ["<h1>Studies</h1>"], {}
    for path in sorted(REPORTS.glob(f"*/{studies.FACTS}")):
        facts, name, findings = json.loads(path.read_text()), path.parent.name, path.with_name(studies.FINDINGS)
        seconds |= {run["experiment"]: run["cpu_seconds"] for run in facts["runs"].values() if "cpu_seconds" in run}
        parts.append(f"<h2><a href='{name}/study.html'>{name.replace('_', ' ')}</a></h2>")
        parts.append(f"<p>{html.escape(facts['question'])}</p>")
        if findings.is_file() and (texts := paragraphs(findings.read_text())):
            parts.append(f"<p><b>{html.escape(REFERENCES.sub('', texts[0]))}</b></p>")
        seeds = ", ".join(map(str, facts["seeds"]))
        parts.append(f"<p><small>Seeds {seeds}; {len(facts['runs'])} runs; code: {code_text(facts['code'])}</small></p>")
    hours = f"{len(seconds)} experiments, {sum(seconds.values()) / 3600:.2f} CPU hours, without those run elsewhere or in parts."
    parts.append(f"<p>Each is one command: <code>scaling4d study NAME</code>. {hours}</p>")
    return html_page("studies", "\n".join(parts))
