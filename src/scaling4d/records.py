"""Records that packages exchange, frozen and checked at construction; errors, exit code 75, and JSON files.

Axis letters of models and training; other letters are told where they are used:
  B clips   T frames   H W pixels   C channels   t h w token grid   N = t*h*w tokens
  K visible tokens   M coarse tokens   D width   P values per patch   Q queries   L blocks
Pixels are uint8 `B T H W C` until the model; times are seconds (`_s`), rates hertz (`_hz`), sides pixels (`_px`).
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


LOCK = "requirements.lock"  # in a clone of the project
MOST_JSON_BYTES = 2**24  # of a description
NEEDED = {  # where the file system refuses
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "room on its disk"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "permission for this user"),
    errno.EBUSY: "a folder that is no mount point",
}


class UserError(ValueError):
    """An error that a user can repair. The command line prints one line and exits with 1."""


def pip_install(extra: str) -> str:
    """The command that installs an extra: with the pinned versions where the working directory is a clone."""
    return f"pip install -c {LOCK} -e '.[{extra}]'" if Path(LOCK).is_file() else f"pip install 'scaling4d[{extra}]'"


@contextmanager
def remedy(kind: type[UserError], text: str) -> Iterator[None]:
    """Append a remedy to errors of a kind. A lower package states the problem; its caller knows the setting."""
    try:
        yield
    except kind as error:
        raise UserError(f"{error}; {text}") from error


def is_of_finder(name: str) -> bool:
    """Whether a file is one that macOS leaves in a folder: .DS_Store, or ._NAME beside NAME on other file systems."""
    return name == ".DS_Store" or name.startswith("._")


def files_below(folder: Path, *, linked: bool = True) -> list[Path]:
    """The files below a folder, ascending. linked: those in linked folders, too, which DVC passes over.

    Raises UserError: a link to a folder around it.
    """
    files: list[Path] = []
    folders = [folder]
    while folders:
        here = folders.pop()
        around = [path for path in (here, *here.parents) if path.is_relative_to(folder)]
        try:
            entries = [*os.scandir(here)]  # with their kinds: no further call for each file
        except OSError:  # absent, or not for this user
            continue
        for entry in entries:
            path = here / entry.name
            if entry.is_dir(follow_symlinks=linked):
                if entry.is_symlink() and any(above.resolve().is_relative_to(path.resolve()) for above in around):
                    raise UserError(f"{path} is a link to a folder around it; remove it")
                folders.append(path)
            elif entry.is_file():
                files.append(path)
    return sorted(files)


def did_you_mean(word: object, known: Iterable[object], count: int = 1) -> str:
    """The end of a message about an unknown word: "; did you mean random?", or nothing where no known word is near."""
    known = list(map(str, known))
    near = [] if word in known else get_close_matches(str(word), known, count)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def on_one_line(message: object) -> str:
    """A message on one line of a terminal, whatever names of files it holds.

    Control characters, and bytes of a name that are not UTF-8, become escapes with a backslash.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(message))


def _escaped(c: str) -> str:
    byte = ord(c) - 0xDC00  # Python reads a byte that is not UTF-8 as this surrogate
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else c.encode("unicode_escape").decode()


class Preempted(Exception):
    """A run saved its state and stopped on request. The command line exits with AGAIN: run it again."""


AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Video:
    """A probed video file. Height and width are as displayed: with square pixels, after rotation."""

    path: str
    sha256: str
    codec: str
    duration_s: float
    rate_hz: float
    height_px: int
    width_px: int
    rotation_deg: int

    def __post_init__(self) -> None:
        _require(self.height_px > 0 and self.width_px > 0, f"{self.path}: size {self.height_px}x{self.width_px} px is empty")
        _require(self.rotation_deg in (0, 90, 180, 270), f"{self.path}: rotation {self.rotation_deg} is not a multiple of 90")


class Augmentation(NamedTuple):
    """How a copy of a clip is changed.

    rectangle: top, left, height, width in pixels, resized to the clip's own side; None: all of the picture.
    """

    rectangle: tuple[int, int, int, int] | None
    mirrored: bool
    backwards: bool


@dataclass(frozen=True)
class ClipBatch:
    """A loader's batch: pixels uint8 `B T H W C`, and each clip's id and start in its video.

    augmentations: of each clip, which are left to the model's device; empty: none are. masked: the masks of a training.
    """

    pixels: Tensor
    ids: tuple[str, ...]
    start_s: tuple[float, ...]
    augmentations: tuple[Augmentation, ...] = ()
    masked: MaskedTokens | None = None

    def pin_memory(self) -> ClipBatch:
        """The batch in memory from which a GPU copies; torch's loaders call this, in a thread."""
        masked = self.masked and replace(self.masked, ids_keep=self.masked.ids_keep.pin_memory())
        return replace(self, pixels=self.pixels.pin_memory(), masked=masked)

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        _require(len(shape) == 5 and shape[-1] == 3, f"pixels have shape {shape}; needed B T H W 3")
        _require(
            shape[0] == len(self.ids) == len(self.start_s), f"{shape[0]} clips, {len(self.ids)} ids, {len(self.start_s)} starts"
        )


