"""Probe, decode and encode video. The one file that imports PyAV.

Decoded frames are as displayed: upright (rotation applied), with square pixels (the width follows the sample aspect
ratio), RGB uint8 `T H W 3`, in order of presentation time.
A file that cannot be used raises `VideoError` with its reason.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from itertools import chain, count, islice
from pathlib import Path

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import Interpolation, VideoReformatter

from scaling4d.records import UserError, Video


@dataclass(frozen=True)
class FileSlice:
    """`bytes` bytes at `offset` of a file: a member of a tar, read without extracting."""

    path: Path
    offset: int
    bytes: int


VideoInput = Path | FileSlice
Times = Sequence[float] | np.ndarray

VERSIONS = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}  # of FFmpeg's libraries
# Formats that FFmpeg may detect. Left out: playlists, which open other files, single pictures, and texts, which FFmpeg
# would render as moving pictures.
FORMATS = "matroska,mov,avi,flv,mpegts,mpeg,ogg,asf,nut,ivf,gif,mxf,yuv4mpegpipe,dv,wtv,rm,h264,hevc,m4v,obu"
OPEN_OPTIONS = {"protocol_whitelist": "file,subfile", "format_whitelist": FORMATS}
CODEC_OPTIONS = {
    "libx264": {"mbtree": "0"},  # x264's macroblock tree reads uninitialised memory: other bytes from run to run
    "libvpx-vp9": {"b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0"},
}
TIMELESS = {"avi"}  # formats without presentation times; FFmpeg's guesses are wrong where B-frames are
BILINEAR = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # equal on every machine
BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
TO_RGB = Interpolation.FULL_CHR_H_INT  # without it, BITEXACT makes white 253, and all pictures darker by 2 of 255
MAX_PIXELS = 2**26  # of a picture, whatever its header says; a decoder allocates gigabytes before the first frame
SEEK_BACK_S = (0.0, 0.5, 2.0, 10.0)  # before the first wanted time: where to seek a key frame, in turn; then the start
TOLERANCE_S = 1.01e-3  # a frame that starts this much after a wanted time counts as shown then; 1 ms is late by 30 of 29.97 Hz
COARSE_S = Fraction(1, 10_000)  # a longer unit of time stamps, as Matroska's 1 ms, moves the frames of a constant rate
COARSE_FRAMES = Fraction(1, 5)  # a unit of more frames than this is a tick of the camera, whose stamps are exact; ours
END_S = 2e-3  # a video shows nothing so shortly before its end: containers round times to milliseconds
BACKWARD_S = 1.0  # a time stamp may lie this much before an earlier one: AVI with B-frames (ours)
NO_TIMES = "frames without a presentation time: write the video into a container, as by ffmpeg -i"
MISSING_S = 0.25  # a file may end this much before its declared end; longer is a truncation (ours)


class VideoError(UserError):
    """The file cannot be used as a video. The message is `reason: detail`, or a reason alone."""


def sha256(source: VideoInput) -> str:
    """Hash of a file's bytes, or of a slice's."""
    path, offset, left = (source, 0, math.inf) if isinstance(source, Path) else (source.path, source.offset, source.bytes)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while left > 0 and (chunk := file.read(min(left, 2**20))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def probe(source: VideoInput, *, sha256: str, max_side_px: int | None = None) -> Video:
    """Read the header and the first frame. sha256: of the file, for the record.

    Raises:
        VideoError: not a video, empty, larger than max_side_px (before decoding), encrypted, no frame decodes.
    """
    with _open(source) as (container, stream):
        declared = (stream.codec_context.width, stream.codec_context.height)
        if max_side_px is not None and max(declared) > max_side_px:
            raise VideoError(f"too large: {declared[0]}x{declared[1]} px; needed at most {max_side_px} px on the longer side")
        frame = next(_decode(container, stream), None)
        if frame is None:
            raise VideoError("no frame can be decoded")
        rotation_deg = _rotation(frame)
        height_px, width_px = _shown_size(frame, _pixel_shape(stream))
        size = (height_px, width_px) if rotation_deg in (0, 180) else (width_px, height_px)
        duration_s = _duration_s(container, stream)
        rate_hz = float(stream.average_rate or stream.guessed_rate or 0)
        path = str(source.path if isinstance(source, FileSlice) else source)
        return Video(path, sha256, stream.codec_context.name, duration_s, rate_hz, *size, rotation_deg)


def decode_frames(source: VideoInput) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame in order of presentation: (time in seconds on the stream's own clock, uint8 H W 3).

    Decoders output pictures in presentation order. Times may still go backwards where a file's time stamps are wrong
    (AVI with B-frames): sort the times (`sort_times`), never the pictures.

    Raises:
        VideoError: as `probe`; data is damaged, encrypted or missing at the end; frames change their size.
    """
    with _open(source) as (container, stream):
        shape, reformatter = _pixel_shape(stream), VideoReformatter()
        for time_s, frame in _intact_frames(container, stream):
            yield time_s, _rgb(frame, reformatter, shape)


