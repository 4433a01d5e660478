"""Hashes of the files that a project names. Each file is read once, whatever DVC's own caches say."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from scaling4d.provenance import folder_md5
from scaling4d.records import UserError, files_below

TEXT = (".json", ".jsonl", ".gin", ".csv", ".html", ".py", ".md", ".yaml")  # suffixes of text files
BLOCK_BYTES = 1 << 20
IGNORED = Path(".dvcignore")


@dataclass(frozen=True)
class Digest:
    """Hashes of one file. size: bytes. text: None for a suffix outside TEXT."""

    md5: str
    sha256: str
    size: int
    text: str | None


class Disk:
    """Hashes of files and folders below the current folder, as they are now. A folder's hash is made of its files'.

    Args:
        git_copies: imported folder -> its copy in git. The copy stands in where the folder is absent.
    """

    def __init__(self, git_copies: Mapping[str, str]) -> None:
        lines = IGNORED.read_text().splitlines() if IGNORED.is_file() else []  # plain names of files and folders
        self._ignored = [line.strip().rstrip("/") for line in lines if line.strip() and not line.startswith("#")]
        self._git_copies = git_copies
        self._absent = {folder: copy for folder, copy in git_copies.items() if not Path(folder).exists()}
        self.paths, self.md5, self.sha256, self._digest = map(cache, (self._paths, self._md5, self._sha256, _digest))

    def read(self, paths: Iterable[str]) -> None:
        """Read every file at or below some paths now, in threads."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(self._digest, sorted({file for path in paths for file in self.paths(path).values()})))

    def files(self, path: str) -> dict[str, Digest]:
        """Digest by name inside a folder, in DVC's order. A file itself has the name ''. Empty: not here."""
        return {name: self._digest(file) for name, file in self.paths(path).items()}

    def text(self, path: str) -> str | None:
        """Text of a file; None: not here."""
        file = self.paths(path).get("")
        return None if file is None else self._digest(file).text

    def git_copy(self, path: str) -> str | None:
        """Path of git's copy of an imported file or folder; None: git has none."""
        return _moved(path, self._git_copies)

    def _paths(self, path: str, *, linked: bool = False) -> dict[str, str]:
        """Name inside a folder ('' for a file itself) -> the file to read; empty: not here. linked: see files_below."""
        place = Path(_moved(path, self._absent) or path)
        if place.is_file():
            return {"": place.as_posix()}
        names = sorted(file.relative_to(place).as_posix() for file in files_below(place, linked=linked))
        ignored = {name for name in names if any(fnmatch(part, word) for part in name.split("/") for word in self._ignored)}
        return {name: f"{place.as_posix()}/{name}" for name in names if name not in ignored}

    def _md5(self, path: str) -> str | None:
        """DVC's md5; None: not here."""
        md5s = {name: digest.md5 for name, digest in self.files(path).items()}
        return md5s[""] if "" in md5s else folder_md5(md5s) if md5s else None

    def _sha256(self, path: str) -> str | None:
        """The hash of `artifacts.sha256`; None: not here."""
        shas = {name: self._digest(file).sha256 for name, file in self.paths(path, linked=True).items()}
        if "" in shas or not shas:
            return shas.get("")
        lines = [f"{name}\0{shas[name]}\n" for name in sorted(shas, key=lambda name: name.split("/"))]
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _moved(path: str, folders: Mapping[str, str]) -> str | None:
    return next((new + path.removeprefix(old) for old, new in folders.items() if f"{path}/".startswith(f"{old}/")), None)


def _digest(name: str) -> Digest:
    md5, sha256, content = hashlib.md5(), hashlib.sha256(), b""
    try:
        with open(name, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                md5.update(block)
                sha256.update(block)
                content += block if name.endswith(TEXT) else b""
            size = file.tell()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    text = content.decode(errors="replace") if name.endswith(TEXT) else None
    return Digest(md5.hexdigest(), sha256.hexdigest(), size, text)
