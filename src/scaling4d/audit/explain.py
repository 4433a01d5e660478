"""Walk one number back: cell <- Result <- checkpoint <- shards <- source data, with settings, code and commands."""

from __future__ import annotations

import csv
import json
from contextlib import chdir
from pathlib import Path

from scaling4d import artifacts, config
from scaling4d.audit import lock
from scaling4d.checkpoint import WEIGHTS
from scaling4d.records import Result, UserError


def explain(root: Path, key: str) -> str:
    """Text: the number, then every stage that led to it, from the last to the first; works on a fresh clone too.

    Args:
        key: `encoder/task/protocol`.
    Raises:
        UserError: no such number.
    """
    with chdir(root):
        settings = config.read()
        stages, _ = lock.stages(Path())
        home = artifacts.home(settings)
        wanted = (home / "readout" / key).as_posix()
        makers = {out.path: stage for stage in stages.values() for out in stage.outs}
        if wanted not in makers or len(key.split("/")) != 3:
            prefix = f"{home.as_posix()}/readout/"
            known = ", ".join(path.removeprefix(prefix) for path in makers if path.startswith(prefix))
            raise UserError(f"no number {key!r} in dvc.lock; needed encoder/task/protocol, one of: {known or 'none was run'}")
        return "\n".join([*_cell(settings, key), *_walk(makers, wanted), *_repeat(makers[wanted])])


def _cell(settings: dict, key: str) -> list[str]:
    encoder, task, protocol = key.split("/")
    lines = []
    path = Path(config.section(settings, "report.folder")) / "results.csv"
    if path.is_file():
        with path.open(newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                if (row["encoder"], row["task"], row["protocol"]) == (encoder, task, protocol) and row["low"]:
                    interval = f"[{row['low']}, {row['high']}]"
                    lines.append(f"cell        {path} line {number}: {row['metric']} = {row['value']} {interval} {row['unit']}")
                    lines.append(f"            weights sha256 {row['checkpoint_sha256']}")
    home = artifacts.home(settings)
    result = home / "readout" / key / "result.json"
    if result.is_file():
        read = Result.read(result)
        lines.append(f"result      {result}: {read.metric} = {read.value!r} on {read.examples} examples, seed {read.seed}")
        lines.append(f"            sha256 {artifacts.sha256(result)}")
    weights = home / "pretrain" / encoder / WEIGHTS
    if weights.is_file():
        lines.append(f"checkpoint  {weights}: sha256 {artifacts.sha256(weights)}")
    return lines


def _walk(makers: dict[str, lock.Stage], wanted: str) -> list[str]:
    """Every stage upstream, each once, the nearest first."""
    waiting, seen, lines = [wanted], set(), []
    while waiting:
        stage = _maker(makers, waiting.pop(0))
        if stage is None or stage.name in seen:
            continue
        seen.add(stage.name)
        lines += ["", f"<- {stage.name}", f"   command  {stage.command}"]
        lines += [
            f"   wrote    {out.path}  md5 {out.md5}" for out in stage.outs if stage.name != "code" or out.path.endswith(".json")
        ]
        lines += [f"   setting  {key} = {json.dumps(value)}" for key, value in stage.params.items()]
        lines += [f"   read     {dep.path}  md5 {dep.md5}{_code(dep.path)}" for dep in stage.deps]
        waiting += [dep.path for dep in stage.deps]
    return lines


def _maker(makers: dict[str, lock.Stage], path: str) -> lock.Stage | None:
    """The stage that wrote a path or a folder above it."""
    return next((makers[p] for p in (path, *map(str, Path(path).parents)) if p in makers), None)


def _code(path: str) -> str:
    """The meaning of the code, where the file that holds it is here."""
    if not path.startswith("artifacts/code/") or not Path(path).is_file():
        return ""
    return f"  code sha256 {json.loads(Path(path).read_text()).get('sha256', '-')}"


def _repeat(stage: lock.Stage) -> list[str]:
    """How to make it again."""
    return [
        "",
        "to make it again",
        f"   dvc repro {stage.name}",
        f"   dvc repro --force --single-item {stage.name}   (this stage alone)",
    ]
