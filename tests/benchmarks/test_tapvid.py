"""TAP-Vid: what is written is read back, and the traps of the real download, and pickles that would run something."""

import os
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
from numbered import SIDE, numbers, pictures

from scaling4d import seeds
from scaling4d.benchmarks import tapvid
from scaling4d.records import Sample, UserError


def tap_sample(name: str = "goat", *, frames: int = 30) -> Sample:
    rng = seeds.numpy(0, "tap", name)
    seen = np.ones((4, frames), bool)
    seen[1, 5:9] = False
    seen[2, 0] = False  # first seen later
    seen[3] = False  # never seen
    points = rng.uniform(0.3, 0.7, (4, frames, 2)).astype(np.float32)
    return Sample(name, name, pictures(frames, height=32, width=48), {"points": points}, {"points": seen})


TAP_CLIP = {"frames": 4, "rate_hz": 5.0, "side_px": SIDE}  # every fifth frame of 25 a second


def check_tap(read: Sample, written: Sample) -> None:
    expected = written.labels["points"][:2, 0:20:5] * [1.5, 1] - [0.25, 0]  # of the central square of 32 x 48
    valid = written.valid["points"][:2, 0:20:5]
    assert np.array_equal(read.valid["points"], valid)
    assert np.allclose(read.labels["points"][valid], expected[valid], atol=1e-6)
    assert numbers(read.pixels) == [0, 5, 10, 15]


def test_tapvid_davis_reads_back_without_what_is_hidden_in_frame_0(tmp_path):
    written = tap_sample()
    tapvid.write(tmp_path, "val", [written])
    assert tapvid.count(tmp_path, "val") == 1
    (read,) = tapvid.read(tmp_path, "val", **TAP_CLIP)
    assert (read.id, read.video) == ("goat", "goat")
    check_tap(read, written)


def test_tapvid_points_are_stored_with_pixel_centres_at_whole_numbers(tmp_path):
    """As generate_tapvid.py does: (x W - 0.5) / W."""
    written = tap_sample()
    tapvid.write(tmp_path, "val", [written])
    stored = pickle.loads((tmp_path / "tapvid_davis.pkl").read_bytes())["goat"]["points"]
    assert np.allclose(stored[..., 0], (written.labels["points"][..., 0] * 48 - 0.5) / 48)
    assert np.allclose(stored[..., 1], (written.labels["points"][..., 1] * 32 - 0.5) / 32)


def test_tapvid_kinetics_holds_jpegs_in_shards_and_a_part_is_that_part_of_all_of_them(tmp_path):
    written = [tap_sample(f"v{n}") for n in range(5)]
    tapvid.write_kinetics(tmp_path, "val", written, shards=2, jpeg_quality=95)
    assert tapvid.layout(tmp_path, "val") == "0000_of_0002.pkl and 1 more"
    names = [f"0000_of_0002-{n:04d}" for n in range(3)] + [f"0001_of_0002-{n:04d}" for n in range(2)]
    read = list(tapvid.read(tmp_path, "val", **TAP_CLIP))
    assert [sample.id for sample in read] == names
    for before, after in zip(written, read, strict=True):
        check_tap(after, before)
    assert [sample.id for sample in tapvid.read(tmp_path, "val", **TAP_CLIP, part=slice(1, None, 2))] == names[1::2]


@pytest.mark.parametrize("protocol", range(6))
def test_tapvid_lists_and_every_version_of_pickles_are_read(tmp_path, protocol):
    written = tap_sample()
    tapvid.write(tmp_path, "val", [written])
    path = tmp_path / "tapvid_davis.pkl"
    content = tapvid.load(path)
    path.unlink()
    (tmp_path / "tapvid_rgb_stacking.pkl").write_bytes(pickle.dumps(list(content.values()), protocol=protocol))
    (read,) = tapvid.read(tmp_path, "val", **TAP_CLIP)
    check_tap(read, written)


class Touch:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Calls:
    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_tapvid_pickles_never_execute_code(tmp_path):
    made = tmp_path / "made"
    path = tmp_path / "tapvid_davis.pkl"
    attacks = {
        "system": Calls(os.system, f"touch {made}"),
        "eval": Calls(eval, f"open({str(made)!r}, 'w')"),
        "getattr": Calls(getattr, "", "format"),
        "fromfile": Calls(np.fromfile, str(path)),
    }
    for name, attack in attacks.items():
        for protocol in range(6):
            path.write_bytes(pickle.dumps({"goat": {"points": attack}}, protocol=protocol))
            expected = rf"tapvid_davis.pkl is refused: it asks for \S+\.{name}, which no numpy array needs; it was not run"
            with pytest.raises(UserError, match=expected) as info:
                tapvid.count(tmp_path, "val")
            assert len(str(info.value).splitlines()) == 1
    path.write_bytes(pickle.dumps({"goat": Touch(made)}))
    with pytest.raises(UserError, match=r"it asks for \S+, which no numpy array needs; it was not run"):
        tapvid.count(tmp_path, "val")
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(made).encode() + b"'\ntR.")
    with pytest.raises(UserError, match="it asks for os.system, which no numpy array needs; it was not run"):
        tapvid.count(tmp_path, "val")
    path.write_bytes(b"c_codecs\nencode\n(Vx\nVrot13\ntR.")
    with pytest.raises(UserError, match="bytes in the encoding 'rot13'"):
        tapvid.count(tmp_path, "val")
    assert not made.exists()


