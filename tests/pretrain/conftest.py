"""Plans of the project's points, and short runs of the small project's points."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch._dynamo  # noqa: F401  AdamW imports it in its first step: here once, and not in every rank of every test

from scaling4d import config

compose = config.compose


@cache
def _once(*overrides: str) -> dict:
    return compose(list(overrides))


@pytest.fixture
def in_the_project(in_the_project: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every profile is composed once for all these tests."""
    monkeypatch.setattr(config, "compose", lambda overrides: _once(*overrides))


@pytest.fixture
def short(changed: Callable) -> Iterator[Callable[..., dict]]:
    """Settings of a run of two ranks, with a line a step and a state every other step; no state of earlier runs."""

    def make(steps: int, **changes: object) -> dict:
        for folder in (".resume", ".runs"):
            shutil.rmtree(folder, ignore_errors=True)
        values = {"Training.ranks": 2, "Training.batch": 8, "Training.log_every": 1, "Runtime.save_every": 2}
        for key, value in (values | {"Training.steps": steps} | changes).items():
            settings = changed(key if key.startswith("points.") else f"pretrain.{key}", value)
        return settings

    yield make
    shutil.rmtree(".resume", ignore_errors=True)
