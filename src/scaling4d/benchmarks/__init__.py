"""The five benchmarks' own on-disk formats <-> Samples, reader and writer side by side; one module a benchmark.

A clip is, for now, the first `frames` frames at `rate_hz` of each video, scene, row file or segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

from scaling4d.records import Sample, UserError

TASKS = {"actions": "ssv2", "boxes": "waymo", "depth": "scannet", "points": "perception_test", "pose": "realestate10k"}
SPLITS = ("train", "val")


def read(
    task: str, benchmarks_root: Path, split: str, *, frames: int, rate_hz: float, side_px: int, part: slice = slice(None)
) -> Iterator[Sample]:
    """The samples of a task's benchmark, in the order of its own lists; the layout is checked before the first one.

    part: of the benchmark's list; nothing else is decoded.

    Raises:
        UserError: unknown task or split, or the benchmark's folder is missing or laid out in another way.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; needed one of {', '.join(SPLITS)}")
    benchmark, root = _module(task), folder(task, benchmarks_root)
    benchmark.count(root, split)
    return benchmark.read(root, split, frames=frames, rate_hz=rate_hz, side_px=side_px, part=part)


def folder(task: str, benchmarks_root: Path) -> Path:
    """Where a task's benchmark lies.

    Raises:
        UserError: unknown task, or no such folder.
    """
    root = Path(benchmarks_root) / _name(task)
    if not root.is_dir():
        raise UserError(
            f"no folder {root} for task {task}; put the benchmark there as its authors distribute it, or leave the task out"
        )
    return root


def classes(benchmarks_root: Path) -> list[str]:
    """Names of the action classes; a Sample's action is an index into them.

    Raises:
        UserError: no or other labels.
    """
    return _module("actions").classes(folder("actions", benchmarks_root))


def check(benchmarks_root: Path) -> list[tuple[str, str, int, str]]:
    """Layout and listed items of every benchmark, nothing decoded: (benchmark, split, samples, problem or "")."""
    found = []
    for task, name in TASKS.items():
        for split in SPLITS:
            try:
                found.append((name, split, _module(task).count(folder(task, benchmarks_root), split), ""))
            except UserError as error:
                found.append((name, split, 0, str(error)))
    return found


def _name(task: str) -> str:
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; needed one of {', '.join(TASKS)}")
    return TASKS[task]


def _module(task: str) -> ModuleType:
    return import_module(f"scaling4d.benchmarks.{_name(task)}")
