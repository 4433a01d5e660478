"""TAP-Vid (points; validation alone): one of its sets as pickles, `*.pkl`, right here or in one folder.

DAVIS and RoboTAP: dict of videos by name; RGB-Stacking: list; Kinetics: lists in `<NNNN>_of_0010.pkl`. A video: video uint8
`T H W 3`, or JPEGs as bytes `T`; points `Q T 2`, x y in 0..1; occluded bool `Q T`. In the file, x is (x W - 0.5) / W, that is,
pixel centres lie at whole numbers. Frames count as taken at RATE_HZ: so they are in Kinetics, elsewhere the files do not say.

A pickle can run any program when it is loaded. This reader allows the names that numpy's arrays are pickled under, answers them
with its own few lines (even numpy's constructors would make an array of pointers out of bytes), and refuses all others. Facts:
tapnet's README, generate_tapvid.py and evaluation_datasets.py.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError

from scaling4d.benchmarks.frames import Crop, Samples
from scaling4d.benchmarks.queries import asked
from scaling4d.benchmarks.skipped import LeftOut, Skipped
from scaling4d.records import Sample, UserError

OFFICIAL = {"val": "30 in DAVIS"}
RATE_HZ = 25.0
DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    MemoryError,
    OverflowError,
)


class Dtype:
    """Stands for numpy's dtype: numbers, truth values and texts of fixed length, and no references to objects."""

    def __init__(self, text: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch("[biufcSU][0-9]+", text):
            raise UserError(f"it holds an array of kind {text!r}; needed numbers or bytes")
        self.plain = np.dtype(text)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.plain = self.plain.newbyteorder(state[1])


class Array:
    """Stands for an array that numpy would make empty and fill afterwards."""

    def __init__(self, *empty: Any) -> None: ...

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_column, content = state
        self.filled = filled(content, dtype, shape, "F" if by_column else "C")


def filled(content: bytes, dtype: Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, Dtype):
        raise TypeError("an array is not made of bytes")
    return np.frombuffer(content, dtype.plain).reshape(shape, order=order)


def scalar(dtype: Dtype, content: bytes) -> np.generic:
    return filled(content, dtype, (), "C")[()]


def old_bytes(text: str, encoding: str) -> bytes:
    """How older pickles write bytes; no other encoding is looked up."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def no_bytes() -> bytes:
    """Likewise, where there are none."""
    return b""


ALLOWED = {  # what a pickle asks for -> what it gets
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): filled for core in ("core", "_core")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): Dtype,
    ("_codecs", "encode"): old_bytes,
    **{(builtins, "bytes"): no_bytes for builtins in ("__builtin__", "builtins")},
}


def plain(value: Any, depth: int = 3) -> Any:
    """With arrays in the place of what stands for them; sets of videos of arrays are no deeper than this."""
    if isinstance(value, Array):
        return value.filled
    if depth and isinstance(value, dict):
        return {key: plain(inner, depth - 1) for key, inner in value.items()}
    if depth and isinstance(value, list | tuple):
        return [plain(inner, depth - 1) for inner in value]
    return value


class Arrays(pickle.Unpickler):
    """Numbers, texts, lists, dicts and numpy arrays; what else a pickle asks for is refused by its name and not looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(f"it asks for {module}.{name}, which no numpy array needs; it was not run")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UserError("it refers to things outside of itself")


def load(path: Path) -> Any:
    """The content of a pickle of numpy arrays.

    Raises:
        UserError: it is damaged, or asks for anything else.
    """
    try:
        with path.open("rb") as file:
            return plain(Arrays(file).load())
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except (*DAMAGED, OSError) as error:
        raise UserError(f"{path} is no pickle of arrays, or damaged: {error}") from error


def read(
    root: Path,
    split: str,
    *,
    frames: int,
    rate_hz: float,
    side_px: int,
    part: slice = slice(None),
    skipped: list[Skipped] | None = None,
    queries: str = "frame_0",
) -> Samples:
    """label points `Q T 2` with valid (not occluded): the tracks that are asked about in the clip's first frame; without any, no
    sample. queries: see `queries.asked`."""
    some = partial(_samples, frames=frames, rate_hz=rate_hz, side_px=side_px, how=queries)
    videos = islice(_videos(_pickles(root, split)), part.start, part.stop, part.step)
    return Samples(videos, some, skipped, lambda named: named[0])


def count(root: Path, split: str) -> int:
    """Videos.

    Raises:
        UserError: no pickles or those of several sets, the split is not val, or a pickle that is refused.
    """
    return sum(1 for _ in _videos(_pickles(root, split)))


def layout(root: Path, split: str) -> str:
    paths = _pickles(root, split)
    return f"{paths[0].relative_to(root)}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"


def write(root: Path, split: str, samples: Iterable[Sample]) -> None:
    """Samples with label points `Q T 2` and valid `Q T`, as DAVIS is distributed."""
    path = root / "tapvid_davis.pkl"
    root.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({sample.id: {"video": sample.pixels, **_tracks(sample)} for sample in samples}))


