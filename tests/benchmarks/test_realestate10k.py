"""RealEstate10K: what is written is read back, and the traps of the real download, with videos and with folders of frames."""

from pathlib import Path

import numpy as np
import pytest
from numbered import CLIP, H264, INTRINSICS, SIDE, T, numbers, pictures, poses
from PIL import Image

from scaling4d import seeds, video
from scaling4d.benchmarks import realestate10k
from scaling4d.benchmarks.frames import at_times
from scaling4d.records import Sample, UserError


def write_realestate10k(root: Path, *, clips: int = 1) -> list[Sample]:
    samples = []
    for n in range(clips):
        labels = {"camera_to_world": poses(T, seed=n), "intrinsics": INTRINSICS}
        samples.append(Sample(f"{n:016x}", "abc-DEF_123", pictures() + np.uint8(100 * n % 256), labels))
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
    path.write_text(good.replace(" 0.900000000", " 0,9", 1))
    with pytest.raises(UserError, match="line 2: could not convert string to float: '0,9'"):
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


@pytest.mark.parametrize("place", ["videos", "frames", "."])
def test_realestate10k_reads_back_a_folder_of_frames_a_clip(tmp_path, place):
    labels = {"camera_to_world": poses(T), "intrinsics": INTRINSICS}
    realestate10k.write_frames(tmp_path, "val", [Sample("0" * 16, "abc-DEF_123", pictures(), labels)], rate_hz=8.0)
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / "videos" / ("0" * 16)).rename(tmp_path / place / ("0" * 16))
    assert realestate10k.count(tmp_path, "val") == 1
    assert realestate10k.layout(tmp_path, "val") == "row files, a folder of frames a clip"
    (read,) = realestate10k.read(tmp_path, "val", **CLIP)
    assert numbers(read.pixels) == list(range(T))
    assert np.allclose(read.labels["camera_to_world"], labels["camera_to_world"], atol=1e-7)


def test_realestate10k_frames_and_rows_meet_by_time_stamp_and_not_by_place(tmp_path):
    """Frames 0 and 3 are missing, and names sorted as text would be out of order."""
    labels = {"camera_to_world": poses(12), "intrinsics": INTRINSICS}
    realestate10k.write_frames(tmp_path, "val", [Sample("0" * 16, "abc-DEF_123", pictures(12), labels)], rate_hz=1.0)
    folder = tmp_path / "videos" / ("0" * 16)
    assert sorted(path.name for path in folder.iterdir())[1] == "10000000.png"
    for second in (1, 4):
        (folder / f"{second}000000.png").unlink()
    (folder / "cover.png").write_bytes(b"")
    (read,) = realestate10k.read(tmp_path, "val", frames=9, rate_hz=1.0, side_px=SIDE)
    shown = [1, 2, 2, 4, 5, 6, 7, 8, 9]
    assert numbers(read.pixels) == shown
    assert np.allclose(read.labels["camera_to_world"], labels["camera_to_world"][shown], atol=1e-7)


def test_realestate10k_real_rows_are_rotations_and_cameras_that_go_their_way(tmp_path):
    real = Path(__file__).parents[1] / "fixtures/realestate10k_0c11dbe781b1c11c.txt"
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0c11dbe781b1c11c.txt").write_text(real.read_text())
    folder = tmp_path / "videos/0c11dbe781b1c11c"
    folder.mkdir(parents=True)
    for n, line in enumerate(real.read_text().splitlines()[1:]):
        Image.fromarray(np.full((36, 64, 3), 10 * n, np.uint8)).save(folder / f"{int(line.split()[0]):015d}.png")
    (read,) = realestate10k.read(tmp_path, "train", frames=4, rate_hz=3.0, side_px=SIDE)
    assert (read.id, read.video) == ("0c11dbe781b1c11c", "a-Unpcomk5k")
    assert read.pixels[:, 0, 0, 0].tolist() == [0, 10, 20, 40]  # steps of 267 and 300 ms, nearest to thirds of a second
    rotation = read.labels["camera_to_world"][:, :3, :3]
    assert np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-6)
    first = np.array([float(x) for x in real.read_text().splitlines()[1].split()[7:]]).reshape(3, 4)
    assert np.allclose(first @ np.append(read.labels["camera_to_world"][0, :3, 3], 1), 0, atol=1e-6)


