"""dvc.lock as data: what every stage ran, read and wrote, and what dvc.yaml says that it should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from scaling4d import config
from scaling4d.records import UserError

LOCK = Path("dvc.lock")
MISSING = "missing"


@dataclass(frozen=True)
class File:
    """A file or folder that a stage reads or writes. md5: as DVC writes it, with `.dir` at the end for a folder; size: bytes."""

    path: str
    md5: str
    size: int
    nfiles: int | None


@dataclass(frozen=True)
class Stage:
    """A locked stage: what it ran, read and wrote, by dvc.lock or a .dvc file."""

    name: str
    command: str
    deps: tuple[File, ...]
    outs: tuple[File, ...]
    params: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The stage as dvc.yaml has it: `readout_frozen` of `readout_frozen@nano-depth`."""
        return self.name.split("@")[0]


def read(path: Path) -> dict[str, Stage]:
    """Every stage of a lock file; raises UserError where it is damaged."""
    return parse(path.read_text(), path)


def parse(text: str, path: Path) -> dict[str, Stage]:
    """Every stage of a lock's text. path: for messages.

    Raises:
        UserError: it is damaged.
    """
    with _damage(path):
        content = _load(text)
        if content.get("schema") != "2.0":
            raise ValueError(f"schema {content.get('schema')!r}, needed '2.0'")
        return {name: _stage(name, stage) for name, stage in content["stages"].items()}


def imported(name: str, text: str) -> dict[str, Stage]:
    """What a .dvc file brings, as a stage; `dvc update` runs it.

    Raises:
        UserError: it is damaged.
    """
    with _damage(Path(name)):
        return {name: _stage(name, {"cmd": f"dvc update {name}", **_load(text)})}


def pipeline() -> tuple[dict[str, Stage], list[tuple[str, str]]]:
    """The stages of dvc.lock and the .dvc files here, and every contradiction to dvc.yaml: (name, what differs).

    A stage of dvc.lock that dvc.yaml no longer has is left out, as DVC does; one that never ran is a contradiction.

    Raises:
        UserError: no DVC repository, a dvc.yaml that does not resolve, or a damaged lock.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    locked = read(LOCK) if LOCK.is_file() else {}
    settings = _load(config.PARAMS.read_text())
    stages, differ = {}, []
    try:
        with Repo(".") as repo:
            for stage in repo.index.stages:
                name = stage.addressing
                if "/" in stage.path_in_repo:  # of a crate or a copy that lies in here: another pipeline
                    continue
                if stage.path_in_repo != "dvc.yaml":
                    stages |= imported(name, Path(name).read_text())
                    if stage.md5 != stage.compute_md5():
                        differ.append(
                            (name, "its own md5 is not that of its content: it was edited by hand; take it from git again")
                        )
                elif name not in locked:
                    differ.append((name, "not in dvc.lock, so it was never run: run `dvc repro`"))
                else:
                    stages[name] = locked[name]
                    differ += [(name, what) for what in _differs(locked[name], stage, settings)]
    except DvcException as error:
        raise UserError(f"DVC cannot read the pipeline: {' '.join(str(error).split())}") from error
    return stages, differ


def _differs(locked: Stage, wanted: Any, settings: Mapping[str, Any]) -> Iterator[str]:
    """wanted: DVC's own stage, from dvc.yaml. settings: params.yaml."""
    if locked.command != wanted.cmd:
        yield f"dvc.lock says that it ran `{locked.command}`, dvc.yaml says `{wanted.cmd}`: run `dvc repro`"
    declared = config.declared(settings, [key for dep in wanted.deps for key in getattr(dep, "params", ())])
    for key, was, is_ in unequal(locked.params, declared):
        yield f"dvc.lock says {key} = {was!r}, params.yaml says {is_!r}: run `dvc repro`"
    deps = {dep.def_path for dep in wanted.deps if not hasattr(dep, "params")}
    for word, mine, theirs in (
        ("reads", {dep.path for dep in locked.deps}, deps),
        ("writes", {out.path for out in locked.outs}, {out.def_path for out in wanted.outs}),
    ):
        if mine != theirs:
            extra, missing = ", ".join(sorted(mine - theirs)) or "nothing", ", ".join(sorted(theirs - mine)) or "nothing"
            yield f"dvc.lock says that it {word} {extra} where dvc.yaml says {missing}: run `dvc repro`"


def unequal(some: Mapping[str, Any], others: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, other value) wherever two groups of settings differ; `missing` where one has no such key."""
    for key in sorted(some.keys() | others.keys()):
        one, other = some.get(key, MISSING), others.get(key, MISSING)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from ((f"{key}.{inner}", *values) for inner, *values in unequal(one, other))
        elif one != other:
            yield key, one, other


def _stage(name: str, content: Mapping[str, Any]) -> Stage:
    params = content.get("params") or {}
    if params.keys() - {"params.yaml"}:
        raise ValueError(f"{name} has settings of {', '.join(params)}, needed params.yaml")
    return Stage(
        name=name,
        command=content["cmd"],
        deps=tuple(map(_file, content.get("deps") or ())),
        outs=tuple(map(_file, content.get("outs") or ())),
        params=params.get("params.yaml", {}),
    )


def _file(entry: Mapping[str, Any]) -> File:
    if entry.get("hash") != "md5":
        raise ValueError(f"{entry['path']} has a hash of kind {entry.get('hash')!r}, needed md5")
    return File(entry["path"], entry["md5"], entry["size"], entry.get("nfiles"))


def _load(text: str) -> Any:
    """As DVC writes it, YAML 1.2, in which 3e-06 is a number."""
    return YAML(typ="safe", pure=True).load(text)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns what a damaged lock file raises into one line."""
    try:
        yield
    except (YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}; take it from git again") from error
