"""AdamW and FSDP import torch._dynamo in their first step: here once, and not in every rank of every test."""

from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States and logs of a run are written below the current folder."""
    monkeypatch.chdir(tmp_path)
