"""The report's csv and json files, and the table for the terminal. Every number comes from a Result or a summary."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache, reduce
from importlib import resources
from pathlib import Path
from typing import Any

from scaling4d.config import PROTOCOLS
from scaling4d.provenance import parse_csv, to_csv
from scaling4d.records import Result
from scaling4d.report.page import Part, part_of, text_of
from scaling4d.report.run_results import HELD_OUT_FILE, SUMMARY, RunResults
from scaling4d.studies.markup import NOTHING, cell_text
from scaling4d.studies.study import RECONSTRUCT_METRICS
from scaling4d.studies.words import FIDELITY, measure

RESULTS_CSV = "results.csv"
RESULTS = (
    *("encoder", "parameters", "task", "protocol", "metric", "value", "low", "high"),
    *("unit", "higher_is_better", "examples", "seed", "checkpoint_sha256"),
)
ERRORS = ("masked_mse", "psnr_db", "moving_mse")
PUBLISHED = Path("src/scaling4d/report/published.yaml")
CURVES = ("point", "step", "clips_seen", "loss", "lr", "grad")


@cache
def published() -> dict[str, Any]:
    """The papers' own numbers, each with its source."""
    import yaml

    return yaml.safe_load(resources.files(__package__).joinpath("published.yaml").read_text())


def results_csv(run: RunResults) -> str:
    """The rows of all results."""
    return to_csv(RESULTS, result_rows(run.results))


def result_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """A row for each Result and one for each of its further metrics, whose interval, unit and direction stay empty."""
    rows = []
    for r in results:
        rows.append(asdict(r))
        empty = dict.fromkeys(("low", "high", "unit", "higher_is_better"), "")
        rows += [{**asdict(r), **empty, "metric": name, "value": value} for name, value in sorted(r.others.items())]
    return rows


def pretrain_csv(run: RunResults) -> str:
    """A row for each point: sizes, cost, losses."""
    return to_csv(SUMMARY, [run.summaries[point] for point in run.trained])


def reconstruct_csv(run: RunResults) -> str:
    """A row for each point that fills in pixels."""
    columns = ("point", *ERRORS, *fidelity_columns(run), "true_patch_statistics", "clips", "frames", "seed", "checkpoint_sha256")
    return to_csv(columns, [{"point": point, **run.fidelity[point]} for point in run.points])


def curves_csv(run: RunResults) -> str:
    """A row for every line of every point's losses.jsonl."""
    return to_csv(CURVES, [{"point": point, **line} for point in run.trained for line in run.losses[point]])


def metrics(run: RunResults) -> dict[str, Any]:
    """For `dvc metrics` and `dvc exp`: task -> `metric↑ (unit)` -> protocol -> encoder -> value, low, high.

    Numbers of pretraining and reconstruction have no protocol and no interval.
    """
    nested: dict[str, Any] = {"val_loss": {"↓": {point: run.summaries[point]["val_loss"] for point in run.trained}}}
    for name in RECONSTRUCT_METRICS:
        if values := {point: value for point in run.points if (value := run.fidelity[point].get(name)) is not None}:
            nested[name] = {"↓": values}
    for r in run.results:
        encoders = nested.setdefault(r.task, {}).setdefault(f"{r.metric}{arrow(r)} ({r.unit})", {}).setdefault(r.protocol, {})
        encoders[r.encoder] = {"value": r.value, "low": r.low, "high": r.high}
    return nested


def stages(run: RunResults) -> dict[str, Any]:
    """Every stage by its name: settings declared and in force, inputs and code; the modules of the code once a package.

    from: by name of an input the stage that made it; other inputs are data.
    """
    packages = {p["code"]["package"]: p["code"] for p in run.provenances.values() if p.get("code")}
    content = {}
    for name, provenance in run.provenances.items():
        inputs = dict(provenance.get("inputs") or {})
        _, encoder, *task = (*name.split("/"), "")
        makers = {"checkpoint": f"pretrain/{encoder}", "head": f"readout/{encoder}/{task[0] if task else ''}/frozen"}
        makers |= {"teacher": f"pretrain/{run.models.get(encoder, {}).get('teacher')}"}
        content[name] = {
            "settings": provenance["settings"],
            "overrides": provenance["overrides"],
            "operative": run.operative[name],
            "inputs": inputs,
            "from": {kind: maker for kind in inputs if (maker := makers.get(kind, kind)) in run.provenances},
            "code": {key: provenance["code"][key] for key in ("package", "sha256")} if provenance.get("code") else None,
        }
    return {"profile": run.profile, "seed": run.seed, "stages": content, "code": packages}


def fidelity_columns(run: RunResults) -> list[str]:
    """Metrics of sets of frames and clips that a `reconstruct` result has."""
    measured = {key for point in run.points for key in run.fidelity[point]}
    return [key for key in FIDELITY if key in measured]


