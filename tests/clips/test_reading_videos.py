"""scaling4d.read_video: the frames at a rate, and clear refusals."""

import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from refusals import refused
from small_videos import save, world

import scaling4d
from scaling4d import video


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 frames at 16 Hz: 2 s."""
    return save(tmp_path_factory.mktemp("videos") / "a.mp4", world(0, 32), rate_hz=16)


@pytest.mark.parametrize(("options", "expected"), [
    ({}, range(32)),
    ({"frames": 5}, range(5)),
    ({"start_s": 0.5}, range(8, 32)),
    ({"start_s": 0.5, "frames": 2}, (8, 9)),
    ({"rate_hz": 4}, range(0, 32, 4)),
    ({"rate_hz": 4, "frames": 8}, range(0, 32, 4)),
    ({"rate_hz": 4, "frames": 3, "start_s": 1.0}, (16, 20, 24)),
    ({"rate_hz": 32, "frames": 4}, (0, 0, 1, 1)),
    ({"rate_hz": 16, "start_s": 1.9375, "frames": 1}, (31,)),
])  # fmt: skip
def test_the_frames_shown_at_the_wanted_times_come_back(path: Path, options: dict, expected: tuple) -> None:
    every = video.decode_all(path)[1]
    pixels = scaling4d.read_video(str(path), **options)
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, every[list(expected)])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("camera_hz", [Fraction(30000, 1001), Fraction(60000, 1001)], ids=["29.97", "59.94"])
def test_rates_of_cameras_show_the_frames_of_exact_fractions_in_every_container(suffix: str, camera_hz: Fraction, tmp_path: Path):
    path = save(tmp_path / f"a{suffix}", world(0, 90, 16, 24), rate_hz=float(camera_hz), crf=5)
    every = video.decode_all(path)[1]
    for rate_hz in (29.97, 30, 7.5, 10):
        frames = int(90 / camera_hz * Fraction(str(rate_hz)))
        times_s = [number / Fraction(str(rate_hz)) + Fraction("1.01e-3") for number in range(frames)]
        expected = every[[math.floor(time_s * camera_hz) for time_s in times_s]]
        assert np.array_equal(scaling4d.read_video(path, rate_hz=rate_hz, frames=frames), expected), rate_hz
        assert np.array_equal(scaling4d.read_video(path, rate_hz=rate_hz)[:frames], expected), rate_hz


def ticks(path: Path, numbers: Iterable[int], tick_s: Fraction, **options: str) -> Path:
    """Single key frames at multiples of a time."""
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream("libx264", rate=1 / tick_s, options={"crf": "5", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = 32, 32, "yuv420p", 1
        for index, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 2 * index % 250, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, tick_s
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("first", [0, 2, 7])
def test_a_file_may_begin_at_any_time_and_every_frame_may_be_a_key_frame(first: int, tmp_path: Path) -> None:
    tick_s = Fraction(1001, 30000)
    path = ticks(tmp_path / "a.mkv", range(first, first + 300), tick_s)
    times_s, every = video.frame_times(path), video.decode_all(path)[1]
    assert times_s - times_s[0] == pytest.approx(np.arange(300) * float(tick_s), abs=1e-9)
    for wanted_s in np.arange(0, 9.9, 1 / 8):
        shown = every[video.frame_indices_at(times_s, [times_s[0] + wanted_s])]
        assert np.array_equal(scaling4d.read_video(path, start_s=wanted_s, rate_hz=8, frames=1), shown), wanted_s


def test_stamps_of_a_camera_that_drops_frames_are_its_own(tmp_path: Path) -> None:
    numbers = [*range(60), *range(70, 140)]
    path = ticks(tmp_path / "a.mp4", numbers, Fraction(1, 30), video_track_timescale="30")
    assert video.frame_times(path) == pytest.approx(np.array(numbers) / 30, abs=1e-9)


@pytest.mark.parametrize("options", [{"frames": 3}, {"frames": 3, "start_s": 0.5}, {"rate_hz": 2}])
def test_frames_that_nobody_asked_for_are_not_kept(path: Path, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb, made = video._rgb, []
    monkeypatch.setattr(video, "_rgb", lambda *arguments: made.append(0) or rgb(*arguments))
    assert len(scaling4d.read_video(path, **options)) <= len(made) <= 5 < 32


SHORT = "PATH: too short: 32 frames, 2.00 s; needed {}; lower start_s or frames"


@pytest.mark.parametrize(("options", "message"), [
    ({"frames": 33}, SHORT.format("33 frames from start_s = 0")),
    ({"rate_hz": 4, "frames": 9}, SHORT.format("9 frames at 4 Hz from start_s = 0")),
    ({"rate_hz": 4, "start_s": 2}, SHORT.format("some frames at 4 Hz from start_s = 2")),
    ({"start_s": 7.5}, SHORT.format("some frames from start_s = 7.5")),
    ({"start_s": -1}, "start_s = -1; needed a finite number, 0 or more"),
    ({"start_s": float("nan")}, "start_s = nan; needed a finite number, 0 or more"),
    ({"rate_hz": 0}, "rate_hz = 0; needed a finite number, more than 0"),
    ({"rate_hz": float("inf")}, "rate_hz = inf; needed a finite number, more than 0"),
    ({"frames": 0}, "frames = 0; needed 1 or more"),
])  # fmt: skip
def test_numbers_that_are_none_and_a_video_that_ends_too_early_are_refused(path: Path, options: dict, message: str) -> None:
    assert refused(scaling4d.read_video, path, **options) == message.replace("PATH", str(path))


def test_broken_files_are_refused_by_name(path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:2000])
    whole = save(tmp_path / "a.webm", world(0, 64), rate_hz=16, crf=5).read_bytes()
    (tmp_path / "cut.webm").write_bytes(whole[: len(whole) // 2])
    messages = {
        "none.mp4": f"no file {tmp_path / 'none.mp4'}",
        ".": f"{tmp_path} is a folder; needed a video file",
        "text.mp4": f"{tmp_path / 'text.mp4'}: not a ",
        "empty.mp4": f"{tmp_path / 'empty.mp4'}: the file is empty",
        "cut.mp4": f"{tmp_path / 'cut.mp4'}: not a readable video: ",
        "cut.webm": f"{tmp_path / 'cut.webm'}: incomplete: the data ends at ",
    }
    for name, message in messages.items():
        assert refused(scaling4d.read_video, tmp_path / name, rate_hz=4, frames=16).startswith(message)
