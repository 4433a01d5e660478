"""What git knows: which files differ from the last commit, and files and folders of other commits."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from functools import cache
from pathlib import Path


def edited(path: str) -> list[str]:
    """Files below a path, by their names inside it, that differ from the last commit; empty where git cannot tell."""
    tracked = _git("diff", "--name-only", "-z", "--relative", "HEAD", "--", path) or b""
    new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", path) or b""
    names = (tracked + new).decode().split("\0")
    return sorted(name.removeprefix(f"{path}/") for name in names if name)


def committed(path: str) -> str | None:
    """The text of a file in the last commit; None where it is not in it, or there is no git."""
    return file("HEAD", path)


def file(commit: str, path: str) -> str | None:
    """The text of a file in a commit; None where it is not in it, or there is no git."""
    found = _git("show", f"{commit}:./{path}")
    return None if found is None else found.decode()


def commits(*paths: str) -> list[str]:
    """The commits that changed one of some paths, newest first."""
    return (_git("log", "--format=%H", "--", *paths) or b"").decode().split()


def tree(commit: str, path: str) -> str | None:
    """git's own name for a folder's content in a commit; None where it was not there."""
    found = _git("rev-parse", "--verify", "-q", f"{commit}:./{path}")
    return None if found is None else found.decode().strip()


def md5(commit: str, path: str) -> str | None:
    """Of a file or folder as it was in a commit, the way DVC hashes it; None where it was not there."""
    entries = (_git("ls-tree", "-r", "-z", commit, "--", path) or b"").decode().split("\0")[:-1]
    blobs = {name: meta.split()[2] for meta, name in (entry.split("\t", 1) for entry in entries)}
    known = _md5s(frozenset(blobs.values()))
    if path in blobs:
        return known[blobs[path]]
    listing = [{"md5": known[blob], "relpath": name.removeprefix(f"{path}/")} for name, blob in sorted(blobs.items())]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir" if listing else None


def write(commit: str, path: str, out: Path) -> None:
    """Write the small files of a folder as it was in a commit: those with the endings of settings."""
    archive = _git("archive", commit, "--", f":(glob){path}/**/*.yaml", f":(glob){path}/*.yaml")
    with tarfile.open(fileobj=io.BytesIO(archive or b"")) as files:
        for member in files:
            if member.isfile():  # git has no path that leads elsewhere; `filter` of extractall is younger than Python 3.11.0
                file = out / member.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(files.extractfile(member).read())


@cache
def _md5s(blobs: frozenset[str]) -> dict[str, str]:
    """By the name of a git object."""
    content, found, start = _git("cat-file", "--batch", given="\n".join(blobs)) or b"", {}, 0
    while start < len(content):
        end = content.index(b"\n", start)
        name, _, size = content[start:end].decode().split()
        start = end + 1 + int(size) + 1
        found[name] = hashlib.md5(content[end + 1 : start - 1]).hexdigest()
    return found


def _git(*words: str, given: str = "") -> bytes | None:
    """None where git refuses: no repository, no such commit or file."""
    try:
        done = subprocess.run(["git", *words], input=given.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
