"""ScanNet v2 (depth): `scannetv2_{train,val}.txt`, and every scene in the first of three layouts that exists.

`scans/<scene>/<scene>.sens` version 4; the official SensReader's export of it, `scans/<scene>/` with `color/<i>.jpg`,
`depth/<i>.png`, `pose/<i>.txt` and `intrinsic/*.txt`; and mmdet3d's `posed_images/<scene>/<00000>.{jpg,png,txt}` with
intrinsic.txt.

Layout of a .sens file: SensorData.py and its README. All numbers are little endian. Colour and depth differ in
resolution and intrinsics; intrinsics place pixel centres at whole numbers. Poses of -inf mark lost tracking; their
depth is still good. Exports keep no time stamps: their numbers, which are not padded with zeros, count at RATE_HZ
(mmdet3d's default keeps 300 frames of a scene and numbers them anew; export all of them).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from scaling4d.benchmarks.frames import Crop, encode_jpeg, open_picture, require_path, start_rows
from scaling4d.benchmarks.samples import ClipRequest, ExcludedItem, MissingFiles, Samples, at_positions, content_of
from scaling4d.records import Sample, UserError
from scaling4d.video import MAX_PIXELS, TOLERANCE_S

OFFICIAL = {"train": "1,201", "val": "312"}
VERSION = 4
JPEG, PNG = 2, 1
ZLIB_USHORT, RAW_USHORT = 1, 0
SHIFT = 1000.0  # depth units a metre
RANGE_M = (0.001, 10.0)  # usable depth; 0 is "no measurement" (4DS's protocol, as Gen4U reports it)
RATE_HZ = 30.0  # of the sensor, where the time stamps are missing
HEADER = struct.Struct("<16f16f16f16fiiIIIIfQ")
FRAME = struct.Struct("<16fQQQQ")


# The folder of all scenes; below a scene, folders of frames and files of intrinsics, of which depth_k may be missing.
Export = namedtuple("Export", "scenes color depth pose color_k depth_k")
SENSREADER = Export("scans", "color", "depth", "pose", "intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt")
POSED_IMAGES = Export("posed_images", ".", ".", ".", "intrinsic.txt", "depth_intrinsic.txt")
EXPORTS = {"SensReader's export": SENSREADER, "mmdet3d's posed_images": POSED_IMAGES}


# Frames of a clip as they are stored. pictures: uint8 `H W 3` each. depth: uint16 `T h w`, `shift` units a metre.
# poses: `T 4 4`. color_k, depth_k: intrinsics `4 4` in pixels.
SceneClip = namedtuple("SceneClip", "pictures depth shift poses color_k depth_k")
# times_s: of the stored frames, from 0. read_clip: the frames of these indices `T`.
Scene = tuple[np.ndarray, Callable[[np.ndarray], SceneClip]]


def open_split(root: Path, split: str, request: ClipRequest) -> Samples:
    """Samples, labels depth_m `T H W` (valid: measured, within RANGE_M) and camera_to_world `T 4 4` (valid: finite).

    Depth is the nearest measurement along the ray of each pixel's centre. A clip without any measurement is excluded. A
    window that may lie anywhere gives way to the ones behind it, and to those at the scene's start, until one has any.
    """
    scenes = _scenes(root, split)
    if not any((root / export.scenes).is_dir() for export in EXPORTS.values()):
        require_path(root, root / "scans", "scans/<scene>/<scene>.sens")
    files = {".sens": "scans/{0}/{0}.sens"} | {name: f"{e.scenes}/{{0}}/{e.color_k}" for name, e in EXPORTS.items()}
    layouts = {s: next((name for name, file in files.items() if (root / file.format(s)).is_file()), "") for s in scenes}

    def load(scene: str, positions: Sequence[float] = request.positions) -> list[Sample]:
        stored_as = layouts[scene]
        if not stored_as:
            raise UserError(f"no {root / 'scans' / scene / scene}.sens, nor an export of the scene, which the split lists")
        if stored_as in EXPORTS:
            path = root / EXPORTS[stored_as].scenes / scene
            times_s, read_clip = _open_export(path, EXPORTS[stored_as])
        else:
            path = root / "scans" / scene / f"{scene}.sens"
            with content_of(path):
                times_s, read_clip = _open_sens(path, request)
        count, samples = len(start_rows(np.maximum.accumulate(times_s), request)), []
        for start in at_positions(range(count), positions):
            shown = _frames_on_show(path, times_s, request, start)
            step = max(shown[-1] - start, 1)
            tries = [*range(start, count, step), *range(0, start, step)]
            windows = (window(scene, read_clip(_frames_on_show(path, times_s, request, first))) for first in tries)
            sample = next(filter(None, windows), None)
            if not sample:
                where = f"in the clip of {scene}"
                raise ExcludedItem(f"{root}: nothing is measured within {RANGE_M[0]} .. {RANGE_M[1]} m {where}")
            samples.append(sample)
        return samples

    def window(scene: str, clip: SceneClip) -> Sample | None:
        """None: nothing is measured."""
        for k in (clip.color_k, clip.depth_k):
            if not np.isfinite(k).all() or min(k[0, 0], k[1, 1]) <= 0:
                raise UserError(f"{root}: the intrinsics of {scene} are not numbers with focal lengths above 0")
        crop = Crop(*clip.pictures[0].shape[:2], request.side_px)
        depth_m, measured = _aligned_depth(clip, crop)
        if not measured.any():
            return None
        labels = {"depth_m": depth_m, "camera_to_world": clip.poses}
        valid = {"depth_m": measured, "camera_to_world": np.isfinite(clip.poses).all((1, 2))}
        space = scene.split("_")[0]  # which may have several scans
        return Sample(scene, space, crop.pixels(clip.pictures), labels, valid)

    names = [scene for scene in scenes if not layouts[scene]]
    missing = MissingFiles(root / "scans", names, listed=len(scenes), what=f"scenes of {split}") if names else None
    layout = ", ".join(dict.fromkeys(filter(None, layouts.values())))
    return Samples(scenes, load, str, len(scenes), layout, missing)


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, jpeg_quality: int) -> None:
    """Write samples as .sens files, depth rounded to millimetres.

    Their labels: depth_m `T h w` (any size; valid depth_m optional), camera_to_world `T 4 4`, and intrinsics `3 3` in
    units of the picture's width and height with its corner at (0, 0).
    """
    scenes = []
    for sample in samples:
        scenes.append(sample.id)
        path = root / "scans" / sample.id / f"{sample.id}.sens"
        path.parent.mkdir(parents=True)
        height, width = sample.pixels.shape[1:3]
        depth, k = millimetres(sample), sample.labels["intrinsics"]
        sensor = b"scaling4d"
        with path.open("wb") as file:
            file.write(struct.pack("<IQ", VERSION, len(sensor)) + sensor)
            matrices = [pixel_intrinsics(k, height, width), np.eye(4), pixel_intrinsics(k, *depth.shape[1:]), np.eye(4)]
            sizes = (width, height, depth.shape[2], depth.shape[1])
            file.write(HEADER.pack(*np.concatenate(matrices).ravel(), JPEG, ZLIB_USHORT, *sizes, SHIFT, len(depth)))
            frames = zip(sample.pixels, depth, sample.labels["camera_to_world"], strict=True)
            for t, (picture, measured, pose) in enumerate(frames):
                jpeg, packed = encode_jpeg(picture, jpeg_quality), zlib.compress(measured.tobytes(), 9)
                stamp = round(t / rate_hz * 1e6)
                file.write(FRAME.pack(*pose.ravel(), stamp, stamp, len(jpeg), len(packed)) + jpeg + packed)
            file.write(struct.pack("<Q", 0))  # no IMU frames
    (root / f"scannetv2_{split}.txt").write_text("".join(f"{scene}\n" for scene in scenes))


def millimetres(sample: Sample) -> np.ndarray:
    """Depth as it is stored: uint16 `T h w`, 0 where nothing was measured."""
    depth = np.rint(sample.labels["depth_m"] * SHIFT)
    return np.where(sample.valid.get("depth_m", True) & (depth < 2**16), depth, 0).astype("<u2")


def pixel_intrinsics(intrinsics: np.ndarray, height: int, width: int) -> np.ndarray:
    """Intrinsics as they are stored: `4 4` in pixels, pixel centres at whole numbers."""
    result = np.eye(4)
    result[:2, :3] = intrinsics[:2] * [[width], [height]]
    result[:2, 2] -= 0.5
    return result


def _scenes(root: Path, split: str) -> list[str]:
    path = require_path(root, root / f"scannetv2_{split}.txt", "one scene a line")
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    if not any(lines):
        raise UserError(f"{path} lists nothing")
    for number, scene in enumerate(lines, 1):
        if scene and not re.fullmatch(r"scene\w{1,100}", scene, re.ASCII):
            raise UserError(f"{path}, line {number}: {scene!r}, which is not a scene such as scene0000_00")
    return [scene for scene in lines if scene]


def _aligned_depth(clip: SceneClip, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """depth_m `T side side` under the square's pixels, and where it is usable."""
    (depth_h, depth_w), color_k, depth_k = clip.depth.shape[1:], clip.color_k, clip.depth_k
    pixels = crop.sources() * [crop.width, crop.height] - 0.5  # side side 2, colour pixels, centres at whole numbers
    ray = (pixels - [color_k[0, 2], color_k[1, 2]]) / [color_k[0, 0], color_k[1, 1]]
    source = np.floor(ray * [depth_k[0, 0], depth_k[1, 1]] + [depth_k[0, 2], depth_k[1, 2]] + 0.5 + 1e-4).astype(int)
    inside = ((source >= 0) & (source < [depth_w, depth_h])).all(-1)
    x, y = np.where(inside[..., None], source, 0).transpose(2, 0, 1)
    depth_m = (clip.depth[:, y, x] / clip.shift).astype(np.float32)  # T side side
    return depth_m, inside & (depth_m >= RANGE_M[0]) & (depth_m <= RANGE_M[1])


