import os
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from small_videos import save, world

from scaling4d import video
from scaling4d.video import VideoError


def encoded(path: Path, pixels: np.ndarray, codec: str = "libx264", **options: str) -> Path:
    """With B-frames, and with whatever else the encoder is told."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options={"threads": "1", **options})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        for image in pixels:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")))
        out.mux(stream.encode())
    return path


@pytest.mark.integration
def test_encoding_gives_the_same_bytes_whatever_memory_held_before(tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from small_videos import save, world; import hashlib\n"
        "made = [save(Path(sys.argv[2]) / f'{i}.mp4', world(i, 16, 64, 64), rate_hz=8).read_bytes() for i in range(20)]\n"
        "print(hashlib.sha256(b''.join(made)).hexdigest())\n"
    )
    hashes = set()
    for filler in ("0", "85", "170"):  # what freshly allocated memory holds (glibc)
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
        hashes.add(subprocess.run(command, env=os.environ | {"MALLOC_PERTURB_": filler}, capture_output=True, check=True).stdout)
    assert len(hashes) == 1


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_turned_video_comes_out_upright(tmp_path, degrees):
    upright = world(1, 4, 48, 64)
    stored = np.rot90(upright, k=-degrees // 90, axes=(1, 2))
    path = save(tmp_path / "turned.mp4", np.ascontiguousarray(stored), crf=5, rotation_deg=degrees)
    header = video.probe(path, sha256="")
    assert (header.height_px, header.width_px, header.rotation_deg) == (48, 64, degrees)
    assert np.abs(video.decode_all(path)[1].astype(int) - upright).mean() < 4


@pytest.mark.parametrize("uneven_s", [None, np.array([0, 0.04, 0.2, 0.25, 0.7, 0.71, 1.0])])
def test_every_frame_comes_back_at_its_time_even_or_not(tmp_path, uneven_s):
    pixels = world(0, 7)
    times_s, decoded = video.decode_all(save(tmp_path / "a.mp4", pixels, crf=5, times_s=uneven_s))
    np.testing.assert_allclose(times_s, np.arange(7) / 16 if uneven_s is None else uneven_s, atol=1e-4)
    assert np.abs(decoded.astype(int) - pixels).mean() < 4


def test_b_frames_in_avi_keep_the_order_in_which_they_are_shown(tmp_path):
    pixels = np.repeat(np.arange(16, dtype=np.uint8)[:, None, None, None] * 12 + 30, 3, -1) + np.zeros((1, 48, 64, 1), np.uint8)
    times_s, decoded = video.decode_all(encoded(tmp_path / "b.avi", pixels, "mpeg4", bf="2", b_strategy="0", q="2"))
    assert (np.diff(times_s) > 0).all()
    assert (np.diff(decoded.mean(axis=(1, 2, 3))) > 0).all()


def test_of_two_video_streams_the_one_that_a_player_shows_is_decoded(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as out:
        streams = [out.add_stream("libx264", rate=16) for _ in range(2)]
        for stream, size in zip(streams, ((24, 32), (48, 64)), strict=True):
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        streams[0].disposition, streams[1].disposition = 0, av.stream.Disposition.default
        for stream in streams:
            for image in world(3, 8, stream.height, stream.width):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode())
    assert video.decode_all(tmp_path / "two.mkv")[1].shape == (8, 48, 64, 3)


@pytest.mark.parametrize("kind", ["mkv", "webm"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_truncation_that_raises_nothing_is_found(tmp_path, kind, share):
    path = tmp_path / f"whole.{kind}"
    assert len(video.decode_all(save(path, world(5, 64), crf=30))[1]) == 64
    with pytest.raises(VideoError, match=r"^incomplete: the data ends at \d\.\d\d s of 4\.\d\d s$"):
        video.decode_all(video.FileSlice(path, 0, int(path.stat().st_size * share)))


def test_a_header_without_pictures_is_not_a_video(tmp_path):
    content = save(tmp_path / "whole.mp4", world(6, 16)).read_bytes()
    start, boxes = 0, {}
    while start < len(content):
        size = int.from_bytes(content[start : start + 4], "big")
        boxes[content[start + 4 : start + 8]] = content[start : start + size]
        start += size
    (tmp_path / "header.mp4").write_bytes(boxes[b"ftyp"] + boxes[b"moov"])
    with pytest.raises(VideoError, match="no frame can be decoded|decoding fails"):
        video.decode_all(tmp_path / "header.mp4")


@pytest.mark.parametrize(("name", "content"), [
    ("labels.txt", "one two three\n" * 2000),
    ("list.m3u8", "#EXTM3U\n#EXTINF:1,\n/dev/zero\n"),
    ("list.ffconcat", "ffconcat version 1.0\nfile near.mp4\n"),
    ("list.mp4", "ffconcat version 1.0\nfile near.mp4\n"),
    ("q%d.png", "x"),
    *((f"a.{kind}", None) for kind in ("png", "jpg", "webp")),
])  # fmt: skip
def test_texts_pictures_and_lists_are_no_videos_and_what_they_name_is_not_opened(tmp_path, name, content):
    os.mkfifo(tmp_path / "near.mp4")  # opening it would wait for ever
    if content is None:
        Image.fromarray(world(0, 1)[0]).save(tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(VideoError, match="^not a (video|readable video): "):
        video.probe(tmp_path / name, sha256="")


@pytest.mark.integration
@pytest.mark.parametrize(("name", "codec", "options", "from_start"), [
    ("short.mp4", "libx264", {"g": "6"}, False),
    ("long.mp4", "libx264", {"g": "250"}, False),
    ("b_frames.mkv", "libx264", {"g": "12"}, False),
    ("open.mkv", "libx264", {"g": "12", "x264-params": "open-gop=1:bframes=4:b-pyramid=normal:scenecut=0"}, False),
    ("hevc.mp4", "libx265", {"g": "12", "x265-params": "log-level=error:pools=none"}, False),
    ("vp9.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, False),
    ("av1.mp4", "libsvtav1", {"g": "12", "preset": "12", "svtav1-params": "lp=1"}, False),
    ("h264.ts", "libx264", {"g": "12"}, None),
    ("mpeg4.ts", "mpeg4", {"g": "12"}, None),
    ("mpeg2.mpg", "mpeg2video", {"g": "12", "bf": "2"}, None),
    ("timeless.avi", "mpeg4", {"g": "12", "bf": "2"}, True),
])  # fmt: skip
def test_seeking_gives_the_frames_that_decoding_everything_gives(tmp_path, monkeypatch, name, codec, options, from_start):
    path = encoded(tmp_path / name, world(3, 130), codec, **options)
    clock_s, pixels = zip(*video.decode_frames(path), strict=True)
    clock_s, pixels, slow = np.sort(clock_s), np.stack(pixels), []
    real = video._decode_from_start
    monkeypatch.setattr(video, "_decode_from_start", lambda *given: slow.append(given) or real(*given))
    for start_s in (-1.0, 0.0, 0.31, 1.7, 2.5, 4.8):
        wanted_s = clock_s[0] + start_s + np.arange(10) / 7
        expected = pixels[video.frame_indices_at(clock_s, wanted_s)]
        np.testing.assert_array_equal(video.read_frames_at(path, wanted_s), expected)
    if from_start is not None:  # a start before the first frame is not sought
        assert len(slow) == (6 if from_start else 1)


def test_recordings_one_behind_the_other_are_refused_since_their_times_start_again(tmp_path):
    one, two = (encoded(tmp_path / f"{i}.ts", world(i, 80)).read_bytes() for i in range(2))
    (tmp_path / "both.ts").write_bytes(one + two)
    with pytest.raises(VideoError, match="^time stamps start again: after 3.* s; write the file anew"):
        video.decode_all(tmp_path / "both.ts")


def test_uneven_and_turned_videos_are_sought_by_time_and_come_out_upright(tmp_path):
    uneven_s = np.cumsum(np.random.default_rng(0).choice([0.03, 0.06, 0.1], 60))
    path = save(tmp_path / "a.mp4", world(17, 60), times_s=uneven_s - uneven_s[0], rotation_deg=90)
    clock_s, pixels = (np.array(column) for column in zip(*video.decode_frames(path), strict=True))
    wanted_s = 1.03 + np.arange(6) / 5
    np.testing.assert_array_equal(video.read_frames_at(path, wanted_s), pixels[video.frame_indices_at(clock_s, wanted_s)])
    small = video.read_frames_at(path, wanted_s, side_px=32)
    assert small.shape == (6, 32, 32, 3)
    middle = video.read_frames_at(path, wanted_s)[:, 8:72]  # of 80 x 64, upright
    whole = video.read_frames_at(path, wanted_s, side_px=32, square=False)
    assert whole.shape == (6, 40, 32, 3) and np.array_equal(whole[:, 4:36], small)
    assert np.abs(small.astype(int) - middle.reshape(6, 32, 2, 32, 2, 3).mean((2, 4))).mean() < 6


def test_seeking_reads_nothing_before_the_key_frame_and_nothing_after_the_last_wanted_one(tmp_path, monkeypatch):
    path = encoded(tmp_path / "a.mp4", world(4, 160), g="16", bf="0", **{"x264-params": "scenecut=0"})
    expected = video.read_frames_at(path, [5.2, 5.3])
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for number, (start, size) in enumerate(packets):
        if not 128 <= number <= 132:  # the key frame before 5.2 s, frame 130, is frame 128; 5.3 s shows frame 132
            content[start : start + size] = bytes(size)
    path.write_bytes(content)
    monkeypatch.setattr(video, "_decode_from_start", None)
    np.testing.assert_array_equal(video.read_frames_at(path, [5.2, 5.3]), expected)


def test_a_member_of_a_tar_is_read_where_it_lies(tmp_path):
    path, archive = save(tmp_path / "-ä b.mp4", world(5, 40)), tmp_path / "two,,: ü.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(path, "first.mp4")
        tar.add(path, "second.mp4")
    with tarfile.open(archive) as tar:
        second = tar.getmembers()[1]
    member = video.FileSlice(archive, second.offset_data, second.size)
    np.testing.assert_array_equal(video.decode_all(member)[1], video.decode_all(path)[1])
    np.testing.assert_array_equal(video.read_frames_at(member, [1.0, 1.5]), video.read_frames_at(path, [1.0, 1.5]))
    assert video.sha256(member) == video.sha256(path)
    with pytest.raises(VideoError, match="^the file is empty$"):
        video.probe(video.FileSlice(archive, 0, 0), sha256="")


def test_a_picture_larger_than_asked_for_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save(tmp_path / "a.mp4", world(6, 4, 48, 64))
    monkeypatch.setattr(video, "_decode", None)
    with pytest.raises(VideoError, match=r"^too large: 64x48 px; needed at most 50 px on the longer side$"):
        video.probe(path, sha256="", max_side_px=50)
