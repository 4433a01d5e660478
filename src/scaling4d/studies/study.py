"""A study: one question, arms that differ in one respect, several seeds each, and the table of their results.

Its definition lies in experiments/study/<name>.yaml, its outcome in reports/studies/<name>/: the lock of every run,
runs.csv, table.csv, figures, study.json, and findings.md, which people write. All but the last follow from the locks
and DVC's cache, so that the audit can make them again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

from scaling4d import artifacts, config
from scaling4d.provenance import LockedFile, LockedStage, cached, cached_listing, flatten, parse_csv
from scaling4d.records import UserError, json_text

DEFINITIONS = config.EXPERIMENTS / "study"
REPORTS = Path("reports/studies")
LOCKS, RUNS, TABLE, FINDINGS, FACTS = "locks", "runs.csv", "table.csv", "findings.md", "study.json"
READOUTS, TRAINING = ("readout_frozen", "readout_finetune", "readout_classifier"), ("pretrain", "distill", "continue")
RECONSTRUCT_METRICS = {"masked_mse": "reconstruct", "moving_mse": "reconstruct_moving"}  # -> task in runs.csv
UNMEASURED = ("show", "report", "evaluate")  # packages whose code changes no number of a study
SIZES = ("parameters", "flops", "clips_seen")
RESULT = ("task", "protocol", "metric", "value", "unit", "higher_is_better", "checkpoint_sha256")  # of result.json
RUN_COLUMNS = ("arm", "seed", "encoder", *RESULT[:-1], *SIZES, "experiment", RESULT[-1])
TABLE_COLUMNS = ("arm", "task", "metric", "seeds", "mean", "deviation", "difference", "noise", "beyond_noise")
SIGNAL_COLUMNS = ("task", "metric", "arms", "seeds", "signal", "noise", "ratio")
CONFIDENCE = 0.95
Stages = Mapping[str, LockedStage]


@dataclass(frozen=True)
class Arm:
    """One arm: Hydra overrides of a profile, the encoder that is measured, and the DVC targets that measure it."""

    name: str
    profile: str
    overrides: tuple[str, ...]
    encoder: str
    targets: tuple[str, ...]

    def settings(self, seed: int) -> list[str]:
        """All overrides for Hydra, profile and seed included."""
        return [f"profile={self.profile}", f"seed={seed}", *self.overrides]


@dataclass(frozen=True)
class Study:
    """A definition. base: the arm that others are compared with, seed by seed.

    ladders: name -> (column of runs.csv over which a law is fitted, one of SIZES; arms), for studies of scaling.
    law: whether the loss is fitted over size and data, see studies.law.
    """

    name: str
    question: str
    base: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    ladders: Mapping[str, tuple[str, tuple[str, ...]]]
    law: bool = False

    @property
    def folder(self) -> Path:
        return REPORTS / self.name

    @property
    def command(self) -> str:
        """The command that makes this table again."""
        return f"scaling4d study {self.name} --seeds {','.join(map(str, self.seeds))}"

    @property
    def runs(self) -> dict[str, tuple[Arm, int]]:
        """Arm and seed of each run by its name, `arm-seed`."""
        return {f"{arm.name}-{seed}": (arm, seed) for arm in self.arms for seed in self.seeds}

    def lock(self, run: str) -> Path:
        return self.folder / LOCKS / f"{run}.lock"


def study_names() -> list[str]:
    """Names of the studies that are defined."""
    return sorted(path.stem for path in DEFINITIONS.glob("*.yaml"))


def read_study(name: str) -> Study:
    """The definition of a study.

    Raises:
        UserError: no study of that name, a missing or unknown key, or an unknown arm or size.
    """
    import yaml

    path = DEFINITIONS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no study {name!r}; needed one of {', '.join(study_names()) or 'experiments/study/*.yaml'}")
    try:
        return parse_study(name, yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no study: {' '.join(str(error).split())}; compare it with another file there") from error


def read_finished_study(folder: Path) -> Study:
    """The study as its outcome in a folder was made, also where its definition differs now.

    Raises:
        UserError: no study.json, or a damaged one.
    """
    path = folder / FACTS
    if not path.is_file():
        raise UserError(f"no {path}; run `scaling4d study {folder.name}`")
    try:
        facts = json.loads(path.read_text())
        order = list(dict.fromkeys([*(row["arm"] for row in read_runs(folder)), *facts["arms"]]))
        arms = tuple(
            Arm(name, given["profile"], tuple(given["overrides"]), given["encoder"], tuple(given["targets"]))
            for name, given in sorted(facts["arms"].items(), key=lambda item: order.index(item[0]))
        )
        ladders = {name: (x, tuple(names)) for name, x, names in facts["ladders"]}
        return Study(folder.name, facts["question"], facts["base"], tuple(facts["seeds"]), arms, ladders, facts.get("law", False))
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}; take it from git again") from error


def read_runs(folder: Path) -> list[dict[str, str]]:
    """Rows of a study's runs.csv as text; none without the file."""
    return parse_csv((folder / RUNS).read_text()) if (folder / RUNS).is_file() else []


