"""protocol.yaml: what the papers state, which setting carries it, how three profiles differ from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

PROFILES = ("paper", "pocket", "mae_st")
SHARED = {"mae_st": "pocket"}  # a profile without an entry of its own has that of another, whose defaults it has
SHAPE_OF_J = "shape of the encoder of 4DS-j"  # `what` of a row


@cache
def protocol() -> dict[str, Any]:
    """The file: `operation`, patterns of settings on which no result depends; `rows`, see its first lines."""
    import yaml

    return yaml.safe_load(resources.files(__package__).joinpath("protocol.yaml").read_text())


def rows() -> list[dict[str, Any]]:
    return protocol()["rows"]


def row_of(topic: str) -> dict[str, Any]:
    """The row of a topic."""
    return next(row for row in rows() if row["what"] == topic)


def entry_of(entries: Mapping[str, Any], profile: str) -> Any:
    """The status in a row, or the value in a setting's record, that is a profile's. None: it has none."""
    return entries[profile] if profile in entries else entries.get(SHARED.get(profile))


def status_profile(profile: str) -> str:
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
