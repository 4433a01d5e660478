"""Windows in time, of every benchmark in its own layout: they cover a video, and labels move with the pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmarks.writers import (
    write_kinetics,
    write_movi,
    write_objects,
    write_realestate10k_frames,
    write_scannet_export,
    write_tapvid,
    write_tapvid_kinetics,
    write_waymo_v1,
)
from numbered import CLIP, H264, INTRINSICS, T, in_square, left_out, numbers, pictures, poses, read, refused, three_boxes

from scaling4d import seeds
from scaling4d.benchmarks import (
    kinetics,
    movi,
    perception_test,
    perception_test_objects,
    realestate10k,
    scannet,
    ssv2,
    tapvid,
    waymo,
)
from scaling4d.benchmarks.samples import ClipRequest, at_positions
from scaling4d.readout.data import RankSplit
from scaling4d.records import Sample

FRAMES = 24
NAME = "ABCDEFGHIJ1"
POINTS = seeds.numpy_rng(0, "points").uniform(0.3, 0.7, (3, FRAMES, 2)).astype(np.float32)
VISIBLE = np.arange(FRAMES) >= np.array([0, 0, 9])[:, None]
DEPTH_M, POSES, BOXES = np.linspace(0.5, 4, FRAMES * 16 * 16).reshape(FRAMES, 16, 16), poses(FRAMES), three_boxes(NAME, FRAMES)
BOXES.valid["boxes"][1, 4] = True  # of the first T frames it shows four: enough for a window of Waymo Open, not for an object
EVERYWHERE = (0.0, *seeds.numpy_rng(0, "positions").random(150).tolist(), 1.0)


@dataclass(frozen=True)
class Written:
    """A benchmark with one labelled video of FRAMES frames, of which it shows every `stride`-th or all.

    starts: frames in which a window may start. same: whether a sample's labels are those of the frames that it shows.
    """

    module: ModuleType
    write: Callable[[Path], None]
    same: Callable[[Sample, list[int]], bool]
    starts: Sequence[int] = range(FRAMES - T + 1)
    rate_hz: float = 8.0
    stride: int = 1
    split: str = "val"

    @property
    def random(self) -> ClipRequest:
        frames = T if self.stride == 1 else 4
        return replace(CLIP, windows="random", rate_hz=self.rate_hz, frames=frames)


def video_of(**labels: np.ndarray) -> Sample:
    return Sample(NAME, NAME, pictures(FRAMES), labels)


def same_action(sample: Sample, shown: list[int]) -> bool:
    return sample.labels["action"] == 1


def same_depth(sample: Sample, shown: list[int]) -> bool:
    depth = DEPTH_M[shown].repeat(2, 1).repeat(2, 2)
    cameras = np.allclose(sample.labels["camera_to_world"], POSES[shown], atol=1e-5)
    return cameras and np.abs(sample.labels["depth_m"] - depth).max() < 0.001


def same_pose(sample: Sample, shown: list[int]) -> bool:
    return np.allclose(sample.labels["camera_to_world"], POSES[shown], atol=1e-7)


def same_points(sample: Sample, shown: list[int]) -> bool:
    tracks = VISIBLE[:, shown[0]]
    seen = VISIBLE[tracks][:, shown]
    points = np.where(seen[..., None], POINTS[tracks][:, shown], 0)
    return np.array_equal(sample.valid["points"], seen) and np.allclose(sample.labels["points"], points, atol=2e-5)


def same_shuffled_points(sample: Sample, shown: list[int]) -> bool:
    order = np.lexsort(sample.labels["points"][:, 0].T)
    as_written = np.argsort(np.lexsort(POINTS[VISIBLE[:, shown[0]], shown[0]].T))
    labels, valid = ({"points": of["points"][order][as_written]} for of in (sample.labels, sample.valid))
    return same_points(replace(sample, labels=labels, valid=valid), shown)


def same_boxes(sample: Sample, shown: list[int], *, tracked: np.ndarray | None = None) -> bool:
    valid = BOXES.valid["boxes"][:, shown]
    tracks = valid[:, 0] & (valid.mean(1) >= 0.7 if tracked is None else tracked)
    boxes = in_square(BOXES.labels["boxes"])[tracks][:, shown].clip(0, 1)
    where = valid[tracks]
    same = np.array_equal(sample.valid["boxes"], where)
    return same and np.allclose(sample.labels["boxes"][where], boxes[where], atol=2e-5)


def scene(root: Path) -> Sample:
    root.mkdir(exist_ok=True)
    labels = {"depth_m": DEPTH_M, "camera_to_world": POSES, "intrinsics": INTRINSICS}
    return Sample("scene0003_01", "scene0003", pictures(FRAMES), labels)


POINTS_OF = Sample(NAME, NAME, pictures(FRAMES), {"points": POINTS}, {"points": VISIBLE})
WRITTEN = {
    "ssv2": Written(
        ssv2,
        lambda root: ssv2.write(
            root, "val", [video_of(action=np.int64(1))], templates=("Holding [something]", "Moving [something]"), **H264
        ),
        same_action,
    ),
    "kinetics": Written(
        kinetics,
        lambda root: [
            write_kinetics(root, split, [video_of(action=np.int64(1))], labels=("hold", "move"), **H264)
            for split in ("train", "val")
        ],
        lambda sample, shown: sample.labels["action"] == 0,  # the only class of the list
    ),
    "sens": Written(
        scannet,
        lambda root: scannet.write(root, "val", [scene(root)], rate_hz=30.0, jpeg_quality=95),
        same_depth,
        range(9),
        6.0,
        5,
    ),
    "SensReader's export": Written(
        scannet, lambda root: write_scannet_export(root, scene(root), "SensReader's export"), same_depth, range(9), 6.0, 5
    ),
    "mmdet3d's posed_images": Written(
        scannet, lambda root: write_scannet_export(root, scene(root), "mmdet3d's posed_images"), same_depth, range(9), 6.0, 5
    ),
    "waymo": Written(
        waymo, lambda root: waymo.write(root, "val", [BOXES], rate_hz=10.0, jpeg_quality=95), same_boxes, range(0, 19, 3), 10.0
    ),
    "waymo v1": Written(
        waymo, lambda root: write_waymo_v1(root, "val", BOXES, rate_hz=10.0, jpeg_quality=95), same_boxes, range(0, 19, 3), 10.0
    ),
    "realestate10k": Written(
        realestate10k,
        lambda root: realestate10k.write(root, "val", [video_of(camera_to_world=POSES, intrinsics=INTRINSICS)], **H264),
        same_pose,
    ),
    "realestate10k's frames": Written(
        realestate10k,
        lambda root: write_realestate10k_frames(
            root, "val", video_of(camera_to_world=POSES, intrinsics=INTRINSICS), rate_hz=H264["rate_hz"]
        ),
        same_pose,
    ),
    "perception_test": Written(
        perception_test, lambda root: perception_test.write(root, "val", [POINTS_OF], **H264), same_points
    ),
    "perception_test_objects": Written(
        perception_test_objects,
        lambda root: write_objects(root, "val", [BOXES], **H264),
        lambda sample, shown: same_boxes(sample, shown, tracked=np.ones(3, bool)),
    ),
    "tapvid": Written(tapvid, lambda root: write_tapvid(root, [POINTS_OF]), same_points, rate_hz=25.0),
    "tapvid's shards": Written(
        tapvid, lambda root: write_tapvid_kinetics(root, [POINTS_OF], shards=1), same_points, rate_hz=25.0
    ),
    "movi": Written(movi, lambda root: write_movi(root, [POINTS_OF]), same_shuffled_points, rate_hz=12.0, split="train"),
}


@pytest.fixture(params=list(WRITTEN))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    one = WRITTEN[request.param]
    one.write(tmp_path)
    return one


def windows(written: Written, root: Path, positions: Sequence[float] | None, **changes) -> list[Sample]:
    """The windows of the only video."""
    samples = written.module.open_split(root, written.split, replace(written.random, **changes))
    (video,) = replace(samples, positions=positions and (lambda _: positions)).by_index()
    return video[1]


def test_random_windows_cover_a_video_and_their_labels_are_of_the_frames_that_they_show(written: Written, tmp_path: Path) -> None:
    samples, firsts, covered = windows(written, tmp_path, EVERYWHERE), set(), set()
    assert len(samples) == len(EVERYWHERE)
    for sample in samples:
        shown = numbers(sample.pixels)
        assert shown == [shown[0] + n * written.stride for n in range(len(shown))]
        assert written.same(sample, shown)
        firsts.add(shown[0])
        covered.update(shown)
    assert firsts == set(written.starts) and covered == set(range(FRAMES))
    assert numbers(samples[0].pixels)[0] == 0 and numbers(samples[-1].pixels)[-1] == FRAMES - 1


def test_windows_of_an_epoch_are_drawn_by_seed_and_epoch_alone(written: Written, tmp_path: Path) -> None:
    def drawn(seed: int, epochs: Sequence[int]) -> list[int]:
        samples = written.module.open_split(tmp_path, written.split, written.random)
        split = RankSplit("", written.split, 0, None, tmp_path, 0.0, (T, 32, 32), 0, 1, windows_seed=seed)
        ((_, video),) = replace(samples, positions=lambda item: [split.position(item, e) for e in epochs]).by_index()
        return [numbers(sample.pixels)[0] for sample in video]

    windows = drawn(0, range(150))
    assert {*written.starts[:-1]} <= {*windows} <= {*written.starts}  # a last one of webm is at position 1 alone
    assert drawn(0, [5, 4, 3]) == windows[5:2:-1] and drawn(0, range(12)) == windows[:12] != drawn(1, range(12))


def test_a_test_takes_the_middle_window_or_even_ones_from_the_start_to_the_end(written: Written, tmp_path: Path) -> None:
    last = written.starts[-1]
    (middle,) = windows(written, tmp_path, None)
    assert numbers(middle.pixels)[0] == pytest.approx(last / 2, abs=1.5)
    firsts = [numbers(sample.pixels)[0] for sample in windows(written, tmp_path, None, views=(3, 1))]
    assert firsts == [0, numbers(middle.pixels)[0], last]


def test_first_windows_are_those_of_position_0(written: Written, tmp_path: Path) -> None:
    (first,) = windows(written, tmp_path, None, windows="first")
    (zero,) = windows(written, tmp_path, [0.0])
    assert first.id == zero.id and np.array_equal(first.pixels, zero.pixels)
    assert written.module is waymo or written.same(first, numbers(first.pixels))


def test_a_video_that_is_too_short_is_padded_or_refused_as_with_first_windows(written: Written, tmp_path: Path) -> None:
    long = {"frames": 2 * FRAMES}
    if written.module in (ssv2, kinetics):
        firsts = [windows(written, tmp_path, [0.7], **long), windows(written, tmp_path, None, windows="first", **long)]
        assert np.array_equal(firsts[0][0].pixels, firsts[1][0].pixels)
        return
    for request in (replace(written.random, **long), replace(written.random, windows="first", **long)):
        refused("lower frames or raise rate_hz", written.module, tmp_path, written.split, request)


def test_each_start_has_an_equal_share_of_the_positions() -> None:
    firsts = at_positions(range(5), np.arange(100) / 100)
    assert np.bincount(firsts).tolist() == [20] * 5
    assert at_positions([3, 7], [0.0, 1.0]) == [3, 7] and at_positions([], [0.5]) == []


# ---- rules of one benchmark ----


def drive(root: Path, *present: np.ndarray, side: float = 0.2, split: str = "val") -> None:
    """Objects of Waymo Open at one place, each in its frames."""
    boxes = np.tile(np.array([0.4, 0.4, 0.4 + side, 0.4 + side], np.float32), (len(present), len(present[0]), 1))
    sample = Sample("1_2", "1_2", pictures(len(present[0]), height=32, width=48), {"boxes": boxes}, {"boxes": np.stack(present)})
    waymo.write(root, split, [sample], rate_hz=10.0, jpeg_quality=95)


@pytest.mark.parametrize(("missing", "fits"), [
    ((), True),
    ((3, 4, 5, 12, 13, 14), True),  # 14 of 20 frames
    (range(3, 7), True),  # a gap of five frames, from frame 2 to frame 7
    (range(3, 8), False),  # of six
    (range(16, 20), True),  # of five, to the end
    (range(15, 20), False),  # of six
    ((3, 5, 7, 9, 11, 13, 15), False),  # 13 of 20 frames
    ((0,), False),  # not given
])  # fmt: skip
def test_waymo_objects_of_random_windows_are_present_in_most_frames_without_long_gaps(tmp_path, missing, fits) -> None:
    present = np.ones(20, bool)
    present[list(missing)] = False
    drive(tmp_path, present)
    request = replace(CLIP, frames=20, rate_hz=10.0, windows="random")
    skipped = left_out(waymo, tmp_path, "val", request)
    assert [bad for _, bad, _ in skipped] == ([] if fits else [False])
    first = left_out(waymo, tmp_path, "val", replace(request, windows="first"))
    assert bool(first) == (0 in missing)  # the rules are of random windows


@pytest.mark.parametrize("split", ["train", "val"])
def test_waymo_random_windows_with_more_than_25_objects_are_left_out(tmp_path, split) -> None:
    for objects in (25, 26):
        drive(tmp_path, *[np.ones(16, bool)] * objects, split=split)
        request = replace(CLIP, frames=16, rate_hz=10.0, windows="random")
        skipped = left_out(waymo, tmp_path, split, request)
        assert [bad for _, bad, _ in skipped] == [False] * (objects - 25)
        assert not skipped or "that has 1 to 25 such objects" in skipped[0][2]
        (first,) = read(waymo, tmp_path, split, replace(request, windows="first"))  # the rules are of random windows
        assert len(first.labels["boxes"]) == objects


def test_waymo_objects_that_are_too_small_do_not_count_among_25(tmp_path) -> None:
    drive(tmp_path, *[np.ones(16, bool)] * 26, side=0.05)  # of 48 x 32 pixels: less than 0.5 % of the square
    small = pq.ParquetFile(tmp_path / "validation/camera_box/1_2.parquet").read().to_pylist()
    drive(tmp_path, np.ones(16, bool))
    boxes = tmp_path / "validation/camera_box/1_2.parquet"
    large = pq.ParquetFile(boxes).read()
    rows = large.to_pylist() + [{**row, waymo.OBJECT: f"small {row[waymo.OBJECT]}"} for row in small]
    pq.write_table(pa.Table.from_pylist(rows, large.schema), boxes)
    (sample,) = read(waymo, tmp_path, "val", replace(CLIP, frames=16, rate_hz=10.0, windows="random"))
    assert len(sample.labels["boxes"]) == 1


@pytest.mark.parametrize(("missing", "objects"), [
    (((1, 2, 3), (13, 14, 15)), 2),  # 13 of 16 frames each, 10 together
    (((1, 2, 3, 4), (13, 14, 15)), 0),  # 9 together
    (((), (11, 12, 13, 14, 15)), 1),  # 11 together; the second is in fewer than 70 %
    (((), (9, 10, 11, 12, 13, 14, 15)), 0),  # the first one would do, and the window is left out
    (((), (0, 9, 10, 11, 12, 13, 14, 15)), 1),  # the second is no object of the first frame
])  # fmt: skip
@pytest.mark.parametrize("split", ["train", "val"])
def test_waymo_random_windows_whose_first_objects_do_not_share_10_of_16_frames_are_left_out(
    tmp_path, split, missing, objects
) -> None:
    drive(tmp_path, *[~np.isin(np.arange(16), frames) for frames in missing], split=split)
    request = replace(CLIP, frames=16, rate_hz=10.0, windows="random")
    samples = read(waymo, tmp_path, split, request)
    assert [len(sample.labels["boxes"]) for sample in samples] == [objects] * bool(objects)
    (first,) = read(waymo, tmp_path, split, replace(request, windows="first"))
    assert len(first.labels["boxes"]) == 2 - any(0 in frames for frames in missing)


def test_waymo_windows_without_an_object_are_not_drawn(tmp_path) -> None:
    present = np.zeros(FRAMES, bool)
    present[8:16] = True
    drive(tmp_path, present)
    written = replace(WRITTEN["waymo"], starts=[9])  # of 0, 3, ..., 18
    assert {numbers(sample.pixels)[0] for sample in windows(written, tmp_path, EVERYWHERE)} == {9}
    assert len(left_out(waymo, tmp_path, "val", replace(written.random, windows="first"))) == 1


def test_perception_test_windows_start_where_something_is_given(tmp_path) -> None:
    visible = np.zeros((1, FRAMES), bool)
    visible[0, [4, 11, 12]] = True
    sample = Sample("v", "v", pictures(FRAMES), {"points": POINTS[:1]}, {"points": visible})
    perception_test.write(tmp_path, "val", [sample], **H264)
    firsts = {numbers(s.pixels)[0] for s in windows(WRITTEN["perception_test"], tmp_path, EVERYWHERE)}
    assert firsts == {4, 11, 12}
    boxes = np.tile(np.array([0.4, 0.4, 0.6, 0.6], np.float32), (1, FRAMES, 1))
    seconds = np.arange(FRAMES)[None] % 4 == 1  # labelled now and then, as in the benchmark
    objects = Sample("v", "v", pictures(FRAMES), {"boxes": boxes}, {"boxes": seconds})
    write_objects(tmp_path / "objects", "val", [objects], **H264)
    samples = windows(WRITTEN["perception_test_objects"], tmp_path / "objects", EVERYWHERE)
    assert {numbers(s.pixels)[0] for s in samples} == {1, 5, 9, 13, 17}
    assert all(s.valid["boxes"].tolist() == [[True, False, False, False, True, False]] for s in samples)


def test_scannet_windows_without_a_measurement_give_way_to_the_ones_behind_them(tmp_path) -> None:
    depth = np.where(np.arange(FRAMES)[:, None, None] < 18, 0.0, DEPTH_M)
    labels = {"depth_m": depth, "camera_to_world": POSES, "intrinsics": INTRINSICS}
    sample = Sample("scene0003_01", "scene0003", pictures(FRAMES), labels)
    scannet.write(tmp_path, "val", [sample], rate_hz=8.0, jpeg_quality=95)
    request = replace(CLIP, windows="random")
    (sample,) = scannet.open_split(tmp_path, "val", request).at_index(0, [0.0])
    assert numbers(sample.pixels)[0] == 15 and sample.valid["depth_m"].any((1, 2)).tolist() == [False] * 3 + [True] * 3
    assert len(left_out(scannet, tmp_path, "val", CLIP)) == 1  # of first windows: by rule


def test_a_window_of_a_scene_whose_end_is_missing_is_bad_at_once(tmp_path) -> None:
    path = tmp_path / "scans/scene0003_01/scene0003_01.sens"
    scannet.write(tmp_path, "val", [scene(tmp_path)], rate_hz=8.0, jpeg_quality=95)
    path.write_bytes(path.read_bytes()[:-100])
    assert not left_out(scannet, tmp_path, "val", CLIP)
    ((_, bad, why),) = left_out(scannet, tmp_path, "val", replace(CLIP, windows="random"))
    assert bad and "is damaged: it ends inside frame 23 of 24" in why
