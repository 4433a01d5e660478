"""What all readers share: lists that must be there, frames at given times, and the resize and crop of pictures and labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from scaling4d import video
from scaling4d.benchmarks.skipped import LeftOut, Missing, Skipped
from scaling4d.records import Sample, UserError

T = TypeVar("T")

TOLERANCE_S = 1e-3  # as in `video.nearest`


def needed(root: Path, path: Path, what: str) -> Path:
    """The path, if it is there.

    Raises:
        UserError: it is not; names the folder and what was expected in it.
    """
    if not path.exists():
        raise UserError(f"{root} is laid out in another way: needed {path.relative_to(root)} ({what})")
    return path


class Samples(Iterator[Sample]):
    """Samples in the order of what is listed, or those of one item by its place, as often as they are wanted.

    items: what is listed; some: the samples of an item; name: of an item. What gives none is noted in `skipped`; without such a
    list, what is damaged raises.
    """

    def __init__(
        self, items: Iterable[T], some: Callable[[T], list[Sample]], skipped: list[Skipped] | None, name: Callable = str
    ) -> None:
        self.items, self.some, self.skipped, self.name = items, some, skipped, name
        self._in_turn = (sample for _, samples in self.by_place() for sample in samples)

    def __next__(self) -> Sample:
        return next(self._in_turn)

    def by_place(self) -> Iterator[tuple[int, list[Sample]]]:
        """Place in `items` and samples of every item that gives any."""
        for place, item in enumerate(self.items):
            try:
                samples = self.some(item)
            except UserError as error:
                bad = not isinstance(error, LeftOut)
                if self.skipped is not None:
                    self.skipped.append(Skipped(self.name(item), str(error), bad))
                elif bad:
                    raise
            else:
                yield place, samples

    def at(self, place: int) -> list[Sample]:
        """Raises UserError: the item gives none."""
        assert isinstance(self.items, Sequence)  # all benchmarks that are trained on have lists
        return self.some(self.items[place])


def each(items: Iterable[T], one: Callable[[T], Sample], skipped: list[Skipped] | None, name: Callable = str) -> Samples:
    """One sample an item."""
    return Samples(items, lambda item: [one(item)], skipped, name)


def all_there(folder: Path, names: Sequence[str], what: str) -> int:
    """How many files are listed.

    Raises:
        Missing: some are not in the folder.
    """
    there = {path.name for path in folder.iterdir()}
    if missing := [name for name in names if name not in there]:
        raise Missing(folder, missing, listed=len(names), what=what)
    return len(names)


def load_json(path: Path, kind: type) -> Any:
    """Raises UserError: not JSON, or its top is no `kind`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} holds a {type(content).__name__} at its top; needed a {kind.__name__}")
    return content


