"""Frozen readouts in memory and from a store."""

import json
import shutil
from pathlib import Path

import pytest

from scaling4d import cli, config
from scaling4d.records import UserError
from scaling4d_bench import readout

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def test_times_are_divided_by_one_pass_and_the_readouts_and_values_are_those_less_the_first() -> None:
    first = {"a": {"seconds": 9.0, "inputs_s": 4.0, "readout_s": 3.0, "value": 0.5}}
    first["b"] = {"seconds": 5.0, "inputs_s": 2.0, "readout_s": 1.0, "value": 2.0}
    stored = {"a": {"seconds": 4.0, "inputs_s": 0.5, "readout_s": 3.0, "value": 0.25}}
    stored["b"] = {"seconds": 3.0, "inputs_s": 0.5, "readout_s": 1.0, "value": 2.0}
    results = readout.summary({"in memory": first, "stored before": stored})
    assert results["pass_and_readouts_s"] == 10.0
    assert [row["over_pass_and_readouts"] for row in results["rows"]] == [1.4, 0.7]
    assert results["rows"][1]["changed"] == {"a": -0.25, "b": 0.0}


def test_an_unknown_encoder_is_refused_in_one_line(project: Path) -> None:
    with pytest.raises(UserError, match="no artifacts/smoke/pretrain/mini; needed an encoder of this profile: run `dvc repro`"):
        readout.bench(project / "out", encoder="mini")


@pytest.mark.slow
def test_stored_features_change_nothing(project: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from scaling4d.encoders.stage import baseline

    shutil.copytree(project, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    Path("src").symlink_to(ROOT / "src")
    Path("data/benchmarks").symlink_to(ROOT / "experiments/pocket/benchmarks")
    cli.app(["code"], standalone_mode=False)
    name = f"untrained_{next(iter(config.read()['points']))}"
    baseline(name, config.read())
    content = json.loads(readout.bench(tmp_path, encoder=name, tasks=["boxes"]).read_text())
    rows = {row["name"]: row for row in content["results"]["rows"]}
    assert rows["stored"]["changed"] == rows["stored before"]["changed"] == {"boxes": 0.0}
    assert content["settings"]["stored_bytes"] > 0 and "all frozen readouts" in capsys.readouterr().out
