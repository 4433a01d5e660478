"""Fine-tuning on several ranks: the same losses in shards, the same bytes by torchrun, and on to the bit where it was stopped."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from scaling4d import checkpoint, config, log
from scaling4d.pretrain.point import baseline
from scaling4d.readout.classifier import classify
from scaling4d.readout.train import readout
from scaling4d.records import AGAIN, Preempted, Result, UserError

ENCODER = "untrained_nano"
HOME = Path(f"artifacts/smoke/readout/{ENCODER}/actions")
STEPS = 5
SMALL = {
    "shared.Evaluation.ranks": 2,
    "finetune.actions.Recipe.steps": STEPS,
    "finetune.actions.Recipe.batch": 8,
    "finetune.actions.Recipe.encoder_learning_rate": 1e-3,
    "classifier.Classifier.steps": STEPS,
    "classifier.Classifier.batch": 8,
}
RUN = {
    "finetune": lambda settings: readout(ENCODER, "actions", "finetune", settings),
    "classifier": lambda settings: classify(ENCODER, settings),
}
SAVED = {"saving.Saving.every": 2}


@pytest.fixture
def small(project: Path, changed: Callable, actions: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Settings of a short fine-tuning, with changes; the frozen readout that it starts from is there, and no state of others."""
    monkeypatch.setattr(log.Steps, "line", lambda _, step, **told: note({"step": step} | told))
    baseline(ENCODER, config.read())

    def make(**more: object) -> dict:
        for key, value in (SMALL | more).items():
            settings = changed(f"readout.{key}", value)
        if not (HOME / "frozen").is_dir():
            readout(ENCODER, "actions", "frozen", settings)
        LINES.unlink(missing_ok=True)
        return settings

    yield make
    for left in (*(HOME / protocol for protocol in RUN), LINES, *Path(".resume").glob("*readout-*")):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


LINES = Path("lines.jsonl")


def note(line: dict) -> None:
    with LINES.open("a") as file:
        file.write(json.dumps(line) + "\n")


def noted() -> list[dict]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.is_file() else []


def written(protocol: str) -> dict[str, bytes]:
    """What must be equal to the byte."""
    return {name: (HOME / protocol / name).read_bytes() for name in ("result.json", "head.safetensors")}


def states() -> list[str]:
    return sorted(path.name for path in Path(".resume").glob("readout-*/step-*"))


def attempt(settings: dict, protocol: str, number: int | None = None, after: int = 0) -> int:
    """Exit code of a fine-tuning in a process group of its own, which gets a signal after so many steps."""
    before = len(noted())
    child = multiprocessing.get_context("fork").Process(target=_attempt, args=(settings, protocol))
    child.start()
    while number is not None and child.is_alive() and len(noted()) < before + after:
        time.sleep(0.002)
    if number is not None and child.is_alive():
        (os.killpg if number == signal.SIGKILL else os.kill)(child.pid, number)
    child.join()
    return child.exitcode


def _attempt(settings: dict, protocol: str) -> None:
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    try:
        RUN[protocol](settings)
    except Preempted:
        os._exit(AGAIN)
    os._exit(0)


def trained(settings: dict, protocol: str) -> tuple[list[float], Result, dict[str, torch.Tensor]]:
    LINES.unlink(missing_ok=True)
    result = RUN[protocol](settings)
    losses = [line["loss"] for line in noted()]
    assert len(losses) == STEPS and losses[0] != losses[-1]
    return losses, result, checkpoint.load_tensors(HOME / protocol / "head.safetensors")


WAYS = {
    "hsdp": {"shards": 2},
    "fsdp": {"shards": 4},
    "parts": {"shards": 2, "accumulate": 2, "recompute": "block"},
}


@pytest.mark.parametrize(
    ("protocol", "way"),
    [
        ("finetune", "hsdp"),
        pytest.param("finetune", "fsdp", marks=pytest.mark.slow),
        pytest.param("finetune", "parts", marks=pytest.mark.slow),
        pytest.param("classifier", "hsdp", marks=pytest.mark.slow),
    ],
)
def test_in_shards_it_learns_the_same_and_each_time_to_the_bit(small: Callable, protocol: str, way: str) -> None:
    four = {"shared.Evaluation.ranks": 4, "classifier.Classifier.learning_rate": 1e-5}
    wanted, plain, head = trained(small(**four), protocol)
    settings = small(**four, **{f"tuning.Sharding.{name}": value for name, value in WAYS[way].items()})
    found, sharded, tensors = trained(settings, protocol)
    first = written(protocol)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert sharded.value == pytest.approx(plain.value, abs=1e-5)
    assert tensors.keys() == head.keys()
    for name, tensor in head.items():
        assert tensors[name].dtype == torch.float32 and torch.allclose(tensors[name], tensor, rtol=1e-3, atol=1e-4), name
    trained(settings, protocol)
    assert written(protocol) == first


@pytest.mark.slow
def test_recomputed_blocks_drop_the_same_branches(small: Callable) -> None:
    wanted, _, head = trained(small(), "classifier")
    found, _, tensors = trained(small(**{"tuning.Sharding.recompute": "block"}), "classifier")
    assert found == wanted and all(torch.equal(tensors[name], head[name]) for name in head)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", RUN)
