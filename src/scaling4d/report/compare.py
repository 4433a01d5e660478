"""Two revisions or experiments side by side: settings and code that differ, and numbers that moved beyond chance."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling4d.config import PROTOCOLS
from scaling4d.provenance import differences, write_text
from scaling4d.report.built import BuiltReport, key_of, read_built_report
from scaling4d.report.figures import LOOK
from scaling4d.studies.markup import cell_text, html_page, html_table
from scaling4d.studies.plotting import draw_intervals, legend, log_x, panel_title, style, subplots, to_svg
from scaling4d.studies.words import measure

COLOURS = ("tab:blue", "tab:orange")
EXPLAINED = (
    "In brackets: 95 % intervals over the validation videos of one run each. The interval of the difference adds the two in "
    "squares, as for independent runs; `same` means that it holds 0. It does not count the effect of another seed."
)


@dataclass(frozen=True)
class Delta:
    """A number in A and in B, rows of results.csv. change: B - A, with its 95 % interval low .. high."""

    key: tuple[str, str, str]
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    change: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`equal` to the last digit; `better` or `worse` where the interval excludes 0; else `same`, within chance."""
        if self.change == 0:
            return "equal"
        if self.low <= 0 <= self.high:
            return "same"
        return "better" if (self.change > 0) == (self.a["higher_is_better"] == "True") else "worse"

    @property
    def certainty(self) -> float:
        """The distance of the change from 0, in half widths of its interval on that side."""
        half = self.change - self.low if self.change > 0 else self.high - self.change
        return abs(self.change) / half if half > 0 else float("inf") if self.change else 0.0


def compare(a: str, b: str, out: Path) -> str:
    """Write one HTML page that needs no network. Returns its first sentence.

    Args:
        a, b: git revisions, names of DVC experiments, or `workspace`.
    Raises:
        UserError: no such revision, or no report in it.
    """
    first, second = read_built_report(a), read_built_report(b)
    changes = deltas(first, second)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, _page(first, second, changes))
    return summary(changes)


def deltas(a: BuiltReport, b: BuiltReport) -> list[Delta]:
    """Every number that both have, of the same metric; the most certain change first.

    The interval of a difference adds the distances of each end in squares, as for two independent runs. Both runs are
    measured on the same videos, so the interval is too wide rather than too narrow.
    """
    changes, others = [], {key_of(row): row for row in b.results}
    for row in a.results:
        other = others.get(key_of(row))
        if other is None or other["metric"] != row["metric"]:
            continue
        change = other["value"] - row["value"]
        low = change - float(np.hypot(other["value"] - other["low"], row["high"] - row["value"]))
        high = change + float(np.hypot(other["high"] - other["value"], row["value"] - row["low"]))
        changes.append(Delta(key_of(row), row, other, change, low, high))
    return sorted(changes, key=lambda d: (-d.certainty, d.key))


def summary(changes: Sequence[Delta]) -> str:
    """How many numbers moved, and how many would by chance."""
    counts = Counter(d.verdict for d in changes)
    moved = len(changes) - counts["equal"]
    return (
        f"Of {len(changes)} numbers in both, {counts['equal']} are equal to the last digit; of the other {moved},"
        f" {counts['better']} are better, {counts['worse']} worse and {counts['same']} within chance, which alone puts about"
        f" {0.05 * moved:.1f} outside."
    )


def operative_differences(a: BuiltReport, b: BuiltReport) -> dict[tuple[str, str, str], list[str]]:
    """(setting, in A, in B) that differ in the settings in force, with the stages in which they do."""
    stages: dict[tuple[str, str, str], list[str]] = {}
    for name, one, other in _common_stages(a, b):
        for key, before, after in differences(one["operative"], other["operative"]):
            stages.setdefault((key, str(before), str(after)), []).append(name)
    return stages


def package_differences(a: BuiltReport, b: BuiltReport) -> Iterator[tuple[str, str]]:
    """Packages whose code differs in meaning, and the modules that differ."""
    for package, _, _ in differences(a.code, b.code):
        if package not in a.code or package not in b.code:
            yield package, f"only in {a.name if package in a.code else b.name}"
            continue
        modules = (report.stages["code"].get(package, {}).get("modules", {}) for report in (a, b))
        yield package, ", ".join(sorted(name for name, _, _ in differences(*modules)))


