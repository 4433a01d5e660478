"""A study: one question, arms that differ in what it asks about, several seeds each, and what came of them.

Its definition lies in experiments/study/<name>.yaml, its outcome in reports/studies/<name>/: the lock of every run, runs.csv,
table.csv, figures, study.json, and findings.md, in which people say what it means. All but the last follow from the locks and
DVC's cache, so that the audit can make them again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scaling4d import config
from scaling4d.records import UserError

DEFINITIONS = config.EXPERIMENTS / "study"
REPORTS = Path("reports/studies")
LOCKS, RUNS, TABLE, FINDINGS, FACTS = "locks", "runs.csv", "table.csv", "findings.md", "study.json"
READOUTS, TRAINING = ("readout_frozen", "readout_finetune", "readout_classifier"), ("pretrain", "distill")
SIZES = ("parameters", "flops", "clips_seen")
RUN_COLUMNS = (
    *("arm", "seed", "encoder", "task", "protocol", "metric", "value", "unit", "higher_is_better"),
    *("parameters", "flops", "clips_seen", "experiment", "checkpoint_sha256"),
)
TABLE_COLUMNS = ("arm", "task", "metric", "seeds", "mean", "deviation", "difference", "noise", "beyond_noise")
CONFIDENCE = 0.95
REFERENCE = re.compile(r"\[([^\]:]+): ([^\]]+)\]")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\W?[A-Z0-9])")  # between two
DECIMAL = re.compile(r"(?<![\w.])[-+\u2212]?\d*\.\d+(?:e[-+]?\d+)?(?![\w.]*\w)")


@dataclass(frozen=True)
class Arm:
    """What one arm changes: Hydra overrides of the study's profile, whose encoder is measured, by which DVC targets."""

    name: str
    profile: str
    overrides: tuple[str, ...]
    encoder: str
    targets: tuple[str, ...]

    def settings(self, seed: int) -> list[str]:
        """All that is handed to Hydra."""
        return [f"profile={self.profile}", f"seed={seed}", *self.overrides]


@dataclass(frozen=True)
class Study:
    """A definition. base: the arm that others are compared with, seed by seed.

    ladders: name -> (column of runs.csv that a law is fitted over, one of SIZES; arms), for studies of scaling.
    """

    name: str
    question: str
    base: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    ladders: Mapping[str, tuple[str, tuple[str, ...]]]

    @property
    def folder(self) -> Path:
        return REPORTS / self.name

    @property
    def command(self) -> str:
        """What makes this table again."""
        return f"scaling4d study {self.name} --seeds {','.join(map(str, self.seeds))}"

    def lock(self, arm: str, seed: int) -> Path:
        return self.folder / LOCKS / f"{arm}-{seed}.lock"


def names() -> list[str]:
    """Of the studies that are defined."""
    return sorted(path.stem for path in DEFINITIONS.glob("*.yaml"))


def read(name: str) -> Study:
    """A study's definition.

    Raises:
        UserError: there is none of that name, or it lacks something, or has what none has.
    """
    import yaml

    path = DEFINITIONS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no study {name!r}; needed one of {', '.join(names()) or 'experiments/study/*.yaml'}")
    try:
        return _study(name, yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no study: {' '.join(str(error).split())}; compare it with another file there") from error


def with_seeds(study: Study, seeds: str) -> Study:
    """The same study with other seeds, numbers with commas between them.

    Raises:
        UserError: something else.
    """
    try:
        return replace(study, seeds=tuple(dict.fromkeys(int(seed) for seed in seeds.split(","))))
    except ValueError:
        raise UserError(f"--seeds {seeds!r}; needed numbers such as 0,1,2") from None


def _study(name: str, content: Mapping[str, Any]) -> Study:
    needed, known = {"question", "base", "arms"}, {"profile", "encoder", "targets", "seeds", "ladders"}
    if missing := needed - content.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    if unknown := content.keys() - needed - known:
        raise ValueError(f"it has {', '.join(sorted(unknown))}, which no study has")
    arms = tuple(
        _arm(arm, {"overrides": given} if isinstance(given, list) else given, content) for arm, given in content["arms"].items()
    )
    ladders = {ladder: (given["x"], tuple(given["arms"])) for ladder, given in content.get("ladders", {}).items()}
    for ladder, (x, _) in ladders.items():
        if x not in SIZES:
            raise ValueError(f"ladder {ladder} is over {x!r}; needed one of {', '.join(SIZES)}")
    for arm in (content["base"], *(arm for _, some in ladders.values() for arm in some)):
        if arm not in content["arms"]:
            raise ValueError(f"no arm {arm!r}")
    return Study(name, content["question"].strip(), content["base"], tuple(content.get("seeds", (0, 1, 2))), arms, ladders)


def _arm(name: str, given: Mapping[str, Any], shared: Mapping[str, Any]) -> Arm:
    if unknown := given.keys() - {"profile", "overrides", "encoder", "targets"}:
        raise ValueError(f"arm {name} has {', '.join(sorted(unknown))}, which no arm has")
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"the name of arm {name!r} is no word of letters, digits and _")
    encoder = given.get("encoder", shared.get("encoder", "nano"))
    targets = given.get("targets", shared.get("targets"))
    if not targets:
        raise ValueError(f"arm {name} has no targets")
    profile = given.get("profile", shared.get("profile", "pocket"))
    return Arm(name, profile, tuple(given.get("overrides", ())), encoder, tuple(t.format(encoder=encoder) for t in targets))


