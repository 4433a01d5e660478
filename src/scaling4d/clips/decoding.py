"""Labelled videos that do not decode from end to end: random windows of a training would find them late."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

from scaling4d import video
from scaling4d.clips.sources import walk_files
from scaling4d.records import shortened

SUFFIXES = (".mp4", ".mkv", ".webm")  # of the videos of benchmarks


def videos_below(root: Path) -> list[Path]:
    """Files below a folder of benchmarks that end as videos do, by name."""
    return [root / file.path for file in walk_files(root) if file.refused is None and Path(file.path).suffix in SUFFIXES]


def undecodable(videos: list[Path]) -> Iterator[tuple[Path, str]]:
    """Decode every frame of each video, on all cores. Yields those that fail, in order, and why."""
    with multiprocessing.get_context("forkserver").Pool(len(os.sched_getaffinity(0))) as pool:
        for path, problem in zip(videos, pool.imap(_problem_of, videos, chunksize=8), strict=True):
            if problem:
                yield path, problem


def _problem_of(path: Path) -> str:
    """Empty: every frame can be decoded."""
    try:
        for _ in video.decode_frames(path):
            pass
    except (video.VideoError, OSError) as error:
        return shortened(error)
    return ""
