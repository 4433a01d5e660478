"""Several views of a validation video, judged together."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scaling4d import benchmarks
from scaling4d.benchmarks import kinetics, ssv2
from scaling4d.encoders.features import Pixels
from scaling4d.readout.split import Share, judged, measured, reread
from scaling4d.readout.tasks.actions import Actions
from scaling4d.records import Sample
from scaling4d.training.distributed import run

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
    targets = [{"action": np.int64(n)} for n in (1, 1, 2, 2)]
    assert measured(asked, list(zip([sure, unsure, sure, unsure], targets, strict=True))) == [
        {"top1": (1.0, 1.0)},
        {"top1": (0.0, 1.0)},
    ]
    loud = np.array([30.0, 0.0, 0.0])  # logits would be outvoted by it; probabilities are not
    two = [np.log([0.45, 0.55, 1e-9]), np.log([0.4, 0.6, 1e-9])]
    assert measured(asked, list(zip([loud, *two, two[0]], targets, strict=True)))[1] == {"top1": (0.0, 1.0)}
    assert asked.pooled(np.stack(two)) == pytest.approx([0.425, 0.575, 0.0], abs=1e-6)


def shared(*, rank: int, ranks: int, data: Path, split: str) -> Share:
    asked = Actions(classes=2, rate_hz=RATE_HZ, views=("plain",), test_views=(2, 3))
    return Share(
        "actions", split, asked, SimpleNamespace(data=data, max_bad_share=0.0, kept_clips=9), (FRAMES, 32, 32), rank, ranks
    )


def learned(**where: object) -> int:
    return len(reread(shared(split="train", **where)))


def passes(**where: object) -> tuple[int, list[str], list[dict]]:
    """How many clips a readout sees of a rank's validation videos, in batches that do not hold whole numbers of videos."""
    seen = []

    def says(pixels: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(len(pixels))
        return torch.eye(2)[target["action"]]

    videos, sums, _ = judged(shared(split="val", **where), Pixels(), says, size=4)
    return sum(seen), videos, sums


def test_only_validation_videos_come_in_test_views(data: Path) -> None:
    assert run(learned, ranks=1, data=data) == 3
    clips, videos, sums = run(passes, ranks=2, data=data)
    assert clips == 12 and videos == ["ABCDEFGHIJ1", "ABCDEFGHIJ3"]  # two of three videos on the first rank
    assert sums == [{"top1": (1.0, 1.0)}] * 2
