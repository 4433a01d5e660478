"""The results of one run: the files of the other stages, under the names that the settings give, never by a glob."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config
from scaling4d.provenance import is_below, parse_gin
from scaling4d.records import Result, UserError
from scaling4d.report.seeds import SeedStudy, read_seed_study
from scaling4d.studies.study import RECONSTRUCT_METRICS, loss_task

KEYS = ["profile", "seed", *config.POINTS, "encoders", "benchmarks.tasks", "show.tasks", "report"]  # declared in dvc.yaml
PROTOCOL_TASKS = {"classifier": ("actions",)}  # of a protocol that not every task has
UNTRAINED = "untrained_"
HELD_OUT_FILE = "held_out.jsonl"  # of a readout that stops early; others have none
VALIDATION = "validation.jsonl"  # of a point that was validated during its training; others have none
SUMMARY = ("point", "method", "parameters", "flops", "clips_seen", "train_loss", "val_loss", "seed")


@dataclass(frozen=True)
class RunResults:
    """One run of the pipeline, read from its JSON.

    home: folder of the artifacts. folder: of the report. students: points that have a teacher; they predict no pixels,
    so they have no fidelity and no picture. continued: points that start from a checkpoint; neither are they filled in,
    nor do they belong to the ladder. tasks: empty without readouts. encoders: by protocol. results: in the order
    of the settings. summaries, losses (lines of losses.jsonl), fidelity (result.json of `reconstruct`) and pictures
    (filled.png): by point. validations: lines of validation.jsonl by point, if it was validated during training.
    held_out: lines of held_out.jsonl by `readout/name`, of readouts that have one. sheets: of stage `show`, by task.
    models: by point, the method's settings. provenances: by `stage/name`. operative: likewise, the settings in force.
    overrides: dotted key -> (value in force, names of the stages that it changes). seed_study: None where the profile
    has none.
    """

    home: Path
    folder: Path
    profile: str
    seed: int
    points: tuple[str, ...]
    students: tuple[str, ...]
    continued: tuple[str, ...]
    tasks: tuple[str, ...]
    encoders: Mapping[str, tuple[str, ...]]
    results: tuple[Result, ...]
    held_out: Mapping[str, list[Mapping[str, float]]]
    summaries: Mapping[str, Mapping[str, Any]]
    losses: Mapping[str, list[Mapping[str, float]]]
    validations: Mapping[str, list[Mapping[str, float]]]
    fidelity: Mapping[str, Mapping[str, Any]]
    pictures: Mapping[str, Path]
    sheets: Mapping[str, Path]
    models: Mapping[str, Mapping[str, Any]]
    provenances: Mapping[str, Mapping[str, Any]]
    operative: Mapping[str, Mapping[str, Any]]
    overrides: Mapping[str, tuple[Any, tuple[str, ...]]]
    datasheet: Mapping[str, Any]
    seed_study: SeedStudy | None

    @property
    def fresh_seed_study(self) -> SeedStudy | None:
        """The study of seeds, if there is one and it belongs to this run."""
        return self.seed_study if self.seed_study and not self.seed_study.stale else None

    def result(self, encoder: str, task: str, protocol: str) -> Result | None:
        """None where the profile has no such readout."""
        return next((r for r in self.results if (r.encoder, r.task, r.protocol) == (encoder, task, protocol)), None)

    def of_method(self, method: str) -> list[str]:
        """The points trained by a method, from small to large."""
        points = [point for point in self.trained if self.summaries[point]["method"] == method]
        return sorted(points, key=lambda point: (self.summaries[point]["parameters"], point))

    @property
    def ladder(self) -> list[str]:
        """The points that differ in size alone, from small to large, of the first method."""
        return self.ladder_of(self.methods[0])

    def ladder_of(self, method: str) -> list[str]:
        """The points of a method that differ in size alone: with its main masking, from random weights."""
        points = [point for point in self.of_method(method) if point not in self.continued]
        commonest = dict(Counter(map(self.masking, points)).most_common(1))
        return [point for point in points if self.masking(point) in commonest]

    def masking(self, point: str) -> str:
        """Masking of a point in pretraining, `random 95%`; empty where its settings have none."""
        model = self.models[point]
        return f"{model['masking']} {model['mask_ratio']:.0%}" if "masking" in model else ""

    @property
    def side_px(self) -> int:
        """Side of the clips, which all points share."""
        return self.models[self.trained[0]]["clip"][1]

    @property
    def trained(self) -> tuple[str, ...]:
        """All points, those with a teacher and those that start from weights last."""
        return (*self.points, *self.students, *self.continued)

    @property
    def measures(self) -> list[str]:
        """Names of measures of validations during training; empty without any."""
        lines = (line for point in self.trained for line in self.validations.get(point, ()))
        return list(dict.fromkeys(name for line in lines for name in line if name != "step"))

    @property
    def baselines(self) -> list[str]:
        """Encoders that saw no video: the untrained ones and raw pixels."""
        return [name for name in self.encoders["frozen"] if is_baseline(name)]

    @property
    def methods(self) -> list[str]:
        """The methods of the points. The method with most points, the ladder, comes first; the students' last."""
        methods = {self.summaries[point]["method"] for point in self.trained}
        distilled = {self.summaries[point]["method"] for point in self.students}
        return sorted(methods, key=lambda method: (method in distilled, -len(self.of_method(method)), method))


class MissingResult(UserError):
    """A stage was not run yet."""


