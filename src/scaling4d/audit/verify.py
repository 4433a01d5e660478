"""Check that the settings, code, data, weights and numbers on disk are those of the locked run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config, provenance
from scaling4d.audit.commit import closest_commit
from scaling4d.audit.report_numbers import verify_numbers
from scaling4d.audit.run import (
    CODE,
    NOTE,
    REPORT,
    SOURCE,
    UNCHECKED,
    WRONG,
    AuditFinding,
    LockedRun,
    dvc_cache,
    has_texts,
    row_numbers,
    shorten,
    without_leftovers,
)
from scaling4d.pipeline import code_hashes
from scaling4d.provenance import LOCK, MISSING, LockedStage, differences, file_at, flatten, overlap, read_lock, required
from scaling4d.records import UserError
from scaling4d.studies.study import json_md5

PINS = Path("requirements.lock")
COMMIT_SCRIPT = re.compile(  # of commit.js, which no lock has and report.html runs
    r"""for \(const row of document\.querySelectorAll\("#summary tr"\)\)
  if \(row\.cells\[0\]\.textContent === "commit"\) row\.cells\[1\]\.textContent = "(?:[^"\\\n]|\\.)*";
"""
)
INPUTS = (SOURCE, "params.yaml", "dvc.yaml", "data.dvc", "dvc.lock")  # of the checkout's run; an edit of one is a finding


def verify(run: LockedRun) -> list[AuditFinding]:
    """Every disagreement, and every absent evidence. Reads each locked file. Raises UserError for a damaged one."""
    return verify_and_count(run)[0]


def verify_and_count(run: LockedRun) -> tuple[list[AuditFinding], Counter[str]]:
    """The findings of `verify`, and the counts of all that was checked, see `checked`."""
    run.disk.read(run.locked_files)
    findings = []
    if newer := _newer_commits(run):
        findings.append(AuditFinding(NOTE, str(LOCK), newer))
        stages = required(without_leftovers(read_lock(LOCK), run.stages), [REPORT])
        run = replace(run, stages=stages, settings=None, contradictions={})
    return [*findings, *_verify_run(run)], checked(run)


def checked(run: LockedRun) -> Counter[str]:
    """How many locked files and folders are here ("hashes") and not ("absent"), locked settings, and numbers.

    A number counts where the file that it came from is here.
    """
    here = sum(bool(run.disk.paths(path)) for path in run.locked_files)
    rows = (row for key, *_, row in run.table_rows() if run.json_object(run.records.get(key, "")))
    shown = (entry for entry in run.json(f"{run.folder}/numbers.json") or () if isinstance(entry, dict))
    numbers = sum(len(row_numbers(row)) for row in rows)
    numbers += sum(run.disk.text(str(entry.get("source"))) is not None for entry in shown)
    settings = sum(len([*flatten(stage.params)]) for stage in run.stages.values())
    return Counter(hashes=here, absent=len(run.locked_files) - here, settings=settings, numbers=numbers)


def _verify_run(run: LockedRun) -> Iterator[AuditFinding]:
    """Results of an earlier commit have its inputs; their artifacts may be here or not."""
    earlier = run.settings is None
    paths = [path for path in run.locked_files if not earlier or run.owns(path)]
    changed = _changed_files(run, paths)
    packages = {} if earlier else _changed_packages(run)
    for message, names in run.contradictions.items():
        starts = [(path, (stage.kind,)) for path, stage in run.makers.items() if stage.name in names]
        yield AuditFinding(WRONG, shorten(names), message, run.affected_results(str(LOCK), starts))
    yield from _lock(run)
    yield from _files(run, changed, packages)
    if earlier:
        yield from _commit(run)
    else:
        yield from _settings(run)
        yield from _environment(run)
        yield from _benchmarks(run, changed)
    yield from _artifacts(run)
    yield from _weights(run, changed)
    yield from verify_numbers(run)
    script = Path(run.folder, "commit.js")
    if script.is_file() and not COMMIT_SCRIPT.fullmatch(script.read_text(errors="replace")):
        yield AuditFinding(WRONG, str(script), "report.html runs it, and it does more than name a commit: run stage report again")
    absent = [path for path in paths if not run.disk.paths(path) and not path.startswith(f"{CODE}/")]
    if absent:
        files = f"{len(absent)} locked files and folders ({shorten(absent, 4)})"
        yield AuditFinding(UNCHECKED, str(LOCK), f"{files} are not here: run `dvc repro`")


def _newer_commits(run: LockedRun) -> str:
    """Which commit made the results, and what later commits changed.

    Empty: nothing changed, no commit has the edits, or the lock has no report.
    """
    sources = [dep.md5 for stage in run.stages.values() for dep in stage.deps if dep.path == SOURCE]
    unchanged = run.disk.md5(SOURCE) in sources and not run.contradictions
    if unchanged or any(map(provenance.edited_files, INPUTS)) or REPORT not in read_lock(LOCK):
        return ""
    commit, _ = closest_commit(run.stages, (f"profile={Path(run.home).name}",), {}, run.declared_overrides)
    if commit is None:
        return ""
    packages = ", ".join(Path(path).stem for path in _changed_packages(run)) or "no stage"
    stages = {name for names in run.contradictions.values() for name in names}
    settings = f", settings or files of {len(stages)} stages" if stages else ""
    return f"commit {commit[:7]} made the results; newer: code of {packages}{settings}; `make repro` makes the results again"


def _lock(run: LockedRun) -> Iterator[AuditFinding]:
    """The lock agrees with itself, and with the last commit about files that are not here."""
    for path, versions in run.locked_files.items():
        if len(versions) > 1:
            texts = "; ".join(f"md5 {file.md5}, {file.size} bytes ({shorten(stages)})" for file, stages in versions.items())
            yield AuditFinding(WRONG, str(LOCK), f"it contradicts itself about {path}: {texts}", run.affected_results(path))
    text = file_at("HEAD", str(LOCK))
    now = LOCK.read_text() if LOCK.is_file() else ""
    committed = {} if text in (None, now) else read_lock(LOCK, text)
    for name in (name for name in run.stages if name in committed):
        md5s = {file.path: file.md5 for file in (*committed[name].deps, *committed[name].outs)}
        for file in (*run.stages[name].deps, *run.stages[name].outs):
            if not run.disk.paths(file.path) and md5s.get(file.path, file.md5) != file.md5:
                message = f"{name}: {file.path} has md5 {file.md5}, in the last commit {md5s[file.path]}, and is absent"
                yield AuditFinding(WRONG, str(LOCK), message, run.affected_results(file.path))


def _changed_files(run: LockedRun, paths: list[str]) -> dict[str, list[str]]:
    """The innermost paths that differ from the lock -> the names of the files inside that differ, where known.

    A folder around a changed path, or around one that is not here, counts only where further files in it differ.
    """
    changed: dict[str, list[str]] = {}
    for path in sorted(paths, key=lambda path: (-path.count("/"), path)):
        md5s = [file.md5 for file in run.locked_files[path]]
        if run.disk.md5(path) not in (None, *md5s):
            parts = [other for other in paths if other.startswith(f"{path}/")]
            inner = [other for other in parts if other in changed]
            absent = [other for other in parts if not run.disk.paths(other)]
            names, told = _changed_names(run, path, md5s[0]), [*inner, *absent]
            if absent and not names:  # without a listing of the folder: files of no part
                names, told = [*run.disk.files(path)], parts
            names = [name for name in names if not any(overlap(f"{path}/{name}", other) for other in told)]
            if names or not (inner or absent):
                changed[path] = names
    return changed


def _changed_names(run: LockedRun, path: str, md5: str) -> list[str]:
    """Files of a folder that differ, by DVC's listing, git's copy, the shards' hashes or git; empty where unknown."""
    now = {name: digest.md5 for name, digest in run.disk.files(path).items()}
    if "" in now:
        return []
    before = provenance.cached_listing(md5, dvc_cache()) if md5.endswith(".dir") else None
    if before is None and (copy := run.disk.git_copy(path)) is not None:
        before = {name: digest.md5 for name, digest in run.disk.files(copy).items()}
    if before is None and (shards := run.shards(path)):
        return sorted(name for name, sha in shards.items() if run.disk.sha256(f"{path}/{name}") != sha)
    return provenance.edited_files(path) if before is None else [name for name, *_ in differences(before, now)]


