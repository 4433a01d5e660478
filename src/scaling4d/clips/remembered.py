"""What curation found out before: a run with more videos, or one after a crash, looks at the new ones alone.

Lines of JSON outside DVC's outs; without them everything is found out anew, with the same result. Each file's name holds a hash
of all that its lines depend on beside the video's own bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from scaling4d.clips.examine import Clip, Finding
from scaling4d.clips.inputs import Input, Rejection
from scaling4d.records import Video


class Remembered:
    """A table of JSON values by name, kept on disk: every new entry is one appended line."""

    def __init__(self, lines: dict[str, str], file: TextIO | None) -> None:
        self.lines, self.file = lines, file  # as text, which is a fifth of what parsed values would take

    def __contains__(self, name: str) -> bool:
        return name in self.lines

    def get(self, name: str) -> Any:
        return json.loads(self.lines[name])[1] if name in self.lines else None

    def put(self, name: str, value: Any) -> None:
        self.lines[name] = json.dumps([name, value])
        if self.file is not None:
            self.file.write(self.lines[name] + "\n")
            self.file.flush()


@contextmanager
def remembered(folder: Path | None, kind: str, depends_on: Any) -> Iterator[Remembered]:
    """The table of `kind` for these circumstances; a line that was cut off is dropped. Without a folder nothing is kept."""
    if folder is None:
        yield Remembered({}, None)
        return
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{kind}-{key}.jsonl"
    lines: dict[str, str] = {}
    line = "\n"
    with path.open("a+") as file:
        file.seek(0)
        for line in file:
            with suppress(ValueError):  # cut off by a crash, and closed by the run after it
                name, _ = json.loads(line)
                if line.endswith("\n"):
                    lines[name] = line
        if not line.endswith("\n"):
            file.write("\n")
        yield Remembered(lines, file)


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
