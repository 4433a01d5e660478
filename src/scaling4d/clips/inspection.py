"""One video in; the clips to take from it, and why not the rest, out. Runs in worker processes and imports no torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from scaling4d import video
from scaling4d.clips.settings import PHASH_FRAMES, CurationConfig
from scaling4d.clips.sources import UNREADABLE, Rejection, SourceFile, check_regular
from scaling4d.records import UserError, Video
from scaling4d.video import FileSlice, VideoError

MIN_SIDE_PX, MAX_SIDE_PX = 64, 4096  # shorter and longer side of a source (ours)
MAX_FRAMES, MAX_S, MAX_BYTES = 100_000, 14_400.0, 10**12  # of a source: decoded frames, their time and pixels (ours)
BLACK_LEVEL = 24  # 0..255: a frame is black if 99 % of it is darker (ours)
FROZEN_S = 1.0  # of frames that stand still, to count as frozen (ours)
FROZEN_LEVEL = 2  # 0..255: a frame stands still if no pixel of its thumbnail changes by more (ours)
MIN_DISTINCT = 0.75  # share of a clip's frames that differ in the source; fewer: the source is too slow (ours)
CUT_RATIO = 3.0  # by which a cut stands out of its neighbours: adaptive_threshold of AdaptiveDetector, its default
CUT_WINDOW = 2  # frames on either side that a cut is compared with: window_width, by its default
THUMBNAIL_PX = 32  # side of the input of imagehash.phash
DETECTOR_PX = 64  # shorter side of the input of the shot detector
GOP = 4  # frames from key frame to key frame of a clip (ours)
SLACK_S = 1e-3  # by which the last frame of a shot may miss the end of a clip
Frames = tuple[int, ...]  # indices of decoded frames


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip in its source: start and end, frames (T), and their perceptual hash (32 bytes)."""

    start_s: float
    end_s: float
    frames: Frames
    phash: bytes


@dataclass(frozen=True, slots=True)
class Inspection:
    """The clips of one source. sha256: empty if the source cannot be read. video: None if it is not a video.

    origin_s: presentation time of the first frame on the stream's own clock; clips count from there.
    """

    source: SourceFile
    sha256: str
    video: Video | None
    clips: tuple[Clip, ...]
    rejected: tuple[Rejection, ...]
    origin_s: float = 0.0

    @property
    def path(self) -> str:
        return self.source.path

    @classmethod
    def from_json(cls, entry: dict[str, Any], source: SourceFile) -> Inspection:
        """Of a source with the same bytes. entry: `asdict` of an inspection, with hexadecimal digits for bytes."""
        clips = [Clip(c["start_s"], c["end_s"], tuple(c["frames"]), bytes.fromhex(c["phash"])) for c in entry["clips"]]
        header = entry["video"] and Video(**entry["video"] | {"path": source.path})
        rejected = tuple(Rejection(**rejection) for rejection in entry["rejected"])
        return cls(source, entry["sha256"], header, tuple(clips), rejected, entry["origin_s"])


def hash_sources(videos: Path, sources: list[SourceFile]) -> list[str | Rejection]:
    """sha256 of every source, or why it cannot be read."""
    hashes: list[str | Rejection] = []
    for source in sources:
        try:
            check_regular(videos, source.path if source.member is None else source.member[0])
            hashes.append(video.sha256(source.location(videos)))
        except (VideoError, OSError) as error:
            hashes.append(Rejection.from_error(error))
    return hashes


def inspect_video(videos: Path, source: SourceFile, sha256: str, config: CurationConfig) -> Inspection:
    """Decode a whole source, whose hash is known, and find its clips. No content of a file raises an error."""
    header = None
    try:
        location = source.location(videos)
        header = video.probe(location, sha256=sha256, max_side_px=MAX_SIDE_PX)
        size = f"{header.width_px}x{header.height_px} px"
        if min(header.height_px, header.width_px) < MIN_SIDE_PX:
            raise VideoError(f"too small: {size}; needed {MIN_SIDE_PX} px on the shorter side")
        if max(header.height_px, header.width_px) > MAX_SIDE_PX:  # of the picture, whatever its header says
            raise VideoError(f"too large: {size}; needed at most {MAX_SIDE_PX} px on the longer side")
        if header.duration_s > MAX_S:
            raise VideoError(f"too long: its header states {header.duration_s:.0f} s; needed at most {MAX_S:g} s; cut the file")
        times_s, thumbnails, cut, black = _decode(location, config)
        spans = _find_clips(source, times_s - times_s[0], thumbnails, cut, black, config)
        clips, rejected = (tuple(span for span in spans if isinstance(span, kind)) for kind in (Clip, Rejection))
        return Inspection(source, sha256, header, clips, rejected, float(times_s[0]))
    except (VideoError, OSError) as error:
        return Inspection(source, sha256, header, (), (_reason(videos, source, sha256, error),))


