import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scaling4d import artifacts, audit, config
from scaling4d.records import Result, UserError, write_json

FOLDER = Path("artifacts/test")
SETTINGS = {"seed": 0, "points": {"nano": {"width": 32, "rate": 3e-06}}, "report": {"folder": "reports/built"}, "profile": "test"}
PIPELINE = {
    "stages": {
        "pretrain": {
            "matrix": {"point": "${points}"},
            "cmd": "true",
            "params": ["seed", "points.${item.point}"],
            "deps": ["data/videos"],
            "outs": ["artifacts/${profile}/pretrain/${item.point}"],
        },
        "readout": {
            "cmd": "true",
            "params": ["seed"],
            "deps": ["artifacts/${profile}/pretrain/nano"],
            "outs": ["artifacts/${profile}/readout/nano/actions/frozen"],
        },
        "report": {
            "cmd": "true",
            "deps": ["artifacts/${profile}/readout"],
            "outs": [{"reports/built/results.csv": {"cache": False}}],
        },
    }
}


def dvc(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *words, "--quiet"], check=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DVC repository whose stages are committed as they lie."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DVC_NO_ANALYTICS", "true")
        _write()
        dvc("init", "--no-scm")
        dvc("commit", "--force")
    return root


def _write() -> None:
    Path("experiments/profile").mkdir(parents=True)
    Path("experiments/config.yaml").write_text("defaults:\n  - _self_\n  - profile: test\n")
    Path("experiments/profile/test.yaml").write_text("# @package _global_\n" + yaml.safe_dump(SETTINGS))
    config.PARAMS.write_text(yaml.safe_dump(SETTINGS))
    Path("dvc.yaml").write_text(yaml.safe_dump(PIPELINE))
    Path("data/videos").mkdir(parents=True)
    Path("data/videos/a.mp4").write_bytes(b"a video")
    weights, result, built = FOLDER / "pretrain/nano", FOLDER / "readout/nano/actions/frozen", Path("reports/built")
    for folder in (weights, result, built):
        folder.mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(b"weights")
    summary = {"point": "nano", "method": "SimpleMAE", "parameters": 5, "flops": 7.0, "clips_seen": 8, "train_loss": 0.5}
    summary |= {"val_loss": 0.25, "seed": 0}
    write_json(weights / "summary.json", summary)
    _provenance(weights, {"seed": 0, "points.nano": {"width": 32, "rate": 3e-06}})
    _provenance(result, {"seed": 0})
    sha = artifacts.sha256(weights / "model.safetensors")
    Result("nano", 5, "actions", "frozen", "top1", 0.5, 0.4, 0.6, "share", True, 10, 0, sha).write(result / "result.json")
    head = "encoder,parameters,task,protocol,metric,value,low,high,unit,higher_is_better,examples,seed,checkpoint_sha256\n"
    (built / "results.csv").write_text(f"{head}nano,5,actions,frozen,top1,0.5,0.4,0.6,share,True,10,0,{sha}\n")
    (built / "pretrain.csv").write_text(",".join(summary) + "\n" + ",".join(map(str, summary.values())) + "\n")
    write_json(built / "metrics.json", {"val_loss": {"nano": 0.25}, "actions": {"frozen": {"nano": 0.5}}})


