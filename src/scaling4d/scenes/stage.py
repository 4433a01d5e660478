"""The command `render`: settings -> a data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling4d import config
from scaling4d.scenes import dataset


def render(out: Path, settings: Mapping[str, Any]) -> Path:
    """Draw the data set of section `render` into the new folder `out`."""
    config.bind(config.section(settings, "render"))
    return dataset.render(out, seed=config.section(settings, "seed"), settings=config.build(dataset.Render))
