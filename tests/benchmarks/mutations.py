"""Damaged copies of small benchmarks, from a seed: bytes of files, values of lists and labels, fields of containers."""

import io
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmarks import writers
from numbered import CLIP, H264, INTRINSICS, T, pictures, poses, three_boxes
from PIL import Image

from scaling4d import seeds
from scaling4d.benchmarks import (
    kinetics,
    perception_test,
    perception_test_objects,
    realestate10k,
    scannet,
    ssv2,
    tapvid,
    tfrecord,
    waymo,
)
from scaling4d.records import Sample, UserError

YOUTUBE_ID = "abcdefghijk"
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


def points() -> Sample:
    xy = seeds.numpy(0, "points").uniform(0.3, 0.7, (4, 30, 2)).astype(np.float32)
    return Sample("video_7", "video_7", pictures(30, 32, 48), {"points": xy}, {"points": np.ones((4, 30), bool)})


def clip(name: str, frames: int = T) -> Sample:
    depth = np.linspace(0.5, 4, frames * 16 * 16).reshape(frames, 16, 16)
    labels = {"action": np.int64(0), "depth_m": depth, "camera_to_world": poses(frames), "intrinsics": INTRINSICS}
    return Sample(name, YOUTUBE_ID, pictures(frames), labels)


# ---- benchmarks, each with the writer of a small copy ----

SLOW, JPEG = replace(CLIP, frames=4, rate_hz=5.0), {"rate_hz": 8.0, "jpeg_quality": 90}
SENSREADER, POSED_IMAGES = scannet.EXPORTS
Writer = Callable[[Path], None]


def both_splits(write: Callable, **options: object) -> Writer:
    return lambda root: [write(root, split, [clip("0")], **options, **H264) for split in ("train", "val")]


def export(layout: str) -> Writer:
    return lambda root: writers.write_scannet_export(root, clip("scene0003_01", 30), layout)


BENCHMARKS: dict[str, tuple[ModuleType, Writer]] = {
    "kinetics": (kinetics, both_splits(writers.write_kinetics, labels=["a"])),
    "ssv2": (ssv2, both_splits(ssv2.write, templates=["Eating [something]"])),
    "perception_test": (perception_test, lambda root: perception_test.write(root, "val", [points()], **H264)),
    "perception_test_objects": (
        perception_test_objects,
        lambda root: writers.write_objects(root, "val", [three_boxes("video_7")], **H264),
    ),
    "tapvid": (tapvid, lambda root: writers.write_tapvid(root, [points()])),
    "tapvid_kinetics": (tapvid, lambda root: writers.write_tapvid_kinetics(root, [points()], shards=1)),
    "waymo_v2": (waymo, lambda root: waymo.write(root, "val", [three_boxes("a")], **JPEG)),
    "waymo_v1": (waymo, lambda root: writers.write_waymo_v1(root, "val", three_boxes("a"), **JPEG)),
    "scannet": (scannet, lambda root: scannet.write(root, "val", [clip("scene0003_01")], **JPEG)),
    "scannet_sensreader": (scannet, export(SENSREADER)),
    "scannet_posed_images": (scannet, export(POSED_IMAGES)),
    "realestate10k": (realestate10k, lambda root: realestate10k.write(root, "val", [clip("0" * 16)], **H264)),
    "realestate10k_frames": (
        realestate10k,
        lambda root: writers.write_realestate10k_frames(root, "val", clip("0" * 16), rate_hz=8.0),
    ),
}


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
            head = min(len(content), 2000) if rng.random() < 0.5 else len(content)  # where the structure is
            for _ in range(int(rng.integers(1, 30))) if head else ():
                changed[int(rng.integers(head))] = int(rng.integers(256))
            return bytes(changed)


def one_of(values: list, rng: np.random.Generator) -> object:
    return values[int(rng.integers(len(values)))]


def inner_places(value: object) -> Iterator[tuple[dict | list, object]]:
    """Every place in dicts and lists, as (container, key)."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from inner_places(inner)


def json_file(content: bytes, rng: np.random.Generator) -> bytes:
    top = {"": json.loads(content)}
    places = list(inner_places(top))
    shallow = [place for place in places if not isinstance(place[1], int)] or places  # keys, not the numbers of lists
    container, key = one_of(shallow if rng.random() < 0.6 else places, rng)
    if container is not top and rng.random() < 0.15:
        del container[key]
    else:
        container[key] = one_of(VALUES, rng)
    return json.dumps(top[""]).encode()


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


OF_KIND = {".json": json_file, ".csv": text, ".txt": text, ".pkl": pickled, ".parquet": parquet, ".tfrecord": tfrecords}
OF_KIND |= {".sens": sens, ".jpg": picture, ".png": picture}


def outcome(benchmark: ModuleType, root: Path) -> str:
    """What became of a split: read, skipped or refused. Any other error than the project's own surfaces."""
    request = SLOW if benchmark is tapvid else CLIP
    skipped: list = []
    try:
        for sample in benchmark.open_split(root, "val", request).part(skipped=skipped):
            assert sample.pixels.shape == (request.frames, request.side_px, request.side_px, 3)
    except UserError:
        return "refused"
    return "skipped" if skipped else "read"


def damaged(name: str, root: Path, copies: int, seed: int = 0) -> Iterator[tuple[int, Path]]:
    """Damages one file of a benchmark after the other: (number, path). The file is whole again afterwards."""
    BENCHMARKS[name][1](root)
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    by_suffix = {suffix: [path for path in paths if path.suffix == suffix] for suffix in sorted({p.suffix for p in paths})}
    rng = seeds.numpy(seed, "mutations", name)
    for number in range(copies):
        path = one_of(one_of(list(by_suffix.values()), rng), rng)
        content = path.read_bytes()
        path.write_bytes(damage(path, rng))
        yield number, path
        path.write_bytes(content)