def decode_frames_at(source: VideoInput, wanted_s: Iterable[float]) -> Iterator[tuple[float, np.ndarray]]:
    """The frames shown at ascending times after the first frame, as `read_video` picks them, in one pass over the file.

    Ends where the video does, however many times follow. No frame is held for longer than it is shown, except in AVI,
    whose time stamps may be out of order by BACKWARD_S.

    Yields:
        For each wanted time: the frame's own time in seconds after the first frame, and uint8 H W 3. Of times that show
        the same frame, all give the same array.
    Raises:
        VideoError: as `decode_frames`; time stamps that go backwards in another format than AVI.
    """
    wanted = iter(wanted_s)
    with _open(source) as (container, stream):
        shape, reformatter, next_s = _pixel_shape(stream), VideoReformatter(), next(wanted, math.inf)
        passed, first_s, shown, shown_s, end_s = 0, 0.0, None, 0.0, 0.0
        for time_s, frame in _in_order(container, stream):
            first_s = time_s if passed == 0 else first_s
            rgb = None
            while next_s + TOLERANCE_S < time_s - first_s:
                rgb = _rgb(shown, reformatter, shape) if rgb is None else rgb
                yield shown_s, rgb
                next_s = next(wanted, math.inf)
            if next_s == math.inf:
                return
            shown, shown_s, passed = frame, time_s - first_s, passed + 1
            end_s = max(end_s, shown_s + float((frame.duration or 0) * frame.time_base))
        if shown is None:
            raise VideoError("no frame can be decoded")
        end_s = max(end_s, shown_s + (shown_s / (passed - 1) if passed > 1 else 0))  # the last frame is shown for a while
        rgb = _rgb(shown, reformatter, shape)
        while next_s < max(end_s - END_S, TOLERANCE_S):
            yield shown_s, rgb
            next_s = next(wanted, math.inf)