def _files(run: LockedRun, changed: Mapping[str, list[str]], packages: Mapping[str, str]) -> Iterator[AuditFinding]:
    """The files on disk are those that the stages wrote and read."""
    disk, locked = run.disk, run.locked_files
    for path, names in changed.items():
        file, stages = next(iter(locked[path].items()))
        message = f"md5 {disk.md5(path)} on disk, {file.md5} in {LOCK} ({shorten(stages)})"
        around = next((p for p in map(str, Path(path).parents) if p in locked and p not in changed and disk.paths(p)), None)
        if around is not None and disk.md5(around) in {file.md5 for file in locked[around]}:
            message = f"it was edited for {path}: {message}, but {around} around it is as locked"
            yield AuditFinding(WRONG, str(LOCK), message, run.affected_results(path))
            continue
        if names:
            message += f"; differing files: {shorten(names, 5)}"
        starts = None
        if path == SOURCE:
            message += f"; {next(iter(packages.values()), 'no hash of a package differs, so no number changes')}"
            starts = [(package, ("code",)) for package in packages]
        inner = f"{path}/{names[0]}" if len(names) == 1 else path
        yield AuditFinding(WRONG, path, message, run.affected_results(inner, starts))
    for path in (path for path in locked if path not in changed):
        md5, files = disk.md5(path), disk.files(path)
        size, count = sum(digest.size for digest in files.values()), len(files)
        for file, stages in locked[path].items():
            if md5 == file.md5 and (file.size, file.nfiles or 1) != (size, count if file.nfiles else 1):
                other = f"{file.size} in {file.nfiles or 1} ({shorten(stages)})"
                yield AuditFinding(WRONG, str(LOCK), f"{path} has {size} bytes in {count} files, the lock {other}")
    for path, message in packages.items() if SOURCE not in changed else ():
        yield AuditFinding(WRONG, path, f"{message}: run `dvc repro`", run.affected_results(path))


