"""Fine-tuning on several ranks: the same losses in shards, the same bytes by torchrun, and after an interruption."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from interrupting import ask_to_stop, exit_code, kill_all

from scaling4d import checkpoint, config, provenance
from scaling4d.encoders.stage import baseline
from scaling4d.readout import stage
from scaling4d.readout.stage import readout
from scaling4d.records import AGAIN, Result, UserError
from scaling4d.training.fit import StepResult
from scaling4d.training.observe import TrainingLog

pytestmark = pytest.mark.integration

ENCODER = "untrained_nano"
HOME = Path(f"artifacts/smoke/readout/{ENCODER}/actions")
STEPS, PROTOCOLS = 5, ("finetune", "classifier")
SMALL = {
    "Evaluation.ranks": 2,
    "finetune.actions.Finetune.steps": STEPS,
    "finetune.actions.Finetune.batch": 8,
    "finetune.actions.Finetune.encoder_learning_rate": 1e-3,
    "classifier.Classifier.steps": STEPS,
    "classifier.Classifier.batch": 8,
}
SAVED = {"saving.Saving.save_every": 2}
LOSSES = Path("losses.jsonl")


class NotedLog(TrainingLog):
    """Notes every step of rank 0 in a file, and then interrupts the process where the class says."""

    interrupt: Callable[[], None] | None = None
    at = 0

    def after_step(self, result: StepResult) -> None:
        super().after_step(result)
        if self.rank == 0:
            with LOSSES.open("a") as file:
                file.write(json.dumps([result.step, result.loss.item()]) + "\n")
            if self.interrupt and result.step == self.at:
                type(self).interrupt()


def noted() -> list[tuple[int, float]]:
    """Steps and losses of all attempts."""
    return [tuple(json.loads(line)) for line in LOSSES.read_text().splitlines()] if LOSSES.is_file() else []


@pytest.fixture
def small(changed: Callable, actions: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Settings of a short fine-tuning, with changes. Its frozen readout is there, and no state of other runs."""
    monkeypatch.setattr(stage, "TrainingLog", NotedLog)
    baseline(ENCODER, config.read())

    def make(**changes: object) -> dict:
        for key, value in (SMALL | changes).items():
            settings = changed(f"readout.{key}", value)
        if not (HOME / "frozen").is_dir():
            readout(ENCODER, "actions", "frozen", settings)
        LOSSES.unlink(missing_ok=True)
        return settings

    yield make
    LOSSES.unlink(missing_ok=True)
    for folder in (*(HOME / protocol for protocol in PROTOCOLS), *states_left()):
        shutil.rmtree(folder, ignore_errors=True)


def finetune(settings: dict, protocol: str = "finetune") -> Result:
    return readout(ENCODER, "actions", protocol, settings)


def written(protocol: str = "finetune") -> dict[str, bytes]:
    """What must be equal to the byte."""
    return {name: (HOME / protocol / name).read_bytes() for name in ("result.json", "head.safetensors")}


def states_left() -> list[Path]:
    return list(Path(".resume").glob("*readout-*"))


def attempt(settings: dict, protocol: str = "finetune", *, at: int = 0, interrupt: Callable[[], None] | None = None) -> int:
    """Exit code of a fine-tuning in a process group of its own; rank 0 calls `interrupt` after step `at`."""

    def work() -> None:
        NotedLog.interrupt, NotedLog.at = interrupt, at
        finetune(settings, protocol)

    return exit_code(work)


def trained(settings: dict, protocol: str) -> tuple[list[float], Result, dict[str, torch.Tensor]]:
    LOSSES.unlink(missing_ok=True)
    result = finetune(settings, protocol)
    losses = [loss for _, loss in noted()]
    assert len(losses) == STEPS and losses[0] != losses[-1]
    return losses, result, checkpoint.load_tensors(HOME / protocol / "head.safetensors")


@pytest.mark.parametrize(("protocol", "sharding"), [
    ("finetune", {"shards": 2}),
    pytest.param("finetune", {"shards": 4}, marks=pytest.mark.slow),
    pytest.param("finetune", {"shards": 2, "accumulate": 2, "recompute": "block"}, marks=pytest.mark.slow),
    pytest.param("classifier", {"shards": 2}, marks=pytest.mark.slow),
])  # fmt: skip
def test_in_shards_it_learns_the_same_and_each_time_to_the_bit(small: Callable, protocol: str, sharding: dict) -> None:
    four = {"Evaluation.ranks": 4, "classifier.Classifier.learning_rate": 1e-5}
    losses, result, head = trained(small(**four), protocol)
    settings = small(**four, **{f"Sharding.{name}": value for name, value in sharding.items()})
    sharded_losses, sharded_result, sharded_head = trained(settings, protocol)
    first = written(protocol)
    assert sharded_losses == pytest.approx(losses, rel=1e-5)
    assert sharded_result.value == pytest.approx(result.value, rel=1e-4)
    assert sharded_head.keys() == head.keys()
    for name, tensor in head.items():
        sharded = sharded_head[name]
        assert sharded.dtype == torch.float32  # biases of keys change no output: AdamW moves them by rounding errors alone
        assert torch.allclose(sharded, tensor, rtol=1e-3, atol=1e-4), name
    trained(settings, protocol)
    assert written(protocol) == first


