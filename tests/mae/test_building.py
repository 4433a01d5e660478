"""Building a model holds its weights once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
from scaling4d import config
from scaling4d.pretrain.point import sections, start
settings = config.compose(["profile=paper"])
config.bind(sections(sys.argv[1], settings))

def held(what):  # VmRSS: now, VmHWM: at most so far
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

before = held("VmRSS")
model = start(sys.argv[1], settings, 0)
print(json.dumps([held("VmHWM") - before, sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters())]))
"""


@pytest.mark.parametrize(
    "point", ["S", "B", pytest.param("L", marks=pytest.mark.slow), pytest.param("e", marks=pytest.mark.slow)]
)
def test_building_a_point_holds_one_copy_of_its_weights(point: str) -> None:
    run = subprocess.run([sys.executable, "-c", CODE, point], capture_output=True, text=True, cwd=ROOT, check=True)
    peak, weights, largest = json.loads(run.stdout)
    print(f"{point}: {peak / 2**20:.0f} MiB held for {weights / 2**20:.0f} MiB of weights")
    assert peak < weights + largest + 90 * 2**20  # no second copy: at most one tensor more, and a little for the code
