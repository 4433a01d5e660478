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

def held(what):  # VmRSS: now, VmHWM: at most since clear_refs was told 5
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

small = config.compose(["profile=pocket"])
config.bind(sections("nano", small))
start("nano", small, 0)  # so that libraries are read and imported before anything is measured
config.bind(sections(sys.argv[1], settings))
open("/proc/self/clear_refs", "w").write("5")
before = held("VmRSS")
model = start(sys.argv[1], settings, 0)
print(json.dumps([held("VmHWM") - before, sum(p.nbytes for p in model.parameters())]))
"""


@pytest.mark.parametrize(
    "point", ["S", "B", pytest.param("L", marks=pytest.mark.slow), pytest.param("e", marks=pytest.mark.slow)]
)
def test_building_a_point_holds_one_copy_of_its_weights(point: str) -> None:
    run = subprocess.run([sys.executable, "-c", CODE, point], capture_output=True, text=True, cwd=ROOT, check=True)
    peak, weights = json.loads(run.stdout)
    print(f"{point}: {peak / 2**20:.0f} MiB held for {weights / 2**20:.0f} MiB of weights")
    # No second copy; besides a weight as it is drawn, the table of positions in double precision, what malloc keeps of both.
    assert peak < 1.2 * weights + 40 * 2**20