def test_realestate10k_a_bad_row_file_is_one_bad_sample(tmp_path):
    write_realestate10k(tmp_path, clips=3)
    first, second, _ = sorted((tmp_path / "test").glob("*.txt"))
    first.write_text(first.read_text().replace(" 0.900000000", " nan", 1))
    second.write_text("")
    skipped = []
    assert len(list(realestate10k.read(tmp_path, "val", **CLIP, skipped=skipped))) == 1
    assert [item.id for item in skipped if item.bad] == [first.stem, second.stem]
    assert "are not rotations with translations" in skipped[0].why
    assert "needed a YouTube address in the first line" in skipped[1].why


def test_realestate10k_frames_that_are_no_pictures_are_refused(tmp_path):
    labels = {"camera_to_world": poses(T), "intrinsics": INTRINSICS}
    realestate10k.write_frames(tmp_path, "val", [Sample("0" * 16, "abc-DEF_123", pictures(), labels)], rate_hz=8.0)
    folder = tmp_path / "videos" / ("0" * 16)
    path = folder / "1000000.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="1000000.png cannot be read"):
        list(realestate10k.read(tmp_path, "val", **CLIP))
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"holds no <time stamp>.png or .jpg of a time that 0{16}.txt lists"):
        list(realestate10k.read(tmp_path, "val", **CLIP))


def test_realestate10k_a_clip_late_in_a_video_is_not_decoded_from_its_start(tmp_path, monkeypatch):
    write_realestate10k(tmp_path, clips=20)
    path, decoded, frames = tmp_path / "videos/abc-DEF_123.mp4", [], video.frames
    wanted = [at_times(path, (n * T + np.arange(T)) / 8.0) for n in range(20)]
    monkeypatch.setattr(video, "frames", lambda source: map(lambda frame: decoded.append(frame[0]) or frame, frames(source)))
    found = [sample.pixels for sample in realestate10k.read(tmp_path, "val", **CLIP)]
    assert len(found) == 20 and all(map(np.array_equal, found, wanted))
    assert decoded == [0.0] * 20  # of each, the first frame, whose time counts as 0; the others come from near them


def test_realestate10k_a_video_that_ends_before_a_clip_or_is_damaged_there_gives_the_others(tmp_path):
    write_realestate10k(tmp_path, clips=4)
    path = tmp_path / "videos/abc-DEF_123.mp4"
    noise = seeds.numpy(0, "noise").integers(0, 256, (4 * T, SIDE, SIDE, 3), dtype=np.uint8)
    video.write(path, noise[: 2 * T], codec="libx264", **H264)
    with pytest.raises(UserError, match=r"abc-DEF_123.mp4 ends at 1.50 s, needed 2.12 s; lower clip.frames or raise rate_hz"):
        list(realestate10k.read(tmp_path, "val", **CLIP))
    video.write(path, noise, codec="libx264", **H264)
    damaged = bytearray(path.read_bytes())
    pictures_at, header_at = damaged.index(b"mdat"), damaged.index(b"moov")
    late = pictures_at + (header_at - pictures_at) * 5 // 8
    damaged[late : header_at - 4] = bytes(header_at - 4 - late)
    path.write_bytes(damaged)
    skipped = []
    assert [sample.id for sample in realestate10k.read(tmp_path, "val", **CLIP, skipped=skipped)] == ["0" * 16, "0" * 15 + "1"]
    assert [(item.id[-1], item.bad) for item in skipped] == [("2", True), ("3", True)]
