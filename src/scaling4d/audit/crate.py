"""The run as an RO-Crate: Provenance Run Crate 0.5, so Workflow and Process Run Crate too, on RO-Crate 1.1."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rocrate.model import ContextEntity, DataEntity
from rocrate.model.entity import Entity
from rocrate.rocrate import ROCrate

from scaling4d.audit.run import LockedRun, find_maker
from scaling4d.provenance import LOCK, LockedFile, LockedStage, atomic_new
from scaling4d.records import UserError

PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
TERMS, TERM = ("resourceUsage", "sha256"), "https://w3id.org/ro/terms/workflow-run#"
WORKFLOW, WORKFLOW_TYPES = "dvc.yaml", ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"]
BESIDE = ("params.yaml", "dvc.lock", "data.dvc", "requirements.lock", "pyproject.toml", "LICENSE", "README.md")
LARGEST_BYTES = 2**20  # of a copied file; the hash of a larger one stands for it, so that a crate can be mailed
USAGE = {"seconds": ("https://schema.org/totalTime", "SEC"), "cpus": ("https://schema.org/processorRequirements", "C62")}
FORMATS = {
    **{".json": "application/json", ".jsonl": "application/jsonl", ".ipynb": "application/x-ipynb+json", ".html": "text/html"},
    **{".csv": "text/csv", ".parquet": "application/vnd.apache.parquet", ".tar": "application/x-tar", ".md": "text/markdown"},
    **{".svg": "image/svg+xml", ".png": "image/png", ".yaml": "application/yaml", ".dvc": "application/yaml"},
    **{".py": "text/x-python", ".gin": "text/plain", ".lock": "text/plain", ".toml": "application/toml"},
}


def write_crate(run: LockedRun, out: Path) -> Path:
    """Write the folder `out`: ro-crate-metadata.json, the workflow, settings, report, and the small files of artifacts.

    Every file and folder of dvc.lock is an entity with its hash; sources and files above LARGEST_BYTES by
    `hash://sha256/...` alone. Every stage is an action with its command, settings, inputs, outputs, time, versions and
    machine. The same run gives the same bytes: the date is that of its last stage. The caller has verified the run.

    Raises:
        UserError: as `atomic_new`, a file is not here, or runs.json has no stage. Then `out` is not written.
    """
    with atomic_new(out) as folder:
        missing = [
            file.path for stage in run.stages.values() for file in (*stage.deps, *stage.outs) if not run.disk.paths(file.path)
        ]
        if missing:
            raise UserError(f"{missing[0]} is not here, and a crate names every file: run `dvc repro` first")
        crate = ROCrate(version="1.1")  # on which the profiles build
        _CrateWriter(run, crate).add_run()
        for name in BESIDE:
            if Path(name).is_file() and not crate.get(name):
                crate.add_file(name, name, properties={"name": name, "encodingFormat": _format(name)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # rocrate warns where it writes no file for an entity
            crate.write(folder)
    return out


class _CrateWriter:
    """Adds who, when and under which license, the workflow, and every stage with its files to a crate."""

    def __init__(self, run: LockedRun, crate: ROCrate) -> None:
        self._run, self._crate = run, crate
        self._project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
        self._environments = {name: ran for name, stage in run.stages.items() if (ran := run.environment(stage)) is not None}
        if not self._environments:
            text = "has no stage of this run, and a crate states when and where each stage ran"
            raise UserError(f"{run.folder}/runs.json {text}: run `dvc repro`")

    def add_run(self) -> None:
        """Stages of .dvc files count too: `dvc update` brought the data."""
        crate, run, entity, project = self._crate, self._run, self._entity, self._project
        environments, stages = self._environments.values(), list(run.stages.values())
        start = _time(min(environment["finished_unix_s"] - environment["seconds"] for environment in environments))
        end = _time(max(environment["finished_unix_s"] for environment in environments))
        crate.metadata.extra_terms = {term: f"{TERM}{term}" for term in TERMS}
        crate.name, crate.description, crate.datePublished = f"{project['name']}: {run.folder}", project["description"], end
        url = f"https://spdx.org/licenses/{project['license']}"
        crate.license = entity(url, "CreativeWork", name=project["license"], identifier=url)
        authors = [entity(f"#author/{index}", "Person", **author) for index, author in enumerate(project["authors"], 1)]
        profiles = [entity(url, "CreativeWork", name=name, version=url.rsplit("/", 1)[1]) for url, name in PROFILES.items()]
        crate.root_dataset["author"], crate.root_dataset["conformsTo"] = authors, profiles
        dvc, url = next(environment["versions"]["dvc"] for environment in environments), "https://dvc.org"
        engine = entity("#dvc", "SoftwareApplication", name="DVC", url=url, softwareVersion=dvc)
        language = entity("#dvc-yaml", "ComputerLanguage", name="DVC pipeline", url=f"{url}/doc/user-guide/pipelines")
        properties = {"@type": WORKFLOW_TYPES, "name": "the pipeline", "programmingLanguage": language}
        properties |= {"encodingFormat": _format(WORKFLOW)}
        workflow = crate.mainEntity = crate.add_file(WORKFLOW, WORKFLOW, properties=properties)
        kinds = dict.fromkeys(stage.kind for stage in stages)
        tools = {kind: self._tool(kind, [stage for stage in stages if stage.kind == kind]) for kind in kinds}
        steps = {}
        for position, (kind, tool) in enumerate(tools.items(), 1):
            steps[kind] = entity(f"#step/{kind}", "HowToStep", name=kind, position=str(position), workExample=tool)
        workflow["hasPart"], workflow["step"] = list(tools.values()), list(steps.values())
        actions = [self._action(stage, tools[stage.kind], authors[0]) for stage in stages]
        controls = []
        for stage, ran in zip(stages, actions, strict=True):
            properties = {"name": f"DVC ran {stage.name}", "instrument": steps[stage.kind], "object": ran}
            controls.append(entity(f"#control/{stage.name}", "ControlAction", **properties))
        inputs = [dep for stage in stages for dep in stage.deps if find_maker(run.makers, dep.path) is None]
        sources = [dep for dep in inputs if not dep.path.startswith("artifacts/")]
        report = [out for stage in stages for out in stage.outs if out.path.startswith(f"{run.folder}/")]
        settings = {key: value for stage in stages for key, value in stage.params.items()}
        workflow["input"], workflow["output"] = self._parameters(sources, settings), self._parameters(report, {})
        properties = {"name": f"{LOCK}: every stage that led to {run.folder}", "instrument": workflow, "agent": authors[0]}
        properties |= {"startTime": start, "endTime": end, **self._read_and_wrote(sources, settings, report)}
        action = entity("#run", "CreateAction", **properties)
        properties = {"name": "dvc repro", "instrument": engine, "object": controls, "result": action, "agent": authors[0]}
        crate.root_dataset["mentions"] = [action, entity("#organized", "OrganizeAction", **properties), *actions]

    def _tool(self, kind: str, stages: Iterable[LockedStage]) -> Entity:
        """The command of a kind of stages, with the software that it ran on."""
        ran = [self._environments[stage.name] for stage in stages if stage.name in self._environments]
        versions = {(name, version) for environment in ran for name, version in environment["versions"].items()}
        software = [
            self._entity(f"#software/{name}-{version}", "SoftwareApplication", name=name, softwareVersion=version)
            for name, version in sorted(versions | {("python", environment["python"]) for environment in ran})
        ]
        files = {file.path: file for stage in stages for file in stage.deps if not file.path.startswith("artifacts/")}
        settings = {key: value for stage in stages for key, value in stage.params.items()}
        properties = {"name": f"{self._project['name']} {kind}", "softwareRequirements": software}
        properties |= {"softwareVersion": self._project["version"], "input": self._parameters(files.values(), settings)}
        return self._entity(f"#tool/{kind}", "SoftwareApplication", **properties)

    def _action(self, stage: LockedStage, tool: Entity, agent: Entity) -> Entity:
        properties = {"name": stage.name, "description": f"ran `{stage.command}`", "instrument": tool, "agent": agent}
        properties |= self._read_and_wrote(stage.deps, stage.params, stage.outs)
        if environment := self._environments.get(stage.name):
            end = environment["finished_unix_s"]
            properties |= {"startTime": _time(end - environment["seconds"]), "endTime": _time(end)}
            properties["description"] += f" on {environment['machine']}"
            properties["resourceUsage"] = []
            for name, (identifier, unit) in USAGE.items():
                usage = {"name": name, "value": str(environment[name]), "propertyID": identifier, "unitCode": unit}
                properties["resourceUsage"].append(self._entity(f"#usage/{stage.name}/{name}", "PropertyValue", **usage))
        return self._entity(f"#run/{stage.name}", "CreateAction", **properties)

    def _read_and_wrote(self, deps: Iterable[LockedFile], settings: Mapping[str, Any], outs: Iterable[LockedFile]) -> dict:
        """Properties of an action."""
        read, wrote = [*map(self._data, deps), *self._settings(settings)], [*map(self._data, outs)]
        return {"object": read, "result": wrote, "actionStatus": "http://schema.org/CompletedActionStatus"}

    def _data(self, file: LockedFile) -> Entity:
        """The entity of a file or folder of dvc.lock. The hash stands for sources, which the crate does not hold."""
        properties = {"name": file.path, "sha256": self._run.disk.sha256(file.path), "contentSize": str(file.size)}
        properties["description"] = f"md5 {file.md5}, as {LOCK} has it"
        if f"{file.path}/".startswith(("data/", "experiments/")):
            return self._entity(f"hash://sha256/{properties['sha256']}", "Dataset", **properties)
        files = self._run.disk.files(file.path)
        if "" in files:
            return self._file(file.path, properties)
        folder = self._crate.get(f"{file.path}/")
        if folder is None:
            folder = self._crate.add_dataset(dest_path=file.path, properties=properties)
            folder["hasPart"] = [self._file(f"{file.path}/{name}", {}) for name in files]
        return folder

    def _file(self, path: str, about: Mapping[str, Any]) -> Entity:
        digest, entity = self._run.disk.files(path)[""], self._crate.get(path)
        properties = {"contentSize": str(digest.size), "sha256": digest.sha256, **about}
        properties |= {"name": path, "encodingFormat": _format(path)}
        if entity is None and digest.size > LARGEST_BYTES:
            return self._entity(f"hash://sha256/{digest.sha256}", "File", **properties)
        return entity or self._crate.add_file(path, path, properties=properties)

    def _settings(self, settings: Mapping[str, Any]) -> list[Entity]:
        values = {key: json.dumps(value, sort_keys=True) for key, value in settings.items()}
        return [self._entity(f"#setting/{key}", "PropertyValue", name=key, value=value) for key, value in values.items()]

    def _parameters(self, files: Iterable[LockedFile], settings: Mapping[str, Any]) -> list[Entity]:
        """The formal parameters of a tool or of the workflow, each with its value in this run."""
        values = [("path", file.path, "Dataset" if file.nfiles else "File", self._data(file)) for file in files]
        values += [("parameter", value["name"], "PropertyValue", value) for value in self._settings(settings)]
        for group, name, kind, value in values:
            properties = {"name": name, "additionalType": kind, "workExample": value}
            value["exampleOfWork"] = self._entity(f"#{group}/{name}", "FormalParameter", **properties)
        return [value["exampleOfWork"] for *_, value in values]

    def _entity(self, identifier: str, kind: str, /, **properties: Any) -> Entity:
        """The entity of this identifier, added if new: a contextual one, or data that the crate does not hold."""
        model = DataEntity if identifier.startswith("hash:") else ContextEntity
        return self._crate.get(identifier) or self._crate.add(model(self._crate, identifier, {"@type": kind, **properties}))


def _format(path: str) -> str:
    return FORMATS.get(Path(path).suffix, "application/octet-stream")


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(round(unix_s), UTC).isoformat()
