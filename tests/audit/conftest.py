"""A small project in git and DVC: three points, a readout each, a report, and a second run kept beside its own report."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from scaling4d import artifacts, audit, code, config
from scaling4d.readout.benchmark import benchmark
from scaling4d.records import Result, write_json

HOME, BUILT = Path("artifacts/test"), Path("reports/built")
POINTS = {"mini": (7, 0.75), "nano": (5, 0.5), "small": (6, 0.625)}  # parameters, top1
SETTINGS = {
    "profile": "test",
    "seed": 0,
    "clips": {"Curation": {"frames": 4}},
    "points": {name: {"SimpleMAE": {"width": 32, "rate": 3e-06, "clip": [4, 8, 8]}} for name in POINTS},
    "readout": {"shared": {"Head": {"width": 4, "heads": 8}}, "tasks": {"actions": {"Head": {"heads": 2}}}},
    "report": {"folder": "reports/built"},
}
EVALUATION = {"readout": {"shared": {"Evaluation": {"data": "data/benchmarks"}}}}  # what stage `benchmarks` reads
READOUT = ["readout.shared", "readout.tasks.actions"]
STAGES = {
    "code": {"cmd": "true", "deps": ["src/scaling4d"], "outs": [f"artifacts/code/{room}.json" for room in code.STAGES]},
    "clips": {
        "cmd": "true clips",
        "params": ["profile", "clips"],
        "deps": ["data/videos", "artifacts/code/clips.json"],
        "outs": ["artifacts/${profile}/clips"],
    },
    "pretrain": {
        "matrix": {"point": "${points}"},
        "cmd": "true pretrain ${item.point}",
        "params": ["profile", "seed", "points.${item.point}"],
        "deps": ["artifacts/${profile}/clips", "artifacts/code/pretrain.json"],
        "outs": ["artifacts/${profile}/pretrain/${item.point}"],
    },
    "benchmarks": {
        "cmd": "true benchmarks",
        "deps": ["data/benchmarks", "artifacts/code/readout.json"],
        "outs": ["artifacts/benchmarks/actions.json"],
    },
    "readout": {
        "matrix": {"encoder": "${points}"},
        "cmd": "true readout ${item.encoder}",
        "params": ["profile", "seed", *READOUT],
        "deps": [
            f"artifacts/{name}"
            for name in ("${profile}/pretrain/${item.encoder}", "benchmarks/actions.json", "code/readout.json")
        ],
        "outs": ["artifacts/${profile}/readout/${item.encoder}/actions/frozen"],
    },
    "report": {
        "cmd": "true report",
        "params": ["profile", "report"],
        "deps": ["artifacts/${profile}", "artifacts/code/report.json"],
        "outs": [{f"{BUILT}/{name}": {"cache": False}} for name in ("results.csv", "pretrain.csv", "report.html")],
        "metrics": [{f"{BUILT}/metrics.json": {"cache": False}}],
    },
}
HEAD = "encoder,parameters,task,protocol,metric,value,low,high,unit,higher_is_better,examples,seed,checkpoint_sha256\n"


def shell(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def _commit(message: str) -> None:
    shell("git", "add", "-A")
    shell("git", "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-q", "-m", message)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DVC_NO_ANALYTICS", "true")
        _write_sources()
        shell("git", "init", "-q")
        shell(sys.executable, "-m", "dvc", "init", "-q")
        shell(sys.executable, "-m", "dvc", "import-url", "-q", "experiments/pocket", "data")
        _write_artifacts()
        _write_report()
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
        shell(sys.executable, "-m", "dvc", "commit", "-q", "--force")
        _commit("the run")
        _write_kept()
        _commit("a run kept")
    return root


def _write_sources() -> None:
    Path("experiments/profile").mkdir(parents=True)
    Path("experiments/config.yaml").write_text("defaults:\n  - _self_\n  - profile: test\n")
    Path("experiments/profile/test.yaml").write_text("# @package _global_\n" + yaml.safe_dump(SETTINGS))
    kept = {**SETTINGS, "profile": "kept", "report": {"folder": "reports/kept"}}
    Path("experiments/profile/kept.yaml").write_text("# @package _global_\n" + yaml.safe_dump(kept))
    config.PARAMS.write_text(yaml.safe_dump(SETTINGS))
    for name in ("videos/a.mp4", "videos/b.mp4", "benchmarks/ssv2/list.json"):
        path = Path("experiments/pocket") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} as it was")
    for module in code.STAGES.values():
        path = Path("src") / module.replace(".", "/")
        path = path / "__init__.py" if module.count(".") == 1 else path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{module}."""\n\nVALUE = 1  # a number\n')
    code.write_hashes(Path("src/scaling4d"), Path("artifacts/code"))
    project = {"name": "scaling4d", "version": "1.0", "description": "A test", "license": "Apache-2.0"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in project.items()]
    Path("pyproject.toml").write_text("\n".join(["[project]", *lines, 'authors = [{ name = "Ada Test" }]', ""]))
    Path(".gitignore").write_text("/artifacts\n/data\n")


