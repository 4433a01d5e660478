"""Commands `scaling4d data use PATH` and, for videos, `scaling4d data check PATH`.

`data.dvc` names the folder that `data/` stands for, in one of two ways:

* A folder of the project with videos/, benchmarks/ or both, and plain files alone: an import. `dvc repro` copies it to
  `data/`, and DVC keeps one more copy in its cache (shared with `data/` by reflinks, or as DVC's `cache.type` says).
* Any other folder: links. `data use` makes `data/` a tree of folders with one link for each file. DVC hashes the files
  through the links, where they lie, and copies nothing (`cache: false`). `dvc status` and `dvc repro` see a changed or
  removed file; a new one needs `data use` again. DVC cannot bring such data to another folder: `dvc exp run --temp`
  and `--queue` stop with "missing data source"; a study links them in its clones. What DVC cannot read is left out of
  `data/`, and so of the tables of curation; `data use`, `data check` and `clips --dry` list it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling4d import provenance, video
from scaling4d.clips.sources import FolderFile, Rejection, list_sources, printable_path, walk_files
from scaling4d.records import UserError, on_one_line, remedy

DATA = Path("data")
IMPORT = Path("data.dvc")
LAYOUT = ("videos", "benchmarks")  # folders of data/ that the stages read
MAX_PROBLEMS = 10  # of videos that do not open, that a check lists


@dataclass(frozen=True)
class DataFolder:
    """A folder of the user. bare: without videos/ and benchmarks/, so that the folder itself is that of the videos."""

    path: Path
    bare: bool
    files: tuple[FolderFile, ...]

    @property
    def videos(self) -> Path:
        return self.path if self.bare else self.path / "videos"

    @property
    def usable(self) -> list[FolderFile]:
        return [file for file in self.files if file.refused is None]

    def name(self, file: FolderFile) -> str:
        """Path below `data/`."""
        return f"videos/{file.path}" if self.bare else file.path

    @property
    def problems(self) -> list[str]:
        """A line for each file that is left out."""
        return [_problem(self.name(file), file.refused) for file in self.files if file.refused is not None]

    def counts(self) -> str:
        """Of the usable files: videos, benchmarks, bytes, links; of the others: how many."""
        usable = self.usable
        parts = [self.name(file).split("/") for file in usable]
        videos = sum(part[0] == "videos" for part in parts)
        benchmarks = len({part[1] for part in parts if part[0] == "benchmarks" and len(part) > 2})
        size = sum(os.stat(self.path / file.path).st_size for file in usable)
        linked, left_out = sum(file.linked for file in usable), len(self.files) - len(usable)
        text = f"{len(usable):,} files ({videos:,} below videos/), {size:,} bytes, {benchmarks} benchmarks"
        return f"{text}; {linked:,} of the files through links; {left_out:,} others left out"


def read_folder(path: Path) -> DataFolder:
    """Walk a folder once. Raises UserError: no such folder, or no file in its videos/ and benchmarks/."""
    if not path.is_dir():
        raise UserError(f"no folder {path}; needed a folder of videos, or one with videos/, benchmarks/ or both")
    folder = DataFolder(path, not any((path / name).is_dir() for name in LAYOUT), tuple(walk_files(path)))
    if not any(folder.name(file).startswith(tuple(f"{name}/" for name in LAYOUT)) for file in folder.files):
        raise UserError(f"{path} holds no files; needed a folder of videos, or one with videos/, benchmarks/ or both")
    return folder


def use_data(path: Path) -> None:
    """Make `data.dvc` name `path`, see above, and print what it holds. Nothing below `path` is written.

    Raises UserError: no usable file, an overlap with `data/`, files in `data/` that would be lost, no `data.dvc` here.
    """
    import yaml

    content = _read_import(Path())
    target, data, project = path.resolve(), DATA.resolve(), Path.cwd().resolve()
    if target.is_relative_to(data) or data.is_relative_to(target):
        raise UserError(f"{path} overlaps {DATA}/, which an import overwrites; move your data out of it and name its new place")
    if printable_path(str(target)) != str(target):
        raise UserError(f"{printable_path(str(target))} is not UTF-8, as {IMPORT} needs; rename the folder")
    folder = read_folder(path)
    if not folder.usable:
        raise UserError(f"{path} holds no files that can be read ({folder.problems[0]}); see `scaling4d data check {path}`")
    _check_nothing_lost()
    inside = target.is_relative_to(project)
    name = (target.relative_to(project) if inside else target).as_posix()
    if inside and not folder.bare and not any(file.linked or file.refused for file in folder.files):
        out = {key: value for key, value in content["outs"][0].items() if key != "cache"}
        content = {"deps": [{"path": name}], "outs": [out]}  # without a hash: DVC imports it anew
        next_step = f"`dvc repro` copies it to {DATA}/, and once more to DVC's cache"
    else:
        content = {"outs": [{"path": DATA.as_posix(), "cache": False, "hash": "md5"}], "meta": {"path": name}}
        _write_links(folder, DATA)
        next_step = f"{DATA}/ links to its files and `dvc repro` copies none; files that you add need this command again"
    provenance.write_text(IMPORT, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    for line in folder.problems:
        print(f"left out: {on_one_line(line)}")
    shown = on_one_line(path)
    print(f"{shown}: {folder.counts()}\n{IMPORT} now names {shown}: {next_step}")


def restore_links(project: Path) -> None:
    """Make the links of `data/` in a clone of this project, where `data.dvc` says so."""
    if path := _linked_path(_read_import(project)):
        _write_links(read_folder(Path(path)), project / DATA)


def used_folder() -> DataFolder:
    """The folder that `data.dvc` names, whatever lies in `data/`."""
    content = _read_import(Path())
    with remedy(UserError, f"{IMPORT} names it; choose another with `scaling4d data use PATH`"):
        return read_folder(Path(_linked_path(content) or content["deps"][0]["path"]))


def check_videos(path: Path) -> list[str]:
    """Print what `data use` takes of `path`, and how many files open as videos. Returns problems, a line each."""
    folder = read_folder(path)
    print(f"{on_one_line(path)}: {folder.counts()}")
    left_out, unopened = folder.problems, []
    if not any(folder.name(file).startswith("videos/") for file in folder.files):
        print("videos: none")
        return left_out
    sources = list_sources(folder.videos)
    for source in sources:
        name = f"videos/{source.path}"
        if source.refused is not None:
            unopened.append(_problem(name, source.refused))
            continue
        try:
            video.probe(source.location(folder.videos), sha256="")
        except (video.VideoError, OSError) as error:
            unopened.append(f"{printable_path(name)}: {error}")
    readable = len(sources) - len(unopened)
    unopened = [line for line in unopened if line not in set(left_out)]
    print(f"videos: {len(sources)} files, {readable} open as videos; `scaling4d clips --dry` decodes them all")
    more = len(unopened) - MAX_PROBLEMS
    return left_out + unopened[:MAX_PROBLEMS] + ([f"videos: {more} more files do not open"] if more > 0 else [])


def _problem(name: str, refused: Rejection) -> str:
    return f"{printable_path(name)}: {refused.reason}{refused.detail and f': {refused.detail}'}"


def _read_import(project: Path) -> dict[str, Any]:
    """data.dvc, an import or a name of links."""
    import yaml

    if not (project / IMPORT).is_file():
        raise UserError(f"no {IMPORT} in {project.resolve()}; run inside the project")
    damaged = UserError(f"{IMPORT} is not an import to {DATA}/; restore it with `git checkout {IMPORT}`")
    try:
        content = yaml.safe_load((project / IMPORT).read_text())
        outs, sources = [out["path"] for out in content["outs"]], [dep["path"] for dep in content.get("deps", ())]
        linked = _linked_path(content)
    except (yaml.YAMLError, UnicodeError, TypeError, KeyError, AttributeError) as error:
        raise damaged from error
    if outs != [DATA.as_posix()] or len([*sources, *([linked] if linked else [])]) != 1:
        raise damaged
    return content


def _linked_path(content: Mapping[str, Any]) -> str | None:
    return content.get("meta", {}).get("path")


def _check_nothing_lost() -> None:
    """Raises UserError: `data/` has files that are neither links nor of DVC's import."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    if DATA.is_symlink():
        raise UserError(f"{DATA} is a link, and an import would replace it; remove the link, then retry")
    if not any(not os.path.islink(Path(folder, name)) for folder, _, names in os.walk(DATA) for name in names):
        return
    try:
        with Repo() as repo, repo.lock:  # Repo.status would also read the folder of the last import, and wait for its pipes
            states = [state for out in repo.stage.load_one(IMPORT.as_posix()).outs for state in out.status().values()]
    except DvcException as error:
        raise UserError(f"DVC cannot read this project: {error}") from error
    if {"modified", "new"} & set(states):
        changed = "was changed since its import, and a new import would replace it"
        raise UserError(f"{DATA}/ {changed}; move your files out, then retry")


def _write_links(folder: DataFolder, out: Path) -> None:
    """Make `out` a tree of plain folders with a link for each usable file."""
    root = folder.path.resolve()
    with provenance.atomic_folder(out) as partial:
        for file in folder.usable:
            link = partial / folder.name(file)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(root / file.path)