def _in_order(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[tuple[float, av.VideoFrame]]:
    """(time, frame) with ascending times. Pictures keep their order, and the n-th one has the n-th smallest time."""
    wait_s = BACKWARD_S if TIMELESS & set(container.format.name.split(",")) else 0.0
    times_s: list[float] = []  # a heap
    frames: deque[av.VideoFrame] = deque()
    last_s = newest_s = -math.inf
    for time_s, frame in _intact_frames(container, stream):
        if math.isnan(time_s):
            raise VideoError(NO_TIMES)
        if time_s < last_s:
            raise VideoError(f"time stamps go backwards: by {last_s - time_s:.2f} s; write the file anew, as by ffmpeg -i")
        heappush(times_s, time_s)
        frames.append(frame)
        newest_s = max(newest_s, time_s)
        while times_s and times_s[0] <= newest_s - wait_s:
            last_s = heappop(times_s)
            yield last_s, frames.popleft()
    while times_s:
        yield heappop(times_s), frames.popleft()


def _intact_frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[tuple[float, av.VideoFrame]]:
    """(time on the stream's own clock, frame) in order of presentation. Raises VideoError: as `decode_frames`."""
    first_s, last_s, size = None, -math.inf, None
    for frame in _decode(container, stream):
        time_s = _time_s(frame.pts, stream)
        first_s = time_s if first_s is None else first_s
        size = size or (frame.height, frame.width)
        if (frame.height, frame.width) != size:
            raise VideoError(f"frames change their size: {size[0]}x{size[1]} px, then {frame.height}x{frame.width} px")
        if frame.is_corrupt:
            raise VideoError(f"damaged picture: at {time_s - first_s:.2f} s")
        last_s = max(last_s, time_s)
        if time_s < last_s - BACKWARD_S:
            raise VideoError(f"time stamps start again: after {last_s - first_s:.2f} s; write the file anew, as by ffmpeg -i")
        yield time_s, frame


def sort_times(times_s: Sequence[float]) -> np.ndarray:
    """`T` float64, ascending.

    Raises:
        VideoError: no frame, or a frame without a presentation time.
    """
    if not times_s:
        raise VideoError("no frame can be decoded")
    ascending = np.sort(times_s)
    if np.isnan(ascending).any():
        raise VideoError(NO_TIMES)
    return ascending


def decode_all(source: VideoInput) -> tuple[np.ndarray, np.ndarray]:
    """The whole video: times `T` float64 seconds, ascending from 0; pixels uint8 `T H W 3`. Raises VideoError."""
    frames = list(decode_frames(source))
    times_s = sort_times([time_s for time_s, _ in frames])
    return times_s - times_s[0], np.stack([rgb for _, rgb in frames])


def read_video(path: str | Path, *, start_s: float = 0.0, rate_hz: float | None = None, frames: int | None = None) -> np.ndarray:
    """A part of a video file: uint8 `T H W 3`, upright, with square pixels.

    Args:
        start_s: seconds after the first frame. rate_hz: frames per second of the result, those shown at these times
            (a frame that starts up to 1 ms later counts as shown); None: every frame of the file. frames: T; None: to
            the end.
    Raises:
        UserError: no such file, a file that is no video, is damaged or cut short, or ends before the last frame.
    """
    path = Path(path)
    numbers = {"start_s": (start_s, start_s >= 0), "rate_hz": (rate_hz, rate_hz is None or rate_hz > 0)}
    for name, (value, fits) in numbers.items():
        if not (fits and (value is None or math.isfinite(value))):
            raise UserError(f"{name} = {value}; needed a finite number, {'0 or more' if name == 'start_s' else 'more than 0'}")
    if frames is not None and frames < 1:
        raise UserError(f"frames = {frames}; needed 1 or more")
    if not path.is_file():
        raise UserError(f"{path} is a folder; needed a video file" if path.is_dir() else f"no file {path}")
    try:
        return _read_video(path, start_s, rate_hz, frames)
    except VideoError as error:
        raise UserError(f"{path}: {error}") from error


def _read_video(path: Path, start_s: float, rate_hz: float | None, frames: int | None) -> np.ndarray:
    if rate_hz and frames:
        with open_video(path) as opened:
            wanted_s = opened.first_s() + start_s + np.arange(frames) / rate_hz
            if opened.shows(wanted_s[-1]):
                return opened.frames_at(wanted_s)
    if rate_hz:
        wanted = (start_s + number / rate_hz for number in count())
        pictures = [rgb for _, rgb in islice(decode_frames_at(path, wanted), frames)]
    else:
        pictures = [*islice(_frames_from(path, start_s), frames)]
    if len(pictures) < (frames or 1):
        times_s, rate = frame_times(path), f" at {rate_hz:g} Hz" if rate_hz else ""
        needed = f"needed {frames or 'some'} frames{rate} from start_s = {start_s:g}"
        raise VideoError(f"too short: {len(times_s)} frames, {duration_of(times_s):.2f} s; {needed}; lower start_s or frames")
    return np.stack(pictures)


def _frames_from(source: VideoInput, start_s: float) -> Iterator[np.ndarray]:
    """Every frame from a time after the first frame on, uint8 `H W 3`."""
    first_s = None
    with _open(source) as (container, stream):
        shape, reformatter = _pixel_shape(stream), VideoReformatter()
        for time_s, frame in _in_order(container, stream):
            first_s = time_s if first_s is None else first_s
            if time_s - first_s >= start_s - TOLERANCE_S:
                yield _rgb(frame, reformatter, shape)


def frame_times(source: VideoInput) -> np.ndarray:
    """Times of all frames on the stream's own clock, ascending."""
    with _open(source) as (container, stream):
        return sort_times([time_s for time_s, _ in _intact_frames(container, stream)])


def duration_of(times_s: np.ndarray) -> float:
    """Seconds of a video, from the ascending times of all frames: the last frame is shown as long as the others."""
    return (times_s[-1] - times_s[0]) * len(times_s) / max(len(times_s) - 1, 1)


def frame_indices_at(times_s: Times, wanted_s: Times) -> np.ndarray:
    """Index of the frame shown at each wanted time: the last frame that starts at most TOLERANCE_S after it."""
    return np.clip(np.searchsorted(times_s, np.asarray(wanted_s) + TOLERANCE_S, side="right") - 1, 0, len(times_s) - 1)


def read_frames_at(source: VideoInput, times_s: Times, *, side_px: int | None = None, square: bool = True) -> np.ndarray:
    """The frames shown at ascending times on the stream's own clock: uint8 `T H W 3`, as picked from all frames.

    Decodes from the key frame before the first time to the last wanted frame, and skips frames that no wanted one
    refers to. A file whose time stamps do not allow a seek is decoded from its start.

    Args:
        side_px: resize the shorter side to this length and crop the centre, `T side side 3`; not `square`: all of it.
    Raises:
        VideoError: as `decode_frames`; damage elsewhere than at these times may go unnoticed.
    """
    with open_video(source) as opened:
        return opened.frames_at(times_s, side_px=side_px, square=square)


@dataclass(frozen=True)
class OpenVideo:
    """A video that is opened once. duration_s: as its header declares it; 0: it does not."""

    source: VideoInput
    container: av.container.InputContainer
    stream: av.VideoStream
    duration_s: float

    def first_s(self) -> float:
        """Time of the first frame on the stream's own clock. Call it before `frames_at`. Raises VideoError."""
        first = islice(_decode(self.container, self.stream), 1)
        return float(sort_times([_time_s(frame.pts, self.stream) for frame in first])[0])

    def shows(self, time_s: float) -> bool:
        """Whether the data reaches a time on the stream's own clock. Headers may declare an end that is not there."""
        base = self.stream.time_base
        try:
            self.container.seek(int(time_s / base), stream=self.stream)
            for packet in self.container.demux(self.stream):
                if packet.pts is not None and (packet.pts + (packet.duration or 1)) * base > time_s + END_S:
                    return True
        except av.FFmpegError:  # no index, or damaged from there on
            return False
        return False

    def frames_at(self, times_s: Times, *, side_px: int | None = None, square: bool = True) -> np.ndarray:
        """As `read_frames_at`."""
        wanted_s = np.asarray(times_s, dtype=np.float64)
        back_s = () if TIMELESS & set(self.container.format.name.split(",")) else SEEK_BACK_S
        attempts = (_seek(self.container, self.stream, wanted_s, earlier_s) for earlier_s in back_s)
        decoded = next((frames for frames in attempts if frames is not None), None)
        if decoded is None:
            return _decode_from_start(self.source, wanted_s, side_px, square)
        frames, wanted_pts = decoded
        if len({(frame.height, frame.width) for frame in frames.values()}) > 1:
            raise VideoError("frames change their size")
        shape, reformatter = _pixel_shape(self.stream), VideoReformatter()
        images = {pts: _rgb(frame, reformatter, shape, side_px, square) for pts, frame in frames.items()}
        return np.stack([images[pts] for pts in wanted_pts])


@contextmanager
def open_video(source: VideoInput) -> Iterator[OpenVideo]:
    """A video that is open in the `with` block. Raises VideoError: it cannot be opened."""
    with _open(source) as (container, stream):
        yield OpenVideo(source, container, stream, _duration_s(container, stream))


def _seek(
    container: av.container.InputContainer, stream: av.VideoStream, wanted_s: np.ndarray, earlier_s: float
) -> tuple[dict[int, av.VideoFrame], list[int]] | None:
    """Frames by pts, and the pts shown at each wanted time. None: a key frame `earlier_s` before them is not enough."""
    packets, base = [], stream.time_base
    first, last = int((wanted_s[0] - earlier_s + TOLERANCE_S) / base), (wanted_s[-1] + TOLERANCE_S) / base
    try:
        container.seek(first, stream=stream)
    except av.FFmpegError:  # no index, or nothing before this time
        return None
    try:
        for packet in container.demux(stream):
            if packet.pts is None:
                break  # the end, or a file without time stamps
            if packet.has_sidedata("encryption_info"):
                raise VideoError("encrypted: needed a video without copy protection")
            packets.append(packet)
            if packet.dts is not None and packet.dts > last:
                break
        times = np.array(sorted(packet.pts for packet in packets if not packet.is_discard), dtype=np.int64)
        if not len(times) or not packets[0].is_keyframe or _time_s(packets[0].pts, stream) > wanted_s[0] + TOLERANCE_S:
            return None
        wanted_pts = times[frame_indices_at([_time_s(pts, stream) for pts in times.tolist()], wanted_s)].tolist()
        unique = set(wanted_pts)
        end = max(index for index, packet in enumerate(packets) if packet.pts in unique)
        frames, previous_pts = {}, None
        skips = stream.codec_context.name != "libdav1d"  # reads the option once
        for packet in [*packets[: end + 1], None]:
            if packet is not None and skips:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in unique else "NONREF"
            for frame in stream.codec_context.decode(packet):
                if frame.pts is None or (previous_pts is not None and frame.pts <= previous_pts):
                    return None  # decoders output in presentation order: these time stamps are wrong
                previous_pts = frame.pts
                if frame.pts in unique and not frame.is_corrupt:
                    frames[frame.pts] = frame
    except av.FFmpegError as error:
        raise VideoError(f"decoding fails: {error.strerror or error}") from error
    return (frames, wanted_pts) if frames.keys() == unique else None


def _decode_from_start(source: VideoInput, wanted_s: np.ndarray, side_px: int | None, square: bool) -> np.ndarray:
    indices = frame_indices_at(frame_times(source), wanted_s).tolist()
    images, reformatter = {}, VideoReformatter()
    with _open(source) as (container, stream):
        shape = _pixel_shape(stream)
        for index, frame in enumerate(_decode(container, stream)):
            if index in indices:
                images[index] = _rgb(frame, reformatter, shape, side_px, square)
    return np.stack([images[index] for index in indices])


def encode(
    path: Path,
    pixels: Iterable[np.ndarray],
    *,
    rate_hz: float,
    crf: int,
    gop: int,
    times_s: Times | None = None,
    rotation_deg: int = 0,
) -> None:
    """Encode uint8 `T H W 3` by one thread, `.webm` as VP9 and other files as H.264: equal input gives equal bytes.

    pixels: an array, or its frames one after the other, at least one. crf: constant quality, 0 (best) to 51 (H.264) or
    63 (VP9). gop: frames from key frame to key frame. times_s: `T`, rounded to milliseconds, where frames do not follow
    `rate_hz`. rotation_deg: a player turns the frames by it, counter-clockwise.
    """
    codec = "libvpx-vp9" if path.suffix == ".webm" else "libx264"
    options, rest = {"crf": str(crf), "threads": "1"} | CODEC_OPTIONS[codec], iter(pixels)
    first = next(rest)
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream(codec, rate=Fraction(rate_hz).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        if rotation_deg:
            stream.set_display_rotation(rotation_deg)
        if times_s is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        # x264 writes its own settings, 600 bytes, into each file
        filters = BitStreamFilterContext("filter_units=remove_types=6", stream) if codec == "libx264" else None
        reformatter = VideoReformatter()
        for index, rgb in enumerate(chain([first], rest)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = reformatter.reformat(frame, format="yuv420p", interpolation=BILINEAR, threads=1)
            if times_s is not None:
                frame.pts, frame.time_base = round(1000 * times_s[index]), Fraction(1, 1000)
            _mux(out, stream.encode(frame), filters)
        _mux(out, stream.encode(), filters)


def _mux(out: av.container.OutputContainer, packets: Sequence[av.Packet], filters: BitStreamFilterContext | None) -> None:
    for packet in packets:
        out.mux(filters.filter(packet) if filters else packet)


@contextmanager
def _open(source: VideoInput) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A container and its best video stream that is no cover art."""
    if isinstance(source, Path):
        size, target = source.stat().st_size, f"file:{source}"  # the prefix: a path may begin like another protocol
    else:
        size, end = source.bytes, source.offset + source.bytes
        target = f"subfile,,start,{source.offset},end,{end},,:file:{source.path}"
    if size == 0:
        raise VideoError("the file is empty")
    try:
        container = av.open(target, metadata_errors="ignore", options=OPEN_OPTIONS)
    except (av.FileNotFoundError, av.PermissionError) as error:
        raise OSError(error.errno, error.strerror) from error
    except av.ArgumentError as error:
        raise VideoError("not a video: a text, a picture, or a list of other files") from error
    except av.FFmpegError as error:  # also that it asks for more memory than FFmpeg ever gives: a damaged header
        raise VideoError(f"not a readable video: {error.strerror or error}") from error
    except UnicodeError as error:
        raise VideoError("file name is not Unicode: rename it") from error
    with container:
        moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not moving:
            raise VideoError("no video stream")
        best = container.streams.best("video")
        stream = best if best in moving else moving[0]
        if stream.codec_context is None:
            raise VideoError("no decoder for its codec: write the file anew in another one, as by ffmpeg -i, where it plays")
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


def _duration_s(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """As the header declares it; 0: it does not (ASF)."""
    return float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / av.time_base


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Every frame, then a check that the data reaches its declared end: FFmpeg accepts a truncated mkv or webm."""
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
        end_s, declared_s = shown_s - start_s, float(stream.duration * stream.time_base)
    else:
        end_s, declared_s = data_s, (container.duration or 0) / av.time_base
    if end_s < declared_s - slack_s:
        raise VideoError(f"incomplete: the data ends at {end_s:.2f} s of {declared_s:.2f} s")


def _time_s(pts: int | None, stream: av.VideoStream) -> float:
    """On the stream's own clock; NaN: no time stamp. Coarse stamps of a constant rate become its exact times again."""
    if pts is None:
        return math.nan
    time_s, first_s, rate_hz = pts * stream.time_base, (stream.start_time or 0) * stream.time_base, stream.average_rate
    if rate_hz and COARSE_S < stream.time_base < COARSE_FRAMES / rate_hz:
        exact_s = first_s + round((time_s - first_s) * rate_hz) / rate_hz
        time_s = exact_s if abs(exact_s - time_s) <= stream.time_base else time_s  # half a unit each of both stamps
    return float(time_s)


def _rotation(frame: av.VideoFrame) -> int:
    """Degrees counter-clockwise to turn the stored picture by; a damaged display matrix counts as none."""
    degrees = frame.rotation % 360
    return degrees if degrees in (0, 90, 180, 270) else 0


def _pixel_shape(stream: av.VideoStream) -> Fraction:
    """Width of a pixel, in heights of it: the container's word before the codec's, and 1 without any."""
    shape = stream.sample_aspect_ratio
    return shape if shape and shape > 0 else Fraction(1)


def _shown_size(frame: av.VideoFrame, shape: Fraction) -> tuple[int, int]:
    """Height and width of the stored picture with square pixels. Raises VideoError: more than MAX_PIXELS."""
    return _bounded(frame.height, max(1, round(frame.width * shape)))


def _bounded(height: int, width: int) -> tuple[int, int]:
    if height * width > MAX_PIXELS:
        raise VideoError(f"too large: {width}x{height} px; needed at most {MAX_PIXELS} px in all, also where sides are resized")
    return height, width


def _rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, shape: Fraction, side_px: int | None = None, square: bool = True
) -> np.ndarray:
    """Upright uint8 `H W 3` with square pixels. shape: of the stored pixels.

    side_px: of its shorter side. square: crop the centre, `side side 3`.
    """
    resize, crop = {"interpolation": BILINEAR | TO_RGB}, (slice(None), slice(None))
    height, width = _shown_size(frame, shape)
    if side_px is not None:
        scale = side_px / min(height, width)
        height, width = _bounded(max(side_px, round(height * scale)), max(side_px, round(width * scale)))
    if side_px is not None or width != frame.width:
        resize = {"interpolation": BICUBIC | TO_RGB, "height": height, "width": width}
    if side_px is not None and square:
        top, left = (height - side_px) // 2, (width - side_px) // 2
        crop = (slice(top, top + side_px), slice(left, left + side_px))
    try:
        rgb = reformatter.reformat(frame, format="rgb24", threads=1, **resize).to_ndarray()[crop]
    except av.FFmpegError as error:
        raise VideoError(f"pictures cannot be turned into RGB: {error.strerror or error}") from error
    return np.ascontiguousarray(np.rot90(rgb, k=_rotation(frame) // 90))
