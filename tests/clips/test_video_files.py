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
    found = video.probe(path)
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
    with pytest.raises(video.VideoError, match=r"^not a video: concat"):
        video.read(tmp_path / "list.mp4")
