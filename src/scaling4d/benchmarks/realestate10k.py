"""RealEstate10K (pose): `{train,test}/<16 hex>.txt` and, brought by the user, `videos/<clip>/<time stamp>.png` (or .jpg),
`videos/<clip>.mp4` or `videos/<youtube id>.mp4`; the folder may be called `frames` or left out.

A row file: the URL, then a row a frame: time in microseconds since the video's start; fx fy cx cy in units of width and
height; two columns of zeros; the 3 x 4 world-to-camera matrix, row-major. Rows are matched to frames by time. Translation has the
scale of the file. Facts: the official download page and CameraCtrl's reader. The val split is the authors' `test`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from scaling4d import video
from scaling4d.benchmarks.frames import Crop, Samples, each, far_in, needed
from scaling4d.benchmarks.skipped import Missing, Skipped
from scaling4d.records import Sample, UserError

OFFICIAL = {"train": "about 72,000", "val": "about 8,000"}  # 80,000, nine to one
FOLDERS = {"train": "train", "val": "test"}
URL = "https://www.youtube.com/watch?v="


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
    """label camera_to_world `T 4 4` with valid (always true). Each row is shown with the frame of its own time stamp."""
    one = partial(_sample, root, frames=frames, rate_hz=rate_hz, side_px=side_px)
    return each(_clips(root, split)[part], one, skipped, lambda path: path.stem)


def count(root: Path, split: str) -> int:
    """Row files.

    Raises:
        UserError: another layout, no row files, or clips without pictures.
    """
    clips, missing = _clips(root, split), []
    for path in clips:
        try:
            _source(root, path)
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise Missing(root, missing, listed=len(clips), what=f"videos of {split}")
    return len(clips)


def layout(root: Path, split: str) -> str:
    """Where the pictures of the first clip that has any are."""
    for path in _clips(root, split):
        try:
            source = _source(root, path)
        except UserError:
            continue
        kind = (
            "a folder of frames a clip" if source.is_dir() else "a video a clip" if source.stem == path.stem else "whole videos"
        )
        return f"row files, {kind}"
    return "row files"


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, crf: int, gop: int) -> None:
    """Samples with labels camera_to_world `T 4 4` and intrinsics `3 3` in units of width and height; neighbours with one
    `video` follow one another in one file, as clips of one YouTube video do."""
    (root / "videos").mkdir(parents=True, exist_ok=True)
    (root / FOLDERS[split]).mkdir(exist_ok=True)
    for youtube, clips in groupby(samples, key=lambda sample: sample.video):
        pictures: list[np.ndarray] = []
        for sample in clips:
            times_us = [int((len(pictures) + t) / rate_hz * 1e6) for t in range(len(sample.pixels))]
            _write_rows(root / FOLDERS[split] / f"{sample.id}.txt", sample, times_us)
            pictures.extend(sample.pixels)
        video.write(root / "videos" / f"{youtube}.mp4", np.stack(pictures), rate_hz=rate_hz, codec="libx264", crf=crf, gop=gop)


def write_frames(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float) -> None:
    """The same with a folder of png a clip; its first frame is shown a second after the video's start."""
    (root / FOLDERS[split]).mkdir(parents=True, exist_ok=True)
    for sample in samples:
        folder = root / "videos" / sample.id
        folder.mkdir(parents=True)
        times_us = [int((1 + t / rate_hz) * 1e6) for t in range(len(sample.pixels))]
        _write_rows(root / FOLDERS[split] / f"{sample.id}.txt", sample, times_us)
        for time_us, picture in zip(times_us, sample.pixels, strict=True):
            Image.fromarray(picture).save(folder / f"{time_us}.png")


def _write_rows(path: Path, sample: Sample, times_us: Sequence[int]) -> None:
    k = sample.labels["intrinsics"]
    lines = [f"{URL}{sample.video}"]
    for time_us, pose in zip(times_us, np.linalg.inv(sample.labels["camera_to_world"]), strict=True):
        numbers = [k[0, 0], k[1, 1], k[0, 2], k[1, 2], 0, 0, *pose[:3].ravel()]
        lines.append(" ".join([str(time_us), *(f"{number:.9f}" for number in numbers)]))
    path.write_text("\n".join(lines) + "\n")


