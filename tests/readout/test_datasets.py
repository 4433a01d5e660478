"""A benchmark's split on several ranks: training batches, evaluation, and samples that are left out."""

import json
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scaling4d import config, seeds
from scaling4d.benchmarks import perception_test, ssv2
from scaling4d.benchmarks.samples import Samples, SkippedItem
from scaling4d.encoders.features import MemoryFeatures
from scaling4d.encoders.stage import baseline
from scaling4d.readout.data import ClipDataset, FeatureDataset, RankSplit, evaluate, held_out_videos, shuffled_batch
from scaling4d.readout.protocols import Frozen
from scaling4d.readout.stage import readout
from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.tasks.points import Points
from scaling4d.records import Sample, UserError
from scaling4d.training.distributed import gather_round_robin, run

pytestmark = pytest.mark.integration

VIDEOS, CLIP = 8, (4, 16, 16)
TEMPLATES = ("Holding [something]", "Moving [something]", "Turning [something]")
TASKS = {
    "actions": Actions(classes=3, rate_hz=8.0, views=("plain", "mirrored"), test_views=(2, 3)),
    "points": Points(tracks=2, rate_hz=8.0, views=("plain", "mirrored"), certain=True, relative=True, queries_at="first"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos of actions and of points; video n has n + 1 tracks, at most five, the first three from frame 0."""
    root, rng, encoding = (
        tmp_path_factory.mktemp("benchmarks"),
        seeds.numpy_rng(0, "videos"),
        {"rate_hz": 8.0, "crf": 20, "gop": 6},
    )
    for split in ("train", "val"):
        actions, points = [], []
        for n in range(VIDEOS):
            pixels, tracks = rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8), min(n + 1, 5)
            actions.append(Sample(f"v{n}", f"v{n}", pixels, {"action": np.int64(n % 3)}))
            places = rng.uniform(0.2, 0.8, (tracks, 10, 2)).astype(np.float32)
            seen = np.arange(10) >= np.array([0, 0, 0, 3, 4])[:tracks, None]
            points.append(Sample(f"v{n}", f"v{n}", pixels, {"points": places}, {"points": seen}))
        ssv2.write(root / "ssv2", split, actions, templates=TEMPLATES, **encoding)
        perception_test.write(root / "perception_test", split, points, **encoding)
    return root


@pytest.fixture
def broken(data: Path) -> Iterator[Path]:
    """The same, with two broken videos of actions and one of points."""
    paths = [data / f"ssv2/20bn-something-something-v2/v{n}.webm" for n in (2, 5)]
    paths.append(data / "perception_test/videos/v7.mp4")
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"no video")
    yield data
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)


def part(task: str, split: str, *, rank: int, ranks: int, data: Path, items: int = 0, max_bad_share: float = 0.0) -> RankSplit:
    return RankSplit(task, split, items, TASKS[task], data, max_bad_share, CLIP, rank, ranks)


def batches(*, kept: int | None, **where: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Of clips, of which some stay in memory, or (None) of their pixels as features."""
    if kept is None:
        train_set = FeatureDataset(part(split="train", **where), MemoryFeatures(torch.clone))
    else:
        train_set = ClipDataset(part(split="train", **where), kept)
        assert len(train_set.kept) == min(kept, len(train_set))
    return [train_set.batch(shuffled_batch(step, 4, len(train_set), 0, where["rank"])) for step in range(4)]


@pytest.mark.parametrize("task", list(TASKS))
def test_clips_that_are_read_again_or_encoded_are_those_that_stay_in_memory(data: Path, task: str) -> None:
    few, features, every = (run(batches, ranks=2, task=task, data=data, kept=kept) for kept in (2, None, 1000))
    for some in (few, features):
        for (pixels, target), (kept_pixels, kept_target) in zip(some, every, strict=True):
            assert pixels.shape == (4, *CLIP, 3) and torch.equal(pixels.byte(), kept_pixels) and pixels.float().std() > 10
            assert target.keys() == kept_target.keys()
            assert all(torch.equal(target[name], kept_target[name]) for name in target)


def test_batches_are_shuffled_passes_that_depend_on_seed_rank_and_step_alone() -> None:
    indices = [index for step in range(6) for index in shuffled_batch(step, 4, 8, 0, 0)]
    assert [sorted(indices[start : start + 8]) for start in (0, 8, 16)] == [list(range(8))] * 3 and indices[:8] != indices[8:16]
    assert shuffled_batch(5, 4, 8, 0, 0) == indices[20:]
    assert len({tuple(shuffled_batch(0, 8, 100, seed, rank)) for seed in (0, 1) for rank in (0, 1)}) == 4


def held_out_clips(**where: Any) -> tuple[list[int], list[int], int]:
    train_set = FeatureDataset(part("actions", "train", **where), MemoryFeatures(torch.clone))
    return train_set.held_out, train_set.trained_on, len(train_set)


def test_all_views_of_a_held_out_video_are_held_out_and_every_other_clip_is_trained_on(data: Path) -> None:
    held_out, trained_on, clips = run(held_out_clips, ranks=1, data=data)  # one of eight videos, in two views
    assert len(held_out) == 2 and held_out[0] % 2 == 0 and held_out[1] == held_out[0] + 1
    assert sorted(held_out + trained_on) == list(range(clips))


def test_held_out_videos_are_a_tenth_at_least_one_and_alike_on_any_ranks_and_in_any_order() -> None:
    names = [f"video {number}" for number in range(200)]

    def chosen(*, rank: int, ranks: int, count: int = 200) -> set[str]:
        return held_out_videos([*names[:count][rank::ranks]] * 2)

    alone = run(chosen, ranks=1)
    assert len(alone) == 20 and run(chosen, ranks=2) == alone and len(run(chosen, ranks=1, count=3)) == 1
    assert len({int(name.split()[1]) % 8 for name in alone}) == 8  # not of a few places alone


def usable_items(*, items: int = 0, **where: Any) -> tuple[list[str], list[SkippedItem]]:
    """Item of each training clip of all ranks, in order, and what all of them skipped."""
    split = part("actions", "train", items=items, **where)
    train_set = ClipDataset(split, 3)
    ids = [train_set.samples.items[item]["id"] for item, _, view in train_set.places if view == "plain"]
    assert len(train_set) == 2 * len(ids)
    return gather_round_robin(ids), gather_round_robin(split.skipped)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("items", "numbers"), [(0, range(8)), (3, (0, 2, 5)), (6, (0, 1, 2, 4, 5, 6)), (8, range(8)), (99, range(8))]
)
def test_ranks_share_the_items_that_the_setting_spreads_over_a_split(data: Path, ranks: int, items: int, numbers: Any) -> None:
    ids, _ = run(usable_items, ranks=ranks, items=items, data=data)
    assert ids == [f"v{n}" for n in numbers]


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_samples_are_left_out_up_to_the_share_that_the_setting_allows(broken: Path, ranks: int) -> None:
    ids, skipped = run(usable_items, ranks=ranks, data=broken, max_bad_share=0.25)
    assert sorted(ids) == [f"v{n}" for n in (0, 1, 3, 4, 6, 7)]
    assert sorted(item.id for item in skipped) == ["v2", "v5"] and all(item.bad for item in skipped)
    message = r"actions train: 2 of 8 samples are damaged or missing.* = 0.2; .*The first: v2: .*; v5: "
    with pytest.raises(UserError, match=message):
        run(usable_items, ranks=ranks, data=broken, max_bad_share=0.2)


def test_more_ranks_than_samples_are_refused(data: Path) -> None:
    with pytest.raises(UserError, match="^actions: too few samples in split train for 3 ranks; lower readout.Evaluation.ranks$"):
        run(usable_items, ranks=3, items=2, data=data)


def test_a_clip_that_is_gone_when_its_turn_comes_stops_the_training(broken: Path) -> None:
    def read_late(*, rank: int, ranks: int) -> None:
        train_set = ClipDataset(part("actions", "train", rank=rank, ranks=ranks, data=broken, max_bad_share=0.5), 0)
        (broken / "ssv2/20bn-something-something-v2/v0.webm").rename(broken / "gone")
        try:
            train_set.batch([0])
        finally:
            (broken / "gone").rename(broken / "ssv2/20bn-something-something-v2/v0.webm")

    with pytest.raises(UserError, match="needed 20bn-something-something-v2/v0.webm"):
        run(read_late, ranks=1)


def test_a_readout_lists_the_samples_that_it_left_out(changed: Callable, actions: None) -> None:
    baseline("untrained_nano", config.read())
    Path("data/benchmarks/ssv2/20bn-something-something-v2/val3.webm").write_bytes(b"no video")
    readout("untrained_nano", "actions", "frozen", changed("readout.Evaluation.max_bad_share", 0.2))
    rows = json.loads(Path("artifacts/smoke/readout/untrained_nano/actions/frozen/skipped.json").read_text())
    assert [(row["split"], row["id"], row["bad"]) for row in rows] == [("val", "val3", True)]


def test_a_linear_probe_beside_a_frozen_readout_is_alike_on_any_number_of_ranks(changed: Callable, actions: None) -> None:
    baseline("untrained_nano", config.read())
    shares = []
    for ranks in (1, 2):
        result = readout("untrained_nano", "actions", "frozen", changed("readout.Evaluation.ranks", ranks))
        shares.append(result.others["top1_linear"])
    assert shares[0] == shares[1] >= 2 / 8  # it tells brighter from darker, as the eight classes are, in turn


def test_a_frozen_readout_says_where_its_held_out_loss_was_lowest(changed: Callable, actions: None) -> None:
    baseline("untrained_nano", config.read())
    recipe = {"steps": 40, "batch": 2, "patience": 8}
    settings = config.read()
    settings["readout"]["frozen"]["actions"]["Frozen"] |= recipe
    readout("untrained_nano", "actions", "frozen", settings)
    folder = Path("artifacts/smoke/readout/untrained_nano/actions/frozen")
    lines = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, lines[-1]["step"] + 1)) and lines[-1]["step"] <= 40
    losses = [line["held_out_loss"] for line in lines]
    assert len(losses) == 40 or losses.index(min(losses)) == len(losses) - 9  # eight steps without a lower one


