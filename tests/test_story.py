"""The whole story at smoke size, through real `dvc repro` in a temporary clone."""

import csv
import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import ENVIRONMENT, cloned, commit, refused_command, run, run_killed, run_limited

from scaling4d.audit.disk import Disk
from scaling4d.provenance import flatten, read_lock

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]  # the fixture runs the pipeline

TASKS = ("actions", "depth")
# code clips, benchmarks, pretrain, distill, continue, baselines, frozen, finetune, classifier, show, reconstruct,
# report
STAGES = 2 + 1 + 1 + 1 + 1 + 2 + 2 * 2 + 2 + 1 + 1 + 1 + 1
STEPS = "readout.finetune.depth.Finetune.steps"


def cli(clone: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return run(clone, "python", "-m", "scaling4d", *arguments, check=check)


def refused(clone: Path, *arguments: str) -> str:
    """The one line that a refused command prints."""
    done = cli(clone, *arguments, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("override: ")]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files in a repository of their own."""
    folder = cloned(tmp_path_factory.mktemp("story") / "scaling4d")
    commit(folder)
    return folder


@pytest.fixture(scope="module")
def story(clone: Path) -> Path:
    """The clone after all stages of profile smoke, as `make repro` runs them: two at a time, each by `dvc repro`."""
    cli(clone, "compose", "profile=smoke")
    (clone / "dvc.lock").unlink()  # every stage would write the published run's stages anew
    stages = stages_run(run(clone, "make", "ahead", "JOBS=2").stdout)
    assert len(stages) == len(set(stages)) == STAGES
    return clone


@contextmanager
def appended(story: Path, name: str, more: str) -> Iterator[None]:
    """A file has `more` at its end; afterwards the file, and all that DVC made of it, are as before."""
    path, texts = story / name, {file: (story / file).read_text() for file in ("data.dvc", "dvc.lock")}
    before = path.read_text() if path.exists() else None
    path.write_text((before or "") + more)
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_text(before)
        for file, text in texts.items():
            (story / file).write_text(text)
        run(story, "dvc", "checkout", "-q")


def test_a_second_run_does_nothing(story: Path) -> None:
    assert stages_run(run(story, "dvc", "repro").stdout) == []


def test_every_number_of_the_report_is_a_result(story: Path) -> None:
    rows = list(csv.DictReader((story / "reports/smoke/results.csv").open()))
    assert {(row["encoder"], row["task"], row["protocol"]) for row in rows} == {
        (encoder, task, protocol)
        for encoder, protocol in (("nano", "frozen"), ("nano", "finetune"), ("untrained_nano", "frozen"))
        for task in TASKS
    } | {("nano", "actions", "classifier")}
    for row in rows:
        folder = story / "artifacts/smoke/readout" / row["encoder"] / row["task"] / row["protocol"]
        result = json.loads((folder / "result.json").read_text())
        assert float(row["value"]) == ({result["metric"]: result["value"]} | result["others"])[row["metric"]]
    page = (story / "reports/smoke/report.html").read_text()
    for number in json.loads((story / "reports/smoke/numbers.json").read_text()):
        assert f'id="{number["id"]}">{number["text"]}<' in page


def test_the_report_shows_predictions_and_figures_that_lie_beside_it(story: Path) -> None:
    drawn = {path.name for path in (story / "artifacts/smoke/show/depth").iterdir()}
    assert drawn == {"sheet.png", "clips.mp4", "provenance.json", "operative_config.gin"}
    pictures = re.findall(r'<img alt="([^"]+)" src="([^"]+)"', (story / "reports/smoke/report.html").read_text())
    sheet, headline = "depth: predictions beside the truth", "each task over the size of the encoder"
    assert {(sheet, "pictures/sheet_depth.png"), (headline, "headline.svg")} <= {*pictures}
    assert all((story / "reports/smoke" / path).is_file() for _, path in pictures)


def test_every_stage_reads_what_it_declares(story: Path) -> None:
    locked = read_lock(story / "dvc.lock")
    for path in (story / "artifacts/smoke").rglob("provenance.json"):
        provenance = json.loads(path.read_text())
        name = stage_of(path.parent.relative_to(story / "artifacts/smoke"), provenance["stage"])
        declared = dict(flatten(locked[name].params))
        for key, value in flatten(provenance["settings"]):
            assert declared[key] == value, f"{name}: {key}"
        assert provenance["overrides"] == {}


def stage_of(folder: Path, kind: str) -> str:
    parts = folder.parts
    match kind:
        case "clips":
            return "clips"
        case "baseline":
            return "baseline_pixels" if parts[1] == "pixels" else f"baseline_untrained@{parts[1].removeprefix('untrained_')}"
        case "readout":
            return f"readout_{parts[3]}@{parts[1]}" + ("" if parts[3] == "classifier" else f"-{parts[2]}")
    kind = {"distilled": "distill", "continued": "continue"}.get(parts[1].partition("_")[2], kind)
    return f"{kind}@{parts[1]}"


def test_a_trained_readout_predicts_for_any_video(story: Path, tmp_path: Path) -> None:
    video, readouts, out = str(min((story / "data/videos/phone").glob("*.mp4"))), "artifacts/smoke/readout", tmp_path / "out.npz"
    cli(story, "features", f"{readouts}/nano/depth/frozen", video, "--out", str(out))
    arrays = np.load(out)
    assert arrays["output"].shape == (1, 8, 64, 64)
    assert sorted(arrays) == ["last_hidden_state", *(f"layer_{i:02d}" for i in range(3)), "output"]
    tuned = refused(story, "features", f"{readouts}/nano/depth/finetune", video, "--out", str(tmp_path / "no.npz"))
    assert tuned.endswith("was fine-tuned, and the tuned encoder is not kept; take the frozen readout beside it")
    assert not (tmp_path / "no.npz").exists()


def test_a_comment_reruns_nothing_but_the_code_stage(story: Path) -> None:
    with appended(story, "src/scaling4d/mae/attention.py", "\n# a remark\n"):
        assert stages_run(run(story, "dvc", "repro").stdout) == ["code"]


def test_one_value_reruns_just_what_depends_on_it(story: Path) -> None:
    try:
        cli(story, "compose", "profile=smoke", "readout.frozen.depth.Frozen.steps=5")
        changed = {"readout_frozen@nano-depth", "readout_frozen@untrained_nano-depth"}
        stages = set(stages_run(run(story, "dvc", "repro", "--dry").stdout))
        assert changed <= stages <= changed | {"readout_finetune@nano-depth", "show@depth", "report"}
    finally:
        cli(story, "compose", "profile=smoke")


def test_another_benchmark_reruns_the_readouts_of_its_task_alone_and_pretraining_that_probes_it(story: Path) -> None:
    with appended(story, "experiments/pocket/benchmarks/ssv2/remark.txt", "new"):
        assert stages_run(run(story, "dvc", "repro", "benchmarks").stdout) == ["benchmarks"]
        probing = {"pretrain@nano", "distill@nano_distilled", "continue@nano_continued"}
        assert probing <= set(stages_run(run(story, "dvc", "repro", "--dry").stdout))
    with appended(story, "experiments/pocket/benchmarks/scannet/remark.txt", "new"):
        assert stages_run(run(story, "dvc", "repro", "benchmarks").stdout) == ["benchmarks"]
        readouts = {f"readout_frozen@{encoder}-depth" for encoder in ("nano", "untrained_nano")}
        stages = set(stages_run(run(story, "dvc", "repro", "--dry").stdout))
        assert readouts <= stages <= readouts | {"readout_finetune@nano-depth", "show@depth", "report"}


def test_an_experiment_lists_its_override_everywhere(story: Path) -> None:
    commit(story)
    run(story, "dvc", "exp", "run", "--name", "longer", "-S", "profile=smoke", "-S", f"{STEPS}=3")
    provenance = json.loads((story / "artifacts/smoke/readout/nano/depth/finetune/provenance.json").read_text())
    assert provenance["overrides"] == {STEPS: 3}
    assert STEPS in (story / "reports/smoke/report.html").read_text()
    difference = json.loads(run(story, "dvc", "exp", "diff", "HEAD", "longer", "--json").stdout)
    assert STEPS in json.dumps(difference["params"])
    assert any("depth" in key for values in difference["metrics"].values() for key in values)
    rows = json.loads(run(story, "dvc", "metrics", "diff", "HEAD", "longer", "--json").stdout)["reports/smoke/metrics.json"]
    of_depth = {name.rpartition(".")[2] for name in rows if name.startswith("depth.") and ".finetune.nano." in name}
    assert of_depth and of_depth <= {"value", "low", "high"}
    plots = json.loads(run(story, "dvc", "plots", "diff", "HEAD", "longer", "--json").stdout)["data"]
    assert {"readouts", "losses", "reports/smoke/headline.svg"} <= plots.keys()
    cli(story, "compare", "HEAD", "longer", "--out", "page.html")
    page = (story / "page.html").read_text()
    assert f"<td>{STEPS}</td><td>2</td><td>3</td>" in page
    assert "<td>Finetune.steps</td><td>2</td><td>3</td><td>declared</td><td>readout/nano/depth/finetune</td>" in page
    (story / "page.html").unlink()
    run(story, "git", "checkout", "-q", ".")
    run(story, "dvc", "checkout", "-q")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(("words", "message"), [
    (("pretrain", "nan0"), "points has no 'nan0', it has nano"),
    (("readout", "nano", "smell", "frozen"), "unknown readout 'smell'"),
    (("baseline", "nothing"), "unknown baseline 'nothing'"),
])  # fmt: skip
def test_an_unknown_name_is_refused(words: tuple[str, ...], message: str) -> None:
    assert message in refused_command(*words)


def test_stages_made_again_have_the_same_bytes(story: Path) -> None:
    lock = yaml.safe_load((story / "dvc.lock").read_text())
    stages = ("pretrain@nano", "readout_finetune@nano-actions", "readout_classifier@nano", "reconstruct@nano", "show@depth")
    assert set(stages_run(run(story, "dvc", "repro", "-f", "-s", *stages, "report").stdout)) == {*stages, "report"}
    assert yaml.safe_load((story / "dvc.lock").read_text()) == lock


STAGES_KILLED = {  # stage of dvc.yaml: kills, full disks
    "benchmarks": (3, 1),
    "clips": (8, 3),
    "pretrain@nano": (8, 2),
    "readout_frozen@nano-depth": (4, 1),
    "readout_finetune@nano-depth": (4, 2),
    "report": (8, 2),
}
killed_stages = pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=[pytest.mark.slow] if name != "benchmarks" else []) for name in STAGES_KILLED]
)
INSIDE = (".resume", ".runs", "artifacts", "data", "reports", ".dvc")


@pytest.fixture
def temporary(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files of commands."""
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path))
    return tmp_path


