"""protocol.yaml: what the papers state, which setting carries it, how profiles `paper` and `pocket` differ from it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

PROFILES = ("paper", "pocket")
STATUSES = ("same", "differs", "ours")
SHAPE_OF_J = "shape of the encoder of 4DS-j"  # `what` of a row


@cache
def protocol() -> dict[str, Any]:
    """The file: `operation`, patterns of settings on which no result depends; `rows`, see its first lines."""
    import yaml

    return yaml.safe_load(resources.files(__package__).joinpath("protocol.yaml").read_text())


def rows() -> list[dict[str, Any]]:
    return protocol()["rows"]


def row_of(what: str) -> dict[str, Any]:
    """The row of a topic."""
    return next(row for row in rows() if row["what"] == what)


def judged_profile(profile: str) -> str:
    """The profile whose statuses stand for a run's: its own, or `pocket`, whose defaults the other profiles share."""
    return profile if profile in PROFILES else "pocket"


def matched_keys(patterns: Iterable[str], keys: Iterable[str]) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Pattern -> its keys, each with the words that `*` stands for. The patterns with the fewest `*` win a key."""
    forms = [(pattern, re.compile(re.escape(pattern).replace(r"\*", "([^.]+)"))) for pattern in patterns]
    keys_of: dict[str, list[tuple[str, tuple[str, ...]]]] = {pattern: [] for pattern, _ in forms}
    for key in keys:
        matches = [(pattern, match.groups()) for pattern, form in forms if (match := form.fullmatch(key))]
        for pattern, words in matches:
            if len(words) == min(len(others) for _, others in matches):
                keys_of[pattern].append((key, words))
    return keys_of


def recorded_value(record: Any, profile: str, words: tuple[str, ...]) -> Any:
    """The value that a row records for a key: the record itself, or its entry by profile, by words, or by both.

    Raises KeyError: the record has no entry for the profile or the words.
    """
    if isinstance(record, dict) and record and record.keys() <= {*PROFILES}:
        record = record[profile]
    return record[".".join(words)] if isinstance(record, dict) and record else record
