"""A run as its lock records it: which stage wrote a file from which inputs, and which results came of it; findings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config, provenance
from scaling4d.audit.disk import Disk
from scaling4d.checkpoint import INDEX, WEIGHTS
from scaling4d.provenance import LOCK, LockedFile, LockedStage, differences, is_below, overlap, read_lock
from scaling4d.records import UserError, as_user_error, on_one_line

WRONG, NOTE, UNCHECKED = "wrong", "note", "not checked"
SOURCE, CODE, BENCHMARKS = "src/scaling4d", artifacts.CODE.as_posix(), artifacts.BENCHMARKS.as_posix()
REPORT = "report"  # the stage
TABLES = {"results": "result.json", "pretrain": "summary.json", "reconstruct": "result.json"}  # csv -> JSON file
RESULT_KEY, INTERVAL = ("encoder", "task", "protocol"), ("low", "high", "unit", "higher_is_better")
OBJECTS = ("settings", "overrides", "inputs", "folders", "others", "modules")  # keys of records that hold objects
csv_rows = cache(provenance.parse_csv)
NOT_NUMBERS = (*RESULT_KEY, "metric", "unit", "higher_is_better", "checkpoint_sha256", "point", "method", "true_patch_statistics")


@dataclass(frozen=True)
class AuditFinding:
    """One line of `scaling4d audit`.

    kind: WRONG (evidence differs), NOTE (evidence differs and the run declares it), UNCHECKED (evidence is absent).
    affected: one line for each way from the difference to the results that it can have changed.
    """

    kind: str
    where: str
    message: str
    affected: tuple[str, ...] = ()

    def __str__(self) -> str:
        affected = "".join(f"\n{'':<12}  {on_one_line(line)}" for line in self.affected)
        return f"{self.kind:<12}{on_one_line(f'{self.where}: {self.message}')}{affected}"


def shorten(names: Sequence[str], most: int = 1) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


@dataclass(frozen=True)
class LockedRun:
    """The run of dvc.lock, the report made with it, and the files that are here.

    stages: by name; where an earlier commit made the results, those that the report needs. home: artifacts/<profile>.
    folder: of the report. settings: params.yaml; None where an earlier commit made the results.
    contradictions: how the lock differs from dvc.yaml and params.yaml -> names of the stages.
    """

    stages: Mapping[str, LockedStage]
    home: str
    folder: str
    settings: Mapping[str, Any] | None
    contradictions: Mapping[str, list[str]]
    disk: Disk

    @cached_property
    def locked_files(self) -> dict[str, dict[LockedFile, list[str]]]:
        """Path -> the versions of it in the lock -> the stages that wrote or read it so."""
        files: dict[str, dict[LockedFile, list[str]]] = {}
        for stage in self.stages.values():
            for verb, some in (("wrote", stage.outs), ("read", stage.deps)):
                for file in some:
                    files.setdefault(file.path, {}).setdefault(file, []).append(f"{stage.name} {verb} it")
        return files

    @cached_property
    def makers(self) -> dict[str, LockedStage]:
        """The stage that wrote each output."""
        return {out.path: stage for stage in self.stages.values() for out in stage.outs}

    def _readers(self, path: str) -> Iterator[tuple[LockedStage, list[str]]]:
        """The stages that read a path, a folder above it or a file inside it, and what they write.

        Stage `benchmarks` depends on a folder around the benchmarks. Of its files those count that hash the path, and
        those whose hashes are not here.
        """
        for stage in self.stages.values():
            read = [dep.path for dep in stage.deps if overlap(dep.path, path)]
            outs = [out.path for out in stage.outs]
            hashes = {file: folders for out in outs for file, folders in self.benchmark_hashes(out).items()}
            if any(overlap(folder, dep) for folders in hashes.values() for folder in folders for dep in read):
                outs = [file for file, folders in hashes.items() if not folders or any(overlap(name, path) for name in folders)]
            if read and outs:
                yield stage, outs

    def benchmark_hashes(self, path: str) -> dict[str, dict[str, str]]:
        """Files of stage `benchmarks` at or below a path -> {folder: sha256}; empty for other paths.

        Left out: the file of the probes of a pretraining that has none, which depends on no benchmark.
        """
        names = self.disk.paths(path) if f"{path}/".startswith(f"{BENCHMARKS}/") else ()
        hashes = {}
        for file in (f"{path}/{name}".rstrip("/") for name in names):
            content = self.json_object(file)
            if content.get("tasks") == []:
                continue
            folders = content.get("folders")
            folders = folders.items() if isinstance(folders, dict) else ()
            hashes[file] = {folder: sha for folder, sha in folders if isinstance(sha, str)}
        return hashes

    def table_rows(self, read: Callable[[str], str | None] | None = None) -> Iterator[tuple[str, str, int, dict[str, str]]]:
        """(key, file, line, row) of every table. Keys: `encoder/task/protocol`, `point/pretrain`, `point/reconstruct`.

        read: gives the text of a file, None: absent; default: the file on disk.
        """
        for table in TABLES:
            path = f"{self.folder}/{table}.csv"
            for line, row in enumerate(csv_rows((read or self.disk.text)(path) or ""), 2):
                words = [row.get(column) or "" for column in (RESULT_KEY if table == "results" else ("point",))]
                words += [] if table == "results" else [table]
                yield "/".join(words), path, line, row

    @cached_property
    def records(self) -> dict[str, str]:
        """Key of a row -> the JSON file that has its numbers."""
        records, keys = {}, {key for key, *_ in self.table_rows()}
        for path in self.makers:
            words = path.removeprefix(f"{self.home}/").split("/")
            if words[0] == "readout" and len(words) == 4:
                records["/".join(words[1:])] = f"{path}/{TABLES['results']}"
            elif words[0] in TABLES and f"{words[-1]}/{words[0]}" in keys:
                records[f"{words[-1]}/{words[0]}"] = f"{path}/{TABLES[words[0]]}"
        return records

    @cached_property
    def declared_overrides(self) -> dict[str, list[Any]]:
        """Setting -> its values that the artifacts and the report name as overrides.

        Of the report: stages.json, and `override KEY` of derived.json, which has those of stage `report` itself.
        """
        stages = self.json_object(f"{self.folder}/stages.json").get("stages")
        contents = [*stages.values()] if isinstance(stages, dict) else []
        contents += [self.json_object(f"{path}/{artifacts.PROVENANCE}") for path in self.makers]
        named = [content.get("overrides") for content in contents if isinstance(content, dict)]
        items = [item for overrides in named if isinstance(overrides, dict) for item in overrides.items()]
        derived = self.json_object(f"{self.folder}/derived.json").items()
        own = {key: entry for key, entry in derived if key.startswith("override ") and isinstance(entry, dict)}
        items += [(key.removeprefix("override "), entry.get("value")) for key, entry in own.items()]
        values: dict[str, list[Any]] = {}
        for key, value in items:
            values.setdefault(key, []).append(value)
        return values

    def owns(self, path: str) -> bool:
        """Whether a path is one of the run's artifacts or a file of its report."""
        return f"{path}/".startswith((f"{self.home}/", f"{self.folder}/"))

    def affected_results(self, cause: str, starts: Sequence[tuple[str, tuple[str, ...]]] | None = None) -> tuple[str, ...]:
        """One line for each way from a cause to results: `cause -> stage -> ... -> report: results`.

        Args:
            starts: (path, kinds of stages before it) of the first files that the cause changed; default: the cause is
                a path.
        """
        ways: dict[tuple[str, ...], list[str]] = {}
        waiting, passed, reached = [(cause, ())] if starts is None else list(starts), set(), set()
        while waiting:
            path, way = waiting.pop(0)
            for key in (key for key, record in self.records.items() if key not in reached and overlap(record, path)):
                reached.add(key)
                ways.setdefault(way, []).append(key)
            for stage, outs in ((stage, outs) for stage, outs in self._readers(path) if stage.name not in passed):
                passed.add(stage.name)
                longer = way if way[-1:] == (stage.kind,) else (*way, stage.kind)
                waiting += [(out, longer) for out in outs]
        return tuple(" -> ".join((cause, *way, f"{self.folder}: {shorten(keys, 6)}")) for way, keys in ways.items())

    def outs_of_setting(self, key: str) -> list[tuple[str, tuple[str, ...]]]:
        """(path, stage) of the files that a setting changes, as `affected_results` starts."""
        stages = [s for s in self.stages.values() if any(is_below(key, [name]) or is_below(name, [key]) for name in s.params)]
        return [(out.path, (stage.kind,)) for stage in stages for out in stage.outs]

    def json(self, path: str) -> Any:
        """Content of a JSON file; None: not here, or damaged (a finding of its own)."""
        return parse_json(self.disk.text(path) or "null")

    def json_object(self, path: str) -> dict[str, Any]:
        """Content of a JSON file that holds an object, without damaged OBJECTS in it; empty: not here, or damaged."""
        content = self.json(path)
        items = content.items() if isinstance(content, dict) else ()
        return {key: value for key, value in items if key not in OBJECTS or isinstance(value, dict)}

    def shards(self, path: str) -> dict[str, str]:
        """sha256 by name of the files of a clips folder by its croissant.json; empty for other folders."""
        distribution = self.json_object(f"{path}/croissant.json").get("distribution", ())
        entries = [entry for entry in (distribution if isinstance(distribution, list) else ()) if isinstance(entry, dict)]
        return {entry["@id"]: entry["sha256"] for entry in entries if has_texts(entry, "@id", "sha256")}

    def weights(self, encoder: str) -> str:
        """Path of an encoder's weights, or of the index that has the hashes of their files."""
        folder = f"{self.home}/pretrain/{encoder}"
        return f"{folder}/{INDEX if self.disk.paths(f'{folder}/{INDEX}') else WEIGHTS}"

    def environment(self, stage: LockedStage, runs_json: str | None = None) -> dict[str, Any] | None:
        """Time, machine and versions of a stage by the report's runs.json, or by the text of another; None: unknown."""
        content = parse_json(runs_json or self.disk.text(f"{self.folder}/runs.json") or "{}")
        runs = content.get("runs") if isinstance(content, dict) else ()
        runs = [run for run in (runs if isinstance(runs, list) else ()) if isinstance(run, dict) and _is_run(run)]
        by_stage = {run["stage"]: run for run in reversed(runs)}
        for out in stage.outs:
            words = out.path.removeprefix(f"{self.home}/").split("/")
            name = "-".join(("baseline", words[-1]) if stage.kind.startswith("baseline") else words)
            if (name := stage.name if out.path.startswith(f"{self.folder}/") else name) in by_stage:
                return by_stage[name]
        return None


