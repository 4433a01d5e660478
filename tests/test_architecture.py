"""Who may import whom."""

import ast
from pathlib import Path

import scaling4d
from scaling4d.code import imported

SOURCE = Path(scaling4d.__file__).parent
MAY_IMPORT = {
    "benchmarks": set(),
    "clips": set(),
    "mae": set(),
    "training": set(),
    "encoders": {"mae"},
    "scenes": {"benchmarks"},
    "pretrain": {"clips", "mae", "training"},
    "readout": {"benchmarks", "clips", "encoders", "mae", "training"},
    "show": {"benchmarks", "encoders", "readout"},
    "reconstruct": {"clips", "mae", "training"},
    "studies": set(),
    "report": {"studies"},
    "audit": {"studies"},
}
MODULES = {
    ".".join(("scaling4d", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
}


def rooms_imported(path: Path) -> set[str]:
    names = imported(ast.parse(path.read_text()), MODULES)
    return {name.split(".")[1] for name in names} & {*MAY_IMPORT, "cli"}


def test_rooms_import_only_what_the_design_allows() -> None:
    for room, allowed in MAY_IMPORT.items():
        files = list((SOURCE / room).rglob("*.py"))
        assert files, f"room {room} is empty"
        for path in files:
            assert rooms_imported(path) <= allowed | {room}, path


def test_the_hallway_imports_no_room() -> None:
    for path in SOURCE.glob("*.py"):
        if path.name not in ("cli.py", "__main__.py", "__init__.py"):  # the doors: commands, and `load` for Python
            assert not rooms_imported(path), path


def test_only_one_file_touches_pyav_and_one_touches_gin() -> None:
    """PyAV also stands beside ours where its speed is measured."""
    for library, home in (("av", ("video.py", "readers.py")), ("gin", ("config.py",)), ("hydra", ("config.py",))):
        for path in SOURCE.rglob("*.py"):
            tree = ast.parse(path.read_text())
            names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
            assert path.name in home or not {name for name in names if name.split(".")[0] == library}, path


def test_no_folder_is_called_by_a_word_without_meaning() -> None:
    assert not {path.stem for path in SOURCE.rglob("*")} & {"utils", "util", "common", "misc", "helpers"}