def _changed_packages(run: LockedRun) -> dict[str, str]:
    """artifacts/code/<package>.json -> how the code of the checkout differs from it, also where the file is absent."""
    locked = {out.path: out.md5 for stage in run.stages.values() for out in stage.outs if out.path.startswith(f"{CODE}/")}
    try:
        hashes = code_hashes.hashes(Path(SOURCE))
    except (SyntaxError, ValueError) as error:
        return dict.fromkeys(locked, f"the code is not Python: {error}")
    changed = {}
    for package, now in hashes.items():
        if json_md5(now) != locked.get(path := f"{CODE}/{package}.json", json_md5(now)):
            before = run.json_object(path).get("modules")
            names = ", ".join(name for name, *_ in differences(before, now["modules"])) if before else "unknown modules"
            changed[path] = f"the code differs from the code of the run ({names or 'unknown modules'})"
    return changed


def _settings(run: LockedRun) -> Iterator[AuditFinding]:
    """params.yaml is the composition of its profile, or the stages and the report name the difference."""
    try:
        overrides = config.overrides(run.settings)
    except UserError as error:
        yield AuditFinding(WRONG, "params.yaml", str(error))
        return
    profile = run.settings["profile"]
    for key, value in overrides.items():
        outs = run.outs_of_setting(key)
        named = value in run.declared_overrides.get(key, ())
        if named or not outs:
            reason = "its stages name it" if named else "no stage depends on it"
            yield AuditFinding(NOTE, "params.yaml", f"override {key} = {value!r} of profile {profile}: {reason}")
        else:
            undo = f"undo it with `scaling4d compose profile={profile}`, or run `dvc repro`"
            message = f"{key} = {value!r} is not the value of profile {profile}, and no stage names it: {undo}"
            yield AuditFinding(WRONG, "params.yaml", message, run.affected_results(f"params.yaml {key}", outs))


def _environment(run: LockedRun) -> Iterator[AuditFinding]:
    """The stages ran with the versions that requirements.lock pins."""
    lines = PINS.read_text().splitlines() if PINS.is_file() else []
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    versions = [(run.environment(stage) or {}).get("versions", {}) for stage in run.stages.values()]
    for name, version in sorted({(name, version.split("+")[0]) for some in versions for name, version in some.items()}):
        if pinned.get(name, version) != version:
            yield AuditFinding(NOTE, str(PINS), f"it pins {name} {pinned[name]}; {run.folder}/runs.json has {version}")


def _commit(run: LockedRun) -> Iterator[AuditFinding]:
    """Results of an earlier commit have its code, settings and data, or their report names the setting."""
    profile, overrides = (f"profile={Path(run.home).name}",), run.declared_overrides
    for kind, subject, message in closest_commit(run.stages, profile, {}, overrides)[1]:
        starts = run.outs_of_setting(subject) or None  # not a setting: a path
        if subject in run.stages:
            starts = [(out.path, ()) for out in run.stages[subject].outs]
        yield AuditFinding(kind, str(LOCK), message, run.affected_results(subject, starts) if kind == WRONG else ())


def _artifacts(run: LockedRun) -> Iterator[AuditFinding]:
    """The settings, code and inputs that an artifact names are those that the lock names for its stage."""
    for folder, stage in run.makers.items():
        if run.disk.text(path := f"{folder}/{artifacts.PROVENANCE}") is None:
            continue
        content = run.json_object(path)
        encoders = [v for k, v in stage.params.items() if k.startswith("encoders.pretrained.") and isinstance(v, dict)]
        sources = [encoder.get("Pretrained") for encoder in encoders]
        published = next((one for one in sources if isinstance(one, dict) and has_texts(one, "source", "revision")), None)
        for message in (*_provenance(run, stage, path, content, published is None), *_operative(run, stage, folder)):
            yield AuditFinding(WRONG, stage.name, message, run.affected_results(folder))
        if published is None or published["revision"]:  # a commit of the hub cannot change; a folder can, unseen by DVC
            continue
        source = Path(published["source"])
        if not source.is_dir():
            yield AuditFinding(UNCHECKED, stage.name, f"the folder {source}, the source of the encoder, is not here")
            continue
        for file, sha in (content.get("inputs") or {}).items():
            now = artifacts.sha256(source / file) if (source / file).is_file() else "absent"
            if now != sha:
                again = f"run `dvc repro --force --single-item {stage.name}`, then `dvc repro`"
                message = f"its source {source}/{file} had sha256 {sha}; now it is {now}: {again}"
                yield AuditFinding(WRONG, stage.name, message, run.affected_results(folder))


