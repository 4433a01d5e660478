"""ScanNet: what is written is read back, and the traps of the real download, in all three layouts."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numbered import CLIP, INTRINSICS, SIDE, T, numbers, pictures, poses
from PIL import Image

from scaling4d.benchmarks import scannet
from scaling4d.records import Sample, UserError


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


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_scannet_lost_tracking_spoils_the_pose_and_not_the_depth(tmp_path, value):
    lost = poses(T)
    lost[2] = value
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


FIELDS = {"color code": ("<i", 256), "depth code": ("<i", 260), "shift": ("<f", 280)}  # of the header, after the sensor's name


def edit_header(path: Path, **changes: float) -> None:
    content = bytearray(path.read_bytes())
    for name, value in changes.items():
        form, at = FIELDS[name.replace("_", " ")]
        struct.pack_into(form, content, 12 + len("scaling4d") + at, value)
    path.write_bytes(content)


def repacked(path: Path, color, depth) -> None:
    """With every frame's colour and depth bytes stored otherwise."""
    content = path.read_bytes()
    at = 12 + len("scaling4d") + scannet.HEADER.size
    out, frame = bytearray(content[:at]), struct.Struct("<64sQQQQ")
    for _ in range(T):
        pose, *stamps, color_bytes, depth_bytes = frame.unpack_from(content, at)
        at += frame.size
        parts = color(content[at : at + color_bytes]), depth(content[at + color_bytes : at + color_bytes + depth_bytes])
        at += color_bytes + depth_bytes
        out += frame.pack(pose, *stamps, *map(len, parts)) + b"".join(parts)
    path.write_bytes(out + content[at:])


def test_scannet_depth_may_be_stored_raw_and_colour_as_png(tmp_path):
    write_scannet(tmp_path)
    (before,) = scannet.read(tmp_path, "val", **CLIP)
    path = tmp_path / "scans/scene0003_01/scene0003_01.sens"

    def as_png(jpeg: bytes) -> bytes:
        png = io.BytesIO()
        Image.open(io.BytesIO(jpeg)).save(png, "PNG")
        return png.getvalue()

    repacked(path, color=as_png, depth=zlib.decompress)
    edit_header(path, color_code=1, depth_code=0)
    (after,) = scannet.read(tmp_path, "val", **CLIP)
    assert np.array_equal(before.pixels, after.pixels)
    assert np.array_equal(before.labels["depth_m"], after.labels["depth_m"])


@pytest.mark.parametrize("changes", [{"depth_code": 2}, {"depth_code": -1}, {"color_code": 0}])
def test_scannet_other_compressions_are_refused_by_name(tmp_path, changes):
    write_scannet(tmp_path)
    edit_header(tmp_path / "scans/scene0003_01/scene0003_01.sens", **changes)
    with pytest.raises(UserError, match="needed jpeg or png, and zlib_ushort or raw_ushort"):
        list(scannet.read(tmp_path, "val", **CLIP))


def test_scannet_a_metre_has_as_many_units_as_the_file_says(tmp_path):
    written = write_scannet(tmp_path)
    edit_header(tmp_path / "scans/scene0003_01/scene0003_01.sens", shift=4000.0)
    (read,) = scannet.read(tmp_path, "val", **CLIP)
    assert np.abs(4 * read.labels["depth_m"] - written.labels["depth_m"].repeat(2, 1).repeat(2, 2)).max() < 1e-3


def test_scannet_motion_sensor_frames_at_the_end_are_passed_over(tmp_path):
    write_scannet(tmp_path)
    path = tmp_path / "scans/scene0003_01/scene0003_01.sens"
    path.write_bytes(path.read_bytes()[:-8] + struct.pack("<Q", 3) + bytes(3 * 128))
    assert len(list(scannet.read(tmp_path, "val", **CLIP))) == 1


def test_scannet_intrinsics_that_are_no_numbers_are_damage(tmp_path):
    write_scannet(tmp_path, intrinsics=INTRINSICS * np.nan)
    skipped = []
    assert list(scannet.read(tmp_path, "val", **CLIP, skipped=skipped)) == []
    assert [(item.id, item.bad) for item in skipped] == [("scene0003_01", True)]
    assert "the intrinsics of scene0003_01 are not numbers with focal lengths above 0" in skipped[0].why


