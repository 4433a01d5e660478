"""Every number that a report shows is a number of a result: the csv tables, metrics.json and the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from typing import Any

from scaling4d import config
from scaling4d.audit.run import TABLES, UNCHECKED, WRONG, AuditFinding, LockedRun, csv_rows, parse_json, recorded_row, shorten
from scaling4d.provenance import LOCK, MISSING, differences, flatten, format_number, load_yaml
from scaling4d.records import Result

cached_yaml = cache(load_yaml)


class NumberParser(HTMLParser):
    """Reads the numbers of a page: ids and texts of its spans of class `number`, in page order."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[tuple[str, str]] = []
        self.spans = 0  # open ones, from that of a number on

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "span" and self.spans:
            self.spans += 1
        elif tag == "span" and attributes.get("class") == "number":
            self.numbers.append((attributes.get("id") or "", ""))
            self.spans = 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self.spans:
            self.spans -= 1

    def handle_data(self, data: str) -> None:
        if self.spans:
            name, text = self.numbers.pop()
            self.numbers.append((name, text + data))


def page_numbers(page: str) -> list[tuple[str, str]]:
    """(id, text) of every number of a page."""
    parser = NumberParser()
    parser.feed(page)
    parser.close()
    return parser.numbers


@dataclass(frozen=True)
class ReportNumber:
    """An entry of numbers.json: a number that report.html shows.

    id, text: of its span of class `number`. source: path of the file that has it. key: its place there, in a csv
    ({column: value} of the row, column), else a list of keys and indices, in a jsonl that of the line first.
    value: at full precision; a sha256 is a text. format: a spec of `provenance.format_number`.
    """

    id: str
    text: str
    source: str
    key: Sequence[Any]
    value: float | int | str
    format: str


def verify_numbers(run: LockedRun) -> Iterator[AuditFinding]:
    """Every table, metrics.json and every number of the page."""
    for path in (path for folder in (run.home, run.folder) for path in run.disk.paths(folder).values()):
        if path.endswith(".json") and run.json(path) is None:
            yield AuditFinding(WRONG, path, "it is not JSON: run its stage again")
    yield from _tables(run)
    path = f"{run.folder}/numbers.json"
    if run.disk.text(path) is None:
        earlier = "not here: an earlier version made this report, so neither its page nor metrics.json is checked"
        yield AuditFinding(UNCHECKED, path, earlier)
    else:
        yield from _metrics(run)
        yield from _page(run, path)
    for name in ("results.csv", "pretrain.csv", "metrics.json", "report.html"):
        if run.disk.text(f"{run.folder}/{name}") is None:
            yield AuditFinding(UNCHECKED, f"{run.folder}/{name}", "not here: run `dvc repro`")
    absent = sum(run.disk.text(file) is None for file in run.records.values())
    if absent:
        yield AuditFinding(UNCHECKED, run.folder, f"{absent} rows of its tables: their results are not in {run.home}")


def _tables(run: LockedRun) -> Iterator[AuditFinding]:
    """Every Result checks itself and has a row, and every row of a table has the values of its JSON file."""
    table, rows = f"{run.folder}/results.csv", list(run.table_rows())
    known: dict[str, set[str]] = {}
    for key, *_, row in rows:
        known.setdefault(key, set()).add(row.get("metric", ""))
    for key in _results_here(run) if run.disk.text(table) is not None else ():
        record = run.json_object(run.records[key])
        metrics = {record["metric"], *record.get("others", ())} if "metric" in record else set()
        if key not in known:
            yield AuditFinding(WRONG, table, f"it has no row of {key}, though {run.records[key]} is here")
        elif metrics - known[key]:
            yield AuditFinding(WRONG, table, f"it has no {shorten(sorted(metrics - known[key]))} of {key}")
    for key, path in _trained_here(run):
        table = f"{run.folder}/{key.partition('/')[2]}.csv"
        if key not in known and run.disk.text(table) is not None:
            yield AuditFinding(WRONG, table, f"it has no row of {key}, though {path} is here")
    for key, path in run.records.items():
        if key.count("/") == 2 and (content := run.json(path)) is not None:
            try:
                Result(**content)
            except (TypeError, ValueError) as error:
                yield AuditFinding(WRONG, path, f"it is not a result: {error}; run its stage again")
    for key, path, line, row in rows:
        if key not in run.records:
            yield AuditFinding(WRONG, path, f"line {line}: no stage of {LOCK} makes the numbers of {key}")
        elif record := run.json_object(run.records[key]):
            for column, value in recorded_row(record, row).items():
                if row.get(column) != str(value):
                    label = f"line {line}: {key} {row.get('metric', '')}".rstrip()
                    message = f"{label} {column} = {row.get(column)}, {run.records[key]} has {value!r}"
                    yield AuditFinding(WRONG, path, message)


def _results_here(run: LockedRun) -> Iterator[str]:
    """Keys of the results of readouts that are here; of an earlier commit's those that stages.json names."""
    stages = run.json_object(f"{run.folder}/stages.json").get("stages")
    for key, path in run.records.items():
        own = run.settings is not None or not isinstance(stages, dict) or f"readout/{key}" in stages
        if key.count("/") == 2 and own and run.disk.text(path) is not None:
            yield key