def write_kinetics(root: Path, split: str, samples: Iterable[Sample], *, shards: int, jpeg_quality: int) -> None:
    """The same with JPEGs in lists, as Kinetics' script makes them."""
    root.mkdir(parents=True, exist_ok=True)
    listed = [{"video": np.array([_encode(p, jpeg_quality) for p in s.pixels]), **_tracks(s)} for s in samples]
    size = -(-len(listed) // shards)
    for shard in range(shards):
        path = root / f"{shard:04d}_of_{shards:04d}.pkl"
        path.write_bytes(pickle.dumps(listed[shard * size : (shard + 1) * size]))


def _tracks(sample: Sample) -> dict[str, np.ndarray]:
    size = np.array(sample.pixels.shape[2:0:-1], float)  # W H
    return {"points": sample.labels["points"].astype(float) - 0.5 / size, "occluded": ~sample.valid["points"]}


def _encode(picture: np.ndarray, quality: int) -> bytes:
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=quality)
    return jpeg.getvalue()


def _pickles(root: Path, split: str) -> list[Path]:
    if split != "val":
        raise UserError(f"{root}: TAP-Vid has no split {split!r}, it is for measuring alone; train points on perception_test")
    paths = sorted(root.glob("*.pkl")) or sorted(root.glob("*/*.pkl"))
    if not paths:
        raise UserError(f"{root} is laid out in another way: needed *.pkl (such as tapvid_davis.pkl)")
    sets = sorted({f"{path.parent.relative_to(root) / re.sub('[0-9]+', '*', path.name)}" for path in paths})
    if len(sets) > 1:
        raise UserError(f"{root} holds several of TAP-Vid's sets: {', '.join(sets)}; keep one of them there")
    return paths


def _videos(paths: list[Path]) -> Iterator[tuple[str, Path, dict]]:
    """Name, file and content of every video; one pickle in memory at a time."""
    for path in paths:
        yield from _named(path)


def _named(path: Path) -> Iterator[tuple[str, Path, dict]]:
    content = load(path)
    if not isinstance(content, dict | list):
        raise UserError(f"{path} holds a {type(content).__name__}; needed a dict or a list of videos")
    named = content.items() if isinstance(content, dict) else ((f"{path.stem}-{n:04d}", one) for n, one in enumerate(content))
    yield from ((str(name), path, video) for name, video in named)


def _samples(named: tuple[str, Path, dict], *, frames: int, rate_hz: float, side_px: int, how: str) -> list[Sample]:
    name, path, video = named
    where = f"{path}, {name}"
    pictures, points, visible = _checked(where, video)
    after = np.round(np.arange(frames) * RATE_HZ / rate_hz).astype(int)
    if after[-1] >= len(pictures):
        raise UserError(f"{where}: {len(pictures)} frames, needed frame {after[-1]}; lower clip.frames or raise rate_hz")
    height, width = _picture(where, pictures[0]).shape[:2]
    crop = Crop(height, width, side_px)
    inside = crop.points(points + 0.5 / np.array([width, height]))  # Q F 2, pixel centres at halves as elsewhere
    clips = asked(name, inside, visible & ((inside >= 0) & (inside < 1)).all(-1), after, how)
    if not clips:
        raise LeftOut(f"{where}: no track is visible in the square where queries = {how!r} asks")
    return [
        Sample(
            id=clip.id,
            video=name,
            pixels=crop.pixels([_picture(where, pictures[number]) for number in clip.numbers]),
            labels={"points": clip.points},
            valid={"points": clip.visible},
        )
        for clip in clips
    ]


def _checked(where: str, video: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pictures `T ...`, points `Q T 2` float64, visible `Q T`."""
    if not isinstance(video, dict) or not {"video", "points", "occluded"} <= video.keys():
        raise UserError(f"{where}: needed a dict with video, points and occluded")
    pictures, points, occluded = (np.asarray(video[key]) for key in ("video", "points", "occluded"))
    if points.shape != (*occluded.shape, 2) or occluded.ndim != 2 or occluded.shape[1] != len(pictures):
        raise UserError(f"{where}: points {points.shape} and occluded {occluded.shape} do not fit {len(pictures)} frames")
    visible = ~occluded.astype(bool)
    if points.dtype.kind != "f" or not np.isfinite(points[visible]).all():
        raise UserError(f"{where}: points that are visible must be numbers")
    return pictures, points.astype(float), visible


def _picture(where: str, stored: np.ndarray | bytes) -> np.ndarray:
    """uint8 `H W 3`, from itself or from a JPEG."""
    if isinstance(stored, bytes):
        try:
            return np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{where}: a picture is damaged: {error}") from error
    if stored.dtype != np.uint8 or stored.ndim != 3 or stored.shape[2] != 3:
        raise UserError(f"{where}: a picture is {stored.dtype} {stored.shape}; needed uint8 H W 3, or a JPEG")
    return stored
