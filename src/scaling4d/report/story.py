"""What the report tells: every file that the other stages left, under the names that the settings give, never by a glob."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config
from scaling4d.records import Result, UserError

KEYS = [
    "profile",
    "seed",
    "points",
    "distilled",
    "encoders",
    "readout.tasks",
    "show.tasks",
    "report",
]  # what this stage declares in dvc.yaml
PROTOCOLS = ("frozen", "finetune", "classifier")
ONLY = {"classifier": ("actions",)}  # tasks of a protocol that is not for all
UNTRAINED = "untrained_"
OPERATIVE = "operative_config.gin"
SUMMARY = ("point", "method", "parameters", "flops", "clips_seen", "train_loss", "val_loss", "seed")


@dataclass(frozen=True)
class Story:
    """One run of the pipeline, read from its JSON.

    students: points that have a teacher; they learn no pixels, so there is no fidelity and no picture of theirs.
    tasks: empty where no encoder is read out. encoders: by protocol. results: in the order of the settings.
    summaries, losses (lines of losses.jsonl), fidelity (result.json of `reconstruct`) and pictures (filled.png): by point.
    sheets: by task, what the `show` stage drew. recipes: by point, the arguments of its constructor (points.<point>.<Method>).
    provenances: by `stage/name`, every provenance.json. operative: likewise, each setting in force as gin wrote it.
    overrides: dotted key -> (value in force, names of the stages that it changes).
    """

    profile: str
    seed: int
    points: tuple[str, ...]
    students: tuple[str, ...]
    tasks: tuple[str, ...]
    encoders: Mapping[str, tuple[str, ...]]
    results: tuple[Result, ...]
    summaries: Mapping[str, Mapping[str, Any]]
    losses: Mapping[str, list[Mapping[str, float]]]
    fidelity: Mapping[str, Mapping[str, Any]]
    pictures: Mapping[str, Path]
    sheets: Mapping[str, Path]
    recipes: Mapping[str, Mapping[str, Any]]
    provenances: Mapping[str, Mapping[str, Any]]
    operative: Mapping[str, Mapping[str, str]]
    overrides: Mapping[str, tuple[Any, tuple[str, ...]]]
    datasheet: Mapping[str, Any]

    def result(self, encoder: str, task: str, protocol: str) -> Result | None:
        """None where the profile has no such readout."""
        return next((r for r in self.results if (r.encoder, r.task, r.protocol) == (encoder, task, protocol)), None)

    def of_method(self, method: str) -> list[str]:
        """The points trained by a method, from small to large."""
        chosen = [point for point in self.trained if self.summaries[point]["method"] == method]
        return sorted(chosen, key=lambda point: (self.summaries[point]["parameters"], point))

    @property
    def ladder(self) -> list[str]:
        """The points that differ in their size alone, from small to large: of the first method, with its commonest masking."""
        mine = self.of_method(self.methods[0])
        common = Counter(map(self.masking, mine)).most_common(1)[0][0]
        return [point for point in mine if self.masking(point) == common]

    def masking(self, point: str) -> str:
        """How a point's tokens were hidden in pretraining, `random 95 %`; empty where its settings do not say."""
        recipe = self.recipes[point]
        return f"{recipe['masking']} {recipe['mask_ratio']:.0%}".replace("%", " %") if "masking" in recipe else ""

    @property
    def trained(self) -> tuple[str, ...]:
        """All points, those with a teacher last."""
        return (*self.points, *self.students)

    @property
    def baselines(self) -> list[str]:
        """Encoders that saw no video: the untrained ones and raw pixels."""
        return [name for name in self.encoders["frozen"] if is_baseline(name)]

    @property
    def methods(self) -> list[str]:
        """The methods of the points; the one with most points, the ladder, first, and never that of the students."""
        found = {self.summaries[point]["method"] for point in self.trained}
        taught = {self.summaries[point]["method"] for point in self.students}
        return sorted(found, key=lambda method: (method in taught, -len(self.of_method(method)), method))


