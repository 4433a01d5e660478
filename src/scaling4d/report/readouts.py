"""What stands beside the readouts' numbers: the paper's numbers, what is ours because no paper states it, and pictures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from scaling4d.report.story import Story, leaves, published
from scaling4d.report.tables import NOTHING, Html, cell, html_table


def paper(story: Story) -> Html:
    """4DS as published, in the rows and columns of our own table; `~` where the figure was hard to read."""
    if not story.results:
        return Html("")
    known = published()["4DS"]
    tasks = {task: known["tasks"].get(task) for task in story.tasks}
    head = ["published", "parameters", "protocol", *(f"{task}\n{_label(found)}" for task, found in tasks.items())]
    rows = []
    for size, parameters in known["sizes"].items():
        for protocol in ("frozen", "finetune"):
            cells = []
            for task, found in tasks.items():
                value = (found or {}).get(protocol, {}).get(size)
                unsure = f"{task} {protocol} {size}" in known["approximate"]
                cells.append(NOTHING if value is None else f"{'~' if unsure else ''}{value:.3f}")
            rows.append([f"4DS-{size}", f"{parameters / 1e6:,.0f} M", protocol, *cells])
    text = "The same protocols and metrics on other data and at other sizes: compare the shape of a column, not its values."
    return Html(html_table(head, rows) + f"<p>{text}</p>")


def sheets(story: Story) -> Html:
    """A picture a task: what two frozen readouts say beside the truth, on validation clips drawn by the seed."""
    if not story.sheets:
        return Html("<p>This profile draws no predictions.</p>")
    pictures = []
    for task, path in story.sheets.items():
        data = base64.b64encode(path.read_bytes()).decode()
        alt = html.escape(f"{task}: predictions beside the truth")
        pictures.append(f'<p><img style="max-width: 100%" alt="{alt}" src="data:image/png;base64,{data}"></p>')
    return Html("".join(pictures))


def unstated(story: Story) -> Html:
    """Every choice that is ours because the paper does not state it, with its value in this run."""
    given = dict(_given(story))
    rows = []
    for choice in _choices():
        lines = [f"{key}: {value}" for key in choice.get("settings", ()) if (value := _in_force(key, given))]
        if "fixed" in choice and story.results:
            lines.append(f"in the code: {choice['fixed']}")
        if lines:
            rows.append([choice["what"], "\n".join(lines), choice["known"]])
    left = "<style>.jp-RenderedHTMLCommon .words :is(td, th) { text-align: left; }</style>"
    head = ("ours, since no paper states it", "in force", "what is known")
    return Html(f'{left}<div class="words">{html_table(head, rows)}</div>')


def _choices() -> list[dict[str, Any]]:
    import yaml

    return yaml.safe_load(resources.files(__package__).joinpath("unstated.yaml").read_text())


def _given(story: Story) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting that a stage of this run was given."""
    for provenance in story.provenances.values():
        yield from leaves(provenance["settings"])


def _in_force(pattern: str, given: Mapping[str, Any]) -> str:
    """The value of a dotted key; where a `*` in it has several, which one holds for which word. Empty: no stage has it."""
    wanted = re.compile(re.escape(pattern).replace(r"\*", "([^.]+)"))
    found: dict[str, list[str]] = {}
    for key, value in given.items():
        if match := wanted.fullmatch(key):
            found.setdefault(_plain(value), []).extend(match.groups()[:1])
    if len(found) < 2:
        return next(iter(found), "")
    return "; ".join(f"{value} ({', '.join(words)})" for value, words in found.items())


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else cell(value)


def _label(found: Mapping[str, Any] | None) -> str:
    return f"{found['metric']} {'↑' if found['higher_is_better'] else '↓'}, {found['benchmark']}" if found else NOTHING
