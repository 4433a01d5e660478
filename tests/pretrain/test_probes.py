"""Validation during training: the effective rank of features, linear probes, and the best weights."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupting import kill_all
from nano import NANO, attempt, steps_shown, written
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scaling4d import artifacts, config, seeds
from scaling4d.benchmarks import scannet
from scaling4d.benchmarks.stage import hash_benchmarks
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.load import load_model
from scaling4d.pretrain import validate
from scaling4d.pretrain.probes import TASKS
from scaling4d.pretrain.settings import PROBES, PretrainConfig, bind_pretrain
from scaling4d.pretrain.stage import pretrain, pretrain_fingerprint, provenance_of
from scaling4d.pretrain.trained_features import RankMe
from scaling4d.pretrain.validate import Validation, measure
from scaling4d.readout.stage import readout
from scaling4d.records import Sample, UserError
from scaling4d.training.distributed import run
from scaling4d.training.fit import StepResult
from scaling4d.training.parallelize import is_sharded, parallelize, save_weights

EVERY = {"Training.validate_every": 1, "Training.keep_best": ""}
PROBING = EVERY | {"Training.probe_tasks": ["actions", "depth"], "Training.probe_items": [0, 0]}
METRICS = {"actions": "top1_linear", "depth": "abs_rel_linear"}


def test_settings_know_the_metric_of_every_probe() -> None:
    assert {task: (kind.metric.name, kind.metric.higher_is_better) for task, kind in TASKS.items()} == PROBES


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def effective_rank(features: torch.Tensor, *, ranks: int = 1) -> float:
    """Of clips with one token each."""

    def measure(*, rank: int, ranks: int) -> float:
        sums = RankMe(features.shape[1])
        for clip in features[rank::ranks]:
            sums.add(clip.reshape(1, 1, 1, -1))
        return sums.effective_rank()

    return run(measure, ranks=ranks)


def measures(*, rank: int, ranks: int, pretraining: PretrainConfig, shards: int) -> dict[str, float]:
    """Measures of a trained point, whole on each rank or in shards."""
    model = load_model(pretraining.folder)
    parallelize(model, replace(pretraining.sharding, shards=shards), pretraining.training, ranks=ranks)
    assert is_sharded(model) == (shards > 1)
    return measure(model, pretraining)


@pytest.fixture
def depth(project: Path) -> None:
    """ScanNet in small: eight scenes to train on, eight to measure, nearer or farther as time goes by."""
    ramp = np.linspace(1, 3, 20, dtype=np.float32)[:, None, None] * np.ones((1, 64, 64), np.float32)
    still = {"camera_to_world": np.tile(np.eye(4), (20, 1, 1)), "intrinsics": np.diag([1.0, 1.0, 1.0])}
    for split, first in (("train", 0), ("val", 8)):
        samples = []
        for number in range(first, first + 8):
            metres = ramp[:: 1 - number % 2 * 2] + 0.1 * seeds.numpy_rng(0, "depth", number).random((20, 64, 64), np.float32)
            pixels, name = np.repeat(metres[..., None] * 70, 3, -1).astype(np.uint8), f"scene{number:04d}_00"
            samples.append(Sample(name, name, pixels, {"depth_m": metres} | still))
        scannet.write(project / "data/benchmarks/scannet", split, samples, rate_hz=8.0, jpeg_quality=90)


@pytest.fixture
def probing(short: Callable, actions: None, depth: None) -> Callable[..., dict]:
    """Settings of a run with probes, after stage `benchmarks`."""

    def make(steps: int, **changes: object) -> dict:
        settings = short(steps, **PROBING | changes)
        hash_benchmarks(settings)
        return settings

    return make


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_features_with_equal_singular_values_have_their_number_as_effective_rank(rank: int) -> None:
    rows, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))
    columns, _ = torch.linalg.qr(torch.randn(40, rank, generator=torch.Generator().manual_seed(1)))
    assert effective_rank(3 * columns @ rows[:rank]) == pytest.approx(rank, rel=1e-4)


def test_the_effective_rank_is_of_the_clips_of_all_ranks() -> None:
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum()
    expected = pytest.approx(float((-shares * shares.log()).sum().exp()), rel=1e-5)
    assert effective_rank(features) == expected and effective_rank(features, ranks=3) == expected


@pytest.mark.integration
def test_every_validation_measures_the_effective_rank_and_the_last_one_is_the_summarys(short: Callable) -> None:
    folder = pretrain("nano", short(3, **EVERY))
    lines, summary = lines_of(folder), summary_of(folder)
    assert [set(line) for line in lines] == [{"step", "val_loss", "rankme"}] * 2
    assert all(1 < value["rankme"] <= 7 for value in (*lines, summary))  # validation clips
    assert "best_step" not in summary and Checkpoint.read(folder).step == 3
    quiet = summary_of(pretrain("nano", short(3, **EVERY | {"Training.validate_every": 0})))
    assert "rankme" not in quiet and quiet == {name: value for name, value in summary.items() if name != "rankme"}


@pytest.mark.integration
def test_probes_are_the_linear_probes_of_frozen_readouts_of_the_same_clips_and_weights(
    probing: Callable, changed: Callable
) -> None:
    folder = pretrain("nano", probing(3, **{"Runtime.tensorboard": True}))
    lines, summary = lines_of(folder), summary_of(folder)
    assert len(lines) == 2 and set(METRICS.values()) < lines[0].keys()
    assert set(METRICS.values()) < {*EventAccumulator(".runs/pretrain-nano").Reload().Tags()["scalars"]}
    changed("readout.tasks.depth.Depth.views", ["plain"])
    for key in ("train_items", "val_items"):
        settings = changed(f"readout.Evaluation.{key}", 0)
    for task, metric in METRICS.items():
        assert summary[metric] == pytest.approx(readout("nano", task, "frozen", settings).others[metric], rel=1e-4)


@pytest.mark.integration
def test_measures_do_not_depend_on_the_ranks_on_shards_or_on_ranks_without_a_clip(probing: Callable) -> None:
    pretraining = bind_pretrain("nano", probing(3, **{"Training.val_clips": 5}))
    pretrain("nano", config.read())
    one = run(measures, ranks=1, pretraining=pretraining, shards=1)
    assert one.keys() == {"val_loss", "rankme", *METRICS.values()}
    for ranks, shards in ((2, 1), (2, 2), (10, 1)):
        assert run(measures, ranks=ranks, pretraining=pretraining, shards=shards) == pytest.approx(one, rel=1e-4)
    every_clip = replace(pretraining, training=replace(pretraining.training, val_clips=0))
    assert run(measures, ranks=1, pretraining=every_clip, shards=1)["val_loss"] != one["val_loss"]


@pytest.mark.integration
def test_a_state_belongs_to_the_benchmarks_and_the_code_of_its_probes(probing: Callable, project: Path) -> None:
    fingerprints = []
    for tasks in ([], ["depth"]):
        for text in ("before", "after"):
            (project / "data/benchmarks/scannet/remark.txt").write_text(text)
            pretraining = bind_pretrain("nano", probing(3, **{"Training.probe_tasks": tasks}))
            fingerprints.append(pretrain_fingerprint(pretraining, provenance_of(pretraining)))
    assert fingerprints[0] == fingerprints[1] and fingerprints[2] != fingerprints[3]
    file = Path("artifacts/code/probes.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"sha256": "other"}))
    for tasks, before in ([], fingerprints[0]), (["depth"], fingerprints[3]):
        pretraining = bind_pretrain("nano", probing(3, **{"Training.probe_tasks": tasks}))
        assert (pretrain_fingerprint(pretraining, provenance_of(pretraining)) == before) == (not tasks)
    artifacts.PROBES.unlink()
    with pytest.raises(UserError, match=r"^no such file .+probes.json; run `dvc repro benchmarks`$"):
        provenance_of(pretraining)


@pytest.mark.integration
@pytest.mark.parametrize(("shards", "measure", "sign"), [(1, "rankme", -1), (2, "val_loss", 1)])
def test_the_best_weights_are_written_even_if_the_training_is_killed_after_them(
    short: Callable, monkeypatch: pytest.MonkeyPatch, shards: int, measure: str, sign: int
) -> None:
    """Made-up measures: those of step 2 are the best, the lowest loss or the highest rank."""
    after_step, now, best = Validation.after_step, [0], Path("best")

    def note(self: Validation, result: StepResult) -> None:
        now[0] = result.step
        after_step(self, result)
        if result.step == 2:
            best.mkdir(exist_ok=True)
            save_weights(self.model, best)

    monkeypatch.setattr(Validation, "after_step", note)
    monkeypatch.setattr(validate, "measure", lambda *_: {"val_loss": 1.0, measure: sign * abs(now[0] - 2)})
    changes = EVERY | {"Training.keep_best": measure, "points.nano.Sharding.shards": shards}
    assert attempt(short(6, **changes)) == 0
    undisturbed, saved = written(), Checkpoint.read(NANO)
    assert undisturbed["model.safetensors"] == (best / "model.safetensors").read_bytes()
    assert (saved.step, saved.clips_seen) == (2, 16)
    summary = summary_of(NANO)
    assert (summary["best_step"], summary[measure], summary["clips_seen"]) == (2, 0, 48)
    shutil.rmtree(NANO)
    settings = short(6, **changes)
    assert attempt(settings, at=5, interrupt=kill_all) == -9
    assert attempt(settings) == 0
    assert written() == undisturbed and steps_shown() == [1, 2, 3, 4, 5, 5, 6]


def test_a_probe_needs_its_benchmark(changed: Callable) -> None:
    settings = changed("pretrain.Training.probe_tasks", ["depth"])
    with pytest.raises(UserError, match="^no folder data/benchmarks/scannet for task depth; .+$"):
        pretrain("nano", settings)
    with pytest.raises(UserError, match="^pretrain.Training.probe_tasks has depth, which benchmarks.tasks lacks; add it there$"):
        bind_pretrain("nano", changed("benchmarks.tasks", ["actions"]))
