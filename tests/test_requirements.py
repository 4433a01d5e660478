"""What the project pins installs where README says, and pytest's limit of time holds."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_pinned_installs_on_the_oldest_python_that_the_readme_names() -> None:
    pinned = {plain(line.split("==")[0]) for line in LOCK.read_text().splitlines() if "==" in line}
    needs = {plain(installed.name): installed.metadata.get("Requires-Python") for installed in distributions()}
    assert pinned & needs.keys()
    assert not {one: needs[one] for one in pinned & needs.keys() if needs[one] and "3.11.0" not in SpecifierSet(needs[one])}


@pytest.mark.integration
def test_a_test_that_never_ends_fails_at_its_limit_with_the_stacks_of_all_threads(tmp_path: Path) -> None:
    code = "import threading, time\n\n\ndef wait_for_ever():\n    time.sleep(600)\n\n\ndef test_x():\n"
    code += "    threading.Thread(target=wait_for_ever, daemon=True).start()\n    time.sleep(600)\n"
    (tmp_path / "test_endless.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path)]
    ended = subprocess.run([*command, "-o", "timeout=1"], capture_output=True, text=True, timeout=60, check=False)
    shown = ended.stdout + ended.stderr
    assert ended.returncode == 1 and "Timeout" in shown and "Stack of Thread-1 (wait_for_ever)" in shown
    limit = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["timeout"]
    assert limit == 300
