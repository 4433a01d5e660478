"""Locks of a study's runs in; runs.csv, table.csv, fits.csv, figures, study.json and study.html out."""

from __future__ import annotations

import csv
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling4d import artifacts
from scaling4d.records import UserError, write_json
from scaling4d.report.figures import Svg, legend, log_x, svg, title
from scaling4d.report.fits import held_out, spearman, trend
from scaling4d.report.tables import cell, html_table
from scaling4d.studies import study as studies
from scaling4d.studies.study import REPORTS, Study

FITS, RANKS = "fits.csv", "ranks.csv"
FIT_COLUMNS = (
    *("task", "ladder", "metric", "points", "floor", "floor_low", "floor_high", "exponent", "exponent_low", "exponent_high"),
    *("largest", "measured", "predicted", "predicted_low", "predicted_high", "inside"),
)
RANK_COLUMNS = ("task", "ladder", "arms", "spearman", "lowest_of_a_seed", "highest_of_a_seed")
AXES = {"parameters": "encoder parameters", "flops": "training FLOPs", "clips_seen": "clips seen"}
Point = tuple[float, float, tuple[str, int]]  # size, value, (arm, seed)
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right;
font-variant-numeric: tabular-nums; }} :is(td, th):first-child {{ text-align: left; }} svg {{ max-width: 100%; height: auto; }}
.reference {{ color: #777; font-size: 85%; }}
</style>{body}</html>
"""


def collect(study: Study, cache: Path, told: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Make everything in the study's folder but locks/ and findings.md from its locks; the same bytes for the same locks.

    Args:
        cache: DVC's. Runs whose results it lacks keep their rows, if their lock is still the one that these came from.
        told: `arm-seed` -> experiment and, where it ran here, seconds, cpu_seconds; of others, what was told before stays.
    Returns:
        what is wrong with findings.md.
    Raises:
        UserError: a run has no lock or its numbers are nowhere.
    """
    folder = study.folder
    former = json.loads((folder / studies.FACTS).read_text()) if (folder / studies.FACTS).is_file() else {"runs": {}, "files": {}}
    known = {key: dict(value) for key, value in former["runs"].items()}
    for key, value in told.items():
        same = known.get(key, {}).get("experiment") == value["experiment"]
        known[key] = (known[key] if same else {}) | value
    before = read_runs(folder)
    rows, locks = [], {}
    for arm in study.arms:
        for seed in study.seeds:
            path, key = study.lock(arm.name, seed), f"{arm.name}-{seed}"
            if not path.is_file():
                raise UserError(f"no {path}; run `{study.command}`")
            locks[key] = studies.load_lock(path.read_text())
            experiment = known.setdefault(key, {}).setdefault("experiment", "")
            found = studies.numbers(arm, seed, locks[key], cache, experiment)
            if found is None and former["files"].get(f"{studies.LOCKS}/{path.name}") == artifacts.sha256(path):
                found = [row for row in before if row["arm"] == arm.name and row["seed"] == str(seed)]
            if not found:
                raise UserError(f"DVC's cache lacks results that {path} names; run `{study.command}`")
            rows += found
    (folder / studies.RUNS).write_text(studies.to_csv(studies.RUN_COLUMNS, rows))
    rows = read_runs(folder)
    table = studies.table(rows, study.base)
    (folder / studies.TABLE).write_text(studies.to_csv(studies.TABLE_COLUMNS, table))
    drawn = {"runs": runs_figure(study, rows, table)}
    if study.ladders:
        (folder / FITS).write_text(studies.to_csv(FIT_COLUMNS, fits(study, rows)))
        (folder / RANKS).write_text(studies.to_csv(RANK_COLUMNS, ranks(study, rows)))
        drawn |= {f"laws_{ladder}": laws_figure(study, rows, ladder) for ladder in study.ladders}
    for name, drawing in drawn.items():
        (folder / f"{name}.svg").write_text(drawing)
    made = {study.lock(arm.name, seed) for arm in study.arms for seed in study.seeds} | {folder / f"{name}.svg" for name in drawn}
    for path in {*(folder / studies.LOCKS).glob("*.lock"), *folder.glob("*.svg")} - made:
        path.unlink()  # of an arm, seed or ladder that it no longer has
    findings = folder / studies.FINDINGS
    said = findings.read_text() if findings.is_file() else ""
    (folder / "study.html").write_text(page(study, table, drawn, said, folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != studies.FACTS)
    facts = studies.described(study, locks, {key: known[key] for key in locks})
    facts["files"] = {path.relative_to(folder).as_posix(): artifacts.sha256(path) for path in files}
    write_json(folder / studies.FACTS, facts)
    write_index()
    return list(studies.unfounded(said, folder))


def read_runs(folder: Path) -> list[dict[str, str]]:
    """runs.csv as text; none where there is none."""
    path = folder / studies.RUNS
    return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []


# ---- laws, for studies with ladders ----


def fits(study: Study, rows: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """A row a task and ladder: the power law through every seed's point, and what it says of the largest without having seen it.

    Metrics of which more is better are shares, so that 1 - value is fitted. Nothing where no law is found.
    """
    for ladder in study.ladders:
        for task, metric, higher, points in _ladder(study, rows, ladder):
            sizes = [size for size, _, _ in points]
            errors = [1 - value if higher else value for _, value, _ in points]
            found, tested = trend(sizes, errors), held_out(sizes, errors)
            row = {"task": task, "ladder": ladder, "metric": f"1 - {metric}" if higher else metric, "points": len(points)}
            if found is not None:
                row |= {"floor": found.law.floor, "exponent": found.law.exponent}
                row |= {"floor_low": found.floor[0], "floor_high": found.floor[1]}
                row |= {"exponent_low": found.exponent[0], "exponent_high": found.exponent[1]}
            if tested is not None:
                row |= {"largest": tested.x, "measured": tested.measured, "predicted": tested.predicted}
                row |= {"predicted_low": tested.low, "predicted_high": tested.high, "inside": tested.inside}
            yield row


def ranks(study: Study, rows: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """Does the validation loss rank the arms of a ladder as a task does? +1: the lower the loss, the better the task.

    Of the means over seeds, and the lowest and highest of a single seed.
    """
    for ladder, (_, arms) in study.ladders.items():
        tasks = {task: (higher, points) for task, _, higher, points in _ladder(study, rows, ladder)}
        if "pretrain" not in tasks:
            continue
        losses = _by_arm(tasks.pop("pretrain")[1], arms)
        for task, (higher, points) in tasks.items():
            values = _by_arm(points, arms)
            sign = -1 if higher else 1
            whole = spearman([fmean(losses[arm].values()) for arm in arms], [sign * fmean(values[arm].values()) for arm in arms])
            one = [spearman([losses[arm][s] for arm in arms], [sign * values[arm][s] for arm in arms]) for s in study.seeds]
            known = [rho for rho in one if rho is not None]
            row = {"task": task, "ladder": ladder, "arms": len(arms), "spearman": whole}
            yield row | {"lowest_of_a_seed": min(known, default=None), "highest_of_a_seed": max(known, default=None)}


def _ladder(study: Study, rows: Sequence[Mapping[str, str]], name: str) -> Iterator[tuple[str, str, bool, list[Point]]]:
    """Of every task: metric, whether more is better, and (x, value, (arm, seed)) of every run on a ladder.

    Raises:
        UserError: a run without that size, such as one of an encoder that was not trained.
    """
    x, arms = study.ladders[name]
    mine = [row for row in rows if row["arm"] in arms]
    if lacking := next((row["arm"] for row in mine if not row[x]), None):
        raise UserError(f"ladder {name} of study {study.name} has arm {lacking}, which has no {x}; take it from the ladder")
    for task in dict.fromkeys(row["task"] for row in mine):
        of = [row for row in mine if row["task"] == task]
        points = [(float(row[x]), float(row["value"]), (row["arm"], int(row["seed"]))) for row in of]
        yield task, of[0]["metric"], of[0]["higher_is_better"] == "True", points


def _by_arm(points: Sequence[Point], arms: Sequence[str]) -> dict[str, dict[int, float]]:
    return {arm: {seed: value for _, value, (of, seed) in points if of == arm} for arm in arms}


# ---- figures ----


def runs_figure(study: Study, rows: Sequence[Mapping[str, str]], table: Sequence[Mapping[str, Any]]) -> Svg:
    """A panel a task: every seed as a dot, the mean of an arm as a line, and how far from the base arm is beyond seed noise."""
    arms = [arm.name for arm in study.arms]
    tasks = _tasks(rows)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axes, (task, of) in zip(panels, tasks.items(), strict=True):
            for row in of:
                axes.plot(arms.index(row["arm"]), float(row["value"]), "o", color="tab:blue", ms=4, alpha=0.55, label="a seed")
            mine = [row for row in table if row["task"] == task]
            for row in mine:
                place = arms.index(row["arm"])
                axes.plot([place - 0.3, place + 0.3], [row["mean"]] * 2, color="tab:blue", lw=1.6, label="mean of the seeds")
            _noise(axes, mine, study.base)
            axes.set_xticks(range(len(arms)), [arm.replace("_", " ") for arm in arms], rotation=35, ha="right", fontsize=8)
            axes.set_xlim(-0.6, len(arms) - 0.4)
            axes.set_title(title(*_named(of[0])))
            axes.margins(y=0.15)
        legend(figure, panels)

    return svg(draw, (max(2.4, 0.42 * len(arms) + 1.1) * len(tasks), 3.9))


def _noise(axes: Axes, mine: Sequence[Mapping[str, Any]], base: str) -> None:
    noise = next((row["noise"] for row in mine if row["noise"] is not None), None)
    middle = next((row["mean"] for row in mine if row["arm"] == base), None)
    if noise is not None and middle is not None:
        axes.axhspan(
            middle - noise, middle + noise, color="0.5", alpha=0.15, lw=0, label=f"{base} ± seed noise of a difference, 95 %"
        )


def laws_figure(study: Study, rows: Sequence[Mapping[str, str]], name: str) -> Svg:
    """A panel a task against one kind of size: every seed, the law with its band where there is one, Spearman's correlation."""
    ladder, (x, _) = list(_ladder(study, rows, name)), study.ladders[name]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(ladder), squeeze=False)[0]
        for axes, (task, _, higher, points) in zip(panels, ladder, strict=True):
            sizes, values = ([point[at] for point in points] for at in (0, 1))
            axes.plot(sizes, values, "o", color="tab:blue", ms=4, alpha=0.55, label="a seed")
            found = trend(sizes, [1 - value if higher else value for value in values])
            law = "no power law"
            if found is not None:
                grid = np.geomspace(min(sizes), max(sizes), 100)
                turned = (lambda curve: 1 - curve) if higher else (lambda curve: curve)
                axes.plot(grid, turned(found.law(grid)), color="tab:blue", alpha=0.6, label="power law")
                axes.fill_between(grid, *map(turned, found.band(grid)), color="tab:blue", alpha=0.12, lw=0, label="its 95 % band")
                law = f"exponent {found.law.exponent:.2f} [{found.exponent[0]:.2f}, {found.exponent[1]:.2f}]"
            rho = spearman(sizes, values)
            about = _named(next(row for row in rows if row["task"] == task))
            axes.set_title(f"{title(*about)}\n{law}" + ("" if rho is None else f"\nSpearman {rho:+.2f}"))
            log_x(axes, sizes, AXES[x])
            axes.margins(y=0.15)
        legend(figure, panels)

    return svg(draw, (2.7 * len(ladder), 4.4))


def _tasks(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    return {task: [row for row in rows if row["task"] == task] for task in dict.fromkeys(row["task"] for row in rows)}


def _named(row: Mapping[str, str]) -> tuple[str, str, str, bool]:
    return row["task"], row["metric"].replace("_", " "), row["unit"], row["higher_is_better"] == "True"


# ---- pages ----


def page(study: Study, table: Sequence[Mapping[str, Any]], drawn: Mapping[str, str], said: str, folder: Path) -> str:
    """Question, findings, table, figures and how it was run, on one page."""
    tasks = list(dict.fromkeys(row["task"] for row in table))
    metrics = {row["task"]: row["metric"] for row in table}
    found = {(row["arm"], row["task"]): row for row in table}
    head = ("arm", *(f"{task}\n{metrics[task]}" for task in tasks))
    body = [[arm.name, *(_cell(found.get((arm.name, task))) for task in tasks)] for arm in study.arms]
    settings = [[arm.name, arm.encoder, ", ".join(arm.overrides) or f"profile {arm.profile} as it is"] for arm in study.arms]
    parts = [f"<h1>{html.escape(study.name.replace('_', ' '))}</h1><p>{html.escape(study.question)}</p>"]
    if said:
        parts.append(f"<h2>Findings</h2>{_paragraphs(said)}")
    parts.append(f"<h2>Table</h2>{html_table(head, body)}<p>{EXPLAINED.format(base=study.base, seeds=len(study.seeds))}</p>")
    for name, heading in ((FITS, LAWS), (RANKS, RANKED)) if study.ladders else ():
        head, *rows = csv.reader((folder / name).read_text().splitlines())
        shown = html_table([word.replace("_", " ") for word in head], [[_rounded(text) for text in row] for row in rows])
        parts.append(f"<h2>{heading}</h2>{shown}")
    parts += [f"<figure>{drawing}</figure>" for drawing in drawn.values()]
    parts.append(f"<h2>Arms</h2>{html_table(('arm', 'encoder', 'settings'), settings)}")
    parts.append(f"<p>Again: <code>{study.command}</code>. <a href='../index.html'>All studies</a></p>")
    return PAGE.format(title=f"study {study.name}", body="\n".join(parts))


LAWS = "Power laws over all seeds; and of all but the largest, what they say of it"
RANKED = "Does the loss rank the arms as a task does"
EXPLAINED = (
    "Mean over {seeds} seeds ± their standard deviation; in brackets the difference to {base}, seed by seed, and the seed noise "
    "of such a difference at 95 %; * where the difference is larger. The noise is of training and readout seeds alone. "
    "Losses compare only between arms that predict the same thing."
)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    text = cell(row["mean"]) + ("" if row["deviation"] is None else f" ± {cell(row['deviation'])}")
    if row["noise"] is not None:
        sign = "+" if row["difference"] > 0 else ""
        text += f"\n({sign}{cell(row['difference'])} ± {cell(row['noise'])}){' *' if row['beyond_noise'] else ''}"
    return text


def _rounded(text: str) -> str:
    try:
        return cell(int(text) if text.isdigit() else float(text)) if math.isfinite(float(text)) else text
    except ValueError:
        return text


def _paragraphs(text: str) -> str:
    """Findings as HTML: paragraphs, and references in grey."""
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    blocks = (html.escape(" ".join(block.split())) for block in kept.split("\n\n") if block.strip())
    return "".join(f"<p>{studies.REFERENCE.sub(_grey, block)}</p>" for block in blocks)


def _grey(found: Any) -> str:
    return f'<span class="reference">{found[0]}</span>'


def write_index() -> None:
    """reports/studies/index.html: every study that was run, and what all took; an experiment that several share counts once."""
    lines, taken = [], {}
    for path in sorted(REPORTS.glob(f"*/{studies.FACTS}")):
        said, name = json.loads(path.read_text()), path.parent.name
        taken |= {run["experiment"]: run["cpu_seconds"] for run in said["runs"].values() if "cpu_seconds" in run}
        link = f"<a href='{name}/study.html'>{name.replace('_', ' ')}</a>"
        lines.append(f"<li>{link}: {html.escape(said['question'])} ({len(said['runs'])} runs)</li>")
    hours = f"{len(taken)} experiments, {sum(taken.values()) / 3600:.2f} CPU hours, without what was there before them."
    body = f"<h1>Studies</h1><ul>{''.join(lines)}</ul><p>Each is one command: <code>scaling4d study NAME</code>. {hours}</p>"
    (REPORTS / "index.html").write_text(PAGE.format(title="studies", body=body))
