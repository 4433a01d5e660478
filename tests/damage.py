"""Damage to valid files, from a seed, and a process in which a reader meets it: counts of what became of each.

Damages are of any file (bytes changed, cut out, put in, cut off) and of its kind: values of JSON, YAML, lists and
arrays become extreme or of another type, keys vanish or come twice, lists nest deeply, headers lie.
"""

import io
import json
import multiprocessing
import pickle
import resource
import signal
import struct
import tarfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from scaling4d import seeds
from scaling4d.benchmarks import scannet, tfrecord
from scaling4d.records import UserError

OUTCOMES = REFUSED, SKIPPED, ACCEPTED, OTHER = "refused", "skipped sample", "accepted", "other"
MOST_S, MOST_MB = 10.0, 1024  # of a case (a second on a quiet machine), of a process above its start
WORDS = ["", "x", "nan", "inf", "-inf", "-1", "0", "1e400", "1" * 40, "9" * 5000, "0.5", "\0"]
WORDS += ['"', ",", "../x", "é", "\udc80", "a b"]
VALUES = [
    *(None, True, -1, 0, 1, 2**31, 10**30, -(10**30), 0.5, 1e300, float("nan"), float("inf"), "", "x", "7"),
    *([], {}, [None], [[]], [[[1]]], ["x"], [1, [2]], {"x": 1}, [10**30], [-1], [float("nan")]),
]
ARRAYS = [
    *(np.zeros(0), np.zeros((0, 0)), np.array(1.0), np.array(True), np.zeros((2, 2, 2, 2), complex), np.array(["x", "y"])),
    *(np.zeros((3, 5), np.uint8), np.full((4, 30, 2), np.nan), np.full((4, 30, 2), 1e300), np.zeros((30, 0, 0, 3), np.uint8)),
    *(np.zeros((30, 4, 4, 4), np.uint8), np.zeros((30, 4, 4, 3), np.int64), np.ones((4, 30), np.float32), np.array([b"x"] * 30)),
    *(np.zeros((30, 1, 4000, 3), np.uint8), np.array([["x"] * 30] * 4), np.zeros((0, 30), bool), np.zeros((0, 30, 2))),
]
RAW = ["[" * 100_000, '{"a": ' * 50_000, "NaN", "-Infinity", "1e999", "1" * 5000, '"\\ud800"', '"\\u0000"', "'x'", "", "}"]
RAW_YAML = [
    "[" * 3_000,
    "{a: " * 3_000,
    "&a [*a]",
    "&a {b: *a}",
    "!!python/object:os.system x",
    "!!binary x",
    "1e999",
    ".nan",
    ".inf",
]
RAW_YAML += ["0o17", "2001-01-01", "<<: 1", "*none", "? [a]", "!!set {a}", "9" * 5000, "'", "\t", "@", "%", "~", '"\\ud800"']
# of every reader; the slow ones are 20,000 inputs together
SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]
SIZES = pytest.mark.parametrize("copies", [pytest.param(20, marks=pytest.mark.integration), pytest.param(625, marks=SLOW)])


@dataclass
class Counts:
    """What became of damaged files. problems: of the outcome OTHER, by their place in the code."""

    outcomes: Counter = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=dict)
    slowest_s: float = 0.0
    peak_mb: int = 0

    def row(self, name: str) -> list:
        """A row of the table of counts."""
        counts = [self.outcomes[outcome] for outcome in OUTCOMES]
        return [name, sum(counts), *counts, f"{self.slowest_s:.1f}", self.peak_mb]


class Overtime(BaseException):
    """A case took MOST_S."""


def endure(name: str, paths: Sequence[Path], read: Callable[[Path], str | None], copies: int) -> Counts:
    """Damage one file after the other and read, in a process of its own; each file is whole again afterwards.

    read: of the damaged file. It raises UserError (refused), or returns SKIPPED or, by default, ACCEPTED.
    """
    counts, number = Counts(), 0
    while number < copies:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_work, args=(sender, name, paths, read, number, copies))
        process.start()
        sender.close()
        try:
            while True:
                outcome, place, problem, seconds, peak_mb = receiver.recv()
                if problem:
                    counts.problems.setdefault(place, []).append(f"{number}: {problem}")
                number += 1
                counts.outcomes[outcome] += 1
                counts.slowest_s, counts.peak_mb = max(counts.slowest_s, seconds), max(counts.peak_mb, peak_mb)
        except EOFError:
            process.join()
        if number < copies:
            counts.outcomes[OTHER] += 1
            counts.problems.setdefault("the process ended", []).append(f"{number}: with {process.exitcode}")
            number += 1
    return counts


