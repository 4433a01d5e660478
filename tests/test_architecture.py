"""The packages: which may import which, their sizes and their names."""

import ast
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"
HOUSE, BENCH = SOURCES / "scaling4d", SOURCES / "scaling4d_bench"
HALLWAY = {"records", "config", "seeds", "artifacts", "provenance", "checkpoint", "video", "log", "cli"}
ENTRANCES = {"__init__", "__main__", "cli"}  # `scaling4d.Encoder`, `python -m scaling4d`, and the commands
LEVELS = (  # a package imports packages of earlier levels only
    {"benchmarks", "clips", "mae"},
    {"pipeline"},
    {"training"},
    {"encoders"},
    {"readout", "features"},  # linear probes of a readout are measured in pretraining
    {"pretrain"},
    {"scenes", "reconstruct"},
    {"studies"},
    {"show", "report", "audit"},
    {"evaluate", "reproduce"},
)
MAY_IMPORT = {package: set().union(*LEVELS[:level]) for level, packages in enumerate(LEVELS) for package in packages}
MAY_IMPORT["scenes"] = {"benchmarks"}
DOORS = {"av": ("video", "scaling4d_bench"), "gin": ("config",), "hydra": ("config",)}  # library -> modules that may import it
MODULES = {
    ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES.rglob("*.py")
}
ALL_PACKAGES = [*sorted(path.name for path in HOUSE.iterdir() if any(path.rglob("*.py"))), "scaling4d_bench"]


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports_of(module: str) -> set[str]:
    """Names of modules, ours and of libraries, that a module imports anywhere, lazily or for type checks alone."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {member if member in MODULES else node.module for member in members}
    return names


def package_of(module: str) -> str:
    """`mae` of scaling4d.mae.patches; "" of the hallway's modules; `scaling4d_bench`."""
    first, *inner = module.split(".")
    if first != "scaling4d":
        return first
    return inner[0] if inner and (HOUSE / inner[0]).is_dir() else ""


def packages_imported(module: str) -> set[str]:
    return {package_of(name) for name in imports_of(module) if name in MODULES} - {"", package_of(module)}


def test_every_package_has_its_level() -> None:
    assert set(ALL_PACKAGES) == {*MAY_IMPORT, "scaling4d_bench"}


@pytest.mark.integration
@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_only_packages_of_earlier_levels(package: str) -> None:
    upwards = {module: packages_imported(module) - MAY_IMPORT[package] for module in MODULES if package_of(module) == package}
    assert not {module: packages for module, packages in upwards.items() if packages}


def test_the_hallway_is_nine_files_that_import_no_package() -> None:
    assert {path.stem for path in HOUSE.glob("*.py")} == HALLWAY | {"__init__", "__main__"}
    for name in HALLWAY - ENTRANCES:
        assert not packages_imported(f"scaling4d.{name}"), name


def test_nothing_imports_the_commands_and_only_they_find_the_bench() -> None:
    for module in MODULES.keys() - {"scaling4d.__main__"}:
        assert "scaling4d.cli" not in imports_of(module), module
    for module in MODULES.keys() - {"scaling4d.cli"}:
        assert package_of(module) == "scaling4d_bench" or "scaling4d_bench" not in packages_imported(module), module


def test_modules_import_each_other_in_no_circle() -> None:
    edges = {module: {name for name in imports_of(module) if name in MODULES and name != module} for module in MODULES}
    for module, names in edges.items():  # a package's front may import its modules, and they may name the package
        names -= {"scaling4d", module.rpartition(".")[0]}
    TopologicalSorter(edges).prepare()


@pytest.mark.parametrize("library", list(DOORS))
def test_a_library_has_one_door(library: str) -> None:
    for module in MODULES:
        if any(name.split(".")[0] == library for name in imports_of(module)):
            assert module.split(".")[0] in DOORS[library] or module.removeprefix("scaling4d.") in DOORS[library], module


def test_report_and_audit_read_no_weights() -> None:
    for module in MODULES:
        if package_of(module) in ("report", "audit"):
            assert not {name.split(".")[0] for name in imports_of(module)} & {"torch", "safetensors"}, module


def test_no_two_public_classes_share_a_name() -> None:
    classes = [
        node.name
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not [name for name, count in Counter(classes).items() if count > 1]


@pytest.mark.parametrize("package", ALL_PACKAGES)
def test_a_package_is_small_enough_to_read(package: str) -> None:
    folder = BENCH if package == "scaling4d_bench" else HOUSE / package
    assert sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py")) <= 3000


def test_nothing_is_called_by_a_word_without_meaning() -> None:
    assert not {path.stem for path in SOURCES.rglob("*")} & {"utils", "util", "common", "misc", "helpers", "helper"}


def test_no_name_is_of_a_private_language() -> None:
    for path in (*SOURCES.rglob("*.py"), *Path(__file__).parent.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        assert not names & {"found", "asked", "mine", "judged", "settle", "put", "keep"}, path


def test_files_of_tests_have_names_of_their_own() -> None:
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1]