def _write_artifacts() -> None:
    clips = HOME / "clips"
    (clips / "shards").mkdir(parents=True)
    (clips / "shards/train-00000.tar").write_text("clips of a and b")
    _say(clips, room="clips", keys=["profile", "clips"], gin="Curation.frames = 4\n", inputs={"videos": "data/videos"})
    benchmark("actions", EVALUATION)
    for point, (parameters, top1) in POINTS.items():
        weights, readout = HOME / "pretrain" / point, HOME / "readout" / point / "actions/frozen"
        weights.mkdir(parents=True)
        readout.mkdir(parents=True)
        (weights / "model.safetensors").write_text(f"weights of {point}")
        summary = {"point": point, "parameters": parameters, "train_loss": 0.5, "val_loss": 0.25, "seed": 0}
        write_json(weights / "summary.json", summary)
        gin = "".join(f"SimpleMAE.{line}\n" for line in ("clip = \\\n    (4, 8, 8)", "depth = 2", "rate = 3e-06", "width = 32"))
        keys = ["profile", "seed", f"points.{point}"]
        _say(weights, room="pretrain", keys=keys, gin=gin, inputs={"clips": str(clips)})
        sha = artifacts.sha256(weights / "model.safetensors")
        values = (top1, round(top1 - 0.1, 2), round(top1 + 0.1, 2))
        result = Result(point, parameters, "actions", "frozen", "top1", *values, "share", True, 10, 0, sha, {"top5": 0.875})
        result.write(readout / "result.json")
        inputs = {"checkpoint": str(weights), "benchmark": "data/benchmarks/ssv2"}
        _say(readout, room="readout", keys=["profile", "seed", *READOUT], gin="Head.heads = 2\nHead.width = 4\n", inputs=inputs)


def _say(folder: Path, *, room: str, keys: list[str], gin: str, inputs: dict[str, str]) -> None:
    shas = {name: artifacts.sha256(Path(path)) for name, path in inputs.items()}
    artifacts.write_provenance(folder, stage=room, settings=SETTINGS, keys=keys, room=room, inputs=shas)
    (folder / "operative_config.gin").write_text(gin)


def _write_report() -> None:
    BUILT.mkdir(parents=True)
    rows, losses, cells, metrics = [], [], [], {"actions": {"frozen": {}}, "val_loss": {}}
    for point, (parameters, top1) in POINTS.items():
        sha = artifacts.sha256(HOME / "pretrain" / point / "model.safetensors")
        low, high = round(top1 - 0.1, 2), round(top1 + 0.1, 2)
        rows.append(f"{point},{parameters},actions,frozen,top1,{top1},{low},{high},share,True,10,0,{sha}\n")
        rows.append(f"{point},{parameters},actions,frozen,top5,0.875,,,,,10,0,{sha}\n")
        losses.append(f"{point},{parameters},0.5,0.25,0\n")
        cells.append(
            f"<tr><td>{point}</td><td>{parameters}</td><td>{top1:.4f}<br/>[{low:.4f}, {high:.4f}]</td><td>+0.1234</td></tr>"
        )
        metrics["actions"]["frozen"][point], metrics["val_loss"][point] = top1, 0.25
    (BUILT / "results.csv").write_text(HEAD + "".join(rows))
    (BUILT / "pretrain.csv").write_text("point,parameters,train_loss,val_loss,seed\n" + "".join(losses))
    write_json(BUILT / "metrics.json", metrics)
    head = "<tr><th>encoder</th><th>parameters</th><th>actions</th><th>gain</th></tr>"
    (BUILT / "report.html").write_text(f"<p>1 run</p><table>{head}{''.join(cells)}</table>\n")
    outs = {"clips": HOME / "clips", "report": BUILT / "report.html"}
    outs |= {f"pretrain-{point}": HOME / "pretrain" / point for point in POINTS}
    outs |= {f"readout-{point}-actions-frozen": HOME / "readout" / point / "actions/frozen" for point in POINTS}
    shared = {"seconds": 1.5, "finished_unix_s": 1795288545, "machine": "x86_64", "cpus": 4, "python": "3.11.7"}
    shared["versions"] = {"torch": "2.13.0", "dvc": "3.67.1"}
    runs = [{"stage": name, "out_sha256": artifacts.sha256(path), **shared} for name, path in outs.items()]
    write_json(BUILT / "runs.json", {"runs": runs, "seconds": 9.0})


def _write_kept() -> None:
    """The same run under another name, whose artifacts are not here and whose inputs are those of the first commit."""
    shutil.copytree(BUILT, "reports/kept")
    text = Path("dvc.lock").read_text()
    for old, new in (("artifacts/test", "artifacts/kept"), ("reports/built", "reports/kept"), ("profile: test", "profile: kept")):
        text = text.replace(old, new)
    Path("reports/kept/dvc.lock").write_text(text)


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy that a test may damage, as the current folder."""
    subprocess.run(["cp", "-a", f"{made}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture
def another_benchmark(project: Path) -> None:
    """Another list of actions, and its hash as stage `benchmarks` writes it; nothing else ran since."""
    for path in (Path("data/benchmarks/ssv2/list.json"), Path("artifacts/benchmarks/actions.json")):
        path.chmod(0o644)
    Path("data/benchmarks/ssv2/list.json").write_text("another one")
    benchmark("actions", EVALUATION)


@pytest.fixture
def clone(project: Path) -> Path:
    """The same without data, artifacts and DVC's cache."""
    for name in ("data", "artifacts", ".dvc/cache"):
        shutil.rmtree(name)
    return project


@pytest.fixture
def flip() -> Callable[[str, str, str], None]:
    """Changes a text in a file and leaves its size and time, which DVC goes by."""

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
def wrong(project: Path) -> Callable[[], str]:
    """What is wrong now, as the command prints it."""
    return lambda: "\n".join(str(finding) for finding in audit.verify(project) if finding.kind == "wrong")


@pytest.fixture
def commit() -> Callable[[str], None]:
    return _commit


@pytest.fixture
def compose(project: Path) -> Callable[[dict], None]:
    """Makes settings, changed at the top level, those of the profile and of params.yaml."""

    def change(values: dict) -> None:
        settings = {**SETTINGS, **values}
        Path("experiments/profile/test.yaml").write_text("# @package _global_\n" + yaml.safe_dump(settings))
        config.PARAMS.write_text(yaml.safe_dump(settings))

    return change
