"""Waymo Open: what is written is read back, and the traps of the real download, v1 and v2."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered import SIDE, T, numbers, pictures

from scaling4d import seeds
from scaling4d.benchmarks import tfrecord, waymo
from scaling4d.records import Sample, UserError

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
    with pytest.raises(UserError, match="lacks 1 of 1 segments of val, the first is 1_2.parquet"):
        waymo.count(tmp_path, "val")
    with pytest.raises(UserError, match=r"needed training/camera_image \(pictures"):
        waymo.count(tmp_path, "train")


def test_waymo_v1_gives_the_same_samples_as_v2(tmp_path):
    written = write_waymo(tmp_path / "v2")
    waymo.write_records(tmp_path / "v1", "val", [written], rate_hz=10.0, jpeg_quality=95)
    assert (tmp_path / "v1/validation/segment-1_2_with_camera_labels.tfrecord").is_file()
    clip = {"frames": T, "rate_hz": 10.0, "side_px": SIDE}
    (v1,), (v2,) = (list(waymo.read(tmp_path / version, "val", **clip)) for version in ("v1", "v2"))
    assert (waymo.layout(tmp_path / "v1", "val"), waymo.layout(tmp_path / "v2", "val")) == ("v1, tfrecord", "v2, parquet")
    assert (v1.id, waymo.count(tmp_path / "v1", "val")) == ("1_2", 1)
    assert np.array_equal(v1.labels["boxes"], v2.labels["boxes"])
    assert np.array_equal(v1.valid["boxes"], v2.valid["boxes"])
    assert np.array_equal(v1.pixels, v2.pixels)


def v1_frame(stamp: int, pictures_of: dict[int, bytes], labels_of: dict[int, list[bytes]]) -> bytes:
    """As the official frames are: field numbers written out, and cameras in any order."""
    fields = [(1, tfrecord.message([(1, b"context")])), (2, stamp), (3, b""), (5, b"lasers")]
    fields += [(4, tfrecord.message([(1, camera), (2, jpeg)])) for camera, jpeg in pictures_of.items()]
    fields += [(8, tfrecord.message([(1, camera), *((2, label) for label in some)])) for camera, some in labels_of.items()]
    return tfrecord.message(fields)


def write_v1(root: Path, *, width: float = 24.0, height: float = 8.0) -> Path:
    """Two frames of 48 x 32; FRONT_LEFT (2) comes first and shows something else."""
    box = tfrecord.message([(1, 24.0), (2, 16.0), (4, height), (5, width)])  # 4 is `width`, 5 `length`
    label = tfrecord.message([(1, box), (3, 2), (4, b"an object")])
    other = tfrecord.message([(1, tfrecord.message([(1, 4.0), (2, 4.0), (4, 8.0), (5, 8.0)])), (4, b"an object")])
    dark, bright = (waymo._encode(np.full((32, 48, 3), shade, np.uint8), 95) for shade in (20, 200))
    messages = [v1_frame(10**15 + t * 100_000, {2: bright, 1: dark}, {2: [other], 1: [label]}) for t in range(2)]
    path = root / "training/segment-a_b_with_camera_labels.tfrecord"
    path.parent.mkdir(parents=True)
    tfrecord.write(path, messages)
    return path


def test_waymo_v1_length_runs_along_x_and_the_front_camera_goes_by_its_number(tmp_path):
    write_v1(tmp_path)
    (read,) = waymo.read(tmp_path, "train", frames=2, rate_hz=10.0, side_px=32)
    assert read.labels["boxes"].tolist() == [[[0.125, 0.375, 0.875, 0.625]] * 2]  # 24 wide and 8 high, in the square of 32
    assert read.pixels.max() < 30


def test_waymo_v1_checksums_are_castagnolis():
    assert tfrecord.crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert tfrecord.crc32c(bytes(32)) == 0x8A9136AA and tfrecord.crc32c(b"\xff" * 32) == 0x62A8AB43  # RFC 3720, B.4
    content = seeds.numpy(0, "crc").bytes(70_001)
    for length in (0, 1, 3, 4, 5, 1023, 1024, 1025, 2048, 70_001):
        slow = 0xFFFFFFFF
        for byte in content[:length]:
            slow = int(tfrecord.TABLE[(slow ^ byte) & 0xFF]) ^ slow >> 8
        assert tfrecord.crc32c(content[:length]) == slow ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (0, "the length of record 0 does not fit its checksum"),
        (9, "the length of record 0 does not fit its checksum"),
        (100, "record 0 does not fit its checksum"),
        (-1, "record 1 does not fit its checksum"),
    ],
)
def test_waymo_v1_a_flipped_bit_is_noticed(tmp_path, at, expected):
    path = write_v1(tmp_path)
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name} is damaged: {expected}"):
        list(waymo.read(tmp_path, "train", frames=2, rate_hz=10.0, side_px=32))


def test_waymo_v1_refuses_what_is_cut_off_or_no_frame(tmp_path):
    path = write_v1(tmp_path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="is damaged: it ends inside record 1"):
        list(waymo.read(tmp_path, "train", frames=2, rate_hz=10.0, side_px=32))
    tfrecord.write(path, [b"\xff\xff no message"])
    with pytest.raises(UserError, match="record 0 is no Frame of Waymo Open"):
        list(waymo.read(tmp_path, "train", frames=2, rate_hz=10.0, side_px=32))
    tfrecord.write(path, [])
    with pytest.raises(UserError, match="has no picture of camera FRONT"):
        list(waymo.read(tmp_path, "train", frames=2, rate_hz=10.0, side_px=32))


@pytest.mark.parametrize("size", [(0.0, 8.0), (-24.0, -8.0), (float("nan"), 8.0)])
def test_waymo_boxes_without_an_inside_are_no_objects(tmp_path, size):
    write_v1(tmp_path, width=size[0], height=size[1])
    assert list(waymo.read(tmp_path, "train", frames=2, rate_hz=10.0, side_px=32)) == []


def test_waymo_a_box_outside_the_picture_is_not_there(tmp_path):
    boxes = np.tile(np.array([0.4, 0.4, 0.6, 0.6], np.float32), (2, T, 1))
    boxes[0, 2:] += 0.7  # beyond the right border
    boxes[1] -= 1  # never inside
    sample = Sample("1_2", "1_2", pictures(), {"boxes": boxes}, {"boxes": np.ones((2, T), bool)})
    waymo.write(tmp_path, "val", [sample], rate_hz=10.0, jpeg_quality=95)
    (read,) = waymo.read(tmp_path, "val", frames=T, rate_hz=10.0, side_px=SIDE)
    assert read.valid["boxes"].tolist() == [[True, True, False, False, False, False]]
    assert (read.labels["boxes"][0, 2:] == 0).all()


@pytest.mark.parametrize("front", [1, "FRONT"])
def test_waymo_pictures_of_other_cameras_are_not_taken_into_memory(tmp_path, front):
    write_waymo(tmp_path)

    def more(rows):
        for row in rows:
            row[waymo.KEYS[2]] = front
        others = [2, 3, 4, 5] if front == 1 else ["FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT"]
        large = bytes(2_000_000)
        rows.extend([{**row, waymo.KEYS[2]: other, waymo.IMAGE: large} for row in rows[:2] for other in others])

    edit_rows(tmp_path / IMAGES, more)
    edit_rows(tmp_path / LABELS, lambda rows: [row.update({waymo.KEYS[2]: front}) for row in rows])
    tracemalloc.start()
    (read,) = waymo.read(tmp_path, "val", frames=T, rate_hz=10.0, side_px=SIDE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert numbers(read.pixels) == list(range(T)) and peak < 2_000_000
