"""protocol.yaml against the composed profiles, experiments/ and the models."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scaling4d import config
from scaling4d.mae.models import config_of
from scaling4d.mae.simple_mae import SimpleMAE
from scaling4d.provenance import flatten
from scaling4d.report import protocol
from scaling4d.report.protocol import PROFILES, SHARED, entry_of, matched_keys

ROOT = Path(__file__).parents[2]
FILE = "src/scaling4d/report/protocol.yaml"
STATUSES = {"same", "differs", "ours"}


def recorded_value(record: Any, profile: str, words: tuple[str, ...]) -> Any:
    """The value that a row records for a key: the record itself, or its entry by profile, by words, or by both.

    Raises KeyError: the record has no entry for the profile or the words.
    """
    if isinstance(record, dict) and record and record.keys() <= {*PROFILES}:
        record = entry_of(record, profile)
        if record is None:
            raise KeyError(profile)
    return record[".".join(words)] if isinstance(record, dict) and record else record


def composed(profile: str, *overrides: str) -> dict[str, Any]:
    """The settings of a profile by dotted key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return dict(flatten(config.compose([f"profile={profile}", *overrides])))


@pytest.fixture(scope="module")
def profiles() -> dict[str, dict[str, Any]]:
    return {profile: composed(profile) for profile in PROFILES}


def errors(profile: str, settings: Mapping[str, Any]) -> list[str]:
    """Every difference of the table to the settings of a profile."""
    messages = []
    records = {pattern: record for row in protocol.rows() for pattern, record in row.get("settings", {}).items()}
    keys_of = matched_keys([*records, *protocol.protocol()["operation"]], settings)
    patterns: dict[str, list[str]] = {key: [] for key, value in settings.items() if value != {}}
    for pattern, keys in keys_of.items():
        for key, words in keys:
            patterns.setdefault(key, []).append(pattern)
            try:
                recorded = recorded_value(records[pattern], profile, words) if pattern in records else settings[key]
            except KeyError:
                messages.append(f"{key} = {settings[key]!r} in profile {profile}; {FILE} has no value for it at {pattern}")
                continue
            if recorded != settings[key] or isinstance(recorded, bool) != isinstance(settings[key], bool):
                message = f"{key} = {settings[key]!r} in profile {profile}; {FILE} records {recorded!r} at {pattern}"
                messages.append(f"{message}; write the value there, and see whether the row's status still holds")
    for key, several in patterns.items():
        if len(several) != 1:
            where = f"the rows {' and '.join(several)}" if several else "no row"
            messages.append(f"{key} = {settings[key]!r} in profile {profile} has {where} in {FILE}; needed one, or operation")
    return messages


@pytest.mark.parametrize("profile", PROFILES)
def test_every_setting_of_the_profiles_has_one_row_with_its_value(profiles: dict, profile: str) -> None:
    assert len(profiles[profile]) > 200
    assert errors(profile, profiles[profile]) == []


@pytest.mark.parametrize(("profile", "key", "value", "recorded"), [
    ("pocket", "pretrain.Training.weight_decay", 0.1, 0.05),
    ("paper", "points.j.model.SimpleMAE.heads", 16, 32),
    ("mae_st", "pretrain.Training.clip_norm", 1.0, 0.02),
    ("mae_st", "pretrain.Training.weight_decay", 0.1, 0.05),
])  # fmt: skip
def test_a_changed_setting_fails_until_its_row_says_so(profile: str, key: str, value: float, recorded: float) -> None:
    message = f"{key} = {value} in profile {profile}; {FILE} records {recorded} at {key}; "
    message += "write the value there, and see whether the row's status still holds"
    assert errors(profile, composed(profile, f"{key}={value}")) == [message]


def test_a_new_setting_fails_until_it_has_a_row() -> None:
    message = f"pretrain.Training.ema = 0.99 in profile pocket has no row in {FILE}; needed one, or operation"
    assert errors("pocket", composed("pocket", "+pretrain.Training.ema=0.99")) == [message]


def test_a_value_without_a_setting_is_named(profiles: dict) -> None:
    settings = profiles["pocket"] | {"points.large.model.SimpleMAE.width": 128}
    key = "points.large.model.SimpleMAE.width"
    assert errors("pocket", settings) == [
        f"{key} = 128 in profile pocket; {FILE} has no value for it at points.*.model.SimpleMAE.width"
    ]


