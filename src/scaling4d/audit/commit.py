"""The commit that a run was made from: git has its code, settings and data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import Any

from scaling4d import config
from scaling4d.audit.run import NOTE, SOURCE, UNCHECKED, WRONG
from scaling4d.provenance import LockedStage, commits_of, differences, file_at, git, md5_at, read_lock, write_yaml_files_at
from scaling4d.records import UserError

SETTINGS = (f":(glob){config.EXPERIMENTS}/**/*.yaml", "data.dvc", ":(exclude)experiments/study")
REPORT_INPUTS = (":(glob)reports/studies/*/study.json", "reports/bench/costs.json", "reports/scaling.ipynb")
Stages = Mapping[str, LockedStage]
Overrides = Mapping[str, Sequence[Any]]
Difference = tuple[str, str, str]  # kind of finding; setting, path or stage; message


def closest_commit(
    stages: Stages, overrides: tuple[str, ...], changes: dict[str, Any], declared: Overrides
) -> tuple[str | None, list[Difference]]:
    """The commit that has the code of a run, and the closest settings and data; and how those of the run differ.

    overrides: Hydra overrides that compose the settings, `profile=NAME` among them. changes: settings on top of those.
    declared: settings that may differ, and the values that they may have.
    """
    md5 = next((dep.md5 for stage in stages.values() for dep in stage.deps if dep.path == SOURCE), None)
    candidates: list[tuple[str | None, list[Difference]]] = []
    for commit in _commits_with(md5):
        candidates.append((commit, [*_compare(commit, stages, overrides, changes, declared)]))
        if all(kind != WRONG for kind, *_ in candidates[-1][1]):
            return candidates[-1]
    unknown = f"no commit of this clone has its {SOURCE} ({md5}), so its settings and data are not checked"
    return min(candidates, key=lambda candidate: len(candidate[1]), default=(None, [(UNCHECKED, SOURCE, unknown)]))


def _compare(
    commit: str, stages: Stages, overrides: tuple[str, ...], changes: dict[str, Any], declared: Overrides
) -> Iterator[Difference]:
    where, differs = f"in commit {commit[:7]}, which has its code,", UNCHECKED if is_shallow() else WRONG
    settings = {key: value for stage in stages.values() for key, value in stage.params.items()}
    try:
        composed = config.declared({**_compose(commit, overrides), **changes}, list(settings))
    except UserError as error:
        yield differs, SOURCE, f"{where} its settings do not compose: {error}"
        return
    for key, value, committed in differences(settings, composed):
        kind = NOTE if value in declared.get(key, ()) else differs
        yield kind, key, f"it has {key} = {value!r}; {where} {committed!r}{', and its stages name it' * (kind == NOTE)}"
    for stage in stages.values():
        for key, value, other in differences(stage.params, {key: settings[key] for key in stage.params}):
            yield WRONG, stage.name, f"{stage.name} ran with {key} = {value!r}, other stages with {other!r}"
    outs = {out.path for stage in stages.values() for out in stage.outs}
    inputs = {dep.path: dep.md5 for stage in stages.values() for dep in stage.deps}
    for path, md5 in inputs.items():
        if path not in outs and not path.startswith("artifacts/") and (committed := _imported_md5(commit, path)) != md5:
            kind, now = (UNCHECKED, "it is absent") if committed is None else (differs, committed)
            yield kind, path, f"{path} has md5 {md5}; {where} {now}"


@cache
def _commits_with(md5: str | None) -> tuple[str, ...]:
    """Commits with this code, newest first: its first, and later ones that changed settings, data or studies."""
    return tuple(
        commit for commit in commits_of(SOURCE, *SETTINGS, *REPORT_INPUTS) if md5 and _imported_md5(commit, SOURCE) == md5
    )


@cache
def _imported_md5(commit: str, path: str) -> str | None:
    """DVC's md5 of a path in a commit: its own, or that of the path from which a .dvc file imports it."""
    text = file_at(commit, name := f"{path.split('/')[0]}.dvc")
    if text is None:
        return md5_at(commit, path)
    stage = read_lock(Path(name), text)[name]
    return md5_at(commit, stage.deps[0].path + path.removeprefix(stage.outs[0].path))


@cache
def _compose(commit: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_yaml_files_at(commit, config.EXPERIMENTS.as_posix(), Path(folder))
        with chdir(folder):
            return config.compose(list(overrides))


def is_shallow() -> bool:
    """Whether the clone lacks older commits."""
    return git("rev-parse", "--is-shallow-repository") == b"true\n"
