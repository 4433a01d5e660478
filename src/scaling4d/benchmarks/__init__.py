"""The benchmarks' own on-disk formats -> Samples, and writers for the pocket data; one module per benchmark.

A clip is a window of `frames` frames at `rate_hz` of a video, scene, row file or segment: the first one, or the one at
a position from 0 (its start) to 1 (its end). Clips of points start in the query frames (`queries`). A module has
  OFFICIAL                          number of items per split, by the authors' count
  open_split(root, split, request)  Samples of a split; raises UserError where the layout is another one
  class_names(root)                 of actions: names of the classes
  RATE_HZ, FRAMES, WINDOW_STEP      where videos are about equally long: their frames, and those from start to start
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from scaling4d.benchmarks.samples import ClipRequest, Samples, SkippedItem
from scaling4d.records import UserError

TASKS = {  # the benchmarks of a task; the one whose folder exists is read
    "actions": ("ssv2", "kinetics"),
    "boxes": ("waymo", "perception_test_objects"),
    "depth": ("scannet",),
    "points": ("perception_test", "tapvid", "movi"),
    "pose": ("realestate10k",),
}
SHARED_FOLDER = {"perception_test_objects": "perception_test"}  # in another one's folder; read if its task has no other
SPLITS = ("train", "val")
LISTED = 10  # bad items that a message names
CHECKED = 3  # items of each split that a check reads


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's module and folder."""

    name: str
    folder: Path

    @property
    def module(self) -> ModuleType:
        return import_module(f"scaling4d.benchmarks.{self.name}")

    @property
    def exists(self) -> bool:
        """Whether its folder exists. A shared folder must have its lists."""
        return self.folder.is_dir() and (self.name not in SHARED_FOLDER or self.module.has_lists(self.folder))


@dataclass(frozen=True)
class BenchmarkCheck:
    """State of a benchmark's split. official: number of items by its authors. usable: it can be read as it is."""

    benchmark: str
    split: str
    layout: str
    samples: int
    official: str
    problems: tuple[str, ...]
    usable: bool


def read_samples(
    task: str, root: Path, split: str, request: ClipRequest, *, skipped: list[SkippedItem] | None = None, max_bad_share: float = 0
) -> Samples:
    """The samples of a task's benchmark, in the order of its own lists. The layout is checked before the first one.

    root: folder of all benchmarks. skipped: collects the items without a sample. None: a damaged or missing item
    raises. max_bad_share: of the list that may be missing.
    Raises UserError: unknown task or split, views or queries of a task without them, or the benchmark's folder is
    missing or laid out in another way.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; needed one of {', '.join(SPLITS)}")
    benchmark = find_benchmark(task, root, split)
    windows, squares = request.views
    fits = task == "actions" or (squares == 1 and (windows == 1 or request.windows == "random"))
    if not fits or (request.queries != "frame_0" and (task != "points" or windows > 1)):
        needed = "needed (1, 1) except of actions, (n, 1) of random windows, and 'frame_0' except of points and of (1, 1)"
        raise UserError(f"views = {request.views} and queries = {request.queries!r} of task {task}; {needed}")
    samples = benchmark.module.open_split(benchmark.folder, split, request)
    if samples.missing:
        if skipped is None:
            raise samples.missing
        missing = [SkippedItem(name, "missing", True) for name in samples.missing.names]
        check_bad_share(missing, samples.count, max_bad_share, f"{task} {split}")
    return samples.part(skipped=skipped)


def find_benchmark(task: str, root: Path, split: str = "train") -> Benchmark:
    """The benchmark that is read for a task and a split.

    A benchmark of one split may lie beside another one of the task. Then that split is read from it.
    Raises UserError: unknown task, no folder of its benchmarks, or more than one.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; needed one of {', '.join(TASKS)}")
    candidates = _candidates(task, root)
    existing = [benchmark for benchmark in candidates if benchmark.exists]
    if not existing:
        lists = {b.name: f" (with {' or '.join(b.module.LIST_PATTERNS)})" for b in candidates if b.name in SHARED_FOLDER}
        places = " or ".join(f"{b.folder}{lists.get(b.name, '')}" for b in candidates)
        remedy = "put the benchmark there as its authors distribute it, or leave the task out"
        raise UserError(f"no folder {places} for task {task}; {remedy}")
    existing = [benchmark for benchmark in existing if benchmark.name not in SHARED_FOLDER] or existing
    with_split = [benchmark for benchmark in existing if split in benchmark.module.OFFICIAL] or existing
    fitting = [b for b in with_split if len(b.module.OFFICIAL) == 1] or with_split
    if len(fitting) != 1:
        folders = " and ".join(str(benchmark.folder) for benchmark in fitting)
        raise UserError(f"{folders} are both there for task {task}; keep one of them")
    return fitting[0]