def _work(sender: Connection, name: str, paths: Sequence[Path], read: Callable, first: int, copies: int) -> None:
    by_suffix = {suffix: [path for path in paths if path.suffix == suffix] for suffix in sorted({p.suffix for p in paths})}
    most_bytes = psutil.Process().memory_info().vms + 4 * MOST_MB * 2**20  # allocators reserve more than they use
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    signal.signal(signal.SIGALRM, _overtime)
    before = _peak_mb()
    for number in range(first, copies):
        rng = seeds.numpy_rng(copies, "damage", name, number)
        path = one_of(one_of(list(by_suffix.values()), rng), rng)
        content, place, problem = path.read_bytes(), "", ""
        path.chmod(0o644)
        path.write_bytes(damage(path, rng))
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, MOST_S)
        try:
            outcome = read(path) or ACCEPTED
        except UserError as error:
            outcome = REFUSED
            if "\n" in str(error):
                outcome, place, problem = OTHER, "a refusal of several lines", f"{path.name}: {error}"
        except BaseException as error:  # noqa: BLE001  (whatever it is, it is counted)
            frames = traceback.extract_tb(error.__traceback__)
            last = next((frame for frame in reversed(frames) if "/scaling4d/" in frame.filename), frames[-1])
            outcome, place = OTHER, f"{type(error).__name__} below {last.filename}:{last.lineno}"
            problem = f"{path.name}: {traceback.format_exception_only(error)[-1][-500:]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds, peak_mb = time.monotonic() - started, _peak_mb() - before
        if not problem and (seconds > MOST_S or peak_mb > MOST_MB):
            outcome, place, problem = OTHER, "too much", f"{path.name}: {seconds:.1f} s, {peak_mb} MB"
            before = _peak_mb()
        path.write_bytes(content)
        sender.send((outcome, place, problem, seconds, peak_mb))


def _overtime(*_: object) -> None:
    raise Overtime


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def files_below(*folders: Path) -> list[Path]:
    """Files that hold anything."""
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


# ---- damage ----


def damage(path: Path, rng: np.random.Generator) -> bytes:
    """Other content for a file: of the damages for any file, or for its kind."""
    content = path.read_bytes()
    change = OF_KIND.get(path.suffix)
    return change(content, rng) if change and rng.random() < 0.7 else any_file(content, rng)


def any_file(content: bytes, rng: np.random.Generator) -> bytes:
    changed, at = bytearray(content), int(rng.integers(len(content) + 1))
    match rng.integers(6):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + rng.bytes(int(rng.integers(1, 200))) + content[at:]
        case 2:
            end = at + int(rng.integers(1, 200))
            return content[:at] + bytes(min(end, len(content)) - at) + content[end:]
        case 3:
            return content + content
        case _:
            size = len(content)
            first, last = one_of([(0, min(size, 2000)), (max(size - 1200, 0), size), (0, size), (0, size)], rng)  # structure
            for _ in range(int(rng.integers(1, 30))) if size else ():
                changed[int(rng.integers(first, last))] = int(rng.integers(256))
            return bytes(changed)


def one_of(values: list, rng: np.random.Generator) -> object:
    return values[int(rng.integers(len(values)))]


