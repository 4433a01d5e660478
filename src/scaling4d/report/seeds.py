"""The study of seeds beside a run: its numbers over several seeds, and whether they belong to the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scaling4d import artifacts
from scaling4d.provenance import parse_csv
from scaling4d.report.page import Number, Part
from scaling4d.studies import study as studies
from scaling4d.studies.markup import deviation_format, number_format

FOLDER = studies.REPORTS / "seeds"
Key = tuple[str, str, str]  # encoder, task, metric, as in runs.csv


@dataclass(frozen=True)
class SeedStatistics:
    """One measure of one encoder. values: by seed."""

    arm: str
    task: str
    seeds: int
    values: Mapping[int, float]
    mean: float
    deviation: float

    def part(self, column: str) -> Number:
        """A number of table.csv: mean, deviation or seeds."""
        value = getattr(self, column)
        place = ({"arm": self.arm, "task": self.task}, column)
        return Number(value, number_format(value), (FOLDER / studies.TABLE).as_posix(), place)

    @property
    def with_deviation(self) -> Part:
        """`mean ± deviation`, with equal decimals."""
        mean, deviation = (replace(self.part(name), format=deviation_format(self.deviation)) for name in ("mean", "deviation"))
        return [mean, " ± ", deviation]

    def value_part(self, seed: int) -> Number:
        """The value of a seed, a number of runs.csv."""
        value, place = self.values[seed], ({"arm": self.arm, "seed": seed, "task": self.task}, "value")
        return Number(value, number_format(value), (FOLDER / studies.RUNS).as_posix(), place)


@dataclass(frozen=True)
class SeedStudy:
    """stale: why the study does not belong to the run, as a sentence; empty where it does.

    other_code: a sentence where code that differs from the run's made the same weights and numbers of the run's seed.
    """

    numbers: Mapping[Key, SeedStatistics]
    stale: str = ""
    other_code: str = ""

    def of(self, encoder: str, task: str, metric: str) -> SeedStatistics | None:
        return self.numbers.get((encoder, task, metric))

    def of_task(self, task: str) -> list[SeedStatistics]:
        """Every encoder's measure of a task."""
        return [statistics for key, statistics in self.numbers.items() if key[1] == task]


def noise_of_seeds(measured: Sequence[SeedStatistics], one: SeedStatistics, other: SeedStatistics | None = None) -> float | None:
    """`noise_limit` of two encoders among some, over the seeds that all of them have; without other, of one alone."""
    seeds = sorted(set.intersection(*({*statistics.values} for statistics in measured)))
    values_of = lambda statistics: [statistics.values[seed] for seed in seeds]  # noqa: E731
    return studies.noise_limit([*map(values_of, measured)], values_of(one), values_of(other) if other else ())


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
    needed = {*facts["seeds"], *(seed for seed, _, _ in results.values())}
    option = f" --seeds {','.join(map(str, sorted(needed)))}" if len(needed) > 1 else ""  # else the seeds of its definition
    again = f"run `scaling4d study {FOLDER.name}{option}`"
    if len(facts["seeds"]) < 2:
        return SeedStudy({}, f"The study of seeds has one seed alone: {again}.")
    numbers = {}
    for row in parse_csv((FOLDER / studies.TABLE).read_text()):
        encoder, place = facts["arms"][row["arm"]]["encoder"], (row["arm"], row["task"])
        mean, deviation = (float(row[name]) if row[name] else None for name in ("mean", "deviation"))
        statistics = SeedStatistics(*place, int(row["seeds"]), values[place], mean, deviation)
        numbers[encoder, row["task"], row["metric"]] = statistics
    reason, packages = _stale(facts, recorded, results), ", ".join(_changed_packages(facts, codes))
    other = f"is of other code ({packages})" if packages else ""
    if reason:
        return SeedStudy(numbers, f"The study of seeds {' and '.join(filter(None, [other, reason]))}: {again}.")
    same = "it gave the same weights and numbers of this run's seed"
    return SeedStudy(numbers, other_code=other and f"The study of seeds {other}; {same}.")


def _changed_packages(facts: Mapping[str, Any], codes: Mapping[str, Any]) -> list[str]:
    """Those of the run's packages whose code differs from the study's. facts: study.json."""
    of_run = {f"{artifacts.CODE}/{name}.json": studies.json_md5(code) for name, code in codes.items()}
    of_study = {path: md5 for path, md5 in facts["code"].items() if path in of_run}  # a run's stages need not be of all packages
    return studies.changed_packages(of_study, of_run)


def _stale(facts: Mapping[str, Any], recorded: Mapping[Any, Any], results: Mapping[Key, Any]) -> str:
    """Why a study does not belong to the run, as the end of a sentence; empty where it does. facts: study.json."""
    if absent := {seed for seed, _, _ in results.values()} - {*facts["seeds"]}:
        return f"lacks this run's seed, {', '.join(map(str, sorted(absent)))}"
    for (encoder, task, metric), (seed, *numbers) in results.items():
        there = recorded.get((encoder, task, metric, seed))
        if there is None:
            return f"lacks {encoder} at {task} with seed {seed}"
        if there != tuple(numbers):
            where = f"of {encoder} at {task} with seed {seed}"
            return f"has other numbers {where}, so other settings, data or machines made them"
    return ""
