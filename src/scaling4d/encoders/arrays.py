"""Files of float32 arrays, `.npz` and `.safetensors`, one array at a time. No content of a file is ever executed."""

from __future__ import annotations

import json
import lzma
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from scaling4d.records import UserError

Shape = tuple[int, ...]
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MOST_EXPANSION, SMALL = 100, 2**24  # compressed weights shrink little; SMALL: bytes that any file may expand to
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, NotImplementedError),  # zipfile raises these
    *(tokenize.TokenError, EOFError, OSError, ValueError, TypeError, KeyError, MemoryError),  # numpy raises these
)


class Npz:
    """An `.npz` file. The constructor reads all shapes (`shapes`, by key); `read` reads one array.

    Raises:
        UserError: not an npz, truncated, an array that would need unpickling, one that is not float32, or one whose
            number of bytes does not fit its shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise UserError(f"{path} is not an npz file, or is cut short: {error}") from error
        check_expansion(path)
        self.shapes: dict[str, Shape] = {}
        for member in self._zip.namelist():
            key = member.removesuffix(".npy")
            try:
                with self._zip.open(member) as file:
                    shape, dtype = read_header(file)
                    size = self._zip.getinfo(member).file_size - file.tell()
            except DAMAGE as error:
                raise UserError(f"{path}: {key} is damaged: {error}") from error
            if dtype.hasobject:
                raise UserError(f"{path}: {key} holds Python objects, which only pickle could read; needed plain float32")
            if dtype != np.float32:
                raise UserError(f"{path}: {key} is {dtype}; needed float32")
            if any(axis < 1 for axis in shape) or size != 4 * math.prod(shape):
                raise UserError(f"{path}: {key} has {size} bytes; needed those of an array {shape}")
            self.shapes[key] = shape

    def read(self, key: str) -> np.ndarray:
        """Read one array. Raises UserError: its bytes are damaged or missing."""
        try:
            with self._zip.open(f"{key}.npy") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except DAMAGE as error:
            raise UserError(f"{self.path}: {key} is damaged: {error}") from error


def check_expansion(path: Path) -> None:
    """Look into a file before it is loaded, in case it is a zip file, as those of torch and numpy are.

    Raises UserError: it would expand to far more than its own size, or is damaged. Nothing is expanded for that.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(path) as content:
            expanded = sum(member.file_size for member in content.infolist())
    except DAMAGE as error:
        raise UserError(f"{path} is not a whole zip file: {error}") from error
    if expanded > max(path.stat().st_size * MOST_EXPANSION, SMALL):
        raise UserError(f"{path} would expand to {expanded:,} bytes, more than {MOST_EXPANSION} times its size; refused")


def read_header(file: IO[bytes]) -> tuple[Shape, np.dtype]:
    """Shape and type of a `.npy`; the file then stands at the numbers. Raises errors of DAMAGE."""
    shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    return shape, dtype


def write_npz(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write arrays uncompressed, as numpy does. Equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        for key, array in arrays:
            with out.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def write_safetensors(path: Path, shapes: Mapping[str, Shape], arrays: Iterable[np.ndarray]) -> None:
    """Write float32 arrays in the order of `shapes`. The library's own writer needs all arrays at once."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            assert array.shape == shape, f"{name} became {array.shape}, not {shape}"
            np.ascontiguousarray(array, "<f4").tofile(file)