def inner_places(value: object) -> Iterator[tuple[dict | list, object]]:
    """Every place in dicts and lists, as (container, key)."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from inner_places(inner)


def values(top: dict, rng: np.random.Generator) -> tuple[dict | list, object]:
    """Change a value below `top[""]`, or take it away. Returns its place, (container, key)."""
    places = list(inner_places(top))
    shallow = [place for place in places if not isinstance(place[1], int)] or places  # keys, not the numbers of lists
    container, key = one_of(shallow if rng.random() < 0.6 else places, rng)
    if container is not top and rng.random() < 0.15:
        del container[key]
    else:
        container[key] = one_of(VALUES, rng)
    return container, key


def json_file(content: bytes, rng: np.random.Generator) -> bytes:
    if b"\n{" in content:  # a record a line
        lines = content.splitlines(keepends=True)
        row = int(rng.integers(len(lines)))
        return b"".join([*lines[:row], json_file(lines[row], rng) + b"\n", *lines[row + 1 :]])
    top = {"": json.loads(content)}
    container, key = values(top, rng)
    if rng.random() < 0.75 or not isinstance(key, str) or key not in container:
        return json.dumps(top[""]).encode()
    container[key] = "@"
    raw = one_of(RAW, rng)
    if container is not top and rng.random() < 0.3:  # the key comes twice
        raw = f"1, {json.dumps(key)}: {json.dumps(one_of(VALUES, rng))}"
    return json.dumps(top[""]).replace('"@"', raw).encode()


def yaml_file(content: bytes, rng: np.random.Generator) -> bytes:
    top = {"": yaml.safe_load(content)}
    container, key = values(top, rng)
    if rng.random() < 0.7 or not isinstance(key, str) or key not in container:
        return yaml.safe_dump(top[""], sort_keys=False).encode()
    container[key] = "@"
    return yaml.safe_dump(top[""], sort_keys=False).replace("'@'", one_of(RAW_YAML, rng)).encode()


def text(content: bytes, rng: np.random.Generator) -> bytes:
    lines = content.decode().splitlines()
    row, comma = int(rng.integers(len(lines))), "," in lines[0]
    words = lines[row].split("," if comma else None)
    if words:
        words[int(rng.integers(len(words)))] = one_of(WORDS, rng)
    if rng.random() < 0.1:
        words = words[1:]
    lines[row] = ("," if comma else " ").join(words)
    return "\n".join(lines).encode(errors="surrogatepass") + b"\n"


def pickled(content: bytes, rng: np.random.Generator) -> bytes:
    top = {"": pickle.loads(content)}
    container, key = one_of(list(inner_places(top)), rng)
    kind = rng.integers(4)
    if kind == 0 and container is not top:
        del container[key]
    elif kind == 1 and isinstance(container[key], np.ndarray):
        array = container[key]
        casts = [array[:-1], array[:, :1] if array.ndim > 1 else array[:1], array.ravel(), array[None]]
        casts += [array.tolist(), list(array)]
        if array.dtype.kind != "S":
            casts += [array.astype(dtype) for dtype in ("f2", "i8", "u1", "bool", "S4", "U4")]
        container[key] = one_of(casts, rng)
    else:
        container[key] = one_of(VALUES + ARRAYS + ARRAYS, rng)
    return pickle.dumps(top[""], protocol=int(rng.integers(6)))


def parquet(content: bytes, rng: np.random.Generator) -> bytes:
    table = pq.read_table(io.BytesIO(content))
    name, n = one_of(table.column_names, rng), len(table)
    values = [None, 1, -1, 2**62, 1e300, float("nan"), float("inf"), "x", b"x", True, [1], {"a": 1}]
    kinds = [*([value] * n for value in values), [None] * (n - 1) + [1], pa.array(["1"] * n).dictionary_encode()]
    kinds += [pa.array([0] * n, pa.timestamp("us")), pa.array([1] * n, pa.uint64())]
    where = table.column_names.index(name)
    table = table.drop_columns([name]) if rng.random() < 0.1 else table.set_column(where, name, pa.array(one_of(kinds, rng)))
    if rng.random() < 0.1:
        table = table.slice(0, 0)
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def tfrecords(content: bytes, rng: np.random.Generator) -> bytes:
    """Damaged messages, with checksums that fit."""
    out, at = b"", 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        body = bytearray(content[at + 12 : at + 12 + length])
        for place in rng.integers(min(length, 120), size=rng.integers(1, 4)):
            body[place] = rng.integers(256)
        for data in (struct.pack("<Q", length), bytes(body)):
            out += data + struct.pack("<I", tfrecord.masked_crc32c(data))
        at += length + 16
    return out


def sens(content: bytes, rng: np.random.Generator) -> bytes:
    """Another value in the header of the file or of a frame."""
    changed, start = bytearray(content), 12 + len("scaling4d")
    frame = start + scannet.HEADER.size
    fields = [*((place, "<f") for place in range(start, start + 256, 4)), *((start + at, "<I") for at in range(256, 280, 4))]
    fields += [(start + 280, "<f"), (start + 284, "<Q"), (0, "<I"), (4, "<Q"), *((frame + at, "<Q") for at in (64, 72, 80, 88))]
    place, form = one_of(fields if rng.random() < 0.3 else fields[64:], rng)
    numbers = [float("nan"), float("inf"), 0.0, -1.0, 1e30, 1e-30] if form == "<f" else [0, 1, 2, 3, 2**16, 2**31, 2**32 - 1]
    struct.pack_into(form, changed, place, one_of(numbers + [2**63, 2**64 - 1] * (form == "<Q"), rng))
    return bytes(changed)


def picture(content: bytes, rng: np.random.Generator) -> bytes:
    """A picture of another format, mode or size."""
    kinds = [("PNG", "1"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("PNG", "L"), ("JPEG", "CMYK"), ("JPEG", "L")]
    kinds += [("GIF", "P"), ("TIFF", "F"), ("BMP", "RGB"), ("EPS", "RGB"), ("PPM", "RGB"), ("WEBP", "RGB"), ("JPEG2000", "RGB")]
    form, mode = one_of(kinds, rng)
    size = one_of([(1, 1), (1, 3000), (32, 32), (31, 33), (3000, 1)], rng)
    out = io.BytesIO()
    Image.new(mode, size).save(out, form)
    return out.getvalue()


def another_array(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    casts = [array[:-1] if array.ndim else array, array.ravel(), array[None], array.astype("f2"), array.astype(">f4")]
    casts += [array * np.nan, array * 0 + 3e38, *ARRAYS] if array.dtype.kind == "f" else ARRAYS
    return one_of(casts, rng)


def npy(content: bytes, rng: np.random.Generator) -> bytes:
    """Another array, or a header that lies."""
    if rng.random() < 0.5:
        out = io.BytesIO()
        np.save(out, another_array(np.load(io.BytesIO(content)), rng))
        return out.getvalue()
    end = content.index(b"\n") + 1
    header = content[10:end].decode()
    for old, new in (("(", one_of(["(-1, ", "(99999999999, ", "((((((((", "(0, ", "(None, ", "(1.5, "], rng)), ("<f4", "|O")):
        header = header.replace(old, new, 1) if rng.random() < 0.6 else header
    return content[:8] + len(header).to_bytes(2, "little") + header.encode() + content[end:]


def npz(content: bytes, rng: np.random.Generator) -> bytes:
    """One array is another one, gone, or has another name; or its header lies."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = one_of(sorted(members), rng)
    inner = members.pop(name)
    if rng.random() < 0.8:
        members[name if rng.random() < 0.9 else one_of([*WORDS[:-3], *sorted(members)], rng)] = npy(inner, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.5 else zipfile.ZIP_STORED) as archive:
        for name, inner in members.items():
            archive.writestr(name.replace("\0", "") or "x", inner)
    return out.getvalue()


