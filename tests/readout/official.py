"""Where outputs of the official code lie: tests/fixtures, and the folders that SCALING4D_FIXTURES names, `:` between them."""

import os
from pathlib import Path

HERE = Path(__file__).parents[1] / "fixtures"
ROOTS = [HERE, *(Path(name) for name in os.environ.get("SCALING4D_FIXTURES", "").split(os.pathsep) if name)]


def named(path: Path) -> str:
    """A test's name for it."""
    return path.name if path.parent == HERE else f"{path.parent.name}/{path.name}"
