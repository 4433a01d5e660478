"""Two revisions or experiments side by side: what was changed, and which numbers moved more than chance moves them."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling4d import artifacts
from scaling4d.report import built
from scaling4d.report.built import Built, key_of
from scaling4d.report.story import PROTOCOLS
from scaling4d.report.tables import NOTHING, cell, html_table, span

LOOK = {"frozen": "o-", "finetune": "s--", "classifier": "^:"}
COLOURS = ("tab:blue", "tab:orange")


@dataclass(frozen=True)
class Delta:
    """A number in A and in B. change: B - A with the 95 % interval low .. high of that difference."""

    key: tuple[str, str, str]
    metric: str
    unit: str
    higher_is_better: bool
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    change: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`equal` to the last digit; `better` or `worse` where the interval excludes 0; else `same`, within what chance does."""
        if self.change == 0:
            return "equal"
        if self.low <= 0 <= self.high:
            return "same"
        return "better" if (self.change > 0) == self.higher_is_better else "worse"


def compare(a: str, b: str, out: Path) -> str:
    """Write one HTML page that needs no network; returns its first sentence.

    Args:
        a, b: git revisions, names of DVC experiments, or `workspace`.
    Raises:
        UserError: no such revision, or no report in it.
    """
    first, second = built.read(a), built.read(b)
    deltas = differences(first, second)
    page = _page(first, second, deltas)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = artifacts.PARTIAL / "compare.html"
    partial.parent.mkdir(exist_ok=True)
    partial.write_text(page)
    partial.replace(out)
    return summary(deltas)


def differences(a: Built, b: Built) -> list[Delta]:
    """Every number that both have, of the same metric; the surest change first.

    The interval of a difference follows from the two intervals (each end's distances added in squares), as for two independent
    runs. Both are measured on the same videos, which makes it too wide rather than too narrow.
    """
    deltas = []
    for row in a.results:
        other = b.result(key_of(row))
        if other is None or other["metric"] != row["metric"]:
            continue
        change = other["value"] - row["value"]
        down = np.hypot(other["value"] - other["low"], row["high"] - row["value"])
        up = np.hypot(other["high"] - other["value"], row["value"] - row["low"])
        higher = row["higher_is_better"] == "True"
        interval = (change, float(change - down), float(change + up))
        deltas.append(Delta(key_of(row), row["metric"], row["unit"], higher, row, other, *interval))
    return sorted(deltas, key=lambda d: (-_sureness(d), d.key))


def summary(deltas: list[Delta]) -> str:
    """How many numbers moved, and how many would by chance."""
    counts = Counter(d.verdict for d in deltas)
    moved = len(deltas) - counts["equal"]
    return (
        f"Of {len(deltas)} numbers in both, {counts['equal']} are equal to the last digit; of the other {moved},"
        f" {counts['better']} are better, {counts['worse']} worse and {counts['same']} within chance, which alone puts about"
        f" {0.05 * moved:.1f} outside."
    )


def declared(a: Built, b: Built) -> Iterator[tuple[str, str, str]]:
    """Settings in params.yaml that differ: key, in A, in B."""
    for key in sorted(a.settings.keys() | b.settings.keys()):
        if a.settings.get(key, NOTHING) != b.settings.get(key, NOTHING):
            yield key, *(repr(one.settings[key]) if key in one.settings else NOTHING for one in (a, b))


def operative(a: Built, b: Built) -> dict[tuple[str, str, str], list[str]]:
    """(setting, in A, in B) that differ in the settings in force, with the stages in which they do."""
    found: dict[tuple[str, str, str], list[str]] = {}
    mine, theirs = (one.stages.get("stages", {}) for one in (a, b))
    for name in (name for name in mine if name in theirs):
        before, after = mine[name]["operative"], theirs[name]["operative"]
        for key in sorted(before.keys() | after.keys()):
            values = (before.get(key, NOTHING), after.get(key, NOTHING))
            if values[0] != values[1]:
                found.setdefault((key, *values), []).append(name)
    return found


