"""A study through real DVC experiments, in a temporary clone with few videos and one benchmark."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import ENVIRONMENT, ROOT, cloned, commit, run
from nearness import contents

from scaling4d.studies.run import clips_settings, failure_reason, study_runs
from scaling4d.studies.study import Arm, Study

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]  # the fixture runs a study of four trainings

STUDY = """
question: Do more steps help?
profile: smoke
targets: ["readout_frozen@{encoder}-actions", "reconstruct@{encoder}"]
seeds: [0, 1]
base: as_it_is
arms:
  as_it_is: []
  masked_50: [ablation=mask_50]
"""


def cli(clone: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return run(clone, "python", "-m", "scaling4d", "study", *arguments, check=check)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files, the data cut down, in a repository of their own, with a small study run."""
    (listed,) = (ROOT / "experiments/listed").glob("smoke-*.csv")
    videos = tuple(f"experiments/pocket/videos/{name}" for name in listed.read_text().splitlines()[1:])
    kept = ("experiments/pocket/benchmarks/ssv2/", *videos)

    def included(name: str) -> bool:
        return name.startswith(kept) if name.startswith("experiments/pocket/") else not name.startswith("reports/studies/")

    folder = cloned(tmp_path_factory.mktemp("study") / "scaling4d", included)
    (folder / "experiments/study/steps.yaml").write_text(STUDY)
    lock = yaml.safe_load((folder / "dvc.lock").read_text())  # its other stages read more data than are left
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock | {"stages": {"code": lock["stages"]["code"]}}))
    commit(folder)
    cli(folder, "steps", "--jobs", "2")
    return folder


def one(name: str, *overrides: str) -> Study:
    arm = Arm(name, "pocket", overrides, "nano", ("reconstruct@nano",))
    return Study("any", "?", name, (0, 1), (arm,), {})


def test_the_same_arm_is_the_same_experiment_in_every_study(in_the_project: None) -> None:
    first, again, other = (study_runs(one(*given)) for given in (("a",), ("b",), ("a", "ablation=mask_50")))
    assert [run.name for run in first] == [run.name for run in again]
    assert len({run.name for run in (*first, *other)}) == 4
    assert [run.name.rpartition("-")[0] for run in other] == ["pocket-nano-mask_50-0", "pocket-nano-mask_50-1"]


def test_arms_that_train_otherwise_have_the_same_clips(in_the_project: None) -> None:
    overrides = ((), ("pretrain.Training.steps=7", "ablation=mask_50"), ("clips.Curation.crf=30",))
    plain, trained_otherwise, cut_otherwise = (clips_settings(one("a", *words).arms[0]) for words in overrides)
    assert plain == trained_otherwise != cut_otherwise


