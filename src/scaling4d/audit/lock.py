"""dvc.lock as data, and DVC's hashes computed anew from the bytes on disk, whatever DVC's own caches believe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from scaling4d.records import UserError

CACHE = Path(".dvc/cache/files/md5")


@dataclass(frozen=True)
class File:
    """A file or folder that a stage reads or writes. md5: as DVC writes it, with `.dir` at the end for a folder."""

    path: str
    md5: str


@dataclass(frozen=True)
class Stage:
    """A locked stage: what it ran, read and wrote."""

    name: str
    command: str
    deps: tuple[File, ...]
    outs: tuple[File, ...]
    params: Mapping[str, Any]


def stages(root: Path) -> tuple[dict[str, Stage], list[str]]:
    """The locked stages that dvc.yaml still has (data.dvc among them), and the names of stages that were never run.

    Raises:
        UserError: no DVC repository, or a dvc.yaml that does not resolve.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            known = [stage.addressing for stage in repo.index.stages if stage.path_in_repo == "dvc.yaml"]
    except DvcException as error:
        raise UserError(f"{root}: DVC cannot read the pipeline: {error}") from error
    path = root / "dvc.lock"
    try:
        locked = _load(path)["stages"] if path.is_file() else {}
        found = {name: _stage(name, locked[name]) for name in known if name in locked}
        for imported in sorted(root.glob("*.dvc")):
            if imported.is_file():
                found[imported.name] = _stage(imported.name, _load(imported))
    except (YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} or a .dvc file is damaged: {str(error).splitlines()[0]}; take it from git again") from error
    return found, [name for name in known if name not in locked]


def md5(path: Path, ignored: frozenset[str]) -> str:
    """Of a file's bytes; of a folder as DVC does it: md5 over the sorted list of its files' md5s, and `.dir`."""
    if path.is_file():
        return _file(path)
    return hashlib.md5(json.dumps(_listing(path, ignored), sort_keys=True).encode()).hexdigest() + ".dir"


def changed(root: Path, file: File, ignored: frozenset[str]) -> list[str]:
    """Which files inside a changed folder differ from its listing in DVC's cache; empty where the cache does not hold it."""
    listing = root / CACHE / file.md5[:2] / file.md5[2:]
    if not file.md5.endswith(".dir") or not listing.is_file():
        return []
    was = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_text())}
    now = {entry["relpath"]: entry["md5"] for entry in _listing(root / file.path, ignored)}
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def ignored_names(root: Path) -> frozenset[str]:
    """The patterns of .dvcignore; plain names of files and folders, the only kind that this project has there."""
    path = root / ".dvcignore"
    lines = path.read_text().splitlines() if path.is_file() else []
    return frozenset(line.strip().rstrip("/") for line in lines if line.strip() and not line.startswith("#"))


def _load(path: Path) -> Any:
    """As DVC writes it, YAML 1.2, in which 3e-06 is a number."""
    return YAML(typ="safe", pure=True).load(path.read_text())


def _stage(name: str, content: Mapping[str, Any]) -> Stage:
    params = content.get("params") or {}
    return Stage(
        name=name,
        command=content.get("cmd", f"dvc update {name}" if name.endswith(".dvc") else ""),
        deps=tuple(File(entry["path"], entry["md5"]) for entry in content.get("deps") or () if "md5" in entry),
        outs=tuple(File(entry["path"], entry["md5"]) for entry in content.get("outs") or () if "md5" in entry),
        params=params.get("params.yaml", {}) if isinstance(params, Mapping) else {},
    )


def _listing(folder: Path, ignored: frozenset[str]) -> list[dict[str, str]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    kept = (path for path in files if not any(fnmatch(part, p) for part in path.relative_to(folder).parts for p in ignored))
    entries = ({"md5": _file(path), "relpath": path.relative_to(folder).as_posix()} for path in kept)
    return sorted(entries, key=lambda entry: entry["relpath"])


def _file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
