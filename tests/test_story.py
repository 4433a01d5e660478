"""The whole story at smoke size, through real `dvc repro` in a temporary clone."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import ENVIRONMENT, cloned, commit, run
from ruamel.yaml import YAML

NUMBERS = {"value", "low", "high"}
TASKS = ("actions", "boxes", "depth", "points", "pose")
# code clips, benchmarks, pretrain, distill, baselines, frozen, finetune, classifier, show, reconstruct, report
STAGES = 2 + 5 + 2 + 1 + 2 + 3 * 5 + 5 + 1 + 2 + 2 + 1

FORCED = (
    *("pretrain@nano", "distill@nano_distilled", "show@depth", "reconstruct@nano", "report"),
    *("readout_frozen@nano-depth", "readout_finetune@nano-actions", "readout_classifier@nano"),
)


def cli(clone: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return run(clone, "python", "-m", "scaling4d", *arguments, check=check)


def refused(clone: Path, *arguments: str) -> str:
    """The one line that a refused command prints."""
    done = cli(clone, *arguments, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("override: ")]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def ran(said: str) -> list[str]:
    return [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]


def md5s(clone: Path, stage: str) -> list[str]:
    return [out["md5"] for out in yaml.safe_load((clone / "dvc.lock").read_text())["stages"][stage]["outs"]]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files in a repository of their own."""
    folder = cloned(tmp_path_factory.mktemp("story") / "scaling4d")
    commit(folder)
    return folder


@pytest.fixture(scope="module")
def story(clone: Path) -> Path:
    """The clone after all stages of the smoke profile, as `make repro` runs them: four at a time, each by `dvc repro`."""
    cli(clone, "compose", "profile=smoke")
    done = ran(run(clone, "make", "ahead", "JOBS=4").stdout)
    assert len(done) == len(set(done)) == STAGES
    return clone


@contextmanager
def written(story: Path, name: str, more: str) -> Iterator[None]:
    """A file has `more` at its end; afterwards it, and all that DVC made of it, are as before."""
    path, made = story / name, {file: (story / file).read_text() for file in ("data.dvc", "dvc.lock")}
    before = path.read_text() if path.exists() else None
    path.write_text((before or "") + more)
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_text(before)
        for file, text in made.items():
            (story / file).write_text(text)
        run(story, "dvc", "checkout", "-q")


@pytest.fixture(scope="module")
def forced(story: Path) -> Iterator[subprocess.Popen]:
    """FORCED run anew in a copy of the story, beside the tests that follow."""
    copy = shutil.copytree(story, story.with_name("forced"), symlinks=True)
    command = [shutil.which("dvc", path=ENVIRONMENT["PATH"]), "repro", "-f", "-s", *FORCED]
    with (
        copy.with_suffix(".txt").open("w") as said,
        subprocess.Popen(command, cwd=copy, env=ENVIRONMENT, start_new_session=True, stdout=said, stderr=said) as child,
    ):
        try:
            yield child
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def test_the_committed_lock_says_that_nothing_changed(clone: Path) -> None:
    assert ran(run(clone, "dvc", "repro", "--dry", "--allow-missing").stdout) == []


@pytest.mark.usefixtures("forced")
def test_a_second_run_does_nothing(story: Path) -> None:
    assert ran(run(story, "dvc", "repro").stdout) == []


def test_every_number_of_the_report_is_a_result(story: Path) -> None:
    rows = list(csv.DictReader((story / "reports/smoke/results.csv").open()))
    assert {(row["encoder"], row["task"], row["protocol"]) for row in rows} == {
        (encoder, task, protocol)
        for encoder, protocol in (("nano", "frozen"), ("nano", "finetune"), ("untrained_nano", "frozen"), ("pixels", "frozen"))
        for task in TASKS
    } | {("nano", "actions", "classifier")}
    for row in rows:
        result = json.loads(
            (story / f"artifacts/smoke/readout/{row['encoder']}/{row['task']}/{row['protocol']}/result.json").read_text()
        )
        assert float(row["value"]) == ({result["metric"]: result["value"]} | result["others"])[row["metric"]]
    assert "<svg" in (story / "reports/smoke/report.html").read_text()


def test_predictions_are_drawn_and_shown_in_the_report(story: Path) -> None:
    page = (story / "reports/smoke/report.html").read_text()
    for task in ("actions", "depth"):
        drawn = {path.name for path in (story / f"artifacts/smoke/show/{task}").iterdir()}
        assert drawn == {"sheet.png", "clips.mp4", "provenance.json", "operative_config.gin"}
        assert f'alt="{task}: predictions beside the truth" src="data:image/png;base64,' in page


