"""Training steps of the default profile's points: its batches and shapes; shares that follow from CPU seconds."""

import json
from pathlib import Path

import pytest
import torch

from scaling4d import config
from scaling4d_bench import ladder, measure
from scaling4d_bench.measure import Timings

pytestmark = pytest.mark.usefixtures("in_the_project")


@pytest.mark.integration
def test_the_default_profiles_points_are_measured_as_it_trains_them(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(ladder, "STEPS", 1)
    settings = config.compose([])
    content, shown = json.loads(ladder.bench(tmp_path, repeats=1).read_text()), capsys.readouterr().out
    rows = {row["name"]: row for row in content["results"]["rows"]}
    assert list(rows) == [name for name, point in settings["points"].items() if "SimpleMAE" in point["model"]]
    for name, row in rows.items():
        given = settings["points"][name]["model"]["SimpleMAE"]
        assert row["batch"] == settings["pretrain"]["Training"]["batch"] and row["share_of_peak"] > 0
        assert all(row[key] == given[key] for key in ("clip", "patch", "coarse_patch", "mask_ratio"))
    assert content["raw"]["turns"]["seconds"].keys() == {*rows, ladder.PRODUCT}
    assert all(f"│ {name} " in shown for name in rows)


def test_the_share_of_the_peak_is_that_of_cpu_seconds(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    facts = {
        "batch": 16,
        "flops_per_clip": 10**7,
        "parameters": 1000,
        "clip": [8, 64, 64],
        "patch": [1, 8, 8],
        "mask_ratio": 0.85,
    }
    monkeypatch.setattr(ladder, "point_step", lambda given, training: (lambda: None, facts))
    monkeypatch.setattr(ladder, "matrix_product", lambda *_, side: (lambda: None, 10**9))

    def made_up(runs, *, repeats) -> Timings:
        cpu_s = {name: [0.1 if name == ladder.PRODUCT else 0.2] * repeats for name in runs}
        return Timings({name: [2 * s for s in values] for name, values in cpu_s.items()}, cpu_s)

    monkeypatch.setattr(measure, "take_turns", made_up)
    results = json.loads(ladder.bench(tmp_path, repeats=3).read_text())["results"]
    assert results["product_flop_per_s"] == pytest.approx(1e11)  # 10 products of 1e9 in 0.1 s
    for row in results["rows"]:
        assert row["per_s"] == pytest.approx(400)  # 160 clips in 0.4 s
        assert row["share_of_peak"] == pytest.approx(0.08)  # 800 clips of 1e7 a CPU second
