"""What curation found out before: a run with more videos, or one after a crash, looks at the new ones alone.

A database outside DVC's outs, so that it takes no memory; without it everything is found out anew, with the same result. Each
file's name holds a hash of all that its entries depend on beside the video's own bytes.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaling4d.clips.examine import Clip, Finding
from scaling4d.clips.inputs import Input, Rejection
from scaling4d.records import UserError, Video

PATIENCE_S = 60.0  # while another run writes into the same file


class Remembered:
    """A table of JSON values by name; what was put in survives a crash that follows."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database

    def __contains__(self, name: str) -> bool:
        return self.database.execute("SELECT 1 FROM found WHERE name = ?", (name,)).fetchone() is not None

    def get(self, name: str) -> Any:
        row = self.database.execute("SELECT value FROM found WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, name: str, value: Any) -> None:
        with self.database:
            self.database.execute("INSERT OR REPLACE INTO found VALUES (?, ?)", (name, json.dumps(value)))


@contextmanager
def remembered(folder: Path | None, kind: str, depends_on: Any) -> Iterator[Remembered]:
    """The table of `kind` for these circumstances; a damaged one is begun anew. Without a folder nothing is kept.

    Raises:
        UserError: it cannot be read or written at all.
    """
    if folder is None:
        path = ""  # of a database that is gone when it is closed
    else:
        folder.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        path = folder / f"{kind}-{key}.sqlite"
    try:
        database = _opened(path)
    except sqlite3.OperationalError as error:
        raise _unusable(path, error) from error
    except sqlite3.DatabaseError as error:
        why = " ".join(str(error).split())
        warnings.warn(f"{path} is damaged ({why}); what it held is found out anew", stacklevel=3)
        Path(path).unlink()
        database = _opened(path)
    with closing(database):
        try:
            yield Remembered(database)
        except sqlite3.OperationalError as error:
            raise _unusable(path, error) from error


def _unusable(path: Path | str, error: sqlite3.OperationalError) -> UserError:
    """Of a file that is not damaged: another process holds it, the disk is full, or its filesystem cannot lock files."""
    return UserError(
        f"{path or 'a temporary database'}: {error}; needed a folder on a disk with room, and no other run at work there"
    )


def _opened(path: Path | str) -> sqlite3.Connection:
    """Raises sqlite3.DatabaseError: damaged."""
    database = sqlite3.connect(path, timeout=PATIENCE_S)
    try:
        found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        database.execute("PRAGMA synchronous = OFF")  # what a crash of the whole machine loses is found out anew
        database.execute("CREATE TABLE IF NOT EXISTS found (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


def name_of(sha256: str, item: Input) -> str:
    """What a finding depends on: the bytes, and the stretches that a list wants."""
    return " ".join([sha256, *(f"{start_s!r}-{end_s!r}" for start_s, end_s in item.stretches)])


def to_json(finding: Finding) -> dict[str, Any]:
    plain = asdict(finding)
    for clip in plain["clips"]:
        clip["phash"] = clip["phash"].hex()
    return plain


def from_json(plain: dict[str, Any], path: str) -> Finding:
    """The finding, of the same bytes at another path."""
    clips = [Clip(c["start_s"], c["end_s"], tuple(c["frames"]), bytes.fromhex(c["phash"])) for c in plain["clips"]]
    found = None if plain["video"] is None else Video(**plain["video"] | {"path": path})
    rejected = tuple(Rejection(**why) for why in plain["rejected"])
    return Finding(path, plain["sha256"], found, tuple(clips), rejected, plain["origin_s"])
