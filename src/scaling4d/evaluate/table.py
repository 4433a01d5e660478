"""MODELS -> TABLE: evaluate every model on every task; results.csv and a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling4d import artifacts, config, provenance
from scaling4d.audit.evaluations import CSV, FACTS, origin_columns
from scaling4d.checkpoint import weights_identity
from scaling4d.evaluate import models, stage
from scaling4d.readout.tasks import TASKS
from scaling4d.records import Result, UserError, json_text, read_json_object
from scaling4d.report.tables import RESULTS, arrow, result_rows, text_table

COLUMNS = (
    *RESULTS,
    *("profile", "overrides", "settings_sha256", "code_sha256", "benchmark_sha256", "benchmark_val_sha256"),
    "readout_sha256",  # of the folder of the result, in which provenance.json has all of them in full
)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation. results: by model and task, with the encoder's name in this evaluation."""

    folder: Path
    profile: str
    results: tuple[Result, ...]


def evaluate(
    given: Sequence[str],
    tasks: Sequence[str],
    protocol: str,
    *,
    profile: str = "",
    changes: Sequence[str] = (),
    out: Path,
    report: Callable[[str], object] = print,
) -> Evaluation:
    """Write `out/results.csv`, and below `out` the encoders and their readouts. Nothing else is written or changed.

    Args:
        given: models, see evaluate.models. tasks: none: all of the profile that the protocol has.
        profile: of experiments/profile; empty: the default one. changes: Hydra overrides, `key=value`.
        report: called with a line after each result.
    Raises:
        UserError: as the composition of settings, `models.write_encoder` and `stage.evaluate_encoder`; two models of
            one name; or `out` is another folder.
    """
    import torch

    torch.set_num_threads(1)  # bits depend on it, and ranks are forked later
    settings = config.compose([*([f"profile={profile}"] if profile else []), *changes])
    profile, of_profile = settings["profile"], config.section(settings, "benchmarks.tasks")
    stage.check_tasks(list(tasks), protocol)
    chosen = list(dict.fromkeys(tasks)) or stage.tasks_of(protocol, of_profile)
    if not chosen:
        some = ",".join(stage.tasks_of(protocol, TASKS))
        raise UserError(f"profile {profile} has no task for protocol {protocol}; name some: --tasks {some}")
    names = {model: models.name_of(model) for model in dict.fromkeys(given)}
    for name, count in Counter(names.values()).items():
        if count > 1:
            same = " and ".join(model for model, other in names.items() if other == name)
            problem = f"{same} are both called {name}"
            raise UserError(f"{problem}; link one by another name (ln -s), or evaluate it with another --out by a second call")
    _take_folder(out)
    facts = {"models": names, "tasks": chosen, "protocol": protocol, "profile": profile, "overrides": list(changes)}
    provenance.write_text(out / FACTS, json_text(facts))
    clip = (settings["clip"]["frames"], settings["clip"]["side_px"], settings["clip"]["side_px"])
    for model in names:
        models.write_encoder(model, clip, out)
    weights = {name: artifacts.sha256(weights_identity(out / "pretrain" / name)) for name in names.values()}
    provenance.write_text(out / FACTS, json_text(facts | {"weights": weights}))
    results = []
    for name in names.values():
        for task in chosen:
            result = replace(stage.evaluate_encoder(name, task, protocol, settings, out), encoder=name)
            report(f"{name} {task} {protocol}: {result.metric} {result.value:.4f} ({result.low:.4f} to {result.high:.4f})")
            results.append(result)
    provenance.write_text(out / CSV, provenance.to_csv(COLUMNS, (row for r in results for row in _rows(r, out))))
    return Evaluation(out, profile, tuple(results))


def _take_folder(out: Path) -> None:
    """Raises UserError: a folder that has other files."""
    if out.exists() and not (out / FACTS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there, and no evaluation; needed a new folder, or that of an earlier evaluation")
    out.mkdir(parents=True, exist_ok=True)


def _rows(result: Result, out: Path) -> list[dict[str, Any]]:
    folder = out / "readout" / result.encoder / result.task / result.protocol
    columns = origin_columns(folder, read_json_object(folder / artifacts.PROVENANCE))
    return [row | columns for row in result_rows([result])]


def table_text(evaluation: Evaluation) -> str:
    """A row for every result, as text of at most 120 columns."""
    results, rows = evaluation.results, []
    title = f"profile {evaluation.profile}, seed {results[0].seed}, {results[0].protocol}; 95 % intervals over videos"
    for r in results:
        measured = (f"{r.value:.4f}", f"{r.low:.4f} to {r.high:.4f}", f"{r.examples:,}")
        rows.append((r.encoder, f"{r.parameters:,}", r.task, f"{r.metric} {arrow(r)}", *measured))
    head = ("encoder", "parameters", "task", "metric", "value", "interval", "examples")
    return text_table(title, head, rows, left=(0, 2, 3))