def recorded_run(experiment: str) -> tuple[Path, list[dict[str, str]]] | None:
    """A run's lock and its rows of runs.csv, by its experiment, from the folder of any study.

    None: no study has both, unchanged.
    """
    for path in sorted(REPORTS.glob(f"*/{FACTS}")):
        facts = json.loads(path.read_text())
        for run in (key for key, known in facts["runs"].items() if known["experiment"] == experiment):
            if is_recorded(path.parent, facts["files"], run):
                rows = [row for row in read_runs(path.parent) if f"{row['arm']}-{row['seed']}" == run]
                if rows:
                    return path.parent / LOCKS / f"{run}.lock", rows
    return None


def is_recorded(folder: Path, files: Mapping[str, str], run: str) -> bool:
    """Whether a study's folder has a run's lock and runs.csv unchanged. files: of its study.json."""
    paths = (folder / LOCKS / f"{run}.lock", folder / RUNS)
    return all(path.is_file() and files.get(path.relative_to(folder).as_posix()) == artifacts.sha256(path) for path in paths)


def with_seeds(study: Study, seeds: str) -> Study:
    """The same study with other seeds, given as numbers with commas between them.

    Raises:
        UserError: not numbers.
    """
    try:
        return replace(study, seeds=_distinct([int(seed) for seed in seeds.split(",")]))
    except ValueError as error:
        raise UserError(f"--seeds {seeds!r}; needed different numbers such as 0,1,2") from error


def parse_study(name: str, content: Mapping[str, Any]) -> Study:
    """A study from its definition's YAML (content). Raises ValueError: a missing or unknown key, arm or size."""
    required, known = {"question", "base", "arms"}, {"profile", "encoder", "targets", "seeds", "ladders", "law"}
    if missing := required - content.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    if unknown := content.keys() - required - known:
        raise ValueError(f"it has {', '.join(sorted(unknown))}, which no study has")
    arms = tuple(parse_arm(arm, given, content) for arm, given in content["arms"].items())
    ladders = {ladder: (given["x"], tuple(given["arms"])) for ladder, given in content.get("ladders", {}).items()}
    for ladder, (x, names) in ladders.items():
        if x not in SIZES:
            raise ValueError(f"ladder {ladder} is over {x!r}; needed one of {', '.join(SIZES)}")
        if len(names) < 3:
            raise ValueError(f"ladder {ladder} has {len(names)} arms; a trend needs three or more")
    for arm in (content["base"], *(arm for _, names in ladders.values() for arm in names)):
        if arm not in content["arms"]:
            raise ValueError(f"no arm {arm!r}")
    seeds, law = _distinct(content.get("seeds", (0, 1, 2))), content.get("law", False)
    return Study(name, content["question"].strip(), content["base"], seeds, arms, ladders, law)


def _distinct(seeds: Sequence[int]) -> tuple[int, ...]:
    """Raises ValueError: no seeds, one that is no whole number, or the same seed twice, which would hide its noise."""
    if not seeds or any(type(seed) is not int for seed in seeds) or len({*seeds}) < len(seeds):
        raise ValueError(f"seeds are {seeds!r}; needed different whole numbers")
    return tuple(seeds)


def parse_arm(name: str, given: Mapping[str, Any] | list[str], shared: Mapping[str, Any]) -> Arm:
    """given: an arm's keys, or its overrides alone. shared: the study's keys, which hold for arms without their own."""
    given = {"overrides": given} if isinstance(given, list) else given
    if unknown := given.keys() - {"profile", "overrides", "encoder", "targets"}:
        raise ValueError(f"arm {name} has {', '.join(sorted(unknown))}, which no arm has")
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"the name of arm {name!r} is no word of letters, digits and _")
    keys = {"profile": "pocket", "encoder": "nano", "targets": (), "overrides": (), **shared, **given}
    if not keys["targets"]:
        raise ValueError(f"arm {name} has no targets")
    targets = tuple(target.format(encoder=keys["encoder"]) for target in keys["targets"])
    tasks = [target.rpartition("-")[2] for target in targets if target.startswith(READOUTS)]
    if twice := {task for task in tasks if tasks.count(task) > 1}:
        raise ValueError(f"arm {name} measures {', '.join(sorted(twice))} by two protocols; needed one, or two studies")
    return Arm(name, keys["profile"], tuple(keys["overrides"]), keys["encoder"], targets)


