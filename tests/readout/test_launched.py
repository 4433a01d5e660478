"""Readouts and reconstructions that torchrun or a Slurm job runs give the bytes of forked ranks."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from scaling4d import config
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.stage import baseline
from scaling4d.mae.models import METHODS, config_of
from scaling4d.readout.stage import readout
from scaling4d.reconstruct.stage import reconstruct

pytestmark = pytest.mark.integration

FROZEN, FILLED = Path("artifacts/smoke/readout/untrained_nano/actions/frozen"), Path("artifacts/smoke/reconstruct/nano")
SLURM = pytest.param({"where": "slurm", "cluster": "local"}, marks=pytest.mark.slow)


def scaling4d(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "scaling4d", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(Path(".resume").glob("snapshot-*"))
    return done.stdout


def moved_bytes(folder: Path, *names: str) -> list[bytes]:
    content = [(folder / name).read_bytes() for name in names]
    shutil.rmtree(folder)
    return content


def launched(changed: Callable, section: str, launch: dict) -> None:
    if launch["where"] == "slurm":
        pytest.importorskip("submitit")
    for key, value in launch.items():
        changed(f"{section}.Launch.{key}", value)


@pytest.mark.parametrize("launch", [{"where": "torchrun"}, SLURM])
def test_a_frozen_readout_has_the_bytes_of_forked_ranks_and_also_runs_in_shards(
    changed: Callable, actions: None, launch: dict
) -> None:
    baseline("untrained_nano", config.read())
    names = ("result.json", "head.safetensors")
    readout("untrained_nano", "actions", "frozen", changed("readout.Evaluation.ranks", 2))
    forked = moved_bytes(FROZEN, *names)
    launched(changed, "readout", launch)
    printed = scaling4d("readout", "untrained_nano", "actions", "frozen")
    assert printed.count("untrained_nano actions frozen: top1 ") == (launch["where"] == "torchrun")  # a job has its own log
    assert "readout.Launch" not in (FROZEN / "provenance.json").read_text()
    assert moved_bytes(FROZEN, *names) == forked
    changed("readout.Sharding.shards", 2)
    scaling4d("readout", "untrained_nano", "actions", "frozen")
    assert moved_bytes(FROZEN, *names)[0] and not FROZEN.exists()


@pytest.mark.parametrize("launch", [{"where": "torchrun"}, SLURM])
def test_a_reconstruction_has_the_bytes_of_forked_ranks(changed: Callable, launch: dict) -> None:
    settings = changed("reconstruct.Filling.ranks", 2)
    ((method, values),) = settings["points"]["nano"]["model"].items()
    model, folder = METHODS[method](config_of(METHODS[method], values)), Path("artifacts/smoke/pretrain/nano")
    model.initialise(0)
    folder.mkdir(parents=True, exist_ok=True)
    Checkpoint("nano", method, asdict(model.config), 0, 0, 0).write(folder, model.state_dict())
    reconstruct("nano", settings)
    forked = moved_bytes(FILLED, "result.json", "filled.png")
    launched(changed, "reconstruct", launch)
    assert scaling4d("reconstruct", "nano").count(f"wrote {FILLED}\n") == (launch["where"] == "torchrun")
    assert moved_bytes(FILLED, "result.json", "filled.png") == forked
    shutil.rmtree(folder)
