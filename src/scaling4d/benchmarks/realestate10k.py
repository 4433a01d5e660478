"""RealEstate10K (pose): row files `{train,test}/<16 hex>.txt`, and pictures from the user.

The pictures are `videos/<clip>/<time stamp>.png` (or .jpg), `videos/<clip>.mp4` or `videos/<youtube id>.mp4`. Their
folder may also be `frames`, or the benchmark's own folder.

A row file: the URL, then a row per frame: time in microseconds since the video's start; fx fy cx cy in units of width
and height; two columns of zeros; the 3 x 4 world-to-camera matrix, row-major. Rows are matched to frames by time.
Translation has the scale of the file. Split val is the authors' `test`. Facts: the official download page and
CameraCtrl's reader.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d.benchmarks.frames import Crop, frames_by_seeking, nearest_rows, open_picture, require_path, start_rows
from scaling4d.benchmarks.samples import ClipRequest, MissingFiles, Samples, at_positions, content_of
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "about 72,000", "val": "about 8,000"}  # 80,000, nine to one
FOLDERS = {"train": "train", "val": "test"}
URL = "https://www.youtube.com/watch?v="
ID_CHARACTERS = {*string.ascii_letters, *string.digits, "-", "_"}


def open_split(root: Path, split: str, request: ClipRequest) -> Samples:
    """Samples with the label camera_to_world `T 4 4` and valid (always true).

    A row comes with the frame of its own time stamp.
    """
    folder = require_path(root, root / FOLDERS[split], "row files <16 hex>.txt")
    if not (paths := sorted(folder.glob("[!.]*.txt"))):
        raise UserError(f"{folder} holds no row files <16 hex>.txt")
    layouts, errors = [], []
    for path in paths:
        try:
            with content_of(path):
                _, source = _find_pictures(root, path)
        except UserError as error:
            errors.append(str(error))
        else:
            kind = "a video a clip" if source.stem == path.stem else "whole videos"
            layouts.append(f"row files, {'a folder of frames a clip' if source.is_dir() else kind}")
    missing = MissingFiles(root, errors, listed=len(paths), what=f"videos of {split}") if errors else None

    def load(path: Path, positions: Sequence[float] = request.positions) -> list[Sample]:
        youtube_id, source = _find_pictures(root, path)
        stamps_us, poses = _read_rows(path)
        if source.is_dir():  # names of frames may be padded with zeros
            images = {int(p.stem): p for p in source.iterdir() if p.stem.isdecimal() and p.suffix in (".png", ".jpg")}
            present = np.isin(stamps_us, list(images))
            if not present.any():
                raise UserError(f"{source} holds no <time stamp>.png or .jpg of a time that {path.name} lists")
            stamps_us, poses = stamps_us[present], poses[present]
        samples = []
        for start in at_positions(start_rows(stamps_us / 1e6, request), positions):
            rows = nearest_rows(path, stamps_us, request, start)  # T
            if source.is_dir():
                shown = [images[int(stamp)] for stamp in stamps_us[rows]]
                opened = [np.asarray(open_picture(image, image, ["JPEG", "PNG"]).convert("RGB")) for image in shown]
                if len({picture.shape for picture in opened}) > 1:
                    raise UserError(f"{source}: frames differ in size")
                pictures = np.stack(opened)
            else:  # the video of the clip alone starts with its first row
                offset_us = stamps_us[0] if source.stem == path.stem else 0
                pictures = frames_by_seeking(source, (stamps_us[rows] - offset_us) / 1e6)
            pixels = Crop(*pictures.shape[1:3], request.side_px).pixels(pictures)
            labels, valid = {"camera_to_world": poses[rows]}, {"camera_to_world": np.ones(request.frames, bool)}
            samples.append(Sample(path.stem, youtube_id, pixels, labels, valid))
        return samples

    return Samples(paths, load, attrgetter("stem"), len(paths), layouts[0] if layouts else "row files", missing)


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, crf: int, gop: int) -> None:
    """Write samples with labels camera_to_world `T 4 4` and intrinsics `3 3` in units of width and height.

    Neighbours with one `video` follow one another in one file, as clips of one YouTube video do.
    """
    (root / "videos").mkdir(parents=True, exist_ok=True)
    (root / FOLDERS[split]).mkdir(exist_ok=True)
    for youtube_id, clips in groupby(samples, key=attrgetter("video")):
        pictures: list[np.ndarray] = []
        for sample in clips:
            times_us = [int((len(pictures) + t) / rate_hz * 1e6) for t in range(len(sample.pixels))]
            write_rows(root / FOLDERS[split] / f"{sample.id}.txt", sample, times_us)
            pictures.extend(sample.pixels)
        path = root / "videos" / f"{youtube_id}.mp4"
        video.encode(path, np.stack(pictures), rate_hz=rate_hz, crf=crf, gop=gop)


def write_rows(path: Path, sample: Sample, times_us: Sequence[int]) -> None:
    """Write the row file of a sample whose frames have these times."""
    k = sample.labels["intrinsics"]
    lines = [f"{URL}{sample.video}"]
    for time_us, pose in zip(times_us, np.linalg.inv(sample.labels["camera_to_world"]), strict=True):
        numbers = [k[0, 0], k[1, 1], k[0, 2], k[1, 2], 0, 0, *pose[:3].ravel()]
        lines.append(" ".join([str(time_us), *(f"{number:.9f}" for number in numbers)]))
    path.write_text("\n".join(lines) + "\n")


def _read_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Time stamps `n` int64 microseconds, camera to world `n 4 4` float64; in order of time."""
    stamps, values = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()[1:], start=2):
        row = line.split()
        if row and len(row) != 19:
            raise UserError(f"{path}, line {number}: {len(row)} columns; needed 19")
        try:
            stamps += [int(row[0])] if row else []
            values += [[float(x) for x in row[1:]]] if row else []
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    if not stamps:
        raise UserError(f"{path} has no rows")
    stamps_us, values = np.array(stamps), np.array(values)
    world_to_camera = np.tile(np.eye(4), (len(values), 1, 1))
    world_to_camera[:, :3] = values[:, 6:].reshape(-1, 3, 4)
    if not np.isfinite(values).all() or not np.allclose(np.linalg.det(world_to_camera[:, :3, :3]), 1, atol=1e-3):
        raise UserError(f"{path}: columns 8 to 19 are not rotations with translations")
    order = np.argsort(stamps_us, kind="stable")
    return stamps_us[order], np.linalg.inv(world_to_camera)[order]


def _find_pictures(root: Path, row_file: Path) -> tuple[str, Path]:
    """YouTube id of a clip, and the folder of its frames, its own video, or the video that it is part of.

    Raises UserError: none of them exists, or the row file names no video.
    """
    with row_file.open(encoding="utf-8", errors="replace") as file:
        first_line = file.readline().strip()
    _, mark, address = first_line.partition("watch?v=")
    youtube_id = address.split("&")[0]
    if not mark or not youtube_id or not set(youtube_id) <= ID_CHARACTERS:
        raise UserError(f"{row_file}: needed a YouTube address in the first line, found {first_line[:60]!r}")
    for name in (row_file.stem, f"{row_file.stem}.mp4", f"{youtube_id}.mp4"):
        for folder in (root / "videos", root / "frames", root):
            if (folder / name).exists():
                return youtube_id, folder / name
    raise UserError(f"{root} has no video for clip {row_file.stem}: needed videos/{youtube_id}.mp4 or videos/{row_file.stem}.mp4")