def at_times(path: Path, times_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """uint8 `T H W 3`: the frame on show at each ascending time since the first frame; decoding stops after the last one.

    A video that ends early goes on with its last frame.
    Raises:
        UserError: it cannot be decoded.
    """
    pictures: list[np.ndarray] = []
    first_s = shown = None
    try:
        for clock_s, picture in video.frames(path):
            first_s = clock_s if first_s is None else first_s
            time_s = clock_s - first_s
            while shown is not None and len(pictures) < len(times_s) and time_s > times_s[len(pictures)] + TOLERANCE_S:
                pictures.append(shown)
            if len(pictures) == len(times_s):
                break
            shown = picture
    except video.VideoError as error:
        raise UserError(f"{path}: {error}") from error
    if shown is None:
        raise UserError(f"{path}: no frame can be decoded")
    return np.stack([*pictures, *[shown] * (len(times_s) - len(pictures))])


def far_in(path: Path, times_s: np.ndarray) -> np.ndarray:
    """The same of a video that goes on for long before the first time: decoded from the key frame before it.

    Raises:
        UserError: it cannot be decoded, or ends early.
    """
    try:
        first_s, _ = next(video.frames(path), (0.0, None))
        end_s = _duration_s(path)
        if times_s[-1] > end_s + TOLERANCE_S:
            raise UserError(f"{path} ends at {end_s:.2f} s, needed {times_s[-1]:.2f} s; lower clip.frames or raise rate_hz")
        return video.at(path, first_s + times_s)
    except video.VideoError as error:
        raise UserError(f"{path}: {error}") from error


def _duration_s(path: Path) -> float:
    """As the file says; where it does not, its frames are counted."""
    said_s = video.probe(path, sha256="").duration_s
    if said_s > 0:
        return said_s
    times_s = [time_s for time_s, _ in video.frames(path)]
    return (times_s[-1] - times_s[0]) * len(times_s) / max(len(times_s) - 1, 1)  # the last frame is shown as long as the others


def clips_of(path: Path, *, frames: int, rate_hz: float, clips: int) -> list[np.ndarray]:
    """uint8 `T H W 3` each: one clip from the start of a video, or several, the last of which ends where the video does.

    A video that ends early goes on with its last frame.
    Raises:
        UserError: it cannot be decoded.
    """
    times_s = np.arange(frames) / rate_hz
    if clips == 1:
        return [at_times(path, times_s)]
    try:
        last_s = max(_duration_s(path) - frames / rate_hz, 0.0)
    except video.VideoError as error:
        raise UserError(f"{path}: {error}") from error
    each_s = [start_s + times_s for start_s in np.linspace(0.0, last_s, clips)]
    every_s = np.unique(np.concatenate(each_s))
    pictures = at_times(path, every_s)
    return [pictures[np.searchsorted(every_s, of_one_s)] for of_one_s in each_s]


def at_numbers(path: Path, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """uint8 `H W 3` each: frames by their ascending number in the video, one at a time; decoding stops after the last one.

    Raises:
        UserError: it cannot be decoded, or has too few frames.
    """
    shown, left = -1, iter(video.frames(path))
    try:
        for number in numbers:
            while shown < number:
                _, picture = next(left)
                shown += 1
            yield picture
    except StopIteration:
        raise UserError(f"{path} ends before frame {number}; lower clip.frames or raise rate_hz") from None
    except video.VideoError as error:
        raise UserError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Crop:
    """Shorter side to `side_px`, then a square of that side, for pictures of `height` x `width`.

    place: of the square along the longer side: 0 at its start, 0.5 in the middle, 1 at its end.
    """

    height: int
    width: int
    side_px: int
    place: float = 0.5

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width before the square is cut out."""
        scale = self.side_px / min(self.height, self.width)
        return max(self.side_px, round(self.height * scale)), max(self.side_px, round(self.width * scale))

    @property
    def corner(self) -> np.ndarray:
        """x y in px of the square's corner in the resized picture."""
        height, width = self.resized
        return np.array([int((width - self.side_px) * self.place), int((height - self.side_px) * self.place)])

    @classmethod
    def several(cls, pictures: np.ndarray, side_px: int, crops: int) -> list[Crop]:
        """The square in the middle, or `crops` of them evenly spaced from one end to the other."""
        places = [0.5] if crops == 1 else np.linspace(0, 1, crops).tolist()
        return [cls(*pictures.shape[1:3], side_px, place) for place in places]

    def pixels(self, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """uint8 `T H W 3` -> uint8 `T side side 3`, bicubic with antialiasing."""
        height, width = self.resized
        x, y = self.corner
        whole = [
            p
            if p.shape[:2] == (height, width)
            else np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC))
            for p in pictures
        ]
        return np.ascontiguousarray(np.stack(whole)[:, y : y + self.side_px, x : x + self.side_px])

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


def views_of(path: Path, *, frames: int, rate_hz: float, side_px: int, views: tuple[int, int]) -> list[np.ndarray]:
    """uint8 `T side side 3` each: `views` are clips over the time of a video, and squares cut out of each.

    Raises:
        UserError: it cannot be decoded.
    """
    clips, crops = views
    found = clips_of(path, frames=frames, rate_hz=rate_hz, clips=clips)
    return [crop.pixels(pictures) for pictures in found for crop in Crop.several(pictures, side_px, crops)]
