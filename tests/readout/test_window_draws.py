"""Windows in time of labelled videos: a new one in every epoch of a training, even ones in a test."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scaling4d import artifacts, config
from scaling4d.benchmarks import perception_test, ssv2
from scaling4d.encoders.features import MemoryFeatures
from scaling4d.encoders.stage import baseline
from scaling4d.readout.data import ClipDataset, FeatureDataset, RankSplit, epochs_of, evaluate, shuffled_batch
from scaling4d.readout.stage import readout
from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.tasks.points import Points
from scaling4d.records import Sample, UserError
from scaling4d.training.distributed import run

pytestmark = pytest.mark.integration

VIDEOS, FRAMES, CLIP = 3, 24, (4, 16, 16)
ACTIONS = Actions(classes=2, rate_hz=8.0, views=("plain", "mirrored"), train_windows=3)
POINTS = Points(tracks=2, rate_hz=8.0, views=("plain",), certain=True, relative=True, queries_at="frame_0", test_views=(3, 1))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of actions and of points that get brighter by 8 a frame; one point moves with the frames."""
    root, encoding = tmp_path_factory.mktemp("benchmarks"), {"rate_hz": 8.0, "crf": 5, "gop": 4}
    pixels = np.broadcast_to(20 + 8 * np.arange(FRAMES)[:, None, None, None], (FRAMES, 32, 32, 3)).astype(np.uint8)
    track = np.stack([np.linspace(0.1, 0.9, FRAMES), np.full(FRAMES, 0.5)], -1).astype(np.float32)[None]
    labels, valid = {"points": track}, {"points": np.ones((1, FRAMES), bool)}
    for split in ("train", "val"):
        actions = [Sample(f"v{n}", f"v{n}", pixels, {"action": np.int64(0)}) for n in range(VIDEOS)]
        ssv2.write(root / "ssv2", split, actions, templates=("Holding [something]", "Moving [something]"), **encoding)
        points = [Sample(f"v{n}", f"v{n}", pixels, labels, valid) for n in range(VIDEOS)]
        perception_test.write(root / "perception_test", split, points, **encoding)
    return root


def split_of(data: Path, task: str = "actions", split: str = "train", *, rank: int, ranks: int, seed: int | None = 0, **changes):
    task_config = {"actions": ACTIONS, "points": POINTS}[task]
    where = (data, changes.pop("max_bad_share", 0.0), CLIP, rank, ranks)
    return RankSplit(task, split, 0, replace(task_config, **changes), *where, seed)


def first_frames(pixels: Tensor) -> list[int]:
    return torch.round((pixels[:, 0].float().mean((1, 2, 3)) - 20) / 8).int().tolist()


def drawn(
    *, data: Path, epochs: range, cached: int = 0, frozen: bool = False, task: str = "actions", **where: Any
) -> list[list[int]]:
    """First frames of the windows of every clip of a rank, by epoch."""
    split = split_of(data, task, **where)
    train_set = FeatureDataset(split, MemoryFeatures(torch.clone)) if frozen else ClipDataset(split, cached)
    clips = range(len(train_set))
    batches = [train_set.batch(clips, [epoch] * len(clips)) for epoch in epochs]
    for pixels, target in batches if task == "points" else ():
        frames = np.array(first_frames(pixels))[:, None] + np.arange(CLIP[0])
        assert np.allclose(target["points"][:, 0, :, 0], 0.1 + 0.8 * frames / (FRAMES - 1), atol=1e-4)
    return [first_frames(pixels) for pixels, _ in batches]


def test_every_epoch_has_its_own_window_of_each_video_by_seed_alone(data: Path) -> None:
    draw = lambda ranks=1, **changes: run(drawn, ranks=ranks, data=data, epochs=range(60), **changes)  # noqa: E731
    windows = draw()
    by_clip = list(zip(*windows, strict=True))
    assert len(by_clip) == 2 * VIDEOS and len({*by_clip}) == VIDEOS  # mirrored clips are of the same window
    assert all({first + n for first in clip for n in range(CLIP[0])} >= {*range(2, FRAMES - 2)} for clip in by_clip)
    assert draw() == windows == draw(cached=1000) and draw(seed=1) != windows
    assert [clips[:2] + clips[4:] for clips in windows] == draw(ranks=2)  # of the first rank: videos 0 and 2
    assert draw(seed=None) == [[0] * 2 * VIDEOS] * 60


def read_together(*, data: Path, **where: Any) -> list[list[int]]:
    """First frames of three windows of two clips, read as neighbours and one by one, and the number of passes."""
    train_set = ClipDataset(split_of(data, **where), 0)
    passes, read = [], train_set.samples.load
    train_set.samples = replace(train_set.samples, load=lambda item, positions: passes.append(item) or read(item, positions))
    places = [(clip, epoch) for clip in (2, 0) for epoch in range(3)]
    together = first_frames(train_set.batch(*zip(*places, strict=True))[0])
    count = len(passes)
    return [together, [first_frames(train_set.batch([clip], [epoch])[0])[0] for clip, epoch in places], [count]]