def _reason(videos: Path, source: SourceFile, sha256: str, error: VideoError | OSError) -> Rejection:
    """Why a source is rejected. FFmpeg takes a disk that fails for the end of the file: hash the file again."""
    (again,) = hash_sources(videos, [source])
    if isinstance(again, str) and again != sha256:
        return Rejection(UNREADABLE, "changed while it was read")
    return again if isinstance(again, Rejection) else Rejection.from_error(error)


def _decode(location: Path | FileSlice, config: CurationConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Times `T` s, ascending, on the stream's clock; grey thumbnails `T 32 32`; bool `T` each: a shot starts; black.

    No shot starts where clips are not cut at shots.
    """
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    detector = AdaptiveDetector(adaptive_threshold=CUT_RATIO, min_scene_len=1, window_width=CUT_WINDOW)
    times, thumbnails, black, cuts, bgr = [], [], [], [], None

    def detect(index: int, repeats: int = 1) -> None:
        if not config.cut_at_shots:
            return
        for number in range(index, index + repeats):
            cuts.extend(code.frame_num for code in detector.process_frame(FrameTimecode(number, fps=30.0), bgr))

    for time_s, rgb in video.decode_frames(location):
        if len(times) == MAX_FRAMES:
            raise VideoError(f"too long: more than {MAX_FRAMES} frames; cut the file")
        if len(times) * rgb.nbytes >= MAX_BYTES:
            raise VideoError(f"too long: more than {MAX_BYTES} bytes of decoded frames; cut the file")
        if times and time_s - times[0] > MAX_S:
            raise VideoError(f"too long: more than {MAX_S:g} s; cut the file")
        image = Image.fromarray(rgb)
        scale = DETECTOR_PX / min(image.size)
        if scale < 1:
            size = tuple(max(1, round(side * scale)) for side in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        grey = image.convert("L")
        bgr = np.ascontiguousarray(np.asarray(image)[..., ::-1])
        if not times:
            detect(0, CUT_WINDOW)  # the first frame stands for the frames before it
        detect(len(times) + CUT_WINDOW)
        times.append(time_s)
        thumbnails.append(np.asarray(grey.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)))
        black.append(np.percentile(np.asarray(grey), 99) < BLACK_LEVEL)
    times_s = video.sort_times(times)
    detect(len(times) + CUT_WINDOW, CUT_WINDOW)  # the last frame stands for the frames after it
    cut = np.zeros(len(times), dtype=bool)
    cut[[index - CUT_WINDOW for index in cuts]] = True
    return times_s, np.stack(thumbnails), cut, np.array(black)


def _find_clips(
    source: SourceFile, times_s: np.ndarray, thumbnails: np.ndarray, cut: np.ndarray, black: np.ndarray, config: CurationConfig
) -> list[Clip | Rejection]:
    """Clips, and the spans that give none. times_s: `T`, from 0; thumbnails, cut, black: as `_decode` returns them."""
    breaks = cut.copy()  # frames that do not continue the shot of the frame before
    label = np.full(len(times_s), "", dtype=object)
    label[_is_frozen(times_s, thumbnails)] = "frozen"
    label[black] = "black"
    if source.stretches:
        inside = [(times_s >= start_s - video.TOLERANCE_S) & (times_s < end_s) for start_s, end_s in source.stretches]
        label[~np.any(inside, axis=0)] = "unlisted"
        breaks |= np.any([np.diff(mask, prepend=mask[0]) for mask in inside], axis=0)
        if (label == "unlisted").all():
            raise VideoError(f"too short: it has {times_s[-1]:.2f} s, and the list names later ones")
    breaks[1:] |= label[1:] != label[:-1]
    ends = [*np.flatnonzero(breaks), len(times_s)]
    spans, needed_s = [], config.frames / config.rate_hz
    step_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else 0.0
    for first, end in zip([0, *ends], ends, strict=False):
        if first == end or label[first] == "unlisted":
            continue
        start_s, end_s = float(times_s[first]), float(times_s[end] if end < len(times_s) else times_s[-1] + step_s)
        if label[first]:
            spans.append(Rejection(label[first], "", start_s, end_s))
            continue
        short = Rejection("too short", f"{end_s - start_s:.2f} s in one piece; needed {needed_s:.2f} s", start_s, end_s)
        spans += _cut_shot(times_s[:end], first, thumbnails, config) or [short]
    return spans


def _cut_shot(times_s: np.ndarray, first: int, thumbnails: np.ndarray, config: CurationConfig) -> list[Clip | Rejection]:
    """Clips from frame `first` on, one after the other; those of too few different frames are rejected."""
    import imagehash

    spans: list[Clip | Rejection] = []
    while first < len(times_s):
        wanted_s = times_s[first] + np.arange(config.max_frames) / config.rate_hz
        frames = int(np.searchsorted(wanted_s, times_s[-1] + SLACK_S, side="right"))
        if frames < config.frames:
            break
        wanted_s = wanted_s[:frames]
        indices = video.frame_indices_at(times_s, wanted_s)
        start_s, end_s = float(wanted_s[0]), float(wanted_s[0] + frames / config.rate_hz)
        distinct, needed = len(np.unique(indices)), math.ceil(MIN_DISTINCT * frames)
        if distinct < needed:
            detail = f"{distinct} different frames in {frames}; needed {needed}"
            spans.append(Rejection("low frame rate", detail, start_s, end_s))
        else:
            hashed = thumbnails[indices[np.linspace(0, frames - 1, PHASH_FRAMES).round().astype(int)]]
            hashes = [np.packbits(imagehash.phash(Image.fromarray(image)).hash).tobytes() for image in hashed]
            spans.append(Clip(start_s, end_s, tuple(indices.tolist()), b"".join(hashes)))
        first = int(np.searchsorted(times_s, end_s - SLACK_S))
    return spans


def _is_frozen(times_s: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """Whether each frame belongs to a stretch of FROZEN_S or more in which nothing moves, or is shown for that long."""
    moves = np.abs(np.diff(thumbnails.astype(np.int16), axis=0)).max(axis=(1, 2)) > FROZEN_LEVEL
    starts = np.concatenate([[0], np.flatnonzero(moves) + 1])  # of still stretches
    ends = np.concatenate([starts[1:], [len(times_s)]])
    until_s = np.append(times_s, times_s[-1])[ends]
    return np.repeat(until_s - times_s[starts] >= FROZEN_S, ends - starts)


def encode_clips(videos: Path, source: SourceFile, clips: dict[str, Frames], config: CurationConfig, out: Path) -> dict[str, str]:
    """Encode clips of one source, each to `out/<id>.mp4`, which appears by rename. Returns sha256 by clip id.

    clips: frames by clip id, without overlaps.
    Raises UserError: the file is not the one that was inspected.
    """
    wanted = {index for frames in clips.values() for index in frames}
    clip_ending_at = {max(frames): name for name, frames in clips.items()}
    frames: dict[int, np.ndarray] = {}
    hashes: dict[str, str] = {}
    try:
        for index, (_, rgb) in enumerate(video.decode_frames(source.location(videos))):
            if index in wanted:
                square = ImageOps.fit(Image.fromarray(rgb), (config.side_px, config.side_px), Image.Resampling.BICUBIC)
                frames[index] = np.asarray(square)
            if name := clip_ending_at.pop(index, None):
                pixels = np.stack([frames[i] for i in clips[name]])  # T H W 3
                partial = out / f"{name}-{os.getpid()}.mp4"
                video.encode(partial, pixels, rate_hz=config.rate_hz, crf=config.crf, gop=GOP)
                hashes[name] = video.sha256(partial)
                partial.rename(out / f"{name}.mp4")
                frames = {}
                if not clip_ending_at:
                    return hashes
    except VideoError as error:
        raise UserError(f"{source.path} changed while it was read ({error}); run again") from error
    raise UserError(f"{source.path} changed while it was read (it is shorter now); run again")
