"""Shared by all readers: files of a list, frames of a video by time or number, resize and crop of pictures, labels."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from scaling4d import video
from scaling4d.benchmarks.samples import ClipRequest, MissingFiles, content_of
from scaling4d.records import UserError
from scaling4d.video import MAX_PIXELS, TOLERANCE_S


def require_path(root: Path, path: Path, content: str) -> Path:
    """The path. Raises UserError: there is none; the message names the benchmark's folder and the expected content."""
    if not path.exists():
        raise UserError(f"{root} is laid out in another way: needed {path.relative_to(root)} ({content})")
    return path


def missing_files(folder: Path, names: Sequence[str], what: str) -> MissingFiles | None:
    """The error of listed files that the folder lacks; None: it has all of them."""
    with content_of(folder):
        present = {path.name for path in folder.iterdir()}
    missing = [name for name in names if name not in present]
    return MissingFiles(folder, missing, listed=len(names), what=what) if missing else None


def load_json(path: Path, kind: type) -> Any:
    """Content of a JSON file. Raises UserError: not JSON, or its top is no `kind`."""
    with content_of(path):
        text = path.read_bytes()
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} holds a {type(content).__name__} at its top; needed a {kind.__name__}")
    return content


# ---- pictures ----


def open_picture(source: Path | bytes, where: object, formats: Sequence[str]) -> Image.Image:
    """A picture file, or the bytes of one, in a format of the benchmark: others start other programs (PostScript).

    Raises UserError: another format, damaged, or more than MAX_PIXELS; the message starts with `where`.
    """
    with content_of(where):
        try:
            with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
                picture = Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=formats)
            if picture.width * picture.height > MAX_PIXELS:
                raise UserError(f"{where} is {picture.width}x{picture.height} px; needed at most {MAX_PIXELS} px in all")
            picture.load()
        except UnidentifiedImageError as error:
            raise UserError(f"{where} cannot be read: needed {' or '.join(formats)}") from error
        except (SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # SyntaxError: of a png
            raise UserError(f"{where} cannot be read: {error}") from error
    return picture


def encode_jpeg(picture: np.ndarray, quality: int) -> bytes:
    """JPEG of a picture, uint8 `H W 3`."""
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "JPEG", quality=quality, optimize=True)
    return encoded.getvalue()


# ---- frames of videos ----


