"""Stage `report`: write csv, json, svg and png files and execute the notebook that shows them, as equal bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from scaling4d import artifacts
from scaling4d.provenance import WORK_FOLDER, atomic_folder, commit_and_edits, write_text
from scaling4d.records import UserError, write_json
from scaling4d.report import site, tables
from scaling4d.report.built import read_built_report
from scaling4d.report.figures import draw_figures
from scaling4d.report.page import Page
from scaling4d.report.pictures import draw_strips
from scaling4d.report.run_results import RunResults, read_run_results
from scaling4d.report.sections import PICTURES, read_page
from scaling4d.studies.markup import html_page

NOTEBOOK = Path("reports/scaling.ipynb")
RUNS, COMMIT = "runs.json", "commit.js"  # no outs: equal results of other commits are equal
INPUTS = ("src", "dvc.yaml", "params.yaml", "data.dvc")
JUPYTER_FOLDERS = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")


def build(settings: Mapping[str, Any]) -> None:
    """Results in; csv, json, svg, png, executed notebook and HTML out, and runs.json beside them. Prints the table.

    Raises:
        UserError: a file of the settings is missing (names the stage to run), or the notebook fails or lacks a section.
    """
    started = time.time()
    run = read_run_results(settings)
    if not NOTEBOOK.is_file():
        raise UserError(f"no {NOTEBOOK} in {Path.cwd()}; run inside the project")
    complete = WORK_FOLDER / "report"
    with atomic_folder(complete) as out:
        for name in ("results", "pretrain", "reconstruct", "curves"):
            (out / f"{name}.csv").write_text(getattr(tables, f"{name}_csv")(run))
        write_json(out / "metrics.json", tables.metrics(run))
        write_json(out / "stages.json", tables.stages(run))
        for name, svg in draw_figures(run).items():
            (out / f"{name}.svg").write_text(svg)
        (out / PICTURES).mkdir()
        for name, path in run.sheets.items():
            shutil.copyfile(path, out / PICTURES / f"sheet_{name}.png")
        draw_strips(run.pictures, run.side_px, run.ladder, out / PICTURES)
        page = read_page(run)
        page.write_json(out)
        (out / "report.html").write_text(_execute(out / NOTEBOOK.name, page))
        (out / site.FOLDER).mkdir()
        report = replace(read_built_report(folder=out.as_posix()), name="this report")
        (out / site.FOLDER / site.PAGE).write_text(site.site_page(report))
    shutil.rmtree(run.folder / PICTURES, ignore_errors=True)
    for file in sorted(file for file in complete.rglob("*") if file.is_file()):
        final = run.folder / file.relative_to(complete)
        final.parent.mkdir(parents=True, exist_ok=True)
        file.replace(final)
    shutil.rmtree(complete)
    page_sha256 = artifacts.sha256(run.folder / "report.html")
    artifacts.write_run("report", page_sha256, started=started)
    write_runs(run, also={page_sha256})
    write_commit(run)
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
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_commit(run: RunResults) -> None:
    """Write commit.js, which enters the commit of the results into the page's summary."""
    text = json.dumps(commit_and_edits(*INPUTS))
    rows = 'for (const row of document.querySelectorAll("#summary tr"))'
    write_text(run.folder / COMMIT, f'{rows}\n  if (row.cells[0].textContent === "commit") row.cells[1].textContent = {text};\n')


def _execute(path: Path, page: Page) -> str:
    """Execute the notebook, drop timing, ids and versions, which differ from run to run, and return it as HTML.

    Raises:
        UserError: a cell fails, or the notebook does not show every section once, in order.
    """
    import nbformat
    import papermill
    from nbconvert import HTMLExporter
    from papermill.exceptions import PapermillExecutionError

    with _private_jupyter():
        try:
            papermill.execute_notebook(str(NOTEBOOK), str(path), kernel_name="python3", cwd=".", progress_bar=False)
        except PapermillExecutionError as error:
            raise UserError(f"{NOTEBOOK} fails in cell {error.exec_count}: {error.ename}: {error.evalue}") from error
    notebook = nbformat.read(path, as_version=4)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index:02d}", {}
        if cell.cell_type == "code":
            cell.execution_count = index
            cell.outputs = [output for output in cell.outputs if output.output_type != "stream"]  # warnings of libraries
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = index
    nbformat.write(notebook, path)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
    body = exporter.from_notebook_node(notebook)[0]
    check_sections(body, list(page.sections))
    return html_page("scaling4d", f'{body}\n<script src="{COMMIT}"></script>')


def check_sections(body: str, names: list[str]) -> None:
    """Refuse a notebook that does not show every section once, in order."""
    shown = re.findall(r'<div class="scaling4d" id="(\w+)">', body)
    for name in names:
        if name not in shown:
            raise UserError(f"{NOTEBOOK} does not show the section {name!r}; let one of its cells display it")
    if shown != names:
        raise UserError(f"{NOTEBOOK} shows the sections {', '.join(shown)}; needed each once, as {', '.join(names)}")


@contextmanager
def _private_jupyter() -> Iterator[None]:
    """Jupyter's and IPython's folders in an empty place, so that nothing of the user's home changes the result."""
    with tempfile.TemporaryDirectory(prefix="scaling4d-") as empty, patch.dict(os.environ, dict.fromkeys(JUPYTER_FOLDERS, empty)):
        quiet = Path(empty) / "profile_default/ipython_kernel_config.json"
        quiet.parent.mkdir()
        quiet.write_text('{"IPKernelApp": {"log_level": 40}}')  # errors only
        yield