@dataclass(frozen=True)
class MaskedTokens:
    """A mask by its visible tokens: `ids_keep` B K int64, ascending indices into the N tokens of the grid t h w."""

    ids_keep: Tensor
    grid: tuple[int, int, int]

    def __post_init__(self) -> None:
        _require(self.ids_keep.ndim == 2, f"ids_keep has shape {tuple(self.ids_keep.shape)}; needed B K")
        _require(0 < self.ids_keep.shape[1] <= self.token_count, f"{self.ids_keep.shape[1]} tokens kept of {self.token_count}")

    @property
    def token_count(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Sample:
    """One clip of a benchmark with its labels.

    pixels: uint8 `T H W 3`. video: the unit that confidence intervals resample. Labels and valid masks by task:
      actions  labels action and action_mirrored `()` int64, indices into the benchmark's classes
      boxes    labels boxes `Q T 4` float32 x1 y1 x2 y2 in 0..1 of (W, H); valid boxes `Q T`
      depth    labels depth_m `T H W` float32 metres; valid depth_m `T H W` (measured and usable)
      points   labels points `Q T 2` float32 x y in 0..1 of (W, H); valid points `Q T` (visible)
      pose     labels camera_to_world `T 4 4` float64; valid camera_to_world `T`
    """

    id: str
    video: str
    pixels: np.ndarray
    labels: Mapping[str, np.ndarray]
    valid: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(
            self.pixels.dtype == np.uint8 and self.pixels.ndim == 4 and self.pixels.shape[-1] == 3,
            f"{self.id}: pixels are {self.pixels.dtype} {self.pixels.shape}; needed uint8 T H W 3",
        )
        for name, mask in self.valid.items():
            _require(mask.dtype == bool, f"{self.id}: valid[{name!r}] is {mask.dtype}; needed bool")
            _require(name in self.labels, f"{self.id}: valid[{name!r}] has no label of that name")
            label = self.labels[name]
            _require(label.shape[: mask.ndim] == mask.shape, f"{self.id}: {name} {label.shape} against its mask {mask.shape}")


@dataclass(frozen=True)
class Result:
    """A measured number and its origin. `readout.stage.result_of` computes it from `Task.measure`.

    value lies in [low, high], the 95 % bootstrap interval over videos. checkpoint_sha256: of the encoder's weights.
    others: further metrics of the same readout.
    """

    encoder: str
    parameters: int
    task: str
    protocol: str
    metric: str
    value: float
    low: float
    high: float
    unit: str
    higher_is_better: bool
    examples: int
    seed: int
    checkpoint_sha256: str
    others: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"{self.encoder} {self.task} {self.protocol}"
        _require(math.isfinite(self.value), f"{where}: {self.metric} = {self.value} is not a number")
        _require(self.low <= self.value <= self.high, f"{where}: {self.value} outside its interval {self.low} .. {self.high}")
        _require(self.examples > 0, f"{where}: no examples")
        _require(len(self.checkpoint_sha256) == 64, f"{where}: checkpoint_sha256 {self.checkpoint_sha256!r}")

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Result:
        return cls(**json.loads(path.read_text()))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that a stranger may have written.

    Raises ValueError: the file is large, nested deeply, no JSON, or no object, or it has NaN.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"it has the number {word}")

    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; needed at most {MOST_JSON_BYTES:,}")
    try:
        content = json.loads(path.read_text(), parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}; needed an object")
    return content


def shortened(error: object) -> str:
    """An error on one line, of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


@contextmanager
def as_user_error(where: object) -> Iterator[None]:
    """Turn errors that a wrong description causes while something is built of it into a UserError. where: the file."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise UserError(f"{where}: {shortened(error)}") from error


@contextmanager
def file_system_errors(where: object = "a file") -> Iterator[None]:
    """Turn a refusal of the file system (a full disk, no permission) into one line. where: if the error names no file.

    Raises:
        UserError: there was one.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NEEDED:
            raise
        path = error.filename2 or error.filename or where  # of two, the second is written
        change = "repair that, and the same command continues"
        raise UserError(f"{path}: {error.strerror}; needed {NEEDED[error.errno]}; {change}") from error


def json_text(content: Any) -> str:
    """JSON in one layout (sorted keys, two spaces, final newline): equal content gives equal text."""
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    path.write_text(json_text(content))