def frames_by_time(path: Path, times_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """uint8 `T H W 3`: the frame on show at each ascending time since the first frame. Decoding stops after the last.

    A video that ends early is padded with its last frame. Raises UserError: it cannot be decoded.
    """
    pictures: list[np.ndarray] = []
    first_s = shown = None
    with _video_named(path):
        for clock_s, picture in video.decode_frames(path):
            first_s = clock_s if first_s is None else first_s
            time_s = clock_s - first_s
            while shown is not None and len(pictures) < len(times_s) and time_s > times_s[len(pictures)] + TOLERANCE_S:
                pictures.append(shown)
            if len(pictures) == len(times_s):
                break
            shown = picture
    if shown is None:
        raise UserError(f"{path}: no frame can be decoded")
    return np.stack([*pictures, *[shown] * (len(times_s) - len(pictures))])


def frames_by_seeking(path: Path, times_s: np.ndarray) -> np.ndarray:
    """The same frames of a long video. Decoding starts at the key frame before the first time.

    Raises UserError: it cannot be decoded, or ends early.
    """
    with _video_named(path), video.open_video(path) as opened:
        end_s = opened.duration_s or video.duration_of(video.frame_times(path))
        if times_s[-1] > end_s + TOLERANCE_S:
            raise UserError(f"{path} ends at {end_s:.2f} s, needed {times_s[-1]:.2f} s; lower frames or raise rate_hz")
        return opened.frames_at(opened.first_s() + times_s)


def squares_by_number(path: Path, numbers: Sequence[int] | np.ndarray, side_px: int) -> np.ndarray:
    """uint8 `T side side 3`: frames by their ascending number in the video, cropped. Decoding stops after the last.

    Raises UserError: it cannot be decoded, or has too few frames.
    """
    squares: dict[int, np.ndarray] = {}
    with _video_named(path):
        for number, (_, picture) in enumerate(video.decode_frames(path)):
            if number in numbers:
                squares[number] = Crop(*picture.shape[:2], side_px).pixels([picture])[0]
            if number == numbers[-1]:
                return np.stack([squares[number] for number in numbers])
    missing = next(number for number in numbers if number not in squares)
    raise UserError(f"{path} ends before frame {missing}; lower frames or raise rate_hz")


def read_views(path: Path, request: ClipRequest, positions: Sequence[float]) -> list[np.ndarray]:
    """uint8 `T side side 3` each: the clips of a video, and the squares of each clip.

    positions: a clip at 0 starts with the video, at 1 it ends with it. One square is cut from the middle, several from
    one end to the other. A video that ends early is padded with its last frame. Raises UserError: it cannot be decoded.
    """
    crops, starts_s = request.views[1], np.zeros(len(positions))
    if request.anywhere:
        with _video_named(path):
            duration_s = video.probe(path, sha256="").duration_s or video.duration_of(video.frame_times(path))
        starts_s = np.asarray(positions) * max(duration_s - request.frames / request.rate_hz, 0.0)
    clips_s = [start_s + request.times_s for start_s in starts_s]
    unique_s = np.unique(np.concatenate(clips_s))
    pictures = frames_by_time(path, unique_s)
    places = np.linspace(0, 1, crops) if crops > 1 else [0.5]
    squares = [Crop(*pictures.shape[1:3], request.side_px, place) for place in places]
    return [square.pixels(pictures[np.searchsorted(unique_s, clip_s)]) for clip_s in clips_s for square in squares]


def start_rows(times_s: np.ndarray, request: ClipRequest) -> np.ndarray:
    """Indices of the frames, `n` at ascending times, in which a clip may start: one that ends with the last, or before.

    A video that is too short for a clip has the first alone.
    """
    if not request.anywhere or not len(times_s):
        return np.zeros(1, int)
    last_s = times_s[-1] - request.times_s[-1] + TOLERANCE_S
    return np.arange(max(np.searchsorted(times_s, last_s, side="right"), 1))


def nearest_rows(path: Path, stamps_us: np.ndarray, request: ClipRequest, start: int) -> np.ndarray:
    """Index `T` of the time stamp, `n` ascending, nearest to each frame of a clip that starts with stamp `start`.

    Raises UserError: the last stamp comes too early.
    """
    wanted_us = stamps_us[start] + request.times_s * 1e6
    if wanted_us[-1] > stamps_us[-1] + np.diff(stamps_us).max(initial=0):
        raise request.too_long(path, (stamps_us[-1] - stamps_us[0]) / 1e6)
    return np.abs(stamps_us[:, None] - wanted_us).argmin(0)


@contextmanager
def _video_named(path: Path) -> Iterator[None]:
    """Errors of a video start with its path."""
    try:
        yield
    except video.VideoError as error:
        raise UserError(f"{path}: {error}") from error


def _resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Crop:
    """Shorter side to `side_px`, then a square of that side, for pictures of `height` x `width`.

    position: of the square along the longer side: 0 at its start, 0.5 in the middle, 1 at its end.
    """

    height: int
    width: int
    side_px: int
    position: float = 0.5

    def __post_init__(self) -> None:
        sides = (self.height, self.width)
        usable = all(isinstance(side, int | float | np.number) and 0 < side <= MAX_PIXELS for side in sides)
        if not usable or math.prod(self.resized) > MAX_PIXELS:
            needed = f"numbers above 0, and at most {MAX_PIXELS} px in all with {self.side_px} px on the shorter side"
            raise UserError(f"a picture of {self.width} x {self.height} px; needed {needed}")

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width before the square is cut out."""
        scale = self.side_px / min(self.height, self.width)
        return max(self.side_px, round(self.height * scale)), max(self.side_px, round(self.width * scale))

    @property
    def corner(self) -> np.ndarray:
        """x y in px of the square's corner in the resized picture."""
        height, width = self.resized
        return np.array([int((width - self.side_px) * self.position), int((height - self.side_px) * self.position)])

    def pixels(self, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """uint8 `T H W 3` -> uint8 `T side side 3`, bicubic with antialiasing."""
        pictures = list(pictures)
        for height, width in {picture.shape[:2] for picture in pictures} - {(self.height, self.width)}:
            raise UserError(f"pictures of {self.width}x{self.height} and of {width}x{height} px in one clip")
        height, width = self.resized
        x, y = self.corner
        resized = np.stack([_resize(picture, height, width) for picture in pictures])
        return np.ascontiguousarray(resized[:, y : y + self.side_px, x : x + self.side_px])

    def points(self, points: np.ndarray) -> np.ndarray:
        """`... 2`, x y in 0..1 of the picture -> in 0..1 of the square; may fall outside."""
        return (points * np.array(self.resized[::-1]) - self.corner) / self.side_px

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """`... 4`, x1 y1 x2 y2 in 0..1 of the picture -> of the square, clipped to it."""
        return np.clip(np.concatenate([self.points(boxes[..., :2]), self.points(boxes[..., 2:])], -1), 0, 1)

    def sources(self) -> np.ndarray:
        """`side side 2`: x y in 0..1 of the picture under the centre of every pixel of the square."""
        centre = np.arange(self.side_px) + 0.5
        y, x = np.meshgrid(centre, centre, indexing="ij")
        return (np.stack([x, y], -1) + self.corner) / np.array(self.resized[::-1])
