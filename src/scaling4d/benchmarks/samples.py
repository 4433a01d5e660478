"""Request and answer of a reader: the clips, the samples in the order of a benchmark's list, the skipped items.

An item is an entry of that list. No heavy library is imported here.
"""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from scaling4d.records import Sample, UserError

# What the content of a file makes readers and libraries raise. Other errors are the program's own.
CONTENT = (ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error, zlib.error)
# Numbers of errors that are a file's own. Others are the machine's: its disk, its memory, too many open files.
OF_A_FILE = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EACCES}
WINDOWS = ("first", "random")
QUERIES = ("frame_0", "first", "strided")
T = TypeVar("T")
PLAIN = (type(None), bool, int, float, str, bytes, list, dict, np.ndarray, np.generic)  # what files are parsed to


@dataclass(frozen=True)
class ClipRequest:
    """The clips that a reader cuts: `frames` frames at `rate_hz`, shorter side resized to `side_px`, then a square.

    views: clips over the time of a video, and squares along its longer side, of actions alone. Their samples follow one
    another. queries: query frames of a video, one of QUERIES, see `queries`; of points alone. windows: "first", a
    single clip starts with its video; "random", it may lie anywhere. Raises UserError: unknown queries or windows.
    """

    frames: int
    rate_hz: float
    side_px: int
    views: tuple[int, int] = (1, 1)
    queries: str = "frame_0"
    windows: str = "first"

    def __post_init__(self) -> None:
        if self.windows not in WINDOWS:
            raise UserError(f"windows = {self.windows!r}; needed one of {', '.join(WINDOWS)}")
        if self.queries not in QUERIES:
            raise UserError(f"queries = {self.queries!r}; needed one of {', '.join(QUERIES)}")

    @property
    def times_s(self) -> np.ndarray:
        """`T` float64: time of each frame since the first one."""
        return np.arange(self.frames) / self.rate_hz

    def frame_numbers(self, stored_hz: float) -> np.ndarray:
        """`T` int64: nearest frame of a video at `stored_hz`, counted from the clip's first frame."""
        return np.round(np.arange(self.frames) * stored_hz / self.rate_hz).astype(int)

    @property
    def anywhere(self) -> bool:
        """Whether a clip may start behind the first frame of its video."""
        return self.windows == "random" or self.views[0] > 1

    @property
    def positions(self) -> tuple[float, ...]:
        """Positions of the clips that measure a video, evenly spaced: 0 at its start, 1 at its end; see `at_positions`.

        A single random window lies in the middle (ours).
        """
        if self.views[0] > 1:
            return tuple(np.linspace(0, 1, self.views[0]).tolist())
        return (0.5,) if self.windows == "random" else (0.0,)

    def start_frames(self, offsets: np.ndarray, total: int) -> range:
        """Frames of a video, of `total`, in which a clip may start. offsets: `T`, its frames counted from its first.

        A video that is too short for a clip has the first alone.
        """
        return range(max(total - offsets[-1], 1) if self.anywhere else 1)

    def too_long(self, path: Path, end_s: float) -> UserError:
        """The error of an item that ends before its clip does."""
        clip = f"{self.frames} frames at {self.rate_hz} Hz"
        return UserError(f"{path} ends after {end_s:.2f} s, too early for {clip}; lower frames or raise rate_hz")


def at_positions(starts: Sequence[T], positions: Sequence[float]) -> list[T]:
    """The start for each position in 0..1 of the ascending ones; each has an equal share. No starts: none."""
    last = len(starts) - 1
    return [starts[min(int(position * len(starts)), last)] for position in positions] if len(starts) else []


@dataclass(frozen=True)
class SkippedItem:
    """An item without a sample. bad: it is damaged or missing; otherwise a rule of the protocol excludes it."""

    id: str
    why: str
    bad: bool


class ExcludedItem(UserError):
    """A rule of the protocol excludes this item: it has nothing to learn or to measure."""


class MissingFiles(UserError):
    """A split lacks listed files. names: of the missing ones."""

    def __init__(self, folder: Path, names: Sequence[str], *, listed: int, what: str) -> None:
        super().__init__(f"{folder} lacks {len(names)} of {listed} {what}, the first is {names[0]}")
        self.names = tuple(names)


@contextmanager
def content_of(what: object) -> Iterator[None]:
    """An error of a file's content becomes a UserError of one line, which starts with `what`.

    Errors of the machine and of the program surface.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno not in OF_A_FILE:
            raise
        raise UserError(f"{what} cannot be read: {_line(error)}") from error
    except CONTENT as error:
        raise UserError(f"{what} is damaged: {_line(error)}") from error
    except AttributeError as error:  # of a number or a text, say, where a dict was needed
        if not isinstance(error.obj, PLAIN):
            raise
        raise UserError(f"{what} is damaged: {_line(error)}") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Samples(Iterable[Sample]):
    """The samples of a split in the order of its list.

    items: a sequence, or an iterator where the list is too large for memory. load: the samples of an item, one for each
    position in 0..1 of a window in time; without positions those of the request. item_id: its id. count: number of
    items in the split's list. layout: of the files, in words. missing: the error of listed files that are missing.
    skipped: collects the items without a sample. None: a damaged or missing item raises. positions: of the windows that
    are read of an item, by its id; None: those of the request.
    """

    items: Iterable[Any]
    load: Callable[..., list[Sample]]
    item_id: Callable[[Any], str]
    count: int
    layout: str
    missing: MissingFiles | None = None
    skipped: list[SkippedItem] | None = None
    positions: Callable[[str], Sequence[float]] | None = None

    def part(self, part: slice | Sequence[int] = slice(None), skipped: list[SkippedItem] | None = None) -> Samples:
        """The samples of a part of the items, by ascending numbers. No other item is decoded."""
        listed = isinstance(self.items, Sequence)
        if isinstance(part, slice):
            items = self.items[part] if listed else islice(self.items, part.start, part.stop, part.step)
        elif listed:
            items = [self.items[number] for number in part]
        else:
            numbers = {*part}
            items = (item for number, item in enumerate(self.items) if number in numbers)
        return replace(self, items=items, skipped=skipped)

    def __iter__(self) -> Iterator[Sample]:
        return (sample for _, samples in self.by_index() for sample in samples)

    def by_index(self) -> Iterator[tuple[int, list[Sample]]]:
        """Index in `items` and samples, of every item that has any."""
        for index, item in enumerate(self.items):
            try:
                samples = self._load(item, self.positions and self.positions(self.item_id(item)))
            except UserError as error:
                bad = not isinstance(error, ExcludedItem)
                if self.skipped is not None:
                    self.skipped.append(SkippedItem(self.item_id(item), str(error), bad))
                elif bad:
                    raise
            else:
                yield index, samples

    def at_index(self, index: int, positions: Sequence[float] | None = None) -> list[Sample]:
        """The samples of one item, in the windows at these positions. Raises UserError: it has none."""
        assert isinstance(self.items, Sequence)  # true of every benchmark with a training split
        return self._load(self.items[index], positions)

    def _load(self, item: Any, positions: Sequence[float] | None) -> list[Sample]:
        with content_of(self.item_id(item)):
            return self.load(item) if positions is None else self.load(item, positions)
