"""Check that settings, code, data, weights and numbers on disk are those that made each other."""

from __future__ import annotations

import ast
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling4d import artifacts, code, config
from scaling4d.audit import history, lock, numbers
from scaling4d.audit.run import Run, runs, touch
from scaling4d.records import UserError

WRONG, NOTE, UNCHECKED = "wrong", "note", "not checked"
CACHE = Path(".dvc/cache/files/md5")
PINS = Path("requirements.lock")
SOURCE, ROOMS = "src/scaling4d", "artifacts/code"


@dataclass(frozen=True)
class Finding:
    """kind: `wrong` (something differs), `note` (differs and is declared), `not checked` (what it takes is not here).

    taints: the ways from what differs to the numbers that it can have changed, one a line.
    """

    kind: str
    where: str
    message: str
    taints: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = "".join(f"\n{'':<12}  {line}" for line in self.taints)
        return f"{self.kind:<12}{self.where}: {self.message}{lines}"


def verify(root: Path) -> list[Finding]:
    """Every disagreement in a project, and what could not be checked.

    Raises:
        UserError: no project here, its pipeline does not resolve, or a file that it needs is damaged.
    """
    with chdir(root):
        return findings(runs())


def findings(runs: list[Run]) -> list[Finding]:
    """In a fixed order: of the checkout's run, then of those kept beside their reports. Reads every byte that they name."""
    mine, *kept = runs
    mine.disk.read()
    return [*_checkout(mine), *(finding for run in kept for finding in _beside(run))]


def _checkout(run: Run) -> Iterator[Finding]:
    together: dict[str, list[str]] = {}
    for name, what in run.differ:
        together.setdefault(what, []).append(name)
    for what, names in together.items():
        outs = [(out.path, (run.stages[name].kind,)) for name in names if name in run.stages for out in run.stages[name].outs]
        yield Finding(WRONG, _and_more(names), what, run.taints(run.lock, outs))
    rooms = _rooms(run)
    changed = _changed(run, set(_claimed(run)))
    yield from _claims(run)
    yield from _bytes(run, changed, rooms)
    yield from _settings(run)
    yield from _environment(run)
    yield from _benchmarks(run, changed)
    yield from _inside(run, changed)
    absent = [path for path in _claimed(run) if not run.disk.here(path) and not path.startswith(f"{ROOMS}/")]
    if absent:
        names = ", ".join(absent[:4]) + (" ..." if len(absent) > 4 else "")
        yield Finding(
            UNCHECKED, run.lock, f"{len(absent)} files and folders that it names are not here ({names}): run `dvc repro`"
        )


def _beside(run: Run) -> Iterator[Finding]:
    """A run kept beside its report: its inputs are those of a commit, its artifacts may be here or not."""
    own = {path for path in _claimed(run) if path.startswith((f"{run.home}/", f"{run.folder}/")) or path == run.home}
    changed = _changed(run, own)
    yield from _claims(run)
    yield from _bytes(run, changed, {})
    yield from _commit(run)
    yield from _inside(run, changed)
    absent = [path for path in own if not run.disk.here(path)]
    if absent:
        again = f"`scaling4d compose profile={Path(run.home).name} && dvc repro` makes them"
        yield Finding(
            UNCHECKED, run.lock, f"{len(absent)} files and folders below {run.home} that it names are not here: {again}"
        )


# ---- dvc.lock ----


def _claimed(run: Run) -> dict[str, dict[tuple[str, int, int | None], list[str]]]:
    """Path -> (md5, size, number of files) -> which stages say so, and whether they wrote or read it."""
    found: dict[str, dict[tuple[str, int, int | None], list[str]]] = {}
    for stage in run.stages.values():
        for role, files in (("wrote", stage.outs), ("read", stage.deps)):
            for file in files:
                said = found.setdefault(file.path, {}).setdefault((file.md5, file.size, file.nfiles), [])
                said.append(f"{stage.name} {role} it")
    return found


