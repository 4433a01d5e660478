"""The benchmarks' own on-disk formats <-> Samples, reader and writer side by side; one module a benchmark.

A clip is, for now, the first `frames` frames at `rate_hz` of each video, scene, row file or segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from scaling4d.benchmarks.frames import Skipped
from scaling4d.records import Sample, UserError

TASKS = {  # of several benchmarks, the one whose folder is there is read
    "actions": ("ssv2", "kinetics"),
    "boxes": ("waymo",),
    "depth": ("scannet",),
    "points": ("perception_test", "tapvid"),
    "pose": ("realestate10k",),
}
SPLITS = ("train", "val")
SHOWN = 10  # bad samples that a message lists
TRIED = 3  # items of each split that a check reads


@dataclass(frozen=True)
class Finding:
    """What a check found of a benchmark's split. official: how many its authors count. usable: by a readout, as it is."""

    benchmark: str
    split: str
    layout: str
    samples: int
    official: str
    problems: tuple[str, ...]
    usable: bool


def read(
    task: str,
    benchmarks_root: Path,
    split: str,
    *,
    frames: int,
    rate_hz: float,
    side_px: int,
    part: slice = slice(None),
    skipped: list[Skipped] | None = None,
    max_bad_share: float = 0.0,
    views: tuple[int, int] = (1, 1),
) -> Iterator[Sample]:
    """The samples of a task's benchmark, in the order of its own lists; the layout is checked before the first one.

    Args:
        part: of the benchmark's list; nothing else is decoded.
        skipped: takes what gives no sample, and why. Without it a damaged or missing one raises.
        max_bad_share: of all that is listed, may be missing.
        views: clips over the time of an item and squares cut out of each; of actions alone. They follow one another.
    Raises:
        UserError: unknown task or split, or the benchmark's folder is missing or laid out in another way.
    """
    from scaling4d.benchmarks.frames import Missing

    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; needed one of {', '.join(SPLITS)}")
    root = folder(task, benchmarks_root)
    benchmark = _module(root.name)
    try:
        benchmark.count(root, split)
    except Missing as missing:
        if skipped is None:
            raise
        judge([Skipped(name, "missing", True) for name in missing.names], missing.listed, max_bad_share, f"{task} {split}")
    more = {} if views == (1, 1) else {"views": views}
    return benchmark.read(root, split, frames=frames, rate_hz=rate_hz, side_px=side_px, part=part, skipped=skipped, **more)


def judge(skipped: Sequence[Skipped], listed: int, max_bad_share: float, what: str) -> None:
    """Raises UserError: more than this share of what is listed is damaged or missing; names the first of them."""
    bad = [item for item in skipped if item.bad]
    if len(bad) > max_bad_share * listed:
        first = "; ".join(f"{item.id}: {item.why}" for item in bad[:SHOWN])
        raise UserError(
            f"{what}: {len(bad)} of {listed} samples are damaged or missing, more than the share "
            f"readout.shared.Evaluation.max_bad_share = {max_bad_share}; mend them or raise it. The first: {first}"
        )


def folder(task: str, benchmarks_root: Path) -> Path:
    """Where a task's benchmark lies.

    Raises:
        UserError: unknown task, no such folder, or more than one.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; needed one of {', '.join(TASKS)}")
    roots = [Path(benchmarks_root) / name for name in TASKS[task]]
    there = [root for root in roots if root.is_dir()]
    if len(there) > 1:
        raise UserError(f"{' and '.join(map(str, there))} are both there for task {task}; keep one of them")
    if not there:
        raise UserError(
            f"no folder {' or '.join(map(str, roots))} for task {task}; put the benchmark there as its authors distribute it, "
            "or leave the task out"
        )
    return there[0]


def classes(benchmarks_root: Path) -> list[str]:
    """Names of the action classes; a Sample's action is an index into them.

    Raises:
        UserError: no or other labels.
    """
    root = folder("actions", benchmarks_root)
    return _module(root.name).classes(root)


def check(benchmarks_root: Path, *, max_bad_share: float) -> list[Finding]:
    """Layout and listed items of every benchmark that is there; the first few items of each split are read."""
    findings = []
    for names in TASKS.values():
        there = [name for name in names if (Path(benchmarks_root) / name).is_dir()]
        for name in there:
            for split in _module(name).OFFICIAL:
                found = _look(name, Path(benchmarks_root) / name, split, max_bad_share)
                if len(there) > 1:
                    problem = f"{' and '.join(there)} are both there for one task; keep one of them"
                    found = replace(found, problems=(problem, *found.problems), usable=False)
                findings.append(found)
    return findings


def unknown(benchmarks_root: Path) -> list[str]:
    """Folders that no reader has the name of."""
    known = {name for names in TASKS.values() for name in names}
    return sorted(path.name for path in benchmarks_root.iterdir() if path.is_dir() and path.name not in known)


def _look(name: str, root: Path, split: str, max_bad_share: float) -> Finding:
    from scaling4d.benchmarks.frames import Missing

    benchmark, layout, problems, usable = _module(name), "", [], True
    official = benchmark.OFFICIAL[split]
    try:
        layout = benchmark.layout(root, split)
        samples = benchmark.count(root, split)
    except Missing as missing:
        samples = missing.listed - len(missing.names)
        problems += [str(missing), *(f"missing: {item}" for item in missing.names[1:SHOWN])]
        usable = len(missing.names) <= max_bad_share * missing.listed
    except UserError as error:
        return Finding(name, split, layout, 0, official, (str(error),), usable=False)
    skipped: list[Skipped] = []
    try:
        tried = list(benchmark.read(root, split, frames=2, rate_hz=10.0, side_px=32, part=slice(TRIED), skipped=skipped))
    except UserError as error:
        return Finding(name, split, layout, samples, official, (*problems, str(error)), usable=False)
    bad = [item.why for item in skipped if item.bad]
    problems += [why for why in bad if why not in problems]
    usable &= bool(tried) or not bad
    return Finding(name, split, layout, samples, official, tuple(problems), usable)


def _module(name: str) -> ModuleType:
    return import_module(f"scaling4d.benchmarks.{name}")
