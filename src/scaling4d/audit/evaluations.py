"""Evaluations: results.csv has the numbers of its results, and their weights, benchmarks and code are those here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from scaling4d import artifacts, benchmarks
from scaling4d.audit.run import NOTE, RESULT_KEY, UNCHECKED, WRONG, AuditFinding, recorded_row
from scaling4d.checkpoint import weights_identity
from scaling4d.pipeline import code_hashes
from scaling4d.provenance import flatten, load_yaml, parse_csv
from scaling4d.records import Result, UserError, json_text, read_json_object, shortened

CSV, FACTS, RESULT = "results.csv", "evaluation.json", "result.json"
AGAIN = "run the same `scaling4d evaluate` again"
Key = tuple[str, ...]
_folder_sha256 = cache(artifacts.sha256)


def verify_evaluation(folder: Path) -> tuple[list[AuditFinding], int]:
    """Findings, and the number of results. Raises UserError: not the folder of an evaluation."""
    if not (folder / FACTS).is_file() or not (folder / CSV).is_file():
        raise UserError(f"{folder} is no finished evaluation: needed {FACTS} and {CSV}, which `scaling4d evaluate` writes")
    _folder_sha256.cache_clear()
    try:
        facts = read_json_object(folder / FACTS)
        rows: dict[Key, dict[str, dict[str, str]]] = {}
        for row in parse_csv((folder / CSV).read_text()):
            rows.setdefault(tuple(row[column] for column in RESULT_KEY), {})[row["metric"]] = row
        expected = [*product(facts["models"].values(), facts["tasks"], [facts["protocol"]])]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is damaged ({shortened(error)}); {AGAIN}") from error
    findings = []
    for task in dict.fromkeys(key[1] for key in rows):
        settings = {row["settings_sha256"] for key, some in rows.items() if key[1] == task for row in some.values()}
        if len(settings) > 1:
            findings.append(
                AuditFinding(WRONG, task, f"its encoders were measured with {len(settings)} different settings; {AGAIN}")
            )
    for key in dict.fromkeys([*expected, *rows]):
        try:
            findings += _verify_result(folder, key, rows.get(key, {}), facts)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            findings.append(AuditFinding(WRONG, "/".join(key), f"it is damaged ({shortened(error)}); {AGAIN}"))
    return findings, len(rows)


def _verify_result(
    folder: Path, key: Key, rows: Mapping[str, Mapping[str, str]], facts: Mapping[str, Any]
) -> Iterator[AuditFinding]:
    """rows: by metric. facts: of evaluation.json."""
    where, home = "/".join(key), folder.joinpath("readout", *key)
    if not rows or not (home / RESULT).is_file():
        absent = f"{folder / CSV} has no row of it" if not rows else f"{home / RESULT} is absent"
        yield AuditFinding(WRONG, where, f"{absent}; {AGAIN}")
        return
    record, origin = read_json_object(home / RESULT), read_json_object(home / artifacts.PROVENANCE)
    for metric in sorted({record["metric"], *record["others"]} ^ rows.keys()):
        yield AuditFinding(WRONG, where, f"{metric} is in one of {folder / CSV} and {home / RESULT} alone; {AGAIN}")
    Result(**record)  # checks itself
    of_run = {
        "task": key[1],
        "protocol": key[2],
        "seed": origin["settings"]["seed"],
        "checkpoint_sha256": facts["weights"][key[0]],
    }
    for name in (name for name, value in of_run.items() if record[name] != value):
        yield AuditFinding(
            WRONG, where, f"{name} is {record[name]} in its {RESULT}, {of_run[name]} in {FACTS} or its folder; {AGAIN}"
        )
    columns = origin_columns(home, origin)
    for row in rows.values():
        yield from _verify_row(where, row, recorded_row(record, row) | columns)
    yield from _settings(where, origin, facts)
    yield from _weights(where, folder / "pretrain" / key[0], record, origin["inputs"])
    yield from _benchmarks(where, key[1], origin)
    now = code_hashes.hashes(code_hashes.SOURCE, [origin["code"]["package"]])[origin["code"]["package"]]["sha256"]
    if now != origin["code"]["sha256"]:
        yield AuditFinding(NOTE, where, f"the code of {origin['code']['package']} is newer; {AGAIN} for results of it")


def origin_columns(home: Path, origin: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a row that say where its number comes from. home: of the result. origin: its provenance.json."""
    return {
        "profile": origin["settings"]["profile"],
        "overrides": " ".join(f"{key}={value}" for key, value in origin["overrides"].items()),
        "settings_sha256": hashlib.sha256(json_text(origin["settings"]).encode()).hexdigest(),
        "code_sha256": origin["code"]["sha256"],
        "benchmark_sha256": origin["inputs"]["benchmark"],
        "benchmark_val_sha256": origin["inputs"].get("benchmark_val", origin["inputs"]["benchmark"]),
        "readout_sha256": artifacts.sha256(home),
    }


