"""ScanNet: what is written is read back, and the traps of the real download, in all three layouts."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.writers import write_scannet_export
from numbered import CLIP, INTRINSICS, SIDE, T, left_out, missing, numbers, pictures, poses, read, refused
from PIL import Image

from scaling4d.benchmarks import scannet
from scaling4d.records import Sample

SEVEN, SHOWN = replace(CLIP, frames=7), [0, 3, 7, 11, 15, 18, 22]  # of 30 frames a second
SENSREADER, POSED_IMAGES = scannet.EXPORTS
START = 12 + len("scaling4d")  # of the header, behind the sensor's name
FIELDS = {"depth_k": ("<16f", 128), "color_code": ("<i", 256), "depth_code": ("<i", 260), "shift": ("<f", 280)}
FIELDS["color_bytes"] = ("<Q", scannet.HEADER.size + 64 + 16)  # of the first frame


def scene(frames: int = T, **changes) -> Sample:
    depth = np.linspace(0.5, 4, frames * 16 * 16).reshape(frames, 16, 16)
    labels = {"depth_m": depth, "camera_to_world": poses(frames), "intrinsics": INTRINSICS} | changes
    return Sample("scene0003_01", "scene0003", pictures(frames), labels)


def write(root: Path, sample: Sample | None = None, *, rate_hz: float = 8.0, **changes) -> Path:
    """The scene's .sens file."""
    scannet.write(root, "val", [sample or scene(**changes)], rate_hz=rate_hz, jpeg_quality=95)
    return root / "scans/scene0003_01/scene0003_01.sens"


def edit(path: Path, **changes: float | np.ndarray) -> None:
    """Overwrite fields of a .sens file."""
    content = bytearray(path.read_bytes())
    for name, value in changes.items():
        form, offset = FIELDS[name]
        struct.pack_into(form, content, START + offset, *np.ravel(value))
    path.write_bytes(content)


def same_depth(sample: Sample, written: Sample, frames: list[int] | slice = slice(None), *, units: float = 1) -> bool:
    """Whether the depth is equal to the millimetre; the written one has half the resolution."""
    expected = written.labels["depth_m"][frames].repeat(2, 1).repeat(2, 2)
    return np.abs(units * sample.labels["depth_m"] - expected).max() <= units * 0.0005 + 1e-6


def test_scannet_file_has_the_layout_of_the_official_reader(tmp_path):
    """The official SensorData.py, field by field."""
    written = scene()
    with write(tmp_path, written).open("rb") as file:
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


@pytest.mark.parametrize("value", [-np.inf, np.nan])
@pytest.mark.parametrize("layout", [".sens", *scannet.EXPORTS])
def test_scannet_lost_tracking_spoils_the_pose_and_not_the_depth(tmp_path, layout, value):
    lost = poses(30)
    lost[7] = value
    if layout == ".sens":
        write(tmp_path, frames=30, rate_hz=30.0, camera_to_world=lost)
    else:
        write_scannet_export(tmp_path, scene(30, camera_to_world=lost), layout)
    (sample,) = read(scannet, tmp_path, "val", replace(CLIP, frames=4))
    assert sample.valid["camera_to_world"].tolist() == [True, True, False, True]
    assert sample.valid["depth_m"].all()


def test_scannet_no_measurement_and_far_depth_are_not_valid(tmp_path):
    depth = np.full((T, 16, 16), 2.0)
    depth[:, 0, 0], depth[:, 0, 1], depth[:, 0, 2], depth[:, 0, 3] = 0, 10.5, 9.999, 70
    write(tmp_path, depth_m=depth)
    (sample,) = read(scannet, tmp_path, "val")
    assert sample.valid["depth_m"][0, 0, :10].tolist() == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 2
    assert sample.valid["depth_m"][0, 1:].all(where=np.arange(SIDE) > 7)