def safetensors(content: bytes, rng: np.random.Generator) -> bytes:
    """A header with another value, of the length that it states."""
    size = int.from_bytes(content[:8], "little")
    header = json_file(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def pth(content: bytes, rng: np.random.Generator) -> bytes:
    """Another value in the dicts, or another tensor."""
    top = {"": torch.load(io.BytesIO(content), weights_only=True)}
    container, key = one_of(list(inner_places(top)), rng)
    if rng.random() < 0.15 and container is not top:
        del container[key]
    elif isinstance(container[key], torch.Tensor) and rng.random() < 0.6:
        tensor = container[key]
        casts = [tensor[:-1], tensor.ravel(), tensor[None], tensor.half(), tensor.long(), tensor.to_sparse(), tensor[:0]]
        casts += [tensor * torch.nan, tensor.expand(3, *tensor.shape), tensor.to(torch.complex64), tensor.T.contiguous().T]
        container[key] = one_of(casts, rng)
    else:
        container[key] = one_of(VALUES, rng)
    out = io.BytesIO()
    torch.save(top[""], out)
    return out.getvalue()


def tar(content: bytes, rng: np.random.Generator) -> bytes:
    """Another field in a header, whose checksum fits."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        start = one_of(archive.getmembers(), rng).offset
    header = bytearray(content[start : start + 512])
    place, length, words = one_of([
        (0, 100, [b"", b"/etc/x", b"../x", b"\xff\xfe", b"a\nb", b"x" * 100]),
        (124, 12, [b"", b"-1", b"77777777777", b"\x80" + bytes(11), b"\xff" * 12, b"\x80" + b"\xff" * 11, b"8", b"00000000001"]),
        (136, 12, [b"x", b"\xff" * 12]),
        (156, 1, [bytes([letter]) for letter in b"0123456789gxLKSDVMNX\0\xff"]),
        (257, 8, [b"", b"ustar\x0000", b"ustar  \0"]),
        (345, 155, [b"/", b"x" * 155, b"7777"]),
    ], rng)  # fmt: skip
    header[place : place + length] = one_of(words, rng).ljust(length, b"\0")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return content[:start] + header + content[start + 512 :]


OF_KIND: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    **dict.fromkeys((".json", ".jsonl"), json_file),
    **dict.fromkeys((".yaml", ".lock", ".dvc"), yaml_file),
    **dict.fromkeys((".csv", ".txt", ".gin"), text),
    **dict.fromkeys((".jpg", ".png"), picture),
    **{".pkl": pickled, ".parquet": parquet, ".tfrecord": tfrecords, ".sens": sens, ".tar": tar},
    **{".npy": npy, ".npz": npz, ".safetensors": safetensors, ".pth": pth},
}