def _claims(run: Run) -> Iterator[Finding]:
    """What one stage wrote is what the next one read, and what is not here is as committed; git alone proves this."""
    for path, said in _claimed(run).items():
        if len(said) > 1:
            words = "; ".join(f"{_and_more(who)} as md5 {md5}, {size} bytes" for (md5, size, _), who in said.items())
            yield Finding(WRONG, run.lock, f"it contradicts itself about {path}: {words}", run.taints(path, [(path, ())]))
    text = history.committed(run.lock)
    before = {} if text in (None, Path(run.lock).read_text()) else lock.parse(text, Path(run.lock))
    for name in run.stages.keys() & before.keys():
        was = {file.path: file.md5 for file in (*before[name].deps, *before[name].outs)}
        for file in (*run.stages[name].deps, *run.stages[name].outs):
            if not run.disk.here(file.path) and file.path in was and was[file.path] != file.md5:
                message = (
                    f"{name}: {file.path} is md5 {file.md5}, the last commit has {was[file.path]}, and it is not here to tell"
                )
                yield Finding(WRONG, run.lock, message, run.taints(file.path, [(file.path, ())]))


def _changed(run: Run, paths: set[str]) -> dict[str, list[str]]:
    """The innermost paths that are not as the lock says -> which files inside differ, where that is known.

    A folder around one counts too if more than that differs in it, as far as a listing of its files is at hand to tell.
    """
    found: dict[str, list[str]] = {}
    claimed = _claimed(run)
    for path in sorted(paths, key=lambda path: (-path.count("/"), path)):
        said = {md5 for md5, _, _ in claimed[path]}
        if not run.disk.here(path) or run.disk.md5(path) in said:
            continue
        within = [other for other in found if other.startswith(f"{path}/")]
        names = _names(run, path, next(iter(claimed[path]))[0])
        further = [name for name in names if not any(touch(f"{path}/{name}", other) for other in within)]
        if further or not within:
            found[path] = further
    return found


def _bytes(run: Run, changed: Mapping[str, list[str]], rooms: Mapping[str, str]) -> Iterator[Finding]:
    """What is on disk is what the stages wrote and read."""
    claimed = _claimed(run)
    for path, names in changed.items():
        (md5, _, _), who = next(iter(claimed[path].items()))
        around = next((p for p in map(str, Path(path).parents) if p in claimed and p not in changed and run.disk.here(p)), None)
        if around is not None and run.disk.md5(around) in {md5 for md5, _, _ in claimed[around]}:
            message = f"{_and_more(who)}, {path}, as md5 {md5}; it is {run.disk.md5(path)}, and {around} around it is as locked"
            yield Finding(WRONG, run.lock, f"changed itself: {message}", run.taints(path, [(path, ())]))
            continue
        detail = f" (differs: {', '.join(names[:5])}{' ...' if names[5:] else ''})" if names else ""
        message = f"{_and_more(who)} as md5 {md5}, on disk it is {run.disk.md5(path)}{detail}"
        inner = f"{path}/{names[0]}" if len(names) == 1 else path
        if path == SOURCE:
            reached = run.taints(inner, [(room, ("code",)) for room in rooms])
            meaning = next(iter(rooms.values()), "its meaning is as before, so no number changes")
            yield Finding(WRONG, path, f"{message}; {meaning}", reached)
        else:
            yield Finding(WRONG, path, message, run.taints(inner, [(inner, ())]))
    for path in (path for path in claimed if path not in changed):
        now = (run.disk.md5(path), run.disk.size(path), len(run.disk.files(path)))
        for (md5, size, nfiles), who in claimed[path].items():
            if md5 == now[0] and (size, nfiles or 1) != (now[1], now[2] if nfiles else 1):
                message = f"{_and_more(who)}, {path}, as {size} bytes in {nfiles or 1} files; it is {now[1]} in {now[2]}"
                yield Finding(WRONG, run.lock, message)
    for room, why in rooms.items():
        if SOURCE not in changed:
            yield Finding(WRONG, room, f"{why}: run `dvc repro`", run.taints(room, [(room, ())]))


