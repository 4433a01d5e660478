"""A benchmark so small that a readout is trained on it in a moment."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from scaling4d.benchmarks import ssv2
from scaling4d.records import Sample


@pytest.fixture
def actions(project: Path) -> Iterator[None]:
    """Something-Something in small: eight videos to train on and eight to measure, brighter or darker as time goes by."""
    templates = [f"Doing {letter} to [something]" for letter in "abcdefgh"]
    ramp = np.linspace(0, 255, 20).astype(np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    for split in ("train", "val"):
        samples = [Sample(f"{split}{n}", f"{split}{n}", ramp[:: 1 - n % 2 * 2], {"action": np.int64(n % 8)}) for n in range(8)]
        ssv2.write(project / "data/benchmarks/ssv2", split, samples, templates=templates, rate_hz=8.0, crf=30, gop=8)
    yield
    shutil.rmtree(project / "data/benchmarks")
