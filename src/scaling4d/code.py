"""What the code means: a hash of each stage's syntax trees, so that editing a comment re-runs nothing.

A stage's hash covers the module that its command calls and every module of ours that this one imports, directly or not,
without comments and docstrings. What else is in the room (a dry run, an export) may change and re-runs nothing.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from scaling4d.records import write_json

PACKAGE = "scaling4d"
STAGES = {
    "clips": "scaling4d.clips.stage",
    "pretrain": "scaling4d.pretrain.loop",
    "baseline": "scaling4d.readout.pretrained",
    "readout": "scaling4d.readout.train",
    "classifier": "scaling4d.readout.classifier",
    "show": "scaling4d.readout.show",
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
    return hashes(Path(__file__).parent)[stage]


def hashes(source: Path) -> dict[str, dict[str, Any]]:
    """Of every stage what `write_hashes` writes."""
    trees = {_module(path, source): ast.parse(path.read_text()) for path in sorted(source.rglob("*.py"))}
    meanings = {name: hashlib.sha256(_meaning(tree).encode()).hexdigest() for name, tree in trees.items()}
    imports = {name: imported(tree, set(trees)) for name, tree in trees.items()}
    found = {}
    for room, entry in STAGES.items():
        modules = {name: meanings[name] for name in sorted(_reach({entry}, imports))}
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


def _reach(start: set[str], imports: dict[str, set[str]]) -> set[str]:
    reached, waiting = set(), set(start)
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= imports[name] - reached
    return reached


def _meaning(node: ast.AST | list | object) -> str:
    """A tree as text: no docstrings, no positions, no empty fields (Python versions differ in those)."""
    if isinstance(node, list):
        return "[" + ",".join(map(_meaning, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
    ):
        fields["body"] = fields["body"][1:]
    kept = {name: value for name, value in fields.items() if value not in (None, []) and name not in ("kind", "type_comment")}
    return type(node).__name__ + "(" + ",".join(f"{name}={_meaning(value)}" for name, value in kept.items()) + ")"