def rooms(a: Built, b: Built) -> Iterator[tuple[str, str]]:
    """Rooms whose code means something else, and the modules that changed, where both reports name them."""
    for room in sorted(a.code.keys() | b.code.keys()):
        if a.code.get(room) == b.code.get(room):
            continue
        mine, theirs = (one.stages.get("code", {}).get(room, {}).get("modules", {}) for one in (a, b))
        if room not in a.code or room not in b.code:
            yield room, f"only in {a.name if room in a.code else b.name}"
        elif mine and theirs:
            yield room, ", ".join(sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)))
        else:
            yield room, "not named: at least one of the reports is older than stages.json"


def inputs(a: Built, b: Built) -> Iterator[tuple[str, str, str, str]]:
    """Data (videos, benchmarks) that differs: stage, name, sha256 in A and in B; what a stage of ours made is no data."""
    mine, theirs = (one.stages.get("stages", {}) for one in (a, b))
    for name in (name for name in mine if name in theirs):
        for kind, sha in mine[name]["inputs"].items():
            other = theirs[name]["inputs"].get(kind, NOTHING)
            if sha != other and kind not in mine[name]["from"]:
                yield name, kind, sha, other


def in_force(a: Built, b: Built) -> str:
    """A table of the settings in force that differ, and whether params.yaml says so too."""
    if not a.stages or not b.stages:
        return _not_compared(a, b)
    explained = {".".join(key.split(".")[-2:]) for key, _, _ in declared(a, b)}
    rows = []
    for (key, before, after), names in operative(a, b).items():
        why = "declared" if key.split("/")[-1] in explained else "not declared: a default of the code or of a library moved"
        rows.append((key, before, after, why, names[0] + (f" and {len(names) - 1} more" if names[1:] else "")))
    return html_table(("setting", "A", "B", "why", "in"), rows) if rows else "<p>No difference.</p>"


def overlay(a: Built, b: Built) -> str:
    """As svg: a panel a task, the validation loss and the losses along the way, A and B in one frame each."""
    from matplotlib.figure import Figure

    from scaling4d.report.figures import legend, log_x, svg, title

    described = {row["task"]: row for row in (*b.results, *a.results)}
    tasks = sorted(described)
    points = [row["point"] for row in a.points if any(row["point"] == other["point"] for other in b.points)]
    counts = Counter(row["method"] for row in a.points)
    method = max(counts, key=lambda name: counts[name])  # losses of other methods measure something else

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(2, max(len(tasks), 2), squeeze=False).flat)
        for axes in panels:
            axes.set_axis_off()
        for axes, task in zip(panels, tasks, strict=False):
            _values(axes, a, b, task)
            row = described[task]
            axes.set_title(title(task, row["metric"], row["unit"], row["higher_is_better"] == "True"))
        losses, curves = panels[max(len(tasks), 2) :][:2]
        for one, colour in zip((a, b), COLOURS, strict=True):
            mine = sorted((row["parameters"], row["val_loss"]) for row in one.points if row["method"] == method)
            if mine:
                losses.plot(*zip(*mine, strict=True), "o-", ms=4, lw=1, color=colour, label=one.name)
            for point in points:
                mine = [(row["clips_seen"], row["loss"]) for row in one.curves if row["point"] == point]
                if mine:
                    curves.plot(*zip(*mine, strict=True), color=colour, lw=0.8, alpha=0.7, label=one.name)
        for axes, name in ((losses, f"validation loss ↓, {method}"), (curves, "training loss ↓ against clips seen")):
            axes.set_title(name)
            if axes.lines:
                axes.set_axis_on()
        if losses.lines:
            log_x(losses, [row["parameters"] for one in (a, b) for row in one.points], "encoder parameters")
        curves.set_yscale("log")
        legend(figure, panels)

    return svg(draw, (2.6 * max(len(tasks), 2) + 0.6, 6.4))