def test_every_pattern_and_every_recorded_word_exists_in_a_profile(profiles: dict) -> None:
    records = {pattern: record for row in protocol.rows() for pattern, record in row.get("settings", {}).items()}
    assert len(records) == sum(len(row.get("settings", {})) for row in protocol.rows())
    patterns = [*records, *protocol.protocol()["operation"]]
    assert len(patterns) == len({*patterns})
    matched = {profile: matched_keys(patterns, settings) for profile, settings in profiles.items()}
    for pattern in patterns:
        words = {profile: {".".join(words) for _, words in matched[profile][pattern]} for profile in PROFILES}
        assert any(words.values()), f"{pattern} of {FILE} matches no setting of {' or '.join(PROFILES)}"
        record = records.get(pattern)
        by_profile = isinstance(record, dict) and record and record.keys() <= {*PROFILES}
        parts = record if by_profile else {"both": record}
        for profile, part in parts.items():
            known = words.get(profile, set().union(*words.values()))
            stale = {*part} - known if isinstance(part, dict) else set() if known else {profile}
            assert not stale, f"{pattern} of {FILE} records {', '.join(stale)}, which no setting has"


def test_every_row_has_a_source_and_a_status_for_each_profile_with_its_settings(profiles: dict) -> None:
    rows, known = protocol.rows(), {"what", "stated", "source", "reason", "settings", "fixed", *PROFILES}
    assert len({row["what"] for row in rows}) == len(rows)
    for row in rows:
        what = row["what"]
        assert row.keys() <= known and row.keys() >= {"stated", "source"}, what
        assert "settings" in row or "fixed" in row, what
        for profile, settings in profiles.items():
            keys = [key for keys in matched_keys(row.get("settings", ()), settings).values() for key in keys]
            assert (profile in row) == (bool(keys) or "settings" not in row) or profile in SHARED, f"{what}: {profile}"
            assert not keys or entry_of(row, profile), f"{what}: status for profile {profile}"
            own = any(isinstance(record, dict) and profile in record for record in row.get("settings", {}).values())
            assert not own or profile in row, f"{what}: values of profile {profile} without a status"
        statuses = {row[profile] for profile in PROFILES if profile in row}
        assert statuses <= STATUSES, what
        assert ("reason" in row) == bool(statuses - {"same"}), f"{what}: a row that is ours or differs has a reason"


def test_the_counts_of_parameters_are_those_of_the_models(profiles: dict) -> None:
    counts: dict[str, list[str]] = {}
    for point in ("B", "G", "e", "j"):
        prefix = f"points.{point}.model.SimpleMAE."
        settings = {key.removeprefix(prefix): value for key, value in profiles["paper"].items() if key.startswith(prefix)}
        with torch.device("meta"):
            model = SimpleMAE(config_of(SimpleMAE, settings))
        parts = (model.encoder.parameters(), [model.coarse_tokens], model.decoder.parameters())
        total = 0
        for part, name in zip(parts, ("without coarse tokens and decoder", "with coarse tokens", "with both"), strict=True):
            total += sum(p.numel() for p in part)
            counts.setdefault(name, []).append(f"{point} {total / 1e6:,.1f} M")
    row = protocol.row_of("number of parameters")
    assert row["fixed"] == "; ".join(f"{name} {', '.join(numbers)}" for name, numbers in counts.items())


def test_every_setting_that_is_marked_ours_is_ours_or_differs_in_the_table() -> None:
    """The mark is a comment in experiments/config.yaml, on the line of a key or of the mapping above it."""
    listed = [
        pattern
        for row in protocol.rows()
        if {row.get(profile) for profile in PROFILES} & {"ours", "differs"}
        for pattern in row.get("settings", ())
    ]
    text = (ROOT / "experiments/config.yaml").read_text()
    lines = text.splitlines()
    marked = [key for key, line in keys_of(yaml.compose(text)) if "ours" in lines[line].partition("#")[2]]
    assert len(marked) > 10
    for key in marked:
        words = key.replace("recipes.frozen", "readout.frozen.*.Frozen").split(".")
        same = [one for one in listed if all(a == b or "*" in (a, b) for a, b in zip(words, one.split("."), strict=False))]
        assert same, f"{key} is marked ours in experiments/config.yaml, and no row of {FILE} says ours or differs"


def keys_of(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted keys and the line on which each stands."""
    for key, value in (pair for pair in node.value if pair[0].value != "<<"):
        yield f"{prefix}{key.value}", key.start_mark.line
        if isinstance(value, yaml.MappingNode):
            yield from keys_of(value, f"{prefix}{key.value}.")