# ---- the numbers of a run ----


def needed(stages: Mapping[str, Mapping[str, Any]], targets: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Of a lock's stages the targets and what makes them, directly or not, in the lock's order; none that it does not have."""
    waiting, found = [target for target in targets if target in stages], set()
    while waiting:
        name = waiting.pop()
        found.add(name)
        read = {dep["path"] for dep in stages[name].get("deps", ())}
        made = (other for other, stage in stages.items() for out in stage.get("outs", ()) if out["path"] in read)
        waiting += [other for other in made if other not in found]
    return {name: stage for name, stage in stages.items() if name in found}


def load_lock(text: str) -> dict[str, Any]:
    """Stages of a dvc.lock, read the way DVC writes it: YAML 1.2, in which 3e-06 is a number."""
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe", pure=True).load(text)["stages"])


def recorded(entry: Mapping[str, Any], name: str, cache: Path) -> Any:
    """A JSON file inside a stage's out, out of DVC's cache; None where the cache does not hold it.

    Args:
        entry: of the lock, with `path` and `md5` of a folder.
    Raises:
        UserError: the cache holds other bytes than their own hash says, or the folder has no such file.
    """
    listing = _cached(entry["md5"], cache)
    if listing is None:
        return None
    md5 = next((file["md5"] for file in json.loads(listing) if file["relpath"] == name), None)
    if md5 is None:
        raise UserError(f"{entry['path']} has no {name}")
    content = _cached(md5, cache)
    return None if content is None else json.loads(content)


def _cached(md5: str, cache: Path) -> bytes | None:
    path = cache / "files/md5" / md5[:2] / md5[2:]
    if not path.is_file():
        return None
    content = path.read_bytes()
    if hashlib.md5(content).hexdigest() != md5.removesuffix(".dir"):
        raise UserError(f"{path} does not hold the bytes of its name; remove it and run the study again")
    return content


def numbers(
    arm: Arm, seed: int, stages: Mapping[str, Mapping[str, Any]], cache: Path, experiment: str
) -> list[dict[str, Any]] | None:
    """Rows of runs.csv that a run's lock stands for: the result of every target, and the loss of the encoder's training.

    None where the cache lacks one of them.
    """
    trained = next((name for kind in TRAINING if (name := f"{kind}@{arm.encoder}") in stages), None)
    about = {"arm": arm.name, "seed": seed, "encoder": arm.encoder, "experiment": experiment}
    summary = {}
    rows = []
    if trained is not None:
        summary = recorded(stages[trained]["outs"][0], "summary.json", cache)
        if summary is None:
            return None
        about |= {key: summary[key] for key in ("parameters", "flops", "clips_seen")}
        rows.append(_row(about, "pretrain", "", "val_loss", summary["val_loss"], "", False, ""))
    for target in arm.targets:
        kind = target.split("@")[0]
        if kind not in READOUTS and kind != "reconstruct":
            continue
        found = recorded(stages[target]["outs"][0], "result.json", cache)
        if found is None:
            return None
        if kind == "reconstruct":
            rows.append(_row(about, kind, "", "masked_mse", found["masked_mse"], "", False, found["checkpoint_sha256"]))
            continue
        mine = {"parameters": found["parameters"]} | about
        of = (found[key] for key in ("task", "protocol", "metric", "value", "unit", "higher_is_better", "checkpoint_sha256"))
        rows.append(_row(mine, *of))
    return rows


def _row(about: Mapping[str, Any], *rest: Any) -> dict[str, Any]:
    names = ("task", "protocol", "metric", "value", "unit", "higher_is_better", "checkpoint_sha256")
    return {**about, **dict(zip(names, rest, strict=True))}


# ---- what they come to ----


def table(rows: Sequence[Mapping[str, Any]], base: str) -> list[dict[str, Any]]:
    """A row an arm and task: mean and standard deviation over seeds, and how it differs from the base arm.

    rows: of runs.csv. difference: the mean over seeds of (arm - base), over the seeds that all arms have. noise: how far from 0
    such a difference lies by chance in 95 % of the cases if there is none: t * s * sqrt(2 / seeds), as in an experiment in
    blocks. s is the deviation of single values that is left when the mean of every arm and of every seed is taken away, of all
    arms together, as if they were equally noisy (so many arms know it better than two), and t is Student's for its
    (arms - 1) (seeds - 1) degrees of freedom. None where one seed alone was run. It counts what differs from seed to seed, not
    which validation clips were drawn, and makes nothing of how many arms are compared.
    """
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        values: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["task"] == task:
                values.setdefault(row["arm"], {})[int(row["seed"])] = float(row["value"])
        metric = next(row["metric"] for row in rows if row["task"] == task)
        shared = sorted(set.intersection(*(set(of) for of in values.values())))
        compared = shared and base in values
        noise = _noise([[of[seed] for seed in shared] for of in values.values()]) if compared else None
        for arm, of in values.items():
            several = list(of.values())
            difference = fmean(of[seed] - values[base][seed] for seed in shared) if compared and arm != base else None
            mine = None if difference is None else noise
            found.append(
                {
                    "arm": arm,
                    "task": task,
                    "metric": metric,
                    "seeds": len(several),
                    "mean": fmean(several),
                    "deviation": stdev(several) if several[1:] else None,
                    "difference": difference,
                    "noise": mine,
                    "beyond_noise": None if mine is None else abs(difference) > mine,
                }
            )
    order = {arm: place for place, arm in enumerate(dict.fromkeys(row["arm"] for row in rows))}
    return sorted(found, key=lambda row: order[row["arm"]])


def _noise(values: Sequence[Sequence[float]]) -> float | None:
    """t * s * sqrt(2 / seeds) of `table`, from arms x seeds; None with fewer than two of either."""
    from scipy.stats import t

    arms, seeds = [fmean(arm) for arm in values], [fmean(seed) for seed in zip(*values, strict=True)]
    freedom = (len(arms) - 1) * (len(seeds) - 1)
    if not freedom:
        return None
    left = [value - arms[a] - seeds[s] + fmean(arms) for a, of in enumerate(values) for s, value in enumerate(of)]
    deviation = math.sqrt(sum(value**2 for value in left) / freedom)
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * deviation * math.sqrt(2 / len(seeds))


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Numbers in full, so that a reader gets the float that was written; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def described(study: Study, locks: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """study.json without `files`, the sha256 of all others in the folder. locks, runs: by `arm-seed`.

    settings: what the stages of an arm ran with where those of the base arm ran with something else.
    """
    base = dict(_settings(locks[f"{study.base}-{study.seeds[0]}"]))
    arms = {}
    for arm in study.arms:
        mine = dict(_settings(locks[f"{arm.name}-{study.seeds[0]}"]))
        differ = {key: value for key, value in sorted(mine.items()) if base.get(key) != value}
        about = {"overrides": arm.overrides, "encoder": arm.encoder, "targets": arm.targets, "settings": differ}
        arms[arm.name] = {"profile": arm.profile, **about}
    code = {out["path"]: out["md5"] for lock in locks.values() for out in lock["code"]["outs"]}
    timed = [run for run in runs.values() if "cpu_seconds" in run]
    return {
        "study": study.name,
        "question": study.question,
        "base": study.base,
        "seeds": study.seeds,
        "arms": arms,
        "code": code,
        "runs": runs,
        "seconds": round(sum(run["seconds"] for run in timed), 1),
        "cpu_seconds": round(sum(run["cpu_seconds"] for run in timed), 1),
    }


def _settings(lock: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for stage in lock.values():
        for key, value in (stage.get("params") or {}).get("params.yaml", {}).items():
            yield from _leaves(key, value)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for word, inner in value.items():
            yield from _leaves(f"{key}.{word}", inner)
    else:
        yield key, value


# ---- what people say of it ----


def unfounded(text: str, folder: Path) -> Iterator[str]:
    """What is wrong with findings: a sentence without a reference, a reference to nothing, a number that is not in it.

    Every sentence ends with `[table: ARM TASK]`, the row of table.csv whose first two columns those are (several: `; ` between;
    and so for every other csv in the folder), or `[figure: NAME]`. Numbers with a decimal point must be in one of its rows,
    rounded, whatever their sign. Lines that begin with # are headings.
    """
    body = " ".join(line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    place = 0
    for found in REFERENCE.finditer(body):
        *bare, sentence = SENTENCE.split(body[place : found.start()].strip(" ."))
        place = found.end()
        yield from (f"a sentence without a reference: {one[:80]}" for one in bare)
        known: list[float] = []
        for key in found[2].split("; "):
            if found[1] == "figure":
                if not (folder / f"{key}.svg").is_file():
                    yield f"{found[0]}: there is no figure {key}.svg"
                continue
            row = _referenced(folder / f"{found[1]}.csv", key)
            if row is None:
                yield f"{found[0]}: there is no such row"
            else:
                known += [abs(float(value)) for value in row.values() if _is_number(value)]
        for written in DECIMAL.findall(sentence) if found[1] != "figure" else ():
            if not any(_rounded(written, value) for value in known):
                yield f"{written} is in no row of {found[0]}"
    if left := body[place:].strip(" ."):
        yield f"a sentence without a reference: {left[:80]}"


def _referenced(path: Path, key: str) -> dict[str, str] | None:
    rows = csv.DictReader(path.read_text().splitlines()) if path.is_file() else ()
    return next((row for row in rows if " ".join(list(row.values())[:2]) == key), None)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _rounded(written: str, value: float) -> bool:
    digits, _, power = written.lstrip("-+\u2212").partition("e")
    scale = 10.0 ** int(power or 0)
    step = 10.0 ** -len(digits.partition(".")[2]) * scale
    return abs(float(digits) * scale - value) <= 0.5000001 * step
