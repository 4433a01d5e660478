"""TFRecord files of protocol buffers, without TensorFlow: records with checksums, and a message's fields by number.

A record: length uint64, masked crc32c of those 8 bytes, the bytes, masked crc32c of them; all little endian. Source:
TensorFlow's record_writer.h and the protocol buffers' encoding guide.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scaling4d.records import UserError

POLYNOMIAL = np.uint32(0x82F63B78)  # Castagnoli, bits reversed
ROW = 1024  # bytes of one lane of the checksum
VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types
FLOATS = {FIXED64: struct.Struct("<d"), FIXED32: struct.Struct("<f")}

TABLE = np.arange(256, dtype=np.uint32)  # the checksum of every byte
for _ in range(8):
    TABLE = (TABLE >> 1) ^ np.where(TABLE & 1, POLYNOMIAL, np.uint32(0))


def crc32c(data: bytes | memoryview) -> int:
    """The Castagnoli checksum. Long data is cut into rows; these run side by side and are then folded, pair by pair."""
    content = np.frombuffer(data, np.uint8)
    row = min(len(content), ROW)
    lanes = 1 if len(content) <= ROW else 1 << (-(-len(content) // ROW) - 1).bit_length()
    padded = np.zeros(lanes * row, np.uint8)  # zeros before the data change nothing, since a register starts at 0
    padded[lanes * row - len(content) :] = content
    padded[lanes * row - len(content) :][:4] ^= 0xFF  # which stands for a register that starts with all bits set
    register = _run(np.zeros(lanes, np.uint32), np.ascontiguousarray(padded.reshape(lanes, row).T))
    shift = _run(np.uint32(1) << np.arange(32, dtype=np.uint32), np.zeros((ROW, 1), np.uint8)) if lanes > 1 else None
    while len(register) > 1:
        register = _apply(shift, register[0::2]) ^ register[1::2]
        shift = _apply(shift, shift)
    return int(register[0]) ^ (0xFFFFFFFF >> 8 * len(content)) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """The checksum as TFRecord stores it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[memoryview]:
    """The records of a file, one in memory at a time.

    Raises UserError: a checksum is wrong, or the file ends inside a record; the message names the record, from 0.
    """
    with path.open("rb") as file:
        number, size = 0, path.stat().st_size
        while head := file.read(12):
            if len(head) < 12 or masked_crc32c(head[:8]) != struct.unpack("<I", head[8:])[0]:
                raise UserError(f"{path} is damaged: the length of record {number} does not fit its checksum")
            (length,) = struct.unpack("<Q", head[:8])
            if file.tell() + length + 4 > size:
                raise UserError(f"{path} is damaged: it ends inside record {number}")
            body = memoryview(file.read(length + 4))
            if masked_crc32c(body[:length]) != struct.unpack("<I", body[length:])[0]:
                raise UserError(f"{path} is damaged: record {number} does not fit its checksum")
            yield body[:length]
            number += 1


def fields(message: memoryview) -> Iterator[tuple[int, int | float | memoryview]]:
    """(number, value) of a message's fields in their order: whole numbers, doubles, and bytes (texts, inner messages).

    Raises ValueError: not a message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, at = _varint(message, at)
        elif wire_type == LENGTH_DELIMITED:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif wire_type in FLOATS:
            value, at = message[at : at + FLOATS[wire_type].size], at + FLOATS[wire_type].size
        else:
            raise ValueError(f"field {number} has the unknown kind {wire_type}")
        if at > len(message):
            raise ValueError(f"it ends inside field {number}")
        yield number, FLOATS[wire_type].unpack(value)[0] if wire_type in FLOATS else value


def _run(register: np.ndarray, columns: np.ndarray) -> np.ndarray:
    for column in columns:
        register = TABLE[(register ^ column) & 0xFF] ^ (register >> 8)
    return register


def _apply(shift: np.ndarray, register: np.ndarray) -> np.ndarray:
    """shift `32`: where each bit goes."""
    bits = (register[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(bits * shift, axis=1)


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A whole number, and where the next field starts."""
    value, shift = 0, 0
    while at < len(message) and shift < 64:
        value, shift, at = value | (message[at] & 0x7F) << shift, shift + 7, at + 1
        if message[at - 1] < 0x80:
            return value, at
    raise ValueError("it ends inside a number")
