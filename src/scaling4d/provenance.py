"""Dotted settings, numbers as text, atomic writes, gin's text, dvc.lock, DVC's cache and git.

The only reader of locks, git and gin text. `artifacts.write_provenance` writes the file provenance.json.
"""

from __future__ import annotations

import ast
import csv
import errno
import fcntl
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scaling4d.records import UserError, file_system_errors

WORK_FOLDER = Path(".resume")  # training states, snapshots of launched jobs, caches of clips and features, unfinished outputs
LOCK = Path("dvc.lock")
DVC_CACHE = Path(".dvc/cache")
EXPERIMENT_REFS = "refs/exps/"  # DVC keeps an experiment at refs/exps/<2>/<38 of its commit>/<name>
MISSING = "missing"
LOCK_FILE = "lock"  # in a folder that one process uses
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of a file system

# ---- settings ----


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested settings. An empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(some: Mapping[str, Any], others: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, other value) where nested settings differ. MISSING stands for a key that one side lacks."""
    for key in sorted(some.keys() | others.keys()):
        one, other = some.get(key, MISSING), others.get(key, MISSING)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}", one, other


def is_below(key: str, parents: Iterable[str]) -> bool:
    """Whether a dotted key is one of `parents` or lies below one."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


# ---- numbers as text, tables as csv ----


def format_number(value: float | int | str, spec: str) -> str:
    """Text of a number in the report, which the audit compares. Raises ValueError for a spec that Python does not have.

    spec: of Python, such as ".4f", ",d" or ".1%"; "" for a text such as a sha256. A spec that ends with M gives
    millions: "M" is ".2fM", 2345678 -> "2.35 M"; ",.0fM" gives "2 M".
    """
    if spec.endswith("M"):
        return f"{value / 1e6:{spec[:-1] or '.2f'}} M"
    return format(value, spec)


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV text. Floats keep all digits; None is empty; other keys of a row are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parse_csv(text: str) -> list[dict[str, str]]:
    """Rows of a csv by column."""
    return list(csv.DictReader(text.splitlines()))


# ---- files by rename ----


def lock_folder(folder: Path, *, wait_s: float) -> IO[bytes] | None:
    """Make a folder and take it for this process until the returned file is closed. None: another process has it.

    Raises:
        OSError: its file system has no locks (NO_LOCKS), or refuses the folder.
    """
    until = time.monotonic() + wait_s
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as opened:  # removed meanwhile
            file = opened.enter_context((folder / LOCK_FILE).open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    return None
                time.sleep(0.1)
                continue
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK_FILE).stat()):
                opened.pop_all()
                return file


@contextmanager
def work_folder(name: str, root: Path = WORK_FOLDER) -> Iterator[Path]:
    """Give an empty folder to write into, which is removed in the end. Folders of killed runs of this name go first.

    It is `root/<name>.partial-<8 hex digits>/out`, beside the lock of its process.
    """
    for folder in root.glob(f"{glob.escape(name)}.partial-{'[0-9a-f]' * 8}"):
        with suppress(OSError):  # another user's, or no locks: it may be in use
            if killed := lock_folder(folder, wait_s=0):
                with killed:
                    shutil.rmtree(folder)
    folder, lock = root / f"{name}.partial-{secrets.token_hex(4)}", None
    try:
        try:
            lock = lock_folder(folder, wait_s=math.inf)  # another run may have taken it for one of a killed run
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        out = folder / "out"
        out.mkdir()
        yield out
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock:
            lock.close()


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Give an empty folder to write into. It replaces `final` when the block ends without an error.

    Raises UserError: the disk is full, or a file may not be written.
    """
    with file_system_errors(final), work_folder(final.as_posix().replace("/", "-")) as out:
        yield out
        place = final.resolve()
        with work_folder(f".{place.name}", place.parent) as beside:  # WORK_FOLDER may be on another disk
            move_folder(out, beside / "new")
            with suppress(FileNotFoundError):
                place.rename(beside / "old")
            (beside / "new").rename(place)


def move_folder(source: Path, target: Path) -> None:
    """Move a folder, also to another disk. Raises UserError: that is full, or may not be written."""

    def copy(file: str, new: str) -> None:
        with file_system_errors(new):  # shutil would go on and gather the errors of all files
            shutil.copy2(file, new)

    shutil.move(source, target, copy_function=copy)


@contextmanager
def atomic_new(out: Path) -> Iterator[Path]:
    """Give a name beside `out` for a file or a folder. It becomes `out` when the block ends without an error.

    Raises UserError where `out` exists, its parent folder does not, the disk is full, or a file may not be written.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another name or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"no folder {out.parent} to write {out.name} in; make it first")
    with file_system_errors(out), work_folder(f".{out.name}", out.parent) as folder:
        yield folder / out.name
        (folder / out.name).rename(out)