def test_scannet_a_clip_without_any_measurement_is_left_out_by_rule(tmp_path):
    write_scannet(tmp_path, depth_m=np.zeros((T, 16, 16)))
    skipped = []
    assert list(scannet.read(tmp_path, "val", **CLIP, skipped=skipped)) == []
    assert [(item.id, item.bad) for item in skipped] == [("scene0003_01", False)]


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.05, 0.3, 0.6, 0.9])
def test_scannet_a_scene_cut_off_anywhere_is_one_bad_sample(tmp_path, kept):
    write_scannet(tmp_path)
    path = tmp_path / "scans/scene0003_01/scene0003_01.sens"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    skipped = []
    assert list(scannet.read(tmp_path, "val", **CLIP, skipped=skipped)) == []
    assert [(item.id, item.bad) for item in skipped] == [("scene0003_01", True)]
    assert "scene0003_01.sens is damaged" in skipped[0].why


def test_scannet_sizes_that_cannot_be_are_damage(tmp_path):
    write_scannet(tmp_path)
    path = tmp_path / "scans/scene0003_01/scene0003_01.sens"
    content = bytearray(path.read_bytes())
    at = 12 + len("scaling4d") + scannet.HEADER.size + 64 + 16  # the size of the first picture
    content[at : at + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(UserError, match="scene0003_01.sens is damaged"):
        list(scannet.read(tmp_path, "val", **CLIP))


def test_scannet_refuses_what_does_not_fit(tmp_path):
    write_scannet(tmp_path)
    path = tmp_path / "scans/scene0003_01/scene0003_01.sens"
    content = path.read_bytes()
    with pytest.raises(UserError, match="ends after 0.62 s, too early for 16 frames at 8.0 Hz; lower clip.frames"):
        next(scannet.read(tmp_path, "val", frames=16, rate_hz=8.0, side_px=SIDE))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="scene0003_01.sens is damaged: it ends (before|inside) frame [23] of 6"):
        next(scannet.read(tmp_path, "val", **CLIP))
    path.write_bytes(b"\x03" + content[1:])
    with pytest.raises(UserError, match="is a .sens file of version 3; needed 4"):
        next(scannet.read(tmp_path, "val", **CLIP))
    path.unlink()
    with pytest.raises(UserError, match="lacks 1 of 1 scenes of val, the first is scene0003_01"):
        scannet.count(tmp_path, "val")
    (tmp_path / "scannetv2_val.txt").write_text("scene0/../../x\n")
    with pytest.raises(UserError, match="scannetv2_val.txt, line 1: .*which is not a scene such as scene0000_00"):
        scannet.count(tmp_path, "val")


EXPORTS = pytest.mark.parametrize("export", scannet.EXPORTS.values(), ids=["sensreader", "posed_images"])


def write_export(root: Path, export: scannet.Export, *, frames: int = 30, **changes) -> Sample:
    depth = np.linspace(0.5, 4, frames * 16 * 16).reshape(frames, 16, 16)
    labels = {"depth_m": depth, "camera_to_world": poses(frames), "intrinsics": INTRINSICS} | changes
    sample = Sample("scene0003_01", "scene0003", pictures(frames), labels)
    scannet.write_exported(root, "val", [sample], export=export, jpeg_quality=95)
    return sample


@EXPORTS
def test_scannet_exports_read_back_in_the_order_of_their_numbers(tmp_path, export):
    """30 frames a second without time stamps; sorted as text, 10 would come before 2."""
    written = write_export(tmp_path, export)
    assert scannet.count(tmp_path, "val") == 1
    assert (tmp_path / export.scenes / "scene0003_01" / export.color / f"{'7':0>{export.digits}}.jpg").is_file()
    read = next(scannet.read(tmp_path, "val", frames=7, rate_hz=8.0, side_px=SIDE))
    shown = [0, 3, 7, 11, 15, 18, 22]
    assert numbers(read.pixels) == shown
    assert np.allclose(read.labels["camera_to_world"], written.labels["camera_to_world"][shown], atol=1e-5)
    assert np.abs(read.labels["depth_m"] - written.labels["depth_m"][shown].repeat(2, 1).repeat(2, 2)).max() <= 0.0005 + 1e-6
    assert read.valid["depth_m"].all() and read.valid["camera_to_world"].all()