def describe_use(task: str, root: Path) -> str:
    """`points: trained on movi, measured on perception_test`. Raises as find_benchmark."""
    by_split = {split: find_benchmark(task, root, split) for split in SPLITS}
    train, val = (one.name if split in one.module.OFFICIAL else "nothing" for split, one in by_split.items())
    return f"{task}: trained on {train}, measured on {val}"


def class_names(root: Path) -> list[str]:
    """Names of the action classes by index. Raises UserError: no labels, or labels in another form."""
    benchmark = find_benchmark("actions", root)
    return benchmark.module.class_names(benchmark.folder)


def check_bad_share(skipped: Sequence[SkippedItem], items: int, max_bad_share: float, split_name: str) -> None:
    """Raises UserError: more than this share of the items is damaged or missing. The message names the first ones."""
    bad = [item for item in skipped if item.bad]
    if len(bad) > max_bad_share * items:
        first = "; ".join(f"{item.id}: {item.why}" for item in bad[:LISTED])
        more = f"more than max_bad_share = {max_bad_share}; mend them or raise it. The first: {first}"
        raise UserError(f"{split_name}: {len(bad)} of {items} samples are damaged or missing, {more}")


def check_benchmarks(root: Path, *, max_bad_share: float) -> list[BenchmarkCheck]:
    """Check layout and listed items of every benchmark below `root`, and read the first few items of each split.

    A benchmark behind another one of its task, which is read instead, is reported and counts as usable.
    """
    checks = []
    for task in TASKS:
        for benchmark in (candidate for candidate in _candidates(task, root) if candidate.exists):
            for split in benchmark.module.OFFICIAL:
                check = _check_split(benchmark, split, max_bad_share)
                try:
                    if find_benchmark(task, root, split) != benchmark:
                        check = replace(check, usable=True)
                except UserError as error:
                    check = replace(check, problems=(str(error), *check.problems), usable=False)
                checks.append(check)
    return checks


def unknown_folders(root: Path) -> list[str]:
    """Names of folders below `root` that are no benchmark's."""
    known = {benchmark.folder.name for task in TASKS for benchmark in _candidates(task, root)}
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name not in known)


def _candidates(task: str, root: Path) -> list[Benchmark]:
    return [Benchmark(name, Path(root) / SHARED_FOLDER.get(name, name)) for name in TASKS[task]]


def _check_split(benchmark: Benchmark, split: str, max_bad_share: float) -> BenchmarkCheck:
    official, skipped = benchmark.module.OFFICIAL[split], []
    try:
        samples = benchmark.module.open_split(benchmark.folder, split, ClipRequest(frames=2, rate_hz=10.0, side_px=32))
    except UserError as error:
        return BenchmarkCheck(benchmark.name, split, "", 0, official, (str(error),), usable=False)
    missing = samples.missing.names if samples.missing else ()
    problems = [str(samples.missing), *(f"missing: {item}" for item in missing[1:LISTED])] if missing else []
    readable = list(samples.part(slice(CHECKED), skipped))
    bad = [item.why for item in skipped if item.bad]
    problems += [why for why in bad if why not in problems]
    usable = len(missing) <= max_bad_share * samples.count and (bool(readable) or not bad)
    count = samples.count - len(missing)
    return BenchmarkCheck(benchmark.name, split, samples.layout, count, official, tuple(problems), usable)