def _names(run: Run, path: str, md5: str) -> list[str]:
    """Which files inside a folder differ, by what is at hand: DVC's listing of it, git's copy, its own description, git."""
    now = {name: file.md5 for name, file in run.disk.files(path).items()}
    listing = CACHE / md5[:2] / md5[2:]
    if "" in now:
        return []
    if md5.endswith(".dir") and listing.is_file():
        was = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_text())}
    elif (source := run.disk.source(path)) is not None:
        was = {name: file.md5 for name, file in run.disk.files(source).items()}
    elif said := run.described(path):
        return sorted(name for name, sha in said.items() if run.disk.sha256(f"{path}/{name}") != sha)
    else:
        return history.edited(path)
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def _rooms(run: Run) -> dict[str, str]:
    """artifacts/code/<room>.json -> how the meaning of the checkout's code differs from it; also where no artifact is here."""
    known = {f"{ROOMS}/{room}.json" for room in code.STAGES}  # of another name, it contradicts dvc.yaml
    said = {out.path: out.md5 for stage in run.stages.values() for out in stage.outs if out.path in known}
    if not said or not Path(SOURCE).is_dir():
        return {}
    with tempfile.TemporaryDirectory() as fresh:
        try:
            code.write_hashes(Path(SOURCE), Path(fresh))
        except (SyntaxError, ValueError) as error:
            return dict.fromkeys(said, f"the code is no Python any more: {error}")
        now = {path: (Path(fresh) / Path(path).name).read_text() for path in said}
    found = {}
    for path in (path for path, md5 in said.items() if hashlib.md5(now[path].encode()).hexdigest() != md5):
        was, modules = (run.json(path) or {}).get("modules", {}), json.loads(now[path])["modules"]
        names = ", ".join(name for name in modules if was.get(name) != modules[name]) if was else "which module is not known here"
        found[path] = f"the code means something else than when it was run ({names})"
    return found


# ---- settings ----


def _settings(run: Run) -> Iterator[Finding]:
    """params.yaml is the composition of its profile, or the stages and the page name what differs."""
    assert run.settings is not None
    try:
        overrides = config.overrides(run.settings)
    except UserError as error:
        yield Finding(WRONG, "params.yaml", str(error))
        return
    page = run.disk.text(f"{run.folder}/report.html") or ""
    named = {key for path in _provenances(run).values() for key in (run.json(path).get("overrides") or {})}
    for key, value in overrides.items():
        profile = run.settings["profile"]
        if key in named or f">{key}<" in page:
            yield Finding(
                NOTE, "params.yaml", f"override {key} = {value!r} of profile {profile}, named by the stages that it changes"
            )
        elif not run.of_setting(key):
            yield Finding(NOTE, "params.yaml", f"override {key} = {value!r} of profile {profile}, on which no stage depends")
        else:
            hint = f"undo it with `scaling4d compose profile={profile}`, or run `dvc repro`"
            message = f"{key} = {value!r} is not the value of profile {profile}, and no stage names it: {hint}"
            yield Finding(WRONG, "params.yaml", message, run.taints(f"params.yaml {key}", run.of_setting(key)))


def _environment(run: Run) -> Iterator[Finding]:
    """The stages ran with the versions that requirements.lock pins."""
    lines = PINS.read_text().splitlines() if PINS.is_file() else []
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    facts = [facts for stage in run.stages.values() if (facts := run.facts(stage))]
    ran = {(name, version.split("+")[0]) for fact in facts for name, version in fact["versions"].items()}
    for name, version in sorted(ran):
        if pinned.get(name, version) != version:
            yield Finding(NOTE, str(PINS), f"it pins {name} {pinned[name]}; {run.folder}/runs.json tells of {version}")


def _commit(run: Run) -> Iterator[Finding]:
    """A kept run's code, data and settings are those of one commit of this clone; git alone proves this."""
    inputs = {dep.path: dep.md5 for stage in run.stages.values() for dep in stage.deps if run.maker(dep.path) is None}
    inputs = {path: md5 for path, md5 in inputs.items() if not path.startswith("artifacts/")}
    source = inputs.get(SOURCE)
    commit = next((commit for commit in history.commits(SOURCE) if history.md5(commit, SOURCE) == source), None)
    if source is None or commit is None:
        yield Finding(
            UNCHECKED,
            run.lock,
            f"no commit of this clone holds the {SOURCE} that it names ({source}), so neither settings nor data",
        )
        return
    for path, md5 in inputs.items():
        found = history.md5(commit, committed_place(commit, path))
        if found is None:
            yield Finding(UNCHECKED, run.lock, f"{path}: commit {commit[:7]}, which holds its code, does not hold it")
        elif found != md5:
            message = f"{path} was md5 {md5}; in commit {commit[:7]}, which holds its code, it is {found}"
            yield Finding(WRONG, run.lock, message, run.taints(path, [(path, ())]))
    with tempfile.TemporaryDirectory() as folder:
        history.write(commit, config.EXPERIMENTS.as_posix(), Path(folder))
        with chdir(folder):
            composed = config.compose([f"profile={Path(run.home).name}"])
    page = run.disk.text(f"{run.folder}/report.html") or ""
    said = {key: value for stage in run.stages.values() for key, value in stage.params.items()}
    for key, value, wanted in lock.unequal(said, config.declared(composed, list(said))):
        if f">{key}<" not in page:
            message = f"it says {key} = {value!r}, commit {commit[:7]}, which holds its code, {wanted!r}, and no page names it"
            yield Finding(WRONG, run.lock, message, run.taints(f"{run.lock} {key}", run.of_setting(key)))
    for stage in run.stages.values():
        for key, value, other in lock.unequal(stage.params, {key: said[key] for key in stage.params}):
            message = f"{stage.name} ran with {key} = {value!r}, other stages with {other!r}"
            yield Finding(WRONG, run.lock, message, run.taints(stage.name, [(out.path, ()) for out in stage.outs]))


