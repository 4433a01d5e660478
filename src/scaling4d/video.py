"""The one file that touches PyAV: probe, decode and encode video.

Frames come out upright (rotation applied), RGB uint8 `T H W 3`, in order of presentation time.
A file that cannot be used raises `VideoError` with a reason that a person understands.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from scaling4d.records import UserError, Video


@dataclass(frozen=True)
class Member:
    """A video inside another file: what a tar holds at an offset, read where it lies."""

    path: Path
    offset: int
    bytes: int


Source = Path | Member | BinaryIO

VERSIONS = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}  # of FFmpeg's libraries
# What FFmpeg may take a file for. Not among them: lists that make it open other files, single pictures, and texts, which it would
# show as moving pictures.
FORMATS = "matroska,mov,avi,flv,mpegts,mpeg,ogg,asf,nut,ivf,gif,mxf,yuv4mpegpipe,dv,wtv,rm,h264,hevc,m4v,obu"
TIMELESS = {"avi"}  # formats that store no presentation times: what FFmpeg makes up is wrong where B-frames are
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same pixels on every machine
ALLOWED = {"protocol_whitelist": "file,subfile", "format_whitelist": FORMATS}
SCALED = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
MAX_PIXELS = 2**26  # of a picture, whatever a header says; a decoder asks for gigabytes before anyone has seen a frame
EARLIER_S = (0.0, 0.5, 2.0, 10.0)  # how much before the wanted time to look for a key frame, in turn; then from the start
TOLERANCE_S = 1e-3  # a frame that starts this much after a wanted time still counts as shown then
BACK_S = 1.0  # frames of one file may be shown so much earlier than one before them says: AVI with B-frames (ours)
MISSING_S = 0.25  # a file may end this much before its declared end; longer is a truncation (ours)


class VideoError(UserError):
    """This file is not a video that can be used; the message says why."""


def sha256(source: Path | Member) -> str:
    """Of a file, or of the part of it that a member is."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest, left = hashlib.sha256(), source.bytes
    with source.path.open("rb") as file:
        file.seek(source.offset)
        while left > 0 and (some := file.read(min(left, 2**20))):
            digest.update(some)
            left -= len(some)
    return digest.hexdigest()


def probe(source: Path | Member, *, sha256: str, max_side_px: int | None = None) -> Video:
    """Read the header and the first frame; sha256 is what `sha256` found.

    Raises:
        VideoError: empty, not a video, larger than max_side_px (before a frame is decoded), no video stream, encrypted, no frame
            decodes.
    """
    with _open(source) as container:
        stream = _stream(container)
        declared = (stream.codec_context.width, stream.codec_context.height)
        if max_side_px is not None and max(declared) > max_side_px:
            raise VideoError(f"too large: {declared[0]}x{declared[1]} px; needed at most {max_side_px} px on the longer side")
        frame = next(_decode(container, stream), None)
        if frame is None:
            raise VideoError("no frame can be decoded")
        rotation = _rotation(frame)
        upright = rotation in (0, 180)
        if stream.duration:  # ASF says 0
            duration_s = float(stream.duration * stream.time_base)
        else:
            duration_s = float(container.duration / av.time_base) if container.duration else 0.0
        return Video(
            path=str(source.path if isinstance(source, Member) else source),
            sha256=sha256,
            codec=stream.codec_context.name,
            duration_s=duration_s,
            rate_hz=float(stream.average_rate or stream.guessed_rate or 0),
            height_px=frame.height if upright else frame.width,
            width_px=frame.width if upright else frame.height,
            rotation_deg=rotation,
        )


