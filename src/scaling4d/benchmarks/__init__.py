"""The benchmarks' own on-disk formats <-> Samples, reader and writer side by side; one module a benchmark.

A clip is, for now, the first `frames` frames at `rate_hz` of each video, scene, row file or segment; where points are asked about
in later frames, clips start there (`queries`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from scaling4d.benchmarks.queries import check as check_queries
from scaling4d.benchmarks.skipped import Missing, Skipped
from scaling4d.records import UserError

if TYPE_CHECKING:
    from scaling4d.benchmarks.frames import Samples

TASKS = {  # of several benchmarks, the one whose folder is there is read
    "actions": ("ssv2", "kinetics"),
    "boxes": ("waymo", "perception_test_objects"),
    "depth": ("scannet",),
    "points": ("perception_test", "tapvid"),
    "pose": ("realestate10k",),
}
HOUSED = {"perception_test_objects": "perception_test"}  # lies in another one's folder; read where its task has no other
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
    queries: str | None = None,
) -> Samples:
    """The samples of a task's benchmark, in the order of its own lists; the layout is checked before the first one.

    Args:
        part: of the benchmark's list; nothing else is decoded.
        skipped: takes what gives no sample, and why. Without it a damaged or missing one raises.
        max_bad_share: of all that is listed, may be missing.
        views: clips over the time of an item and squares cut out of each; of actions alone. They follow one another.
        queries: for points, in which frames they are asked about; see `queries.QUERIES`.
    Raises:
        UserError: unknown task, split or queries, or the benchmark's folder is missing or laid out in another way.
    """
    if queries is not None:
        check_queries(queries)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; needed one of {', '.join(SPLITS)}")
    name, root = _source(task, benchmarks_root, split)
    benchmark = _module(name)
    try:
        benchmark.count(root, split)
    except Missing as missing:
        if skipped is None:
            raise
        judge([Skipped(name, "missing", True) for name in missing.names], missing.listed, max_bad_share, f"{task} {split}")
    more = {} if views == (1, 1) else {"views": views}
    more |= {} if queries is None else {"queries": queries}
    return benchmark.read(root, split, frames=frames, rate_hz=rate_hz, side_px=side_px, part=part, skipped=skipped, **more)


def listed(task: str, benchmarks_root: Path, split: str) -> int:
    """How many items of a task's benchmark its split lists, missing ones included. Raises UserError: as read."""
    name, root = _source(task, benchmarks_root, split)
    try:
        return _module(name).count(root, split)
    except Missing as missing:
        return missing.listed


def judge(skipped: Sequence[Skipped], listed: int, max_bad_share: float, what: str) -> None:
    """Raises UserError: more than this share of what is listed is damaged or missing; names the first of them."""
    bad = [item for item in skipped if item.bad]
    if len(bad) > max_bad_share * listed:
        first = "; ".join(f"{item.id}: {item.why}" for item in bad[:SHOWN])
        raise UserError(
            f"{what}: {len(bad)} of {listed} samples are damaged or missing, more than the share "
            f"readout.shared.Evaluation.max_bad_share = {max_bad_share}; mend them or raise it. The first: {first}"
        )


def folder(task: str, benchmarks_root: Path, split: str = "train") -> Path:
    """Where a task's benchmark lies. One that has no training split is measured on where it is there, beside another to train on.

    Raises:
        UserError: unknown task, no such folder, or more than one.
    """
    return _source(task, benchmarks_root, split)[1]


def _source(task: str, benchmarks_root: Path, split: str) -> tuple[str, Path]:
    """Name and folder of the benchmark that is read for a task and a split."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; needed one of {', '.join(TASKS)}")
    there = {name: root for name in TASKS[task] if (root := _root(name, benchmarks_root)) is not None}
    own = [name for name in there if name not in HOUSED]
    if len(own) > 1:
        fitting = [name for name in own if ("train" in _module(name).OFFICIAL) == (split == "train")]
        if len(fitting) != 1:
            raise UserError(f"{' and '.join(str(there[name]) for name in own)} are both there for task {task}; keep one of them")
        own = fitting
    if not there:
        places = " or ".join(_place(name, benchmarks_root) for name in TASKS[task])
        raise UserError(
            f"no folder {places} for task {task}; put the benchmark there as its authors distribute it, or leave the task out"
        )
    name = [*own, *there][0]
    return name, there[name]


def _root(name: str, benchmarks_root: Path) -> Path | None:
    """A benchmark's folder, if it is there; in another one's folder, if its lists are."""
    root = Path(benchmarks_root) / HOUSED.get(name, name)
    return root if root.is_dir() and (name not in HOUSED or _module(name).listed(root)) else None


def _place(name: str, benchmarks_root: Path) -> str:
    root = Path(benchmarks_root) / HOUSED.get(name, name)
    return f"{root} (with {_module(name).LISTED})" if name in HOUSED else str(root)


def classes(benchmarks_root: Path) -> list[str]:
    """Names of the action classes; a Sample's action is an index into them.

    Raises:
        UserError: no or other labels.
    """
    name, root = _source("actions", benchmarks_root, "train")
    return _module(name).classes(root)


def check(benchmarks_root: Path, *, max_bad_share: float) -> list[Finding]:
    """Layout and listed items of every benchmark that is there; the first few items of each split are read.

    What no readout would read, since another benchmark goes before it, is reported and counts as usable.
    """
    findings = []
    for names in TASKS.values():
        there = {name: root for name in names if (root := _root(name, benchmarks_root)) is not None}
        trained = [name for name in there if name not in HOUSED and "train" in _module(name).OFFICIAL]
        measured = [name for name in there if "train" not in _module(name).OFFICIAL]
        for name, root in there.items():
            for split in _module(name).OFFICIAL:
                found = _look(name, root, split, max_bad_share)
                if len(trained) > 1 and name in trained:
                    problem = f"{' and '.join(trained)} are both there for one task; keep one of them"
                    found = replace(found, problems=(problem, *found.problems), usable=False)
                elif (name in HOUSED and trained) or (split == "val" and measured and name not in measured):
                    found = replace(found, usable=True)
                findings.append(found)
    return findings


def unknown(benchmarks_root: Path) -> list[str]:
    """Folders that no reader has the name of."""
    known = {HOUSED.get(name, name) for names in TASKS.values() for name in names}
    return sorted(path.name for path in benchmarks_root.iterdir() if path.is_dir() and path.name not in known)


def _look(name: str, root: Path, split: str, max_bad_share: float) -> Finding:
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
