"""Waymo Open: what is written is read back, and the traps of the real download, v1 and v2."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmarks.writers import waymo_frame, waymo_label, write_records, write_waymo_v1
from numbered import CLIP, T, in_square, left_out, missing, numbers, pictures, read, refused, three_boxes

from scaling4d import seeds
from scaling4d.benchmarks import tfrecord, waymo
from scaling4d.benchmarks.frames import encode_jpeg
from scaling4d.records import Sample

LABELS, IMAGES = "validation/camera_box/1_2.parquet", "validation/camera_image/1_2.parquet"
V1 = "training/segment-a_b_with_camera_labels.tfrecord"
TEN = replace(CLIP, rate_hz=10.0)
TWO = replace(TEN, frames=2)


@pytest.fixture
def written(tmp_path: Path) -> Sample:
    sample = three_boxes("1_2")
    waymo.write(tmp_path, "val", [sample], rate_hz=10.0, jpeg_quality=95)
    return sample


def edit_rows(path: Path, change) -> None:
    table = pq.ParquetFile(path).read()
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in table.column_names}), path)


def test_waymo_reads_back_the_objects_of_frame_0(tmp_path, written):
    (sample,) = read(waymo, tmp_path, "val", TEN)
    expected = in_square(written.labels["boxes"])[:2].clip(0, 1)
    valid = written.valid["boxes"][:2]
    assert np.array_equal(sample.valid["boxes"], valid)
    assert np.allclose(sample.labels["boxes"][valid], expected[valid], atol=1e-5)
    assert numbers(sample.pixels) == list(range(T))
    row = pq.ParquetFile(tmp_path / LABELS).read().to_pylist()[0]  # centre and size in pixels of the full picture
    x1, y1, x2, y2 = written.labels["boxes"][0, 0].astype(float) * [48, 32, 48, 32]
    assert [row[name] for name in waymo.BOX] == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


@pytest.mark.parametrize("cameras", [[1, 2, 3, 4, 5], ["FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT"]])
def test_waymo_other_cameras_are_not_taken_into_memory_and_front_may_be_a_word(tmp_path, written, cameras):
    (before,) = read(waymo, tmp_path, "val", TEN)

    def add_cameras(rows):
        for row in rows:
            row[waymo.KEYS[2]] = cameras[0]
        large = {waymo.IMAGE: bytes(2_000_000)} if waymo.IMAGE in rows[0] else {waymo.BOX[0]: 1.0}
        rows.extend([{**row, waymo.KEYS[2]: other, **large} for row in rows[:2] for other in cameras[1:]])

    edit_rows(tmp_path / IMAGES, add_cameras)
    edit_rows(tmp_path / LABELS, add_cameras)
    tracemalloc.start()
    (after,) = read(waymo, tmp_path, "val", TEN)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert np.array_equal(before.labels["boxes"], after.labels["boxes"]) and np.array_equal(before.pixels, after.pixels)


def test_waymo_small_boxes_and_empty_segments_give_no_sample_by_rule(tmp_path, written):
    small = {waymo.BOX[2]: 1.5, waymo.BOX[3]: 1.5}
    for change in (lambda rows: [row.update(small) for row in rows], lambda rows: rows.clear()):
        edit_rows(tmp_path / LABELS, change)
        assert [bad for _, bad, _ in left_out(waymo, tmp_path, "val", TEN)] == [False]


def test_waymo_refuses_what_does_not_fit(tmp_path, written):
    refused("too early for 16 frames at 10.0 Hz; lower frames or raise rate_hz", waymo, tmp_path, "val", replace(TEN, frames=16))
    (sample,) = read(waymo, tmp_path, "val", replace(TEN, frames=T + 1))  # the last picture is on show for one step
    assert numbers(sample.pixels) == [*range(T), T - 1]
    (tmp_path / IMAGES).write_bytes(b"PAR1 no parquet")
    refused("1_2.parquet is damaged", waymo, tmp_path, "val")
    (tmp_path / LABELS).unlink()
    assert missing(waymo, tmp_path, "val").endswith("lacks 1 of 1 segments of val, the first is 1_2.parquet")


def test_waymo_v1_gives_the_same_samples_as_v2(tmp_path, written):
    write_waymo_v1(tmp_path / "v1", "val", written, rate_hz=10.0, jpeg_quality=95)
    opened = [waymo.open_split(root, "val", TEN) for root in (tmp_path / "v1", tmp_path)]
    assert [(samples.layout, samples.count) for samples in opened] == [("v1, tfrecord", 1), ("v2, parquet", 1)]
    (v1,), (v2,) = opened
    assert v1.id == "1_2" and np.array_equal(v1.pixels, v2.pixels)
    assert np.array_equal(v1.labels["boxes"], v2.labels["boxes"]) and np.array_equal(v1.valid["boxes"], v2.valid["boxes"])


def write_v1(root: Path, *, width: float = 24.0, height: float = 8.0) -> Path:
    """Two frames of 48 x 32; FRONT_LEFT (2) comes first and shows something else."""
    labels = {2: [waymo_label(b"an object", 4.0, 4.0, 8.0, 8.0)], 1: [waymo_label(b"an object", 24.0, 16.0, width, height)]}
    bright, dark = (encode_jpeg(np.full((32, 48, 3), shade, np.uint8), 95) for shade in (200, 20))
    stamps = [10**15 + t * 100_000 for t in range(2)]
    write_records(root / V1, [waymo_frame(stamp, {2: bright, 1: dark}, labels) for stamp in stamps])
    return root / V1


def test_waymo_v1_length_runs_along_x_and_the_front_camera_goes_by_its_number(tmp_path):
    write_v1(tmp_path)
    (sample,) = read(waymo, tmp_path, "train", TWO)
    assert sample.labels["boxes"].tolist() == [[[0.125, 0.375, 0.875, 0.625]] * 2]  # 24 wide and 8 high, in the square of 32
    assert sample.pixels.max() < 30


def test_waymo_v1_checksums_are_castagnolis():
    assert tfrecord.crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert tfrecord.crc32c(bytes(32)) == 0x8A9136AA and tfrecord.crc32c(b"\xff" * 32) == 0x62A8AB43  # RFC 3720, B.4
    content = seeds.numpy_rng(0, "crc").bytes(70_001)
    for length in (0, 1, 3, 4, 5, 1023, 1024, 1025, 2048, 70_001):
        slow = 0xFFFFFFFF
        for byte in content[:length]:
            slow = int(tfrecord.TABLE[(slow ^ byte) & 0xFF]) ^ slow >> 8
        assert tfrecord.crc32c(content[:length]) == slow ^ 0xFFFFFFFF


@pytest.mark.parametrize(("damage", "expected"), [
    (0, "the length of record 0 does not fit its checksum"),
    (9, "the length of record 0 does not fit its checksum"),
    (100, "record 0 does not fit its checksum"),
    (-1, "record 1 does not fit its checksum"),
    (None, "it ends inside record 1"),
])  # fmt: skip
def test_waymo_v1_a_flipped_bit_or_a_missing_end_is_noticed(tmp_path, damage, expected):
    path = write_v1(tmp_path)
    content = bytearray(path.read_bytes())
    if damage is not None:
        content[damage] ^= 4
    path.write_bytes(content[: -50 if damage is None else None])
    refused(f"{path.name} is damaged: {expected}", waymo, tmp_path, "train", TWO)


def test_waymo_v1_refuses_records_that_are_no_frames(tmp_path):
    write_records(tmp_path / V1, [b"\xff\xff no message"])
    refused("record 0 is no Frame of Waymo Open", waymo, tmp_path, "train", TWO)
    write_records(tmp_path / V1, [])
    refused("has no picture of camera FRONT", waymo, tmp_path, "train", TWO)


@pytest.mark.parametrize("size", [(0.0, 8.0), (-24.0, -8.0), (float("nan"), 8.0)])
def test_waymo_boxes_without_an_inside_are_no_objects(tmp_path, size):
    write_v1(tmp_path, width=size[0], height=size[1])
    assert read(waymo, tmp_path, "train", TWO) == []


def test_waymo_a_box_outside_the_picture_is_not_valid(tmp_path):
    boxes = np.tile(np.array([0.4, 0.4, 0.6, 0.6], np.float32), (2, T, 1))
    boxes[0, 2:] += 0.7  # beyond the right border
    boxes[1] -= 1  # never inside
    sample = Sample("1_2", "1_2", pictures(), {"boxes": boxes}, {"boxes": np.ones((2, T), bool)})
    waymo.write(tmp_path, "val", [sample], rate_hz=10.0, jpeg_quality=95)
    (sample,) = read(waymo, tmp_path, "val", TEN)
    assert sample.valid["boxes"].tolist() == [[True, True, False, False, False, False]]
    assert (sample.labels["boxes"][0, 2:] == 0).all()
