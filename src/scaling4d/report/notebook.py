"""The executed notebook: it links the report's figures and shows its small tables, as equal bytes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from scaling4d import config
from scaling4d.provenance import parse_csv, work_folder
from scaling4d.records import UserError
from scaling4d.studies.markup import csv_cell_text, html_table
from scaling4d.studies.words import WORDS, measure

if TYPE_CHECKING:
    from IPython.display import HTML

NOTEBOOK = Path("reports/scaling.ipynb")
JUPYTER_FOLDERS = ("TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
HASH = "checkpoint_sha256"


def show_table(name: str) -> HTML:
    """A csv file of the current folder, as a notebook displays it; results without their further metrics and hashes."""
    from IPython.display import HTML

    rows = parse_csv(Path(name).read_text())
    columns = [column for column in (rows[0] if rows else ()) if column != HASH]
    cells = []
    for row in rows:
        if row.get("low") != "":  # a further metric of a result has no interval
            metric = {"metric": measure(row["metric"])} if "metric" in row else {}
            cells.append([csv_cell_text(text) for text in ({**row, **metric}[column] for column in columns)])
    heads = [measure(column) if column in WORDS else column.replace("_", " ") for column in columns]
    return HTML(html_table(heads, cells))


def execute(folder: Path) -> None:
    """Execute the notebook in the report's folder and write it there, without what differs from run to run.

    Raises:
        UserError: a cell fails.
    """
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    path = folder.absolute() / NOTEBOOK.name
    with _private_jupyter():
        try:
            source = str(NOTEBOOK.absolute())
            papermill.execute_notebook(source, str(path), kernel_name="python3", cwd=str(folder), progress_bar=False)
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


@contextmanager
def _private_jupyter() -> Iterator[None]:
    """Jupyter's and IPython's folders in an empty place, so that nothing of the user's home changes the result.

    The kernel imports this copy of the package, from any folder; PYTHONPATH goes on behind it.
    """
    with work_folder("scaling4d-jupyter", Path(tempfile.gettempdir())) as empty:
        given = [Path(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
        folders = [str(folder.absolute()) for folder in (Path(config.__file__).parents[1], *given)]
        variables = dict.fromkeys(JUPYTER_FOLDERS, str(empty)) | {"PYTHONPATH": os.pathsep.join(folders)}
        with patch.dict(os.environ, variables), patch.object(tempfile, "tempdir", str(empty)):  # the kernel's connection file
            quiet = empty / "profile_default/ipython_kernel_config.json"
            quiet.parent.mkdir()
            quiet.write_text('{"IPKernelApp": {"log_level": 40}}')  # errors only
            yield
