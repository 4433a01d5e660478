"""RealEstate10K: what is written is read back, and the traps of the real download, of videos and of frames."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.writers import write_realestate10k_frames
from numbered import CLIP, H264, INTRINSICS, SIDE, T, missing, numbers, pictures, poses, read, refused
from PIL import Image

from scaling4d import seeds, video
from scaling4d.benchmarks import realestate10k
from scaling4d.benchmarks.frames import frames_by_time
from scaling4d.records import Sample

REAL = Path(__file__).parents[1] / "fixtures/realestate10k_0c11dbe781b1c11c.txt"


def clip(n: int = 0, *, frames: int = T) -> Sample:
    labels = {"camera_to_world": poses(frames, seed=n), "intrinsics": INTRINSICS}
    return Sample(f"{n:016x}", "abc-DEF_123", pictures(frames) + np.uint8(100 * n % 256), labels)


def write(root: Path, *, clips: int = 1) -> Path:
    """Clips of one video; the row file of the first."""
    realestate10k.write(root, "val", [clip(n) for n in range(clips)], **H264)
    return root / "test" / f"{0:016x}.txt"


def test_realestate10k_frames_are_matched_by_time_and_steps_may_vary(tmp_path):
    path = write(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3] + lines[4:]) + "\n")  # the third frame was lost
    (sample,) = read(realestate10k, tmp_path, "val", replace(CLIP, frames=3, rate_hz=4.0))
    assert numbers(sample.pixels) == [0, 1, 4]  # nearest rows to 0, 0.25 and 0.5 s, each with its own picture
    assert np.allclose(sample.labels["camera_to_world"], poses(T)[[0, 1, 4]], atol=1e-7)


def test_realestate10k_a_file_of_the_clip_alone_starts_with_its_first_row(tmp_path):
    path = write(tmp_path)
    (tmp_path / "videos/abc-DEF_123.mp4").rename(tmp_path / "videos" / f"{path.stem}.mp4")
    url, *rows = path.read_text().splitlines()
    moved = [f"{int(row.split()[0]) + 158_692_025} {row.split(maxsplit=1)[1]}" for row in rows]
    path.write_text("\n".join([url, *moved]) + "\n")
    samples = realestate10k.open_split(tmp_path, "val", CLIP)
    assert samples.layout == "row files, a video a clip" and numbers(next(iter(samples)).pixels) == list(range(T))


@pytest.mark.parametrize(("edit", "expected"), [
    (lambda text: text + "1 2 3\n", "line 8: 3 columns; needed 19"),
    (lambda text: text.replace(" 0.900000000", " 0,9", 1), "line 2: could not convert string to float: '0,9'"),
    (lambda text: text.replace(" 0.900000000", " nan", 1), "columns 8 to 19 are not rotations with translations"),
    (lambda text: text.splitlines()[0], "has no rows"),
    (lambda text: text.replace("https", "ftp").replace("watch?v=", "v/"), "needed a YouTube address in the first line"),
    (lambda text: "", "needed a YouTube address in the first line, found ''"),
])  # fmt: skip
def test_realestate10k_a_bad_row_file_is_one_bad_sample(tmp_path, edit, expected):
    path = write(tmp_path, clips=2)
    path.write_text(edit(path.read_text()))
    refused(expected, realestate10k, tmp_path, "val")
    skipped = []
    assert len(read(realestate10k, tmp_path, "val", skipped=skipped)) == 1
    assert [(item.id, item.bad) for item in skipped] == [(path.stem, True)]


def test_realestate10k_refuses_what_does_not_fit(tmp_path):
    write(tmp_path)
    refused("too early for 16 frames at 8.0 Hz; lower frames", realestate10k, tmp_path, "val", replace(CLIP, frames=16))
    (tmp_path / "videos/abc-DEF_123.mp4").unlink()
    assert "needed videos/abc-DEF_123.mp4 or videos/0000000000000000.mp4" in missing(realestate10k, tmp_path, "val")


@pytest.mark.parametrize("place", ["videos", "frames", "."])
def test_realestate10k_reads_back_a_folder_of_frames_a_clip(tmp_path, place):
    write_realestate10k_frames(tmp_path, "val", clip(), rate_hz=8.0)
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / "videos" / ("0" * 16)).rename(tmp_path / place / ("0" * 16))
    samples = realestate10k.open_split(tmp_path, "val", CLIP)
    assert (samples.count, samples.missing, samples.layout) == (1, None, "row files, a folder of frames a clip")
    (sample,) = samples
    assert numbers(sample.pixels) == list(range(T))
    assert np.allclose(sample.labels["camera_to_world"], poses(T), atol=1e-7)


def test_realestate10k_frames_and_rows_meet_by_time_stamp_and_not_by_place(tmp_path):
    """Frames 0 and 3 are missing, and names sorted as text would be out of order."""
    write_realestate10k_frames(tmp_path, "val", clip(frames=12), rate_hz=1.0)
    folder = tmp_path / "videos" / ("0" * 16)
    assert sorted(path.name for path in folder.iterdir())[1] == "10000000.png"
    for second in (1, 4):
        (folder / f"{second}000000.png").unlink()
    (folder / "cover.png").write_bytes(b"")
    (sample,) = read(realestate10k, tmp_path, "val", replace(CLIP, frames=9, rate_hz=1.0))
    shown = [1, 2, 2, 4, 5, 6, 7, 8, 9]
    assert numbers(sample.pixels) == shown
    assert np.allclose(sample.labels["camera_to_world"], poses(12)[shown], atol=1e-7)


def test_realestate10k_real_rows_are_rotations_and_cameras_that_go_their_way(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0c11dbe781b1c11c.txt").write_text(REAL.read_text())
    folder = tmp_path / "videos/0c11dbe781b1c11c"
    folder.mkdir(parents=True)
    rows = [line.split() for line in REAL.read_text().splitlines()[1:]]
    for n, row in enumerate(rows):
        Image.fromarray(np.full((36, 64, 3), 10 * n, np.uint8)).save(folder / f"{int(row[0]):015d}.png")
    (sample,) = read(realestate10k, tmp_path, "train", replace(CLIP, frames=4, rate_hz=3.0))
    assert (sample.id, sample.video) == ("0c11dbe781b1c11c", "a-Unpcomk5k")
    assert sample.pixels[:, 0, 0, 0].tolist() == [0, 10, 20, 40]  # steps of 267 and 300 ms, nearest to thirds of a second
    rotation = sample.labels["camera_to_world"][:, :3, :3]
    assert np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-6)
    first = np.array(rows[0][7:], float).reshape(3, 4)
    assert np.allclose(first @ np.append(sample.labels["camera_to_world"][0, :3, 3], 1), 0, atol=1e-6)


def test_realestate10k_frames_that_are_no_pictures_are_refused(tmp_path):
    write_realestate10k_frames(tmp_path, "val", clip(), rate_hz=8.0)
    folder = tmp_path / "videos" / ("0" * 16)
    path = folder / "1000000.png"
    path.write_bytes(path.read_bytes()[:60])
    refused("1000000.png cannot be read", realestate10k, tmp_path, "val")
    for path in folder.iterdir():
        path.unlink()
    refused(r"holds no <time stamp>.png or .jpg of a time that 0{16}.txt lists", realestate10k, tmp_path, "val")


def test_realestate10k_clips_of_a_shared_video_are_read_back_each_without_decoding_it_from_its_start(tmp_path, monkeypatch):
    write(tmp_path, clips=20)
    path, opened, decoded = tmp_path / "videos/abc-DEF_123.mp4", [], []
    av_open, frames = video.av.open, video._decode
    wanted = [frames_by_time(path, (n * T + np.arange(T)) / 8.0) for n in range(20)]
    monkeypatch.setattr(video.av, "open", lambda name, **options: opened.append(name) or av_open(name, **options))
    monkeypatch.setattr(video, "_decode", lambda *of: map(lambda frame: decoded.append(frame.pts) or frame, frames(*of)))
    samples = read(realestate10k, tmp_path, "val")
    assert [sample.video for sample in samples] == ["abc-DEF_123"] * 20 and list((tmp_path / "videos").iterdir()) == [path]
    for n, sample in enumerate(samples):
        assert np.allclose(sample.labels["camera_to_world"], clip(n).labels["camera_to_world"], atol=1e-7)
        assert np.array_equal(sample.pixels, wanted[n]) and np.abs(wanted[n].astype(int) - clip(n).pixels).mean() < 3
    assert len(opened) == 20  # each once
    assert decoded == [0] * 20  # of each, the first frame, whose time counts as 0; the others come from near them


def test_realestate10k_a_video_that_ends_before_a_clip_or_is_damaged_there_gives_the_others(tmp_path):
    write(tmp_path, clips=4)
    path = tmp_path / "videos/abc-DEF_123.mp4"
    noise = seeds.numpy_rng(0, "noise").integers(0, 256, (4 * T, SIDE, SIDE, 3), dtype=np.uint8)
    video.encode(path, noise[: 2 * T], **H264)
    refused(r"abc-DEF_123.mp4 ends at 1.50 s, needed 2.12 s; lower frames or raise rate_hz", realestate10k, tmp_path, "val")
    video.encode(path, noise, **H264)
    damaged = bytearray(path.read_bytes())
    pictures_at, header_at = damaged.index(b"mdat"), damaged.index(b"moov")
    late = pictures_at + (header_at - pictures_at) * 5 // 8
    damaged[late : header_at - 4] = bytes(header_at - 4 - late)
    path.write_bytes(damaged)
    skipped = []
    assert [sample.id[-1] for sample in read(realestate10k, tmp_path, "val", skipped=skipped)] == ["0", "1"]
    assert [(item.id[-1], item.bad) for item in skipped] == [("2", True), ("3", True)]
