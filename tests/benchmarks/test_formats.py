"""Each benchmark's format: what is written is read back, and the traps of the real downloads."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling4d import seeds, video
from scaling4d.benchmarks import perception_test, realestate10k, scannet, ssv2, waymo
from scaling4d.benchmarks.frames import Crop
from scaling4d.records import Sample, UserError, write_json

T, SIDE = 6, 32
CLIP = {"frames": T, "rate_hz": 8.0, "side_px": SIDE}
H264 = {"rate_hz": 8.0, "crf": 5, "gop": 4}


def pictures(frames: int = T, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """uint8 `T H W 3`: grey, and brighter by 8 each frame, so that the number of a frame can be read off."""
    shade = 20 + 8 * np.arange(frames)
    return np.broadcast_to(shade[:, None, None, None], (frames, height, width, 3)).astype(np.uint8)


def numbers(pixels: np.ndarray) -> list[int]:
    return np.rint((pixels.mean((1, 2, 3)) - 20) / 8).astype(int).tolist()


def poses(frames: int, *, seed: int = 0) -> np.ndarray:
    rng = seeds.numpy(seed, "poses")
    result = np.tile(np.eye(4), (frames, 1, 1))
    result[:, :3, :3] = np.linalg.qr(rng.normal(size=(frames, 3, 3)))[0]
    result[:, :3, :3] *= np.linalg.det(result[:, :3, :3])[:, None, None]
    result[:, :3, 3] = rng.normal(size=(frames, 3))
    return result


INTRINSICS = np.array([[0.9, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]])


# ---------------------------------------------------------------- ssv2

TEMPLATES = ("Pushing [something] so that it falls, not slides", "[Something] falling like a feather", "Holding [something]")


def write_ssv2(root: Path, *, frames: int = T) -> None:
    samples = [Sample(str(n), str(n), pictures(frames), {"action": np.int64(n)}) for n in range(3)]
    ssv2.write(root, "train", samples, templates=TEMPLATES, **H264)


def test_ssv2_reads_back_and_only_the_brackets_leave_a_class_name(tmp_path):
    write_ssv2(tmp_path)
    names = ["Holding something", "Pushing something so that it falls, not slides", "Something falling like a feather"]
    assert ssv2.classes(tmp_path) == names
    assert json.loads((tmp_path / "labels/labels.json").read_text()) == {name: str(n) for n, name in enumerate(names)}
    samples = list(ssv2.read(tmp_path, "train", **CLIP))
    assert [int(sample.labels["action"]) for sample in samples] == [0, 1, 2]
    assert numbers(samples[0].pixels) == list(range(T))
    assert video.probe(tmp_path / "20bn-something-something-v2/0.webm").codec == "vp9"


def test_ssv2_says_what_an_action_is_in_a_mirror(tmp_path):
    templates = ("Pulling [something] from left to right", "Pulling [something] from right to left", "Moving [something] upright")
    samples = [Sample(str(n), str(n), pictures(T), {"action": np.int64(n)}) for n in range(3)]
    ssv2.write(tmp_path, "train", samples, templates=templates, **H264)
    names = ssv2.classes(tmp_path)
    in_mirror = [names[int(sample.labels["action_mirrored"])] for sample in ssv2.read(tmp_path, "train", **CLIP)]
    assert in_mirror == [names[0], names[2], names[1]]  # the only one without a counterpart stays itself


def test_ssv2_older_label_names_are_read_too(tmp_path):
    write_ssv2(tmp_path)
    for path in (tmp_path / "labels").glob("*.json"):
        path.rename(tmp_path / f"something-something-v2-{path.name}")
    assert ssv2.count(tmp_path, "train") == 3


def test_ssv2_a_short_video_goes_on_with_its_last_frame(tmp_path):
    write_ssv2(tmp_path, frames=4)
    assert numbers(next(ssv2.read(tmp_path, "train", **CLIP)).pixels) == [0, 1, 2, 3, 3, 3]


def test_ssv2_refuses_what_does_not_fit(tmp_path):
    write_ssv2(tmp_path)
    (tmp_path / "20bn-something-something-v2/1.webm").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 videos of train, the first is 1.webm"):
        ssv2.count(tmp_path, "train")
    write_json(tmp_path / "labels/train.json", [{"id": "0", "template": "Eating [something]"}])
    with pytest.raises(UserError, match="0 is 'Eating something', which labels.json does not list"):
        list(ssv2.read(tmp_path, "train", **CLIP))
    write_json(tmp_path / "labels/train.json", [{"id": "../0", "template": "Holding [something]"}])
    with pytest.raises(UserError, match="is not the name of a video"):
        ssv2.count(tmp_path, "train")
    (tmp_path / "labels/labels.json").write_text("{")
    with pytest.raises(UserError, match="labels.json is not JSON"):
        ssv2.classes(tmp_path)
    with pytest.raises(UserError, match=r"needed labels/validation.json \(or something-something-v2-validation.json\)"):
        ssv2.count(tmp_path, "val")


# ---------------------------------------------------------------- scannet


def write_scannet(root: Path, **changes) -> Sample:
    depth = np.linspace(0.5, 4, T * 16 * 16).reshape(T, 16, 16)
    labels = {"depth_m": depth, "camera_to_world": poses(T), "intrinsics": INTRINSICS} | changes
    sample = Sample("scene0003_01", "scene0003", pictures(), labels)
    scannet.write(root, "val", [sample], rate_hz=8.0, jpeg_quality=95)
    return sample


def test_scannet_reads_back_to_the_millimetre(tmp_path):
    written = write_scannet(tmp_path)
    (read,) = scannet.read(tmp_path, "val", **CLIP)
    assert (read.id, read.video) == ("scene0003_01", "scene0003")
    assert np.abs(read.labels["depth_m"] - written.labels["depth_m"].repeat(2, 1).repeat(2, 2)).max() <= 0.0005 + 1e-6
    assert np.allclose(read.labels["camera_to_world"], written.labels["camera_to_world"], atol=1e-6)
    assert read.valid["depth_m"].all() and read.valid["camera_to_world"].all()
    assert numbers(read.pixels) == list(range(T))


def test_scannet_file_has_the_layout_of_the_official_reader(tmp_path):
    """The official SensorData.py, field by field."""
    written = write_scannet(tmp_path)
    with (tmp_path / "scans/scene0003_01/scene0003_01.sens").open("rb") as file:
        take = lambda form: struct.unpack(form, file.read(struct.calcsize(form)))  # noqa: E731
        assert take("I") == (4,)
        file.read(take("Q")[0])
        color, _, depth, _ = (np.reshape(take("f" * 16), (4, 4)) for _ in range(4))
        assert (color[0, 0], color[0, 2]) == pytest.approx((0.9 * SIDE, SIDE / 2 - 0.5))
        assert (depth[1, 1], depth[1, 2]) == pytest.approx((0.9 * 16, 7.5))
        assert take("i") + take("i") == (2, 1)
        assert take("I") + take("I") + take("I") + take("I") == (SIDE, SIDE, 16, 16)
        assert take("f") + take("Q") == (1000.0, T)
        for t in range(T):
            assert np.allclose(np.reshape(take("f" * 16), (4, 4)), written.labels["camera_to_world"][t], atol=1e-6)
            stamp, _, color_bytes, depth_bytes = take("Q") + take("Q") + take("Q") + take("Q")
            assert stamp == 125_000 * t
            assert file.read(color_bytes)[:3] == b"\xff\xd8\xff"
            stored = np.frombuffer(zlib.decompress(file.read(depth_bytes)), "<u2").reshape(16, 16)
            assert np.array_equal(stored, np.rint(written.labels["depth_m"][t] * 1000))
        assert take("Q") == (0,) and file.read() == b""


def test_scannet_lost_tracking_spoils_the_pose_and_not_the_depth(tmp_path):
    lost = poses(T)
    lost[2] = -np.inf
    write_scannet(tmp_path, camera_to_world=lost)
    (read,) = scannet.read(tmp_path, "val", **CLIP)
    assert read.valid["camera_to_world"].tolist() == [True, True, False, True, True, True]
    assert read.valid["depth_m"].all()


def test_scannet_no_measurement_and_far_depth_are_not_valid(tmp_path):
    depth = np.full((T, 16, 16), 2.0)
    depth[:, 0, 0], depth[:, 0, 1], depth[:, 0, 2], depth[:, 0, 3] = 0, 10.5, 9.999, 70
    write_scannet(tmp_path, depth_m=depth)
    (read,) = scannet.read(tmp_path, "val", **CLIP)
    assert read.valid["depth_m"][0, 0, :10].tolist() == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 2
    assert read.valid["depth_m"][0, 1:].all(where=np.arange(SIDE) > 7)


def test_scannet_depth_follows_its_own_intrinsics(tmp_path):
    """A depth camera that sees half the angle: depth in the middle of the picture, none at its border."""
    write_scannet(tmp_path)
    path = tmp_path / "scans/scene0003_01/scene0003_01.sens"
    content = bytearray(path.read_bytes())
    at = 12 + len("scaling4d") + 2 * 64
    k = np.reshape(struct.unpack_from("<16f", content, at), (4, 4)).copy()
    k[0, 0] *= 2
    k[1, 1] *= 2
    struct.pack_into("<16f", content, at, *k.ravel())
    path.write_bytes(content)
    valid = next(scannet.read(tmp_path, "val", **CLIP)).valid["depth_m"][0]
    assert valid[8:24, 8:24].all() and valid.sum() == 16 * 16


def test_scannet_frames_are_taken_by_their_time_stamps(tmp_path):
    labels = {"depth_m": np.ones((30, 8, 8)), "camera_to_world": poses(30), "intrinsics": INTRINSICS}
    scannet.write(tmp_path, "train", [Sample("scene0000_00", "", pictures(30), labels)], rate_hz=30.0, jpeg_quality=95)
    read = next(scannet.read(tmp_path, "train", frames=7, rate_hz=8.0, side_px=SIDE))
    assert numbers(read.pixels) == [0, 3, 7, 11, 15, 18, 22]
    assert np.allclose(read.labels["camera_to_world"][3], labels["camera_to_world"][11], atol=1e-6)


def test_scannet_a_frame_is_not_stretched_over_the_end_of_its_scene(tmp_path):
    write_scannet(tmp_path)
    with pytest.raises(UserError, match="ends after 0.62 s, too early for 2 frames at 1.0 Hz"):
        next(scannet.read(tmp_path, "val", frames=2, rate_hz=1.0, side_px=SIDE))


def test_scannet_refuses_what_does_not_fit(tmp_path):
    write_scannet(tmp_path)
    path = tmp_path / "scans/scene0003_01/scene0003_01.sens"
    content = path.read_bytes()
    with pytest.raises(UserError, match="ends after 0.62 s, too early for 16 frames at 8.0 Hz; lower clip.frames"):
        next(scannet.read(tmp_path, "val", frames=16, rate_hz=8.0, side_px=SIDE))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="scene0003_01.sens is damaged"):
        next(scannet.read(tmp_path, "val", **CLIP))
    path.write_bytes(b"\x03" + content[1:])
    with pytest.raises(UserError, match="is a .sens file of version 3; needed 4"):
        next(scannet.read(tmp_path, "val", **CLIP))
    path.unlink()
    with pytest.raises(UserError, match="lacks 1 of 1 scenes of val, the first is scene0003_01"):
        scannet.count(tmp_path, "val")
    (tmp_path / "scannetv2_val.txt").write_text("scene0/../../x\n")
    with pytest.raises(UserError, match="which is not a scene such as scene0000_00"):
        scannet.count(tmp_path, "val")


# ---------------------------------------------------------------- realestate10k


def write_realestate10k(root: Path, *, clips: int = 1) -> list[Sample]:
    samples = []
    for n in range(clips):
        labels = {"camera_to_world": poses(T, seed=n), "intrinsics": INTRINSICS}
        samples.append(Sample(f"{n:016x}", "abc-DEF_123", pictures() + np.uint8(100 * n), labels))
    realestate10k.write(root, "val", samples, **H264)
    return samples


def test_realestate10k_reads_back_each_clip_of_a_shared_video(tmp_path):
    written = write_realestate10k(tmp_path, clips=2)
    read = list(realestate10k.read(tmp_path, "val", **CLIP))
    assert [sample.video for sample in read] == ["abc-DEF_123"] * 2
    assert len(list((tmp_path / "videos").iterdir())) == 1
    for before, after in zip(written, read, strict=True):
        assert np.allclose(after.labels["camera_to_world"], before.labels["camera_to_world"], atol=1e-7)
        assert np.abs(after.pixels.astype(int) - before.pixels).mean() < 3


def test_realestate10k_rows_are_world_to_camera_in_19_columns(tmp_path):
    (written,) = write_realestate10k(tmp_path)
    lines = (tmp_path / f"test/{written.id}.txt").read_text().splitlines()
    assert lines[0] == "https://www.youtube.com/watch?v=abc-DEF_123"
    row = [float(x) for x in lines[3].split()]
    assert len(row) == 19 and row[0] == 250_000 and row[1:7] == [0.9, 0.9, 0.5, 0.5, 0, 0]
    world_to_camera = np.reshape(row[7:], (3, 4))
    centre = np.append(written.labels["camera_to_world"][2][:3, 3], 1)
    assert np.allclose(world_to_camera @ centre, 0, atol=1e-6)


def test_realestate10k_frames_are_found_by_time_and_steps_may_vary(tmp_path):
    write_realestate10k(tmp_path)
    path = tmp_path / "test" / f"{0:016x}.txt"
    url, *rows = path.read_text().splitlines()
    later = [rows[0], rows[1], rows[3], rows[4], rows[5]]  # a frame was lost
    path.write_text("\n".join([url, *later]) + "\n")
    read = next(realestate10k.read(tmp_path, "val", frames=3, rate_hz=4.0, side_px=SIDE))
    assert numbers(read.pixels) == [0, 1, 4]  # nearest rows to 0, 0.25 and 0.5 s, each with its own picture
    assert np.allclose(read.labels["camera_to_world"], poses(T)[[0, 1, 4]], atol=1e-7)


def test_realestate10k_a_file_of_the_clip_alone_starts_with_its_first_row(tmp_path):
    write_realestate10k(tmp_path)
    (tmp_path / "videos/abc-DEF_123.mp4").rename(tmp_path / "videos" / f"{0:016x}.mp4")
    path = tmp_path / "test" / f"{0:016x}.txt"
    url, *rows = path.read_text().splitlines()
    moved = [f"{int(row.split()[0]) + 158_692_025} {row.split(maxsplit=1)[1]}" for row in rows]
    path.write_text("\n".join([url, *moved]) + "\n")
    assert numbers(next(realestate10k.read(tmp_path, "val", **CLIP)).pixels) == list(range(T))


def test_realestate10k_refuses_what_does_not_fit(tmp_path):
    write_realestate10k(tmp_path)
    path = tmp_path / "test" / f"{0:016x}.txt"
    good = path.read_text()
    with pytest.raises(UserError, match="too early for 16 frames at 8.0 Hz; lower clip.frames or raise rate_hz"):
        next(realestate10k.read(tmp_path, "val", frames=16, rate_hz=8.0, side_px=SIDE))
    path.write_text(good + "1 2 3\n")
    with pytest.raises(UserError, match="line 8: 3 columns; needed 19"):
        next(realestate10k.read(tmp_path, "val", **CLIP))
    path.write_text(good.replace("https", "ftp").replace("watch?v=", "v/"))
    with pytest.raises(UserError, match="needed a YouTube address in the first line"):
        realestate10k.count(tmp_path, "val")
    path.write_text(good)
    (tmp_path / "videos/abc-DEF_123.mp4").unlink()
    with pytest.raises(UserError, match="needed videos/abc-DEF_123.mp4 or videos/0000000000000000.mp4"):
        realestate10k.count(tmp_path, "val")
    with pytest.raises(UserError, match=r"needed train \(row files"):
        realestate10k.count(tmp_path, "train")


# ---------------------------------------------------------------- perception test


def write_perception_test(root: Path) -> Sample:
    rng = seeds.numpy(0, "points")
    seen = np.ones((4, T), bool)
    seen[1, 2:4] = False
    seen[2, 0] = False
    points = rng.uniform(0.1, 0.9, (4, T, 2)).astype(np.float32)
    sample = Sample("video_7", "video_7", pictures(height=32, width=48), {"points": points}, {"points": seen})
    perception_test.write(root, "val", [sample], **H264)
    return sample


def edit_track(root: Path, **changes) -> None:
    path = root / "point_tracking_valid.json"
    entries = json.loads(path.read_text())
    entries["video_7"]["point_tracking"][0] |= changes
    write_json(path, entries)


def test_perception_test_reads_back_the_tracks_of_frame_0(tmp_path):
    written = write_perception_test(tmp_path)
    (read,) = perception_test.read(tmp_path, "val", **CLIP)
    expected = written.labels["points"] * [1.5, 1] - [0.25, 0]  # of the central square of 32 x 48
    visible = written.valid["points"] & ((expected >= 0) & (expected < 1)).all(-1)
    kept = visible[:, 0]
    assert not kept[2] and kept.any()
    assert np.array_equal(read.valid["points"], visible[kept])
    assert np.allclose(read.labels["points"][visible[kept]], expected[kept][visible[kept]], atol=2e-5)
    assert (read.labels["points"][~visible[kept]] == 0).all()


def test_perception_test_file_lists_only_visible_frames_as_y_then_x(tmp_path):
    written = write_perception_test(tmp_path)
    entry = json.loads((tmp_path / "point_tracking_valid.json").read_text())["video_7"]
    assert entry["metadata"]["resolution"] == [32, 48]
    track = entry["point_tracking"][1]
    assert track["frame_ids"] == [0, 1, 4, 5]
    assert np.allclose(track["points"], written.labels["points"][1][[0, 1, 4, 5]][:, ::-1].T, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_perception_test_takes_points_as_2_by_n_and_as_n_by_2(tmp_path, transposed):
    write_perception_test(tmp_path)
    yx = np.array([[0.2, 0.3, 0.4], [0.5, 0.6, 0.7]])
    edit_track(tmp_path, frame_ids=[0, 1, 2], points=(yx.T if transposed else yx).tolist())
    read = next(perception_test.read(tmp_path, "val", **CLIP))
    assert np.allclose(read.labels["points"][0, :3], np.stack([yx[1] * 1.5 - 0.25, yx[0]], -1), atol=1e-6)
    assert read.valid["points"][0].tolist() == [True] * 3 + [False] * 3


def test_perception_test_two_frames_are_ambiguous_and_read_as_2_by_n(tmp_path):
    write_perception_test(tmp_path)
    edit_track(tmp_path, frame_ids=[0, 1], points=[[0.2, 0.3], [0.5, 0.6]])
    read = next(perception_test.read(tmp_path, "val", **CLIP))
    assert np.allclose(read.labels["points"][0, :2], [[0.5, 0.2], [0.65, 0.3]], atol=1e-6)


def test_perception_test_frames_are_taken_by_number_and_rate(tmp_path):
    write_perception_test(tmp_path)
    read = next(perception_test.read(tmp_path, "val", frames=3, rate_hz=4.0, side_px=SIDE))
    assert numbers(read.pixels) == [0, 2, 4]


def test_perception_test_videos_without_tracks_are_left_out(tmp_path):
    write_perception_test(tmp_path)
    path = tmp_path / "point_tracking_valid.json"
    entries = json.loads(path.read_text())
    entries["video_8"] = {"metadata": entries["video_7"]["metadata"]}  # other tasks only: no key
    entries["video_9"] = {"metadata": entries["video_7"]["metadata"], "point_tracking": []}
    write_json(path, entries)
    assert perception_test.count(tmp_path, "val") == 1
    assert [sample.id for sample in perception_test.read(tmp_path, "val", **CLIP)] == ["video_7"]


def test_perception_test_refuses_what_does_not_fit(tmp_path):
    write_perception_test(tmp_path)
    with pytest.raises(UserError, match="ends before frame 6; lower clip.frames"):
        next(perception_test.read(tmp_path, "val", frames=16, rate_hz=8.0, side_px=SIDE))
    edit_track(tmp_path, frame_ids=[0, 1, 2], points=[[0.1], [0.2]])
    with pytest.raises(UserError, match=r"track 0 of video_7 has points \(2, 1\) for 3 frames; needed 2 x 3"):
        next(perception_test.read(tmp_path, "val", **CLIP))
    (tmp_path / "videos/video_7.mp4").unlink()
    with pytest.raises(UserError, match="lacks 1 of 1 videos of val, the first is video_7.mp4"):
        perception_test.count(tmp_path, "val")
    with pytest.raises(UserError, match="needed point_tracking_train.json"):
        perception_test.count(tmp_path, "train")


# ---------------------------------------------------------------- waymo

LABELS = "validation/camera_box/1_2.parquet"
IMAGES = "validation/camera_image/1_2.parquet"


def write_waymo(root: Path) -> Sample:
    rng = seeds.numpy(0, "boxes")
    corner = rng.uniform(0.2, 0.5, (3, T, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.2, 0.3, (3, T, 2))], -1).astype(np.float32)
    there = np.ones((3, T), bool)
    there[1, 3:] = False
    there[2, 0] = False
    sample = Sample("1_2", "1_2", pictures(height=32, width=48), {"boxes": boxes}, {"boxes": there})
    waymo.write(root, "val", [sample], rate_hz=10.0, jpeg_quality=95)
    return sample


def edit_rows(path: Path, change) -> None:
    table = pq.ParquetFile(path).read()
    rows = table.to_pylist()
    change(rows)
    columns = {name: [row[name] for row in rows] for name in table.column_names}
    pq.write_table(pa.table(columns), path)


def test_waymo_reads_back_the_objects_of_frame_0(tmp_path):
    written = write_waymo(tmp_path)
    (read,) = waymo.read(tmp_path, "val", frames=T, rate_hz=10.0, side_px=SIDE)
    expected = np.clip(written.labels["boxes"] * [1.5, 1, 1.5, 1] - [0.25, 0, 0.25, 0], 0, 1)[:2]
    valid = written.valid["boxes"][:2]
    assert np.array_equal(read.valid["boxes"], valid)
    assert np.allclose(read.labels["boxes"][valid], expected[valid], atol=1e-5)
    assert numbers(read.pixels) == list(range(T))


def test_waymo_boxes_are_centre_and_size_in_pixels_of_the_whole_picture(tmp_path):
    written = write_waymo(tmp_path)
    row = pq.ParquetFile(tmp_path / LABELS).read().to_pylist()[0]
    x1, y1, x2, y2 = written.labels["boxes"][0, 0].astype(float) * [48, 32, 48, 32]
    assert [row[name] for name in waymo.BOX] == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def test_waymo_other_cameras_are_passed_over_and_front_may_be_a_word(tmp_path):
    write_waymo(tmp_path)

    def rename(rows):
        rows.append({**rows[0], waymo.KEYS[2]: 2})
        for row in rows:
            row[waymo.KEYS[2]] = {1: "FRONT", 2: "FRONT_LEFT"}[row[waymo.KEYS[2]]]

    before = next(waymo.read(tmp_path, "val", frames=T, rate_hz=10.0, side_px=SIDE))
    edit_rows(tmp_path / IMAGES, rename)
    edit_rows(tmp_path / LABELS, rename)
    after = next(waymo.read(tmp_path, "val", frames=T, rate_hz=10.0, side_px=SIDE))
    assert np.array_equal(before.labels["boxes"], after.labels["boxes"])
    assert np.array_equal(before.pixels, after.pixels)


def test_waymo_small_boxes_and_empty_segments_give_no_sample(tmp_path):
    write_waymo(tmp_path)

    def shrink(rows):
        for row in rows:
            row[waymo.BOX[2]], row[waymo.BOX[3]] = 1.5, 1.5

    edit_rows(tmp_path / LABELS, shrink)
    assert list(waymo.read(tmp_path, "val", frames=T, rate_hz=10.0, side_px=SIDE)) == []
    edit_rows(tmp_path / LABELS, lambda rows: rows.clear())
    assert list(waymo.read(tmp_path, "val", frames=T, rate_hz=10.0, side_px=SIDE)) == []


def test_waymo_refuses_what_does_not_fit(tmp_path):
    write_waymo(tmp_path)
    with pytest.raises(UserError, match="too early for 16 frames at 10.0 Hz; lower clip.frames or raise rate_hz"):
        next(waymo.read(tmp_path, "val", frames=16, rate_hz=10.0, side_px=SIDE))
    (tmp_path / IMAGES).write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match="1_2.parquet is damaged"):
        next(waymo.read(tmp_path, "val", frames=T, rate_hz=10.0, side_px=SIDE))
    (tmp_path / LABELS).unlink()
    with pytest.raises(UserError, match="lacks 1 of 1 segments, the first is 1_2.parquet"):
        waymo.count(tmp_path, "val")
    with pytest.raises(UserError, match=r"needed training/camera_image \(pictures"):
        waymo.count(tmp_path, "train")


# ---------------------------------------------------------------- the crop


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (96, 64), (50, 71), (240, 427)])
def test_a_point_stays_on_its_spot_through_resize_and_crop(height, width):
    y, x = np.mgrid[:height, :width] + 0.5
    centre = np.array([0.47 * width, 0.55 * height])
    blob = 255 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (0.08 * min(height, width)) ** 2)
    crop = Crop(height, width, 32)
    small = crop.pixels([blob[..., None].repeat(3, -1).astype(np.uint8)])[0, ..., 0].astype(float)
    assert small.shape == (32, 32)
    v, u = np.mgrid[:32, :32] + 0.5
    found = np.array([(small * u).sum(), (small * v).sum()]) / small.sum()
    assert np.allclose(crop.points(centre / [width, height]) * 32, found, atol=0.35)


def test_sources_undo_points():
    crop = Crop(50, 71, 32)
    v, u = (np.mgrid[:32, :32] + 0.5) / 32
    assert np.allclose(crop.points(crop.sources()), np.stack([u, v], -1))


def test_boxes_are_clipped_to_the_square():
    assert Crop(32, 64, 32).boxes(np.array([0.0, 0.25, 0.5, 0.75])).tolist() == [0.0, 0.25, 0.5, 0.75]
    assert Crop(32, 64, 32).boxes(np.array([0.9, 0.25, 1.0, 0.75])).tolist() == [1.0, 0.25, 1.0, 0.75]
