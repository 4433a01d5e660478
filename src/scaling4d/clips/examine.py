"""One video file in, the clips that it is good for out, and why not the rest. Runs in a worker process; imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling4d import config, video
from scaling4d.clips.inputs import Input, Rejection, regular
from scaling4d.records import Span, UserError, Video

UNREADABLE = "cannot be read"  # now; another time it may be
HASHED = 4  # frames of a clip that its perceptual hash looks at
THUMB_PX = 32  # what imagehash.phash looks at
SMALL_PX = 64  # shorter side of what the shot detector looks at
POSITIVE = ("frames", "rate_hz", "side_px", "gop", "max_frames", "max_s", "max_bytes", "frozen_s", "shard_bytes", "workers")
WINDOW = 2  # frames on either side that a cut is compared with (scenedetect's own)


@config.configurable
@dataclass(frozen=True)
class Curation:
    """What a clip is, and which videos are good enough.

    frames, rate_hz, side_px: of a clip. encode: write clips as H.264 of that side, crf and gop, for fast random access; false:
    the sources go into the shards as they are, and the loader seeks in them and resizes.
    listed: a csv in the folder that names what to use of it (see inputs.walk); empty: everything.
    min_side_px, max_side_px: shorter and longer side of a source. max_frames, max_s, max_bytes: decoded frames, seconds and bytes
    of decoded pictures; a source with more is refused.
    min_distinct: different source frames that a clip must have (fewer: the source is too slow for rate_hz).
    black_level: a frame is black if 99 % of it is darker (0..255). frozen_level: a frame stands still if no part of its
    32 x 32 thumbnail moves by more (0..255); frozen_s: standing still for that long is frozen.
    cut_ratio, cut_content: scenedetect's AdaptiveDetector: how much a cut stands out of its neighbours, and at all (0..255).
    hash_bits: clips whose hashes (4 frames of 64 bits) differ in at most this many of 256 bits are near duplicates.
    val_share: of the source videos. shard_bytes: a shard is closed when it is this large.
    workers: processes on this machine; cluster: address of a running Dask scheduler, or empty to start those workers.
    """

    frames: int
    rate_hz: float
    side_px: int
    encode: bool
    crf: int
    gop: int
    listed: str
    min_side_px: int
    max_side_px: int
    max_frames: int
    max_s: float
    max_bytes: int
    min_distinct: int
    black_level: float
    frozen_level: float
    frozen_s: float
    cut_ratio: float
    cut_content: float
    hash_bits: int
    val_share: float
    shard_bytes: int
    workers: int
    cluster: str

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise UserError(f"clips.Curation.{name} = {getattr(self, name)}; needed more than 0")
        if self.side_px % 2:
            raise UserError(f"clips.Curation.side_px = {self.side_px} is odd; H.264 needed an even number; set clip.side_px")
        if not 0 <= self.crf <= 51:
            raise UserError(f"clips.Curation.crf = {self.crf}; needed 0 (best) to 51")
        if not 1 <= self.min_distinct <= self.frames:
            raise UserError(f"clips.Curation.min_distinct = {self.min_distinct}; needed 1 to frames = {self.frames}")
        if not 0 <= self.hash_bits < 64 * HASHED:
            raise UserError(f"clips.Curation.hash_bits = {self.hash_bits}; needed 0 to {64 * HASHED - 1}")
        if not 0 < self.val_share < 1:
            raise UserError(f"clips.Curation.val_share = {self.val_share}; needed between 0 and 1")


@dataclass(frozen=True, slots=True)
class Clip:
    """A stretch of one source: where it starts, which decoded frames it takes (T), and its perceptual hash (32 bytes)."""

    start_s: float
    end_s: float
    frames: tuple[int, ...]
    phash: bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """What one input is good for; video is None if it is not a video at all, and sha256 empty if it cannot be read.

    origin_s: when its first frame is shown, on the stream's own clock; clips count from there.
    """

    path: str
    sha256: str
    video: Video | None
    clips: tuple[Clip, ...]
    rejected: tuple[Rejection, ...]
    origin_s: float = 0.0


def fingerprint(videos: Path, items: list[Input]) -> list[str | Rejection]:
    """sha256 of every input, or why it cannot be read."""
    found: list[str | Rejection] = []
    for item in items:
        try:
            regular(videos, item.path if item.member is None else item.member[0])
            found.append(video.sha256(item.source(videos)))
        except (video.VideoError, OSError) as error:
            found.append(_why(error))
    return found


def examine(videos: Path, item: Input, sha256: str, curation: Curation) -> Finding:
    """Decode a whole input, whose hash is known, and find its clips. Never raises for what a file may hold."""
    found = None
    try:
        source = item.source(videos)
        found = video.probe(source, sha256=sha256, max_side_px=curation.max_side_px)
        _size(found, curation)
        clips, rejected, origin_s = _spans(source, item, curation)
        return Finding(item.path, sha256, found, tuple(clips), tuple(rejected), origin_s)
    except (video.VideoError, OSError) as error:
        return Finding(item.path, sha256, found, (), (_why(error),))


def _why(error: video.VideoError | OSError) -> Rejection:
    if isinstance(error, OSError):
        return Rejection(UNREADABLE, error.strerror or str(error))
    reason, _, detail = str(error).partition(": ")
    return Rejection(reason, detail)


def _size(found: Video, curation: Curation) -> None:
    size = f"{found.width_px}x{found.height_px} px"
    if min(found.height_px, found.width_px) < curation.min_side_px:
        raise video.VideoError(f"too small: {size}; needed {curation.min_side_px} px on the shorter side")
    if max(found.height_px, found.width_px) > curation.max_side_px:
        raise video.VideoError(f"too large: {size}; needed at most {curation.max_side_px} px on the longer side")
    if found.duration_s > curation.max_s:
        raise video.VideoError(
            f"too long: it says {found.duration_s:.0f} s; cut the file, or raise clips.Curation.max_s from {curation.max_s:g}"
        )


def _spans(source: Path | video.Member, item: Input, curation: Curation) -> tuple[list[Clip], list[Rejection], float]:
    """Clips, spans that give none, and when the first frame is shown."""
    clock_s, thumbs, cut, black = _look(source, curation)
    times_s = clock_s - clock_s[0]
    broken = cut.copy()  # a frame that does not continue the shot of the frame before
    frozen = _frozen(times_s, thumbs, curation)
    label = np.where(black, 1, np.where(frozen, 2, 0))
    if item.stretches:
        inside = [(times_s >= start_s - video.TOLERANCE_S) & (times_s < end_s) for start_s, end_s in item.stretches]
        label[~np.any(inside, axis=0)] = 3
        broken |= np.any([np.diff(some, prepend=some[0]) for some in inside], axis=0)
        if (label == 3).all():
            raise video.VideoError(f"too short: it has {times_s[-1]:.2f} s, and the list wants what comes later")
    broken[1:] |= label[1:] != label[:-1]
    ends = [*np.flatnonzero(broken), len(times_s)]
    clips, rejected = [], []
    step_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else 0.0
    for first, end in zip([0, *ends], ends, strict=False):
        if first == end:
            continue
        start_s, end_s = float(times_s[first]), float(times_s[end] if end < len(times_s) else times_s[-1] + step_s)
        if label[first] == 3:
            continue
        if label[first]:
            rejected.append(Rejection("black" if label[first] == 1 else "frozen", "", start_s, end_s))
        else:
            found, refused = _cut(item.path, times_s[:end], first, thumbs, curation)
            needed_s = curation.frames / curation.rate_hz
            if not found and not refused:
                refused = [
                    Rejection("too short", f"{end_s - start_s:.2f} s without a cut; needed {needed_s:.2f} s", start_s, end_s)
                ]
            clips += found
            rejected += refused
    return clips, rejected, float(clock_s[0])


def _cut(
    path: str, times_s: np.ndarray, first: int, thumbs: np.ndarray, curation: Curation
) -> tuple[list[Clip], list[Rejection]]:
    """One clip after the other from frame `first` on, as many as fit."""
    clips, rejected = [], []
    while first < len(times_s):
        wanted_s = Span(path, float(times_s[first]), curation.rate_hz, curation.frames).times_s
        if wanted_s[-1] > times_s[-1] + 1e-3:
            break
        chosen = video.nearest(times_s, wanted_s)
        start_s, end_s = float(wanted_s[0]), float(wanted_s[0] + curation.frames / curation.rate_hz)
        distinct = len(np.unique(chosen))
        if distinct < curation.min_distinct:
            detail = f"{distinct} different frames in {curation.frames}; needed {curation.min_distinct}"
            rejected.append(Rejection("low frame rate", detail, start_s, end_s))
        else:
            clips.append(Clip(start_s, end_s, tuple(chosen.tolist()), _phash(thumbs[chosen])))
        first = int(np.searchsorted(times_s, end_s - 1e-3))
    return clips, rejected


def _look(source: Path | video.Member, curation: Curation) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Times `T` s ascending, on the stream's clock; grey thumbnails `T 32 32`; whether a shot starts `T`; whether black `T`."""
    from PIL import Image
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    detector = AdaptiveDetector(
        adaptive_threshold=curation.cut_ratio, min_content_val=curation.cut_content, min_scene_len=1, window_width=WINDOW
    )
    times, thumbs, black, cuts, bgr = [], [], [], [], None

    def shown(image: np.ndarray, index: int) -> None:
        cuts.extend(code.frame_num for code in detector.process_frame(FrameTimecode(index, fps=30.0), image))

    for time_s, rgb in video.frames(source):
        if len(times) == curation.max_frames:
            raise video.VideoError(
                f"too long: more than {curation.max_frames} frames; cut the file, or raise clips.Curation.max_frames"
            )
        if len(times) * rgb.nbytes >= curation.max_bytes:
            raise video.VideoError(
                f"too long: more than {curation.max_bytes} bytes of pictures; cut the file, or raise clips.Curation.max_bytes"
            )
        if times and time_s - times[0] > curation.max_s:
            raise video.VideoError(f"too long: more than {curation.max_s:g} s; cut the file, or raise clips.Curation.max_s")
        image = Image.fromarray(rgb)
        scale = SMALL_PX / min(image.size)
        if scale < 1:
            size = tuple(max(1, round(side * scale)) for side in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        grey = image.convert("L")
        bgr = np.ascontiguousarray(np.asarray(image)[..., ::-1])
        for index in range(-WINDOW if not times else 0, 1):  # the first frame stands for what came before it
            shown(bgr, len(times) + WINDOW + index)
        times.append(time_s)
        thumbs.append(np.asarray(grey.resize((THUMB_PX, THUMB_PX), Image.Resampling.LANCZOS)))
        black.append(np.percentile(np.asarray(grey), 99) < curation.black_level)
    if not times:
        raise video.VideoError("no frame can be decoded")
    for index in range(WINDOW):  # the last frame stands for what would come after it
        shown(bgr, len(times) + WINDOW + index)
    times_s = np.sort(times)
    if np.isnan(times_s).any():
        raise video.VideoError("frames without a presentation time: put the video into a container, as by ffmpeg -i")
    cut = np.zeros(len(times), dtype=bool)
    cut[[index - WINDOW for index in cuts]] = True
    return times_s, np.stack(thumbs), cut, np.array(black)


def _frozen(times_s: np.ndarray, thumbs: np.ndarray, curation: Curation) -> np.ndarray:
    """Whether each frame belongs to a stretch of at least `frozen_s` in which nothing moves, or is held for that long."""
    moves = np.abs(np.diff(thumbs.astype(np.int16), axis=0)).max(axis=(1, 2)) > curation.frozen_level
    starts = np.concatenate([[0], np.flatnonzero(moves) + 1])  # of stretches that stand still
    ends = np.concatenate([starts[1:], [len(times_s)]])
    frozen = np.zeros(len(times_s), dtype=bool)
    for start, end in zip(starts, ends, strict=True):
        until_s = times_s[end] if end < len(times_s) else times_s[-1]
        if until_s - times_s[start] >= curation.frozen_s:
            frozen[start:end] = True
    return frozen


def _phash(thumbs: np.ndarray) -> bytes:
    """32 bytes: the perceptual hashes of four frames spread over a clip."""
    import imagehash
    from PIL import Image

    picked = thumbs[np.linspace(0, len(thumbs) - 1, HASHED).round().astype(int)]
    return b"".join(np.packbits(imagehash.phash(Image.fromarray(thumb)).hash).tobytes() for thumb in picked)


def cut(videos: Path, item: Input, clips: dict[str, tuple[int, ...]], curation: Curation, parts: Path) -> dict[str, str]:
    """Encode the chosen clips of one source, each to `parts/<clip id>.mp4`, where it appears whole or not at all.

    Args:
        clips: by clip id, which decoded frames it takes.
    Returns:
        sha256 by clip id.
    Raises:
        UserError: the file is not what it was when it was examined.
    """
    wanted = {index for frames in clips.values() for index in frames}
    last = {max(frames): name for name, frames in clips.items()}
    held: dict[int, np.ndarray] = {}
    made: dict[str, str] = {}
    try:
        for index, (_, rgb) in enumerate(video.frames(item.source(videos))):
            if index in wanted:
                held[index] = square(rgb, curation.side_px)
            if index in last:
                name = last.pop(index)
                pixels = np.stack([held[i] for i in clips[name]])  # T H W 3
                partial = parts / f"{name}-{os.getpid()}.mp4"
                video.write(partial, pixels, rate_hz=curation.rate_hz, codec="libx264", crf=curation.crf, gop=curation.gop)
                made[name] = video.sha256(partial)
                partial.rename(parts / f"{name}.mp4")
                held = {}  # clips of one source do not overlap
                if not last:
                    return made
    except video.VideoError as error:
        raise UserError(f"{item.path} changed while it was read ({error}); run again") from error
    raise UserError(f"{item.path} changed while it was read (it is shorter now); run again")


def square(rgb: np.ndarray, side_px: int) -> np.ndarray:
    """Resize the shorter side of H W 3 to side_px, smoothed against aliasing, and keep the middle."""
    from PIL import Image

    height, width = rgb.shape[:2]
    crop = min(height, width)
    left, top = (width - crop) / 2, (height - crop) / 2
    box = (left, top, left + crop, top + crop)
    return np.asarray(Image.fromarray(rgb).resize((side_px, side_px), Image.Resampling.BICUBIC, box=box))
