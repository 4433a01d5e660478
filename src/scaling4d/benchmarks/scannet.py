"""ScanNet v2 (depth): `scans/<scene>/<scene>.sens` version 4 and `scannetv2_{train,val}.txt`.

Layout of a .sens file: the official SensReader (SensorData.py and its README). All numbers are little endian. Colour and
depth differ in resolution and intrinsics; intrinsics put pixel centres at whole numbers. Poses that are -inf mark lost tracking;
their depth is still good.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from scaling4d.benchmarks.frames import TOLERANCE_S, Crop, needed
from scaling4d.records import Sample, UserError

VERSION = 4
JPEG, PNG = 2, 1
ZLIB_USHORT, RAW_USHORT = 1, 0
SHIFT = 1000.0  # depth units a metre
RANGE_M = (0.001, 10.0)  # usable depth; 0 is "no measurement" (protocol of 4DS as reported by Gen4U)
RATE_HZ = 30.0  # of the sensor, where the time stamps are missing
HEADER = struct.Struct("<16f16f16f16fiiIIIIfQ")
FRAME = struct.Struct("<16fQQQQ")


def read(root: Path, split: str, *, frames: int, rate_hz: float, side_px: int, part: slice = slice(None)) -> Iterator[Sample]:
    """labels depth_m `T H W` with valid (measured and within RANGE_M), camera_to_world `T 4 4` with valid (finite).

    Depth takes the nearest measurement along the ray of each pixel's centre.
    """
    for scene in _scenes(root, split)[part]:
        path = needed(root, root / "scans" / scene / f"{scene}.sens", "listed in the split")
        try:
            yield _sample(path, scene, frames=frames, rate_hz=rate_hz, side_px=side_px)
        except (struct.error, zlib.error, UnidentifiedImageError, OSError) as error:
            raise UserError(f"{path} is damaged: {error}") from error


def count(root: Path, split: str) -> int:
    """Listed scenes.

    Raises:
        UserError: another layout, no scenes, or scenes that are not there.
    """
    scenes = _scenes(root, split)
    needed(root, root / "scans", "scans/<scene>/<scene>.sens")
    missing = [scene for scene in scenes if not (root / "scans" / scene / f"{scene}.sens").is_file()]
    if missing:
        raise UserError(f"{root / 'scans'} lacks {len(missing)} of {len(scenes)} scenes of {split}, the first is {missing[0]}")
    return len(scenes)


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, jpeg_quality: int) -> None:
    """Samples with labels depth_m `T h w` (any size; valid depth_m optional), camera_to_world `T 4 4`, and intrinsics `3 3` in
    units of the picture's width and height with its corner at (0, 0). Depth is rounded to millimetres."""
    scenes = []
    for sample in samples:
        scenes.append(sample.id)
        path = root / "scans" / sample.id / f"{sample.id}.sens"
        path.parent.mkdir(parents=True)
        height, width = sample.pixels.shape[1:3]
        depth = np.rint(sample.labels["depth_m"] * SHIFT)
        depth = np.where(sample.valid.get("depth_m", True) & (depth < 2**16), depth, 0).astype("<u2")
        k = sample.labels["intrinsics"]
        name = b"scaling4d"
        with path.open("wb") as file:
            file.write(struct.pack("<IQ", VERSION, len(name)) + name)
            matrices = [_matrix(k, height, width), np.eye(4), _matrix(k, *depth.shape[1:]), np.eye(4)]
            sizes = (width, height, depth.shape[2], depth.shape[1])
            file.write(HEADER.pack(*np.concatenate(matrices).ravel(), JPEG, ZLIB_USHORT, *sizes, SHIFT, len(depth)))
            for t, (picture, measured, pose) in enumerate(
                zip(sample.pixels, depth, sample.labels["camera_to_world"], strict=True)
            ):
                jpeg = io.BytesIO()
                Image.fromarray(picture).save(jpeg, "JPEG", quality=jpeg_quality, optimize=True)
                packed = zlib.compress(measured.tobytes(), 9)
                stamp = round(t / rate_hz * 1e6)
                file.write(FRAME.pack(*pose.ravel(), stamp, stamp, len(jpeg.getvalue()), len(packed)) + jpeg.getvalue() + packed)
            file.write(struct.pack("<Q", 0))  # no IMU frames
    (root / f"scannetv2_{split}.txt").write_text("".join(f"{scene}\n" for scene in scenes))


def _matrix(intrinsics: np.ndarray, height: int, width: int) -> np.ndarray:
    """`4 4` in pixels, pixel centres at whole numbers."""
    result = np.eye(4)
    result[:2, :3] = intrinsics[:2] * [[width], [height]]
    result[:2, 2] -= 0.5
    return result