@pytest.mark.slow
def test_recomputed_blocks_drop_the_same_branches(small: Callable) -> None:
    losses, _, head = trained(small(), "classifier")
    again, _, other_head = trained(small(**{"Sharding.recompute": "block"}), "classifier")
    assert again == losses and all(torch.equal(other_head[name], head[name]) for name in head)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "rate", "rel"),  # of SMALL's rates, the encoder's would overshoot and enlarge rounding, the other move nothing
    [
        ("finetune", {"finetune.actions.Finetune.encoder_learning_rate": 1e-4}, 0.02),
        ("classifier", {"classifier.Classifier.learning_rate": 1e-2}, 0.005),
    ],
)
def test_bfloat16_is_near_and_its_readout_stays_float32(small: Callable, protocol: str, rate: dict, rel: float) -> None:
    """An encoder that does not learn gives losses farther off: by 4 percent in finetune, by 1.5 in the classifier."""
    losses, _, _ = trained(small(**rate), protocol)
    rounded, _, tensors = trained(small(**rate, **{"Compute.compute": "bfloat16"}), protocol)
    assert rounded == pytest.approx(losses, rel=rel) and rounded != losses
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.slow
def test_torchrun_gives_the_same_bytes_as_forked_ranks_and_prints_the_result_once(small: Callable) -> None:
    finetune(small(**SAVED))
    forked = written()
    shutil.rmtree(HOME / "finetune")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "scaling4d", "readout", ENCODER, "actions", "finetune"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and done.stdout.startswith(f"{ENCODER} actions finetune: top1 ")
    assert written() == forked and not states_left()


@pytest.mark.parametrize(("protocol", "shards"), [
    ("finetune", 1),
    *(pytest.param(*some, marks=pytest.mark.slow) for some in (("finetune", 2), ("classifier", 1), ("classifier", 2))),
])  # fmt: skip
def test_killed_and_stopped_it_ends_with_the_same_bytes(small: Callable, protocol: str, shards: int) -> None:
    finetune(small(**{"Sharding.shards": shards}), protocol)
    undisturbed = written(protocol)
    shutil.rmtree(HOME / protocol)
    settings = small(**SAVED, **{"Sharding.shards": shards})
    assert attempt(settings, protocol, at=3, interrupt=kill_all) == -signal.SIGKILL
    assert attempt(settings, protocol, at=3, interrupt=ask_to_stop) == AGAIN
    assert not (HOME / protocol).exists()
    assert attempt(settings, protocol) == 0
    assert written(protocol) == undisturbed
    assert [step for step, _ in noted()] == [1, 2, 3, 3, 4, 5]
    assert not states_left()


def test_stopped_while_it_is_evaluated_it_trains_no_step_again(small: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(**SAVED)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "evaluate", lambda *_, **__: ask_to_stop())
        assert attempt(settings) == AGAIN
    assert attempt(settings) == 0
    assert [step for step, _ in noted()] == [1, 2, 3, 4, 5]


def test_without_saving_no_state_is_written_and_another_setting_starts_anew(small: Callable) -> None:
    settings = small(**{"saving.Saving.save_every": 0})
    assert attempt(settings, at=2, interrupt=ask_to_stop) == AGAIN and not states_left()
    assert attempt(small(**SAVED), at=2, interrupt=ask_to_stop) == AGAIN and states_left()
    settings = small(**SAVED, **{"finetune.actions.Finetune.weight_decay": 0.1})
    assert attempt(settings) == 0
    assert [step for step, _ in noted()] == [1, 2, 3, 4, 5]
    declared = json.loads((HOME / "finetune/provenance.json").read_text())["settings"]
    assert {"readout.Compute", "readout.Sharding"} <= declared.keys() and "aving" not in json.dumps(declared)
    assert "Saving" not in (HOME / "finetune/operative_config.gin").read_text()


RATE = "finetune.actions.Finetune.encoder_learning_rate"
CLASSIFIER, ACTIONS = "classifier.Classifier.batch", "tasks.actions.Actions"


@pytest.mark.parametrize(("protocol", "key", "value", "message"), [
    ("finetune", "Sharding.shards", 3, "readout.finetune.actions: 2 ranks do not divide into copies of 3"),
    ("finetune", "saving.Saving.keep_latest_k", 0, "readout.saving.Saving: keep_latest_k is 0; needed 1 or more"),
    ("finetune", "Evaluation.ranks", 0, "readout.Evaluation: ranks is 0; needed 1 or more"),
    ("finetune", RATE, 0.0, "readout.finetune.actions.Finetune: encoder_learning_rate is 0.0; needed more than 0, or the"),
    ("classifier", CLASSIFIER, 5, "readout.classifier: batch 5 does not divide over 2 ranks; set batch to a"),
    ("classifier", CLASSIFIER, 2, "readout.classifier: batch 2 leaves one clip to each of 2 ranks, and mixup"),
    ("classifier", "classifier.Classifier.repeats", 5, "readout.classifier: batch 8 does not divide among 2 ranks, each"),
    ("classifier", "classifier.Classifier.erasing", 2.0, "readout.classifier.Classifier: erasing is 2.0; needed 0 to 1"),
    ("classifier", f"{ACTIONS}.classes", 3, "data/benchmarks/ssv2 has 8 classes, and Actions.classes is 3; set it to 8"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused_and_nothing_is_left(
    changed: Callable, actions: None, protocol: str, key: str, value: object, message: str
) -> None:
    baseline(ENCODER, config.read())
    for name, small_value in SMALL.items():
        changed(f"readout.{name}", small_value)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        finetune(changed(f"readout.{key}", value), protocol)
    assert not list(provenance.WORK_FOLDER.glob("*.partial-*"))
