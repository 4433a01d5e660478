"""Several views of a validation video, judged together."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scaling4d import benchmarks
from scaling4d.benchmarks import kinetics, ssv2
from scaling4d.ranks import run
from scaling4d.readout.features import Pixels
from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.train import measured, share_of
from scaling4d.records import Sample

RATE_HZ = 8.0
FRAMES = 4


def moving() -> np.ndarray:
    """uint8 `24 32 64 3`: brighter from frame to frame, and from left to right."""
    t, x = np.arange(24)[:, None, None, None], np.arange(64)[None, None, :, None]
    return np.broadcast_to(8 * t + x // 2 + 16, (24, 32, 64, 3)).astype(np.uint8)


@pytest.fixture(params=["ssv2", "kinetics"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    names = ["ABCDEFGHIJ1", "ABCDEFGHIJ2", "ABCDEFGHIJ3"]
    written = [Sample(name, name, moving(), {"action": np.int64(n % 2)}) for n, name in enumerate(names)]
    for split in benchmarks.SPLITS:
        if request.param == "ssv2":
            templates = ("Holding [something]", "Moving [something]")
            ssv2.write(tmp_path / "ssv2", split, written, templates=templates, rate_hz=RATE_HZ, crf=10, gop=4)
        else:
            kinetics.write(tmp_path / "kinetics", split, written, labels=("hold", "move"), rate_hz=RATE_HZ, crf=10, gop=4)
    return tmp_path


def seen(data: Path, views: tuple[int, int]) -> list[Sample]:
    return list(benchmarks.read("actions", data, "val", frames=FRAMES, rate_hz=RATE_HZ, side_px=32, views=views))


def test_clips_go_from_the_start_of_a_video_to_its_end_and_squares_from_side_to_side(data: Path) -> None:
    samples = seen(data, (3, 3))
    assert [sample.id for sample in samples] == [sample.id for sample in seen(data, (1, 1)) for _ in range(9)]
    level = np.array([sample.pixels.mean((1, 2, 3)) for sample in samples[:9]]).reshape(3, 3, FRAMES)  # clip, square, T
    assert np.abs(level[:, 1, 0] - np.array([0, 10, 20]) * 8 - level[0, 1, 0]).max() < 4
    assert np.abs(level[0, :, 0] - np.array([-8, 0, 8]) - level[0, 1, 0]).max() < 2
    assert (np.abs(np.diff(level, axis=-1) - 8) < 4).all()


def test_one_view_is_the_first_clip_and_the_middle_square(data: Path) -> None:
    one, several = seen(data, (1, 1)), seen(data, (2, 3))
    assert np.array_equal(one[0].pixels, several[1].pixels) and not np.array_equal(one[0].pixels, several[4].pixels)


def test_a_video_counts_once_by_the_mean_of_its_views_probabilities() -> None:
    asked = Actions(classes=3, rate_hz=RATE_HZ, views=("plain",), test_views=(2, 1))
    sure, unsure = np.array([0.0, 5.0, 0.0]), np.array([1.0, 0.0, 0.9])
    targets = {"action": torch.tensor([1, 1, 2, 2])}
    assert measured(asked, [sure, unsure, sure, unsure], targets) == [{"top1": (1.0, 1.0)}, {"top1": (0.0, 1.0)}]
    loud = np.array([30.0, 0.0, 0.0])  # logits would be outvoted by it; probabilities are not
    two = [np.log([0.45, 0.55, 1e-9]), np.log([0.4, 0.6, 1e-9])]
    assert measured(asked, [loud, *two, two[0]], targets)[1] == {"top1": (0.0, 1.0)}
    assert asked.pooled(np.stack(two)) == pytest.approx([0.425, 0.575, 0.0], abs=1e-6)


def shared(*, rank: int, ranks: int, data: Path, split: str) -> list[str]:
    from types import SimpleNamespace

    asked = Actions(classes=2, rate_hz=RATE_HZ, views=("plain",), test_views=(2, 3))
    evaluation = SimpleNamespace(data=data, max_bad_share=0.0)
    part = {"clip": (FRAMES, 32, 32), "rank": rank, "ranks": ranks}
    return share_of(asked, "actions", split, evaluation, Pixels(), **part)[2]


def test_only_validation_videos_come_in_test_views(data: Path) -> None:
    assert len(run(shared, ranks=1, data=data, split="train")) == 3
    assert len(run(shared, ranks=2, data=data, split="val")) == 12  # two of three videos on the first rank
