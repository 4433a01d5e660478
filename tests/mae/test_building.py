"""Building a model holds its weights once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
import torch
from scaling4d import config
from scaling4d.mae.models import METHODS, config_of

def build(section):
    ((name, settings),) = section["model"].items()
    with torch.device("meta"):
        model = METHODS[name](config_of(METHODS[name], settings))
    model.to_empty(device="cpu").initialise(0)
    return model

def memory(field):  # VmRSS: now; VmHWM: the most since 5 was written to clear_refs
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

points = config.compose(["profile=paper"])["points"]
build(config.compose(["profile=pocket"])["points"]["nano"])  # all libraries are imported before the measurement
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
model = build(points[sys.argv[1]])
print(json.dumps([memory("VmHWM") - before, sum(p.nbytes for p in model.parameters())]))
"""


@pytest.mark.parametrize("point", ["S", *(pytest.param(name, marks=pytest.mark.slow) for name in ("B", "L", "e"))])
def test_building_a_point_holds_one_copy_of_its_weights(point: str) -> None:
    run = subprocess.run([sys.executable, "-c", CODE, point], capture_output=True, text=True, cwd=ROOT, check=True)
    peak, weights = json.loads(run.stdout)
    print(f"{point}: {peak / 2**20:.0f} MiB held for {weights / 2**20:.0f} MiB of weights")
    # No second copy; a weight as it is drawn, the positions in double precision, and what malloc keeps of both.
    assert peak < 1.2 * weights + 40 * 2**20
