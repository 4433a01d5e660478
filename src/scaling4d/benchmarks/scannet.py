"""ScanNet v2 (depth): `scannetv2_{train,val}.txt`, and every scene in one of three layouts, looked for in this order:

`scans/<scene>/<scene>.sens` version 4; what the official SensReader exports from it, `scans/<scene>/{color/<i>.jpg,depth/<i>.png,
pose/<i>.txt,intrinsic/*.txt}`; and mmdet3d's `posed_images/<scene>/<00000>.{jpg,png,txt}` with intrinsic.txt.

Layout of a .sens file: SensorData.py and its README. All numbers are little endian. Colour and depth differ in resolution and
intrinsics; intrinsics put pixel centres at whole numbers. Poses that are -inf mark lost tracking; their depth is still good.
Exports keep no time stamps: their numbers, which are not padded with zeros, count at RATE_HZ (mmdet3d's default keeps 300 frames
of a scene and numbers them anew; export all of them).
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from scaling4d.benchmarks.frames import TOLERANCE_S, Crop, Samples, each, needed
from scaling4d.benchmarks.skipped import LeftOut, Missing, Skipped
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "1,201", "val": "312"}
VERSION = 4
JPEG, PNG = 2, 1
ZLIB_USHORT, RAW_USHORT = 1, 0
SHIFT = 1000.0  # depth units a metre
RANGE_M = (0.001, 10.0)  # usable depth; 0 is "no measurement" (protocol of 4DS as reported by Gen4U)
RATE_HZ = 30.0  # of the sensor, where the time stamps are missing
HEADER = struct.Struct("<16f16f16f16fiiIIIIfQ")
FRAME = struct.Struct("<16fQQQQ")


@dataclass(frozen=True)
class Export:
    """A layout of files: the folder of all scenes; below a scene, the folders of pictures, depth and poses, its intrinsics (those
    of depth may be missing), and to how many digits a frame's number is padded."""

    scenes: str
    color: str
    depth: str
    pose: str
    color_k: str
    depth_k: str
    digits: int


SENSREADER = Export("scans", "color", "depth", "pose", "intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt", 1)
POSED_IMAGES = Export("posed_images", ".", ".", ".", "intrinsic.txt", "depth_intrinsic.txt", 5)
EXPORTS = {"SensReader's export": SENSREADER, "mmdet3d's posed_images": POSED_IMAGES}


@dataclass(frozen=True)
class Clip:
    """pictures uint8 `H W 3` each; depth uint16 `T h w`, `shift` units a metre; poses `T 4 4`; intrinsics `4 4` in pixels."""

    pictures: list[np.ndarray]
    depth: np.ndarray
    shift: float
    poses: np.ndarray
    color_k: np.ndarray
    depth_k: np.ndarray


def read(
    root: Path,
    split: str,
    *,
    frames: int,
    rate_hz: float,
    side_px: int,
    part: slice = slice(None),
    skipped: list[Skipped] | None = None,
) -> Samples:
    """labels depth_m `T H W` with valid (measured and within RANGE_M), camera_to_world `T 4 4` with valid (finite).

    Depth takes the nearest measurement along the ray of each pixel's centre.
    """
    one = partial(_sample, root, frames=frames, rate_hz=rate_hz, side_px=side_px)
    return each(_scenes(root, split)[part], one, skipped)


def count(root: Path, split: str) -> int:
    """Listed scenes.

    Raises:
        UserError: another layout, no scenes, or scenes that are not there.
    """
    scenes = _scenes(root, split)
    if not (root / POSED_IMAGES.scenes).is_dir():
        needed(root, root / "scans", "scans/<scene>/<scene>.sens")
    if missing := [scene for scene in scenes if not _layout(root, scene)]:
        raise Missing(root / "scans", missing, listed=len(scenes), what=f"scenes of {split}")
    return len(scenes)


def layout(root: Path, split: str) -> str:
    """The layouts of the scenes that are there."""
    return ", ".join(dict.fromkeys(found for scene in _scenes(root, split) if (found := _layout(root, scene))))


def _layout(root: Path, scene: str) -> str:
    if (root / "scans" / scene / f"{scene}.sens").is_file():
        return ".sens"
    for name, export in EXPORTS.items():
        if (root / export.scenes / scene / export.color_k).is_file():
            return name
    return ""


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, jpeg_quality: int) -> None:
    """Samples with labels depth_m `T h w` (any size; valid depth_m optional), camera_to_world `T 4 4`, and intrinsics `3 3` in
    units of the picture's width and height with its corner at (0, 0). Depth is rounded to millimetres."""
    scenes = []
    for sample in samples:
        scenes.append(sample.id)
        path = root / "scans" / sample.id / f"{sample.id}.sens"
        path.parent.mkdir(parents=True)
        height, width = sample.pixels.shape[1:3]
        depth = _millimetres(sample)
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


