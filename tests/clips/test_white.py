"""White is white, black is black, and greys are those of the standard, whatever the layout of the stored picture."""

from pathlib import Path

import av
import numpy as np
import pytest
from small_videos import save

from scaling4d import video

LIMITED, FULL = ((235, 16, 126), (255, 0, 128.1)), ((255, 0, 126), (255, 0, 126))  # stored, and on show


def written(path: Path, level: int, pix_fmt: str, width: int, *, full: bool) -> Path:
    """Grey frames of this stored brightness, without loss."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, width, pix_fmt
        stream.codec_context.color_range = 2 if full else 1
        shift = 2 if "10le" in pix_fmt else 0
        frame = av.VideoFrame(width, 48, pix_fmt)
        for number, plane in enumerate(frame.planes):
            values = np.full(plane.buffer_size >> bool(shift), (level if number == 0 else 128) << shift)
            plane.update(values.astype(np.uint16 if shift else np.uint8).tobytes())
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("width", [64, 63])
@pytest.mark.parametrize(("pix_fmt", "levels"), [
    ("yuv420p", LIMITED), ("yuv422p", LIMITED), ("yuv444p", LIMITED), ("yuv420p10le", LIMITED), ("yuv420p", FULL),
])  # fmt: skip
def test_stored_brightness_becomes_that_of_the_standard(tmp_path, pix_fmt, levels, width):
    for stored, shown in zip(*levels, strict=True):
        path = written(tmp_path / "a.mkv", stored, pix_fmt, width, full=levels == FULL)
        for pixels in (video.decode_all(path)[1], video.read_frames_at(path, [0.0], side_px=32)):
            assert np.abs(pixels - np.float64(shown)).max() < 0.5


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_white_black_and_grey_survive_writing_and_reading(tmp_path, name):
    levels = np.array([255, 0, 128, 64, 192, 255], np.uint8)
    pixels = np.broadcast_to(levels[:, None, None, None], (6, 64, 64, 3))
    shown = video.decode_all(save(tmp_path / name, pixels, crf=0))[1].astype(int)
    assert (shown[[0, 1, 5]] == pixels[[0, 1, 5]]).all() and np.abs(shown - pixels).max() <= 1