def _trained_here(run: LockedRun) -> Iterator[tuple[str, str]]:
    """(key, JSON file) of trainings and reconstructions that are here; none of an earlier commit's."""
    for folder in run.makers if run.settings is not None else ():
        kind, _, point = folder.removeprefix(f"{run.home}/").partition("/")
        if kind in ("pretrain", "reconstruct") and run.disk.text(path := f"{folder}/{TABLES[kind]}") is not None:
            yield f"{point}/{kind}", path


def _metrics(run: LockedRun) -> Iterator[AuditFinding]:
    """metrics.json follows from the tables: task -> `metric↑ (unit)` -> protocol -> encoder -> value, low, high."""
    path, expected = f"{run.folder}/metrics.json", {"val_loss": {"↓": {}}}
    for key, _, _, row in run.table_rows():
        if row.get("low"):  # a further metric of a result has no interval
            encoder, task, protocol = key.split("/")
            name = f"{row['metric']}{'↑' if row.get('higher_is_better') == 'True' else '↓'} ({row.get('unit')})"
            encoders = expected.setdefault(task, {}).setdefault(name, {}).setdefault(protocol, {})
            encoders[encoder] = {column: row.get(column) for column in ("value", "low", "high")}
        for name in (name for name in ("val_loss", "masked_mse", "moving_mse") if row.get(name)):
            expected.setdefault(name, {}).setdefault("↓", {})[key.split("/")[0]] = row[name]
    texts, expected = ({key: str(value) for key, value in flatten(tree)} for tree in (run.json_object(path), expected))
    for key, value, other in differences(texts, expected) if run.disk.text(path) else ():
        yield AuditFinding(WRONG, path, f"{key} = {value}, the tables have {other}")


def _page(run: LockedRun, path: str) -> Iterator[AuditFinding]:
    """report.html shows the numbers of numbers.json, each the number of its source. path: of numbers.json."""
    page, derived = f"{run.folder}/report.html", f"{run.folder}/derived.json"
    shown = page_numbers(run.disk.text(page) or "")
    try:
        numbers = [ReportNumber(**entry) for entry in run.json(path) or ()]
        references = [(number.id, number.source, number.key, number.value) for number in numbers]
        for name, entry in run.json_object(derived).items():
            references += [(f"{derived} {name}", source, key, MISSING) for source, key in entry["from"]]
    except (KeyError, TypeError, ValueError) as error:
        yield AuditFinding(WRONG, path, f"an entry of it or of {derived} is malformed: {error}; run stage report again")
        return
    ids, listed, texts = [name for name, _ in shown], [number.id for number in numbers], dict(shown)
    if (ids != listed or len({*ids}) < len(ids)) and run.disk.text(page) is not None:
        extra, missing = ([i for i in some if i not in others] for some, others in ((ids, listed), (listed, ids)))
        reason = f"{shorten(extra, 3) or 'none'} only in the page, {shorten(missing, 3) or 'none'} only in {path}"
        yield AuditFinding(WRONG, page, f"its numbers are not those of {path} in the same order: {reason}")
    for number in numbers:
        try:
            expected = format_number(number.value, number.format)
        except (TypeError, ValueError) as error:
            expected = f"nothing ({error})"
        if number.text != expected:
            message = f"{number.id}: {number.value!r} with format {number.format!r} is {expected}, its text is {number.text}"
            yield AuditFinding(WRONG, path, message)
        if texts.get(number.id, number.text) != number.text:
            yield AuditFinding(WRONG, page, f"{number.id} shows {texts[number.id]}, {path} has {number.text}")
    if run.disk.text(derived) is not None and derived not in run.locked_files:
        yield AuditFinding(WRONG, derived, f"{LOCK} has no hash of it: it has to be an out of stage report")
    absent, known = {}, {*run.locked_files, f"{run.folder}/runs.json", config.PARAMS.as_posix()} - {run.home}
    for label, source, key, value in references:
        if not any(f"{source}/".startswith(f"{other}/") for other in known):
            yield AuditFinding(WRONG, path, f"{label}: no stage of {LOCK} wrote or read {source}")
            continue
        text, locked = run.disk.text(source), [file.md5 for file in run.locked_files.get(source, ())]
        if text is None or (run.settings is None and not run.owns(source) and run.disk.md5(source) not in locked):
            absent[source] = None  # the earlier commit read another version of what is no file of the run
            continue
        try:
            there = _value_at(source, text, key)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            yield AuditFinding(WRONG, path, f"{label}: {source} has nothing at {key} ({error})")
            continue
        if value is not MISSING and there not in (value, str(value)):  # a csv has its text
            yield AuditFinding(WRONG, path, f"{label}: value {value!r}, {source} has {there!r} at {key}")
    if absent:
        message = f"the values of {len(absent)} sources that are not here ({shorten(list(absent), 2)})"
        yield AuditFinding(UNCHECKED, path, message)


def _value_at(source: str, text: str, key: Sequence[Any]) -> Any:
    """The value at a key of a file; of a csv the text of a cell; a jsonl is the list of its lines.

    Raises LookupError or TypeError where it has none.
    """
    if source.endswith(".csv"):
        values, column = key
        rows = [row for row in csv_rows(text) if all(row[name] == str(value) for name, value in values.items())]
        if len(rows) != 1:
            raise LookupError(f"{len(rows)} such rows")
        return rows[0][column]
    if source.endswith(".jsonl"):
        content = [parse_json(line) for line in text.splitlines()]
    else:
        content = cached_yaml(text) if source.endswith(".yaml") else parse_json(text)
    for word in key:
        content = content[word]
    return content