@EXPORTS
def test_scannet_export_and_sens_give_the_same_sample(tmp_path, export):
    written = write_export(tmp_path / "export", export)
    scannet.write(tmp_path / "sens", "val", [written], rate_hz=30.0, jpeg_quality=95)
    clip = {"frames": 7, "rate_hz": 8.0, "side_px": SIDE}
    (a,), (b,) = (list(scannet.read(tmp_path / name, "val", **clip)) for name in ("export", "sens"))
    assert (a.id, a.video) == (b.id, b.video)
    assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.labels["depth_m"], b.labels["depth_m"])


def test_scannet_a_sens_file_goes_before_its_export(tmp_path):
    written = write_export(tmp_path, scannet.SENSREADER)
    assert scannet.layout(tmp_path, "val") == "SensReader's export"
    darker = Sample(written.id, written.video, written.pixels // 2, written.labels)
    (tmp_path / "again").mkdir()
    scannet.write(tmp_path / "again", "val", [darker], rate_hz=30.0, jpeg_quality=95)
    (tmp_path / "again/scans/scene0003_01/scene0003_01.sens").rename(tmp_path / "scans/scene0003_01/scene0003_01.sens")
    assert scannet.layout(tmp_path, "val") == ".sens"
    assert next(scannet.read(tmp_path, "val", **CLIP)).pixels[0].max() == 10


@EXPORTS
def test_scannet_exported_lost_tracking_spoils_the_pose_and_not_the_depth(tmp_path, export):
    lost = poses(30)
    lost[7] = -np.inf
    write_export(tmp_path, export, camera_to_world=lost)
    assert "-inf" in (tmp_path / export.scenes / "scene0003_01" / export.pose / f"{'7':0>{export.digits}}.txt").read_text()
    read = next(scannet.read(tmp_path, "val", frames=4, rate_hz=8.0, side_px=SIDE))
    assert read.valid["camera_to_world"].tolist() == [True, True, False, True]
    assert read.valid["depth_m"].all()


def test_scannet_posed_images_without_depth_intrinsics_take_those_of_the_pictures_at_their_size(tmp_path):
    write_export(tmp_path, scannet.POSED_IMAGES)
    before = next(scannet.read(tmp_path, "val", **CLIP))
    (tmp_path / "posed_images/scene0003_01/depth_intrinsic.txt").unlink()
    assert np.array_equal(next(scannet.read(tmp_path, "val", **CLIP)).labels["depth_m"], before.labels["depth_m"])


def test_scannet_exports_refuse_what_does_not_fit(tmp_path):
    write_export(tmp_path, scannet.SENSREADER)
    folder = tmp_path / "scans/scene0003_01"
    with pytest.raises(UserError, match="ends after 0.97 s, too early for 16 frames at 8.0 Hz; lower clip.frames"):
        next(scannet.read(tmp_path, "val", frames=16, rate_hz=8.0, side_px=SIDE))
    depth, pose, color = (folder / name for name in ("depth/3.png", "pose/3.txt", "color/3.jpg"))
    kept = depth.read_bytes()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(depth)
    with pytest.raises(UserError, match="depth/3.png is a picture of kind L; needed depth as 16-bit grey, in mm"):
        next(scannet.read(tmp_path, "val", **CLIP))
    depth.write_bytes(kept[:50])
    with pytest.raises(UserError, match="depth/3.png cannot be read"):
        next(scannet.read(tmp_path, "val", **CLIP))
    depth.write_bytes(kept)
    pose.write_text("1 0 0 0\n0 1 0 0\n")
    with pytest.raises(UserError, match=r"pose/3.txt holds \(2, 4\) numbers; needed four rows of four"):
        next(scannet.read(tmp_path, "val", **CLIP))
    pose.unlink()
    with pytest.raises(UserError, match="pose/3.txt cannot be read as four rows of four numbers"):
        next(scannet.read(tmp_path, "val", **CLIP))
    color.write_bytes(b"no picture")
    with pytest.raises(UserError, match="color/3.jpg cannot be read"):
        next(scannet.read(tmp_path, "val", **CLIP))