def test_scannet_depth_follows_its_own_intrinsics(tmp_path):
    """A depth camera that sees half the angle: depth in the middle of the picture, none at its border."""
    k = scannet.pixel_intrinsics(INTRINSICS, 16, 16)
    edit(write(tmp_path), depth_k=k * np.diag([2, 2, 1, 1]) + k * (1 - np.eye(4)))
    valid = read(scannet, tmp_path, "val")[0].valid["depth_m"][0]
    assert valid[8:24, 8:24].all() and valid.sum() == 16 * 16


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def repack(path: Path, color: Callable[[bytes], bytes], depth: Callable[[bytes], bytes]) -> None:
    """Store every frame's colour and depth bytes in another way."""
    content, at = path.read_bytes(), START + scannet.HEADER.size
    out, frame = bytearray(content[:at]), struct.Struct("<64sQQQQ")
    while at < len(content) - 8:
        pose, *stamps, color_bytes, depth_bytes = frame.unpack_from(content, at)
        at += frame.size
        parts = color(content[at : at + color_bytes]), depth(content[at + color_bytes : at + color_bytes + depth_bytes])
        at += color_bytes + depth_bytes
        out += frame.pack(pose, *stamps, *map(len, parts)) + b"".join(parts)
    path.write_bytes(out + content[at:])


def test_scannet_depth_may_be_stored_raw_and_colour_as_png(tmp_path):
    path = write(tmp_path)
    (before,) = read(scannet, tmp_path, "val")
    repack(path, lambda jpeg: png(Image.open(io.BytesIO(jpeg))), zlib.decompress)
    edit(path, color_code=1, depth_code=0)
    (after,) = read(scannet, tmp_path, "val")
    assert np.array_equal(before.pixels, after.pixels)
    assert np.array_equal(before.labels["depth_m"], after.labels["depth_m"])


def test_scannet_a_metre_has_as_many_units_as_the_file_says(tmp_path):
    written = scene()
    edit(write(tmp_path, written), shift=4000.0)
    assert same_depth(read(scannet, tmp_path, "val")[0], written, units=4)


@pytest.mark.parametrize(("changes", "bad", "expected"), [
    ({"intrinsics": INTRINSICS * np.nan}, True, "the intrinsics of scene0003_01 are not numbers with focal lengths above 0"),
    ({"depth_m": np.zeros((T, 16, 16))}, False, "nothing is measured within 0.001 .. 10.0 m in the clip of scene0003_01"),
])  # fmt: skip
def test_scannet_intrinsics_without_numbers_are_damage_and_no_measurement_is_left_out(tmp_path, changes, bad, expected):
    write(tmp_path, **changes)
    ((name, damaged, why),) = left_out(scannet, tmp_path, "val")
    assert (name, damaged) == ("scene0003_01", bad) and expected in why


@pytest.mark.parametrize("left", [0.0, 0.01, 0.05, 0.3, 0.6, 0.9])
def test_scannet_a_scene_cut_off_anywhere_is_one_bad_sample(tmp_path, left):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    ((name, bad, why),) = left_out(scannet, tmp_path, "val")
    assert (name, bad) == ("scene0003_01", True) and "scene0003_01.sens is damaged" in why


@pytest.mark.parametrize(("changes", "expected"), [
    ({"depth_code": 2}, "needed jpeg or png, and zlib_ushort or raw_ushort"),
    ({"depth_code": -1}, "needed jpeg or png, and zlib_ushort or raw_ushort"),
    ({"color_code": 0}, "needed jpeg or png, and zlib_ushort or raw_ushort"),
    ({"color_bytes": 2**64 - 1}, "scene0003_01.sens is damaged: it ends inside frame 0 of 6"),
])  # fmt: skip
def test_scannet_other_compressions_and_sizes_that_cannot_be_are_refused(tmp_path, changes, expected):
    edit(write(tmp_path), **changes)
    refused(expected, scannet, tmp_path, "val")


