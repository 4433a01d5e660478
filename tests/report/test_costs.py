"""The figure of how time and memory grow, from a small json of the bench's form."""

import json
import re
from pathlib import Path

import pytest

from scaling4d.report.costs import costs


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    row = lambda value, seconds: {  # noqa: E731
        "value": value, "seconds": seconds, "low": 0.9 * seconds, "high": 1.2 * seconds,
        "flops": 10**9 * value, "bytes": 2**30 * value, "bytes_by_formula": 2**30,
    }  # fmt: skip
    exponents = {"seconds": 1.25, "flops": 1.0, "bytes": 1.0, "bytes_by_formula": 0.0}
    axes = {name: {"rows": [row(1, 0.5), row(2, 1.2), row(4, 2.8)], "exponents": exponents} for name in ("depth", "batch")}
    settings = {"point": "S", "batch": 2, "device": "cpu", "threads": 4, "repeats": 5}
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"found": axes, "settings": settings}))
    return path


def test_costs_are_drawn_a_column_for_each_thing_that_grows_and_the_same_twice(measured: Path) -> None:
    drawn = costs(measured)
    assert drawn == costs(measured)
    panels = re.findall(r'<g id="axes_\d+">', drawn)
    assert len(panels) == 2 * 2
    told = " ".join(re.findall(r"<!-- (.*?) -->", drawn))  # the text that each group of outlines stands for
    for words in ("exponent 1.25 (dashed 1.00)", "exponent 1.00 (dashed 0.00)", "depth", "batch", "GiB at the peak", "point S"):
        assert words in told, words