def run_numbers(arm: Arm, seed: int, stages: Stages, cache: Path, experiment: str) -> list[dict[str, Any]] | None:
    """Rows of runs.csv of one run: the validation loss of its encoder and the result of every target.

    A reconstruction has a row for all hidden pixels and one for those that move, if any was measured.

    Args:
        stages: of the run's lock. cache: DVC's.
    Returns:
        None where the cache lacks a result.
    Raises:
        UserError: the cache holds wrong bytes, or an out lacks its file.
    """
    trained = [name for kind in TRAINING if (name := f"{kind}@{arm.encoder}") in stages][:1]
    measured = [target for target in arm.targets if target.split("@")[0] in (*READOUTS, "reconstruct")]
    run, rows = {"arm": arm.name, "seed": seed, "encoder": arm.encoder, "experiment": experiment}, []
    for name in (*trained, *measured):
        content = cached_json(stages[name].outs[0], "summary.json" if name in trained else "result.json", cache)
        if content is None:
            return None
        if name in trained:
            run |= {key: content[key] for key in SIZES}
            numbers = [(loss_task(content["method"]), "", "val_loss", content["val_loss"], "", False, "")]
        elif name.startswith("reconstruct@"):
            errors = {metric: content[metric] for metric in RECONSTRUCT_METRICS if content.get(metric) is not None}
            weights = content["checkpoint_sha256"]
            numbers = [(RECONSTRUCT_METRICS[metric], "", metric, error, "", False, weights) for metric, error in errors.items()]
        else:
            numbers = [[content[key] for key in RESULT]]
        common = {"parameters": content.get("parameters")} | run
        rows += [common | dict(zip(RESULT, row, strict=True)) for row in numbers]
    return rows


def measuring_stage(row: Mapping[str, str], stages: Stages) -> str:
    """The stage whose out has the number in a row of runs.csv."""
    if row["protocol"]:
        return f"readout_{row['protocol']}@{row['encoder']}-{row['task']}"
    kinds = ("reconstruct",) if row["task"] in RECONSTRUCT_METRICS.values() else TRAINING
    return next(name for kind in kinds if (name := f"{kind}@{row['encoder']}") in stages)


def loss_task(method: str) -> str:
    """Task of a validation loss in runs.csv. Losses of different methods have different targets and do not compare."""
    return "pretrain" if method == "SimpleMAE" else f"pretrain_{method}"


def cached_json(out: LockedFile, name: str, cache: Path) -> Any:
    """A JSON file in a stage's out, from DVC's cache; None: not in the cache."""
    listing = cached_listing(out.md5, cache)
    if listing is None:
        return None
    if name not in listing:
        raise UserError(f"{out.path} has no {name}")
    content = cached(listing[name], cache)
    return None if content is None else json.loads(content)


def study_table(rows: Sequence[Mapping[str, Any]], base: str) -> list[dict[str, Any]]:
    """One row for each arm and task: mean and standard deviation over seeds, and the difference to the base arm.

    rows: of runs.csv. difference: the mean over seeds of (arm - base), over the seeds that all arms have. noise:
    `noise_limit` of the arm and the base; None with one seed. It counts seeds, not the draw of validation clips, and
    ignores the number of comparisons.
    """
    table = []
    for task, metric, values, seeds in _values(rows):
        shared = {arm: [by_seed[seed] for seed in seeds] for arm, by_seed in values.items()}
        compared = seeds and base in values
        for arm, by_seed in values.items():
            row = {"arm": arm, "task": task, "metric": metric, "seeds": len(by_seed), "mean": fmean(by_seed.values())}
            row |= {"deviation": stdev(by_seed.values()) if len(by_seed) > 1 else None}
            row |= {"difference": None, "noise": None, "beyond_noise": None}
            if compared and arm != base:
                difference = fmean(shared[arm]) - fmean(shared[base])
                limit = noise_limit([*shared.values()], shared[arm], shared[base])
                beyond = None if limit is None else abs(difference) > limit
                row |= {"difference": difference, "noise": limit, "beyond_noise": beyond}
            table.append(row)
    order = list(dict.fromkeys(row["arm"] for row in rows))
    return sorted(table, key=lambda row: order.index(row["arm"]))


def _values(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, dict[str, dict[int, float]], list[int]]]:
    """Of each task of runs.csv: its name, its metric, the values by arm and seed, and the seeds that all arms have."""
    for task in dict.fromkeys(row["task"] for row in rows):
        some, values = [row for row in rows if row["task"] == task], {}
        for row in some:
            values.setdefault(row["arm"], {})[int(row["seed"])] = float(row["value"])
        yield task, some[0]["metric"], values, sorted(set.intersection(*map(set, values.values())))