def test_windows_of_a_video_that_follow_one_another_are_read_in_one_pass(data: Path) -> None:
    together, one_by_one, passes = run(read_together, ranks=1, data=data)
    assert together == one_by_one and len({*together}) > 3 and passes == [2]


def test_points_move_with_the_window(data: Path) -> None:
    windows = run(drawn, ranks=1, data=data, epochs=range(10), task="points")
    assert len({first for clips in windows for first in clips}) > 8
    assert run(drawn, ranks=1, data=data, epochs=range(4), task="points", frozen=True, train_windows=4) == windows[:4]


def test_a_frozen_readout_repeats_the_first_windows_of_the_same_draws(data: Path) -> None:
    tuned, frozen = (run(drawn, ranks=1, data=data, epochs=range(7), frozen=frozen) for frozen in (False, True))
    assert frozen == [*tuned[:3], *tuned[:3], tuned[0]] and tuned[3] != tuned[0]


def test_a_pass_over_the_clips_is_an_epoch() -> None:
    seen = [
        pair
        for step in range(9)
        for pair in zip(epochs_of(step, 4, 6), shuffled_batch(step, 4, 6, 0, 0), strict=True)
    ]  # fmt: skip
    assert sorted(seen) == [(epoch, clip) for epoch in range(6) for clip in range(6)]


def measured(**where: Any) -> tuple[list[int], list[str], int]:
    """First frames of what is predicted, videos, number of sums."""
    shown: list[int] = []

    def predict(pixels: Tensor, target: dict[str, Tensor]) -> Tensor:
        shown.extend(first_frames(pixels))
        return torch.zeros(len(pixels), 2) if "action" in target else torch.zeros(*target["visible"].shape, 4)

    videos, sums, _ = evaluate(split_of(split="val", **where), torch.stack, predict, size=4)
    return shown, videos, len(sums)


def test_test_windows_are_even_and_pooled_for_actions_alone(data: Path) -> None:
    shown, videos, sums = run(measured, ranks=1, data=data, task="points")
    assert shown == [0, 10, 20] * VIDEOS and sums == 3 * VIDEOS and videos == [f"v{n}" for n in range(VIDEOS) for _ in range(3)]
    shown, videos, sums = run(measured, ranks=1, data=data, test_views=(3, 1))
    assert shown == [0, 10, 20] * VIDEOS and sums == VIDEOS == len(videos)
    assert run(measured, ranks=1, data=data)[0] == [10] * VIDEOS  # one is in the middle
    assert run(measured, ranks=1, data=data, seed=None)[0] == [0] * VIDEOS


def test_a_video_whose_end_is_damaged_is_left_out_before_the_training(data: Path) -> None:
    path = data / "ssv2/20bn-something-something-v2/v1.webm"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    try:
        windows = run(drawn, ranks=1, data=data, epochs=range(1), max_bad_share=0.5)
    finally:
        path.write_bytes(content)
    assert len(windows[0]) == 2 * (VIDEOS - 1)


@pytest.mark.parametrize(("settings", "message"), [
    ({"Evaluation.windows": "all"}, "readout.Evaluation: windows = 'all'; needed first or random"),
    ({"tasks.actions.Actions.train_windows": 0}, "readout.tasks.actions.Actions: train_windows is 0; needed 1 or more"),
    ({"tasks.actions.Actions.train_windows": 2}, r"readout.tasks.actions: train_windows = 2 and test_views = \[1, 1\]; needed"),
])  # fmt: skip
def test_windows_that_do_not_fit_are_refused(changed: Callable, settings: dict, message: str) -> None:
    baseline("untrained_nano", config.read())
    for key, value in settings.items():
        values = changed(f"readout.{key}", value)
    with pytest.raises(UserError, match=f"^{message}"):
        readout("untrained_nano", "actions", "frozen", values)


def test_readouts_on_random_windows_are_equal_for_equal_seeds(
    changed: Callable, actions: None, capfd: pytest.CaptureFixture
) -> None:
    baseline("untrained_nano", config.read())
    heads = {}
    for windows, train_windows, name in (("first", 1, "first"), ("random", 3, "one"), ("random", 3, "again")):
        changed("readout.Evaluation.windows", windows)
        settings = changed("readout.tasks.actions.Actions.train_windows", train_windows)
        for protocol in ("frozen", "finetune"):
            readout("untrained_nano", "actions", protocol, settings)
            folder = Path(f"artifacts/smoke/readout/untrained_nano/actions/{protocol}")
            heads[name, protocol] = artifacts.sha256(folder / "head.safetensors")
    assert heads["one", "frozen"] == heads["again", "frozen"] != heads["first", "frozen"]
    assert heads["one", "finetune"] == heads["again", "finetune"] != heads["first", "finetune"]
    err = capfd.readouterr().err
    assert "features of 8 clips of actions x 3 windows" in err and "actions: trained on ssv2, measured on ssv2" in err