def test_scannet_refuses_what_does_not_fit(tmp_path):
    path = write(tmp_path)
    content = path.read_bytes()
    for frames, rate_hz in ((2, 1.0), (16, 8.0)):  # a frame is not stretched over the end of its scene
        expected = f"ends after 0.62 s, too early for {frames} frames at {rate_hz} Hz; lower frames or raise rate_hz"
        refused(expected, scannet, tmp_path, "val", replace(CLIP, frames=frames, rate_hz=rate_hz))
    path.write_bytes(b"\x03" + content[1:])
    refused("is a .sens file of version 3; needed 4", scannet, tmp_path, "val")
    path.unlink()
    assert missing(scannet, tmp_path, "val").endswith("lacks 1 of 1 scenes of val, the first is scene0003_01")
    (tmp_path / "scannetv2_val.txt").write_text("scene0/../../x\n")
    refused("scannetv2_val.txt, line 1: .*which is not a scene such as scene0000_00", scannet, tmp_path, "val")


@pytest.mark.parametrize("layout", scannet.EXPORTS)
def test_scannet_exports_read_back_in_the_order_of_their_numbers_as_the_sens_file_does_by_time_stamps(tmp_path, layout):
    """30 frames a second without time stamps; sorted as text, 10 would come before 2."""
    written = scene(30)
    write_scannet_export(tmp_path, written, layout)
    opened = scannet.open_split(tmp_path, "val", SEVEN)
    assert (opened.count, opened.missing, opened.layout) == (1, None, layout)
    (sample,) = opened
    assert numbers(sample.pixels) == SHOWN and same_depth(sample, written, SHOWN)
    assert np.allclose(sample.labels["camera_to_world"], written.labels["camera_to_world"][SHOWN], atol=1e-5)
    assert sample.valid["depth_m"].all() and sample.valid["camera_to_world"].all()
    write(tmp_path / "sens", written, rate_hz=30.0)
    (other,) = read(scannet, tmp_path / "sens", "val", SEVEN)
    assert (sample.id, sample.video) == (other.id, other.video) == ("scene0003_01", "scene0003")
    assert np.array_equal(sample.pixels, other.pixels) and np.array_equal(sample.labels["depth_m"], other.labels["depth_m"])
    assert np.allclose(other.labels["camera_to_world"], written.labels["camera_to_world"][SHOWN], atol=1e-6)
    assert other.valid["depth_m"].all() and other.valid["camera_to_world"].all()


def test_scannet_a_sens_file_goes_before_its_export(tmp_path):
    written = scene(30)
    write_scannet_export(tmp_path, written, SENSREADER)
    (tmp_path / "again").mkdir()
    path = write(tmp_path / "again", replace(written, pixels=written.pixels // 2), rate_hz=30.0)
    path.rename(tmp_path / "scans/scene0003_01/scene0003_01.sens")
    assert scannet.open_split(tmp_path, "val", CLIP).layout == ".sens"
    assert read(scannet, tmp_path, "val")[0].pixels[0].max() == 10


def test_scannet_posed_images_without_depth_intrinsics_take_those_of_the_pictures_at_their_size(tmp_path):
    write_scannet_export(tmp_path, scene(30), POSED_IMAGES)
    before = read(scannet, tmp_path, "val")[0]
    (tmp_path / "posed_images/scene0003_01/depth_intrinsic.txt").unlink()
    assert np.array_equal(read(scannet, tmp_path, "val")[0].labels["depth_m"], before.labels["depth_m"])


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("depth/3.png", b"no picture", "depth/3.png cannot be read"),
    ("depth/3.png", None, "depth/3.png is a picture of kind L; needed depth as 16-bit grey, in mm"),
    ("pose/3.txt", b"1 0 0 0\n0 1 0 0\n", r"pose/3.txt holds \(2, 4\) numbers; needed four rows of four"),
    ("pose/3.txt", b"x", "pose/3.txt cannot be read as four rows of four numbers"),
    ("color/3.jpg", b"no picture", "color/3.jpg cannot be read"),
])  # fmt: skip
def test_scannet_exports_refuse_what_does_not_fit(tmp_path, name, content, expected):
    write_scannet_export(tmp_path, scene(30), SENSREADER)
    refused("ends after 0.97 s, too early for 16 frames at 8.0 Hz;", scannet, tmp_path, "val", replace(CLIP, frames=16))
    (tmp_path / "scans/scene0003_01" / name).write_bytes(content or png(Image.new("L", (16, 16))))
    refused(expected, scannet, tmp_path, "val")
