"""The built report, the experiments and the lineage of every number as one static page that works from file://."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from scaling4d import config
from scaling4d.provenance import experiments, write_text
from scaling4d.records import UserError, shortened
from scaling4d.report.built import BuiltReport, NoReportError, read_built_report
from scaling4d.report.run_results import UNTRAINED
from scaling4d.studies.markup import page_style
from scaling4d.studies.words import METRIC_LABELS

FOLDER, PAGE, EXPERIMENTS = "site", "index.html", "experiments.js"
HOSTS = ("127.0.0.1", "localhost")
HEADERS = {  # no other origin may load, frame or guess the type of a file
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "SAMEORIGIN",
    "X-Content-Type-Options": "nosniff",
}
HIDDEN = (*config.POINTS, "encoders", "recipes", "render", "benchmarks", "report")  # settings without a column


def site_page(report: BuiltReport) -> str:
    """index.html with one report in it. It shows ../report.html and, once written, experiments.js beside it."""
    template = resources.files(__package__).joinpath("site.html").read_text()
    template = template.replace("@STYLE@", page_style()).replace("@WORDS@", _json(METRIC_LABELS))
    return template.replace("@RUN@", _json(page_content(report)))


def page_content(report: BuiltReport) -> dict[str, Any]:
    """The content of a report on the page."""
    results = [{**row, "higher_is_better": row["higher_is_better"] == "True"} for row in report.results]
    encoders = dict.fromkeys([*(row["encoder"] for row in results), *(row["point"] for row in report.points)])
    stages = report.stages["stages"].items()
    return {
        "name": report.name,
        "profile": report.settings.get("profile", ""),
        "seed": report.settings.get("seed", ""),
        "settings": {key: value for key, value in report.settings.items() if key.split(".")[0] not in HIDDEN},
        "models": {encoder: dict(_model(report.settings, encoder)) for encoder in encoders},
        "results": results,
        "points": {row["point"]: row for row in report.points},
        "stages": {name: {key: stage[key] for key in stage if key != "settings"} for name, stage in stages},
        "code": report.stages["code"],
    }


def write_experiments(folder: Path) -> list[str]:
    """Write the reports of all experiments to experiments.js; of a damaged one its name and the reason.

    Returns:
        the names of the reports.
    Raises:
        UserError: no site in the report's folder.
    """
    if not (folder / FOLDER / PAGE).is_file():
        raise UserError(f"no {folder / FOLDER / PAGE}: build the report with `dvc repro`, or `scaling4d report` alone")
    reports: dict[str, str] = {}
    for name in sorted(experiments()):
        try:
            reports[name] = _json(page_content(read_built_report(name)))
            reports[name].encode()  # a text of YAML may hold half a character
        except NoReportError:
            continue
        except (UserError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reports[name] = _json({"name": name, "damaged": shortened(error)})
    write_text(folder / FOLDER / EXPERIMENTS, f"window.EXPERIMENTS = [{','.join(reports.values())}];\n")
    return list(reports)


def serve(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the report's folder on this machine alone; port 0 takes a free one. The page is at /site/."""
    handler = partial(LocalHandler, directory=str(folder))
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UserError(f"port {port} cannot be used: {error.strerror}; choose another one with --port") from error


class LocalHandler(SimpleHTTPRequestHandler):
    """Files of a folder for pages of this server alone, without a line on the terminal for each.

    A request under another host's name (DNS rebinding) or from a page of another origin is refused.
    """

    def send_head(self) -> Any:
        host = self.headers.get("Host", "").split(":")[0]
        site, mode = (self.headers.get(f"Sec-Fetch-{kind}", "") for kind in ("Site", "Mode"))
        foreign = site in ("cross-site", "same-site") and mode != "navigate"
        if host not in HOSTS or foreign:
            self.send_error(HTTPStatus.FORBIDDEN, "for pages of this server alone")
            return None
        if "\0" in unquote(self.path):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _model(settings: Mapping[str, Any], encoder: str) -> Iterator[tuple[str, Any]]:
    """The method of an encoder and its settings."""
    point = encoder.removeprefix(UNTRAINED)
    groups = (f"{group}.{point}.model." for group in config.POINTS)
    for prefix in (*groups, "pixels." if encoder == "pixels" else "-"):
        for key, value in settings.items():
            method, _, argument = key.removeprefix(prefix).partition(".")
            if key.startswith(prefix) and argument:
                yield "method", method
                yield argument, value


def _json(content: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element or open a comment."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
