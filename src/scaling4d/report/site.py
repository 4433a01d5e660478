"""The built report, the experiments and the way back of every number as one static page that works from file://."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from scaling4d import artifacts
from scaling4d.records import UserError
from scaling4d.report import built
from scaling4d.report.built import Built
from scaling4d.report.story import UNTRAINED

FOLDER, PAGE, EXPERIMENTS = "site", "index.html", "experiments.js"
HISTORY = 20  # earlier reports that `serve` looks back for
NOT_COLUMNS = (
    "points",
    "distilled",
    "encoders",
    "recipes",
    "render",
    "benchmarks",
    "report",
)  # settings that are no column of the table


def page(report: Built) -> str:
    """index.html with one report in it; beside it lie report.html and, once `serve` has gathered them, experiments.js."""
    template = resources.files(__package__).joinpath("site.html").read_text()
    return template.replace("@RUN@", _json(content(report)))


def content(report: Built) -> dict[str, Any]:
    """What the page shows of a report."""
    results = [{**row, "higher_is_better": row["higher_is_better"] == "True"} for row in report.results]
    encoders = dict.fromkeys([*(row["encoder"] for row in results), *(row["point"] for row in report.points)])
    return {
        "name": report.name,
        "profile": report.settings.get("profile", ""),
        "seed": report.settings.get("seed", ""),
        "settings": {key: value for key, value in report.settings.items() if key.split(".")[0] not in NOT_COLUMNS},
        "models": {encoder: dict(_model(report.settings, encoder)) for encoder in encoders},
        "results": results,
        "points": {row["point"]: row for row in report.points},
        "stages": report.stages.get("stages", {}),
        "code": report.stages.get("code", {}),
    }


def gather(folder: Path) -> list[str]:
    """Write the reports of all experiments and of the last commits that changed this one to experiments.js; their names.

    A commit whose report says what one before it in the list says is left out.

    Raises:
        UserError: no site in the report's folder.
    """
    site = folder / FOLDER
    if not (site / PAGE).is_file():
        raise UserError(f"no {site / PAGE}: build the report with `dvc repro`, or `scaling4d report` alone")
    experiments = built.experiments()
    found, said = [], [_json({**content(built.read(folder=folder.as_posix())), "name": ""})]
    for name in [*experiments, *built.history((folder / "results.csv").as_posix(), HISTORY)]:
        try:
            one = content(built.read(name))
        except UserError:
            continue  # no report in it
        said.append(_json({**one, "name": ""}))
        if name in experiments or said[-1] not in said[:-1]:
            found.append(one)
    partial_file = artifacts.PARTIAL / EXPERIMENTS
    partial_file.parent.mkdir(exist_ok=True)
    partial_file.write_text(f"window.EXPERIMENTS = {_json(found)};\n")
    partial_file.replace(site / EXPERIMENTS)
    return [one["name"] for one in found]


def serve(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the site on this machine alone; port 0 takes a free one."""
    handler = partial(Quiet, directory=str(folder / FOLDER))
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UserError(f"port {port} cannot be used: {error.strerror}; choose another one with --port") from error


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, without a line on the terminal for each."""

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _model(settings: Mapping[str, Any], encoder: str) -> Iterator[tuple[str, Any]]:
    """The arguments of an encoder's constructor, and which one it is."""
    point = encoder.removeprefix(UNTRAINED)
    for prefix in (f"points.{point}.", f"distilled.{point}.", "pixels." if encoder == "pixels" else "-"):
        for key, value in settings.items():
            if key.startswith(prefix):
                method, _, argument = key.removeprefix(prefix).partition(".")
                if argument:
                    yield "method", method
                    yield argument, value


def _json(content: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
