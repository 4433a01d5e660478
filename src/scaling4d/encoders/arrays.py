"""Files of arrays, one array at a time: `.npz` in and out, `.safetensors` in and out. Nothing in a file is ever executed."""

from __future__ import annotations

import json
import lzma
import math
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scaling4d.records import UserError

Shape = tuple[int, ...]
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, NotImplementedError),  # what zipfile raises
    *(EOFError, OSError, ValueError, KeyError, MemoryError),  # and numpy
)


@contextmanager
def new(out: Path) -> Iterator[Path]:
    """A name beside `out` to write a file or a folder under; it becomes `out` when the block ends without an error.

    Raises:
        UserError: `out` exists, or there is no folder to put it in.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another name or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"no folder {out.parent} to write {out.name} in; make it first")
    partial = out.with_name(f".{out.name}.partial")
    try:
        yield partial
        partial.rename(out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


class Npz:
    """An `.npz` whose shapes are read at once and whose arrays on demand.

    shapes: key -> shape.
    Raises:
        UserError: not an npz, truncated, an array that would need unpickling, one that is not float32, or one whose bytes are
            not as many as its shape says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise UserError(f"{path} is not an npz file, or is cut short: {error}") from error
        self.shapes: dict[str, Shape] = {}
        for member in self._zip.namelist():
            key = member.removesuffix(".npy")
            try:
                with self._zip.open(member) as file:
                    shape, _, kind = HEADERS[np.lib.format.read_magic(file)](file)
                    size = self._zip.getinfo(member).file_size - file.tell()
            except DAMAGE as error:
                raise UserError(f"{path}: {key} is damaged: {error}") from error
            if kind.hasobject:
                raise UserError(f"{path}: {key} holds Python objects, which only pickle could read; needed plain float32")
            if kind != np.float32:
                raise UserError(f"{path}: {key} is {kind}; needed float32")
            if any(axis < 1 for axis in shape) or size != 4 * math.prod(shape):
                raise UserError(f"{path}: {key} has {size} bytes; needed those of an array {shape}")
            self.shapes[key] = shape

    def read(self, key: str) -> np.ndarray:
        """Raises UserError: the array's bytes are damaged or missing."""
        try:
            with self._zip.open(f"{key}.npy") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except DAMAGE as error:
            raise UserError(f"{self.path}: {key} is damaged: {error}") from error


def write_npz(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Uncompressed, as numpy writes it; equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        for key, array in arrays:
            with out.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def write_safetensors(path: Path, shapes: Mapping[str, Shape], arrays: Iterable[np.ndarray]) -> None:
    """float32 arrays, in the order of `shapes`; the library's own writer wants them all at once."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            assert array.shape == shape, f"{name} became {array.shape}, not {shape}"
            np.ascontiguousarray(array, "<f4").tofile(file)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Arrays by name, each read when it is asked for.

    Raises:
        UserError: damaged.
    """
    from safetensors import SafetensorError, safe_open

    class Arrays(Mapping[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            return opened.get_tensor(name)

        def __iter__(self) -> Iterator[str]:
            return iter(opened.keys())

        def __len__(self) -> int:
            return len(opened.keys())

    try:
        with safe_open(path, framework="numpy") as opened:
            yield Arrays()
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
