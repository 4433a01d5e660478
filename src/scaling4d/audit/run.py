"""A run of the pipeline as its lock tells it: which stage made what out of what, and which numbers came of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config
from scaling4d.audit import lock
from scaling4d.audit.disk import Disk
from scaling4d.checkpoint import WEIGHTS
from scaling4d.records import UserError

BENCHMARKS = "artifacts/benchmarks"  # of each task, a file of hashes by which its readouts depend on data
RECORDS = {"pretrain": "summary.json", "reconstruct": "result.json"}  # table and artifact folder -> what its rows are made of


@dataclass(frozen=True)
class Run:
    """One lock, the report that was made with it, and the bytes that are here.

    stages: by name; of a run kept beside its report, only those that the report needs. home: artifacts/<profile>.
    folder: of the report. differ: (stage, how it contradicts dvc.yaml), for the run of the checkout itself.
    settings: params.yaml; None for a run kept beside its report, whose settings are those that its stages name.
    """

    lock: str
    stages: Mapping[str, lock.Stage]
    home: str
    folder: str
    differ: tuple[tuple[str, str], ...]
    settings: Mapping[str, Any] | None
    disk: Disk

    @cached_property
    def makers(self) -> dict[str, lock.Stage]:
        return {out.path: stage for stage in self.stages.values() for out in stage.outs}

    def maker(self, path: str) -> lock.Stage | None:
        """The stage that wrote a path or a folder above it."""
        return next((self.makers[p] for p in (path, *map(str, Path(path).parents)) if p in self.makers), None)

    def readers(self, path: str) -> list[lock.Stage]:
        """The stages that read a path, a folder above it or something inside it, and depend on that."""
        found = [stage for stage in self.stages.values() if any(touch(dep.path, path) for dep in stage.deps)]
        return [stage for stage in found if not self._hashes_others(stage, path)]

    def _hashes_others(self, stage: lock.Stage, path: str) -> bool:
        """Whether it is a stage `benchmarks` that reads a path, but hashes others, as far as its file is here to tell."""
        folders = [folder for out in stage.outs for folder in self.hashed(out.path)]
        around = [dep.path for dep in stage.deps if any(touch(dep.path, folder) for folder in folders)]
        return any(touch(dep, path) for dep in around) and not any(touch(folder, path) for folder in folders)

    def hashed(self, path: str) -> dict[str, str]:
        """Folder -> sha256, as a file of stage `benchmarks` says it; nothing of other files."""
        said = self.json(path) if path.startswith(f"{BENCHMARKS}/") else None
        folders = said.get("folders") if isinstance(said, dict) else None
        return {name: sha for name, sha in folders.items() if isinstance(sha, str)} if isinstance(folders, dict) else {}

    @cached_property
    def numbers(self) -> dict[str, str]:
        """Key of a number's row -> the file that holds it: `encoder/task/protocol`, `point/pretrain`, `point/reconstruct`."""
        found = {}
        for path in self.makers:
            name = path.removeprefix(f"{self.home}/")
            words = name.split("/")
            if words[0] == "readout" and len(words) == 4:
                found["/".join(words[1:])] = f"{path}/result.json"
            elif words[0] in RECORDS and len(words) == 2 and self.rows(words[0], point=words[1]):
                found[f"{words[1]}/{words[0]}"] = f"{path}/{RECORDS[words[0]]}"
        return found

    def rows(self, table: str, **wanted: str) -> list[tuple[int, dict[str, str]]]:
        """(line, row) of a csv of the report, those with the wanted values; none where the table is not here."""
        lines = _table(self.disk.text(f"{self.folder}/{table}.csv") or "")
        return [(n, row) for n, row in enumerate(lines, start=2) if all(row.get(k) == v for k, v in wanted.items())]

    def taints(self, name: str, starts: list[tuple[str, tuple[str, ...]]]) -> tuple[str, ...]:
        """A line for every way from what is called `name` to numbers: the stages between, and which numbers they are.

        Args:
            starts: paths in which it is, each with the stages already between.
        """
        ways: dict[tuple[str, ...], list[str]] = {}
        waiting, passed, found = list(starts), set(), set()
        while waiting:
            at, way = waiting.pop(0)
            for key, file in self.numbers.items():
                if key not in found and touch(file, at):
                    found.add(key)
                    ways.setdefault(way, []).append(key)
            for stage in self.readers(at):
                if stage.name not in passed:
                    passed.add(stage.name)
                    further = way if way[-1:] == (stage.kind,) else (*way, stage.kind)
                    waiting += [(out.path, further) for out in stage.outs]
        lines = [" -> ".join((name, *way, f"{self.folder}: {_some(keys)}")) for way, keys in ways.items()]
        return tuple(lines)

    def of_setting(self, key: str) -> list[tuple[str, tuple[str, ...]]]:
        """Where a setting went in, as `taints` starts."""
        stages = [s for s in self.stages.values() if any(_within(key, other) or _within(other, key) for other in s.params)]
        return [(out.path, (stage.kind,)) for stage in stages for out in stage.outs]

    def json(self, path: str) -> Any:
        """None where the file is not here, or is no JSON (the audit names such files)."""
        return _parsed(self.disk.text(path) or "null")

    def described(self, path: str) -> dict[str, str]:
        """sha256 by name of the files of a clips folder, shards among them, by its croissant.json; nothing of other folders."""
        content = self.json(f"{path}/croissant.json") or {}
        return {entry["@id"]: entry["sha256"] for entry in content.get("distribution", ()) if "sha256" in entry}

    def weights(self, encoder: str) -> str:
        return f"{self.home}/pretrain/{encoder}/{WEIGHTS}"

    def facts(self, stage: lock.Stage) -> dict[str, Any] | None:
        """Time, machine and versions of the stage's run, from the report's runs.json; None where it does not tell."""
        return self.told(stage, self.disk.text(f"{self.folder}/runs.json") or "{}")

    def told(self, stage: lock.Stage, text: str) -> dict[str, Any] | None:
        """text: of a runs.json."""
        for out in stage.outs:
            words = out.path.removeprefix(f"{self.home}/").split("/")
            name = "-".join(("baseline", words[-1]) if stage.kind.startswith("baseline") else words)
            for run in (_parsed(text) or {}).get("runs", ()):
                if run["stage"] == (stage.name if out.path.startswith(f"{self.folder}/") else name):
                    return run
        return None