class KilledStage:
    """A stage's command in the story's clone, its outputs, and what lies in the clone and in a temporary folder."""

    def __init__(self, story: Path, name: str, temporary: Path) -> None:
        stage = read_lock(story / "dvc.lock")[name]
        self.story, self.persistent, self.folders = story, name == "clips", [*(story / part for part in INSIDE), temporary]
        self.command = stage.command.removeprefix("PYTHONPATH=src ").split()
        self.outs = {out.path: out.md5 for out in stage.outs}
        started = time.monotonic()
        self.start_anew()
        run(story, *self.command)
        self.seconds, self.files = time.monotonic() - started, self.files_now()
        assert self.made() == self.outs

    def start_anew(self) -> None:
        """As DVC before a stage runs; and no result of an earlier run is at hand."""
        shutil.rmtree(self.story / ".resume/clips", ignore_errors=True)
        for name in self.outs:
            path = self.story / name
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)

    def files_now(self) -> set[str]:
        return {str(path) for folder in self.folders for path in folder.rglob("*")}

    def made(self) -> dict[str, str | None]:
        """DVC's hashes, as the audit of a run that is made again compares them."""
        return {name: Disk({}).md5(str(self.story / name)) for name in self.outs}


@killed_stages
@pytest.mark.timeout(1200)
def test_killed_at_any_moment_and_run_again_a_stage_has_the_same_bytes_and_leaves_nothing(
    story: Path, temporary: Path, stage: str
) -> None:
    kills, rng = STAGES_KILLED[stage][0], random.Random(stage)
    killed_stage, killed = KilledStage(story, stage, temporary), 0
    for _ in range(5 * kills):  # some end before the moment comes
        if killed == kills:
            break
        killed_stage.start_anew()
        moment = rng.uniform(0.2, 1) * killed_stage.seconds
        if not run_killed(story, *killed_stage.command, after_s=moment, group=killed % 2 == 0):
            killed_stage.seconds = moment
            continue
        killed += 1
        run(story, *killed_stage.command)
        assert killed_stage.made() == killed_stage.outs, f"killed after {moment:.2f} s"
        assert killed_stage.files_now() == killed_stage.files, f"killed after {moment:.2f} s"
    assert killed == kills


