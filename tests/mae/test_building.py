"""Building a model holds its weights once."""

import pytest
import torch
from peak_memory import grown, in_a_new_process, needs_proc

from scaling4d import config
from scaling4d.mae.encoder import Method
from scaling4d.mae.models import METHODS, config_of

pytestmark = pytest.mark.integration


def build(section: dict) -> Method:
    ((name, settings),) = section["model"].items()
    with torch.device("meta"):
        model = METHODS[name](config_of(METHODS[name], settings))
    model.to_empty(device="cpu").initialise(0)
    return model


def bytes_of(point: str) -> tuple[int, int]:
    """While a point is built, and of its weights."""
    built, points = [], config.compose(["profile=paper"])["points"]
    build(config.compose(["profile=pocket"])["points"]["nano"])  # all libraries are imported before the measurement
    peak = grown(lambda: built.append(build(points[point])))
    return peak, sum(p.nbytes for p in built[0].parameters())


@needs_proc
@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize("point", ["S", *(pytest.param(name, marks=pytest.mark.slow) for name in ("B", "L", "e"))])
def test_building_a_point_holds_one_copy_of_its_weights(point: str) -> None:
    peak, weights = in_a_new_process(bytes_of, point)
    print(f"{point}: {peak / 2**20:.0f} MiB held for {weights / 2**20:.0f} MiB of weights")
    # No second copy; a weight as it is drawn, the positions in double precision, and what malloc keeps of both.
    assert peak < 1.2 * weights + 40 * 2**20
