"""What the code means: a hash of each stage's syntax trees, so that editing a comment re-runs nothing.

A stage's hash covers the module that its command calls and every module of ours that this one imports, directly or not,
without comments and docstrings. What else is in the room (a dry run, an export) may change and re-runs nothing.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from scaling4d.records import write_json

PACKAGE = "scaling4d"
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
STAGES = {
    "clips": "scaling4d.clips.stage",
    "pretrain": "scaling4d.pretrain.loop",
    "baseline": "scaling4d.encoders.pretrained",
    "benchmarks": "scaling4d.readout.benchmark",
    "readout": "scaling4d.readout.train",
    "classifier": "scaling4d.readout.classifier",
    "show": "scaling4d.show.show",
    "reconstruct": "scaling4d.reconstruct.fill",
    "report": "scaling4d.report",
}


def write_hashes(source: Path, out: Path) -> None:
    """Write `<stage>.json`: {"room", "sha256", "modules": {module: sha256}} for every stage, which has its room's name.

    Args:
        source: folder of the package. out: folder to write to; a file whose content stays is not touched.
    """
    out.mkdir(parents=True, exist_ok=True)
    for room, content in hashes(source).items():
        write_json(out / f"{room}.json", content)


@cache
def running(stage: str) -> dict[str, Any]:
    """The hash of a stage's code as this process runs it: as it was when this was first asked."""
    return hashes(Path(__file__).parent, [stage])[stage]


def hashes(source: Path, stages: Iterable[str] = tuple(STAGES)) -> dict[str, dict[str, Any]]:
    """Of every stage what `write_hashes` writes; only modules that they reach are read."""
    paths = {_module(path, source): path for path in sorted(source.rglob("*.py"))}
    tree = cache(lambda name: ast.parse(paths[name].read_text()))
    meaning = cache(lambda name: hashlib.sha256(_meaning(tree(name)).encode()).hexdigest())
    imports = cache(lambda name: imported(tree(name), set(paths)))
    found = {}
    for room in stages:
        modules = {name: meaning(name) for name in sorted(_reach({STAGES[room]}, imports))}
        whole = hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in modules.items()).encode()).hexdigest()
        found[room] = {"room": room, "sha256": whole, "modules": modules}
    return found


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """Our modules that a module imports anywhere in it, lazily or not; a package used by its own name brings all it holds."""
    found, whole = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            whole |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(node.module)
                whole.add(inner if inner in known else node.module)
    whole.discard(PACKAGE)
    found |= {name for name in known for package in whole if name == package or name.startswith(f"{package}.")}
    return found & known - {PACKAGE}


def _module(path: Path, source: Path) -> str:
    parts = (PACKAGE, *path.relative_to(source).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _reach(start: set[str], imports: Callable[[str], set[str]]) -> set[str]:
    reached, waiting = set(), set(start)
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= imports(name) - reached
    return reached


def _meaning(tree: ast.Module) -> str:
    """A tree as text: no docstrings, no positions, no empty fields (Python versions differ in those)."""
    pieces: list[str] = []
    _tell(tree, pieces.append)
    return "".join(pieces)


def _tell(node: ast.AST | list | object, add: Callable[[str], None]) -> None:
    if isinstance(node, list):
        add("[")
        for number, item in enumerate(node):
            if number:
                add(",")
            _tell(item, add)
        add("]")
        return
    if not isinstance(node, ast.AST):
        add(repr(node))
        return
    documented = isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None
    add(type(node).__name__ + "(")
    before = ""
    for name in node._fields:
        value = getattr(node, name, None)
        if documented and name == "body":
            value = value[1:]
        if value is None or value == [] or name in ("kind", "type_comment"):
            continue
        add(f"{before}{name}=")
        _tell(value, add)
        before = ","
    add(")")
