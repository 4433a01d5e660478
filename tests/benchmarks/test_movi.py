"""MOVi-E as scivid distributes it: its tracks, its shards, and what lies beside it."""

import shutil
import struct
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks.writers import message, movi_record, write_array_records, write_movi, write_tapvid
from numbered import CLIP, H264, in_square, left_out, numbers, pictures, read, refused

from scaling4d import benchmarks, seeds
from scaling4d.benchmarks import movi, perception_test
from scaling4d.benchmarks.samples import MissingFiles
from scaling4d.records import Sample, UserError

FOUR = replace(CLIP, frames=4, rate_hz=6.0)  # every second frame of 12 a second


def tracked(name: str = "a") -> Sample:
    visible = np.ones((5, 24), bool)
    visible[1, 5:9] = visible[2, 0] = False  # the third track begins later
    xy = seeds.numpy_rng(0, "movi", name).uniform(0.3, 0.7, (5, 24, 2)).astype(np.float32)
    xy[3, 2:] = -0.2  # out of the picture, yet called visible
    xy[4, 0] = np.nan  # of no meaning where it is hidden
    visible[4, 0] = False
    return Sample(name, name, pictures(24, height=32, width=48), {"points": xy}, {"points": visible})


def test_a_clip_has_the_tracks_that_are_visible_in_its_first_frame(tmp_path):
    written = tracked()
    write_movi(tmp_path, [written])
    (sample,) = read(movi, tmp_path, "train", FOUR)
    assert sample.id == sample.video == "00000-of-00001-0000" and numbers(sample.pixels) == [0, 2, 4, 6]
    expected = in_square(written.labels["points"][[0, 1, 3], 0:8:2])
    valid = written.valid["points"][[0, 1, 3], 0:8:2] & (expected > 0).all(-1)
    order = [int(np.abs(sample.labels["points"][:, 0] - query).sum(-1).argmin()) for query in expected[:, 0]]
    assert sorted(order) == [0, 1, 2] and np.array_equal(sample.valid["points"][order], valid)
    assert valid[2].tolist() == [True, False, False, False]
    assert np.allclose(sample.labels["points"][order][valid], expected[valid], atol=1e-6)


def test_the_order_of_tracks_is_drawn_by_window_and_stays(tmp_path):
    xy = seeds.numpy_rng(0, "many").uniform(0.3, 0.7, (40, 1, 2)).astype(np.float32).repeat(24, 1)
    write_movi(tmp_path, [Sample("a", "a", pictures(24), {"points": xy}, {"points": np.ones((40, 24), bool)})])
    samples = movi.open_split(tmp_path, "train", replace(FOUR, windows="random"))
    first, again, later = (samples.at_index(0, [position])[0].labels["points"][:, 0] for position in (0.0, 0.0, 0.9))
    assert np.array_equal(first, again) and not np.array_equal(first, later)
    assert np.array_equal(np.sort(first, 0), np.sort(later, 0))


def test_records_of_all_shards_are_samples_in_their_order_and_a_missing_shard_is_named(tmp_path):
    write_movi(tmp_path, [tracked(name) for name in "abcde"], shards=2)
    samples = movi.open_split(tmp_path, "train", FOUR)
    assert samples.count == 5 and samples.layout == "2 shards"
    assert [s.id for s in samples] == [f"0000{shard}-of-00002-000{n}" for shard, n in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]]
    shard = tmp_path / "train.array_record-00001-of-00002"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(MissingFiles, match=r"lacks 1 of 2 shards of train, the first is train.array_record-00001-of-00002$"):
        movi.open_split(tmp_path, "train", FOUR)
    shard.write_bytes(content)
    (tmp_path / "train.array_record-00001-of-00003").write_bytes(content)
    refused("holds shards of several sets, of 00002, 00003 each; keep one set there$", movi, tmp_path, "train")
    refused("MOVi-E has no split 'val', it is for training alone; measure points on perception_test$", movi, tmp_path, "val")
    refused(r"needed train.array_record-00000-of-00100 \(shards of full/movi in", movi, tmp_path / "x", "train")


def test_damaged_shards_and_records_are_one_line(tmp_path):
    shard = tmp_path / "train.array_record-00000-of-00001"
    write_movi(tmp_path, [tracked(), tracked("b")])
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content[:70_000])
    refused("00000-of-00001 is damaged, or no ArrayRecord file$", movi, tmp_path, "train")
    content[300:350] = bytes(50)  # in the first chunk
    shard.write_bytes(content)
    ((name, bad, why),) = left_out(movi, tmp_path, "train", FOUR)
    assert (name, bad) == ("00000-of-00001-0000", True) and "is damaged in record 0: Corrupted" in why

    whole = tracked()
    fewer = SimpleNamespace(pixels=whole.pixels, labels=whole.labels, valid={"points": whole.valid["points"][:2]})
    text = message([(1, b"x"), (2, b"\x0a\x00")])
    for record, expected in (
        (b"\xff" * 30, "record 0 is damaged: ValueError"),
        (b"", "record 0 is damaged: KeyError: 'image/encoded'"),
        (message([(2, message([(1, text)]))]), "record 0 is damaged"),
        (movi_record(fewer), r"tracks/2d \(24, 5, 2\) do not fit tracks/visibility \(24, 2\)$"),
        (movi_record(whole).replace(b"\x89PNG", b"\x89PNX", 1), "a picture cannot be read: needed PNG or JPEG$"),
        (movi_record(whole).replace(bytes([8, 1, 18]), bytes([8, 9, 18])), "ValueError: a tensor of type 9; needed float32"),
        (movi_record(whole).replace(struct.pack("<f", float(whole.labels["points"][0, 3, 0])), struct.pack("<f", np.inf)),
         "points that are visible must be numbers$"),
    ):  # fmt: skip
        write_array_records(tmp_path / "train", [record])
        refused(expected, movi, tmp_path, "train", FOUR)
    write_array_records(tmp_path / "train", [movi_record(whole)])
    refused("24 frames, needed frame 30; lower frames or raise rate_hz$", movi, tmp_path, "train", replace(FOUR, frames=16))


def test_without_its_package_the_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_movi(tmp_path, [tracked()])
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    refused(r"needs package array_record; install it with: pip install 'scaling4d\[movi\]'$", movi, tmp_path, "train")


def test_points_are_trained_on_movi_and_measured_on_the_benchmark_beside_it(tmp_path):
    write_movi(tmp_path / "movi", [tracked()])
    with pytest.raises(UserError, match="MOVi-E has no split 'val'"):
        list(benchmarks.read_samples("points", tmp_path, "val", FOUR))
    assert benchmarks.describe_use("points", tmp_path) == "points: trained on movi, measured on nothing"
    for split in ("train", "val"):
        perception_test.write(tmp_path / "perception_test", split, [tracked()], **H264)
    assert benchmarks.describe_use("points", tmp_path) == "points: trained on movi, measured on perception_test"
    assert all(check.usable for check in benchmarks.check_benchmarks(tmp_path, max_bad_share=0.0))
    write_tapvid(tmp_path / "tapvid", [tracked()])
    assert benchmarks.describe_use("points", tmp_path) == "points: trained on movi, measured on tapvid"
    shutil.rmtree(tmp_path / "movi")
    assert benchmarks.describe_use("points", tmp_path) == "points: trained on perception_test, measured on tapvid"
