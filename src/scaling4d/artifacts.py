"""Artifacts: where they lie, their hashes, and the two files that say how each was made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from scaling4d import config, provenance
from scaling4d.config import StageConfig
from scaling4d.records import UserError, files_below, is_of_finder, json_text, write_json

CODE = Path("artifacts/code")
BENCHMARKS = Path("artifacts/benchmarks")  # of stage `benchmarks`
PROBES = BENCHMARKS / "probes.json"  # inputs of the probes of a pretraining
RUNS = Path(".runs")
PROVENANCE, OPERATIVE = "provenance.json", "operative_config.gin"
VERSIONS = ("torch", "numpy", "av", "xformers", "gin-config", "hydra-core", "dvc", "torchdata")


def home(settings: Mapping[str, Any]) -> Path:
    """The folder of this profile's artifacts."""
    return Path("artifacts") / config.section(settings, "profile")


def sha256(path: Path) -> str:
    """Hash of a file's bytes; of a folder, over the relative names and hashes of its files in sorted order.

    Linked folders count as the folders themselves. Files that macOS leaves in folders do not count
    (records.is_of_finder), as for DVC (.dvcignore).
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"no such file or folder: {path}")
    digest = hashlib.sha256()
    for file in (file for file in files_below(path) if not is_of_finder(file.name)):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def code_hash(package: str) -> dict[str, Any] | None:
    """The hash of a package's code as stage `code` wrote it; None: not written."""
    path = CODE / f"{package}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def provenance_of(stage: str, bound: StageConfig, *, code: Mapping[str, Any] | None, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Content of provenance.json: only facts that the declared inputs determine.

    Args:
        inputs: sha256 by name (shards, checkpoint, benchmark).
    """
    settings, overrides = dict(bound.declared), dict(bound.overrides)
    return {"stage": stage, "settings": settings, "overrides": overrides, "code": code, "inputs": dict(inputs)}


def write_provenance(out: Path, content: Mapping[str, Any], operative: str) -> None:
    """Write `provenance.json` and `operative_config.gin` into an artifact's folder."""
    write_json(out / PROVENANCE, content)
    (out / OPERATIVE).write_text(operative)


def is_written(folder: Path, content: Mapping[str, Any]) -> bool:
    """Whether an artifact's folder has this `provenance.json`."""
    path = folder / PROVENANCE
    return path.is_file() and path.read_text() == json_text(content)


def write_run(stage: str, out_sha256: str, *, started: float, **facts: Any) -> None:
    """Write time, machine, versions and throughput of a run to `.runs/`, outside DVC's outs. started: Unix seconds."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    content = {
        "stage": stage,
        "out_sha256": out_sha256,
        "seconds": round(time.time() - started, 2),
        "finished_unix_s": round(time.time()),
        "git": revision,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {processor()}".strip(),
        "cpus": os.cpu_count(),
        "versions": {name: version for name in VERSIONS if (version := _version(name))},
        **facts,
    }
    provenance.write_text(RUNS / f"{stage}-{out_sha256[:16]}.json", json_text(content))


def _version(package: str) -> str | None:
    """Of an installed package. xformers has no wheels for macOS and ARM."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