def read_run_results(settings: Mapping[str, Any]) -> RunResults:
    """Read the results that the settings name.

    Raises:
        MissingResult: a file is absent (names the stage to run). UserError: one is damaged, or of other settings.
    """
    declared = config.declared(settings, KEYS)
    home = artifacts.home(settings)
    encoders = {protocol: tuple(config.section(settings, f"encoders.{protocol}") or ()) for protocol in config.PROTOCOLS}
    points, students, continued = (tuple(declared[group]) for group in config.POINTS)
    tasks = tuple(declared["benchmarks.tasks"] if any(encoders.values()) else ())
    folders = {"clips": (home / "clips", "clips")}  # by stage: a folder with provenance, and the command that makes it
    summaries, losses, validations, fidelity, pictures, results, held_out, sheets = {}, {}, {}, {}, {}, {}, {}, {}
    seed, numbers = declared["seed"], {}  # those that a study of seeds measures too, as `read_seed_study` takes them
    for point in (*points, *students, *continued):
        folder, command = folders[f"pretrain/{point}"] = home / "pretrain" / point, f"pretrain {point}"
        summaries[point] = _with_keys(folder / "summary.json", command, SUMMARY)
        losses[point] = _parsed(folder / "losses.jsonl", command, _json_lines)
        if (folder / VALIDATION).is_file():
            validations[point] = _parsed(folder / VALIDATION, command, _json_lines)
        numbers[point, loss_task(summaries[point]["method"]), "val_loss"] = seed, summaries[point]["val_loss"], ""
    for point in points:
        folder, command = folders[f"reconstruct/{point}"] = home / "reconstruct" / point, f"reconstruct {point}"
        fidelity[point] = measured = _with_keys(folder / "result.json", command, ("true_patch_statistics",))
        for metric, task in RECONSTRUCT_METRICS.items():
            if measured.get(metric) is not None:
                numbers[point, task, metric] = seed, measured[metric], measured["checkpoint_sha256"]
        pictures[point] = _existing(folder / "filled.png", command)
    for protocol, names in encoders.items():
        for encoder in names:
            if is_baseline(encoder) or encoder in declared["encoders"]["pretrained"]:
                folders[f"pretrain/{encoder}"] = (home / "pretrain" / encoder, f"baseline {encoder}")
            for task in (task for task in tasks if task in PROTOCOL_TASKS.get(protocol, tasks)):
                name = f"readout/{encoder}/{task}/{protocol}"
                folder, command = folders[name] = home / name, f"readout {encoder} {task} {protocol}"
                results[name] = r = _parsed(folder / "result.json", command, lambda text: Result(**json.loads(text)))
                if protocol == "frozen":
                    numbers[encoder, task, r.metric] = seed, r.value, r.checkpoint_sha256
                if (folder / HELD_OUT_FILE).is_file():
                    held_out[name] = _parsed(folder / HELD_OUT_FILE, command, _json_lines)
    for task in declared["show.tasks"]:
        folder = home / "show" / task
        _, command = folders[f"show/{task}"] = folder, f"show RESULT... --out {folder}"
        sheets[task] = _existing(folder / "sheet.png", command)
    provenances = {name: _parsed(folder / artifacts.PROVENANCE, command) for name, (folder, command) in folders.items()}
    own = {key: value for key, value in config.overrides(settings).items() if is_below(key, KEYS)}
    overrides: dict[str, tuple[Any, list[str]]] = {}
    for stage, values in [*((name, p.get("overrides") or {}) for name, p in provenances.items()), ("report", own)]:
        for key, value in values.items():
            overrides.setdefault(key, (value, []))[1].append(stage)
    codes = {p["code"]["package"]: p["code"] for p in provenances.values() if p.get("code")}
    return RunResults(
        home=home,
        folder=Path(config.section(settings, "report.folder")),
        profile=declared["profile"],
        seed=seed,
        points=points,
        students=students,
        continued=continued,
        tasks=tuple(task for task in tasks if any(r.task == task for r in results.values())),
        encoders=encoders,
        results=tuple(results.values()),
        held_out=held_out,
        summaries=summaries,
        losses=losses,
        validations=validations,
        fidelity=fidelity,
        pictures=pictures,
        sheets=sheets,
        models={name: next(iter(point["model"].values())) for group in config.POINTS for name, point in declared[group].items()},
        provenances=provenances,
        operative={name: _parsed(folder / artifacts.OPERATIVE, c, parse_gin) for name, (folder, c) in folders.items()},
        overrides={key: (value, tuple(stages)) for key, (value, stages) in sorted(overrides.items())},
        datasheet=_parsed(home / "clips" / "datasheet.json", "clips"),
        seed_study=read_seed_study(declared["profile"], codes, numbers),
    )


def is_baseline(encoder: str) -> bool:
    """Whether an encoder is raw pixels or an untrained one."""
    return encoder == "pixels" or encoder.startswith(UNTRAINED)


def _existing(path: Path, command: str) -> Path:
    if not path.is_file():
        raise MissingResult(f"the report needs {path}, which is missing: run `dvc repro`, or `scaling4d {command}` alone")
    return path


def _json_lines(text: str) -> list[dict[str, float]]:
    return list(map(json.loads, text.splitlines()))


def _parsed(path: Path, command: str, parse: Callable[[str], Any] = json.loads) -> Any:
    text = _existing(path, command).read_text()
    try:
        return parse(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run `scaling4d {command}`") from error


def _with_keys(path: Path, command: str, keys: tuple[str, ...]) -> dict[str, Any]:
    content = _parsed(path, command)
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{path} lacks {', '.join(missing)}: it was made by another version; run its stage again")
    return content
