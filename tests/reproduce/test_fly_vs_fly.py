"""Fly vs. Fly: the records of scivid's layout, its sampling and augmentation, its readout, and the whole command."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_encoder
import torch
from commands import invoke, refused_command
from reproduce.fly_records import SHAPE, bright_flies, fly_record, write_shards, write_weights

import scaling4d
from scaling4d import seeds
from scaling4d.mae.encoder import BackboneConfig
from scaling4d.records import UserError
from scaling4d.reproduce import fly_vs_fly
from scaling4d.reproduce.fly_clips import CLASSES, FlyClips, one_hot, read_labels
from scaling4d.reproduce.fly_vs_fly import (
    FLY_VS_FLY,
    PROTOCOL,
    RELEASED_ENCODER,
    TRAIN_CLIPS,
    FlyReadouts,
    deviations_of,
    draw_jitter,
    measure,
    prepare,
    read_ahead,
)


def numbered(frames: int) -> np.ndarray:
    """Pictures whose pixels are their number."""
    return np.arange(frames, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(12, 2).repeat(3, 3)


# ---- records ----


def test_a_clip_is_the_first_frames_and_a_short_one_repeats_its_last(tmp_path: Path) -> None:
    write_shards(tmp_path, "val", [fly_record(numbered(20), [5]), fly_record(numbered(3), [0])], shards=1)
    clips = FlyClips(tmp_path, "val", 6)
    assert [clips.read(n)[0][:, 0, 0, 0].tolist() for n in (0, 1)] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 2, 2]]
    assert clips.read(0)[0].shape == (6, 8, 12, 3)


def test_clips_follow_the_order_of_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", [fly_record(numbered(2), [n]) for n in range(5)], shards=3)
    clips = FlyClips(tmp_path, "train", 2)
    assert len(clips) == 5 and [int(clips.read(n)[1].argmax()) for n in range(5)] == [0, 3, 1, 4, 2]


@pytest.mark.parametrize("packed", [True, False])
def test_a_clip_has_any_number_of_classes(packed: bool) -> None:
    for labels, hot in (([6], [6]), ([0, 3], [0, 3]), ([2, 2], [2]), ([], [])):
        record = fly_record(numbered(1), labels, packed=packed)
        assert read_labels(memoryview(record)) == labels
        assert np.flatnonzero(one_hot(labels)).tolist() == hot and one_hot(labels).max(initial=0) <= 1


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    not_a_picture = fly_record(numbered(2), [1]).replace(b"PNG", b"GNP")
    write_shards(tmp_path, "val", [fly_record(numbered(2), [7]), not_a_picture, b"\xff\xff"], shards=1)
    clips, shard = FlyClips(tmp_path, "val", 2), "array_record-00000-of-00001"
    for number, message in enumerate(("needed numbers of 7 classes", "a picture cannot be read", "is damaged")):
        with pytest.raises(UserError, match=f"{shard}, record {number}.*{message}"):
            clips.read(number)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no val_fly_split_ids_shuffle.array_record-00000-of-00100; needed the shards"):
        FlyClips(tmp_path, "val", 2)
    write_shards(tmp_path, "val", bright_flies(4, "val"), shards=2)
    (tmp_path / "val_fly_split_ids_shuffle.array_record-00001-of-00002").unlink()
    with pytest.raises(UserError, match="lacks 1 of 2 shards of val, the first is .*00001-of-00002"):
        FlyClips(tmp_path, "val", 2)
    (tmp_path / "val_fly_split_ids_shuffle.array_record-00000-of-00003").touch()
    with pytest.raises(UserError, match="several sets of val, of 00002, 00003; keep one"):
        FlyClips(tmp_path, "val", 2)


# ---- augmentation ----


def test_pixels_are_resized_whatever_their_aspect_ratio_and_margins_do_not_count() -> None:
    """Two pixels to four, bilinear with half-pixel centres, worked by hand: a, (3a + b) / 4, (a + 3b) / 4, b."""
    clip = torch.full((1, 5, 5, 3), 255, dtype=torch.uint8)
    clip[:, :2, :2] = torch.tensor([[0, 100], [0, 100]], dtype=torch.uint8)[..., None]
    resized = prepare(clip, size=(2, 2), shape=(4, 4))
    assert torch.allclose(255 * resized[0, :, :, 0], torch.tensor([0.0, 25.0, 75.0, 100.0]).expand(4, 4), atol=1e-4)
    assert prepare(clip, size=(2, 5), shape=(6, 4)).shape == (1, 6, 4, 3)


def test_a_jitter_enlarges_both_axes_alike_and_crops_the_shape() -> None:
    draws = [draw_jitter(seeds.numpy_rng(0, n), (224, 224), PROTOCOL.scales) for n in range(2000)]
    heights = np.array([one.height for one in draws])
    assert all(one.height == one.width for one in draws)
    assert heights.min() in (224, 225) and heights.max() == 313 and abs(heights.mean() - 1.2 * 224) < 2
    assert all(0 <= place < max(one.height - 224, 1) for one in draws for place in (one.top, one.left))
    assert any(one.top != one.left for one in draws)
    ramp = torch.arange(32, dtype=torch.uint8)[None, :, None, None].repeat(1, 1, 32, 3)
    jitter = fly_vs_fly.Jitter(48, 48, 10, 0)
    whole = prepare(ramp, size=(32, 32), shape=(48, 48))
    assert torch.allclose(prepare(ramp, size=(32, 32), shape=(32, 32), jitter=jitter), whole[:, 10:42, :32], atol=1e-6)


# ---- readouts and protocol ----


def small_readouts() -> FlyReadouts:
    model = FlyReadouts(small_encoder.model("Backbone", **SHAPE), PROTOCOL)
    model.initialise(0)
    return model


def test_readouts_learn_and_the_encoder_does_not() -> None:
    model, clips = small_readouts(), torch.rand(2, 4, 32, 32, 3)
    model(clips, torch.eye(7)[:2]).backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without == {f"encoder.{name}" for name, _ in model.encoder.named_parameters()}


def test_dropout_acts_on_what_attention_gives_in_training_alone() -> None:
    model, clips = small_readouts(), torch.rand(2, 4, 32, 32, 3)
    one, other = (model.scores(clips) for _ in range(2))
    assert not torch.equal(one["attention"], other["attention"]) and torch.equal(one["linear"], other["linear"])
    model.eval()
    assert torch.equal(*(model.scores(clips)["attention"] for _ in range(2)))
    dropout = model.attention.project[0]
    assert isinstance(dropout, torch.nn.Dropout) and dropout.p == 0.5


def test_all_matrices_start_lecun_normal() -> None:
    attention = small_readouts().attention
    for layer in (attention.project[1], attention.mlp_in, attention.mlp_out, attention.value):
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.1) and not layer.bias.any()
    assert attention.query.std().item() == pytest.approx(0.02, rel=0.3)


def test_the_protocol_is_scivids_and_a_run_tells_where_it_differs() -> None:
    training = {"steps": 40_000, "batch": 32, "learning_rate": 3e-4, "warmup_steps": 1000, "weight_decay": 0.0}
    readout = {"width": 128, "heads": 16, "dropout": 0.5}
    assert asdict(PROTOCOL) == training | readout | {"betas": (0.9, 0.999), "scales": (1.0, 1.4)}
    assert TRAIN_CLIPS == 1_067_008 and TRAIN_CLIPS % PROTOCOL.batch == 0
    assert deviations_of(PROTOCOL, RELEASED_ENCODER, TRAIN_CLIPS + 31) == []
    assert deviations_of(replace(PROTOCOL, steps=7), BackboneConfig(**small_encoder.SETTINGS["Backbone"] | SHAPE), 64) == [
        "7 steps, the protocol has 40,000",
        "an encoder of another shape than 4DS-B-dist-e",
        "64 clips to train on in whole batches, scivid has 1,067,008",
    ]


def test_a_verdict_needs_the_protocol_and_the_tolerance() -> None:
    for value, deviations, verdict in ((84.0, [], "reproduced"), (85.4, [], "not reproduced"), (84.3, ["7 steps"], "no verdict")):
        content = FLY_VS_FLY.result(value, deviations, {})
        assert content["verdict"] == verdict and content["difference"] == pytest.approx(value - 84.3)
    assert FLY_VS_FLY.verdict_text(FLY_VS_FLY.result(84.0, [], {})) == (
        "fly_vs_fly: mAP 84.00 %, published 84.3, difference -0.30, tolerance 1: reproduced"
    )


def test_measuring_drops_the_last_incomplete_batch_and_skips_the_background(tmp_path: Path) -> None:
    write_shards(tmp_path, "val", bright_flies(24, "val"))
    clips, model = FlyClips(tmp_path, "val", 4), small_readouts().eval()
    measured = measure(model, clips, shape=(32, 32), batch=10, workers=2)
    scores, labels = [], []
    for index in range(20):
        pixels, hot = clips.read(index)
        one = prepare(torch.from_numpy(pixels), size=pixels.shape[1:3], shape=(32, 32))[None]
        scores.append(model.scores(one)["attention"][0].detach().numpy())
        labels.append(hot > 0)
    ap = 100 * fly_vs_fly.class_average_precisions(np.stack(scores), np.stack(labels))
    assert measured["mAP"] == pytest.approx(ap[:6].mean(), abs=1e-4)
    assert measured["mAP_without_rare"] == pytest.approx(ap[[0, 3, 4, 5]].mean(), abs=1e-4)
    assert [measured[f"AP_{name}"] for name in CLASSES] == pytest.approx(ap.tolist(), abs=1e-4)


def test_a_split_without_a_class_or_a_batch_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, "val", [fly_record(numbered(4), [n % 3]) for n in range(8)])
    clips, model = FlyClips(tmp_path, "val", 4), small_readouts().eval()
    with pytest.raises(UserError, match="has no clip of wing_extension, circling, copulation, not_interacting; needed"):
        measure(model, clips, shape=(32, 32), batch=8, workers=1)
    with pytest.raises(UserError, match="split val has 8 clips; needed at least a batch of 9"):
        measure(model, clips, shape=(32, 32), batch=9, workers=1)


def test_batches_are_the_same_with_one_thread_and_with_several_and_an_error_surfaces(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", bright_flies(12, "train"))
    clips, orders = FlyClips(tmp_path, "train", 4), [[n, 11 - n] for n in range(12)]
    one, several = (list(read_ahead(clips.read, orders, workers)) for workers in (1, 4))
    assert len(one) == 12
    for (pixels, sizes, labels), (others, other_sizes, other_labels) in zip(one, several, strict=True):
        assert torch.equal(pixels, others) and sizes == other_sizes and torch.equal(labels, other_labels)
    with pytest.raises(IndexError):
        list(read_ahead(clips.read, [[99]], 2))


# ---- the command ----


def test_the_plan_names_downloads_settings_sources_and_differences() -> None:
    done = invoke("reproduce", "fly_vs_fly", "--dry")
    text = done.stdout
    assert done.exit_code == 0
    for words in (
        "expected: mAP 84.3 %; source: README.md",
        "wget https://storage",
        "gs://scivid/full/fly_vs_fly",
        "not measured",
    ):
        assert words in text
    assert invoke("reproduce", "fly_vs_fly").stdout == text  # first, where files are missing
    assert all(row.source in text for row in FLY_VS_FLY.settings) and all(d in text for d in FLY_VS_FLY.differences)


def test_missing_files_and_wrong_options_are_one_line_each(tmp_path: Path) -> None:
    refused = partial(refused_command, "reproduce")
    error = refused("fly_vs_fly", "--weights", tmp_path / "absent.npz")
    assert error.startswith(f"fly_vs_fly needs files that are not there: --weights ({tmp_path}/absent.npz), --data (not given)")
    assert "wget https://storage.googleapis.com" in error and "gcloud storage rsync" in error
    assert refused("fly_vs_fly", "--video", "a.mp4") == "fly_vs_fly takes --data and --weights; leave out --video"
    assert refused("fly").startswith("unknown target 'fly'; needed fly_vs_fly or depth_demo")
    assert refused("fly_vs_fly", "--device", "tpu") == "--device tpu; needed cpu or cuda"


def python(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    """Another process: array_record, which this one has used for its files, does not survive a fork."""
    environment = os.environ | {"PYTHONPATH": str(Path(scaling4d.__file__).parents[1])}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.integration
def test_the_whole_command_learns_from_files_of_the_released_layout(tmp_path: Path) -> None:
    for split, count in (("train", 96), ("val", 70)):
        write_shards(tmp_path / "fly_vs_fly", split, bright_flies(count, split))
    files = ("--weights", write_weights(tmp_path), "--data", "fly_vs_fly")
    words = ("-m", "scaling4d", "reproduce", "fly_vs_fly", *files, "--device", "cpu", "--steps", 150, "--workers", 2)
    done = python(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = "no verdict (not the protocol: 150 steps, the protocol has 40,000; an encoder of another shape"
    assert "published 84.3, difference" in done.stdout and told in done.stdout
    folder = tmp_path / "artifacts/reproduced/fly_vs_fly"
    result = json.loads((folder / "result.json").read_text())
    assert result["verdict"] == "no verdict" and result["data"]["val"]["records"] == 70 and len(result["deviations"]) == 3
    assert result["value"] == result["metrics"]["mAP"] > 60  # chance is about 16
    assert len(result["weights"]["sha256"]) == 64 and result["seed"] == 0
    losses = [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] and (folder / "head.safetensors").is_file()
    assert not list((tmp_path / ".resume").glob("reproduce-*"))
    assert "exists; give another folder as --out" in python(*words, cwd=tmp_path).stderr


RUN = """
from pathlib import Path
from scaling4d.records import UserError
from scaling4d.reproduce import fly_vs_fly

