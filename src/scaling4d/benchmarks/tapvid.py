"""TAP-Vid (points; validation alone): one of its sets as pickles, `*.pkl`, in its folder or in one folder below.

DAVIS and RoboTAP: dict of videos by name; RGB-Stacking: list; Kinetics: lists in `<NNNN>_of_0010.pkl`. A video: video
uint8 `F H W 3`, or JPEGs as bytes `F`; points `Q F 2`, x y in 0..1; occluded bool `Q F`. A stored x is
`(x W - 0.5) / W`: pixel centres lie at whole numbers. Frames count at RATE_HZ, that of Kinetics; files of the other
sets have no rate.

A pickle can run any program when it is loaded. This reader allows only the names under which numpy's arrays are
pickled, and replaces them by its own few lines (even numpy's constructors would make an array of pointers out of
bytes). Facts: tapnet's README, generate_tapvid.py and evaluation_datasets.py.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from scaling4d.benchmarks.frames import Crop, open_picture
from scaling4d.benchmarks.queries import query_clips
from scaling4d.benchmarks.samples import ClipRequest, ExcludedItem, Samples, content_of
from scaling4d.records import Sample, UserError

OFFICIAL = {"val": "30 in DAVIS"}
RATE_HZ = 25.0
DAMAGED = (pickle.UnpicklingError, struct.error, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError)


class PickledDtype:
    """Stands for numpy's dtype: numbers, truth values and texts of fixed length, and no references to objects."""

    def __init__(self, text: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch("[biufcSU][0-9]+", text):
            raise UserError(f"it holds an array of kind {text!r}; needed numbers or bytes")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """Stands for an array that numpy would make empty and fill afterwards."""

    def __init__(self, *empty: Any) -> None: ...

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_column, content = state
        self.array = _from_buffer(content, dtype, shape, "F" if by_column else "C")


def _from_buffer(content: bytes, dtype: PickledDtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, PickledDtype):
        raise TypeError("an array is not made of bytes")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: PickledDtype, content: bytes) -> np.generic:
    return _from_buffer(content, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    """Bytes of an older pickle; no other encoding is looked up."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


ALLOWED = {  # name in a pickle -> its replacement
    **{(f"numpy.{core}.multiarray", "_reconstruct"): PickledArray for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): PickledDtype,
    ("_codecs", "encode"): _encode,
    **{(builtins, "bytes"): lambda: b"" for builtins in ("__builtin__", "builtins")},  # empty bytes of an older pickle
}


class ArrayUnpickler(pickle._Unpickler):
    """Loads numbers, texts, lists, dicts and numpy arrays. It refuses any other name, and does not look it up.

    The one written in C makes room for as many objects as a damaged number says. This one keeps them in a dict.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(f"it asks for {module}.{name}, which no numpy array needs; it was not run")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UserError("it refers to things outside of itself")


def load_pickle(path: Path) -> Any:
    """The content of a pickle of numpy arrays. Raises UserError: it is damaged, or needs any other name."""
    with content_of(path), path.open("rb") as file:
        try:
            return _with_arrays(ArrayUnpickler(file).load())
        except UserError as error:
            raise UserError(f"{path} is refused: {error}") from error
        except DAMAGED as error:
            raise UserError(f"{path} is no pickle of arrays, or damaged: {error}") from error
        except MemoryError as error:
            raise UserError(f"{path} asks for more memory than there is: it is damaged, or needs a larger machine") from error


def _with_arrays(value: Any, depth: int = 3) -> Any:
    """The value with its arrays. Sets of videos of arrays are no deeper than `depth`."""
    if isinstance(value, PickledArray):
        return value.array
    if depth and isinstance(value, dict):
        return {key: _with_arrays(inner, depth - 1) for key, inner in value.items()}
    if depth and isinstance(value, list | tuple):
        return [_with_arrays(inner, depth - 1) for inner in value]
    return value


def open_split(root: Path, split: str, request: ClipRequest) -> Samples:
    """Samples with the label points `Q T 2` and valid (not occluded): the tracks visible in a clip's query frame.

    See `queries`. A video without any is excluded. Every pickle is loaded once to count its videos.
    """
    if split != "val":
        raise UserError(f"{root}: TAP-Vid has no split {split!r}, it is for measuring alone; train points on perception_test")
    paths = sorted(root.glob("[!.]*.pkl")) or sorted(root.glob("*/[!.]*.pkl"))
    if not paths:
        raise UserError(f"{root} is laid out in another way: needed *.pkl (such as tapvid_davis.pkl)")
    sets = sorted({f"{path.parent.relative_to(root) / re.sub('[0-9]+', '*', path.name)}" for path in paths})
    if len(sets) > 1:
        raise UserError(f"{root} holds several of TAP-Vid's sets: {', '.join(sets)}; keep one of them there")
    first, *others = (str(path.relative_to(root)) for path in paths)

    def load(item: tuple[str, Path, dict], positions: Sequence[float] = request.positions) -> list[Sample]:
        name, path, content = item
        where = f"{path}, {name}"
        if not isinstance(content, dict) or not {"video", "points", "occluded"} <= content.keys():
            raise UserError(f"{where}: needed a dict with video, points and occluded")
        with content_of(where):
            stored, points, occluded = (np.asarray(content[key]) for key in ("video", "points", "occluded"))
        if points.shape != (*occluded.shape, 2) or occluded.ndim != 2 or occluded.shape[1:] != stored.shape[:1]:
            frames = len(stored) if stored.ndim else "no"
            raise UserError(f"{where}: points {points.shape} and occluded {occluded.shape} do not fit {frames} frames")
        visible = ~occluded.astype(bool)
        if points.dtype.kind != "f" or not np.isfinite(points[visible]).all():
            raise UserError(f"{where}: points that are visible must be numbers")
        offsets = request.frame_numbers(RATE_HZ)
        if offsets[-1] >= len(stored):
            raise UserError(f"{where}: {len(stored)} frames, needed frame {offsets[-1]}; lower frames or raise rate_hz")
        height, width = _picture(where, stored[0]).shape[:2]
        crop = Crop(height, width, request.side_px)
        centre = 0.5 / np.array([width, height])  # elsewhere, pixel centres lie at halves
        inside = crop.points(points.astype(float) + centre)  # Q F 2
        clips = query_clips(name, inside, visible, offsets, request, positions)
        if not clips:
            raise ExcludedItem(f"{where}: no track is visible in the square at queries = {request.queries!r}")
        samples = []
        for clip in clips:
            pixels = crop.pixels([_picture(where, stored[number]) for number in clip.frame_numbers])
            samples.append(Sample(clip.id, name, pixels, {"points": clip.points}, {"points": clip.visible}))
        return samples

    count = sum(1 for path in paths for _ in _videos(path))
    videos = chain.from_iterable(map(_videos, paths))  # one pickle in memory at a time
    return Samples(videos, load, itemgetter(0), count, f"{first} and {len(others)} more" if others else first)


def _videos(path: Path) -> Iterator[tuple[str, Path, dict]]:
    """Name, file and content of the videos of a pickle."""
    content = load_pickle(path)
    if not isinstance(content, dict | list):
        raise UserError(f"{path} holds a {type(content).__name__}; needed a dict or a list of videos")
    named = content.items() if isinstance(content, dict) else ((f"{path.stem}-{n:04d}", one) for n, one in enumerate(content))
    yield from ((str(name), path, video) for name, video in named)


def _picture(where: str, stored: np.ndarray | bytes) -> np.ndarray:
    """uint8 `H W 3`, of a picture or of a JPEG."""
    if isinstance(stored, bytes):
        return np.asarray(open_picture(stored, f"{where}: a picture", ["JPEG"]).convert("RGB"))
    if stored.dtype != np.uint8 or stored.ndim != 3 or stored.shape[2] != 3:
        raise UserError(f"{where}: a picture is {stored.dtype} {stored.shape}; needed uint8 H W 3, or a JPEG")
    return stored