@killed_stages
@pytest.mark.timeout(1200)
def test_on_a_full_disk_a_stage_says_one_line_and_leaves_no_part(story: Path, temporary: Path, stage: str) -> None:
    rng, full = random.Random(stage), KilledStage(story, stage, temporary)
    sizes = [path.stat().st_size for name in full.outs for path in [story / name, *(story / name).rglob("*")] if path.is_file()]
    for _ in range(STAGES_KILLED[stage][1]):
        full.start_anew()
        before = full.files_now()
        most_bytes = int(rng.uniform(0.02, 0.98) * max(sizes))
        done = run_limited(story, *full.command, most_bytes=most_bytes)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, f"{most_bytes} bytes: {done.stderr}"
        outside = {path for path in full.files_now() - before if "/.resume/" not in path}
        assert not outside, f"{most_bytes} bytes: {sorted(outside)}"
        run(story, *full.command)
        assert full.made() == full.outs and full.files_now() == full.files


DVCS_OWN = re.compile(r"/\.dvc/cache/files/md5/\w\w/[^/]*\.[\w-]{22}\.tmp$")  # a killed DVC leaves it, and no DVC removes it


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dvc_repro_killed_again_and_again_ends_with_the_same_lock_and_leaves_nothing(story: Path, temporary: Path) -> None:
    lock, folders = yaml.safe_load((story / "dvc.lock").read_text()), [*(story / part for part in INSIDE), temporary]
    rng, killed, files, seconds = random.Random("dvc repro"), 0, [], 0.0
    for kills in (0, 8):  # undisturbed, and killed
        for name in ("data", "artifacts", "reports/smoke", ".dvc/cache", ".resume"):
            shutil.rmtree(story / name, ignore_errors=True)
        (story / "dvc.lock").unlink()
        for _ in range(kills):
            killed += run_killed(story, "dvc", "repro", after_s=rng.uniform(0.04, 0.2) * seconds, group=True)
        started = time.monotonic()
        run(story, "dvc", "repro")
        seconds = time.monotonic() - started
        assert yaml.safe_load((story / "dvc.lock").read_text()) == lock
        files.append({str(path) for folder in folders for path in folder.rglob("*")})
    left = {path for path in files[1] - files[0] if not DVCS_OWN.search(path)}
    assert not left and killed == kills, (killed, sorted(left))
