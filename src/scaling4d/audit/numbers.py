"""Every number that the report shows is one of a Result: the tables, metrics.json, and the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

from scaling4d.audit.run import RECORDS, Run
from scaling4d.records import Result

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?: M\b| k\b| B\b|%)?")
SCALES = {" M": 1e6, " k": 1e3, " B": 1e9, "%": 0.01}
SHA256 = re.compile(r"\b[0-9a-f]{64}\b")

Wrong = tuple[str, str]  # (file, what is wrong with it)


def files(run: Run) -> Iterator[Wrong]:
    """Every JSON that the artifacts and the report hold can be read, and every Result checks itself."""
    for path in run.disk.under(run.home, run.folder):
        if path.endswith(".json") and run.json(path) is None:
            yield path, "it is not JSON: run its stage again"
    for key, path in run.numbers.items():
        if key.count("/") == 2 and (content := run.json(path)) is not None:
            try:
                Result(**content)
            except (TypeError, ValueError) as error:
                yield path, f"it is not a result: {error}; run its stage again"


def tables(run: Run) -> Iterator[Wrong]:
    """A row of results.csv is a Result and the weights it names; a row of another table is the record of its point."""
    for line, row in run.rows("results"):
        where = f"{run.home}/readout/{row['encoder']}/{row['task']}/{row['protocol']}/result.json"
        if run.maker(where) is None:
            yield f"{run.folder}/results.csv", f"line {line}: no stage of {run.lock} makes {where}"
        found = run.json(where)
        if found is None:
            continue
        own = row["metric"] == found.get("metric")
        wanted = {"value": found.get("value") if own else (found.get("others") or {}).get(row["metric"])}
        wanted |= {name: found.get(name) for name in ("parameters", "examples", "seed", "checkpoint_sha256")}
        wanted |= {name: found.get(name) if own else "" for name in ("low", "high", "unit", "higher_is_better")}
        yield from _compare(f"{run.folder}/results.csv", line, row, wanted, where)
    for table, name in RECORDS.items():
        for line, row in run.rows(table):
            where = f"{run.home}/{table}/{row['point']}/{name}"
            found = run.json(where)
            if found is not None:
                wanted = {"point": row["point"]} | {key: found.get(key, "") for key in row if key != "point"}
                yield from _compare(f"{run.folder}/{table}.csv", line, row, wanted, where)


def absent(run: Run) -> int:
    """How many rows of the tables have no Result here."""
    return sum(run.disk.text(file) is None for file in run.numbers.values())


def metrics(run: Run) -> Iterator[Wrong]:
    """A number of metrics.json whose place names an encoder is one of that encoder's, of the task and protocol named.

    A group of which no number is (gains, fits) holds something else and is passed over here, as on the page.
    """
    path = f"{run.folder}/metrics.json"
    rows = {name: _rows(run, name) for name in _names(run)}
    groups: dict[tuple[str, ...], list[tuple[str, bool]]] = {}
    for place, value in _leaves(run.json(path) or {}, ()):
        words = tuple(word for part in place for word in re.split(r"[/.@ ]", part))
        for name in (name for name in rows if name in words):
            narrow = [row for row in rows[name] if row.get("task") in words and row.get("protocol") in words] or rows[name]
            found = any(value in _meant(row, words) for row in narrow)
            message = f"{' '.join(place)} = {value!r} is no number of {name} in the tables"
            groups.setdefault(tuple(word for word in words if word != name), []).append((message, found))
    for group in groups.values():
        if any(found for _, found in group):
            yield from ((path, message) for message, found in group if not found)


def page(run: Run) -> Iterator[Wrong]:
    """The page's tables: a cell in the row of an encoder holds, rounded and in this order, numbers of one row of that encoder.

    Columns of which fewer than half the cells do hold something else (gains, trends) and are passed over here: dvc.lock holds the
    hash of the whole page, and `--reproduced` compares a page built again.
    """
    path = f"{run.folder}/report.html"
    reader = _Tables()
    reader.feed(run.disk.text(path) or "")
    known = {name: _rows(run, name) for name in _names(run)}
    for table in reader.tables:
        head = next((row for row in table if row and row[0] not in known), [])
        rows = [row for row in table if row and row[0] in known]
        for column in range(1, max(map(len, rows), default=0)):
            cells = [
                (row[0], row[column])
                for row in rows
                if column < len(row) and (_written(row[column]) or SHA256.search(row[column]))
            ]
            wrong = [(name, cell) for name, cell in cells if not any(_holds(row, cell) for row in known[name])]
            if len(wrong) * 2 < len(cells):
                title = head[column] if column < len(head) else f"column {column + 1}"
                for name, cell in dict.fromkeys(wrong):
                    yield path, f"{name}, {title}: {cell} is no number of {name} in the tables"


def _compare(path: str, line: int, row: dict[str, str], wanted: dict[str, Any], where: str) -> Iterator[Wrong]:
    about = " ".join(row[name] for name in ("point", "encoder", "task", "protocol", "metric") if name in row)
    for key, value in wanted.items():
        if row.get(key) != str(value):
            yield path, f"line {line}: {about} {key} = {row.get(key)} is not the {value!r} of {where}"


def _names(run: Run) -> list[str]:
    """Of encoders and points, as the tables have them."""
    return list(dict.fromkeys(key.split("/")[0] for key in run.numbers))


def _rows(run: Run, name: str) -> list[dict[str, str]]:
    """Every row of an encoder, and its records where they are here."""
    rows = [row for _, row in run.rows("results", encoder=name)]
    rows += [row for table in RECORDS for _, row in run.rows(table, point=name)]
    records = [run.json(f"{run.home}/{table}/{name}/{file}") for table, file in RECORDS.items()]
    return rows + [{key: str(value) for key, value in record.items()} for record in records if record]


def _numbers(row: dict[str, str]) -> list[float]:
    return [float(text) for text in row.values() if _finite(text)]


def _meant(row: dict[str, str], place: tuple[str, ...]) -> list[float]:
    """The numbers of a row at a place: those of the columns that it names, else a Result's value, else any."""
    columns = [word for word in place if word in row] or (["value"] if "value" in row else list(row))
    return _numbers({column: row[column] for column in columns})


def _holds(row: dict[str, str], cell: str) -> bool:
    """Whether what is written in a cell is, in this order, in a row."""
    if shas := SHA256.findall(cell):
        return set(shas) <= set(row.values())
    left = iter(_numbers(row))
    return all(any(_is(number, value) for value in left) for number in _written(cell))


def _finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _leaves(content: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, (*place, key))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield place, content


def _written(cell: str) -> list[str]:
    """A cell that is made of numbers, as they are written in it; nothing of one that holds words."""
    return NUMBER.findall(cell) if not re.search(r"[A-Za-z_]{2}", NUMBER.sub("", cell)) else []


def _is(written: str, value: float) -> bool:
    """Whether a value is written this way when it is rounded to as many digits."""
    scale = next((factor for ending, factor in SCALES.items() if written.endswith(ending)), 1.0)
    digits, _, power = written.rstrip(" MkB%").replace(",", "").partition("e")
    last = len(digits.partition(".")[2])
    step = 10.0 ** (int(power or 0) - last) * scale
    return abs(float(digits) * 10.0 ** int(power or 0) * scale - value) <= 0.5000001 * step


class _Tables(HTMLParser):
    """Tables of a page: a list of rows of a list of cells' texts each."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th") and self.tables and self.tables[-1]:
            self.tables[-1][-1].append("")
            self._inside = True
        elif tag == "br" and self._inside:
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.tables[-1][-1][-1] += data