def noise_limit(values: Sequence[Sequence[float]], one: Sequence[float], other: Sequence[float] = ()) -> float | None:
    """The least significant difference (95 %) of means of two equal arms; None with fewer than two arms or seeds.

    The larger one of two limits: t * s * sqrt(2 / seeds) with `seed_deviation` s of all arms, which many arms estimate
    well, and Welch's of the two arms alone, since one arm may be noisier than the others. t: Student's.

    Args:
        values: arms x seeds. one, other: the two arms; without `other`, one arm is compared with a constant.
    """
    deviation, freedom = seed_deviation(values)
    if deviation is None:
        return None
    pooled = _student(freedom) * deviation * math.sqrt(2 / len(values[0]))
    squares = [(variance(arm) / len(arm), len(arm) - 1) for arm in (one, other) if arm]  # of each mean, and its freedom
    total, spread = sum(square for square, _ in squares), sum(square**2 / freedom for square, freedom in squares)
    return max(pooled, _student(total**2 / spread) * math.sqrt(total) if spread else 0.0)


def _student(freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def seed_deviation(values: Sequence[Sequence[float]]) -> tuple[float | None, int]:
    """Deviation of single values after the mean of every arm and of every seed is taken away, pooled over arms x seeds.

    Returns it with its degrees of freedom, (arms - 1) (seeds - 1), as in an experiment in blocks; None, 0 with fewer
    than two arms or seeds.
    """
    if len(values) < 2 or len(values[0]) < 2:
        return None, 0
    arms, seeds = [fmean(arm) for arm in values], [fmean(seed) for seed in zip(*values, strict=True)]
    freedom = (len(arms) - 1) * (len(seeds) - 1)
    residuals = [value - arms[a] - seeds[s] + fmean(arms) for a, row in enumerate(values) for s, value in enumerate(row)]
    return math.sqrt(sum(residual**2 for residual in residuals) / freedom), freedom


def signal_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each task: how far the arms lie apart, in deviations of a seed.

    rows: of runs.csv. signal: standard deviation of the arms' means, without the part of noise in it. noise:
    `seed_deviation`, not that of table.csv. Tasks without two arms that share two seeds have none.
    """
    for task, metric, values, seeds in _values(rows):
        deviation, _ = seed_deviation([[by_seed[seed] for seed in seeds] for by_seed in values.values()])
        if deviation:
            means = variance(fmean(by_seed[seed] for seed in seeds) for by_seed in values.values())
            signal = math.sqrt(max(0.0, means - deviation**2 / len(seeds)))
            row = {"task": task, "metric": metric, "arms": len(values), "seeds": len(seeds)}
            yield row | {"signal": signal, "noise": deviation, "ratio": signal / deviation}


def json_md5(content: Any) -> str:
    """md5 of a file that `records.write_json` writes."""
    return hashlib.md5(json_text(content).encode()).hexdigest()


def changed_packages(code: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Packages whose code differs or is in one of the two alone, without UNMEASURED.

    code, other: md5 by the path of a file of stage `code`, as study.json has them.
    """
    changed = (path for path in code.keys() | other.keys() if code.get(path) != other.get(path))
    return sorted({Path(path).stem for path in changed} - {*UNMEASURED})


def study_facts(study: Study, locks: Mapping[str, Stages], runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """study.json without `files`, the sha256 of all others in the folder. locks, runs: by `arm-seed`.

    settings: those in the locks of an arm that differ from the base arm's. code: of the packages that stages of the
    runs depend on.
    """
    settings = {}
    for arm in study.arms:
        lock = locks[f"{arm.name}-{study.seeds[0]}"]
        settings[arm.name] = dict(pair for stage in lock.values() for pair in flatten(stage.params))
    base, arms = settings[study.base], {}
    for arm in study.arms:
        different = {key: value for key, value in sorted(settings[arm.name].items()) if base.get(key) != value}
        facts = {"overrides": arm.overrides, "encoder": arm.encoder, "targets": arm.targets, "settings": different}
        arms[arm.name] = {"profile": arm.profile, **facts}
    timed = [run for run in runs.values() if "cpu_seconds" in run]
    times = {key: round(sum(run[key] for run in timed), 1) for key in ("seconds", "cpu_seconds")}
    read = {dep.path for lock in locks.values() for stage in lock.values() for dep in stage.deps}
    code = {out.path: out.md5 for lock in locks.values() for out in lock["code"].outs if out.path in read}
    facts = {"study": study.name, "question": study.question, "base": study.base, "seeds": study.seeds}
    facts["ladders"] = [(name, x, names) for name, (x, names) in study.ladders.items()]  # in order, which keys lose
    law = {"law": True} if study.law else {}
    return {**facts, **law, "arms": arms, "code": code, "runs": runs, **times}
