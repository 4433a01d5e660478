"""RealEstate10K (pose): `{train,test}/<16 hex>.txt` and, brought by the user, `videos/<youtube id>.mp4` or `videos/<clip>.mp4`.

A row file: the URL, then a row a frame: time in microseconds since the video's start; fx fy cx cy in units of width and
height; two columns of zeros; the 3 x 4 world-to-camera matrix, row-major. Rows are matched to frames by time. Translation has the
scale of the file. Facts: the official download page and CameraCtrl's reader. The val split is the authors' `test`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d.benchmarks.frames import Crop, at_times, needed
from scaling4d.records import Sample, UserError

FOLDERS = {"train": "train", "val": "test"}
URL = "https://www.youtube.com/watch?v="


def read(root: Path, split: str, *, frames: int, rate_hz: float, side_px: int, part: slice = slice(None)) -> Iterator[Sample]:
    """label camera_to_world `T 4 4` with valid (always true). Each row is shown with the frame of its own time stamp."""
    for path in _clips(root, split)[part]:
        youtube, times_us, _, poses = _rows(path)
        wanted_us = times_us[0] + np.arange(frames) / rate_hz * 1e6
        rows = np.abs(times_us[:, None] - wanted_us).argmin(0)  # T
        step_us = np.diff(times_us).max(initial=0)
        if wanted_us[-1] > times_us[-1] + step_us:
            end_s = (times_us[-1] - times_us[0]) / 1e6
            raise UserError(
                f"{path} ends after {end_s:.2f} s, too early for {frames} frames at {rate_hz} Hz; "
                "lower clip.frames or raise rate_hz"
            )
        source, offset_us = _video(root, youtube, path.stem, times_us)
        pictures = at_times(source, (times_us[rows] - offset_us) / 1e6, repeat_last=False)
        yield Sample(
            id=path.stem,
            video=youtube,
            pixels=Crop(*pictures.shape[1:3], side_px).pixels(pictures),
            labels={"camera_to_world": poses[rows]},
            valid={"camera_to_world": np.ones(frames, bool)},
        )


def count(root: Path, split: str) -> int:
    """Row files.

    Raises:
        UserError: another layout, no row files, or a clip without its video.
    """
    clips = _clips(root, split)
    for path in clips:
        with path.open(encoding="utf-8", errors="replace") as file:
            _video(root, _youtube(path, file.readline()), path.stem, np.zeros(1, np.int64))
    return len(clips)


def write(root: Path, split: str, samples: Iterable[Sample], *, rate_hz: float, crf: int, gop: int) -> None:
    """Samples with labels camera_to_world `T 4 4` and intrinsics `3 3` in units of width and height; neighbours with one
    `video` follow one another in one file, as clips of one YouTube video do."""
    (root / "videos").mkdir(parents=True, exist_ok=True)
    (root / FOLDERS[split]).mkdir(exist_ok=True)
    for youtube, clips in groupby(samples, key=lambda sample: sample.video):
        pictures: list[np.ndarray] = []
        for sample in clips:
            k = sample.labels["intrinsics"]
            lines = [f"{URL}{youtube}"]
            for t, pose in enumerate(np.linalg.inv(sample.labels["camera_to_world"])):
                numbers = [k[0, 0], k[1, 1], k[0, 2], k[1, 2], 0, 0, *pose[:3].ravel()]
                time_us = int((len(pictures) + t) / rate_hz * 1e6)
                lines.append(" ".join([str(time_us), *(f"{number:.9f}" for number in numbers)]))
            (root / FOLDERS[split] / f"{sample.id}.txt").write_text("\n".join(lines) + "\n")
            pictures.extend(sample.pixels)
        video.write(root / "videos" / f"{youtube}.mp4", np.stack(pictures), rate_hz=rate_hz, codec="libx264", crf=crf, gop=gop)


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
    rows = [line.split() for line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path} has no rows")
    for number, row in enumerate(rows, start=2):
        if len(row) != 19:
            raise UserError(f"{path}, line {number}: {len(row)} columns; needed 19")
    try:
        times_us = np.array([int(row[0]) for row in rows])
        values = np.array([[float(x) for x in row[1:]] for row in rows])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    world_to_camera = np.tile(np.eye(4), (len(rows), 1, 1))
    world_to_camera[:, :3] = values[:, 6:].reshape(-1, 3, 4)
    if not np.isfinite(values).all() or not np.allclose(np.linalg.det(world_to_camera[:, :3, :3]), 1, atol=1e-3):
        raise UserError(f"{path}: columns 8 to 19 are not rotations with translations")
    order = np.argsort(times_us, kind="stable")
    return youtube, times_us[order], values[order, :4], np.linalg.inv(world_to_camera)[order]


def _video(root: Path, youtube: str, clip: str, times_us: np.ndarray) -> tuple[Path, int]:
    """The file and the time in microseconds at which it starts: a file of the clip alone starts with its first row."""
    for path in (root / "videos" / f"{clip}.mp4", root / f"{clip}.mp4"):
        if path.is_file():
            return path, int(times_us[0])
    for path in (root / "videos" / f"{youtube}.mp4", root / f"{youtube}.mp4"):
        if path.is_file():
            return path, 0
    raise UserError(f"{root} has no video for clip {clip}: needed videos/{youtube}.mp4 or videos/{clip}.mp4")