def write_text(path: Path, text: str) -> None:
    """Write a file by rename, so that no part of it ever stands alone. Raises UserError: as atomic_folder."""
    with file_system_errors(path), work_folder(f".{path.name}", path.parent) as folder:
        (folder / path.name).write_text(text)
        (folder / path.name).replace(path)


# ---- gin ----


def parse_gin(text: str) -> dict[str, Any]:
    """`Class.parameter` -> value of an operative_config.gin. Tuples become lists; other non-literals stay text."""
    values: dict[str, Any] = {}
    for line in text.splitlines():
        if binding := re.match(r"[\w./]*?(\w+\.\w+) = ?(.*)", line):
            values[binding[1]] = binding[2].removesuffix("\\")
        elif values and not line.startswith("#"):  # a long value goes on in indented lines
            values[next(reversed(values))] += line
    for name, value in values.items():
        with suppress(SyntaxError, ValueError, TypeError):
            values[name] = json.loads(json.dumps(ast.literal_eval(value.strip())))
    return values


# ---- dvc.lock and DVC's cache ----


@dataclass(frozen=True)
class LockedFile:
    """A file or folder in a lock. md5 is DVC's own (a folder's ends with `.dir`); size is in bytes."""

    path: str
    md5: str
    size: int
    nfiles: int | None


@dataclass(frozen=True)
class LockedStage:
    """A stage of a lock, or a .dvc file: its command, inputs, outputs and settings by dotted key."""

    name: str
    command: str
    deps: tuple[LockedFile, ...]
    outs: tuple[LockedFile, ...]
    params: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The name in dvc.yaml: `readout_frozen` of `readout_frozen@nano-depth`."""
        return self.name.split("@")[0]


def load_yaml(text: str) -> Any:
    """Read YAML 1.2 as DVC writes it; 3e-06 is a number. Raises ValueError: not YAML."""
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def read_lock(path: Path, text: str | None = None) -> dict[str, LockedStage]:
    """Stages of a lock by name; a .dvc file is one stage, `dvc update`. Raises UserError for a damaged file.

    text: the content, if not the file's.
    """
    try:
        content = load_yaml(path.read_text() if text is None else text)
        if path.suffix == ".dvc":
            content = {"schema": "2.0", "stages": {path.name: {"cmd": f"dvc update {path}", **content}}}
        if content.get("schema") != "2.0":
            raise ValueError(f"schema {content.get('schema')!r}, needed '2.0'")
        return {name: _stage(name, stage) for name, stage in content["stages"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}; take it from git again") from error


def required(stages: Mapping[str, LockedStage], targets: Iterable[str]) -> dict[str, LockedStage]:
    """The targets and every stage that they depend on, in the lock's order. Absent targets are left out."""
    waiting, names = [target for target in targets if target in stages], set()
    while waiting:
        name = waiting.pop()
        names.add(name)
        for other, stage in stages.items():
            if other not in names and any(overlap(dep.path, out.path) for dep in stages[name].deps for out in stage.outs):
                waiting.append(other)
    return {name: stage for name, stage in stages.items() if name in names}


def overlap(one: str, other: str) -> bool:
    """Whether two paths are equal or one lies inside the other."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def cached(md5: str, dvc_cache: Path) -> bytes | None:
    """A file's bytes from DVC's cache; None: not there. Raises UserError where it has other bytes under this name."""
    path = dvc_cache / "files/md5" / md5[:2] / md5[2:]
    if not path.is_file():
        return None
    content = path.read_bytes()
    if hashlib.md5(content).hexdigest() != md5.removesuffix(".dir"):
        raise UserError(f"{path} does not hold the bytes of its name; remove it and run its stage again")
    return content


def cached_listing(md5: str, dvc_cache: Path) -> dict[str, str] | None:
    """md5 by relative name of a folder's files from DVC's cache; None: not there."""
    listing = cached(md5, dvc_cache)
    return None if listing is None else {entry["relpath"]: entry["md5"] for entry in json.loads(listing)}


def folder_md5(files: Mapping[str, str]) -> str:
    """DVC's md5 of a folder: relative name -> md5 of each file."""
    listing = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def _stage(name: str, content: Mapping[str, Any]) -> LockedStage:
    params = content.get("params") or {}
    if params.keys() - {"params.yaml"}:
        raise ValueError(f"{name} has settings of {', '.join(params)}, needed params.yaml")
    deps, outs = (tuple(map(_file, content.get(key) or ())) for key in ("deps", "outs"))
    stage = LockedStage(name, content["cmd"], deps, outs, params.get("params.yaml", {}))
    if not (isinstance(name, str) and isinstance(stage.command, str) and isinstance(stage.params, Mapping)):
        raise ValueError(f"{name} has cmd {stage.command!r} and settings {stage.params!r}; needed a command and settings by key")
    return stage


