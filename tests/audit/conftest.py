"""A small project in git and DVC: three points, a readout each, and a report."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import commit_here, git

from scaling4d import artifacts, audit, config, provenance
from scaling4d.audit.run import INTERVAL, locked_run
from scaling4d.pipeline import code_hashes
from scaling4d.records import Result, write_json

HOME, BUILT = Path("artifacts/test"), Path("reports/built")
POINTS = {"mini": (7, 0.75), "nano": (5, 0.5), "small": (6, 0.625)}  # parameters, top1
PACKAGES = ("benchmarks", "clips", "encoders", "pretrain", "readout", "report")
SETTINGS = {
    "profile": "test",
    "seed": 0,
    "clips": {"Curation": {"frames": 4}},
    "points": {name: {"SimpleMAE": {"width": 32, "rate": 3e-06, "clip": [4, 8, 8]}} for name in POINTS},
    "encoders": {"pretrained": {"theirs": {"Pretrained": {"source": "published", "revision": "", "clip": [4, 8, 8]}}}},
    "readout": {"shared": {"Head": {"width": 4, "heads": 8}}, "tasks": {"actions": {"Head": {"heads": 2}}}},
    "report": {"folder": "reports/built"},
}
READOUT = ["readout.shared", "readout.tasks.actions"]
DVC_YAML = """
stages:
  code:
    cmd: "true"
    deps: [src/scaling4d]
    outs: [PACKAGES]
  clips:
    cmd: true clips
    params: [profile, clips]
    deps: [data/videos, artifacts/code/clips.json]
    outs: ["artifacts/${profile}/clips"]
  pretrain:
    matrix: {point: "${points}"}
    cmd: true pretrain ${item.point}
    params: [profile, seed, "points.${item.point}.SimpleMAE"]
    deps: ["artifacts/${profile}/clips", artifacts/code/pretrain.json]
    outs: ["artifacts/${profile}/pretrain/${item.point}"]
  baseline:
    cmd: true baseline
    params: [profile, encoders.pretrained.theirs]
    deps: [artifacts/code/encoders.json]
    outs: ["artifacts/${profile}/pretrain/theirs"]
  benchmarks:
    cmd: true benchmarks
    deps: [data/benchmarks, artifacts/code/benchmarks.json]
    outs: [artifacts/benchmarks]
  readout:
    matrix: {encoder: "${points}"}
    cmd: true readout ${item.encoder}
    params: [profile, seed, readout.shared, readout.tasks.actions]
    deps: ["artifacts/${profile}/pretrain/${item.encoder}", artifacts/benchmarks/actions.json, artifacts/code/readout.json]
    outs: ["artifacts/${profile}/readout/${item.encoder}/actions/frozen"]
  report:
    cmd: true report
    params: [profile, report]
    deps: ["artifacts/${profile}", artifacts/code/report.json]
    outs: [results.csv: no, pretrain.csv: no, report.html: no, numbers.json: no, derived.json: no]
    metrics: [metrics.json: no]
