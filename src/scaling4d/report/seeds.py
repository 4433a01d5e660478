"""The study of seeds beside a run: its numbers over several seeds, and whether they belong to the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scaling4d import artifacts
from scaling4d.provenance import parse_csv
from scaling4d.report.page import Number
from scaling4d.studies import study as studies
from scaling4d.studies.markup import number_format

FOLDER = studies.REPORTS / "seeds"
UNMEASURED = ("show",)  # package whose code changes no number of the study
AGAIN = f"run `scaling4d study {FOLDER.name}`"
Key = tuple[str, str, str]  # encoder, task, metric, as in runs.csv


@dataclass(frozen=True)
class OverSeeds:
    """One measure of one encoder. values: by seed. noise: limit of a difference, as in `studies.study.study_table`."""

    arm: str
    task: str
    seeds: int
    values: Mapping[int, float]
    mean: float
    deviation: float
    noise: float | None

    def part(self, column: str) -> Number:
        """A number of table.csv: mean, deviation, noise or seeds."""
        value = getattr(self, column)
        place = ({"arm": self.arm, "task": self.task}, column)
        return Number(value, number_format(value), (FOLDER / studies.TABLE).as_posix(), place)


@dataclass(frozen=True)
class SeedStudy:
    """stale: why the study does not belong to the run, as a sentence; empty where it does."""

    numbers: Mapping[Key, OverSeeds]
    stale: str = ""

    def of(self, encoder: str, task: str, metric: str) -> OverSeeds | None:
        return self.numbers.get((encoder, task, metric))


def read_seed_study(profile: str, codes: Mapping[str, Any], results: Mapping[Key, tuple[int, float, str]]) -> SeedStudy | None:
    """The study in FOLDER; None where there is none of this profile.

    Args:
        codes: package -> what stage `code` wrote of it, of every stage of the run.
        results: seed, value and checkpoint_sha256 of every number of the run that the study has to have; the sha256 is
            empty where runs.csv has none.
    """
    if not all((FOLDER / name).is_file() for name in (studies.FACTS, studies.RUNS, studies.TABLE)):
        return None
    facts = json.loads((FOLDER / studies.FACTS).read_text())
    if {arm["profile"] for arm in facts["arms"].values()} != {profile}:
        return None
    values: dict[tuple[str, str], dict[int, float]] = {}  # arm and task -> seed -> value
    recorded = {}
    for row in studies.read_runs(FOLDER):
        seed, value = int(row["seed"]), float(row["value"])
        values.setdefault((row["arm"], row["task"]), {})[seed] = value
        recorded[row["encoder"], row["task"], row["metric"], seed] = value, row["checkpoint_sha256"]
    if len(facts["seeds"]) < 2:
        return SeedStudy({}, f"The study of seeds has one seed alone: {AGAIN}.")
    numbers = {}
    for row in parse_csv((FOLDER / studies.TABLE).read_text()):
        encoder, place = facts["arms"][row["arm"]]["encoder"], (row["arm"], row["task"])
        mean, deviation, noise = (float(row[name]) if row[name] else None for name in ("mean", "deviation", "noise"))
        measured = OverSeeds(*place, int(row["seeds"]), values[place], mean, deviation, noise)
        numbers[encoder, row["task"], row["metric"]] = measured
    return SeedStudy(numbers, _stale(facts["code"], codes, recorded, results))


def _stale(code: Mapping[str, str], codes: Mapping[str, Any], recorded: Mapping[Any, Any], results: Mapping[Key, Any]) -> str:
    other = [name for name in codes if name not in UNMEASURED and code.get(f"{artifacts.CODE}/{name}.json") != _md5(codes[name])]
    if other:
        return f"The study of seeds is of other code ({', '.join(sorted(other))}): {AGAIN}."
    for (encoder, task, metric), (seed, *numbers) in results.items():
        there = recorded.get((encoder, task, metric, seed))
        if there is None:
            return f"The study of seeds lacks {encoder} at {task} with seed {seed}: {AGAIN}."
        if there != tuple(numbers):
            where = f"of {encoder} at {task} with seed {seed}"
            return f"The study of seeds has other numbers {where}, so other settings, data or machines made them: {AGAIN}."
    return ""


def _md5(code: Mapping[str, Any]) -> str:
    """Of the file of stage `code`, which `write_json` wrote."""
    return hashlib.md5((json.dumps(code, indent=2, sort_keys=True) + "\n").encode()).hexdigest()