def _provenance(folder: Path, settings: dict) -> None:
    write_json(folder / "provenance.json", {"settings": settings, "overrides": {}, "code": None, "inputs": {}})


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage."""
    subprocess.run(["cp", "-a", f"{made}/.", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wrong(root: Path) -> list[str]:
    return [f"{finding.where}: {finding.message}" for finding in audit.verify(root) if finding.kind == "wrong"]


def test_an_untouched_project_has_nothing_wrong(project: Path) -> None:
    assert audit.verify(project) == []
    assert audit.run(None) == 0


def test_one_flipped_byte_of_the_weights_is_named_even_where_its_time_and_size_stay(project: Path) -> None:
    path = FOLDER / "pretrain/nano/model.safetensors"
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(b"weighTs")
    subprocess.run(["touch", "-d", f"@{before.st_mtime_ns / 1e9:.9f}", str(path)], check=True)
    found = wrong(project)
    assert any("pretrain@nano: wrote artifacts/test/pretrain/nano" in f and "(differs: model.safetensors)" in f for f in found)
    assert any("result.json: was measured on weights" in f for f in found)
    assert audit.run(None) == 1


def test_a_changed_video_is_named(project: Path) -> None:
    Path("data/videos/a.mp4").write_bytes(b"another")
    assert len(wrong(project)) == 1
    assert wrong(project)[0].startswith("pretrain@nano: read data/videos as md5 ")


def test_a_number_typed_into_the_table_is_named(project: Path) -> None:
    path = Path("reports/built/results.csv")
    path.write_text(path.read_text().replace("top1,0.5,", "top1,0.55,"))
    found = wrong(project)
    assert (
        "reports/built/results.csv: top1 = 0.55 is not the 0.5 of artifacts/test/readout/nano/actions/frozen/result.json" in found
    )
    assert "reports/built/metrics.json: actions frozen nano = 0.5, the table says 0.55" in found


def test_a_summary_that_the_table_does_not_hold_is_named(project: Path) -> None:
    path = Path("reports/built/pretrain.csv")
    path.write_text(path.read_text().replace("0.25", "0.2"))
    where = "artifacts/test/pretrain/nano/summary.json"
    assert f"reports/built/pretrain.csv: nano val_loss = 0.2 is not the 0.25 of {where}" in wrong(project)


def test_a_hand_edit_of_params_is_named_and_an_override_that_stages_name_is_a_note(project: Path) -> None:
    config.PARAMS.write_text(yaml.safe_dump({**SETTINGS, "seed": 3}))
    assert any(
        line.startswith("params.yaml: seed = 3 is not the value of profile test, and no stage names it")
        for line in wrong(project)
    )
    path = FOLDER / "pretrain/nano/provenance.json"
    write_json(path, {**json.loads(path.read_text()), "overrides": {"seed": 3}})
    notes = [finding.message for finding in audit.verify(project) if finding.kind == "note"]
    assert notes == ["override seed = 3 of profile test, named by the stages that it changes"]


def test_settings_that_an_artifact_was_not_made_with_are_named(project: Path) -> None:
    path = FOLDER / "pretrain/nano/provenance.json"
    path.write_text(path.read_text().replace("32", "64"))
    made, locked = "{'rate': 3e-06, 'width': 64}", "{'rate': 3e-06, 'width': 32}"
    message = f"pretrain@nano: {path} was made with points.nano = {made}, dvc.lock says {locked}"
    assert message in wrong(project)


def test_a_fresh_clone_is_checked_as_far_as_git_goes(project: Path) -> None:
    subprocess.run(["rm", "-rf", "artifacts", "data", ".dvc/cache"], check=True)
    findings = audit.verify(project)
    assert {finding.kind for finding in findings} == {"not checked"}
    assert "artifacts/test/pretrain/nano" in findings[0].message
    path = Path("reports/built/metrics.json")
    path.write_text(path.read_text().replace("0.25", "0.2"))
    assert wrong(project) == ["reports/built/metrics.json: val_loss nano = 0.2, the table says 0.25"]


def test_a_stage_that_never_ran_is_named(project: Path) -> None:
    changed = {**SETTINGS, "points": {"nano": {"width": 32, "rate": 3e-06}, "mini": {"width": 64}}}
    Path("experiments/profile/test.yaml").write_text("# @package _global_\n" + yaml.safe_dump(changed))
    config.PARAMS.write_text(yaml.safe_dump(changed))
    assert wrong(project) == ["pretrain@mini: not in dvc.lock, so it was never run: run `dvc repro`"]


@pytest.mark.parametrize("clone", [False, True])
def test_a_number_is_walked_back_to_the_videos(project: Path, clone: bool) -> None:
    if clone:
        subprocess.run(["rm", "-rf", "artifacts", "data", ".dvc/cache"], check=True)
    text = audit.explain(project, "nano/actions/frozen")
    steps = [
        "reports/built/results.csv line 2: top1 = 0.5",
        "<- readout",
        "<- pretrain@nano",
        "data/videos  md5 ",
        "dvc repro readout",
    ]
    places = [text.index(step) for step in steps]
    assert places == sorted(places)
    assert 'setting  points.nano = {"rate": 3e-06, "width": 32}' in text
    assert ("checkpoint  artifacts" in text) is not clone


def test_an_unknown_number_lists_those_that_are(project: Path) -> None:
    with pytest.raises(UserError) as caught:
        audit.explain(project, "nano/actions")
    wanted = "no number 'nano/actions' in dvc.lock; needed encoder/task/protocol, one of: nano/actions/frozen"
    assert str(caught.value) == wanted
