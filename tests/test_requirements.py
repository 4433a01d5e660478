"""What the project pins installs where README says."""

from importlib.metadata import distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"


def test_what_is_pinned_installs_on_the_oldest_python_that_the_readme_names() -> None:
    pinned = {canonicalize_name(line.split("==")[0]) for line in LOCK.read_text().splitlines() if "==" in line}
    needs = {canonicalize_name(installed.name): installed.metadata.get("Requires-Python") for installed in distributions()}
    assert pinned & needs.keys()
    assert not {one: needs[one] for one in pinned & needs.keys() if needs[one] and "3.11.0" not in SpecifierSet(needs[one])}
