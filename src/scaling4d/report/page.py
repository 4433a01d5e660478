"""Numbers with their sources, and the page that shows them. Each number gets an id; numbers.json lists them all."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from scaling4d.provenance import format_number
from scaling4d.studies.markup import NOTHING, code_html, html_table, number_format

DERIVED, NUMBERS = "derived.json", "numbers.json"


@dataclass(frozen=True)
class Number:
    """A number on the page. format: a spec of `format_number`. source: path in the project.

    key: place there, in a csv ({column: value} of the row, column).
    """

    value: float | int | str
    format: str
    source: str
    key: tuple[Any, ...]


Part = str | Number | Sequence["Part"]


def part_of(value: Any, source: str | Path, *key: str | int, spec: str | None = None) -> Part:
    """A value at a key of a file as a part of the page: numbers by default in the usual format, `-` for None.

    A list gives its items with commas between them. Text becomes a Number with spec "s" alone.
    """
    if isinstance(value, list | tuple):
        return joined(part_of(item, source, *key, index, spec=spec) for index, item in enumerate(value)) or "none"
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float | str) or (isinstance(value, str) and spec != "s"):
        return str(value)
    return Number(value, number_format(value) if spec is None else spec, str(source), key)


def joined(parts: Iterable[Part], separator: str = ", ") -> list[Part]:
    """Parts with a separator between them."""
    return [item for part in parts for item in (separator, part)][1:]


def text_of(part: Part) -> str:
    """A part of the page as plain text."""
    if isinstance(part, Number):
        return format_number(part.value, part.format)
    return part if isinstance(part, str) else "".join(map(text_of, part))


@dataclass
class Page:
    """Sections of the page as HTML, by name; their numbers, in page order; and the numbers that the report computes.

    folder: of the report. derived: name -> {"value": a number or several by name, "from": [[source, key], ...]}.
    """

    folder: Path
    sections: dict[str, str] = field(default_factory=dict)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    derived: dict[str, dict[str, Any]] = field(default_factory=dict)

    def html(self, part: Part) -> str:
        """A part as HTML, with `code` between backticks. Every number in it is listed and gets the next id."""
        if isinstance(part, str):
            return code_html(part)
        if not isinstance(part, Number):
            return "".join(map(self.html, part))
        name, text = f"n-{len(self.numbers)}", text_of(part)
        properties = {"source": part.source, "key": list(part.key), "value": part.value, "format": part.format}
        self.numbers.append({"id": name, "text": text, **properties})
        return f'<span class="number" id="{name}">{html.escape(text)}</span>'

    def table(self, head: Sequence[Part], rows: Iterable[Sequence[Part]]) -> str:
        return html_table(head, rows, self.html)

    def paragraph(self, *parts: Part) -> str:
        return f"<p>{self.html(parts)}</p>" if parts else ""

    def derive(self, name: str, value: Any, inputs: Iterable[Part]) -> None:
        """Enter what the report computes from other numbers into derived.json."""
        self.derived[name] = {"value": value, "from": [[n.source, list(n.key)] for n in inputs if isinstance(n, Number)]}

    def derived_number(self, name: str, *key: str | int, spec: str | None = None) -> Part:
        """A number of derived.json. key: its place, where the value has several."""
        value = reduce(lambda content, word: content[word], key, self.derived[name]["value"])
        return part_of(value, self.folder / DERIVED, name, "value", *key, spec=spec)

    def write_json(self, out: Path) -> None:
        """Write numbers.json and derived.json, one entry a line."""
        lines = ",\n".join(json.dumps(number, ensure_ascii=False) for number in self.numbers)
        (out / NUMBERS).write_text(f"[\n{lines}\n]\n")
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in self.derived.items())
        (out / DERIVED).write_text(f"{{\n{lines}\n}}\n")
