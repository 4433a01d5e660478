"""Stage `code`: one hash of the code of each package that has a stage. Comments and docstrings do not count.

The hash of a package covers its `stage.py` and every module of ours that this imports, directly or not. Other modules
of the package (a dry run, an export) do not count. Probes of a pretraining have a hash of their own: a pretraining
without probes does not depend on readouts.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from scaling4d import provenance
from scaling4d.records import json_text

PACKAGE = "scaling4d"
SOURCE = Path(__file__).parents[1]
APART = {"probes": f"{PACKAGE}.pretrain.probes"}  # hashed by itself, and not with the modules that import it
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def write_hashes(source: Path, out: Path) -> None:
    """Write `<package>.json` for every package with a stage, and for APART.

    Their content is {"package", "sha256", "modules": {module: sha256}}.
    """
    for package, content in hashes(source).items():
        provenance.write_text(out / f"{package}.json", json_text(content))


@cache
def running(package: str) -> dict[str, Any]:
    """The hash of a package's code in this process. Later edits on disk do not change the answer."""
    return hashes(SOURCE, [package])[package]


def hashes(source: Path, packages: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """The content of `<package>.json` by package; default: all packages with a `stage.py`, and APART.

    Reads no other module.
    """
    paths = {_module(path, source): path for path in sorted(source.rglob("*.py"))}
    starts = {path.parent.name: f"{PACKAGE}.{path.parent.name}.stage" for path in sorted(source.glob("*/stage.py"))}
    starts |= {package: module for package, module in APART.items() if module in paths}
    tree = cache(lambda name: ast.parse(paths[name].read_text()))
    digest = cache(lambda name: hashlib.sha256(_meaning(tree(name)).encode()).hexdigest())
    imports = cache(lambda name: imported(tree(name), set(paths)))
    content = {}
    for package in starts if packages is None else packages:
        modules = {name: digest(name) for name in sorted(_reachable(starts[package], imports))}
        combined = hashlib.sha256("".join(f"{name} {sha}\n" for name, sha in modules.items()).encode()).hexdigest()
        content[package] = {"package": package, "sha256": combined, "modules": modules}
    return content


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """Our modules that a module imports, lazily or not. A package imported by its own name counts with all modules."""
    modules, packages = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                modules.add(node.module)
                packages.add(inner if inner in known else node.module)
    packages.discard(PACKAGE)
    modules |= {name for name in known for package in packages if name == package or name.startswith(f"{package}.")}
    return modules & known - {PACKAGE}


def _module(path: Path, source: Path) -> str:
    parts = (PACKAGE, *path.relative_to(source).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _reachable(start: str, imports: Callable[[str], set[str]]) -> set[str]:
    reached, waiting = set(), {start}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= imports(name) - reached - set(APART.values())
    return reached


def _meaning(node: ast.AST | list | object) -> str:
    """A syntax tree as text, without docstrings, positions and empty fields (Python versions differ in those)."""
    if isinstance(node, list):
        return f"[{','.join(map(_meaning, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    documented = isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None
    fields = []
    for name in node._fields:
        value = getattr(node, name, None)
        if documented and name == "body":
            value = value[1:]
        if value is not None and value != [] and name not in ("kind", "type_comment"):
            fields.append(f"{name}={_meaning(value)}")
    return f"{type(node).__name__}({','.join(fields)})"