def _scenes(root: Path, split: str) -> list[str]:
    path = needed(root, root / f"scannetv2_{split}.txt", "one scene a line")
    scenes = path.read_text().split()
    if not scenes:
        raise UserError(f"{path} lists nothing")
    if strange := [scene for scene in scenes if not scene.startswith("scene") or "/" in scene]:
        raise UserError(f"{path} lists {strange[0]!r}, which is not a scene such as scene0000_00")
    return scenes


def _sample(path: Path, scene: str, *, frames: int, rate_hz: float, side_px: int) -> Sample:
    with path.open("rb") as file:
        version, length = struct.unpack("<IQ", file.read(12))
        if version != VERSION or length > 4096:
            raise UserError(f"{path} is a .sens file of version {version}; needed {VERSION}")
        file.read(length)
        header = HEADER.unpack(file.read(HEADER.size))
        color_k, depth_k = (np.reshape(header[at : at + 16], (4, 4)) for at in (0, 32))
        color_code, depth_code, color_w, color_h, depth_w, depth_h, shift, total = header[64:]
        if color_code not in (JPEG, PNG) or depth_code not in (ZLIB_USHORT, RAW_USHORT):
            raise UserError(f"{path}: compression {color_code}, {depth_code}; needed jpeg or png, and zlib_ushort or raw_ushort")
        pictures, depths, poses = [], [], []
        for pose, color, depth in _wanted(file, path, int(total), frames, rate_hz):
            pictures.append(np.asarray(Image.open(io.BytesIO(color)).convert("RGB")))
            raw = zlib.decompress(depth) if depth_code == ZLIB_USHORT else depth
            if len(raw) != 2 * depth_h * depth_w:
                raise UserError(f"{path} is damaged: a depth map of {len(raw)} bytes; needed {depth_h} x {depth_w} x 2")
            depths.append(np.frombuffer(raw, "<u2").reshape(depth_h, depth_w))
            poses.append(pose)
    crop = Crop(color_h, color_w, side_px)
    at = crop.sources() * [color_w, color_h] - 0.5  # side side 2, colour pixels, centres at whole numbers
    ray = (at - [color_k[0, 2], color_k[1, 2]]) / [color_k[0, 0], color_k[1, 1]]
    source = np.floor(ray * [depth_k[0, 0], depth_k[1, 1]] + [depth_k[0, 2], depth_k[1, 2]] + 0.5 + 1e-4).astype(int)
    inside = ((source >= 0) & (source < [depth_w, depth_h])).all(-1)
    x, y = np.where(inside[..., None], source, 0).transpose(2, 0, 1)
    depth_m = (np.stack(depths)[:, y, x] / shift).astype(np.float32)  # T side side
    measured = inside & (depth_m >= RANGE_M[0]) & (depth_m <= RANGE_M[1])
    camera_to_world = np.stack(poses)
    return Sample(
        id=scene,
        video=scene.split("_")[0],  # scans of one space
        pixels=crop.pixels(pictures),
        labels={"depth_m": depth_m, "camera_to_world": camera_to_world},
        valid={"depth_m": measured, "camera_to_world": np.isfinite(camera_to_world).all((1, 2))},
    )


def _wanted(file: BinaryIO, path: Path, total: int, frames: int, rate_hz: float) -> Iterator[tuple[np.ndarray, bytes, bytes]]:
    """(pose `4 4` float64, colour bytes, depth bytes) of the frames on show at the clip's times; the rest is skipped over."""
    taken, last, first_s, shown_s, gap_s = 0, None, 0.0, 0.0, 0.0
    for number in range(total):
        *pose, color_us, _, color_bytes, depth_bytes = FRAME.unpack(file.read(FRAME.size))
        at, stamp_s = file.tell(), color_us / 1e6 if color_us or number == 0 else number / RATE_HZ
        first_s = stamp_s if number == 0 else first_s
        while last is not None and taken < frames and stamp_s - first_s > taken / rate_hz + TOLERANCE_S:
            yield _load(file, last)
            taken += 1
        if taken == frames:
            return
        gap_s, shown_s = stamp_s - first_s - shown_s, stamp_s - first_s
        last = (np.reshape(pose, (4, 4)).astype(np.float64), at, color_bytes, depth_bytes)
        file.seek(at + color_bytes + depth_bytes)
    while last is not None and taken < frames and taken / rate_hz <= shown_s + gap_s + TOLERANCE_S:
        yield _load(file, last)
        taken += 1
    if taken < frames:
        raise UserError(
            f"{path} ends after {shown_s:.2f} s, too early for {frames} frames at {rate_hz} Hz; "
            "lower clip.frames or raise rate_hz"
        )


def _load(file: BinaryIO, frame: tuple[np.ndarray, int, int, int]) -> tuple[np.ndarray, bytes, bytes]:
    pose, at, color_bytes, depth_bytes = frame
    back = file.tell()
    file.seek(at)
    color, depth = file.read(color_bytes), file.read(depth_bytes)
    file.seek(back)
    if len(depth) != depth_bytes:
        raise OSError("it ends inside a frame")
    return pose, color, depth