def _sample(root: Path, path: Path, *, frames: int, rate_hz: float, side_px: int) -> Sample:
    youtube, times_us, _, poses = _rows(path)
    source = _source(root, path)
    stored = _stamps(source) if source.is_dir() else {}
    if source.is_dir():
        there = np.isin(times_us, list(stored))
        if not there.any():
            raise UserError(f"{source} holds no <time stamp>.png or .jpg of a time that {path.name} lists")
        times_us, poses = times_us[there], poses[there]
    wanted_us = times_us[0] + np.arange(frames) / rate_hz * 1e6
    rows = np.abs(times_us[:, None] - wanted_us).argmin(0)  # T
    step_us = np.diff(times_us).max(initial=0)
    if wanted_us[-1] > times_us[-1] + step_us:
        end_s = (times_us[-1] - times_us[0]) / 1e6
        raise UserError(
            f"{path} ends after {end_s:.2f} s, too early for {frames} frames at {rate_hz} Hz; lower clip.frames or raise rate_hz"
        )
    if source.is_dir():
        pictures = _opened(source, [stored[int(time_us)] for time_us in times_us[rows]])
    else:  # a file of the clip alone starts with its first row
        offset_us = times_us[0] if source.stem == path.stem else 0
        pictures = far_in(source, (times_us[rows] - offset_us) / 1e6)
    return Sample(
        id=path.stem,
        video=youtube,
        pixels=Crop(*pictures.shape[1:3], side_px).pixels(pictures),
        labels={"camera_to_world": poses[rows]},
        valid={"camera_to_world": np.ones(frames, bool)},
    )


def _clips(root: Path, split: str) -> list[Path]:
    folder = needed(root, root / FOLDERS[split], "row files <16 hex>.txt")
    if not (paths := sorted(folder.glob("*.txt"))):
        raise UserError(f"{folder} holds no row files <16 hex>.txt")
    return paths


def _youtube(path: Path, line: str) -> str:
    _, mark, youtube = line.strip().partition("watch?v=")
    youtube = youtube.split("&")[0]
    if not mark or not youtube or not set(youtube) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"):
        raise UserError(f"{path}: needed a YouTube address in the first line, found {line.strip()[:60]!r}")
    return youtube


def _rows(path: Path) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """YouTube id, times `n` int64 microseconds, intrinsics `n 4`, camera to world `n 4 4` float64; in order of time."""
    first, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    youtube = _youtube(path, first)
    times, values = [], []
    for number, line in enumerate(lines, start=2):
        row = line.split()
        if row and len(row) != 19:
            raise UserError(f"{path}, line {number}: {len(row)} columns; needed 19")
        try:
            times += [int(row[0])] if row else []
            values += [[float(x) for x in row[1:]]] if row else []
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    if not times:
        raise UserError(f"{path} has no rows")
    times_us, values = np.array(times), np.array(values)
    world_to_camera = np.tile(np.eye(4), (len(values), 1, 1))
    world_to_camera[:, :3] = values[:, 6:].reshape(-1, 3, 4)
    if not np.isfinite(values).all() or not np.allclose(np.linalg.det(world_to_camera[:, :3, :3]), 1, atol=1e-3):
        raise UserError(f"{path}: columns 8 to 19 are not rotations with translations")
    order = np.argsort(times_us, kind="stable")
    return youtube, times_us[order], values[order, :4], np.linalg.inv(world_to_camera)[order]


def _source(root: Path, rows: Path) -> Path:
    """The folder of the clip's frames, its own video, or the whole one.

    Raises:
        UserError: none of them is there, or the row file names no video.
    """
    with rows.open(encoding="utf-8", errors="replace") as file:
        youtube = _youtube(rows, file.readline())
    for name in (rows.stem, f"{rows.stem}.mp4", f"{youtube}.mp4"):
        for place in (root / "videos", root / "frames", root):
            if (place / name).exists():
                return place / name
    raise UserError(f"{root} has no video for clip {rows.stem}: needed videos/{youtube}.mp4 or videos/{rows.stem}.mp4")


def _stamps(folder: Path) -> dict[int, Path]:
    """Frames by time stamp; names may be padded with zeros."""
    return {int(path.stem): path for path in folder.iterdir() if path.stem.isdecimal() and path.suffix in (".png", ".jpg")}


def _opened(folder: Path, paths: list[Path]) -> np.ndarray:
    """uint8 `T H W 3`."""
    pictures = []
    for path in paths:
        try:
            pictures.append(np.asarray(Image.open(path).convert("RGB")))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:  # the last: of a broken png
            raise UserError(f"{path} cannot be read: {error}") from error
    if len({picture.shape for picture in pictures}) > 1:
        raise UserError(f"{folder}: frames differ in size")
    return np.stack(pictures)