def read(settings: Mapping[str, Any] | None = None) -> Story:
    """Read what the settings (default: params.yaml) name.

    Raises:
        UserError: a file is missing that the settings promise (names the stage to run), or it is damaged.
    """
    settings = config.read() if settings is None else settings
    mine = config.declared(settings, KEYS)
    home = artifacts.home(settings)
    encoders = {protocol: tuple(config.section(settings, f"encoders.{protocol}") or ()) for protocol in PROTOCOLS}
    points, students = tuple(mine["points"]), tuple(mine["distilled"])
    tasks = tuple(mine["readout.tasks"] if any(encoders.values()) else ())
    folders = {"clips": (home / "clips", "clips")}  # what has a provenance: folder and the command that makes it
    summaries, losses, fidelity, pictures = {}, {}, {}, {}
    for point in (*points, *students):
        folder, command = home / "pretrain" / point, f"pretrain {point}"
        summaries[point] = _with_keys(_json(folder / "summary.json", command), SUMMARY, folder / "summary.json")
        losses[point] = _lines(folder / "losses.jsonl", command)
        folders[f"pretrain/{point}"] = (folder, command)
    for point in points:
        filled, command = home / "reconstruct" / point, f"reconstruct {point}"
        fidelity[point] = _with_keys(_json(filled / "result.json", command), ("masked_mse", "psnr_db"), filled / "result.json")
        pictures[point] = _there(filled / "filled.png", command)
        folders[f"reconstruct/{point}"] = (filled, command)
    results = {}
    for protocol in PROTOCOLS:
        for encoder in encoders[protocol]:
            if is_baseline(encoder) or encoder in mine["encoders"]["pretrained"]:
                folders[f"pretrain/{encoder}"] = (home / "pretrain" / encoder, f"baseline {encoder}")
            for task in (task for task in tasks if task in ONLY.get(protocol, tasks)):
                folder, command = home / "readout" / encoder / task / protocol, f"readout {encoder} {task} {protocol}"
                results[encoder, task, protocol] = _result(folder / "result.json", command)
                folders[f"readout/{encoder}/{task}/{protocol}"] = (folder, command)
    sheets = {}
    for task in mine["show.tasks"]:
        drawn = home / "show" / task
        command = f"show RESULT... --out {drawn}"
        sheets[task] = _there(drawn / "sheet.png", command)
        folders[f"show/{task}"] = (drawn, command)
    provenances = {name: _json(folder / "provenance.json", command) for name, (folder, command) in folders.items()}
    return Story(
        profile=mine["profile"],
        seed=mine["seed"],
        points=points,
        students=students,
        tasks=tasks,
        encoders=encoders,
        results=tuple(results.values()),
        summaries=summaries,
        losses=losses,
        fidelity=fidelity,
        pictures=pictures,
        sheets=sheets,
        recipes={point: _recipe(settings) for point, settings in (mine["points"] | mine["distilled"]).items()},
        provenances=provenances,
        operative={name: operative(_there(folder / OPERATIVE, command)) for name, (folder, command) in folders.items()},
        overrides=_overrides(settings, provenances),
        datasheet=_json(home / "clips" / "datasheet.json", "clips"),
    )


def is_baseline(encoder: str) -> bool:
    return encoder == "pixels" or encoder.startswith(UNTRAINED)


def operative(path: Path) -> dict[str, str]:
    """The settings of an operative_config.gin, `Recipe.steps` -> `120`; a value that goes over several lines becomes one."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        text = line.rstrip("\\ ").strip()  # gin ends a line that goes on with a backslash
        if setting := re.match(r"([\w./]+) =\s*(.*)", text):
            key, found[setting[1]] = setting[1], setting[2]
        elif found and not text.startswith("#"):
            found[key] = f"{found[key]} {text}".strip()
    return found


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested settings by its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def published() -> dict[str, Any]:
    """The papers' own numbers, each with its source."""
    import yaml

    return yaml.safe_load(resources.files(__package__).joinpath("published.yaml").read_text())


def deviations() -> str:
    """What differs from the papers and why, as Markdown."""
    return resources.files(__package__).joinpath("deviations.md").read_text()


def _recipe(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A point's settings are its constructor's name with the arguments below it, and how and where it is trained."""
    (arguments,) = (section for name, section in settings.items() if name not in ("method", "Sharding", "Launch"))
    return arguments


def _overrides(
    settings: Mapping[str, Any], provenances: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Those that the stages wrote down, and those among the settings of the report itself."""
    own = {k: v for k, v in config.overrides(settings).items() if any(k == key or k.startswith(f"{key}.") for key in KEYS)}
    found: dict[str, tuple[Any, list[str]]] = {}
    for stage, values in [*((name, p.get("overrides") or {}) for name, p in provenances.items()), ("report", own)]:
        for key, value in values.items():
            found.setdefault(key, (value, []))[1].append(stage)
    return {key: (value, tuple(stages)) for key, (value, stages) in sorted(found.items())}


def _there(path: Path, command: str) -> Path:
    if not path.is_file():
        raise UserError(f"the report needs {path}, which is not there: run `dvc repro`, or `scaling4d {command}` alone")
    return path


def _json(path: Path, command: str) -> Any:
    text = _there(path, command).read_text()
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run `scaling4d {command}`") from error


def _lines(path: Path, command: str) -> list[dict[str, float]]:
    text = _there(path, command).read_text()
    try:
        return [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run `scaling4d {command}`") from error


def _with_keys(content: dict[str, Any], keys: tuple[str, ...], path: Path) -> dict[str, Any]:
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it was made by another version; run its stage again")
    return content


def _result(path: Path, command: str) -> Result:
    try:
        return Result.read(_there(path, command))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a result ({error}): run `scaling4d {command}`") from error
