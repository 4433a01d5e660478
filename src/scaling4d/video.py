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
from av.video.reformatter import Interpolation, VideoReformatter

from scaling4d.records import UserError, Video

Source = Path | BinaryIO

LISTS = {"concat", "dash", "hls", "image2"}  # formats that make FFmpeg open other files or addresses
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same pixels on every machine
MISSING_S = 0.25  # a file may end this much before its declared end; longer is a truncation (ours)


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
    """Every frame in order of presentation: (time in seconds from the first frame, uint8 H W 3).

    Decoders give pictures in the order in which they are shown. Times may still go backwards where a file's time stamps are
    wrong (AVI with B-frames): sort the times, never the pictures.

    Raises:
        VideoError: as `probe`; data is damaged, encrypted or missing at the end; frames change their size.
    """
    with _open(source) as container:
        stream = _stream(container, source)
        first, size, colours = None, None, VideoReformatter()
        for frame in _decode(container, stream, source):
            time_s = float(frame.pts * frame.time_base) if frame.pts is not None else float("nan")
            first = time_s if first is None else first
            size = size or (frame.height, frame.width)
            if (frame.height, frame.width) != size:
                raise VideoError(f"frames change their size: {size[0]}x{size[1]} px, then {frame.height}x{frame.width} px")
            if frame.is_corrupt:
                raise VideoError(f"damaged picture: at {time_s - first:.2f} s")
            yield time_s - first, _rgb(frame, colours)


def read(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """The whole video: times `T` float64 seconds, ascending; pixels uint8 `T H W 3`."""
    found = list(frames(source))
    if not found:
        raise VideoError("no frame can be decoded")
    times_s = np.sort([time_s for time_s, _ in found])
    if np.isnan(times_s).any():
        raise VideoError("frames without a presentation time")
    return times_s - times_s[0], np.stack([image for _, image in found])


def nearest(times_s: np.ndarray, wanted_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """Index of the frame shown at each wanted time: the last one that starts at or before it (1 ms of tolerance)."""
    return np.clip(np.searchsorted(times_s, np.asarray(wanted_s) + 1e-3, side="right") - 1, 0, len(times_s) - 1)


def write(
    path: Path | BinaryIO,
    pixels: np.ndarray,
    *,
    rate_hz: float,
    codec: str,
    crf: int,
    gop: int,
    container: str | None = None,
    times_s: np.ndarray | None = None,
    rotation_deg: int = 0,
) -> None:
    """Encode uint8 `T H W 3` with `libx264` or `libvpx-vp9`; one thread, so that equal input gives equal bytes.

    crf: constant quality, 0 (best) to 51 (x264) or 63 (vp9). gop: frames from key frame to key frame.
    times_s: `T`, milliseconds kept, where frames do not follow `rate_hz`. rotation_deg: how far a player is to turn the picture,
    counter-clockwise.
    """
    options = {"crf": str(crf), "threads": "1"}
    if codec == "libx264":
        options |= {"mbtree": "0"}  # x264's macroblock tree reads memory that it never wrote: other bytes from run to run
    if codec == "libvpx-vp9":
        options |= {"b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0"}
    with av.open(
        path if hasattr(path, "write") else str(path), "w", format=container, container_options={"fflags": "+bitexact"}
    ) as out:
        stream = out.add_stream(codec, rate=Fraction(rate_hz).limit_denominator(1001), options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        if rotation_deg:
            stream.set_display_rotation(rotation_deg)
        if times_s is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        colours = VideoReformatter()
        for number, image in enumerate(pixels):
            rgb = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = colours.reformat(rgb, format="yuv420p", interpolation=EXACT, threads=1)
            if times_s is not None:
                frame.pts, frame.time_base = round(1000 * times_s[number]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def _open(source: Source) -> av.container.InputContainer:
    if isinstance(source, Path) and source.stat().st_size == 0:
        raise VideoError("the file is empty")
    try:
        container = av.open(
            str(source) if isinstance(source, Path) else source, metadata_errors="ignore", options={"protocol_whitelist": "file"}
        )
    except av.FFmpegError as error:
        raise VideoError(f"not a readable video: {error.strerror or error}") from error
    except UnicodeError as error:
        raise VideoError("file name is not Unicode: rename it") from error
    if LISTS & set(container.format.name.split(",")):
        container.close()
        raise VideoError(f"not a video: {container.format.name}, which is pictures or a list of other files")
    return container


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
    """Every picture, then a check that the data reaches its declared end: a truncated mkv or webm raises nothing by itself."""
    start_s = shown_s = data_s = None
    try:
        for packet in container.demux():
            if packet.pts is not None:
                data_s = max(data_s or 0.0, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is not stream:
                continue
            if packet.has_sidedata("encryption_info"):
                raise VideoError("encrypted: needed a video without copy protection")
            for frame in packet.decode():
                if frame.pts is not None:
                    start_s = float(frame.pts * frame.time_base) if start_s is None else start_s
                    shown_s = max(shown_s or 0.0, float((frame.pts + (frame.duration or 0)) * frame.time_base))
                yield frame
    except av.FFmpegError as error:
        raise VideoError(f"decoding fails: {error.strerror or error}") from error
    if shown_s is None:
        return
    slack_s = MISSING_S + 2 / float(stream.average_rate or stream.guessed_rate or 10)
    if stream.duration is not None:
        found_s, declared_s = shown_s - start_s, float(stream.duration * stream.time_base)
    else:
        found_s, declared_s = data_s, (container.duration or 0) / av.time_base
    if found_s < declared_s - slack_s:
        raise VideoError(f"incomplete: the data ends at {found_s:.2f} s of {declared_s:.2f} s")


def _rotation(frame: av.VideoFrame) -> int:
    """Degrees counter-clockwise to turn the stored picture by; a damaged display matrix counts as none."""
    degrees = frame.rotation % 360
    return degrees if degrees in (0, 90, 180, 270) else 0


def _rgb(frame: av.VideoFrame, colours: VideoReformatter) -> np.ndarray:
    try:
        rgb = colours.reformat(frame, format="rgb24", interpolation=EXACT, threads=1).to_ndarray()
    except av.FFmpegError as error:
        raise VideoError(f"pictures cannot be turned into RGB: {error.strerror or error}") from error
    return np.ascontiguousarray(np.rot90(rgb, k=_rotation(frame) // 90))