def fail(*_, **__):
    raise UserError("the machine is gone")

fly_vs_fly.SAVE_EVERY = 3
{change}
fly_vs_fly.run(weights=Path("small.npz"), data=Path("data"), device="cpu", seed=1, steps=8, workers=2, out=Path("{out}"))
"""


def test_a_state_is_removed_as_soon_as_the_result_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = write_weights(tmp_path)
    for split in ("train", "val"):
        write_shards(tmp_path / "data", split, bright_flies(4, split))
    states = []

    def measured(*_: object, state: dict, **__: object) -> tuple:
        states.append(fly_vs_fly.state_folder("reproduce", state))
        states[0].mkdir(parents=True)
        return {"mAP": 84.0}, {"train": 4, "val": 4}, [], [], {"weight": torch.zeros(1)}

    def without_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(fly_vs_fly.distributed, "run", measured)
    monkeypatch.setattr(fly_vs_fly.artifacts, "write_run", without_git)
    with pytest.raises(FileNotFoundError, match="git"):
        fly_vs_fly.run(
            weights=tmp_path / weights, data=tmp_path / "data", out=tmp_path / "out", device="cpu", seed=0, steps=None, workers=1
        )
    assert (tmp_path / "out/result.json").is_file() and not states[0].exists()


@pytest.mark.integration
def test_a_stopped_run_continues_to_the_same_number(tmp_path: Path) -> None:
    write_weights(tmp_path)
    for split in ("train", "val"):
        write_shards(tmp_path / "data", split, bright_flies(40, split))

    def run_to(out: str, change: str = "") -> str:
        return python("-c", RUN.format(change=change, out=out), cwd=tmp_path).stderr

    run_to("straight")
    assert "the machine is gone" in run_to("stopped", "fly_vs_fly.measure = fail")
    assert list(tmp_path.glob(".resume/reproduce-*/step-*")) and not (tmp_path / "stopped").exists()
    assert "step 00001/8" not in run_to("stopped")
    one, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("straight", "stopped"))
    assert one["metrics"] == other["metrics"]
