"""The `report` stage: execute the notebook offline, and write every file as the same bytes for the same inputs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config
from scaling4d.records import UserError, write_json
from scaling4d.report import built, site, tables
from scaling4d.report.story import Story, read

NOTEBOOK = Path("reports/scaling.ipynb")
RUNS = "runs.json"


def build(settings: Mapping[str, Any]) -> None:
    """Results in; csv, json, svg, the executed notebook and HTML out, and `runs.json` beside them. Prints the main table.

    Raises:
        UserError: a file that the settings promise is missing (names the stage to run), or the notebook fails.
    """
    started = time.time()
    story = read(settings)
    if not NOTEBOOK.is_file():
        raise UserError(f"no {NOTEBOOK} in {Path.cwd()}; run inside the project")
    folder = Path(config.section(settings, "report.folder"))
    ready = artifacts.PARTIAL / "report"
    with artifacts.folder(ready) as out:
        _write_tables(story, out)
        _execute(out / NOTEBOOK.name)
        _write_figures(out / NOTEBOOK.name, out)
        (out / "report.html").write_text(_html(out / NOTEBOOK.name))
        _write_site(out)
    for file in sorted(file for file in ready.rglob("*") if file.is_file()):
        final = folder / file.relative_to(ready)
        final.parent.mkdir(parents=True, exist_ok=True)
        file.replace(final)
    shutil.rmtree(ready)
    page = artifacts.sha256(folder / "report.html")
    artifacts.write_run("report", page, started=started)
    write_runs(story, settings, folder / RUNS, also={page})
    print(tables.table(story))


def write_runs(story: Story, settings: Mapping[str, Any], path: Path, *, also: set[str]) -> None:
    """Gather time and machine of the runs that made exactly these artifacts; what a former report knew of them stays."""
    known = also | {sha for p in story.provenances.values() for sha in (p.get("inputs") or {}).values()}
    home = artifacts.home(settings)
    known |= {
        artifacts.sha256(home / name) for name in story.provenances if name.startswith(("readout/", "show/", "reconstruct/"))
    }
    former = json.loads(path.read_text())["runs"] if path.is_file() else []
    files = sorted(artifacts.RUNS.glob("*.json")) if artifacts.RUNS.is_dir() else []
    runs = {(run["stage"], run["out_sha256"]): run for run in [*former, *(json.loads(file.read_text()) for file in files)]}
    mine = [run for key, run in sorted(runs.items()) if key[1] in known]
    partial = artifacts.PARTIAL / RUNS
    partial.parent.mkdir(exist_ok=True)
    write_json(partial, {"runs": mine, "seconds": round(sum(run["seconds"] for run in mine), 1)})
    partial.replace(path)


def _write_tables(story: Story, out: Path) -> None:
    (out / "results.csv").write_text(tables.results_csv(story))
    (out / "pretrain.csv").write_text(tables.pretrain_csv(story))
    (out / "reconstruct.csv").write_text(tables.reconstruct_csv(story))
    (out / "curves.csv").write_text(tables.curves_csv(story))
    write_json(out / "metrics.json", tables.metrics(story))
    write_json(out / "stages.json", tables.stages(story))


def _write_figures(notebook: Path, out: Path) -> None:
    """What the executed notebook drew, each figure in a file of its own."""
    import nbformat

    from scaling4d.report.costs import costs
    from scaling4d.report.figures import FIGURES, drawn

    cells = nbformat.read(notebook, as_version=4).cells
    found = drawn("".join(output.get("data", {}).get("text/html", "") for cell in cells for output in cell.get("outputs", ())))
    for name in (figure.__name__ for figure in (*FIGURES, costs)):
        if name not in found:
            raise UserError(f"{NOTEBOOK} does not show the figure {name!r}; let one of its cells display it")
        (out / f"{name}.svg").write_text(found[name])


def _write_site(out: Path) -> None:
    """The page that `scaling4d serve` opens; it holds a copy of the report, so that the folder can be moved as a whole."""
    (out / site.FOLDER).mkdir()
    copy = (out / "report.html").read_text().replace('href="../studies/', 'href="../../studies/')
    (out / site.FOLDER / "report.html").write_text(copy)
    report = replace(built.read(folder=out.as_posix()), name="this report")
    (out / site.FOLDER / site.PAGE).write_text(site.page(report))


def _execute(path: Path) -> None:
    """Run the notebook with this Python, then drop what differs from run to run: timing, ids, versions."""
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    with _private_jupyter():
        try:
            papermill.execute_notebook(str(NOTEBOOK), str(path), kernel_name="python3", cwd=".", progress_bar=False)
        except PapermillExecutionError as error:
            raise UserError(f"{NOTEBOOK} fails in cell {error.exec_count}: {error.ename}: {error.evalue}") from error
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        cell.pop("execution_count", None)
        if cell.cell_type == "code":
            cell.execution_count = index
            cell.outputs = [output for output in cell.outputs if output.output_type != "stream"]  # warnings of libraries
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = index
    nbformat.write(notebook, path)


def _html(path: Path) -> str:
    """The executed notebook as one page that needs no network; code stays in the notebook."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="lab",
        require_js_url="",
        mathjax_url="",
        mermaid_js_url="",
        mermaid_layout_elk_js_url="",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    return exporter.from_filename(str(path), resources={"metadata": {"name": "scaling4d"}})[0]


@contextmanager
def _private_jupyter() -> Iterator[None]:
    """Jupyter's and IPython's folders in an empty place, so that nothing of the user's home changes what runs."""
    names = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="scaling4d-") as empty:
        os.environ.update(dict.fromkeys(names, empty))
        quiet = Path(empty) / "profile_default/ipython_kernel_config.json"
        quiet.parent.mkdir()
        quiet.write_text('{"IPKernelApp": {"log_level": 40}}')  # errors only
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