def test_a_failed_run_is_explained_by_the_line_of_its_stage(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("error: mask_ratio = 2.0\nERROR: failed to reproduce 'pretrain@nano'\n")
    assert failure_reason(log) == f"mask_ratio = 2.0 ({log})"
    log.write_text("Reproducing\nERROR: unexpected error\nbye\n")
    assert failure_reason(log) == f"unexpected error ({log})"
    log.write_text("")
    assert failure_reason(log) == f"no output ({log})"


@pytest.mark.slow
def test_a_study_is_experiments_a_table_and_a_page(clone: Path) -> None:
    out = clone / "reports/studies/steps"
    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert {(row["arm"], row["seed"]) for row in rows} == {(arm, seed) for arm in ("as_it_is", "masked_50") for seed in "01"}
    assert {row["task"] for row in rows} == {"pretrain", "actions", "reconstruct", "reconstruct_moving"} and len(rows) == 16
    assert len({row["checkpoint_sha256"] for row in rows if row["task"] == "actions"}) == 4
    listed = run(clone, "dvc", "exp", "list", "--name-only").stdout.split()
    assert {row["experiment"] for row in rows} == set(listed)
    facts = json.loads((out / "study.json").read_text())
    assert facts["arms"]["masked_50"]["settings"] == {"points.nano.model.SimpleMAE.mask_ratio": 0.5}
    assert all(run["cpu_seconds"] > 1 for run in facts["runs"].values())
    assert 'src="runs.svg"' in (out / "study.html").read_text() and "<svg" in (out / "runs.svg").read_text()
    assert run(clone, "git", "status", "--porcelain").stdout.splitlines() == ["?? reports/studies/"]


@pytest.mark.slow
def test_a_study_leaves_its_experiments_and_two_clones_and_nothing_else(clone: Path) -> None:
    refs = run(clone, "git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    assert len(refs) == 4 and all(ref.count("/") == 4 for ref in refs)
    assert sorted(path.name for path in (clone / ".dvc/tmp/studies").iterdir()) == ["0", "1", "lock"]
    for number in ("0", "1"):
        folder = clone / ".dvc/tmp/studies" / number
        left = run(folder, "git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
        assert all(ref in refs or ref.startswith(("refs/exps/exec/", "refs/exps/apply/")) for ref in left), left
        assert not list((folder / ".resume").glob("pretrain-*"))


@pytest.mark.slow
def test_the_same_command_again_runs_nothing_and_gives_the_same_bytes(clone: Path) -> None:
    before = contents(clone / "reports/studies")
    again = cli(clone, "steps")
    assert again.stdout.splitlines() == ["wrote reports/studies/steps"]
    assert contents(clone / "reports/studies") == before
    cli(clone, "steps", "--collect")
    assert contents(clone / "reports/studies") == before


@pytest.mark.slow
def test_a_finished_study_runs_nothing_on_another_machine(clone: Path, tmp_path: Path) -> None:
    """There are neither its experiments nor a DVC cache."""
    commit(clone)
    other = tmp_path / "scaling4d"
    run(tmp_path, "git", "clone", "-q", str(clone), str(other))
    before = contents(other / "reports/studies")
    assert cli(other, "steps", "--dry").stdout.count(": exists\n") == 4
    assert cli(other, "steps").stdout.splitlines() == ["wrote reports/studies/steps"]
    assert contents(other / "reports/studies") == before


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_reason_and_the_others_stay(clone: Path) -> None:
    (clone / "experiments/study/broken.yaml").write_text(
        STUDY.replace("[ablation=mask_50]", "[points.nano.model.SimpleMAE.position_init=some]")
    )
    commit(clone)
    done = cli(clone, "broken", check=False)
    assert done.returncode == 1
    assert done.stdout.count("position_init = 'some'; needed normal or sincos") == 2
    assert re.match("error: 2 of 4 runs failed, run it again for those: smoke-nano-some-0-.{8}, smoke-nano-some-1-", done.stderr)
    assert not (clone / "reports/studies/broken").exists()


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_in_the_middle_of_its_training(clone: Path) -> None:
    changes = "[pretrain.Training.steps=300, pretrain.Runtime.save_every=20]"
    text = STUDY.replace("[ablation=mask_50]", "[pretrain.Training.steps=300]").replace("as_it_is: []", f"as_it_is: {changes}")
    (clone / "experiments/study/long.yaml").write_text(text)
    commit(clone)
    command = [sys.executable, "-m", "scaling4d", "study", "long", "--seeds", "0", "--jobs", "1"]
    with subprocess.Popen(command, cwd=clone, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 300
        while not (states := list((clone / ".dvc/tmp/studies/0/.resume").glob("pretrain-*/step-*"))):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.terminate()
        assert process.wait(90) == 128 + signal.SIGTERM
        assert process.stdout.read() == ""
    assert any(state.parent.is_dir() for state in states) and not (clone / "reports/studies/long").exists()
    (clone / ".dvc/tmp/studies/0/.git/index.lock").touch()  # as after kill -9
    cli(clone, "long", "--seeds", "0")
    facts = [json.loads(path.read_text()) for path in (clone / ".dvc/tmp/studies/0/.runs").glob("pretrain-nano-*.json")]
    assert any(fact["from_step"] >= 20 for fact in facts)
    assert len(list(csv.DictReader((clone / "reports/studies/long/runs.csv").open()))) == 8
    runs = json.loads((clone / "reports/studies/long/study.json").read_text())["runs"]
    assert {run: "cpu_seconds" in facts for run, facts in runs.items()} == {"as_it_is-0": False, "masked_50-0": True}


@pytest.mark.slow
def test_uncommitted_changes_are_not_run(clone: Path) -> None:
    path = clone / "experiments/ablation/mask_50.yaml"
    text = path.read_text()
    try:
        path.write_text(text.replace("0.50", "0.60"))
        done = cli(clone, "steps", check=False)
        assert done.stderr == (
            "error: experiments/ablation/mask_50.yaml differs from the last commit, and a study runs what is committed; "
            "commit it first\n"
        )
    finally:
        path.write_text(text)


@pytest.mark.slow
def test_the_audit_names_a_changed_number_and_a_changed_setting(clone: Path) -> None:
    def wrong() -> list[str]:
        code = "from scaling4d.audit import studies\nfor f in studies.findings(): print(f'{f.kind}: {f.where}: {f.message}')"
        lines = run(clone, "python", "-c", code).stdout.splitlines()
        return [line for line in lines if line.startswith("wrong: ")]

    out = clone / "reports/studies/steps"
    commit(clone)
    assert wrong() == []
    text = (out / "runs.csv").read_text()
    (changed := next(csv.DictReader(text.splitlines())))["clips_seen"] += "1"
    first = ",".join(next(csv.reader(text.splitlines()[1:])))
    (out / "runs.csv").write_text(text.replace(first, ",".join(changed.values()), 1))
    assert any("the rows of as_it_is, seed 0, are not those of" in line for line in wrong())
    (out / "runs.csv").write_text(text)
    lock = out / "locks/masked_50-1.lock"
    text = lock.read_text()
    lock.write_text(text.replace("mask_ratio: 0.5", "mask_ratio: 0.6"))
    assert any("mask_ratio = 0.6" in line for line in wrong())
    lock.write_text(text)
