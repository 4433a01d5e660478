"""Encoders and reading of video need four packages and what these need; all else is an extra."""

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import small_encoder
import typer.testing
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as plain

from scaling4d import cli
from scaling4d.__main__ import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CORE = {"av", "numpy", "safetensors", "torch"}
README = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
PRINT = "\nprint(tuple(features.shape), encoder.rate_hz)\n"
NEEDED = "pip install 'scaling4d[pipeline]', or 'scaling4d[commands]' for features and export"
NO_TYPER = f"error: no package typer; the commands need: {NEEDED}\n"
LIGHT = """
import sys
from importlib.machinery import PathFinder

class Light:
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Light
"""


def distributions_of(wanted: set[str]) -> Iterator[metadata.Distribution]:
    """Installed distributions, and those that they require."""
    names, waiting = set(), sorted(wanted)
    while waiting:
        if (name := plain(waiting.pop())) not in names:
            names.add(name)
            yield metadata.distribution(name)
            required = map(Requirement, metadata.requires(name) or [])
            waiting += [one.name for one in required if not one.marker or one.marker.evaluate({"extra": ""})]


def absent_modules(wanted: set[str] = CORE) -> set[str]:
    """Top modules of everything else that is installed."""
    present = {plain(distribution.name) for distribution in distributions_of(wanted)}
    modules = metadata.packages_distributions().items()
    return {name for name, owners in modules if not present & set(map(plain, owners)) and not name.startswith("scaling4d")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place with the checkpoint and the video of README's lines."""
    small_encoder.checkpoint(tmp_path / "artifacts/pocket/pretrain/mini", "SimpleMAE", 4.0, clip=(8, 64, 64))
    (tmp_path / "data").symlink_to(ROOT / "experiments/pocket")
    return tmp_path


def output_of(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    words = list(map(str, command))
    return subprocess.run(
        words, cwd=cwd, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True, check=False
    )


def test_the_readme_shows_five_lines() -> None:
    assert len([line for line in README.splitlines() if line]) == 5 and README.startswith("import scaling4d\n")


@pytest.mark.integration
def test_the_readmes_lines_import_core_packages_alone(folder: Path) -> None:
    absent = absent_modules()
    assert {"gin", "dvc", "hydra", "typer", "PIL", "yaml", "xformers", "torchvision", "transformers", "scipy"} <= absent
    code = LIGHT.format(absent=absent) + README + PRINT
    done = output_of(sys.executable, "-c", code, cwd=folder, PYTHONPATH=str(ROOT / "src"))
    assert (done.stdout, done.stderr) == ("(1, 64, 24) 4.0\n", "")


@pytest.mark.integration
def test_importing_the_package_imports_no_other() -> None:
    code = "import sys; before = set(sys.modules); import scaling4d; print(sorted(set(sys.modules) - before))"
    done = output_of(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT / "src"))
    imported = {name.partition(".")[0] for name in re.findall(r"'([\w.]+)'", done.stdout)}
    assert "scaling4d" in imported and imported - {"scaling4d"} <= set(sys.stdlib_module_names), done.stderr


@pytest.mark.integration
def test_the_commands_of_a_light_installation_name_the_extra_that_they_need(tmp_path: Path) -> None:
    code = LIGHT.format(absent=absent_modules()) + "from scaling4d.__main__ import main; main()"
    done = output_of(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT / "src"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == NO_TYPER


@pytest.mark.integration
def test_features_and_export_need_the_extra_of_commands_alone(folder: Path) -> None:
    absent = absent_modules(CORE | {Requirement(one).name for one in EXTRAS["commands"]})
    assert {"gin", "dvc", "hydra", "xformers", "torchvision", "scipy"} <= absent
    code = LIGHT.format(absent=absent) + "from scaling4d.__main__ import main; main()"
    checkpoint, video = "artifacts/pocket/pretrain/mini", "data/videos/phone/IMG_0000.mp4"
    for words, last in (
        (("features", checkpoint, video, "--out", "out"), "wrote out: 1 videos; 0 were there, 0 have problems"),
        (("export", checkpoint, "--torch", "mini.pt2"), "wrote mini.pt2"),
    ):
        done = output_of(sys.executable, "-c", code, *words, cwd=folder, PYTHONPATH=str(ROOT / "src"))
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == last, done.stderr


def test_the_range_of_av_holds_the_pinned_version_and_none_that_cannot_read() -> None:
    (av,) = (one for one in map(Requirement, PROJECT["dependencies"]) if one.name == "av")
    for lock in ("requirements.lock", "requirements-cuda.lock"):
        (pinned,) = re.findall(r"^av==(\S+)", (ROOT / lock).read_text(), re.M)
        assert pinned in av.specifier
    assert "17.1.0" not in av.specifier and "19.0.2" not in av.specifier


def test_the_core_is_four_packages_and_dev_is_every_extra() -> None:
    assert {Requirement(one).name for one in PROJECT["dependencies"]} == CORE
    (everything,) = (one for one in map(Requirement, EXTRAS["dev"]) if one.name == "scaling4d")
    assert everything.extras == EXTRAS.keys() - {"dev"}


def test_every_package_of_the_core_and_the_extras_is_pinned() -> None:
    needed = {
        plain(Requirement(one).name) for one in [*PROJECT["dependencies"], *(one for many in EXTRAS.values() for one in many)]
    }
    papers = {"torch", "gin-config", "dvc", "hydra-core", "torchdata", "av", "xformers", "torch-fidelity", "pytest", "papermill"}
    assert papers <= needed
    for lock in ("requirements.lock", "requirements-cuda.lock"):
        pinned = {plain(line.split("==")[0]) for line in (ROOT / lock).read_text().splitlines() if "==" in line}
        assert not needed - {"scaling4d"} - pinned


@pytest.mark.parametrize("in_project", [True, False])
def test_doctor_fails_without_a_package_of_the_core_and_names_those_of_extras(
    in_project: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name in ("absent", "submitit"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.chdir(ROOT if in_project else tmp_path)
    monkeypatch.setattr(metadata, "version", version)
    for requirements, missing in ((["torch", "submitit; extra == 'cluster'"], False), (["torch", "absent"], True)):
        monkeypatch.setattr(metadata, "requires", lambda _, requirements=requirements: requirements)
        done = typer.testing.CliRunner().invoke(cli.app, ["doctor"])
        assert "torch 1.0" in done.output
        if missing:
            install = "make install" if in_project else "pip install scaling4d"
            assert str(done.exception) == f"not installed: absent; run `{install}`"
        else:
            install = "pip install -c requirements.lock -e '.[cluster]'" if in_project else "pip install 'scaling4d[cluster]'"
            assert f"extra cluster lacks submitit; where you need it, run `{install}`" in done.output
            assert done.output.endswith("the core is complete\n")


def test_a_package_that_a_command_lacks_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)  # of extra pipeline; an import fails
    monkeypatch.delitem(sys.modules, "scaling4d.pipeline.environment", raising=False)
    monkeypatch.setattr(sys, "argv", ["scaling4d", "doctor"])
    with pytest.raises(SystemExit, match=r"error: no package packaging; the commands need: pip install 'scaling4d\[pipeline\]'"):
        main()


def test_ctrl_c_while_the_commands_are_imported_shows_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "scaling4d.cli", Interrupted())
    with pytest.raises(SystemExit, match="^130$"):
        main()


@pytest.mark.slow
@pytest.mark.integration
def test_the_wheel_alone_runs_the_readmes_lines_beside_core_packages(folder: Path, tmp_path: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "venv"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    done = output_of(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob(f"scaling4d-{PROJECT['version']}-*.whl")
    venv.create(place, with_pip=False)
    python = place / "bin/python"
    done = output_of(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (site,) = place.glob("lib/python*/site-packages")
    for distribution in distributions_of(CORE):
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    done = output_of(python, "-c", README + PRINT, cwd=folder)
    assert (done.stdout, done.stderr) == ("(1, 64, 24) 4.0\n", "")
    assert (site / "scaling4d/py.typed").is_file() and list((site / "scaling4d/report").glob("*.html"))
    done = output_of(place / "bin/scaling4d", "--help", cwd=folder)
    assert (done.returncode, done.stderr) == (1, NO_TYPER)
    done = output_of(
        python,
        "-c",
        "import scaling4d, importlib.metadata as m; print(scaling4d.__version__ == m.version('scaling4d'))",
        cwd=folder,
    )
    assert done.stdout == "True\n"