def test_bfloat16_is_near_and_its_readout_stays_float32(small: Callable, protocol: str) -> None:
    wanted, _, _ = trained(small(), protocol)
    found, _, tensors = trained(small(**{"tuning.Tuning.compute": "bfloat16"}), protocol)
    assert found == pytest.approx(wanted, rel=0.05) and found != wanted
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_torchrun_gives_the_same_bytes_as_forked_ranks_and_says_so_once(small: Callable) -> None:
    RUN["finetune"](small(**SAVED))
    forked = written("finetune")
    shutil.rmtree(HOME / "finetune")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "scaling4d", "readout", ENCODER, "actions", "finetune"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and done.stdout.startswith(f"{ENCODER} actions finetune: top1 ")
    assert written("finetune") == forked
    assert not list(Path(".resume").glob("*readout-*"))


@pytest.mark.parametrize(
    ("protocol", "shards"),
    [
        ("finetune", 1),
        pytest.param("finetune", 2, marks=pytest.mark.slow),
        pytest.param("classifier", 1, marks=pytest.mark.slow),
        pytest.param("classifier", 2, marks=pytest.mark.slow),
    ],
)
def test_killed_and_stopped_it_ends_with_the_same_bytes(small: Callable, protocol: str, shards: int) -> None:
    RUN[protocol](small(**{"tuning.Sharding.shards": shards}))
    undisturbed = written(protocol)
    shutil.rmtree(HOME / protocol)
    settings = small(**SAVED, **{"tuning.Sharding.shards": shards})
    assert attempt(settings, protocol, signal.SIGKILL, after=3) == -signal.SIGKILL
    assert attempt(settings, protocol, signal.SIGTERM, after=1) == AGAIN
    assert states()[-1] > "step-00000002" and not (HOME / protocol).exists()
    assert attempt(settings, protocol) == 0
    assert written(protocol) == undisturbed
    assert len(noted()) <= STEPS + 2  # of the killed one, at most the steps since a save were done again
    assert not list(Path(".resume").glob("*readout-*"))


def test_killed_while_it_is_measured_it_trains_no_step_again(small: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(**SAVED)
    with monkeypatch.context() as patch:
        patch.setattr("scaling4d.readout.train.judged", lambda *_, **__: signal.pause())
        assert attempt(settings, "finetune", signal.SIGTERM, after=STEPS) == AGAIN
    assert attempt(settings, "finetune") == 0
    assert [line["step"] for line in noted()] == [1, 2, 3, 4, 5]


def test_a_run_that_is_not_to_be_saved_writes_no_state_and_another_setting_starts_anew(small: Callable) -> None:
    settings = small(**{"saving.Saving.every": 0})
    assert attempt(settings, "finetune", signal.SIGTERM, after=2) == AGAIN
    assert not list(Path(".resume").glob("readout-*"))
    assert attempt(small(**SAVED), "finetune", signal.SIGTERM, after=2) == AGAIN
    settings = small(**SAVED, **{"finetune.actions.Recipe.weight_decay": 0.1})
    assert attempt(settings, "finetune") == 0
    assert [line["step"] for line in noted()] == [1, 2, 3, 4, 5]
    made = json.loads((HOME / "finetune/provenance.json").read_text())
    assert "readout.tuning" in made["settings"] and "aving" not in json.dumps(made["settings"])
    assert "Saving" not in (HOME / "finetune/operative_config.gin").read_text()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tuning.Sharding.shards", 3, "2 ranks do not divide into copies of 3 shards; set Sharding.shards to a divisor"),
        ("tuning.Sharding.accumulate", 3, "a batch of 8 clips does not divide among 2 ranks in 3 parts each; set batch to a"),
        ("tuning.Tuning.compute", "float8", "readout.tuning.Tuning.compute = 'float8'; needed float32 or bfloat16"),
        ("tuning.Tuning.device", "tpu", "readout.tuning.Tuning.device = 'tpu'; needed cpu or cuda"),
        ("saving.Saving.every", -1, "readout.saving.Saving.every is -1; needed 0 or more"),
        ("saving.Saving.keep", 0, "readout.saving.Saving.keep is 0; needed 1 or more"),
    ],
)
@pytest.mark.parametrize("protocol", RUN)
def test_settings_that_cannot_be_are_one_line(small: Callable, protocol: str, key: str, value: object, said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        RUN[protocol](small(**{key: value}))


def test_a_protocol_and_its_encoders_rate_must_agree(small: Callable) -> None:
    key = "finetune.actions.Recipe.encoder_learning_rate"
    with pytest.raises(UserError, match=rf"^readout.{key} is 0.0; needed more than 0, or the protocol frozen$"):
        RUN["finetune"](small(**{key: 0.0}))
    key = "frozen.actions.Recipe.encoder_learning_rate"
    with pytest.raises(UserError, match=rf"^readout.{key} is 0.1; needed 0, or the protocol finetune$"):
        readout(ENCODER, "actions", "frozen", small(**{key: 0.1}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(small: Callable) -> None:
    with pytest.raises(
        UserError, match=r"^rank \d needs a GPU of its own, and this machine has 0; .+readout.tuning.Tuning.device"
    ):
        RUN["finetune"](small(**{"tuning.Tuning.device": "cuda"}))
