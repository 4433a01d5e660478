"""Code hashes follow meaning."""

import ast
import json
from pathlib import Path

from scaling4d import cli
from scaling4d.code import STAGES, imported, running, write_hashes

ROOT = Path(__file__).parents[1]

FILES = {
    "records.py": '"""Doc."""\nX = 1\n',
    "clips/__init__.py": "",
    "clips/loader.py": "from scaling4d.records import X\n\n\ndef load():\n    return X\n",
    "clips/curate.py": "def cut():\n    return 1\n",
    "clips/stage.py": "from scaling4d.clips import curate\n\n\ndef clips():\n    return curate.cut()\n",
    "clips/spare.py": "Z = 1\n",
    "readout/benchmark.py": "",
    "encoders/pretrained.py": "",
    "readout/train.py": "",
    "readout/classifier.py": "",
    "show/show.py": "",
    "reconstruct/fill.py": "",
    "pretrain/__init__.py": "",
    "pretrain/loop.py": "def train():\n    from scaling4d.clips import loader\n\n    return loader\n",
    "report/__init__.py": "Y = 1\n",
}


def hashes(tmp_path: Path, **changed: str) -> dict[str, str]:
    for name, text in (FILES | {key.replace("__", "/") + ".py": value for key, value in changed.items()}).items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(text)
    write_hashes(tmp_path / "src", tmp_path / "out")
    return {path.stem: json.loads(path.read_text())["sha256"] for path in (tmp_path / "out").glob("*.json")}


def test_comments_docstrings_and_layout_change_nothing(tmp_path: Path) -> None:
    before = hashes(tmp_path)
    after = hashes(tmp_path, records='"""Other words."""\n\n# a comment\nX   =   1\n')
    assert before == after


def test_logic_changes_the_rooms_that_use_it_and_no_other(tmp_path: Path) -> None:
    before, after = hashes(tmp_path), hashes(tmp_path, records="X = 2\n")
    assert {room for room in before if before[room] != after[room]} == {"pretrain"}


def test_a_lazily_imported_module_counts_and_its_neighbour_does_not(tmp_path: Path) -> None:
    before = hashes(tmp_path)
    neighbour = hashes(tmp_path, clips__curate="def cut():\n    return 2\n")
    assert {room for room in before if before[room] != neighbour[room]} == {"clips"}


def test_a_module_that_no_stage_imports_changes_nothing(tmp_path: Path) -> None:
    assert hashes(tmp_path) == hashes(tmp_path, clips__spare="Z = 2\n")


def test_every_stage_is_hashed_from_the_module_that_its_command_calls() -> None:
    tree = ast.parse(Path(cli.__file__).read_text())
    commands = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in STAGES]
    called: dict[str, set[str]] = {}
    for command in commands:
        for node in (inner for inner in ast.walk(command) if isinstance(inner, ast.ImportFrom)):
            module = f"{node.module}.{node.names[0].name}"  # `from scaling4d.clips import stage`
            called.setdefault(command.name, set()).add(module if module in STAGES.values() else node.module)
    expected = {stage: {module} for stage, module in STAGES.items() if stage != "classifier"}
    expected["readout"].add(STAGES["classifier"])  # a protocol of the same command
    expected["baseline"].add("scaling4d.pretrain.point")  # the untrained ones and pixels
    assert called == expected


def test_the_report_is_hashed_with_every_module_that_its_notebook_calls(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "reports/scaling.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    source = ROOT / "src/scaling4d"
    known = {".".join(path.relative_to(source.parent).with_suffix("").parts) for path in source.rglob("*.py")}
    called = imported(ast.parse(code), known)
    write_hashes(source, tmp_path)
    assert called and called <= set(json.loads((tmp_path / "report.json").read_text())["modules"])


def test_a_process_names_the_code_that_it_runs(tmp_path: Path) -> None:
    write_hashes(ROOT / "src/scaling4d", tmp_path)
    assert running("pretrain") == json.loads((tmp_path / "pretrain.json").read_text())