def find_maker(makers: Mapping[str, LockedStage], path: str) -> LockedStage | None:
    """The stage that wrote a path or a folder above it. makers: the stage that wrote each output."""
    return next((makers[p] for p in (path, *map(str, Path(path).parents)) if p in makers), None)


def dvc_cache() -> Path:
    """DVC's cache of the project in the current folder."""
    return _dvc_cache(Path.cwd())


@cache
def _dvc_cache(folder: Path) -> Path:
    from scaling4d.studies.run import dvc_cache_folder

    return dvc_cache_folder()  # starts DVC


def has_texts(entry: Mapping[str, Any], *keys: str) -> bool:
    """Whether an entry of a record has texts under these keys."""
    return all(isinstance(entry.get(key), str) for key in keys)


def _is_run(run: Mapping[str, Any]) -> bool:
    """Whether an entry of runs.json has the types that the audit needs."""
    versions = run.get("versions")
    return has_texts(run, "stage", "out_sha256") and isinstance(versions, dict) and has_texts(versions, *versions)


def row_numbers(row: Mapping[str, str]) -> dict[str, str]:
    """Name -> text of the numbers in a row of a table: a result's value by its metric, every number of another row."""
    if "metric" in row:
        return {row["metric"]: row.get("value", "")}
    return {column: text for column, text in row.items() if column not in NOT_NUMBERS}


