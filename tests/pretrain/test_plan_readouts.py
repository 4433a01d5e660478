"""Plans of a point's frozen readouts: counts, stored features, and seconds by the performance model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import invoke

from scaling4d import config, seeds
from scaling4d.encoders.features import features_at_depth, layer_index
from scaling4d.pretrain.plan.closed_form import features_flops
from scaling4d.pretrain.plan.dry_run import count_flops
from scaling4d.pretrain.plan.performance import CASES, features_seconds
from scaling4d.pretrain.plan.plan import build, settings_of
from scaling4d.pretrain.plan.readouts import plan_readouts
from scaling4d.pretrain.plan.work import frozen_work
from scaling4d.training.gpus import GPUS

ROOT = Path(__file__).parents[2]
FAST = {"gpu": "h100", "worker_clips_per_s": 1e9}


def planned(point: str, *overrides: str, profile: str = "paper", **costs: object) -> dict:
    """Of no lists of videos, unless the overrides say where they are."""
    settings = config.compose([f"profile={profile}", "readout.Evaluation.data=absent", *overrides])
    return plan_readouts(point, settings, **(FAST | costs))


@pytest.mark.usefixtures("in_the_project")
def test_the_five_tasks_of_j_have_windows_passes_bytes_and_days() -> None:
    content = planned("j")
    rows = {row["task"]: row for row in content["tasks"]}
    assert list(rows) == ["actions", "boxes", "depth", "points", "pose"]
    actions = rows["actions"]  # 168,913 videos in 2 windows, 24,777 in 2 windows of 3 squares
    assert actions["windows"] == 2 * 168_913 + 6 * 24_777 == 486_488
    assert actions["passes"] == 8 * math.ceil(486_488 / 8 / 16)
    assert actions["stored_bytes"] == 486_488 * 1568 * 4096 * 4
    assert actions["reused_share"] == 1 - 2 * 168_913 / (40_000 * 32)
    assert actions["head_bytes"] == 40_000 * 32 * 1568 * 4096 * 4
    assert content["total"]["head_bytes"] == sum(row["head_bytes"] for row in rows.values())
    assert (actions["clip"], content["total"]["windows"]) == ([16, 224, 224], sum(row["windows"] for row in rows.values()))
    for row in rows.values():
        fast, slow = row["days"]
        assert 0 < fast < slow and row["bound"] == ["encoder", "encoder"]
        assert row["gpu_hours"] == pytest.approx([24 * 8 * days for days in row["days"]])
        least_s = row["flops"] / 8 / GPUS["h100"].bf16_flop_per_s
        assert least_s < fast * 86400 < slow * 86400 < 4 * least_s


@pytest.mark.usefixtures("in_the_project")
def test_points_are_planned_on_movi_e_and_measured_on_perception_test_as_the_profile_says() -> None:
    points = next(row for row in planned("j")["tasks"] if row["task"] == "points")
    train, val = points["train"], points["val"]
    assert train == {"videos": 9749, "windows": 9, "source": "movi, 9,749 in MOVi-E 1.0.0, authors' count"}
    assert val == {"videos": 145, "windows": 4, "source": "perception_test, at most 145 (all splits), authors' count"}
    assert points["windows"] == 9 * 9749 + 4 * 145
    assert points["stored_bytes"] == points["windows"] * 1568 * 4096 * 4
    assert points["reused_share"] == 1 - 9 * 9749 / (40_000 * 32)
    read = 64 * 9749 + 4 * 145  # the reader reads every window that is drawn
    assert planned("j", worker_clips_per_s=40.0)["tasks"][3]["read_s"] == pytest.approx(read / 8 / 40)


@pytest.mark.usefixtures("in_the_project")
def test_windows_drawn_twice_are_encoded_once_if_the_store_keeps_them() -> None:
    stored, in_memory = (
        next(row for row in planned("S", *override)["tasks"] if row["task"] == "boxes")
        for override in ((), ("readout.Evaluation.feature_store=''",))
    )
    starts = len(range(0, 199 - 30, 3))  # 199 frames at 10 Hz, clips of 16 at 5 Hz
    draws = seeds.numpy_rng(0, "windows").integers(starts, size=(10_000, 64))
    assert stored["train"]["windows"] == round(np.mean([len({*row}) for row in draws.tolist()])) < starts
    assert in_memory["train"]["windows"] == 64


@pytest.mark.usefixtures("in_the_project")
def test_a_longer_clip_fewer_items_and_slow_reading_are_in_the_plan() -> None:
    short = planned("S", worker_clips_per_s=40.0)
    long = planned("S", "readout.Evaluation.frames=32", "readout.Evaluation.train_items=100", worker_clips_per_s=40.0)
    before, after = (next(row for row in content["tasks"] if row["task"] == "depth") for content in (short, long))
    assert after["clip"] == [32, 224, 224] and after["windows"] == 100 * 64 + 312 * 4
    assert after["flops"] / after["windows"] > 2 * before["flops"] / before["windows"]
    assert after["read_s"] / after["windows"] == pytest.approx(2 * before["read_s"] / before["windows"])
    assert before["bound"] == ["reading", "reading"] and before["days"] == [before["read_s"] / 86400] * 2
    assert planned("S", "encoders.frozen=[B]") is None


@pytest.mark.usefixtures("in_the_project")
def test_the_lists_of_benchmarks_that_are_here_are_counted(tmp_path: Path) -> None:
    root = ROOT / "experiments/pocket/benchmarks"
    changes = (f"readout.Evaluation.data={root}", "benchmarks.tasks=[depth]", "readout.frozen.depth.Frozen.steps=1")
    content = planned("nano", *changes, profile="pocket")
    (row,) = content["tasks"]
    lists = {split: (root / f"scannet/scannetv2_{split}.txt").read_text().split() for split in ("train", "val")}
    assert row["train"] == {"videos": len(lists["train"]), "windows": 1, "source": "scannet, the list here"}
    assert row["windows"] == 2 * len(lists["train"]) + len(lists["val"])
    assert row["stored_bytes"] == 2 * len(lists["train"]) * 512 * 16 * 4  # in memory: of training clips alone
    assert row["reused_share"] == 0  # a step shows fewer


@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize("point", ["nano", "mae_st_tiny"])
def test_flops_of_features_are_those_that_torch_counts(point: str) -> None:
    encoder = build(point, settings_of(point)).encoder.to_empty(device="cpu")
    work = frozen_work(encoder, layer_index(depth=encoder.depth))
    pixels = torch.zeros(1, *encoder.clip, 3, dtype=torch.uint8)
    with torch.no_grad():
        assert count_flops(lambda: features_at_depth(encoder, pixels)) == features_flops(work)


@pytest.mark.usefixtures("in_the_project")
def test_shards_gather_and_a_larger_batch_is_no_slower_a_clip() -> None:
    encoder = build("j", settings_of("j")).encoder
    work, gpu = frozen_work(encoder, layer_index(depth=encoder.depth)), GPUS["h100"]
    sizes = {"pixels": 3 * math.prod(encoder.clip)}
    for share in CASES.values():
        alone, sharded, large = (
            features_seconds(work, gpu, share, shards=shards, clips=clips, **sizes) for shards, clips in ((1, 1), (8, 1), (8, 32))
        )
        assert alone["communication"] == 0 < sharded["communication"]
        assert sum(sharded.values()) > sum(large.values()) / 32
        assert alone["compute"] == sharded["compute"] and alone["memory"] > sharded["memory"]  # it casts eight times as much
        slow_links = replace(gpu, node_bytes_per_s=gpu.node_bytes_per_s / 10)
        slower = features_seconds(work, slow_links, share, shards=8, clips=1, **sizes)
        assert slower["communication"] > 5 * sharded["communication"] and slower["compute"] == sharded["compute"]


@pytest.mark.usefixtures("in_the_project")
def test_the_command_shows_a_row_a_task_and_prints_the_same_as_json() -> None:
    text, content = invoke("plan", "j").output, json.loads(invoke("plan", "j", "--json").output)
    readouts, shape = content["readouts"], content["shape"]
    assert shape.startswith("The shape is inferred from the count alone and unconfirmed")
    assert f"shape of the encoder of 4DS-j: {shape}\n" in text
    assert "frozen readouts of j, encoder on 8 GPUs (H100 SXM 80 GB), clips of 16 x 224 x 224" in text
    for row in readouts["tasks"]:
        assert f"{row['windows']:,}" in text and row["task"] in text
    words = " ".join(text.split())
    assert all(row["train"]["source"] in words for row in readouts["tasks"])
    assert readouts["feature_store"] == ".resume/features"
