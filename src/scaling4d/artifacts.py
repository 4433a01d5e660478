"""Finished files appear by rename, and each carries the settings, code and data that made it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from scaling4d import config
from scaling4d.records import UserError, write_json

PARTIAL = Path(".resume")
RUNS = Path(".runs")


def sha256(path: Path) -> str:
    """Of a file's bytes; of a folder, the hash over the relative names and hashes of all its files in sorted order."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"no such file or folder: {path}")
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
    return whole.hexdigest()


@contextmanager
def folder(final: Path) -> Iterator[Path]:
    """An empty folder to write into; it takes its final name only when the block ends without an error."""
    partial = PARTIAL / f"partial-{final.as_posix().replace('/', '-')}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        _rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, final: Path) -> None:
    """Also from one file system to another: then it is copied beside its place first."""
    try:
        partial.rename(final)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = final.with_name(f".{partial.name}")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(partial, beside)
        beside.rename(final)


def write_provenance(
    out: Path, *, stage: str, settings: Mapping[str, Any], keys: list[str], room: str, inputs: Mapping[str, str]
) -> None:
    """Write `provenance.json` and `operative_config.gin`: only what the declared inputs determine.

    Args:
        keys: the dotted settings that the stage declares in dvc.yaml.
        room: whose code made it; its hash comes from the `code` stage.
        inputs: sha256 by name of what was read (shards, checkpoint, benchmark).
    """
    code = Path("artifacts/code") / f"{room}.json"
    write_json(
        out / "provenance.json",
        {
            "stage": stage,
            "settings": config.declared(settings, keys),
            "overrides": config.overrides(settings, keys),
            "code": json.loads(code.read_text()) if code.is_file() else None,
            "inputs": dict(inputs),
        },
    )
    (out / "operative_config.gin").write_text(config.operative())


def write_run(stage: str, out_sha256: str, *, started: float, **facts: Any) -> None:
    """Write what differs from run to run (time, machine, versions, throughput) to `.runs/`, outside DVC's outs."""
    RUNS.mkdir(exist_ok=True)
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    packages = ("torch", "numpy", "av", "xformers", "gin-config", "hydra-core", "dvc", "torchdata")
    content = {
        "stage": stage,
        "out_sha256": out_sha256,
        "seconds": round(time.time() - started, 2),
        "finished_unix_s": round(time.time()),
        "git": revision,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {processor()}".strip(),
        "cpus": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in packages},
        **facts,
    }
    write_json(RUNS / f"{stage}-{out_sha256[:16]}.json", content)


def processor() -> str:
    """The model of this machine's processor, as far as the system says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def home(settings: Mapping[str, Any]) -> Path:
    """Where the artifacts of this profile live."""
    return Path("artifacts") / config.section(settings, "profile")