def write_exported(root: Path, split: str, samples: Iterable[Sample], *, export: Export, jpeg_quality: int) -> None:
    """The same samples in the layout of an export; their frames count as taken at RATE_HZ."""
    scenes = []
    for sample in samples:
        scenes.append(sample.id)
        folder, k = root / export.scenes / sample.id, sample.labels["intrinsics"]
        for name in (export.color, export.depth, export.pose, Path(export.color_k).parent):
            (folder / name).mkdir(parents=True, exist_ok=True)
        depth = _millimetres(sample)
        np.savetxt(folder / export.color_k, _matrix(k, *sample.pixels.shape[1:3]), fmt="%f")
        np.savetxt(folder / export.depth_k, _matrix(k, *depth.shape[1:]), fmt="%f")
        for t, pose in enumerate(sample.labels["camera_to_world"]):
            name = f"{t:0{export.digits}d}"
            Image.fromarray(sample.pixels[t]).save(folder / export.color / f"{name}.jpg", quality=jpeg_quality)
            Image.fromarray(depth[t]).save(folder / export.depth / f"{name}.png")
            np.savetxt(folder / export.pose / f"{name}.txt", pose, fmt="%f")
    (root / f"scannetv2_{split}.txt").write_text("".join(f"{scene}\n" for scene in scenes))


def _millimetres(sample: Sample) -> np.ndarray:
    """uint16 `T h w`, 0 where nothing was measured."""
    depth = np.rint(sample.labels["depth_m"] * SHIFT)
    return np.where(sample.valid.get("depth_m", True) & (depth < 2**16), depth, 0).astype("<u2")


def _matrix(intrinsics: np.ndarray, height: int, width: int) -> np.ndarray:
    """`4 4` in pixels, pixel centres at whole numbers."""
    result = np.eye(4)
    result[:2, :3] = intrinsics[:2] * [[width], [height]]
    result[:2, 2] -= 0.5
    return result


def _scenes(root: Path, split: str) -> list[str]:
    path = needed(root, root / f"scannetv2_{split}.txt", "one scene a line")
    lines = [(number, line.strip()) for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)]
    scenes = [scene for _, scene in lines if scene]
    if not scenes:
        raise UserError(f"{path} lists nothing")
    if strange := [(number, scene) for number, scene in lines if scene and not re.fullmatch(r"scene\w+", scene)]:
        number, scene = strange[0]
        raise UserError(f"{path}, line {number}: {scene!r}, which is not a scene such as scene0000_00")
    return scenes


