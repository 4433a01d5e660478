"""Counts of the scaling points, without a weight in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scaling4d import config
from scaling4d.mae.encoder import Encoder
from scaling4d.pretrain.plan import plan
from scaling4d.records import UserError

ROOT = Path(__file__).parents[2]
# width, depth, mlp, heads of the released code's variants, and the backbone's parameters, counted by running its
# initialisation without values (j: inferred from the published count)
POINTS = {
    "S": (384, 12, 1536, 6, 22_485_888),
    "B": (768, 12, 3072, 12, 87_439_104),
    "L": (1024, 24, 4096, 16, 305_488_896),
    "H": (1280, 32, 5120, 16, 633_652_480),
    "G": (1664, 48, 8192, 16, 1_846_529_664),
    "e": (1792, 56, 15360, 16, 3_809_464_064),
    "j": (4096, 64, 32768, 32, 21_492_011_008),
}


@pytest.mark.parametrize("point", list(POINTS))
def test_backbones_have_the_published_number_of_parameters(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    *shape, backbone = POINTS[point]
    settings = config.compose(["profile=paper"])["points"][point]["SimpleMAE"]
    assert [settings[key] for key in ("width", "depth", "mlp", "heads")] == shape
    assert (settings["clip"], settings["patch"]) == ([16, 224, 224], [2, 16, 16])
    parameters = plan(point)["parameters"]
    assert parameters["backbone"] == backbone
    assert parameters["total"] == sum(value for part, value in parameters.items() if part != "total")
    assert parameters["coarse_tokens"] == 784 * shape[0]  # a grid of 4 x 14 x 14
    assert parameters["decoder"] == (shape[0] + 1) * 4 * 16 * 16 * 3


@pytest.mark.parametrize(
    ("width", "depth", "mlp", "heads", "parameters"),
    [(32, 1, 128, 2, 112_064), (192, 12, 768, 3, 5_934_528), (512, 12, 2048, 8, 39_418_368), (1408, 40, 6144, 16, 1_014_378_880)],
)
def test_the_other_variants_of_the_released_code_agree_too(width: int, depth: int, mlp: int, heads: int, parameters: int) -> None:
    with torch.device("meta"):
        encoder = Encoder(
            width=width,
            depth=depth,
            heads=heads,
            mlp=mlp,
            clip=(16, 224, 224),
            patch=(2, 16, 16),
            gelu="tanh",
            pixel_mean=0.0,
            pixel_scale=1.0,
        )
    assert sum(p.numel() for p in encoder.parameters()) == parameters


def test_the_largest_point_is_counted_in_little_memory() -> None:
    code = (
        "import json\nfrom scaling4d.pretrain.plan import plan\ntotal = plan('j')['parameters']['total']\n"
        "peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(json.dumps([total, peak]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    total, peak_kib = json.loads(run.stdout)
    assert total > 21e9
    assert peak_kib < 1.5 * 2**20  # the libraries; the weights would take 80 GiB


def test_an_unknown_point_is_refused_with_the_names_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"^no profile has a point 'huge'; points: B, G, H, L, S, e, j, mae_st_tiny, "):
        plan("huge")