def _settings(where: str, origin: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[AuditFinding]:
    """The result has the profile of evaluation.json, and of its overrides those that are settings of the readout.

    An override may also choose a group, or be a setting that no readout has.
    """
    expected = {"profile": facts["profile"]}
    for key, _, text in (override.lstrip("+").partition("=") for override in facts["overrides"] if "${" not in override):
        with suppress(ValueError):  # of Hydra's own syntax
            expected[key] = load_yaml(text)
    settings = {key: value for key, value in flatten(origin["settings"]) if not isinstance(value, Mapping)}
    for key in (key for key, value in expected.items() if settings.get(key, value) != value):
        yield AuditFinding(WRONG, where, f"{key} is {settings[key]}, {expected[key]} in {FACTS}; {AGAIN}")
    if origin["overrides"] and not facts["overrides"]:
        yield AuditFinding(WRONG, where, f"it has {', '.join(origin['overrides'])} as override, {FACTS} none; {AGAIN}")


def _verify_row(where: str, row: Mapping[str, str], recorded: Mapping[str, Any]) -> Iterator[AuditFinding]:
    for column, value in recorded.items():
        now = "" if value is None else str(value)
        if row[column] != now:
            name = row["metric"] if column == "value" else f"{column} of {row['metric']}"
            yield AuditFinding(WRONG, where, f"{name} is {row[column]} in {CSV}, {now} in its folder; {AGAIN}")


def _weights(where: str, encoder: Path, record: Mapping[str, Any], inputs: Mapping[str, str]) -> Iterator[AuditFinding]:
    weights = weights_identity(encoder)
    if not weights.is_file():
        yield AuditFinding(UNCHECKED, where, f"its weights {weights} are not here")
    elif (now := _folder_sha256(weights)) != record["checkpoint_sha256"]:
        yield AuditFinding(WRONG, where, f"it was measured on weights {record['checkpoint_sha256']}; {weights} is {now}")
    elif (now := _folder_sha256(encoder)) != inputs["checkpoint"]:
        yield AuditFinding(WRONG, where, f"{encoder} had sha256 {inputs['checkpoint']}; now it is {now}")


def _benchmarks(where: str, task: str, origin: Mapping[str, Any]) -> Iterator[AuditFinding]:
    root, inputs = Path(origin["settings"]["readout.Evaluation"]["data"]), origin["inputs"]
    for split, sha in zip(
        benchmarks.SPLITS, (inputs["benchmark"], inputs.get("benchmark_val", inputs["benchmark"])), strict=True
    ):
        try:
            benchmark = benchmarks.find_benchmark(task, root, split).folder
        except UserError as error:
            yield AuditFinding(UNCHECKED, where, f"its benchmark is not here: {error}")
            return
        if (now := _folder_sha256(benchmark)) != sha:
            yield AuditFinding(WRONG, where, f"it was measured on {benchmark} of sha256 {sha}; now it is {now}")
            return
