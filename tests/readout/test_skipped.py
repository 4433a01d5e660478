"""What a readout does with damaged and missing samples."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from scaling4d import config
from scaling4d.benchmarks import perception_test, ssv2
from scaling4d.benchmarks.skipped import Skipped
from scaling4d.encoders.features import Pixels
from scaling4d.pretrain.point import baseline
from scaling4d.readout.split import Share, judged, reread, write_skipped
from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.tasks.points import Points
from scaling4d.readout.train import readout
from scaling4d.records import Sample, UserError
from scaling4d.training.distributed import gather, run

ASKED = Actions(classes=2, rate_hz=8.0, views=("plain", "mirrored"), test_views=(1, 1))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight videos, of which two are broken."""
    grey = np.full((6, 32, 32, 3), 99, np.uint8)
    written = [Sample(name, name, grey, {"action": np.int64(n % 2)}) for n, name in enumerate("abcdefgh")]
    templates = ("Holding [something]", "Moving [something]")
    ssv2.write(tmp_path / "ssv2", "train", written, templates=templates, rate_hz=8.0, crf=40, gop=6)
    for name in "cf":
        (tmp_path / f"ssv2/20bn-something-something-v2/{name}.webm").write_bytes(b"no video")
    return tmp_path


def shared(*, rank: int, ranks: int, data: Path, share: float) -> tuple[int, list[str], list[Skipped]]:
    evaluation = SimpleNamespace(data=data, max_bad_share=share, kept_clips=3)
    part = Share("actions", "train", ASKED, evaluation, (6, 32, 32), rank, ranks)
    lessons = reread(part)
    return len(lessons), [lessons.samples.items[place.item]["id"] for place in lessons.places], part.all_skipped()


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_knows_what_all_of_them_skipped(data, ranks):
    inputs, videos, skipped = run(shared, ranks=ranks, data=data, share=0.25)
    assert inputs == len(videos) and videos == {1: list("aabbddeegghh"), 2: list("aaeegg")}[ranks]
    assert sorted(item.id for item in skipped) == ["c", "f"] and all(item.bad for item in skipped)


@pytest.mark.parametrize("ranks", [1, 2])
def test_more_than_the_set_share_stops_with_the_list(data, ranks):
    with pytest.raises(UserError, match=r"actions train: 2 of 8 samples are damaged or missing.* = 0.2; .*The first: c: .*; f: "):
        run(shared, ranks=ranks, data=data, share=0.2)


def test_skipped_samples_are_written_only_if_there_are_any(tmp_path):
    write_skipped(tmp_path, train=[], val=[])
    assert list(tmp_path.iterdir()) == []
    write_skipped(tmp_path, train=[], val=[Skipped("a", "broken", True)])
    assert json.loads((tmp_path / "skipped.json").read_text()) == [{"split": "val", "id": "a", "why": "broken", "bad": True}]


def point_videos(root: Path) -> Path:
    """Four videos of 12 frames, in which a track appears in frame 0, 3 and 5; the last video is broken."""
    seen = np.arange(12) >= np.array([0, 3, 5])[:, None]
    points = np.full((3, 12, 2), 0.5, np.float32)
    grey = np.full((12, 32, 32, 3), 99, np.uint8)
    written = [Sample(f"video_{n}", f"video_{n}", grey, {"points": points}, {"points": seen}) for n in range(4)]
    for split in ("train", "val"):
        perception_test.write(root / "perception_test", split, written, rate_hz=8.0, crf=40, gop=6)
    (root / "perception_test/videos/video_3.mp4").write_bytes(b"no video")
    return root


def points_of(*, rank: int, ranks: int, split: str, queries: str, data: Path, share: float) -> Share:
    asked = Points(tracks=4, tiles=1, rate_hz=8.0, views=("plain", "mirrored"), certain=True, relative=False, queries=queries)
    evaluation = SimpleNamespace(data=data, max_bad_share=share, kept_clips=3)
    return Share("points", split, asked, evaluation, (6, 32, 32), rank, ranks)


def learned_points(**where: object) -> int:
    return sum(gather([len(reread(points_of(split="train", **where)))]))


def judged_points(**where: object) -> tuple[list[int], list[str], list[Skipped]]:
    part, asked = points_of(split="val", **where), []

    def says(pixels: Tensor, target: dict[str, Tensor]) -> Tensor:
        asked.extend(target["asked"].sum(1).tolist())
        return torch.zeros(*target["visible"].shape, 4)

    videos, sums, _ = judged(part, Pixels(), says, size=2)
    assert len(sums) == len(videos)
    return asked, gather(videos), part.all_skipped()


def test_points_are_measured_where_the_setting_asks_and_trained_in_frame_0(tmp_path):
    where = {"data": point_videos(tmp_path), "share": 0.25, "ranks": 2}
    asked, videos, skipped = run(judged_points, queries="first", **where)
    assert sorted(videos) == [f"video_{n}" for n in range(3) for _ in range(3)]
    assert asked == [1] * 6  # of the first rank: two videos with a clip a track
    assert [item.id for item in skipped] == ["video_3"]
    assert len(run(judged_points, queries="frame_0", **where)[1]) == 3
    assert run(learned_points, queries="first", **where) == 6  # three videos in two views


def test_a_video_that_gives_several_clips_is_one_when_bad_ones_are_counted(tmp_path):
    with pytest.raises(UserError, match="points val: 1 of 4 samples are damaged or missing"):
        run(judged_points, ranks=2, queries="first", data=point_videos(tmp_path), share=0.2)


def test_a_rank_that_hangs_in_a_readout_is_named(
    project: Path, changed: Callable, actions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline("untrained_nano", config.read())
    changed("readout.shared.Evaluation.ranks", 2)
    monkeypatch.setattr(ssv2, "_sample", lambda *_, **__: time.sleep(600))
    with pytest.raises(UserError, match="ranks? .* of 2 .* the start"):
        readout("untrained_nano", "actions", "frozen", changed("readout.shared.Evaluation.hang_s", 0.5))