def _frames_on_show(path: Path, times_s: np.ndarray, request: ClipRequest, start: int) -> np.ndarray:
    """Index `T` of the frame on show at each time of a clip that starts with frame `start`.

    Raises UserError: the scene ends early.
    """
    if not len(times_s):
        raise request.too_long(path, 0.0)
    rising_s = np.maximum.accumulate(times_s)
    wanted_s = rising_s[start] + request.times_s
    if wanted_s[-1] > times_s[-1] + np.diff(times_s)[-1:].sum() + TOLERANCE_S:
        raise request.too_long(path, times_s[-1])
    return np.searchsorted(rising_s, wanted_s + TOLERANCE_S, side="right") - 1


def _open_sens(path: Path, request: ClipRequest) -> Scene:
    """Read the frame headers: all, or up to the end of a clip at the scene's start."""
    size = path.stat().st_size
    with path.open("rb") as file:
        version, length = struct.unpack("<IQ", file.read(12))
        if version != VERSION or length > 4096:
            raise UserError(f"{path} is a .sens file of version {version}; needed {VERSION}")
        file.read(length)
        header = HEADER.unpack(file.read(HEADER.size))
        color_k, depth_k = (np.reshape(header[start : start + 16], (4, 4)) for start in (0, 32))
        color_code, depth_code, _, _, depth_w, depth_h, shift, total = header[64:]
        if color_code not in (JPEG, PNG) or depth_code not in (ZLIB_USHORT, RAW_USHORT):
            raise UserError(f"{path}: compression {color_code}, {depth_code}; needed jpeg or png, and zlib_ushort or raw_ushort")
        if not 0 < depth_h * depth_w <= MAX_PIXELS or not 0 < shift < np.inf:
            raise UserError(
                f"{path}: depth of {depth_w}x{depth_h} px, {shift} units a metre; needed at most {MAX_PIXELS} px in all"
            )
        frames, stamps_s, last_s = [], [], request.times_s[-1] + TOLERANCE_S
        for number in range(total):
            if file.tell() + FRAME.size > size:
                raise UserError(f"{path} is damaged: it ends before frame {number} of {total}")
            *pose, color_us, _, color_bytes, depth_bytes = FRAME.unpack(file.read(FRAME.size))
            start = file.tell()
            if start + color_bytes + depth_bytes > size:
                raise UserError(f"{path} is damaged: it ends inside frame {number} of {total}")
            frames.append((np.reshape(pose, (4, 4)), start, color_bytes, depth_bytes))
            stamps_s.append(color_us / 1e6 if color_us or number == 0 else number / RATE_HZ)
            if not request.anywhere and stamps_s[-1] - stamps_s[0] > last_s:
                break
            file.seek(start + color_bytes + depth_bytes)

    def read_clip(shown: np.ndarray) -> SceneClip:
        pictures, depths = [], []
        with content_of(path), path.open("rb") as file:
            for _, start, color_bytes, depth_bytes in (frames[index] for index in shown):
                file.seek(start)
                picture = open_picture(file.read(color_bytes), f"{path}: a picture", ["JPEG", "PNG"])
                pictures.append(np.asarray(picture.convert("RGB")))
                packed = file.read(depth_bytes)
                needed = 2 * depth_h * depth_w
                raw = _inflate(packed, needed) if depth_code == ZLIB_USHORT else packed
                if len(raw) != needed:
                    has = f"{len(raw)} bytes" if len(raw) < needed else f"more than {needed} bytes"
                    raise UserError(f"{path} is damaged: a depth map of {has}; needed {depth_h} x {depth_w} x 2")
                depths.append(np.frombuffer(raw, "<u2").reshape(depth_h, depth_w))
        poses = np.stack([frames[index][0] for index in shown])
        return SceneClip(pictures, np.stack(depths), shift, poses, color_k, depth_k)

    return np.array(stamps_s) - (stamps_s or [0.0])[0], read_clip