def _sample(root: Path, scene: str, *, frames: int, rate_hz: float, side_px: int) -> Sample:
    found = _layout(root, scene)
    if not found:
        raise UserError(f"no {root / 'scans' / scene / scene}.sens, nor an export of the scene, which the split lists")
    if found in EXPORTS:
        clip = _exported(root / EXPORTS[found].scenes / scene, EXPORTS[found], frames=frames, rate_hz=rate_hz)
    else:
        path = root / "scans" / scene / f"{scene}.sens"
        try:
            clip = _sens(path, frames=frames, rate_hz=rate_hz)
        except (struct.error, zlib.error, UnidentifiedImageError, OSError, SyntaxError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    for k in (clip.color_k, clip.depth_k):
        if not np.isfinite(k).all() or min(k[0, 0], k[1, 1]) <= 0:
            raise UserError(f"{root}: the intrinsics of {scene} are not numbers with focal lengths above 0")
    depth_m, measured, crop = _aligned(clip, side_px)
    if not measured.any():
        raise LeftOut(f"{root}: nothing is measured within {RANGE_M[0]} .. {RANGE_M[1]} m in the clip of {scene}")
    return Sample(
        id=scene,
        video=scene.split("_")[0],  # scans of one space
        pixels=crop.pixels(clip.pictures),
        labels={"depth_m": depth_m, "camera_to_world": clip.poses},
        valid={"depth_m": measured, "camera_to_world": np.isfinite(clip.poses).all((1, 2))},
    )


def _aligned(clip: Clip, side_px: int) -> tuple[np.ndarray, np.ndarray, Crop]:
    """depth_m `T side side` under the picture's pixels, where it is usable, and the square itself."""
    (color_h, color_w), (depth_h, depth_w) = clip.pictures[0].shape[:2], clip.depth.shape[1:]
    crop = Crop(color_h, color_w, side_px)
    color_k, depth_k = clip.color_k, clip.depth_k
    at = crop.sources() * [color_w, color_h] - 0.5  # side side 2, colour pixels, centres at whole numbers
    ray = (at - [color_k[0, 2], color_k[1, 2]]) / [color_k[0, 0], color_k[1, 1]]
    source = np.floor(ray * [depth_k[0, 0], depth_k[1, 1]] + [depth_k[0, 2], depth_k[1, 2]] + 0.5 + 1e-4).astype(int)
    inside = ((source >= 0) & (source < [depth_w, depth_h])).all(-1)
    x, y = np.where(inside[..., None], source, 0).transpose(2, 0, 1)
    depth_m = (clip.depth[:, y, x] / clip.shift).astype(np.float32)  # T side side
    return depth_m, inside & (depth_m >= RANGE_M[0]) & (depth_m <= RANGE_M[1]), crop


def _sens(path: Path, *, frames: int, rate_hz: float) -> Clip:
    with path.open("rb") as file:
        version, length = struct.unpack("<IQ", file.read(12))
        if version != VERSION or length > 4096:
            raise UserError(f"{path} is a .sens file of version {version}; needed {VERSION}")
        file.read(length)
        header = HEADER.unpack(file.read(HEADER.size))
        color_k, depth_k = (np.reshape(header[at : at + 16], (4, 4)) for at in (0, 32))
        color_code, depth_code, _, _, depth_w, depth_h, shift, total = header[64:]
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
    return Clip(pictures, np.stack(depths), shift, np.stack(poses), color_k, depth_k)


def _exported(folder: Path, export: Export, *, frames: int, rate_hz: float) -> Clip:
    """Numbers, not names, are in order of time: 2 comes before 10."""
    paths = {int(path.stem): path for path in (folder / export.color).glob("*.jpg") if path.stem.isdecimal()}
    if not paths:
        raise UserError(f"{folder / export.color} holds no <number>.jpg")
    numbers = np.array(sorted(paths))
    times_s = (numbers - numbers[0]) / RATE_HZ
    wanted_s = np.arange(frames) / rate_hz
    if wanted_s[-1] > times_s[-1] + np.diff(times_s)[-1:].sum() + TOLERANCE_S:
        raise _too_short(folder, times_s[-1], frames, rate_hz)
    shown = [paths[number] for number in numbers[np.searchsorted(times_s, wanted_s + TOLERANCE_S, side="right") - 1]]
    pictures = [_opened(path, ("RGB", "L"), "a colour picture").convert("RGB") for path in shown]
    depths = [
        _opened(folder / export.depth / f"{path.stem}.png", ("I;16", "I;16B", "I"), "depth as 16-bit grey, in mm")
        for path in shown
    ]
    if len({depth.size for depth in depths}) > 1 or len({picture.size for picture in pictures}) > 1:
        raise UserError(f"{folder}: pictures or depth maps of {len(depths)} frames differ in size")
    color_k = _numbers(folder / export.color_k)
    if (folder / export.depth_k).is_file():
        depth_k = _numbers(folder / export.depth_k)
    else:  # the same lens at another resolution
        scale = np.divide(depths[0].size, pictures[0].size)
        depth_k = color_k.copy()
        depth_k[:2] *= scale[:, None]
        depth_k[:2, 2] += (scale - 1) / 2  # pixel centres at whole numbers
    return Clip(
        [np.asarray(picture) for picture in pictures],
        np.stack([np.asarray(depth) for depth in depths]),
        SHIFT,
        np.stack([_numbers(folder / export.pose / f"{path.stem}.txt") for path in shown]),
        color_k,
        depth_k,
    )


def _opened(path: Path, modes: tuple[str, ...], what: str) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # the last: of a broken png
        raise UserError(f"{path} cannot be read: {error}") from error
    if picture.mode not in modes:
        raise UserError(f"{path} is a picture of kind {picture.mode}; needed {what}")
    return picture


def _numbers(path: Path) -> np.ndarray:
    """`4 4` float64; may hold -inf."""
    try:
        values = np.array([[float(x) for x in line.split()] for line in path.read_text().splitlines() if line.strip()])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as four rows of four numbers: {error}") from error
    if values.shape != (4, 4):
        raise UserError(f"{path} holds {values.shape} numbers; needed four rows of four")
    return values


def _too_short(path: Path, end_s: float, frames: int, rate_hz: float) -> UserError:
    return UserError(
        f"{path} ends after {end_s:.2f} s, too early for {frames} frames at {rate_hz} Hz; lower clip.frames or raise rate_hz"
    )


def _wanted(file: BinaryIO, path: Path, total: int, frames: int, rate_hz: float) -> Iterator[tuple[np.ndarray, bytes, bytes]]:
    """(pose `4 4` float64, colour bytes, depth bytes) of the frames on show at the clip's times; the rest is skipped over."""
    taken, last, first_s, shown_s, gap_s = 0, None, 0.0, 0.0, 0.0
    size = path.stat().st_size
    for number in range(total):
        if file.tell() + FRAME.size > size:
            raise OSError(f"it ends before frame {number} of {total}")
        *pose, color_us, _, color_bytes, depth_bytes = FRAME.unpack(file.read(FRAME.size))
        if file.tell() + color_bytes + depth_bytes > size:
            raise OSError(f"it ends inside frame {number} of {total}")
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
        raise _too_short(path, shown_s, frames, rate_hz)


def _load(file: BinaryIO, frame: tuple[np.ndarray, int, int, int]) -> tuple[np.ndarray, bytes, bytes]:
    pose, at, color_bytes, depth_bytes = frame
    back = file.tell()
    file.seek(at)
    color, depth = file.read(color_bytes), file.read(depth_bytes)
    file.seek(back)
    return pose, color, depth
