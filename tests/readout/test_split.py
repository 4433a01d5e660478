"""What a readout learns from and is judged on, and how little of it is held at a time."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from scaling4d import seeds
from scaling4d.benchmarks import perception_test, ssv2
from scaling4d.encoders.features import Pixels
from scaling4d.readout.split import Share, judged, reread
from scaling4d.readout.tasks.actions import Actions, check
from scaling4d.readout.tasks.points import Points
from scaling4d.readout.train import batch_of
from scaling4d.records import Sample, UserError
from scaling4d.training.distributed import run

CLIP = (4, 16, 16)
VIDEOS = 12
TRACKS = 5
TEMPLATES = ("Holding [something]", "Moving [something]", "Turning [something]")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dozen videos of actions and of points; video n shows n + 1 tracks, at most TRACKS."""
    rng = seeds.numpy(0, "videos")
    for split in ("train", "val"):
        actions, points = [], []
        for n in range(VIDEOS):
            pixels, tracks = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), min(n + 1, TRACKS)
            actions.append(Sample(f"v{n:02d}", f"v{n:02d}", pixels, {"action": np.int64(n % 3)}))
            places = rng.uniform(0.2, 0.8, (tracks, 6, 2)).astype(np.float32)
            points.append(Sample(f"v{n:02d}", f"v{n:02d}", pixels, {"points": places}, {"points": np.ones((tracks, 6), bool)}))
        ssv2.write(tmp_path / "ssv2", split, actions, templates=TEMPLATES, rate_hz=8.0, crf=20, gop=6)
        perception_test.write(tmp_path / "perception_test", split, points, rate_hz=8.0, crf=20, gop=6)
    return tmp_path


def share(task: str, split: str, rank: int, ranks: int, *, data: Path, kept: int = 2) -> Share:
    asked = {
        "actions": Actions(classes=3, rate_hz=8.0, views=("plain", "mirrored"), test_views=(1, 1)),
        "points": Points(
            tracks=2,
            tiles=1,
            rate_hz=8.0,
            views=("plain", "mirrored", "backwards"),
            certain=True,
            relative=True,
            queries="frame_0",
        ),
    }
    evaluation = SimpleNamespace(data=data, max_bad_share=0.0, kept_clips=kept)
    return Share(task, split, asked[task], evaluation, CLIP, rank, ranks)


def batches(*, rank: int, ranks: int, task: str, data: Path, kept: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    lessons = reread(share(task, "train", rank, ranks, data=data, kept=kept))
    assert len(lessons.kept) == min(kept, len(lessons))
    return [lessons.batch(batch_of(step, 4, len(lessons), 0, rank)) for step in range(4)]


@pytest.mark.parametrize("task", ["actions", "points"])
def test_clips_that_are_read_again_are_those_that_stay_in_memory(data: Path, task: str) -> None:
    few, all_of_them = (run(batches, ranks=2, task=task, data=data, kept=kept) for kept in (2, 1000))
    for (pixels, target), (wanted, true) in zip(few, all_of_them, strict=True):
        assert pixels.shape == (4, *CLIP, 3) and torch.equal(pixels, wanted) and pixels.float().std() > 10
        assert target.keys() == true.keys() and all(torch.equal(target[name], true[name]) for name in true)


def alive(*, rank: int, ranks: int, data: Path) -> tuple[list[int], int]:
    """Clips in memory whenever a readout is asked."""
    clips, found = [], []

    class Watched(Pixels):
        def add(self, pixels: Tensor) -> Tensor:
            clips.append(weakref.ref(pixels))
            return pixels

    def says(pixels: Tensor, target: dict[str, Tensor]) -> Tensor:
        gc.collect()
        found.append(sum(clip() is not None for clip in clips))
        return torch.zeros(len(pixels), 3)

    videos, _, _ = judged(share("actions", "val", rank, ranks, data=data), Watched(), says, size=3)
    return found, len(videos)


def test_a_split_is_judged_a_batch_at_a_time_and_no_other_clip_is_held(data: Path) -> None:
    held, videos = run(alive, ranks=1, data=data)
    assert videos == VIDEOS and len(held) == 4 and max(held) <= 2 * 3  # the batch, and the last one until the next is there


def tracks(*, rank: int, ranks: int, data: Path, split: str) -> list[int]:
    if split == "train":
        lessons = reread(share("points", split, rank, ranks, data=data))
        return lessons.batch(range(len(lessons)))[1]["asked"].sum(1).tolist()
    seen = []

    def says(pixels: Tensor, target: dict[str, Tensor]) -> Tensor:
        seen.extend(target["asked"].sum(1).tolist())
        return torch.zeros(*target["visible"].shape, 4)

    _, sums, _ = judged(share("points", split, rank, ranks, data=data), Pixels(), says, size=5)
    assert [counts["occlusion_accuracy"][1] for counts in sums] == [3 * count for count in seen]  # of four frames, one is given
    return seen


def test_all_tracks_of_a_video_are_judged_and_as_many_learned_as_the_setting_says(data: Path) -> None:
    wanted = [min(n + 1, TRACKS) for n in range(VIDEOS)]
    assert run(tracks, ranks=1, data=data, split="val") == wanted
    assert run(tracks, ranks=1, data=data, split="train") == [min(count, 2) for count in wanted for _ in range(3)]


@pytest.mark.parametrize("classes", [2, 4])
def test_a_setting_of_other_classes_than_the_benchmarks_is_refused(data: Path, classes: int) -> None:
    check(Actions(classes=3, rate_hz=8.0, views=("plain",), test_views=(1, 1)), data)
    asked = Actions(classes=classes, rate_hz=8.0, views=("plain",), test_views=(1, 1))
    expected = f"^.*/ssv2 has 3 classes; set readout.tasks.actions.Actions.classes = {classes} to that$"
    with pytest.raises(UserError, match=expected):
        check(asked, data)


def late(*, rank: int, ranks: int, data: Path, ended: Callable[[Path], None]) -> None:
    lessons = reread(share("actions", "train", rank, ranks, data=data, kept=0))
    ended(data)
    lessons.batch([0])


def test_a_clip_that_is_gone_when_its_turn_comes_stops_the_training(data: Path) -> None:
    with pytest.raises(UserError, match="needed 20bn-something-something-v2/v00.webm"):
        run(late, ranks=1, data=data, ended=lambda root: next(root.rglob("v00.webm")).unlink())
