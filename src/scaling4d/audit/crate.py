"""The run as an RO-Crate: Provenance Run Crate 0.5, so Workflow and Process Run Crate too, on RO-Crate 1.1."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling4d.audit.lock import File, Stage
from scaling4d.audit.run import Run
from scaling4d.records import UserError

if TYPE_CHECKING:
    from rocrate.model.entity import Entity
    from rocrate.rocrate import ROCrate

VERSION = "1.1"  # of RO-Crate, on which the profiles below build
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
TERMS = ("resourceUsage", "sha256")
TERM = "https://w3id.org/ro/terms/workflow-run#"
WORKFLOW, KIND = "dvc.yaml", ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"]
BESIDE = ("params.yaml", "dvc.lock", "data.dvc", "requirements.lock", "pyproject.toml", "LICENSE", "README.md")
LARGEST_BYTES = (
    2**20
)  # of a file that is copied; a larger one is named by its hash: the crate is to be mailed, not to hold weights
USAGE = {"seconds": ("https://schema.org/totalTime", "SEC"), "cpus": ("https://schema.org/processorRequirements", "C62")}
KINDS = {
    **{".json": "application/json", ".jsonl": "application/jsonl", ".ipynb": "application/x-ipynb+json", ".html": "text/html"},
    **{".csv": "text/csv", ".parquet": "application/vnd.apache.parquet", ".tar": "application/x-tar", ".md": "text/markdown"},
    **{".svg": "image/svg+xml", ".png": "image/png", ".yaml": "application/yaml", ".dvc": "application/yaml"},
    **{".py": "text/x-python", ".gin": "text/plain", ".lock": "text/plain", ".toml": "application/toml"},
}
OTHER = "application/octet-stream"


def write(run: Run, out: Path) -> Path:
    """Write the folder `out`: ro-crate-metadata.json, the workflow, code, settings, report, and every artifact's small files.

    Every file and folder of dvc.lock is an entity with its hash; sources and files above LARGEST_BYTES by `hash://sha256/...`
    alone. Every stage is an action with its command, settings, inputs, outputs, time, versions and machine. The same run gives
    the same bytes: the date is that of its last stage. The caller has verified the run.

    Raises:
        UserError: the folder is there already, or an artifact is not.
    """
    from rocrate.rocrate import ROCrate

    if out.exists():
        raise UserError(f"{out} is there already; needed the name of a new folder")
    missing = [file.path for stage in run.stages.values() for file in (*stage.deps, *stage.outs) if not run.disk.here(file.path)]
    if missing:
        raise UserError(f"{missing[0]} is not here, and a crate names every file: run `dvc repro` first")
    crate = ROCrate(version=VERSION)
    crate.metadata.extra_terms = {term: f"{TERM}{term}" for term in TERMS}
    _root(run, crate)
    _Run(run, crate).add()
    for name in BESIDE:
        if Path(name).is_file() and not crate.get(name):
            crate.add_file(name, name, properties={"name": name, "encodingFormat": _kind(name)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # rocrate warns where it writes no file for an entity
        crate.write(out)
    return out


def _root(run: Run, crate: ROCrate) -> None:
    """Who, when, under which licence, by pyproject.toml."""
    from rocrate.model import ContextEntity, Person

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    crate.name = f"{project['name']}: {run.folder}"
    crate.description = project["description"]
    crate.datePublished = _time(max(facts["finished_unix_s"] for facts in _facts(run)))
    licence = f"https://spdx.org/licenses/{project['license']}"
    crate.license = crate.add(
        ContextEntity(crate, licence, {"@type": "CreativeWork", "name": project["license"], "identifier": licence})
    )
    authors = [Person(crate, f"#author/{index}", dict(author)) for index, author in enumerate(project["authors"], start=1)]
    crate.root_dataset["author"] = [crate.add(author) for author in authors]
    profiles = [
        crate.add(ContextEntity(crate, url, {"@type": "CreativeWork", "name": name, "version": url.rsplit("/", 1)[1]}))
        for url, name in PROFILES.items()
    ]
    crate.root_dataset["conformsTo"] = profiles


class _Run:
    """Adds the workflow, its stages and what they read and wrote to a crate."""

    def __init__(self, run: Run, crate: ROCrate) -> None:
        self._run, self._crate = run, crate
        self._project = tomllib.loads(Path("pyproject.toml").read_text())["project"]

    def add(self) -> None:
        """Stages of .dvc files count too: `dvc update` brought the data."""
        crate, stages = self._crate, list(self._run.stages.values())
        engine = self._entity(
            "#dvc", "SoftwareApplication", dict(name="DVC", url="https://dvc.org", softwareVersion=self._version("dvc"))
        )
        language = self._entity(
            "#dvc-yaml", "ComputerLanguage", dict(name="DVC pipeline", url="https://dvc.org/doc/user-guide/pipelines")
        )
        about = {"@type": KIND, "name": "the pipeline", "programmingLanguage": language, "encodingFormat": _kind(WORKFLOW)}
        workflow = crate.mainEntity = crate.add_file(WORKFLOW, WORKFLOW, properties=about)
        tools = {
            kind: self._tool(kind, [stage for stage in stages if stage.kind == kind])
            for kind in dict.fromkeys(s.kind for s in stages)
        }
        steps = {
            kind: self._entity(f"#step/{kind}", "HowToStep", dict(name=kind, position=str(place), workExample=tool))
            for place, (kind, tool) in enumerate(tools.items(), start=1)
        }
        workflow["hasPart"], workflow["step"] = list(tools.values()), list(steps.values())
        actions = [self._action(stage, tools[stage.kind]) for stage in stages]
        controls = [
            self._entity(
                f"#control/{stage.name}",
                "ControlAction",
                dict(name=f"DVC ran {stage.name}", instrument=steps[stage.kind], object=action),
            )
            for stage, action in zip(stages, actions, strict=True)
        ]
        sources = [
            dep
            for stage in stages
            for dep in stage.deps
            if self._run.maker(dep.path) is None and not dep.path.startswith("artifacts/")
        ]
        report = [out for stage in stages for out in stage.outs if out.path.startswith(f"{self._run.folder}/")]
        settings = {key: value for stage in stages for key, value in stage.params.items()}
        workflow["input"] = [self._formal(file) for file in sources] + [self._parameter(key, settings[key]) for key in settings]
        workflow["output"] = [self._formal(file) for file in report]
        facts = list(_facts(self._run))
        whole = self._entity(
            "#run",
            "CreateAction",
            dict(
                name=f"{self._run.lock}: every stage that led to {self._run.folder}",
                instrument=workflow,
                object=[self._data(file) for file in sources] + [self._setting(key, settings[key]) for key in settings],
                result=[self._data(file) for file in report],
                startTime=_time(min(fact["finished_unix_s"] - fact["seconds"] for fact in facts)),
                endTime=_time(max(fact["finished_unix_s"] for fact in facts)),
                actionStatus="http://schema.org/CompletedActionStatus",
                agent=crate.root_dataset["author"][0],
            ),
        )
        organized = self._entity(
            "#organized", "OrganizeAction", dict(name="dvc repro", instrument=engine, object=controls, result=whole)
        )
        organized["agent"] = crate.root_dataset["author"][0]
        crate.root_dataset["mentions"] = [whole, organized, *actions]

    def _tool(self, kind: str, stages: list[Stage]) -> Entity:
        facts = [fact for stage in stages if (fact := self._run.facts(stage))]
        versions = {(name, version) for fact in facts for name, version in fact["versions"].items()}
        versions |= {("python", fact["python"]) for fact in facts}
        needs = [
            self._entity(f"#software/{name}-{version}", "SoftwareApplication", dict(name=name, softwareVersion=version))
            for name, version in sorted(versions)
        ]
        files = {file.path: file for stage in stages for file in stage.deps if not file.path.startswith("artifacts/")}
        keys = {key: value for stage in stages for key, value in stage.params.items()}
        formal = [self._formal(file) for file in files.values()] + [self._parameter(key, value) for key, value in keys.items()]
        tool = self._entity(
            f"#tool/{kind}", "SoftwareApplication", dict(name=f"{self._project['name']} {kind}", softwareRequirements=needs)
        )
        tool["softwareVersion"], tool["input"] = self._project["version"], formal
        return tool

    def _action(self, stage: Stage, tool: Entity) -> Entity:
        action = self._entity(
            f"#run/{stage.name}",
            "CreateAction",
            dict(
                name=stage.name,
                description=f"ran `{stage.command}`",
                instrument=tool,
                object=[self._data(dep) for dep in stage.deps]
                + [self._setting(key, value) for key, value in stage.params.items()],
                result=[self._data(out) for out in stage.outs],
                actionStatus="http://schema.org/CompletedActionStatus",
                agent=self._crate.root_dataset["author"][0],
            ),
        )
        facts = self._run.facts(stage)
        if facts is not None:
            action["startTime"] = _time(facts["finished_unix_s"] - facts["seconds"])
            action["endTime"] = _time(facts["finished_unix_s"])
            action["resourceUsage"] = [
                self._entity(
                    f"#usage/{stage.name}/{name}",
                    "PropertyValue",
                    {"name": name, "value": str(facts[name]), "propertyID": kind, "unitCode": unit},
                )
                for name, (kind, unit) in USAGE.items()
            ]
            action["description"] += f" on {facts['machine']}"
        return action

    def _data(self, file: File) -> Entity:
        """The entity of a file or folder of dvc.lock; sources that the crate does not hold are named by their hash."""
        sha, digests = self._run.disk.sha256(file.path), self._run.disk.files(file.path)
        about = {
            "name": file.path,
            "sha256": sha,
            "contentSize": str(file.size),
            "description": f"md5 {file.md5}, as {self._run.lock} has it",
        }
        if file.path.startswith(("data/", "experiments/")) or file.path == "data":
            return self._named(sha, "Dataset", about)
        if "" in digests:
            return self._file(file.path, about)
        found = self._crate.get(f"{file.path}/")
        if found is None:
            found = self._crate.add_dataset(dest_path=file.path, properties=about)
            inner = [
                self._file(f"{file.path}/{name}", {"name": name, "sha256": digest.sha256}) for name, digest in digests.items()
            ]
            found["hasPart"] = inner
        return found

    def _file(self, path: str, about: Mapping[str, Any]) -> Entity:
        found = self._crate.get(path)
        if found is None:
            digest = self._run.disk.files(path)[""]
            about = {
                "contentSize": str(digest.size),
                "sha256": digest.sha256,
                **about,
                "name": path,
                "encodingFormat": _kind(path),
            }
            if digest.size > LARGEST_BYTES:
                return self._named(digest.sha256, "File", about)
            found = self._crate.add_file(path, path, properties=about)
        return found

    def _named(self, sha: str, kind: str, about: Mapping[str, Any]) -> Entity:
        """Bytes that the crate does not hold."""
        from rocrate.model import DataEntity

        found = self._crate.get(f"hash://sha256/{sha}")
        return found or self._crate.add(DataEntity(self._crate, f"hash://sha256/{sha}", {"@type": kind, **about}))

    def _formal(self, file: File) -> Entity:
        return self._slot(f"#path/{file.path}", file.path, "Dataset" if file.nfiles else "File", self._data(file))

    def _parameter(self, key: str, value: Any) -> Entity:
        return self._slot(f"#parameter/{key}", key, "PropertyValue", self._setting(key, value))

    def _slot(self, identity: str, name: str, kind: str, filled: Entity) -> Entity:
        """What a tool takes or gives, and what it was in this run."""
        slot = self._entity(identity, "FormalParameter", {"name": name, "additionalType": kind, "workExample": filled})
        filled["exampleOfWork"] = slot
        return slot

    def _setting(self, key: str, value: Any) -> Entity:
        return self._entity(f"#setting/{key}", "PropertyValue", dict(name=key, value=json.dumps(value, sort_keys=True)))

    def _version(self, name: str) -> str:
        return next(fact["versions"][name] for fact in _facts(self._run))

    def _entity(self, name: str, kind: str, properties: Mapping[str, Any]) -> Entity:
        """A contextual entity; the one that has this name already, where there is one."""
        from rocrate.model import ContextEntity

        found = self._crate.get(name)
        return found or self._crate.add(ContextEntity(self._crate, name, {"@type": kind, **properties}))


def _kind(path: str) -> str:
    return KINDS.get(Path(path).suffix, OTHER)


def _facts(run: Run) -> Iterator[dict[str, Any]]:
    """Of every stage whose run is known.

    Raises:
        UserError: none is.
    """
    known = [facts for stage in run.stages.values() if (facts := run.facts(stage))]
    if not known:
        raise UserError(f"{run.folder}/runs.json tells of no stage, and a crate says when and where each ran: run `dvc repro`")
    yield from known


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(round(unix_s), UTC).isoformat()