def test_every_stage_reads_what_it_declares(story: Path) -> None:
    locked = YAML(typ="safe").load(story / "dvc.lock")["stages"]  # YAML 1.2, as DVC writes it: 3e-06 is a number
    for path in (story / "artifacts/smoke").rglob("provenance.json"):
        made = json.loads(path.read_text())
        name = stage_of(path.parent.relative_to(story / "artifacts/smoke"), made["stage"])
        declared = nested(locked[name].get("params", {}).get("params.yaml", {}))
        for key, value in made["settings"].items():
            inner = declared
            for word in key.split("."):
                inner = inner[word]
            assert inner == value, f"{name}: {key}"
        assert made["overrides"] == {}


def nested(values: dict[str, object]) -> dict:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    found: dict = {}
    for key, value in values.items():
        *path, last = key.split(".")
        inner = found
        for word in path:
            inner = inner.setdefault(word, {})
        inner[last] = value
    return found


def stage_of(folder: Path, kind: str) -> str:
    parts = folder.parts
    match kind:
        case "clips":
            return "clips"
        case "baseline":
            return "baseline_pixels" if parts[1] == "pixels" else f"baseline_untrained@{parts[1].removeprefix('untrained_')}"
        case "readout":
            return f"readout_{parts[3]}@{parts[1]}" + ("" if parts[3] == "classifier" else f"-{parts[2]}")
    return f"distill@{parts[1]}" if parts[1].endswith("_distilled") else f"{kind}@{parts[1]}"


def test_a_trained_readout_speaks_about_any_video(story: Path, tmp_path: Path) -> None:
    video, home = str(min((story / "data/videos/phone").glob("*.mp4"))), "artifacts/smoke/readout"
    np.save(tmp_path / "two.npy", np.array([[0.25, 0.5], [0.75, 0.5]]))
    asked = ("--queries", str(tmp_path / "two.npy"))
    for task, shape in (("depth", (1, 16, 64, 64)), ("pose", (1, 3, 4)), ("actions", (1, 8)), ("points", (1, 2, 16, 4))):
        out = tmp_path / f"{task}.npz"
        cli(story, "features", f"{home}/nano/{task}/frozen", video, "--out", str(out), *(asked if task == "points" else ()))
        found = np.load(out)
        assert found["output"].shape == shape
        assert sorted(found) == [*(f"layer_{i:02d}" for i in range(5)), "output"]
    out = ("--out", str(tmp_path / "no.npz"))
    boxes = refused(story, "features", f"{home}/nano/boxes/frozen", video, *out)
    assert boxes.endswith("is asked about things in the first frame, Q 4 in 0..1; correct --queries")
    tuned = refused(story, "features", f"{home}/nano/depth/finetune", video, *out)
    assert tuned.endswith("was fine-tuned, and the tuned encoder is not kept; take the frozen readout beside it")
    assert not (tmp_path / "no.npz").exists()


def test_a_comment_reruns_nothing_but_the_code_stage(story: Path) -> None:
    with written(story, "src/scaling4d/mae/attention.py", "\n# a remark\n"):
        assert ran(run(story, "dvc", "repro").stdout) == ["code"]


def test_one_value_reruns_just_what_depends_on_it(story: Path) -> None:
    try:
        cli(story, "compose", "profile=smoke", "readout.frozen.pose.Recipe.steps=5")
        changed = {"readout_frozen@nano-pose", "readout_frozen@untrained_nano-pose", "readout_frozen@pixels-pose"}
        after = set(ran(run(story, "dvc", "repro", "--dry").stdout))
        assert changed <= after <= changed | {"readout_finetune@nano-pose", "report"}
    finally:
        cli(story, "compose", "profile=smoke")


def test_another_benchmark_reruns_the_readouts_of_its_task_alone(story: Path) -> None:
    with written(story, "experiments/pocket/benchmarks/scannet/remark.txt", "new"):
        assert set(ran(run(story, "dvc", "repro", "benchmarks").stdout)) == {f"benchmarks@{task}" for task in TASKS}
        readouts = {f"readout_frozen@{encoder}-depth" for encoder in ("nano", "untrained_nano", "pixels")}
        after = set(ran(run(story, "dvc", "repro", "--dry").stdout))
        assert readouts <= after <= readouts | {"readout_finetune@nano-depth", "show@depth", "report"}


