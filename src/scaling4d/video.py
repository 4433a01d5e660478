"""The one file that touches PyAV: probe, decode and encode video.

Frames come out upright (rotation applied), RGB uint8 `T H W 3`, in order of presentation time.
A file that cannot be used raises `VideoError` with a reason that a person understands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from scaling4d.records import UserError, Video

Source = Path | BinaryIO


class VideoError(UserError):
    """This file is not a video that can be used; the message says why."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def probe(path: Path) -> Video:
    """Read the header and the first frame.

    Raises:
        VideoError: empty, not a video, no video stream, encrypted, no frame decodes.
    """
    with _open(path) as container:
        stream = _stream(container, path)
        frame = next(_decode(container, stream, path), None)
        if frame is None:
            raise VideoError("no frame can be decoded")
        rotation = _rotation(frame)
        upright = rotation in (0, 180)
        if stream.duration is not None:
            duration_s = float(stream.duration * stream.time_base)
        else:
            duration_s = float(container.duration / av.time_base) if container.duration else 0.0
        return Video(
            path=str(path),
            sha256=sha256(path),
            codec=stream.codec_context.name,
            duration_s=duration_s,
            rate_hz=float(stream.average_rate or stream.guessed_rate or 0),
            height_px=frame.height if upright else frame.width,
            width_px=frame.width if upright else frame.height,
            rotation_deg=rotation,
        )


def frames(source: Source) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame in order: (presentation time in seconds from the first frame, uint8 H W 3).

    Raises:
        VideoError: as `probe`, and when the data is damaged.
    """
    with _open(source) as container:
        stream = _stream(container, source)
        first = None
        for frame in _decode(container, stream, source):
            time_s = float(frame.pts * frame.time_base) if frame.pts is not None else float("nan")
            first = time_s if first is None else first
            yield time_s - first, _rgb(frame)


def read(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """The whole video: times `T` float64 seconds, pixels uint8 `T H W 3`, sorted by time."""
    times, pixels = [], []
    for time_s, image in frames(source):
        times.append(time_s)
        pixels.append(image)
    if not pixels:
        raise VideoError("no frame can be decoded")
    if len({image.shape for image in pixels}) > 1:
        raise VideoError("frames change their size")
    times_s = np.array(times)
    if np.isnan(times_s).any():
        raise VideoError("frames without a presentation time")
    order = np.argsort(times_s, kind="stable")
    return times_s[order], np.stack(pixels)[order]


def nearest(times_s: np.ndarray, wanted_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """Index of the frame shown at each wanted time: the last one that starts at or before it (1 ms of tolerance)."""
    return np.clip(np.searchsorted(times_s, np.asarray(wanted_s) + 1e-3, side="right") - 1, 0, len(times_s) - 1)


def write(
    path: Path | BinaryIO, pixels: np.ndarray, *, rate_hz: float, codec: str, crf: int, gop: int, container: str | None = None
) -> None:
    """Encode uint8 `T H W 3` with `libx264` or `libvpx-vp9`; one thread, so that equal input gives equal bytes.

    crf: constant quality, 0 (best) to 51 (x264) or 63 (vp9). gop: frames from key frame to key frame.
    """
    options = {"crf": str(crf), "threads": "1"}
    if codec == "libvpx-vp9":
        options |= {"b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0"}
    with av.open(path if hasattr(path, "write") else str(path), "w", format=container, container_options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream(codec, rate=Fraction(rate_hz).limit_denominator(1001), options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for image in pixels:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


def _open(source: Source) -> av.container.InputContainer:
    if isinstance(source, Path) and source.stat().st_size == 0:
        raise VideoError("the file is empty")
    try:
        return av.open(str(source) if isinstance(source, Path) else source, metadata_errors="ignore")
    except (av.FFmpegError, UnicodeError) as error:
        raise VideoError(f"not a readable video ({error.strerror or error})" if isinstance(error, av.FFmpegError) else str(error)) from error


def _stream(container: av.container.InputContainer, source: Source) -> av.VideoStream:
    """The best picture stream that moves; cover art does not."""
    moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not moving:
        raise VideoError("no video stream")
    best = container.streams.best("video")
    stream = best if best in moving else moving[0]
    stream.thread_type = "SLICE"
    stream.codec_context.thread_count = 1
    return stream


def _decode(container: av.container.InputContainer, stream: av.VideoStream, source: Source) -> Iterator[av.VideoFrame]:
    try:
        yield from container.decode(stream)
    except av.FFmpegError as error:
        raise VideoError(f"decoding fails: {error.strerror or error}") from error


def _rotation(frame: av.VideoFrame) -> int:
    """Degrees counter-clockwise to turn the stored picture by; a damaged display matrix counts as none."""
    degrees = frame.rotation % 360
    return degrees if degrees in (0, 90, 180, 270) else 0


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), k=_rotation(frame) // 90))