def frames(source: Source) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame in order of presentation: (time in seconds on the stream's own clock, uint8 H W 3).

    Decoders give pictures in the order in which they are shown. Times may still go backwards where a file's time stamps are
    wrong (AVI with B-frames): sort the times, never the pictures.

    Raises:
        VideoError: as `probe`; data is damaged, encrypted or missing at the end; frames change their size.
    """
    with _open(source) as container:
        stream = _stream(container)
        first, latest, size, colours = None, -math.inf, None, VideoReformatter()
        for frame in _decode(container, stream):
            time_s = _time_s(frame)
            first = time_s if first is None else first
            size = size or (frame.height, frame.width)
            if (frame.height, frame.width) != size:
                raise VideoError(f"frames change their size: {size[0]}x{size[1]} px, then {frame.height}x{frame.width} px")
            if frame.is_corrupt:
                raise VideoError(f"damaged picture: at {time_s - first:.2f} s")
            latest = max(latest, time_s)
            if time_s < latest - BACK_S:
                raise VideoError(f"time stamps start again: after {latest - first:.2f} s; write the file anew, as by ffmpeg -i")
            yield time_s, _rgb(frame, colours)


def read(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """The whole video: times `T` float64 seconds, ascending from 0; pixels uint8 `T H W 3`."""
    found = list(frames(source))
    if not found:
        raise VideoError("no frame can be decoded")
    times_s = np.sort([time_s for time_s, _ in found])
    if np.isnan(times_s).any():
        raise VideoError("frames without a presentation time: put the video into a container, as by ffmpeg -i")
    return times_s - times_s[0], np.stack([image for _, image in found])


def nearest(times_s: np.ndarray, wanted_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """Index of the frame shown at each wanted time: the last one that starts at or before it (1 ms of tolerance)."""
    return np.clip(np.searchsorted(times_s, np.asarray(wanted_s) + TOLERANCE_S, side="right") - 1, 0, len(times_s) - 1)


def at(source: Source, times_s: Sequence[float] | np.ndarray, *, side_px: int | None = None, threads: int = 1) -> np.ndarray:
    """The frames shown at ascending times on the stream's own clock: uint8 `T H W 3`, the same as picking from all frames.

    Decodes from the key frame before the first time to the last wanted frame; pictures in between that no other needs are left
    out. A file whose time stamps do not allow that is decoded from its start.

    Args:
        side_px: resize the shorter side to it, and keep the middle, `T side side 3`. threads: of the decoder.
    Raises:
        VideoError: as `frames`; what is wrong with a file elsewhere than at these times may go unnoticed.
    """
    wanted = np.asarray(times_s, dtype=np.float64)
    with _open(source) as container:
        stream = _stream(container, threads)
        timeless = TIMELESS & set(container.format.name.split(","))
        tries = (_seek(container, stream, wanted, earlier_s) for earlier_s in (() if timeless else EARLIER_S))
        found = next((some for some in tries if some is not None), None)
    if found is None:
        return _from_start(source, wanted, side_px)
    shown, chosen = found
    if len({(frame.height, frame.width) for frame in shown.values()}) > 1:
        raise VideoError("frames change their size")
    colours = VideoReformatter()
    images = {pts: _rgb(frame, colours, side_px) for pts, frame in shown.items()}
    return np.stack([images[pts] for pts in chosen])


def _seek(
    container: av.container.InputContainer, stream: av.VideoStream, wanted_s: np.ndarray, earlier_s: float
) -> tuple[dict[int, av.VideoFrame], list[int]] | None:
    """Frames by pts, and the pts shown at each wanted time; None where a key frame `earlier_s` before them is not enough."""
    base = stream.time_base
    first, last = int((wanted_s[0] - earlier_s + TOLERANCE_S) / base), (wanted_s[-1] + TOLERANCE_S) / base
    packets = []
    try:
        container.seek(first, stream=stream)
    except av.FFmpegError:  # no index, or nothing before this time
        return None
    try:
        for packet in container.demux(stream):
            if packet.pts is None:
                break  # the end; or a file without time stamps, which has no packet here
            if packet.has_sidedata("encryption_info"):
                raise VideoError("encrypted: needed a video without copy protection")
            packets.append(packet)
            if packet.dts is not None and packet.dts > last:
                break
        times = np.array(sorted(packet.pts for packet in packets if not packet.is_discard), dtype=np.int64)
        if not len(times) or not packets[0].is_keyframe or packets[0].pts * base > wanted_s[0] + TOLERANCE_S:
            return None
        chosen = times[nearest(times * float(base), wanted_s)].tolist()
        kept = set(chosen)
        end = max(index for index, packet in enumerate(packets) if packet.pts in kept)
        shown: dict[int, av.VideoFrame] = {}
        before = None
        skips = stream.codec_context.thread_count == 1 and stream.codec_context.name != "libdav1d"  # that asks only once
        for packet in [*packets[: end + 1], None]:
            if packet is not None and skips:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in kept else "NONREF"
            for frame in stream.codec_context.decode(packet):
                if frame.pts is None or (before is not None and frame.pts <= before):
                    return None  # pictures come in the order in which they are shown: these times are wrong
                before = frame.pts
                if frame.pts in kept and not frame.is_corrupt:
                    shown[frame.pts] = frame
    except av.FFmpegError as error:
        raise VideoError(f"decoding fails: {error.strerror or error}") from error
    return (shown, chosen) if shown.keys() == kept else None


def _from_start(source: Source, wanted_s: np.ndarray, side_px: int | None) -> np.ndarray:
    clock_s = np.sort([time_s for time_s, _ in frames(source)])
    if not len(clock_s):
        raise VideoError("no frame can be decoded")
    if np.isnan(clock_s).any():
        raise VideoError("frames without a presentation time: put the video into a container, as by ffmpeg -i")
    chosen = nearest(clock_s, wanted_s).tolist()
    images = {}
    with _open(source) as container:
        colours = VideoReformatter()
        for index, frame in enumerate(_decode(container, _stream(container))):
            if index in chosen:
                images[index] = _rgb(frame, colours, side_px)
    return np.stack([images[index] for index in chosen])


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
    if isinstance(source, Path | Member) and (source.bytes if isinstance(source, Member) else source.stat().st_size) == 0:
        raise VideoError("the file is empty")
    name = source
    if hasattr(source, "seek"):
        source.seek(0)
    if isinstance(source, Path):
        name = f"file:{source}"  # whatever the name begins with
    elif isinstance(source, Member):
        name = f"subfile,,start,{source.offset},end,{source.offset + source.bytes},,:file:{source.path}"
    try:
        container = av.open(name, metadata_errors="ignore", options=ALLOWED)
    except (av.FileNotFoundError, av.PermissionError, av.MemoryError) as error:
        raise OSError(error.errno, error.strerror) from error
    except av.ArgumentError as error:
        raise VideoError("not a video: a text, a picture, or a list of other files") from error
    except av.FFmpegError as error:
        raise VideoError(f"not a readable video: {error.strerror or error}") from error
    except UnicodeError as error:
        raise VideoError("file name is not Unicode: rename it") from error
    return container


def _stream(container: av.container.InputContainer, threads: int = 1) -> av.VideoStream:
    """The best picture stream that moves; cover art does not."""
    moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not moving:
        raise VideoError("no video stream")
    best = container.streams.best("video")
    stream = best if best in moving else moving[0]
    stream.thread_type = "SLICE" if threads == 1 else "AUTO"
    stream.codec_context.thread_count = threads
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _time_s(frame: av.VideoFrame) -> float:
    return float(frame.pts * frame.time_base) if frame.pts is not None else float("nan")


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
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
    if stream.duration:
        found_s, declared_s = shown_s - start_s, float(stream.duration * stream.time_base)
    else:
        found_s, declared_s = data_s, (container.duration or 0) / av.time_base
    if found_s < declared_s - slack_s:
        raise VideoError(f"incomplete: the data ends at {found_s:.2f} s of {declared_s:.2f} s")


def _rotation(frame: av.VideoFrame) -> int:
    """Degrees counter-clockwise to turn the stored picture by; a damaged display matrix counts as none."""
    degrees = frame.rotation % 360
    return degrees if degrees in (0, 90, 180, 270) else 0


def _rgb(frame: av.VideoFrame, colours: VideoReformatter, side_px: int | None = None) -> np.ndarray:
    """Upright uint8 `H W 3`; with side_px the middle of it, `side side 3`."""
    size, crop = {"interpolation": EXACT}, (slice(None), slice(None))
    if side_px is not None:
        scale = side_px / min(frame.height, frame.width)
        height, width = max(side_px, round(frame.height * scale)), max(side_px, round(frame.width * scale))
        size = {"interpolation": SCALED, "height": height, "width": width}
        top, left = (height - side_px) // 2, (width - side_px) // 2
        crop = (slice(top, top + side_px), slice(left, left + side_px))
    try:
        rgb = colours.reformat(frame, format="rgb24", threads=1, **size).to_ndarray()[crop]
    except av.FFmpegError as error:
        raise VideoError(f"pictures cannot be turned into RGB: {error.strerror or error}") from error
    return np.ascontiguousarray(np.rot90(rgb, k=_rotation(frame) // 90))