def committed_place(commit: str, path: str) -> str:
    """Where a commit keeps a path: itself, or what its .dvc file imports."""
    name = f"{path.split('/')[0]}.dvc"
    text = history.file(commit, name)
    if text is None:
        return path
    stage = lock.imported(name, text)[name]
    return stage.deps[0].path + path.removeprefix(stage.outs[0].path)


# ---- what the artifacts say of themselves ----


def _inside(run: Run, changed: Mapping[str, list[str]]) -> Iterator[Finding]:
    """changed: what differs and was named; what must differ because of it is not named again."""
    yield from _said(run)
    yield from _published(run)
    yield from _weights(run, changed)
    yield from _facts(run, changed)
    for check in (numbers.files, numbers.tables, numbers.metrics, numbers.page):
        yield from (Finding(WRONG, where, message) for where, message in check(run))
    missing = [name for name in ("results.csv", "pretrain.csv", "metrics.json") if run.disk.text(f"{run.folder}/{name}") is None]
    for name in missing:
        yield Finding(UNCHECKED, f"{run.folder}/{name}", "not here: run `dvc repro`")
    if absent := numbers.absent(run):
        yield Finding(UNCHECKED, run.folder, f"{absent} rows of its tables, because {run.home} does not hold their results")


def _provenances(run: Run) -> dict[str, str]:
    """Stage -> its provenance.json, those that are here."""
    found = {stage.name: f"{out.path}/provenance.json" for stage in run.stages.values() for out in stage.outs}
    return {name: path for name, path in found.items() if run.disk.text(path) is not None}


def _said(run: Run) -> Iterator[Finding]:
    """The settings, code and inputs that an artifact names are those that the lock names for its stage."""
    for name, path in _provenances(run).items():
        wrong = [*_provenance(run, name, path), *_operative(run, name, path)]
        reached = run.taints(path, [(out.path, ()) for out in run.stages[name].outs]) if wrong else ()
        yield from (Finding(WRONG, name, message, reached) for message in wrong)


def _provenance(run: Run, name: str, path: str) -> Iterator[str]:
    stage, said = run.stages[name], run.json(path) or {}
    named = {key: value for key, value in (said.get("settings") or {}).items() if key in stage.params}
    for key, found, locked in lock.unequal(named, stage.params):
        yield f"{path} was made with {key} = {found!r}, {run.lock} says {locked!r}"
    rooms = {dep.md5 for dep in stage.deps if dep.path.startswith(f"{ROOMS}/")}
    text = json.dumps(said.get("code"), indent=2, sort_keys=True) + "\n"
    if rooms and hashlib.md5(text.encode()).hexdigest() not in rooms:
        yield f"{path} names other code than the {ROOMS} that {run.lock} says it read"
    data = [dep for dep in stage.deps if not dep.path.startswith(f"{ROOMS}/")]
    if any(run.disk.md5(dep.path) != dep.md5 for dep in data):  # not here, or changed, which was named
        return
    known = _read(run, name)
    for word, sha in () if _source(stage) else (said.get("inputs") or {}).items():
        if word != "videos" and sha not in known:  # those may be members of archives; the lock holds the hash of their folder
            yield f"{path} names {word} {sha}, which is nothing that {run.lock} says it read"


def _source(stage: lock.Stage) -> Mapping[str, Any] | None:
    """Where the published encoder comes from that a stage took over: Pretrained's settings. DVC does not know of it."""
    return next((value["Pretrained"] for key, value in stage.params.items() if key.startswith("encoders.pretrained.")), None)