def _page(a: Built, b: Built, deltas: list[Delta]) -> str:
    title = f"{a.name} and {b.name}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        html_table(
            ("", "A", "B"), [("asked for", a.name, b.name), ("commit", a.revision or "files here", b.revision or "files here")]
        ),
        f"<p><b>{summary(deltas)}</b></p>",
        *_section("Settings, declared", ("setting", "A", "B"), declared(a, b)),
        "<h2>Settings, in force</h2>",
        in_force(a, b),
        *_section("Code", ("room", "modules that mean something else"), rooms(a, b)),
        "<h2>Data</h2>",
        _data(a, b),
        "<h2>Figures</h2>",
        overlay(a, b),
        "<h2>Numbers</h2>",
        _numbers(deltas),
        *_section("Validation loss", ("point", "A", "B", "change"), _losses(a, b)),
        *_section("Only in one of them", ("encoder", "task", "protocol", "in"), _lonely(a, b)),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>{STYLE}'
    return f'<!doctype html>\n<html lang="en">{head}{"".join(parts)}</html>\n'


def _section(name: str, head: tuple[str, ...], rows: Iterator[tuple]) -> tuple[str, str]:
    found = [tuple(map(str, row)) for row in rows]
    return f"<h2>{name}</h2>", html_table(head, found) if found else "<p>No difference.</p>"


def _not_compared(a: Built, b: Built) -> str:
    """Why stages cannot be compared; empty where they can."""
    old = " and ".join(html.escape(one.name) for one in (a, b) if not one.stages)
    return f"<p>Not compared: the report of {old} is older than stages.json, which names them.</p>" if old else ""


def _data(a: Built, b: Built) -> str:
    rows = list(inputs(a, b))
    found = html_table(("stage", "input", "A, sha256", "B, sha256"), rows) if rows else "<p>No difference.</p>"
    return _not_compared(a, b) or found


def _numbers(deltas: list[Delta]) -> str:
    rows = []
    for d in deltas:
        name = f"{d.metric} {'↑' if d.higher_is_better else '↓'}, {d.unit}"
        values = (f"{cell(row['value'])} {span(row['low'], row['high'])}" for row in (d.a, d.b))
        rows.append((*d.key, name, *values, f"{d.change:+.4f} {span(d.low, d.high)}", d.verdict))
    head = ("encoder", "task", "protocol", "metric", "A", "B", "B - A", "verdict")
    text = (
        "In brackets: 95 % intervals over the validation videos of one run each. That of the difference adds the two in squares,"
        " as for independent runs; `same` means that it holds 0. What another seed would change is not in it."
    )
    return html_table(head, rows) + f"<p>{text}</p>"


def _losses(a: Built, b: Built) -> Iterator[tuple[str, str, str, str]]:
    """No interval: one number over all validation clips."""
    theirs = {row["point"]: row for row in b.points}
    for row in a.points:
        if row["point"] in theirs:
            before, after = row["val_loss"], theirs[row["point"]]["val_loss"]
            yield row["point"], cell(before), cell(after), f"{after - before:+.4g} ({after / before - 1:+.1%})"


def _lonely(a: Built, b: Built) -> Iterator[tuple[str, str, str, str]]:
    for one, other in ((a, b), (b, a)):
        yield from ((*key_of(row), one.name) for row in one.results if other.result(key_of(row)) is None)


def _sureness(d: Delta) -> float:
    """The distance of the change from 0 in half widths of its interval on that side."""
    half = d.change - d.low if d.change > 0 else d.high - d.change
    return abs(d.change) / half if half > 0 else float("inf") if d.change else 0.0


def _values(axes: Any, a: Built, b: Built, task: str) -> None:
    """Values with intervals against parameters; raw pixels have none and are left out."""
    from scaling4d.report.figures import log_x

    sizes = []
    for one, colour, shift in zip((a, b), COLOURS, (0.96, 1.04), strict=True):
        for protocol in PROTOCOLS:
            mine = [r for r in one.results if (r["task"], r["protocol"]) == (task, protocol) and r["parameters"] > 0]
            if not mine:
                continue
            x, y = [r["parameters"] * shift for r in mine], [r["value"] for r in mine]
            error = [[r["value"] - r["low"] for r in mine], [r["high"] - r["value"] for r in mine]]
            look = {"fmt": LOOK[protocol][0], "ls": "none", "ms": 4, "lw": 1, "color": colour}
            axes.errorbar(x, y, error, label=f"{one.name}, {protocol}", **look)
            sizes += x
    if sizes:
        axes.set_axis_on()
        log_x(axes, sizes, "encoder parameters")


STYLE = """<style>
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1250px; margin: 1.5em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: .6em 0; }
td, th { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; }
</style>"""