def recorded_row(record: Mapping[str, Any], row: Mapping[str, str]) -> dict[str, Any]:
    """The columns of a row as its JSON file has them. Interval, unit and direction belong to the metric of a result."""
    if "metric" not in row:
        return {column: record.get(column, "") for column in row if column != "point"}
    columns = {column: record.get(column) for column in ("parameters", "examples", "seed", "checkpoint_sha256")}
    if row["metric"] == record.get("metric"):
        return columns | {column: record.get(column) for column in ("value", *INTERVAL)}
    return columns | dict.fromkeys(INTERVAL, "") | {"value": (record.get("others") or {}).get(row["metric"])}


@cache
def parse_json(text: str) -> Any:
    """Content of a JSON text; None: damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def locked_run() -> LockedRun:
    """The run of the current folder.

    Raises:
        UserError: no project here, dvc.yaml does not resolve, or the lock is damaged.
    """
    settings = config.read()
    stages, contradictions = _pipeline()
    with as_user_error(config.PARAMS):
        home, folder = artifacts.home(settings).as_posix(), Path(config.section(settings, "report.folder")).as_posix()
    imports = {
        stage.outs[0].path: stage.deps[0].path
        for name, stage in stages.items()
        if name.endswith(".dvc") and stage.deps and stage.outs
    }
    return LockedRun(stages, home, folder, settings, contradictions, Disk(imports))


def without_leftovers(locked: Mapping[str, LockedStage], today: Mapping[str, LockedStage]) -> dict[str, LockedStage]:
    """The stages of a lock without those of a still earlier run, which DVC never removes.

    A leftover is a stage that today's settings do not have, and that read other code than stage `code` wrote. Others
    that today's settings do not have are of the run, on their own data.
    """
    written = {out.path: out.md5 for out in locked["code"].outs} if "code" in locked else {}
    stages = {}
    for name, stage in locked.items():
        read = {dep.path: dep.md5 for dep in stage.deps if dep.path in written}
        if name in today or all(md5 == written[path] for path, md5 in read.items()):
            stages[name] = stage
    return stages


def _pipeline() -> tuple[dict[str, LockedStage], dict[str, list[str]]]:
    """Stages of dvc.lock and of the .dvc files, and every contradiction to dvc.yaml and params.yaml -> names of stages.

    A stage of dvc.lock that dvc.yaml no longer has is left out, as DVC does.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    locked = read_lock(LOCK) if LOCK.is_file() else {}
    with as_user_error(config.PARAMS):
        settings = provenance.load_yaml(config.PARAMS.read_text())
    stages, contradictions = {}, {}
    try:
        with Repo(".") as repo:
            with as_user_error("DVC cannot read the pipeline"):
                known = repo.index.stages
            for stage in (stage for stage in known if "/" not in stage.path_in_repo):  # others: crates
                name, messages = stage.addressing, [f"{LOCK} does not have this stage: run `dvc repro`"]
                if stage.path_in_repo != "dvc.yaml":
                    stages |= read_lock(Path(name))
                    edited = stage.md5 != stage.compute_md5()
                    messages = ["its md5 does not fit its content: take the file from git again"] if edited else []
                elif name in locked:
                    stages[name] = locked[name]
                    messages = [f"{text}: run `dvc repro`" for text in _differ(locked[name], stage, settings)]
                for message in messages:
                    contradictions.setdefault(message, []).append(name)
    except (DvcException, AssertionError) as error:  # AssertionError: of DVC, about a damaged .dvc file
        raise UserError(f"DVC cannot read the pipeline: {' '.join(str(error).split())}") from error
    return stages, contradictions


def _differ(locked: LockedStage, declared: Any, settings: Mapping[str, Any]) -> Iterator[str]:
    """How a locked stage differs from dvc.yaml and params.yaml. declared: DVC's own stage."""
    if locked.command != declared.cmd:
        yield f"{LOCK} has the command `{locked.command}`, dvc.yaml `{declared.cmd}`"
    keys = [key for dep in declared.deps for key in getattr(dep, "params", ())]
    for key, value, other in differences(locked.params, config.declared(settings, keys)):
        yield f"{LOCK} has {key} = {value!r}, params.yaml {other!r}"
    deps = {dep.def_path for dep in declared.deps if not hasattr(dep, "params")}
    outs = {out.def_path for out in declared.outs}
    for verb, some, others in (("reads", locked.deps, deps), ("writes", locked.outs, outs)):
        if (paths := {file.path for file in some}) != others:
            one, other = (", ".join(sorted(group)) or "nothing else" for group in (paths - others, others - paths))
            yield f"by {LOCK} it {verb} {one}; by dvc.yaml {other}"