def _published(run: Run) -> Iterator[Finding]:
    """What published encoders were taken over from is still that, where it is a folder; a commit of the hub cannot change."""
    for name, path in _provenances(run).items():
        asked = _source(run.stages[name])
        if asked is None or asked["revision"]:
            continue
        folder = Path(asked["source"])
        if not folder.is_dir():
            yield Finding(UNCHECKED, name, f"the folder {folder}, from which the encoder was taken over, is not here")
            continue
        said = (run.json(path) or {}).get("inputs") or {}
        for word, sha in said.items():
            found = artifacts.sha256(folder / word) if (folder / word).is_file() else "not there"
            if found != sha:
                again = f"run `dvc repro --force --single-item {name}`, then `dvc repro`"
                message = f"took over {word} of {folder} as {sha}; now it is {found}: {again}"
                yield Finding(WRONG, name, message, run.taints(path, [(out.path, ()) for out in run.stages[name].outs]))


def _benchmarks(run: Run, changed: Mapping[str, list[str]]) -> Iterator[Finding]:
    """The benchmarks have the hashes by which readouts depend on them."""
    for path in (out.path for stage in run.stages.values() for out in stage.outs):
        for folder, sha in run.hashed(path).items():
            told = any(touch(place, other) for place in (path, folder) for other in changed)
            if run.disk.here(folder) and run.disk.sha256(folder) != sha and not told:
                message = f"says that {folder} has sha256 {sha}; it has {run.disk.sha256(folder)}"
                yield Finding(WRONG, path, message, run.taints(path, [(path, ())]))


def _read(run: Run, name: str) -> set[str]:
    """sha256 of everything that a stage read, of what lies directly inside, and of the benchmark that it read by its hash."""
    found = set()
    for dep in run.stages[name].deps:
        found |= set(run.hashed(dep.path).values())
        inner = {f"{dep.path}/{file.split('/')[0]}" for file in run.disk.files(dep.path) if file}
        found |= {run.disk.sha256(path) for path in (dep.path, *inner)}
    return found


def _operative(run: Run, name: str, provenance: str) -> Iterator[str]:
    """operative_config.gin holds the settings of dvc.lock, and besides them defaults of constructors, which no setting names."""
    path = f"{Path(provenance).parent}/operative_config.gin"
    text = run.disk.text(path)
    if text is None:
        yield f"{path} is not there"
        return
    said = _gin(text)
    used = {key.split(".")[0] for key in said}
    in_force = {}  # what a task sets for itself, readout.tasks, comes after what all of them share, readout.shared
    for constructor, values in _constructors(dict(sorted(run.stages[name].params.items()))):
        in_force |= {f"{constructor}.{key}": value for key, value in values.items() if constructor in used}
    for key, value in in_force.items():
        if said.get(key, "nothing") != value:
            yield f"{path} says {key} = {said.get(key, 'nothing')!r}, {run.lock} says {value!r}"


def _constructors(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping of a capitalised name, however deep: constructors as gin knows them."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            if key[:1].isupper():
                yield key, value
            yield from _constructors(value)


def _gin(text: str) -> dict[str, Any]:
    """`Constructor.parameter` -> value; tuples as lists, the way YAML has them; what is no literal stays text."""
    found = {}
    for line in text.replace("\\\n", " ").splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = (part.strip() for part in line.partition("="))
            try:
                found[".".join(key.split(".")[-2:])] = _lists(ast.literal_eval(value))
            except (SyntaxError, ValueError):
                found[".".join(key.split(".")[-2:])] = value
    return found


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _weights(run: Run, changed: Mapping[str, list[str]]) -> Iterator[Finding]:
    """A Result was measured on the weights that are here."""
    for key, path in run.numbers.items():
        content = run.json(path) or {}
        weights = run.weights(key.split("/")[0])
        if "checkpoint_sha256" not in content:
            continue
        found = run.disk.sha256(weights)
        if found is None:
            yield Finding(UNCHECKED, path, f"names the weights {weights}, which are not here")
        elif found != content["checkpoint_sha256"] and not any(touch(weights, other) for other in changed):
            message = f"was measured on weights {content['checkpoint_sha256']}, {weights} is {found}"
            yield Finding(WRONG, path, message, run.taints(path, [(path, ())]))


def _facts(run: Run, changed: Mapping[str, list[str]]) -> Iterator[Finding]:
    """Time and machine in runs.json are those of the artifacts that are here."""
    path = f"{run.folder}/runs.json"
    for stage in run.stages.values():
        facts, here = run.facts(stage), {run.disk.sha256(out.path) for out in stage.outs}
        told = any(touch(out.path, other) for out in stage.outs for other in changed)
        if facts is not None and not told and None not in here and facts["out_sha256"] not in here:
            yield Finding(WRONG, path, f"{facts['stage']} made {facts['out_sha256']}, which is not what is here")


def _and_more(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")