def _provenance(run: LockedRun, stage: LockedStage, path: str, content: Mapping[str, Any], inputs: bool) -> Iterator[str]:
    """inputs: whether the stage read files that the lock names."""
    settings = {key: value for key, value in (content.get("settings") or {}).items() if key in stage.params}
    for key, value, locked in differences(settings, stage.params):
        yield f"{path} has {key} = {value!r}, {LOCK} {locked!r}"
    code = {dep.md5 for dep in stage.deps if dep.path.startswith(f"{CODE}/")}
    if code and json_md5(content.get("code")) not in code:
        yield f"{path} names other code than the {CODE} of {LOCK}"
    data = [dep for dep in stage.deps if not dep.path.startswith(f"{CODE}/")]
    if not inputs or any(run.disk.md5(dep.path) != dep.md5 for dep in data):  # absent, or changed: an own finding
        return
    known = set()  # sha256 of every input, of the files and folders directly inside, and of its benchmark
    for dep in stage.deps:
        inner = {f"{dep.path}/{file.split('/')[0]}" for file in run.disk.files(dep.path) if file}
        known |= {run.disk.sha256(path) for path in (dep.path, *inner)}
        known |= {sha for folders in run.benchmark_hashes(dep.path).values() for sha in folders.values()}
    for name, sha in (content.get("inputs") or {}).items():
        # Videos may be members of archives; the lock has their folder's hash. A damaged file may name what has no hash.
        if name != "videos" and sha not in [*known]:
            yield f"{path} names {name} {sha}, which is no input of its stage in {LOCK}"


def _operative(run: LockedRun, stage: LockedStage, folder: str) -> Iterator[str]:
    """operative_config.gin has the settings of the lock. It may also have defaults that no setting names."""
    path = f"{folder}/{artifacts.OPERATIVE}"
    text = run.disk.text(path)
    if text is None:
        yield f"{path} is absent"
        return
    operative = provenance.parse_gin(text)
    classes = {key.split(".")[0] for key in operative}
    leaves = flatten(dict(sorted(stage.params.items())))  # readout.tasks after readout.Evaluation and Head
    for key, value in {".".join(key.split(".")[-2:]): value for key, value in leaves}.items():
        if key.split(".")[0] in classes and operative.get(key, MISSING) != value:
            yield f"{path} has {key} = {operative.get(key, MISSING)!r}, {LOCK} {value!r}"


def _benchmarks(run: LockedRun, changed: Mapping[str, list[str]]) -> Iterator[AuditFinding]:
    """The benchmarks have the hashes by which readouts depend on them."""
    files = {file: folders for path in run.makers for file, folders in run.benchmark_hashes(path).items()}
    for path, folder, sha in ((file, *item) for file, folders in files.items() for item in folders.items()):
        known = any(overlap(place, other) for place in (path, folder) for other in changed)
        if run.disk.sha256(folder) not in (None, sha) and not known:
            message = f"it has sha256 {sha} for {folder}, on disk it is {run.disk.sha256(folder)}"
            yield AuditFinding(WRONG, path, message, run.affected_results(path))


def _weights(run: LockedRun, changed: Mapping[str, list[str]]) -> Iterator[AuditFinding]:
    """A result was measured on the weights that are here; runs.json names the artifacts that are here.

    changed: differences with a finding of their own.
    """
    for key, path in run.records.items():
        sha, weights = run.json_object(path).get("checkpoint_sha256"), run.weights(key.split("/")[0])
        now = run.disk.sha256(weights)
        if sha is not None and now is None:
            yield AuditFinding(UNCHECKED, path, f"its weights {weights} are not here")
        elif sha not in (None, now) and not any(overlap(weights, other) for other in changed):
            yield AuditFinding(WRONG, path, f"it was measured on weights {sha}; {weights} is {now}", run.affected_results(path))
    for stage in run.stages.values():
        environment, shas = run.environment(stage), {run.disk.sha256(out.path) for out in stage.outs}
        known = any(overlap(out.path, other) for out in stage.outs for other in changed)
        if environment is not None and not known and None not in shas and environment["out_sha256"] not in shas:
            message = f"{environment['stage']} made sha256 {environment['out_sha256']}, which is not on disk"
            yield AuditFinding(WRONG, f"{run.folder}/runs.json", message)
