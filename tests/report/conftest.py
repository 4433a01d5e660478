"""Fixtures that write a synthetic run into an empty folder, the current one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import POCKET, write_run

from scaling4d import config


@pytest.fixture
def new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Write a run into an empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(config.__file__).parents[1]))
    return write_run


@pytest.fixture
def pocket(new_run: Callable[..., dict]) -> dict:
    """The run of POCKET."""
    return new_run(**POCKET)
