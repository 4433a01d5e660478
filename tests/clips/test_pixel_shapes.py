"""Pixels that are no squares: sizes and pictures are those that a player shows."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from small_videos import SETTINGS, inspect, save, world

from scaling4d import video
from scaling4d.benchmarks.frames import frames_by_seeking, frames_by_time, squares_by_number
from scaling4d.clips.settings import CurationConfig
from scaling4d.clips.sources import SourceFile
from scaling4d.video import VideoError

HEIGHT = 96


def shown_as(path: Path, shape: Fraction, *, stored: tuple[int, int] = (HEIGHT, 128), frames: int = 6, turn: int = 0) -> Path:
    """A video with pixels of this shape, width to height, and turned by `turn` degrees."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=8, options={"crf": "5", "threads": "1"})
        (stream.height, stream.width), stream.pix_fmt, stream.sample_aspect_ratio = stored, "yuv420p", shape
        if turn:
            stream.set_display_rotation(turn)
        for image in world(4, frames, *stored):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize(("stored", "shape", "shown"), [
    ((360, 640), Fraction(2, 3), (360, 427)),
    ((256, 340), Fraction(64, 51), (256, 427)),
    ((576, 720), Fraction(64, 45), (576, 1024)),
    ((96, 128), Fraction(1), (96, 128)),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_sizes_are_those_that_a_player_shows(tmp_path, name, stored, shape, shown):
    path = shown_as(tmp_path / name, shape, stored=stored, frames=3)
    header = video.probe(path, sha256="")
    assert (header.height_px, header.width_px) == shown == video.decode_all(path)[1].shape[1:3]
    with av.open(str(path)) as container:  # as ffprobe says it
        assert shown[1] / shown[0] == pytest.approx(float(container.streams.video[0].display_aspect_ratio or 4 / 3), rel=3e-3)


def test_pictures_have_the_shape_of_the_world_wherever_they_are_read(tmp_path):
    """Stored half as wide: twice as wide on show."""
    path = shown_as(tmp_path / "a.mp4", Fraction(2))
    expected = world(4, 6, HEIGHT, 256)
    near = lambda pixels, true: np.abs(pixels.astype(int) - true).mean() < 6  # noqa: E731
    assert near(video.decode_all(path)[1], expected)
    assert near(frames_by_time(path, [0, 0.5]), expected[[0, 4]])
    assert near(video.read_frames_at(path, [0, 0.5]), expected[[0, 4]])
    assert near(frames_by_seeking(path, np.array([0, 0.5])), expected[[0, 4]])
    square = world(4, 6, 48, 128)[:, :, 40:88]
    assert near(video.read_frames_at(path, [0, 0.5], side_px=48), square[[0, 4]])
    assert near(squares_by_number(path, [0, 4], 48), square[[0, 4]])


def test_pixels_are_stretched_before_a_video_is_turned(tmp_path):
    path = shown_as(tmp_path / "a.mp4", Fraction(2), turn=90)
    header = video.probe(path, sha256="")
    assert (header.height_px, header.width_px) == (256, HEIGHT) == video.decode_all(path)[1].shape[1:3]


def test_a_picture_that_its_pixels_shape_would_make_huge_or_small_is_refused(tmp_path, monkeypatch):
    path = shown_as(tmp_path / "a.mp4", Fraction(40), frames=40)
    config = CurationConfig(**SETTINGS)
    (why,) = inspect(tmp_path, SourceFile("a.mp4"), config).rejected
    assert (why.reason, why.detail) == ("too large", "5120x96 px; needed at most 4096 px on the longer side")
    monkeypatch.setattr(video, "MAX_PIXELS", 10**5)
    for read in (video.decode_all, lambda path: video.probe(path, sha256=""), lambda path: video.read_frames_at(path, [0.0])):
        with pytest.raises(VideoError, match="^too large: 5120x96 px; needed at most 100000 px in all"):
            read(path)
    shown_as(tmp_path / "a.mp4", Fraction(1, 4), frames=40)
    (why,) = inspect(tmp_path, SourceFile("a.mp4"), config).rejected
    assert (why.reason, why.detail) == ("too small", "32x96 px; needed 64 px on the shorter side")


def test_square_pixels_are_not_resampled(tmp_path):
    pixels = world(0, 4)
    plain, stated = save(tmp_path / "a.mp4", pixels), shown_as(tmp_path / "b.mp4", Fraction(1))
    for path in (plain, stated):
        with av.open(str(path)) as container:
            frames = [
                frame.reformat(format="rgb24", interpolation=video.BILINEAR | video.TO_RGB).to_ndarray()
                for frame in container.decode(video=0)
            ]
        np.testing.assert_array_equal(video.decode_all(path)[1], frames)
