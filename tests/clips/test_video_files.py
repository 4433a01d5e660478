import io
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from small_videos import save, world

from scaling4d import video


def test_every_frame_comes_back_in_its_place(tmp_path):
    pixels = world(0, 20)
    times_s, read = video.read(save(tmp_path / "a.mp4", pixels, crf=5))
    np.testing.assert_allclose(times_s, np.arange(20) / 16, atol=1e-4)
    assert np.abs(read.astype(int) - pixels).mean() < 4


def test_writing_gives_the_same_bytes_whatever_memory_held_before(tmp_path):
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
    found = video.probe(path, sha256="")
    assert (found.height_px, found.width_px, found.rotation_deg) == (48, 64, degrees)
    assert np.abs(video.read(path)[1].astype(int) - upright).mean() < 4


def test_uneven_times_are_kept(tmp_path):
    wanted_s = np.array([0, 0.04, 0.2, 0.25, 0.7, 0.71, 1.0])
    times_s, _ = video.read(save(tmp_path / "uneven.mp4", world(2, 7), times_s=wanted_s))
    np.testing.assert_allclose(times_s, wanted_s, atol=1e-3)


def test_b_frames_in_avi_keep_the_order_in_which_they_are_shown(tmp_path):
    pixels = np.repeat(np.arange(16, dtype=np.uint8)[:, None, None, None] * 12 + 30, 3, -1) + np.zeros((1, 48, 64, 1), np.uint8)
    with av.open(str(tmp_path / "b.avi"), "w") as out:
        stream = out.add_stream("mpeg4", rate=16, options={"bf": "2", "b_strategy": "0", "q": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for image in pixels:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    times_s, read = video.read(tmp_path / "b.avi")
    assert (np.diff(times_s) > 0).all()
    assert (np.diff(read.mean(axis=(1, 2, 3))) > 0).all()


def test_of_two_picture_streams_the_one_that_a_player_shows_is_read(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as out:
        streams = []
        for height, width in ((24, 32), (48, 64)):
            stream = out.add_stream("libx264", rate=16)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            streams.append(stream)
        streams[0].disposition, streams[1].disposition = 0, av.stream.Disposition.default
        for number in range(8):
            for stream in streams:
                image = world(3, 8, stream.height, stream.width)[number]
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            out.mux(stream.encode())
    assert video.read(tmp_path / "two.mkv")[1].shape == (8, 48, 64, 3)


def test_ten_bit_pictures_become_eight_bit_rgb(tmp_path):
    pixels = world(4, 4)
    with av.open(str(tmp_path / "ten.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=16, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p10le"
        for image in pixels:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p10le")))
        out.mux(stream.encode())
    read = video.read(tmp_path / "ten.mp4")[1]
    assert read.dtype == np.uint8
    assert np.abs(read.astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("kind", ["mkv", "webm"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_truncation_that_raises_nothing_is_found(tmp_path, kind, share):
    path = tmp_path / f"whole.{kind}"
    video.write(path, world(5, 64), rate_hz=16, codec="libx264" if kind == "mkv" else "libvpx-vp9", crf=30, gop=12)
    assert len(video.read(path)[1]) == 64
    whole = path.read_bytes()
    with pytest.raises(video.VideoError, match=r"^incomplete: the data ends at \d\.\d\d s of 4\.\d\d s$"):
        video.read(io.BytesIO(whole[: int(len(whole) * share)]))


def test_a_header_without_pictures_is_not_a_video(tmp_path):
    whole = save(tmp_path / "whole.mp4", world(6, 16)).read_bytes()
    at, boxes = 0, {}
    while at < len(whole):
        size = int.from_bytes(whole[at : at + 4], "big")
        boxes[whole[at + 4 : at + 8]] = whole[at : at + size]
        at += size
    (tmp_path / "header.mp4").write_bytes(boxes[b"ftyp"] + boxes[b"moov"])
    with pytest.raises(video.VideoError, match="no frame can be decoded|decoding fails"):
        video.read(tmp_path / "header.mp4")


def test_a_list_of_other_files_is_not_followed(tmp_path):
    save(tmp_path / "secret.mp4", world(7, 8))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(video.VideoError, match=r"^not a video: a text, a picture, or a list"):
        video.read(tmp_path / "list.mp4")


def encoded(path: Path, pixels: np.ndarray, codec: str = "libx264", **options: str) -> Path:
    """With B-frames, and with whatever else the encoder is told."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options={"threads": "1", **options})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        for image in pixels:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "options", "from_start"),
    [
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
    ],
)
def test_seeking_gives_the_frames_that_decoding_everything_gives(tmp_path, monkeypatch, name, codec, options, from_start):
    path = encoded(tmp_path / name, world(3, 130), codec, **options)
    clock_s, pixels = zip(*video.frames(path), strict=True)
    clock_s, pixels, slow = np.sort(clock_s), np.stack(pixels), []
    real = video._from_start
    monkeypatch.setattr(video, "_from_start", lambda *given: slow.append(given) or real(*given))
    for start_s in (-1.0, 0.0, 0.31, 1.7, 2.5, 4.8):
        wanted_s = clock_s[0] + start_s + np.arange(10) / 7
        expected = pixels[video.nearest(clock_s, wanted_s)]
        np.testing.assert_array_equal(video.at(path, wanted_s), expected)
        np.testing.assert_array_equal(video.at(path, wanted_s, threads=2), expected)
    if from_start is not None:  # a start before the first frame is not sought
        assert len(slow) == (12 if from_start else 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "one two three\n" * 2000),
        ("list.m3u8", "#EXTM3U\n#EXTINF:1,\n/dev/zero\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile near.mp4\n"),
        ("q%d.png", "x"),
    ],
)
def test_texts_and_lists_are_no_videos_and_what_they_name_is_not_opened(tmp_path, name, content):
    os.mkfifo(tmp_path / "near.mp4")  # opening it would wait for ever
    (tmp_path / name).write_text(content)
    with pytest.raises(video.VideoError, match="^not a (video|readable video): "):
        video.probe(tmp_path / name, sha256="")


def test_a_picture_is_no_video(tmp_path):
    from PIL import Image

    for name in ("a.png", "a.jpg", "a.webp"):
        Image.fromarray(world(0, 1)[0]).save(tmp_path / name)
        with pytest.raises(video.VideoError, match="^not a (video|readable video): "):
            video.probe(tmp_path / name, sha256="")


def test_recordings_put_one_behind_the_other_are_refused_since_their_times_start_again(tmp_path):
    one, two = (encoded(tmp_path / f"{i}.ts", world(i, 80)).read_bytes() for i in range(2))
    (tmp_path / "both.ts").write_bytes(one + two)
    with pytest.raises(video.VideoError, match="^time stamps start again: after 3.* s; write the file anew"):
        video.read(tmp_path / "both.ts")


def test_an_open_file_is_read_from_its_beginning_each_time(tmp_path):
    file = io.BytesIO(encoded(tmp_path / "a.avi", world(0, 40), "mpeg4").read_bytes())
    expected = video.at(tmp_path / "a.avi", [0.4, 0.8])
    np.testing.assert_array_equal(video.at(file, [0.4, 0.8]), expected)
    np.testing.assert_array_equal(video.at(file, [0.4, 0.8]), expected)


def test_uneven_and_turned_videos_are_sought_by_time_and_come_out_upright(tmp_path):
    uneven_s = np.cumsum(np.random.default_rng(0).choice([0.03, 0.06, 0.1], 60))
    path = save(tmp_path / "a.mp4", world(17, 60), times_s=uneven_s - uneven_s[0], rotation_deg=90)
    clock_s, pixels = (np.array(column) for column in zip(*video.frames(path), strict=True))
    wanted_s = 1.03 + np.arange(6) / 5
    np.testing.assert_array_equal(video.at(path, wanted_s), pixels[video.nearest(clock_s, wanted_s)])
    small = video.at(path, wanted_s, side_px=24)
    assert small.shape == (6, 24, 24, 3)
    middle = video.at(path, wanted_s)[:, 8:56]  # 64 x 48, upright
    assert np.abs(small.astype(int) - middle.reshape(6, 24, 2, 24, 2, 3).mean((2, 4))).mean() < 6


def test_seeking_reads_nothing_before_the_key_frame_and_nothing_after_the_last_wanted_one(tmp_path, monkeypatch):
    path = encoded(tmp_path / "a.mp4", world(4, 160), g="16", bf="0", **{"x264-params": "scenecut=0"})
    expected = video.at(path, [5.2, 5.3])
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    whole = bytearray(path.read_bytes())
    for number, (start, size) in enumerate(packets):
        if not 128 <= number <= 132:  # the key frame before 5.2 s, frame 130, is frame 128; 5.3 s shows frame 132
            whole[start : start + size] = bytes(size)
    path.write_bytes(whole)
    monkeypatch.setattr(video, "_from_start", None)
    np.testing.assert_array_equal(video.at(path, [5.2, 5.3]), expected)


def test_a_member_of_a_tar_is_read_where_it_lies(tmp_path):
    import tarfile

    path = save(tmp_path / "-ä b.mp4", world(5, 40))
    with tarfile.open(tmp_path / "two,,: ü.tar", "w") as tar:
        for name in ("first", "second"):
            tar.add(path, f"{name}.mp4")
    with tarfile.open(tmp_path / "two,,: ü.tar") as tar:
        second = tar.getmembers()[1]
    member = video.Member(tmp_path / "two,,: ü.tar", second.offset_data, second.size)
    np.testing.assert_array_equal(video.read(member)[1], video.read(path)[1])
    np.testing.assert_array_equal(video.at(member, [1.0, 1.5]), video.at(path, [1.0, 1.5]))
    assert video.sha256(member) == video.sha256(path)
    with pytest.raises(video.VideoError, match="^the file is empty$"):
        video.probe(video.Member(tmp_path / "two,,: ü.tar", 0, 0), sha256="")


def test_a_picture_larger_than_asked_for_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save(tmp_path / "a.mp4", world(6, 4, 48, 64))
    monkeypatch.setattr(video, "_decode", None)
    with pytest.raises(video.VideoError, match=r"^too large: 64x48 px; needed at most 50 px on the longer side$"):
        video.probe(path, sha256="", max_side_px=50)