def test_a_frozen_readout_in_bfloat16_is_built_once(changed: Callable, actions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """j's encoder is 86 GB in float32."""
    build, built = Frozen.build, Path("built.txt")

    def noted(self: Frozen, *given: object) -> torch.nn.Module:
        with built.open("a") as file:
            file.write("once\n")
        return build(self, *given)

    baseline("untrained_nano", config.read())
    monkeypatch.setattr(Frozen, "build", noted)
    settings = changed("readout.Compute.compute", "bfloat16")
    readout("untrained_nano", "actions", "frozen", settings)
    assert built.read_text() == "once\n" * settings["readout"]["Evaluation"]["ranks"]


def evaluated_actions(*, rank: int, ranks: int, data: Path) -> tuple[list[int], list[int], list[str], list[dict]]:
    """Sizes of batches, clips in memory at each prediction, videos, and sums; the predictions are right."""
    clips, alive, sizes = [], [], []

    def encode(batch: list[Tensor]) -> Tensor:
        clips.extend(map(weakref.ref, batch))
        return torch.stack(batch)

    def predict(pixels: Tensor, target: dict[str, Tensor]) -> Tensor:
        alive.append(sum(clip() is not None for clip in clips))
        sizes.append(len(pixels))
        return torch.eye(3)[target["action"]]

    videos, sums, _ = evaluate(part("actions", "val", rank=rank, ranks=ranks, data=data), encode, predict, size=4)
    return sizes, alive, videos, sums


def test_a_split_is_evaluated_in_batches_with_no_other_clip_in_memory_and_each_video_once(data: Path) -> None:
    sizes, alive, videos, sums = run(evaluated_actions, ranks=2, data=data)
    assert sum(sizes) == 4 * 6 and max(sizes) == 4  # a rank's videos in 2 x 3 views, in batches that cut through videos
    assert max(alive) <= 2 * 4  # the batch, and the last one until the next is there
    assert videos == ["v0", "v2", "v4", "v6"] and sums == [{"top1": (1.0, 1.0)}] * 4


def test_views_of_a_video_are_pooled_by_the_mean_of_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [np.log([0.45, 0.55, 1e-9]), np.log([0.4, 0.6, 1e-9])]
    assert TASKS["actions"].pool(np.stack(two)) == pytest.approx([0.425, 0.575, 1e-9], rel=1e-5)
    loud, quiet = np.array([30.0, 0.0, 0.0]), np.log([0.1, 0.9, 1e-9])  # by its logit, the loud one would outvote five
    predictions = iter(torch.from_numpy(np.stack([loud, *[quiet] * 5, *[loud] * 6])).split(4))
    clip = Sample("s", "v", np.zeros((*CLIP, 3), np.uint8), {"action": np.int64(1)})
    monkeypatch.setattr(RankSplit, "samples", lambda _: Samples(range(2), lambda item: [clip] * 6, str, 2, ""))

    def pooled(**where: int) -> list[dict]:
        return evaluate(part("actions", "val", data=Path(), **where), torch.stack, lambda *_: next(predictions), size=4)[1]

    assert run(pooled, ranks=1) == [{"top1": (1.0, 1.0)}, {"top1": (0.0, 1.0)}]


def learned_tracks(**where: Any) -> list[int]:
    train_set = ClipDataset(part("points", "train", **where), 0)
    return train_set.batch(range(len(train_set)))[1]["queried"].sum(1).tolist()


def evaluated_tracks(**where: Any) -> tuple[list[int], list[str], list[SkippedItem]]:
    """Numbers of tracks of each clip on this rank, videos of all ranks, and what was skipped."""
    split, tracks = part("points", "val", **where), []

    def predict(pixels: Tensor, target: dict[str, Tensor]) -> Tensor:
        tracks.extend(target["queried"].sum(1).tolist())
        return torch.zeros(*target["visible"].shape, 4)

    videos, sums, _ = evaluate(split, torch.stack, predict, size=2)
    assert [clip["occlusion_accuracy"][1] for clip in sums] == [3 * count for count in tracks]  # of four frames, one is given
    return tracks, gather_round_robin(videos), gather_round_robin(split.skipped)


def test_all_points_are_evaluated_in_their_first_frames_and_as_many_learned_in_frame_0_as_the_setting_says(broken: Path) -> None:
    where = {"data": broken, "max_bad_share": 0.2}
    tracks, videos, skipped = run(evaluated_tracks, ranks=2, **where)
    assert sorted(videos) == [f"v{n}" for n, clips in enumerate([1, 1, 1, 2, 3, 3, 3]) for _ in range(clips)]
    assert tracks == [1, 3, *[3, 1, 1] * 2]  # of the first rank: videos 0, 2, 4 and 6, a clip for each first frame
    assert [item.id for item in skipped] == ["v7"]
    assert run(learned_tracks, ranks=1, **where) == [1] * 2 + [2] * 2 * 6  # in two views
    with pytest.raises(UserError, match="points val: 1 of 8 samples are damaged or missing"):  # not 1 of 14 clips
        run(evaluated_tracks, ranks=2, data=broken, max_bad_share=0.1)


def test_a_rank_that_hangs_in_a_readout_is_named(changed: Callable, actions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline("untrained_nano", config.read())
    changed("readout.Evaluation.ranks", 2)
    monkeypatch.setattr(Samples, "by_index", lambda _: time.sleep(600))
    with pytest.raises(UserError, match="ranks? .* of 2 .* the start"):
        readout("untrained_nano", "actions", "frozen", changed("readout.Evaluation.start_s", 0.5))
