"""What a benchmark lists and gives no sample; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling4d.records import UserError


@dataclass(frozen=True)
class Skipped:
    """A listed item of a benchmark that gives no sample. bad: it is damaged or missing; else a rule leaves it out."""

    id: str
    why: str
    bad: bool


class LeftOut(UserError):
    """A rule of the protocol: there is nothing in this item to learn or to measure."""


class Missing(UserError):
    """Listed files that are not there."""

    def __init__(self, folder: Path, names: Sequence[str], *, listed: int, what: str) -> None:
        super().__init__(f"{folder} lacks {len(names)} of {listed} {what}, the first is {names[0]}")
        self.names, self.listed = tuple(names), listed
