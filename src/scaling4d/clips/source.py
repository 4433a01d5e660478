"""Where the data comes from: `scaling4d data use PATH` and the videos part of `data check PATH`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scaling4d import video
from scaling4d.clips.inputs import walk
from scaling4d.records import UserError

DATA = Path("data")
IMPORT = Path("data.dvc")
SHOWN = 10  # problems that a check lists


def use(path: Path) -> None:
    """Make `data.dvc` import `path`, so that the next `dvc repro` copies it to `data/`; nothing is copied or removed here.

    Raises:
        UserError: not a data set (needed `videos/` with files, `benchmarks/`, or both), it overlaps `data/`, `data/` holds
            changes that an import would remove, or there is no `data.dvc` here.
    """
    content = _read()
    wanted, held = path.resolve(), DATA.resolve()
    if wanted.is_relative_to(held) or held.is_relative_to(wanted):
        raise UserError(f"{path} overlaps {DATA}/, which an import overwrites; move your data out of it and name its new place")
    _layout(path)
    _unchanged()
    inside = wanted.is_relative_to(Path.cwd().resolve())
    name = wanted.relative_to(Path.cwd().resolve()).as_posix() if inside else wanted.as_posix()
    content["deps"] = [{"path": name}]  # without a hash, so that DVC imports it anew
    content.pop("md5", None)
    content.pop("frozen", None)
    _write(content)


def check_videos(path: Path) -> list[str]:
    """Print how many files `path/videos` holds and how many open as videos; return the first problems, one line each."""
    _layout(path)
    if not (path / "videos").is_dir():
        print("videos: none")
        return []
    names = walk(path / "videos")
    problems = []
    for item in names:
        name = os.fsencode(item.path).decode("utf-8", "backslashreplace")
        if item.refused is not None:
            problems.append(f"videos/{name}: {item.refused.reason}: {item.refused.detail}")
            continue
        try:
            video.probe(item.source(path / "videos"), sha256="")
        except (video.VideoError, OSError) as error:
            problems.append(f"videos/{name}: {error}")
    print(f"videos: {len(names)} files, {len(names) - len(problems)} open as videos; `scaling4d clips --dry` decodes them all")
    more = len(problems) - SHOWN
    return problems[:SHOWN] + ([f"videos: {more} more files do not open"] if more > 0 else [])


def _layout(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"no folder {path}; needed a folder with videos/, benchmarks/ or both")
    if not (path / "videos").is_dir() and not (path / "benchmarks").is_dir():
        names = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
        found = f"it holds {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else "it is empty"
        raise UserError(f"{path} has neither videos/ nor benchmarks/ ({found}); move your videos to {path / 'videos'}/")
    if (path / "videos").is_dir():
        walk(path / "videos")


def _read() -> dict[str, Any]:
    import yaml

    if not IMPORT.is_file():
        raise UserError(f"no {IMPORT} in {Path.cwd()}; run inside the project")
    try:
        content = yaml.safe_load(IMPORT.read_text())
        outs = [out["path"] for out in content["outs"]]
        imported = [dep["path"] for dep in content["deps"]]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{IMPORT} is not an import to {DATA}/; restore it with `git checkout {IMPORT}`") from error
    if outs != [DATA.as_posix()] or len(imported) != 1:
        raise UserError(f"{IMPORT} is not an import to {DATA}/; restore it with `git checkout {IMPORT}`")
    return content


def _unchanged() -> None:
    """An import replaces data/: refuse where it holds what the last import did not put there."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    if not DATA.exists():
        return
    try:
        with Repo() as repo:
            status = repo.status(targets=[IMPORT.as_posix()])
    except DvcException as error:
        raise UserError(f"DVC cannot read this project: {error}") from error
    states = [entry["changed outs"] for entry in status.get(IMPORT.as_posix(), []) if "changed outs" in entry]
    if any(state in ("modified", "new") for outs in states for state in outs.values()):
        raise UserError(
            f"{DATA}/ was changed since its import, and a new import would replace it; move your files out, then retry"
        )


def _write(content: dict[str, Any]) -> None:
    import yaml

    partial = IMPORT.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    partial.rename(IMPORT)