# ---- numbers with their sources ----


def result_part(run: RunResults, r: Result, *key: str, spec: str | None = None) -> Part:
    """A number of a Result: a field, or (`others`, name)."""
    value = getattr(r, key[0]) if len(key) == 1 else r.others.get(key[1])
    return part_of(value, run.home / "readout" / r.encoder / r.task / r.protocol / "result.json", *key, spec=spec)


def held_out_parts(run: RunResults, r: Result) -> list[Part]:
    """The step of the lowest held-out loss, whose weights were kept, and the last step; `-` without such losses."""
    name = f"readout/{r.encoder}/{r.task}/{r.protocol}"
    if not (lines := run.held_out.get(name)):
        return [NOTHING, NOTHING]
    lowest = min(range(len(lines)), key=lambda line: lines[line]["held_out_loss"])
    last = len(lines) - 1
    return [part_of(lines[line]["step"], run.home / name / HELD_OUT_FILE, line, "step") for line in (lowest, last)]


def interval(run: RunResults, r: Result) -> list[Part]:
    """`value [low, high]` of a Result, in two lines."""
    return with_interval(*(result_part(run, r, key) for key in ("value", "low", "high")))


def with_interval(value: Part, low: Part, high: Part) -> list[Part]:
    """`value [low, high]`, in two lines."""
    return [value, "\n[", low, ", ", high, "]"]


def summary_part(run: RunResults, point: str, key: str, spec: str | None = None) -> Part:
    """A number of a point's pretraining; `-` for encoders that were not trained here."""
    return part_of(run.summaries.get(point, {}).get(key), run.home / "pretrain" / point / "summary.json", key, spec=spec)


def published_part(*key: str | int, spec: str) -> Part:
    """A number of published.yaml."""
    return part_of(reduce(lambda content, word: content[word], key, published()), PUBLISHED, *key, spec=spec)


# ---- encoder x protocol x task ----


def label(r: Result) -> str:
    """`top-1 accuracy of actions ↑, share`."""
    return f"{measure(r.metric, arrow(r))}, {r.unit}"


def overview(run: RunResults, *, intervals: bool) -> list[list[Part]]:
    """Rows of the main table: encoder, parameters, protocol, validation loss, tasks; `-` without such a readout.

    The loss is that of the ladder's method and masking alone: others predict other targets.
    """
    rows = []
    for encoder in dict.fromkeys([*run.trained, *(name for names in run.encoders.values() for name in names)]):
        protocols = [protocol for protocol in PROTOCOLS if encoder in run.encoders[protocol]] or [NOTHING]
        for protocol in protocols:
            results = [run.result(encoder, task, protocol) for task in run.tasks]
            size = summary_part(run, encoder, "parameters", spec="M")
            if size == NOTHING and (first := next(filter(None, results), None)):
                size = result_part(run, first, "parameters", spec="M" if first.parameters else ",d")
            comparable = encoder in run.of_method(run.methods[0]) and run.masking(encoder) == run.masking(run.ladder[0])
            loss = summary_part(run, encoder, "val_loss") if comparable else NOTHING
            loss = loss if protocol == protocols[0] else ""
            cells = [(interval(run, r) if intervals else result_part(run, r, "value")) if r else NOTHING for r in results]
            rows.append([encoder, size, protocol, loss, *cells])
    return rows


def table_text(run: RunResults) -> str:
    """Point x protocol x task as text of at most 120 columns, with the keys that commands take."""
    first = [next((r for r in run.results if r.task == task), None) for task in run.tasks]
    tasks = [f"{r.task}\n{r.metric} {arrow(r)}" for r in first if r]
    head = ("encoder", "parameters", "protocol", f"val loss ↓\n{run.methods[0]}", *tasks)
    rows = [[text_of(part) for part in row] for row in overview(run, intervals=False)]
    return text_table(f"profile {run.profile}, seed {run.seed}", head, rows)


def text_of_csv(path: Path) -> str:
    """The same of a report's results.csv alone, without losses: the first metric of every readout."""
    head, cells = {}, {}
    for row in parse_csv(path.read_text()):
        line = cells.setdefault((row["encoder"], f"{int(row['parameters']):,d}", row["protocol"]), {})
        if row["task"] not in line:
            line[row["task"]] = cell_text(float(row["value"]))
            head.setdefault(row["task"], f"{row['task']}\n{row['metric']} {'↑' if row['higher_is_better'] == 'True' else '↓'}")
    rows = [[*key, *(line.get(task, NOTHING) for task in head)] for key, line in cells.items()]
    return text_table(str(path), ("encoder", "parameters", "protocol", *head.values()), rows)


def text_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] = (0, 2)) -> str:
    """Rows as text of at most 120 columns. left: columns of words, on the left of their column."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip()


def arrow(r: Result) -> str:
    """Which way is better."""
    return "↑" if r.higher_is_better else "↓"
