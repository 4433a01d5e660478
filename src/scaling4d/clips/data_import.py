"""Commands `scaling4d data use PATH` and, for videos, `scaling4d data check PATH`."""

from __future__ import annotations

from pathlib import Path

from scaling4d import provenance, video
from scaling4d.clips.sources import SourceFile, list_sources, printable_path
from scaling4d.records import UserError

DATA = Path("data")
IMPORT = Path("data.dvc")
MAX_PROBLEMS = 10  # that a check lists


def use_data(path: Path) -> None:
    """Make `data.dvc` import `path`: the next `dvc repro` copies it to `data/`. Nothing is copied or removed here.

    Raises UserError: not a data set (needed `videos/` with files, `benchmarks/` or both), an overlap with `data/`,
    changes in `data/` that an import would remove, or no `data.dvc` here.
    """
    import yaml
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    if not IMPORT.is_file():
        raise UserError(f"no {IMPORT} in {Path.cwd()}; run inside the project")
    damaged = UserError(f"{IMPORT} is not an import to {DATA}/; restore it with `git checkout {IMPORT}`")
    try:
        content = yaml.safe_load(IMPORT.read_text())
        outs, sources = [out["path"] for out in content["outs"]], [dep["path"] for dep in content["deps"]]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise damaged from error
    if outs != [DATA.as_posix()] or len(sources) != 1:
        raise damaged
    target, data, project = path.resolve(), DATA.resolve(), Path.cwd().resolve()
    if target.is_relative_to(data) or data.is_relative_to(target):
        raise UserError(f"{path} overlaps {DATA}/, which an import overwrites; move your data out of it and name its new place")
    _check_layout(path)
    try:
        with Repo() as repo:
            status = repo.status(targets=[IMPORT.as_posix()]) if DATA.exists() else {}
    except DvcException as error:
        raise UserError(f"DVC cannot read this project: {error}") from error
    states = [entry["changed outs"] for entry in status.get(IMPORT.as_posix(), []) if "changed outs" in entry]
    if any(state in ("modified", "new") for outs in states for state in outs.values()):
        changed = "was changed since its import, and a new import would replace it"
        raise UserError(f"{DATA}/ {changed}; move your files out, then retry")
    name = (target.relative_to(project) if target.is_relative_to(project) else target).as_posix()
    content |= {"deps": [{"path": name}]}  # without a hash: DVC imports it anew
    content = {key: value for key, value in content.items() if key not in ("md5", "frozen")}
    provenance.write_text(IMPORT, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def check_videos(path: Path) -> list[str]:
    """Print how many files `path/videos` holds and how many open as videos. Returns the first problems, a line each."""
    sources, problems = _check_layout(path), []
    if not (path / "videos").is_dir():
        print("videos: none")
        return []
    for source in sources:
        name = f"videos/{printable_path(source.path)}"
        if source.refused is not None:
            problems.append(f"{name}: {source.refused.reason}: {source.refused.detail}")
            continue
        try:
            video.probe(source.location(path / "videos"), sha256="")
        except (video.VideoError, OSError) as error:
            problems.append(f"{name}: {error}")
    readable = len(sources) - len(problems)
    print(f"videos: {len(sources)} files, {readable} open as videos; `scaling4d clips --dry` decodes them all")
    more = len(problems) - MAX_PROBLEMS
    return problems[:MAX_PROBLEMS] + ([f"videos: {more} more files do not open"] if more > 0 else [])


def _check_layout(path: Path) -> list[SourceFile]:
    """The files of its folder videos."""
    if not path.is_dir():
        raise UserError(f"no folder {path}; needed a folder with videos/, benchmarks/ or both")
    if not (path / "videos").is_dir() and not (path / "benchmarks").is_dir():
        names = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
        content = f"it holds {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else "it is empty"
        raise UserError(f"{path} has neither videos/ nor benchmarks/ ({content}); move your videos to {path / 'videos'}/")
    return list_sources(path / "videos") if (path / "videos").is_dir() else []