""".replace("PACKAGES", ", ".join(f"artifacts/code/{package}.json" for package in PACKAGES))
DVC_YAML = re.sub(r"(\w+\.\w+): no", r"{reports/built/\1: {cache: false}}", DVC_YAML)
ENVIRONMENT = {"seconds": 1.5, "finished_unix_s": 1795288545, "machine": "x86_64", "cpus": 4, "python": "3.11.7"}
ENVIRONMENT["versions"] = {"torch": "2.13.0", "dvc": "3.67.1"}


def shell(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DVC_NO_ANALYTICS", "true")
        _write_sources()
        git("init", "-q")
        shell(sys.executable, "-m", "dvc", "init", "-q")
        shell(sys.executable, "-m", "dvc", "import-url", "-q", "experiments/pocket", "data")
        _write_artifacts()
        _write_report()
        Path("dvc.yaml").write_text(DVC_YAML)
        shell(sys.executable, "-m", "dvc", "commit", "-q", "--force")
        commit_here("the run")
    return root


def _write_sources() -> None:
    _write(Path("experiments/config.yaml"), "defaults:\n  - _self_\n  - profile: test\n")
    _write(Path("experiments/profile/test.yaml"), "# @package _global_\n" + yaml.safe_dump(SETTINGS))
    config.PARAMS.write_text(yaml.safe_dump(SETTINGS))
    for name in ("videos/a.mp4", "videos/b.mp4", "benchmarks/ssv2/list.json", "benchmarks/scannet/list.json"):
        _write(Path("experiments/pocket") / name, f"{name} as it was")
    _write(Path("published/model.safetensors"), "their weights")
    for package in PACKAGES:
        _write(Path(f"src/scaling4d/{package}/stage.py"), f'"""{package}."""\n\nVALUE = 1  # a number\n')
    code_hashes.write_hashes(Path("src/scaling4d"), Path("artifacts/code"))
    project = {"name": "scaling4d", "version": "1.0", "description": "A test", "license": "Apache-2.0"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in project.items()]
    Path("pyproject.toml").write_text("\n".join(["[project]", *lines, 'authors = [{ name = "Ada Test" }]', ""]))
    Path(".gitignore").write_text("/artifacts\n/data\n")


def _write_benchmark_hashes() -> None:
    """artifacts/benchmarks/ as stage `benchmarks` writes it."""
    for task, folder in (("actions", "data/benchmarks/ssv2"), ("depth", "data/benchmarks/scannet")):
        path = Path(f"artifacts/benchmarks/{task}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"task": task, "folders": {folder: artifacts.sha256(Path(folder))}, "problem": ""})


def _write_provenance(out: Path, package: str, keys: list[str], gin: str, inputs: dict[str, str]) -> None:
    bound = config.StageConfig(config.declared(config.read(), keys), {}, gin, {})
    content = artifacts.provenance_of(package, bound, code=artifacts.code_hash(package), inputs=inputs)
    artifacts.write_provenance(out, content, gin)


def _write_artifacts() -> None:
    sha, clips = artifacts.sha256, HOME / "clips"
    _write(clips / "shards/train-00000.tar", "clips of a and b")
    _write_provenance(clips, "clips", ["profile", "clips"], "Curation.frames = 4\n", {"videos": sha(Path("data/videos"))})
    _write_benchmark_hashes()
    theirs, inputs = HOME / "pretrain/theirs", {"model.safetensors": sha(Path("published/model.safetensors"))}
    _write(theirs / "model.safetensors", "their weights, converted")
    _write_provenance(theirs, "encoders", ["profile", "encoders.pretrained.theirs"], "", inputs)
    for point, (parameters, top1) in POINTS.items():
        weights, readout = HOME / "pretrain" / point, HOME / "readout" / point / "actions/frozen"
        _write(weights / "model.safetensors", f"weights of {point}")
        summary = {"point": point, "parameters": parameters, "train_loss": 0.5, "val_loss": 0.25, "seed": 0}
        write_json(weights / "summary.json", summary)
        gin = "A.x = 1\nSimpleMAE.clip = \\\n    (4,\n     8, 8)\nSimpleMAE.depth = 2\n"
        gin += "SimpleMAE.rate = 3e-06\nSimpleMAE.width = 32\n"
        _write_provenance(weights, "pretrain", ["profile", "seed", f"points.{point}.SimpleMAE"], gin, {"clips": sha(clips)})
        readout.mkdir(parents=True)
        values = (top1, round(top1 - 0.1, 2), round(top1 + 0.1, 2))
        sha256 = sha(weights / "model.safetensors")
        result = Result(point, parameters, "actions", "frozen", "top1", *values, "share", True, 10, 0, sha256, {"top5": 0.875})
        result.write(readout / "result.json")
        inputs = {"checkpoint": sha(weights), "benchmark": sha(Path("data/benchmarks/ssv2"))}
        _write_provenance(readout, "readout", ["profile", "seed", *READOUT], "Head.heads = 2\nHead.width = 4\n", inputs)


def _write_report() -> None:
    """As stage `report` does: tables, metrics.json, the page with an id for each number, and where each comes from."""
    BUILT.mkdir(parents=True)
    rows, losses, numbers, derived, metrics = [], [], [], {}, {}

    def show(value: Any, spec: str, source: Path, *key: Any) -> str:
        text, name = provenance.format_number(value, spec), f"n-{len(numbers)}"
        about = {"source": source.as_posix(), "key": key, "value": value, "format": spec}
        numbers.append({"id": name, "text": text, **about})
        return f'<td><span class="number" id="{name}">{text}</span></td>'

    page = "<p>1 run</p><table>"
    for point in POINTS:
        file = HOME / "readout" / point / "actions/frozen/result.json"
        result = json.loads(file.read_text())
        rows += [result, {**result, **dict.fromkeys(INTERVAL, ""), "metric": "top5", "value": 0.875}]
        losses.append(json.loads((HOME / "pretrain" / point / "summary.json").read_text()))
        metrics[point] = {name: result[name] for name in ("value", "low", "high")}
        row = {"encoder": point, "task": "actions", "protocol": "frozen", "metric": "top1"}
        derived[f"gain {point}"] = {"value": result["value"] - 0.25, "from": [[file.as_posix(), ["value"]]]}
        cells = [
            show(result["parameters"], ",d", file, "parameters"),
            show(result["value"], ".4f", file, "value"),
            show(result["low"], ".2f", BUILT / "results.csv", row, "low"),
            show(result["others"]["top5"], ".1%", file, "others", "top5"),
            show(result["checkpoint_sha256"], "", file, "checkpoint_sha256"),
            show(result["value"] - 0.25, "+.4f", BUILT / "derived.json", f"gain {point}", "value"),
        ]
        page += f"<tr><td>{point}</td>{''.join(cells)}</tr>"
    (BUILT / "results.csv").write_text(provenance.to_csv([field.name for field in fields(Result)][:-1], rows))
    (BUILT / "pretrain.csv").write_text(provenance.to_csv(["point", "parameters", "train_loss", "val_loss", "seed"], losses))
    nested = {"actions": {"top1↑ (share)": {"frozen": metrics}}}
    write_json(BUILT / "metrics.json", nested | {"val_loss": {"↓": dict.fromkeys(POINTS, 0.25)}})
    write_json(BUILT / "numbers.json", numbers)
    write_json(BUILT / "derived.json", derived)
    (BUILT / "report.html").write_text(f"{page}</table>\n")
    outs = {"clips": HOME / "clips", "report": BUILT / "report.html"}
    outs |= {f"pretrain-{point}": HOME / "pretrain" / point for point in POINTS}
    outs |= {f"readout-{point}-actions-frozen": HOME / "readout" / point / "actions/frozen" for point in POINTS}
    runs = [{"stage": name, "out_sha256": artifacts.sha256(path), **ENVIRONMENT} for name, path in outs.items()]
    write_json(BUILT / "runs.json", {"runs": runs, "seconds": 9.0})


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage, as the current folder."""
    subprocess.run(["cp", "-a", f"{made}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def another_benchmark(project: Path) -> None:
    """Another list of actions, and its hash as stage `benchmarks` writes it; nothing else ran since."""
    for path in (Path("data/benchmarks/ssv2/list.json"), *Path("artifacts/benchmarks").iterdir()):
        path.chmod(0o644)
    Path("data/benchmarks/ssv2/list.json").write_text("another one")
    _write_benchmark_hashes()


@pytest.fixture
def clone(project: Path) -> Path:
    """The same without data, artifacts and DVC's cache."""
    for name in ("data", "artifacts", ".dvc/cache"):
        shutil.rmtree(name)
    return project


@pytest.fixture
def flip() -> Callable[[str, str, str], None]:
    """Change a text in a file without a change of its size and time, by which DVC goes."""

    def change(path: str, old: str, new: str) -> None:
        file = Path(path)
        assert len(old) == len(new) and old in file.read_text(), f"{old} is not in {path}"
        before = file.stat()
        text = file.read_text().replace(old, new, 1)
        file.chmod(0o644)
        file.write_text(text)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return change


@pytest.fixture
def rewrite() -> Callable[..., None]:
    """Change top-level keys of a JSON file."""

    def change(path: str | Path, **values: Any) -> None:
        Path(path).chmod(0o644)
        write_json(Path(path), {**json.loads(Path(path).read_text()), **values})

    return change


@pytest.fixture
def messages(project: Path) -> Callable[[str], list[str]]:
    """The findings of a kind as the command prints them."""
    return lambda kind: [str(finding) for finding in audit.verify(locked_run()) if finding.kind == kind]


@pytest.fixture
def wrong(messages: Callable[[str], list[str]]) -> Callable[[], str]:
    """Everything that is wrong now."""
    return lambda: "\n".join(messages("wrong"))