def _inflate(packed: bytes, size: int) -> bytes:
    """Inflate, up to a byte more than `size`. Raises zlib.error: the stream is damaged, or ends early."""
    stream = zlib.decompressobj()
    raw = stream.decompress(packed, size + 1)
    if len(raw) <= size and not stream.eof:
        raise zlib.error("incomplete or truncated stream")
    return raw


def _open_export(folder: Path, export: Export) -> Scene:
    """List the frames of an export. Numbers, not names, are in order of time: 2 comes before 10."""
    paths = {int(path.stem): path for path in (folder / export.color).glob("*.jpg") if path.stem.isdecimal()}
    if not paths:
        raise UserError(f"{folder / export.color} holds no <number>.jpg")
    numbers = np.array(sorted(paths))
    times_s = (numbers - numbers[0]) / RATE_HZ
    return times_s, lambda shown: _read_export(folder, export, [paths[number] for number in numbers[shown]])


def _read_export(folder: Path, export: Export, shown: Sequence[Path]) -> SceneClip:
    """The clip of these pictures of an export."""
    pictures = [_open(path, "JPEG", ("RGB", "L"), "a colour picture") for path in shown]
    maps = [folder / export.depth / f"{path.stem}.png" for path in shown]
    depths = [_open(path, "PNG", ("I;16", "I;16B", "I"), "depth as 16-bit grey, in mm") for path in maps]
    if len({depth.size for depth in depths}) > 1 or len({picture.size for picture in pictures}) > 1:
        raise UserError(f"{folder}: pictures or depth maps of {len(depths)} frames differ in size")
    color_k = _matrix(folder / export.color_k)
    if (folder / export.depth_k).is_file():
        depth_k = _matrix(folder / export.depth_k)
    else:  # the same lens at another resolution
        scale = np.divide(depths[0].size, pictures[0].size)
        depth_k = color_k.copy()
        depth_k[:2] *= scale[:, None]
        depth_k[:2, 2] += (scale - 1) / 2  # pixel centres at whole numbers
    poses = np.stack([_matrix(folder / export.pose / f"{path.stem}.txt") for path in shown])
    color, depth = [np.asarray(p.convert("RGB")) for p in pictures], np.stack([np.asarray(depth) for depth in depths])
    return SceneClip(color, depth, SHIFT, poses, color_k, depth_k)


def _open(path: Path, form: str, modes: Sequence[str], what: str) -> Image.Image:
    picture = open_picture(path, path, [form])
    if picture.mode not in modes:
        raise UserError(f"{path} is a picture of kind {picture.mode}; needed {what}")
    return picture


def _matrix(path: Path) -> np.ndarray:
    """`4 4` float64; may hold -inf."""
    with content_of(path):
        lines = path.read_text().splitlines()
    try:
        values = np.array([[float(x) for x in line.split()] for line in lines if line.strip()])
    except ValueError as error:
        raise UserError(f"{path} cannot be read as four rows of four numbers: {error}") from error
    if values.shape != (4, 4):
        raise UserError(f"{path} holds {values.shape} numbers; needed four rows of four")
    return values
