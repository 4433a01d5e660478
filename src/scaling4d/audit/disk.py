"""The bytes that a project names, each read once, whatever DVC's own caches believe."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from scaling4d.records import UserError

KEPT = (".json", ".jsonl", ".gin", ".csv", ".html", ".py", ".md", ".yaml")  # read as text later on, so kept at their one reading
BLOCK = 1 << 20
IGNORED = Path(".dvcignore")


@dataclass(frozen=True)
class Digest:
    """Of one file. text: only of the kinds in KEPT."""

    md5: str
    sha256: str
    size: int
    text: str | None


class Disk:
    """Hashes of files and folders below the current folder as they are now.

    A folder's hash is made of its files', so a file that ten stages name, alone or inside other folders, is read once; `read`
    reads all, spread over threads (hashing lets other threads run), so that its time follows the bytes.

    Args:
        paths: files and folders that may be asked for; those that are not there are left out.
        elsewhere: folder -> where git keeps a copy of it; read from there when the folder itself is not here.
    """

    def __init__(self, paths: Iterable[str], elsewhere: Mapping[str, str]) -> None:
        ignored = _ignored()
        self._elsewhere = elsewhere
        places = {self._place(path) for path in paths}
        tops = [place for place in places if not any(parent.as_posix() in places for parent in Path(place).parents)]
        self._names = sorted(name for top in tops for name in _files(Path(top), ignored))
        self._digest, self.md5, self.sha256 = cache(_digest), cache(self._md5), cache(self._sha256)

    def read(self) -> None:
        """Read every file now."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in threads.map(self._digest, self._names):
                pass

    def here(self, path: str) -> bool:
        return bool(self._inside(path))

    def files(self, path: str) -> dict[str, Digest]:
        """Of a folder: by the name inside it, in DVC's order. Of a file: itself, under the name ''."""
        return {name: self._digest(found) for name, found in self._inside(path).items()}

    def text(self, path: str) -> str | None:
        """None where the file is not here."""
        found = self._inside(path).get("")
        return None if found is None else self._digest(found).text

    def under(self, *folders: str) -> list[str]:
        """Every file below some folders."""
        return [f"{folder}/{name}" for folder in folders for name in self._inside(folder) if name]

    def size(self, path: str) -> int:
        return sum(found.size for found in self.files(path).values())

    def _md5(self, path: str) -> str | None:
        """As DVC writes it: of a folder, md5 over the sorted list of its files' md5s, and `.dir`."""
        files = self.files(path)
        if "" in files or not files:
            return files[""].md5 if files else None
        listing = [{"md5": found.md5, "relpath": name} for name, found in files.items()]
        return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"

    def _sha256(self, path: str) -> str | None:
        """As `artifacts.sha256` has it."""
        files = self.files(path)
        if "" in files or not files:
            return files[""].sha256 if files else None
        parts = sorted(files, key=lambda name: name.split("/"))
        return hashlib.sha256("".join(f"{name}\0{files[name].sha256}\n" for name in parts).encode()).hexdigest()

    def _inside(self, path: str) -> dict[str, str]:
        """Name inside a folder ('' for a file itself) -> where it is read."""
        place = self._place(path)
        first = bisect_left(self._names, place)
        if self._names[first : first + 1] == [place]:
            return {"": place}
        first, last = bisect_left(self._names, f"{place}/"), bisect_left(self._names, f"{place}0")  # '0' follows '/'
        return {name[len(place) + 1 :]: name for name in self._names[first:last]}

    def source(self, path: str) -> str | None:
        """Where git keeps a copy of a path; None where it keeps none."""
        top = self._top(path)
        return None if top is None else self._elsewhere[top] + path.removeprefix(top)

    def _place(self, path: str) -> str:
        """Where a path is read: itself, or git's copy where the whole folder is not here."""
        top = self._top(path)
        return path if top is None or Path(top).exists() else self.source(path)

    def _top(self, path: str) -> str | None:
        return next((folder for folder in self._elsewhere if path == folder or path.startswith(f"{folder}/")), None)


def _files(path: Path, ignored: tuple[str, ...]) -> Iterable[str]:
    if path.is_file():
        yield path.as_posix()
    elif path.is_dir():
        for file in path.rglob("*"):
            if file.is_file() and not any(fnmatch(part, word) for part in file.relative_to(path).parts for word in ignored):
                yield file.as_posix()


def _ignored() -> tuple[str, ...]:
    """The patterns of .dvcignore; plain names of files and folders, the only kind that this project has there."""
    lines = IGNORED.read_text().splitlines() if IGNORED.is_file() else []
    return tuple(line.strip().rstrip("/") for line in lines if line.strip() and not line.startswith("#"))


def _digest(name: str) -> Digest:
    md5, sha256, size, kept = hashlib.md5(), hashlib.sha256(), 0, []
    try:
        with open(name, "rb") as file:
            while block := file.read(BLOCK):
                md5.update(block)
                sha256.update(block)
                size += len(block)
                if name.endswith(KEPT):
                    kept.append(block)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    text = b"".join(kept).decode(errors="replace") if name.endswith(KEPT) else None
    return Digest(md5.hexdigest(), sha256.hexdigest(), size, text)
