"""Stage `report`: write csv, json, svg, png and HTML and execute the notebook that shows them, as equal bytes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling4d import artifacts
from scaling4d.provenance import commit_and_edits, move_folder, work_folder, write_text
from scaling4d.records import UserError, file_system_errors, json_text, write_json
from scaling4d.report import site, tables
from scaling4d.report.built import read_built_report
from scaling4d.report.figures import draw_figures
from scaling4d.report.layout import build_page, report_html
from scaling4d.report.notebook import NOTEBOOK, execute
from scaling4d.report.pictures import draw_strips
from scaling4d.report.run_results import RunResults, read_run_results
from scaling4d.report.sections import PICTURES

RUNS, COMMIT = "runs.json", "commit.js"  # no outs: equal results of other commits are equal
INPUTS = ("src", "dvc.yaml", "params.yaml", "data.dvc")


def build(settings: Mapping[str, Any]) -> None:
    """Results in; csv, json, svg, png, HTML and executed notebook out, and runs.json beside them. Prints the table.

    Raises:
        UserError: a file of the settings is missing (names the stage to run), or the notebook fails.
    """
    started = time.time()
    run = read_run_results(settings)
    if not NOTEBOOK.is_file():
        raise UserError(f"no {NOTEBOOK} in {Path.cwd()}; run inside the project")
    with file_system_errors(run.folder), work_folder("report") as out:
        for write_csv in (tables.results_csv, tables.pretrain_csv, tables.reconstruct_csv, tables.curves_csv):
            (out / f"{write_csv.__name__.removesuffix('_csv')}.csv").write_text(write_csv(run))
        write_json(out / "metrics.json", tables.metrics(run))
        write_json(out / "stages.json", tables.stages(run))
        for name, svg in draw_figures(run).items():
            (out / f"{name}.svg").write_text(svg)
        (out / PICTURES).mkdir()
        for name, path in run.sheets.items():
            shutil.copyfile(path, out / PICTURES / f"sheet_{name}.png")
        draw_strips(run.pictures, run.side_px, run.ladder, out / PICTURES)
        page = build_page(run)
        page.write_json(out)
        (out / "report.html").write_text(report_html(page, COMMIT))
        execute(out)
        (out / site.FOLDER).mkdir()
        report = replace(read_built_report(folder=out.as_posix()), name="this report")
        (out / site.FOLDER / site.PAGE).write_text(site.site_page(report))
        with work_folder(".report", run.folder) as beside:
            complete = beside / "complete"
            move_folder(out, complete)
            shutil.rmtree(run.folder / PICTURES, ignore_errors=True)
            for file in sorted(file for file in complete.rglob("*") if file.is_file()):
                final = run.folder / file.relative_to(complete)
                final.parent.mkdir(parents=True, exist_ok=True)
                file.replace(final)
    page_sha256 = artifacts.sha256(run.folder / "report.html")
    artifacts.write_run("report", page_sha256, started=started)
    write_runs(run, also={page_sha256})
    # commit.js enters the commit of the results into the page's summary.
    text = json.dumps(commit_and_edits(*INPUTS))
    rows = 'for (const row of document.querySelectorAll("#summary tr"))'
    write_text(run.folder / COMMIT, f'{rows}\n  if (row.cells[0].textContent === "commit") row.cells[1].textContent = {text};\n')
    print(tables.table_text(run))


def write_runs(run: RunResults, *, also: set[str]) -> None:
    """Write runs.json: time and machine of the runs that made these artifacts; those of a former report stay."""
    current = also | {sha for p in run.provenances.values() for sha in (p.get("inputs") or {}).values()}
    leaves = (name for name in run.provenances if name.startswith(("readout/", "show/", "reconstruct/")))
    current |= {artifacts.sha256(run.home / name) for name in leaves}
    path = run.folder / RUNS
    former = json.loads(path.read_text())["runs"] if path.is_file() else []
    files = sorted(artifacts.RUNS.glob("*.json")) if artifacts.RUNS.is_dir() else []
    by_out = {(one["stage"], one["out_sha256"]): one for one in [*former, *(json.loads(file.read_text()) for file in files)]}
    runs = [one for key, one in sorted(by_out.items()) if key[1] in current]
    content = {"runs": runs, "seconds": round(sum(one["seconds"] for one in runs), 1)}
    write_text(path, json_text(content))
