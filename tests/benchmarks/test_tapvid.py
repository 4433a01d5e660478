"""TAP-Vid: what is written is read back, and the traps of the real download, and pickles that would run something."""

import os
import pickle
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.writers import write_tapvid, write_tapvid_kinetics
from numbered import CLIP, in_square, numbers, pictures, read, refused
from payload import Payload

from scaling4d import seeds
from scaling4d.benchmarks import tapvid
from scaling4d.records import Sample, UserError

FOUR = replace(CLIP, frames=4, rate_hz=5.0)  # every fifth frame of 25 a second


def tap_sample(name: str = "goat", *, frames: int = 30) -> Sample:
    visible = np.ones((4, frames), bool)
    visible[1, 5:9] = visible[2, 0] = visible[3] = False  # the third track appears later, the fourth never
    points = seeds.numpy_rng(0, "tap", name).uniform(0.3, 0.7, (4, frames, 2)).astype(np.float32)
    return Sample(name, name, pictures(frames, height=32, width=48), {"points": points}, {"points": visible})


def check_tap(sample: Sample, written: Sample) -> None:
    expected = in_square(written.labels["points"][:2, 0:20:5])
    valid = written.valid["points"][:2, 0:20:5]
    assert np.array_equal(sample.valid["points"], valid)
    assert np.allclose(sample.labels["points"][valid], expected[valid], atol=1e-6)
    assert numbers(sample.pixels) == [0, 5, 10, 15]


@pytest.mark.parametrize("protocol", range(6))
def test_tapvid_sets_of_every_kind_and_version_of_pickles_are_read(tmp_path, protocol):
    """Pixel centres lie at whole numbers, (x W - 0.5) / W, as generate_tapvid.py stores them."""
    written = tap_sample()
    points = written.labels["points"].astype(float) - 0.5 / np.array([48, 32])
    content = {"video": written.pixels, "points": points, "occluded": ~written.valid["points"]}
    for kind, name, video_id in (({"goat": content}, "davis", "goat"), ([content], "rgb_stacking", "tapvid_rgb_stacking-0000")):
        path = tmp_path / f"tapvid_{name}.pkl"
        path.write_bytes(pickle.dumps(kind, protocol=protocol))
        (sample,) = read(tapvid, tmp_path, "val", FOUR)
        assert sample.id == sample.video == video_id
        check_tap(sample, written)
        path.unlink()


def test_tapvid_kinetics_holds_jpegs_in_shards_and_a_part_is_that_part_of_all_of_them(tmp_path):
    written = [tap_sample(f"v{n}") for n in range(5)]
    write_tapvid_kinetics(tmp_path, written, shards=2)
    samples = tapvid.open_split(tmp_path, "val", FOUR)
    assert (samples.layout, samples.count) == ("0000_of_0002.pkl and 1 more", 5)
    names = [f"0000_of_0002-{n:04d}" for n in range(3)] + [f"0001_of_0002-{n:04d}" for n in range(2)]
    for name, before, after in zip(names, written, samples, strict=True):
        assert after.id == name
        check_tap(after, before)
    part = tapvid.open_split(tmp_path, "val", FOUR).part(slice(1, None, 2))
    assert [sample.id for sample in part] == names[1::2]


def test_tapvid_pickles_never_execute_code(tmp_path):
    made, path = tmp_path / "made", tmp_path / "tapvid_davis.pkl"
    attacks = {
        r"os.system|posix.system": Payload(os.system, f"touch {made}"),
        r"\S+.eval": Payload(eval, f"open({str(made)!r}, 'w')"),
        r"\S+.getattr": Payload(getattr, "", "format"),
        r"numpy\S*.fromfile": Payload(np.fromfile, str(path)),
        r"\S+Path|\S+.touch|\S+.getattr": Payload(Path.touch, made),
    }
    pickles = [(name, pickle.dumps({"goat": attack}, protocol)) for name, attack in attacks.items() for protocol in range(6)]
    for name, content in [*pickles, ("os.system", b"cos\nsystem\n(S'touch " + str(made).encode() + b"'\ntR.")]:
        path.write_bytes(content)
        expected = rf"tapvid_davis.pkl is refused: it asks for ({name}), which no numpy array needs; it was not run$"
        refused(expected, tapvid, tmp_path, "val")
    path.write_bytes(b"c_codecs\nencode\n(Vx\nVrot13\ntR.")
    refused("bytes in the encoding 'rot13'", tapvid, tmp_path, "val")
    assert not made.exists()