@cache
def _table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


@cache
def _parsed(text: str) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def runs() -> list[Run]:
    """The checkout's own run first, then every run kept in reports/*/dvc.lock; they share one Disk.

    Raises:
        UserError: no project here, or a damaged lock.
    """
    settings = config.read()
    stages, differ = lock.pipeline()
    kept = {path.as_posix(): lock.read(path) for path in sorted(Path("reports").glob("*/dvc.lock"))}
    named = {file.path for some in (stages, *kept.values()) for stage in some.values() for file in (*stage.deps, *stage.outs)}
    folder = config.section(settings, "report.folder")
    folders = {folder, *(Path(path).parent.as_posix() for path in kept)}
    also = {path.as_posix() for name in folders for path in Path(name).glob("*") if path.suffix in (".csv", ".json", ".html")}
    elsewhere = {
        stage.outs[0].path: stage.deps[0].path for stage in stages.values() if stage.name.endswith(".dvc") and stage.deps
    }
    disk = Disk(named | also | set(elsewhere.values()), elsewhere)
    mine = Run(lock.LOCK.as_posix(), stages, artifacts.home(settings).as_posix(), folder, tuple(differ), settings, disk)
    return [mine, *(_kept(path, some, disk) for path, some in kept.items())]


def _kept(path: str, stages: Mapping[str, lock.Stage], disk: Disk) -> Run:
    """A lock also keeps stages of other profiles: only those that its report needs count."""
    folder = Path(path).parent.as_posix()
    goal = next((stage for stage in stages.values() if any(out.path.startswith(f"{folder}/") for out in stage.outs)), None)
    if goal is None or "profile" not in goal.params:
        raise UserError(
            f"{path}: no stage in it writes {folder}/ with a profile; needed the lock of the run that made this report"
        )
    needed, waiting = {goal.name: goal}, [goal]
    while waiting:
        read = waiting.pop().deps
        for stage in stages.values():
            if stage.name not in needed and any(touch(dep.path, out.path) for dep in read for out in stage.outs):
                needed[stage.name] = stage
                waiting.append(stage)
    ordered = {name: stage for name, stage in stages.items() if name in needed}
    return Run(path, ordered, f"artifacts/{goal.params['profile']}", folder, (), None, disk)


def touch(one: str, other: str) -> bool:
    """Equal, or one lies inside the other."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def _within(key: str, parent: str) -> bool:
    return key == parent or key.startswith(f"{parent}.")


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:6])
    return f"{len(keys)} rows: {shown}, ..." if keys[6:] else shown