def _file(entry: Mapping[str, Any]) -> LockedFile:
    if entry.get("hash") != "md5":
        raise ValueError(f"{entry['path']} has a hash of kind {entry.get('hash')!r}, needed md5")
    file = LockedFile(entry["path"], entry["md5"], entry["size"], entry.get("nfiles"))
    texts, numbers = (file.path, file.md5), (file.size, file.nfiles or 0)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"{file}; needed a path, an md5, and whole numbers")
    return file


# ---- git ----


def git(*words: str, stdin: str = "") -> bytes | None:
    """Output of a git command; None where git fails or is not installed."""
    try:
        done = subprocess.run(["git", *words], input=stdin.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def git_or_error(*words: str) -> str:
    """Output of a git command as text. Raises UserError where git fails."""
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git {' '.join(words[:6])}: {' '.join(done.stderr.split()) or 'failed'}")
    return done.stdout


def file_at(commit: str, path: str) -> str | None:
    """Text of a file in a commit; None: not in it, or no git."""
    content = git("show", f"{commit}:./{path}")
    return None if content is None else content.decode(errors="replace")


def commits_of(*paths: str) -> list[str]:
    """Commits that changed one of the paths, newest first."""
    return (git("log", "--format=%H", "--", *paths) or b"").decode().split()


def life_of(path: str) -> list[str]:
    """Commits that changed a file since it was last absent, newest first; none where it is absent now."""
    return [*itertools.takewhile(lambda commit: file_at(commit, path) is not None, commits_of(path))]


def text_with_sha256(path: str, sha256: str) -> str | None:
    """A file's text with this hash, from disk or from any commit of it; None: there is none."""
    versions = (file_at(commit, path) for commit in commits_of(path))
    texts = itertools.chain([Path(path).read_text()] if Path(path).is_file() else [], versions)
    return next((text for text in texts if text and hashlib.sha256(text.encode()).hexdigest() == sha256), None)


def commit_and_edits(*paths: str) -> str:
    """The last commit that changed one of the paths, and the paths that differ from it, as text."""
    edited = [path for path in paths if edited_files(path)]
    commit = next(iter(commits_of(*paths)), "no commit")[:12]
    return f"{commit}, and edits of {', '.join(edited)} that are not committed" if edited else commit


def md5_at(commit: str, path: str) -> str | None:
    """DVC's md5 of a file or folder in a commit; None: not in it."""
    blobs = _blobs_at(commit, path)
    unread = _contents(blobs.values() - _BLOB_MD5S.keys())
    _BLOB_MD5S.update((blob, hashlib.md5(content).hexdigest()) for blob, content in unread)
    files = {name.removeprefix(path).removeprefix("/"): _BLOB_MD5S[blob] for name, blob in blobs.items()}
    return files[""] if "" in files else folder_md5(files) if files else None


def write_yaml_files_at(commit: str, path: str, out: Path) -> None:
    """Write the .yaml files below a folder, as they are in a commit, to `out`; nothing where it has none."""
    blobs = {name: blob for name, blob in _blobs_at(commit, path).items() if name.endswith(".yaml")}
    contents = dict(_contents(blobs.values()))
    for name, blob in blobs.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(contents[blob])


def edited_files(path: str) -> list[str]:
    """Names of the files below a folder that differ from the last commit; empty without git."""
    tracked = git("diff", "--name-only", "-z", "--relative", "HEAD", "--", path) or b""
    new = git("ls-files", "--others", "--exclude-standard", "-z", "--", path) or b""
    return sorted(name.removeprefix(f"{path}/") for name in (tracked + new).decode().split("\0") if name)


def experiments() -> dict[str, str]:
    """Git reference by name of every DVC experiment in this repository."""
    refs = (git("for-each-ref", "--format=%(refname)", f"{EXPERIMENT_REFS}??/*/*") or b"").decode().split()
    return {ref.rpartition("/")[2]: ref for ref in sorted(refs)}


_BLOB_MD5S: dict[str, str] = {}  # git's name of a content -> its md5, of what was read


def _blobs_at(commit: str, path: str) -> dict[str, str]:
    """git's name for the content of every file at or below a path in a commit."""
    entries = (git("ls-tree", "-r", "-z", commit, "--", path) or b"").decode().split("\0")[:-1]
    return {name: meta.split()[2] for meta, name in (entry.split("\t", 1) for entry in entries)}


def _contents(blobs: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    output = io.BytesIO(git("cat-file", "--batch", stdin="\n".join(blobs)) or b"")
    while head := output.readline():
        blob, _, size = head.decode().split()
        yield blob, output.read(int(size) + 1)[:-1]