@style()
def overlay(a: BuiltReport, b: BuiltReport) -> str:
    """As svg: a panel for each task, the validation loss and the training losses, A and B in one frame each."""
    tasks = {row["task"]: row for row in sorted((*b.results, *a.results), key=lambda row: row["task"])}
    columns, common = max(len(tasks), 2), {row["point"] for row in a.points} & {row["point"] for row in b.points}
    counts = Counter(row["method"] for row in a.points)
    method = max(counts, key=lambda name: counts[name])  # losses of other methods measure another quantity

    figure, panels = subplots(2, columns, (2.6 * columns + 0.6, 6.4))
    losses, curves = panels[1, :2]
    for axes, (task, row) in zip(panels[0], tasks.items(), strict=False):
        axes.set_title(panel_title(task, row["metric"], row["unit"], row["higher_is_better"] == "True"))
        sizes = []
        for report, colour, shift in zip((a, b), COLOURS, (0.96, 1.04), strict=True):
            for protocol in PROTOCOLS:  # raw pixels have no parameters and are left out
                rows = [r for r in report.results if (r["task"], r["protocol"]) == (task, protocol) and r["parameters"] > 0]
                x, values = [r["parameters"] * shift for r in rows], [(r["value"], r["low"], r["high"]) for r in rows]
                look = {"marker": LOOK[protocol][1], "ms": 4, "color": colour}
                if rows:
                    draw_intervals(axes, x, values, label=f"{report.name}, {protocol}", **look)
                sizes += x
        if sizes:
            log_x(axes, sizes, "encoder parameters")
    for report, colour in zip((a, b), COLOURS, strict=True):
        if ladder := sorted((row["parameters"], row["val_loss"]) for row in report.points if row["method"] == method):
            losses.plot(*zip(*ladder, strict=True), "o-", ms=4, lw=1, color=colour, label=report.name)
        for point in sorted(common):
            if curve := [(row["clips_seen"], row["loss"]) for row in report.curves if row["point"] == point]:
                curves.plot(*zip(*curve, strict=True), color=colour, lw=0.8, alpha=0.7, label=report.name)
    losses.set_title(f"validation loss ↓, {method}")
    curves.set_title("training loss ↓ over clips seen")
    if losses.lines:
        log_x(losses, [row["parameters"] for report in (a, b) for row in report.points], "encoder parameters")
    curves.set_yscale("log")
    for axes in panels.flat:
        if not axes.has_data():
            axes.set_axis_off()
    legend(figure)
    return to_svg(figure)


def _page(a: BuiltReport, b: BuiltReport, changes: list[Delta]) -> str:
    title = f"{a.name} and {b.name}"
    commits = [("name", a.name, b.name), ("commit", a.revision or "files here", b.revision or "files here")]
    declared = [(key, repr(before), repr(after)) for key, before, after in differences(a.settings, b.settings)]
    names = {".".join(key.split(".")[-2:]) for key, _, _ in declared}
    in_force, data = [], []
    for (key, before, after), stages in operative_differences(a, b).items():
        reason = "declared" if key in names else "not declared: a default of the code or of a library moved"
        in_force.append((key, before, after, reason, stages[0] + (f" and {len(stages) - 1} more" if stages[1:] else "")))
    for name, one, other in _common_stages(a, b):
        inputs = ({kind: sha for kind, sha in stage["inputs"].items() if kind not in one["from"]} for stage in (one, other))
        data += [(name, *difference) for difference in differences(*inputs)]
    numbers = []
    for d in changes:
        values = (f"{cell_text(row['value'])} {_span(row['low'], row['high'])}" for row in (d.a, d.b))
        name = f"{measure(d.a['metric'], '↑' if d.a['higher_is_better'] == 'True' else '↓')}, {d.a['unit']}"
        numbers.append((*d.key, name, *values, f"{d.change:+.4f} {_span(d.low, d.high)}", d.verdict))
    losses, others = [], {row["point"]: row["val_loss"] for row in b.points}
    for point, before in ((row["point"], row["val_loss"]) for row in a.points if row["point"] in others):
        after = others[point]
        losses.append((point, cell_text(before), cell_text(after), f"{after - before:+.4g} ({after / before - 1:+.1%})"))
    keys = [{key_of(row) for row in report.results} for report in (a, b)]
    single = [(*key, a.name if key in keys[0] else b.name) for key in sorted(keys[0] ^ keys[1])]
    parts = [
        f"<h1>{html.escape(title)}</h1>{html_table(('', 'A', 'B'), commits)}<p><b>{summary(changes)}</b></p>",
        _section("Settings, declared", ("setting", "A", "B"), declared),
        _section("Settings, in force", ("setting", "A", "B", "reason", "in"), in_force),
        _section("Code", ("package", "modules that differ in meaning"), list(package_differences(a, b))),
        _section("Data", ("stage", "input", "A, sha256", "B, sha256"), data),
        f'<h2>Figures</h2><div class="scroll">{overlay(a, b)}</div>',
        _section("Numbers", ("encoder", "task", "protocol", "metric", "A", "B", "B - A", "verdict"), numbers),
        f"<p>{EXPLAINED}</p>",
        _section("Validation loss", ("point", "A", "B", "change"), losses),
        _section("Only in one of them", ("encoder", "task", "protocol", "in"), single),
    ]
    return html_page(title, f'<div class="words">{"".join(parts)}</div>')


def _section(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<h2>{name}</h2>{html_table(head, rows) if rows else '<p>No difference.</p>'}"


def _common_stages(a: BuiltReport, b: BuiltReport) -> Iterator[tuple[str, Any, Any]]:
    """Name and content of the stages of both, in the order of A."""
    ours, theirs = (report.stages["stages"] for report in (a, b))
    return ((name, ours[name], theirs[name]) for name in ours if name in theirs)


def _span(low: float, high: float) -> str:
    return f"[{cell_text(low)}, {cell_text(high)}]"