def test_an_experiment_lists_its_override_everywhere(story: Path) -> None:
    commit(story)
    run(story, "dvc", "exp", "run", "--name", "longer", "-S", "profile=smoke", "-S", "readout.finetune.pose.Recipe.steps=3")
    made = json.loads((story / "artifacts/smoke/readout/nano/pose/finetune/provenance.json").read_text())
    assert made["overrides"] == {"readout.finetune.pose.Recipe.steps": 3}
    assert "readout.finetune.pose.Recipe.steps" in (story / "reports/smoke/report.html").read_text()
    shown = json.loads(run(story, "dvc", "exp", "diff", "HEAD", "longer", "--json").stdout)
    assert "readout.finetune.pose.Recipe.steps" in json.dumps(shown["params"])
    assert any("pose" in key for values in shown["metrics"].values() for key in values)
    rows = json.loads(run(story, "dvc", "metrics", "diff", "HEAD", "longer", "--json").stdout)["reports/smoke/metrics.json"]
    assert {name.rpartition(".")[2] for name in rows if name.startswith("pose.epe↓ (scene units).finetune.nano.")} <= NUMBERS
    plots = json.loads(run(story, "dvc", "plots", "diff", "HEAD", "longer", "--json").stdout)["data"]
    assert {"readouts", "losses", "reports/smoke/headline.svg"} <= plots.keys()
    cli(story, "compare", "HEAD", "longer", "--out", "page.html")
    page = (story / "page.html").read_text()
    assert "<td>readout.finetune.pose.Recipe.steps</td><td>2</td><td>3</td>" in page
    assert "<td>Recipe.steps</td><td>2</td><td>3</td><td>declared</td><td>readout/nano/pose/finetune</td>" in page
    (story / "page.html").unlink()
    run(story, "git", "checkout", "-q", ".")
    run(story, "dvc", "checkout", "-q")


def test_a_killed_stage_leaves_nothing_under_its_final_name(story: Path) -> None:
    final = story / "artifacts/smoke/pretrain/nano"
    kept = story / "kept"
    final.rename(kept)
    command = [sys.executable, "-m", "scaling4d", "pretrain", "nano"]
    child = subprocess.Popen(command, cwd=story, env=ENVIRONMENT, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not list((story / ".resume").glob("pretrain-*")) and time.monotonic() < deadline:  # it trains
            time.sleep(0.01)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert not final.exists()
    finally:
        kept.rename(final)


def test_bad_input_is_one_clear_line(story: Path) -> None:
    assert "no setting 'points.nan0'" in refused(story, "pretrain", "nan0")
    assert "unknown readout 'smell'" in refused(story, "readout", "nano", "smell", "frozen")
    assert "is not a checkpoint" in refused(story, "readout", "nobody", "depth", "frozen")
    assert "unknown baseline 'nothing'" in refused(story, "baseline", "nothing")
    settings = (story / "params.yaml").read_text()
    try:
        (story / "params.yaml").write_text(settings + "\npretrian: {}\n")
        assert "pretrian" in refused(story, "clips")
        (story / "params.yaml").write_text(settings.replace("loss_on: all", "loss_on: some"))
        assert refused(story, "baseline", "untrained_nano") == "error: loss_on = 'some'; needed 'all' or 'masked'"
    finally:
        (story / "params.yaml").write_text(settings)


def test_missing_empty_and_wrong_data_are_refused(story: Path) -> None:
    benchmarks, videos, aside = story / "data/benchmarks", story / "data/videos", story / "aside"
    benchmarks.rename(aside)
    try:
        assert "data/benchmarks" in refused(story, "readout", "nano", "depth", "frozen")
        (benchmarks / "scannet/photos").mkdir(parents=True)
        assert "scannet" in refused(story, "readout", "nano", "depth", "frozen")
    finally:
        shutil.rmtree(benchmarks, ignore_errors=True)
        aside.rename(benchmarks)
    videos.rename(aside)
    try:
        assert "data/videos" in refused(story, "clips")
        videos.mkdir()
        assert "data/videos" in refused(story, "clips")
    finally:
        shutil.rmtree(videos, ignore_errors=True)
        aside.rename(videos)


def test_stages_are_deterministic(story: Path, forced: subprocess.Popen) -> None:
    copy = story.with_name("forced")
    failed, said = forced.wait(), copy.with_suffix(".txt").read_text()
    assert not failed, said[-3000:]
    assert set(ran(said)) == set(FORCED)
    assert {stage: md5s(copy, stage) for stage in FORCED} == {stage: md5s(story, stage) for stage in FORCED}
