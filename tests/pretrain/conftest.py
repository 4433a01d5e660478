"""The project itself as the current folder, for plans of its points."""

from functools import cache
from pathlib import Path

import pytest

from scaling4d import config

compose = config.compose


@cache
def _once(*overrides: str) -> dict:
    return compose(list(overrides))


@pytest.fixture
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every profile is composed once for all these tests."""
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(config, "compose", lambda overrides: _once(*overrides))