@pytest.mark.parametrize("dtype", ["bool", "u1", "<f4", ">f8", ">i2", "S7", "<U3"])
@pytest.mark.parametrize("protocol", range(6))
def test_tapvid_arrays_of_every_kind_are_read_as_numpy_reads_them(tmp_path, dtype, protocol):
    path = tmp_path / "x.pkl"
    whole = (seeds.numpy(0, "kinds").uniform(size=(3, 4, 2)) * 9).round().astype(dtype)
    for array in (whole, np.asfortranarray(whole), whole[:, ::2], whole[:0], whole[0, 0, 0]):
        path.write_bytes(pickle.dumps([{"a": array}], protocol=protocol))
        (read,) = tapvid.load(path)
        assert read["a"].dtype == array.dtype and read["a"].shape == array.shape and np.array_equal(read["a"], array)


def test_tapvid_pickles_make_no_arrays_of_objects_or_pointers(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(np.array([{}, []], dtype=object)))
    with pytest.raises(UserError, match="it holds an array of kind 'O8'; needed numbers or bytes"):
        tapvid.load(path)
    pointers = Calls(np.ndarray, (1,), "O", b"\1" * 8)
    path.write_bytes(pickle.dumps(pointers))
    with pytest.raises(UserError, match="x.pkl is no pickle of arrays, or damaged: 'str' object is not callable"):
        tapvid.load(path)


def test_tapvid_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"needed \*.pkl \(such as tapvid_davis.pkl\)"):
        tapvid.count(tmp_path, "val")
    written = tap_sample()
    tapvid.write(tmp_path, "val", [written])
    with pytest.raises(
        UserError, match="TAP-Vid has no split 'train', it is for measuring alone; train points on perception_test"
    ):
        tapvid.count(tmp_path, "train")
    with pytest.raises(UserError, match="goat: 30 frames, needed frame 47; lower clip.frames"):
        list(tapvid.read(tmp_path, "val", frames=16, rate_hz=8.0, side_px=SIDE))
    path = tmp_path / "tapvid_davis.pkl"
    content = tapvid.load(path)
    for key, value, expected in (
        ("points", content["goat"]["points"][:, :-1], r"points \(4, 29, 2\) and occluded \(4, 30\) do not fit 30 frames"),
        ("points", content["goat"]["points"] * np.nan, "points that are visible must be numbers"),
        ("video", np.zeros((30, 8, 8), np.uint8), r"a picture is uint8 \(8, 8\); needed uint8 H W 3"),
        ("video", np.array([b"no jpeg"] * 30), "a picture is damaged"),
    ):
        path.write_bytes(pickle.dumps({"goat": content["goat"] | {key: value}}))
        with pytest.raises(UserError, match=expected):
            list(tapvid.read(tmp_path, "val", **TAP_CLIP))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="tapvid_davis.pkl is no pickle of arrays, or damaged"):
        tapvid.count(tmp_path, "val")
    (tmp_path / "tapvid_rgb_stacking.pkl").write_bytes(pickle.dumps([]))
    with pytest.raises(UserError, match="several of TAP-Vid's sets: tapvid_davis.pkl, tapvid_rgb_stacking.pkl; keep one"):
        tapvid.count(tmp_path, "val")


def test_tapvid_one_pickle_is_in_memory_at_a_time(tmp_path, monkeypatch):
    tapvid.write_kinetics(tmp_path, "val", [tap_sample(f"v{n}") for n in range(6)], shards=3, jpeg_quality=95)
    arrays, alive, load = [], [], tapvid.load

    def watched(path):
        alive.append(sum(array() is not None for array in arrays))
        content = load(path)
        arrays.extend(weakref.ref(video["points"]) for video in content)
        return content

    monkeypatch.setattr(tapvid, "load", watched)
    assert len(list(tapvid.read(tmp_path, "val", **TAP_CLIP))) == 6
    assert len(alive) == 3 and max(alive) <= 1  # the video that was read last