@pytest.mark.parametrize("dtype", ["bool", "u1", "<f4", ">f8", ">i2", "S7", "<U3"])
@pytest.mark.parametrize("protocol", range(6))
def test_tapvid_arrays_of_every_kind_are_read_as_numpy_reads_them(tmp_path, dtype, protocol):
    path = tmp_path / "x.pkl"
    full = (seeds.numpy_rng(0, "kinds").uniform(size=(3, 4, 2)) * 9).round().astype(dtype)
    for array in (full, np.asfortranarray(full), full[:, ::2], full[:0], full[0, 0, 0]):
        path.write_bytes(pickle.dumps([{"a": array}], protocol=protocol))
        (loaded,) = tapvid.load_pickle(path)
        assert loaded["a"].dtype == array.dtype and loaded["a"].shape == array.shape and np.array_equal(loaded["a"], array)


@pytest.mark.parametrize(("content", "expected"), [
    (np.array([{}, []], dtype=object), "it holds an array of kind 'O8'; needed numbers or bytes"),
    (Payload(np.ndarray, (1,), "O", b"\1" * 8), "x.pkl is no pickle of arrays, or damaged: 'str' object is not callable"),
])  # fmt: skip
def test_tapvid_pickles_make_no_arrays_of_objects_or_pointers(tmp_path, content, expected):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=expected):
        tapvid.load_pickle(tmp_path / "x.pkl")


def test_tapvid_refuses_what_does_not_fit(tmp_path):
    refused(r"needed \*.pkl \(such as tapvid_davis.pkl\)", tapvid, tmp_path, "val")
    write_tapvid(tmp_path, [tap_sample()])
    refused("no split 'train', it is for measuring alone; train points on perception_test", tapvid, tmp_path, "train")
    refused("goat: 30 frames, needed frame 47; lower frames or raise rate_hz", tapvid, tmp_path, "val", replace(CLIP, frames=16))
    path = tmp_path / "tapvid_davis.pkl"
    content = tapvid.load_pickle(path)
    for key, value, expected in (
        ("points", content["goat"]["points"][:, :-1], r"points \(4, 29, 2\) and occluded \(4, 30\) do not fit 30 frames"),
        ("points", content["goat"]["points"] * np.nan, "points that are visible must be numbers"),
        ("video", np.zeros((30, 8, 8), np.uint8), r"a picture is uint8 \(8, 8\); needed uint8 H W 3"),
        ("video", np.array([b"no jpeg"] * 30), "goat: a picture cannot be read"),
    ):
        path.write_bytes(pickle.dumps({"goat": content["goat"] | {key: value}}))
        refused(expected, tapvid, tmp_path, "val", FOUR)
    path.write_bytes(path.read_bytes()[:-100])
    refused("tapvid_davis.pkl is no pickle of arrays, or damaged", tapvid, tmp_path, "val")
    (tmp_path / "tapvid_rgb_stacking.pkl").write_bytes(pickle.dumps([]))
    refused("several of TAP-Vid's sets: tapvid_davis.pkl, tapvid_rgb_stacking.pkl; keep one", tapvid, tmp_path, "val")


def test_tapvid_one_pickle_is_in_memory_at_a_time(tmp_path, monkeypatch):
    write_tapvid_kinetics(tmp_path, [tap_sample(f"v{n}") for n in range(6)], shards=3)
    arrays, alive, load = [], [], tapvid.load_pickle

    def watched(path):
        alive.append(sum(array() is not None for array in arrays))
        content = load(path)
        arrays.extend(weakref.ref(video["points"]) for video in content)
        return content

    monkeypatch.setattr(tapvid, "load_pickle", watched)
    assert len(read(tapvid, tmp_path, "val", FOUR)) == 6
    assert len(alive) == 6 and max(alive) <= 1  # to count and to read; the video that was read last
