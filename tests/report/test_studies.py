"""From locks and DVC's cache to a study's tables, figures and page; both drawn by hand."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from scaling4d import seeds
from scaling4d.audit import history
from scaling4d.audit import studies as audit
from scaling4d.records import UserError
from scaling4d.report import studies
from scaling4d.studies import study
from scaling4d.studies.study import Arm, Study

SIZES = {"nano": 1e5, "micro": 3e5, "tiny": 1e6, "small": 3e6, "mini": 1e7}
TARGETS = ("readout_frozen@{}-actions", "readout_frozen@{}-pose", "reconstruct@{}")
ARMS = tuple(Arm(name, "pocket", (), name, tuple(target.format(name) for target in TARGETS)) for name in SIZES)
LADDERS = {"size": ("parameters", tuple(SIZES))}


def put(cache: Path, content: bytes) -> str:
    md5 = hashlib.md5(content).hexdigest()
    path = cache / "files/md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


def folder(cache: Path, path: str, name: str, content: dict) -> dict:
    """An out of a lock."""
    listing = json.dumps([{"md5": put(cache, json.dumps(content).encode()), "relpath": name}]).encode()
    md5 = put(cache, listing)
    (cache / "files/md5" / md5[:2] / md5[2:]).rename(cache / "files/md5" / md5[:2] / f"{md5[2:]}.dir")
    return {"path": path, "hash": "md5", "md5": f"{md5}.dir", "size": 1}


def draw(cache: Path, wanted: Study) -> None:
    """Loss and tasks fall and rise by power laws, with a little noise."""
    for arm in wanted.arms:
        for seed in wanted.seeds:
            size, rng = SIZES[arm.encoder], seeds.numpy(seed, arm.name)
            error = 0.3 * (size / 1e5) ** -0.3 * (1 + 0.01 * rng.standard_normal())
            about = {"parameters": int(size), "flops": 100 * size, "clips_seen": 800}
            result = {"encoder": arm.encoder, "parameters": int(size), "protocol": "frozen", "unit": "", "seed": seed}
            result |= {"checkpoint_sha256": hashlib.sha256(f"{arm.name} {seed}".encode()).hexdigest()}
            actions = {"task": "actions", "metric": "top1", "value": 1 - error, "higher_is_better": True}
            pose = {"task": "pose", "metric": "epe", "value": 1 + error, "higher_is_better": False}
            names = [target.format(arm.encoder) for target in TARGETS]
            results = [result | actions, result | pose, result | {"masked_mse": error / 10}]
            outs = {name: ("result.json", one) for name, one in zip(names, results, strict=True)}
            outs[f"pretrain@{arm.encoder}"] = ("summary.json", about | {"val_loss": 0.08 + error})
            made = {"path": "artifacts/code/pretrain.json", "hash": "md5", "md5": "0", "size": 1}
            stages = {"code": {"cmd": "code", "outs": [made]}}
            for name, (file, content) in outs.items():
                stages[name] = {
                    "cmd": "",
                    "params": {"params.yaml": {"seed": seed, f"points.{arm.encoder}": {"width": int(size)}}},
                }
                stages[name]["outs"] = [folder(cache, f"artifacts/{name}", file, content)]
            path = wanted.lock(arm.name, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"schema": "2.0", "stages": stages}))


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    found = Study("scaling", "Does it scale?", "nano", (0, 1, 2), ARMS, LADDERS)
    draw(Path("cache"), found)
    return found


def content(of: Path) -> dict[str, bytes]:
    return {path.relative_to(of).as_posix(): path.read_bytes() for path in of.rglob("*") if path.is_file()}


TOLD = {"nano-0": {"experiment": "nano-0-abc", "seconds": 10.0, "cpu_seconds": 30.0}}


def test_a_study_is_made_of_its_locks_and_the_cache_and_is_the_same_bytes_again(wanted: Study) -> None:
    assert studies.collect(wanted, Path("cache"), TOLD) == []
    before = content(study.REPORTS)
    assert {"index.html", "scaling/runs.csv", "scaling/table.csv", "scaling/fits.csv", "scaling/ranks.csv"} <= before.keys()
    assert {"scaling/runs.svg", "scaling/laws_size.svg", "scaling/study.html", "scaling/study.json"} <= before.keys()
    rows = list(csv.DictReader((wanted.folder / "runs.csv").open()))
    assert len(rows) == 5 * 3 * 4 and rows[0]["experiment"] == "nano-0-abc"
    assert studies.collect(wanted, Path("cache"), {}) == []
    assert content(study.REPORTS) == before


def test_where_the_cache_is_gone_what_was_collected_stays(wanted: Study) -> None:
    studies.collect(wanted, Path("cache"), TOLD)
    before = content(study.REPORTS)
    shutil.rmtree("cache")
    studies.collect(wanted, Path("cache"), {})
    assert content(study.REPORTS) == before
    (wanted.folder / "runs.csv").unlink()
    with pytest.raises(
        UserError, match="^DVC's cache lacks results that .*nano-0.lock names; run `scaling4d study scaling --seeds 0,1,2`$"
    ):
        studies.collect(wanted, Path("cache"), {})


def test_a_damaged_result_in_the_cache_is_refused(wanted: Study) -> None:
    for path in Path("cache").rglob("*"):
        if path.is_file() and path.suffix != ".dir" and b"masked_mse" in path.read_bytes():
            path.write_bytes(path.read_bytes().replace(b"0.0", b"0.1"))
    with pytest.raises(UserError, match="does not hold the bytes of its name; remove it and run the study again$"):
        studies.collect(wanted, Path("cache"), {})


def test_laws_ranks_and_what_the_smaller_say_of_the_largest(wanted: Study) -> None:
    studies.collect(wanted, Path("cache"), {})
    fits = {row["task"]: row for row in csv.DictReader((wanted.folder / "fits.csv").open())}
    for task in ("pretrain", "actions"):
        assert float(fits[task]["exponent_low"]) < 0.3 < float(fits[task]["exponent_high"])
        assert fits[task]["points"] == "15" and fits[task]["inside"] == "True" and float(fits[task]["largest"]) == 1e7
    ranks = {row["task"]: row for row in csv.DictReader((wanted.folder / "ranks.csv").open())}
    assert {row["spearman"] for row in ranks.values()} <= {"1.0", "0.9999999999999999", "1.0000000000000002"}


def test_an_arm_without_the_size_of_its_ladder_is_named(wanted: Study) -> None:
    studies.collect(replace(wanted, ladders={}), Path("cache"), {})
    rows = [row | {"flops": ""} if row["arm"] == "tiny" else row for row in studies.read_runs(wanted.folder)]
    of_compute = replace(wanted, ladders={"compute": ("flops", tuple(SIZES))})
    wanted = "ladder compute of study scaling has arm tiny, which has no flops; take it from the ladder"
    with pytest.raises(UserError, match=f"^{wanted}$"):
        list(studies.fits(of_compute, rows))


def test_the_page_shows_question_findings_table_and_figures(wanted: Study) -> None:
    wanted.folder.joinpath("findings.md").write_text("# Findings\n\nBigger is better [table: mini pose].\n\nNo doubt.\n")
    assert studies.collect(wanted, Path("cache"), {}) == ["a sentence without a reference: No doubt"]
    page = (wanted.folder / "study.html").read_text()
    assert "Again: <code>scaling4d study scaling --seeds 0,1,2</code>" in page
    assert "<td>size</td><td>val_loss</td><td>15</td>" in page and re.search(r"<br>\(-0\.02\d\d ± 0\.000\d+\) \*<", page)
    assert page.count("<svg") == 2 and "Does it scale?" in page
    assert '<p>Bigger is better <span class="reference">[table: mini pose]</span>.</p>' in page


def test_runs_of_arms_that_a_study_no_longer_has_go(wanted: Study) -> None:
    stray = wanted.lock("giant", 0)
    stray.write_text("{}")
    studies.collect(wanted, Path("cache"), {})
    assert not stray.exists()


def test_rows_whose_results_are_gone_are_not_kept_for_another_lock(wanted: Study) -> None:
    wanted = replace(wanted, ladders={})
    studies.collect(wanted, Path("cache"), TOLD)
    lock = wanted.lock("nano", 0)
    lock.write_text(lock.read_text().replace('"seed": 0', '"seed": 7'))
    shutil.rmtree("cache")
    with pytest.raises(UserError, match="^DVC's cache lacks results that .*nano-0.lock names"):
        studies.collect(wanted, Path("cache"), {})


def test_what_a_run_took_stays_where_another_clone_only_has_its_experiment(wanted: Study) -> None:
    wanted = replace(wanted, ladders={})
    studies.collect(wanted, Path("cache"), TOLD)
    before = content(study.REPORTS)
    studies.collect(wanted, Path("cache"), {"nano-0": {"experiment": "nano-0-abc"}})
    assert content(study.REPORTS) == before
    studies.collect(wanted, Path("cache"), {"nano-0": {"experiment": "nano-0-def"}})
    assert json.loads((wanted.folder / "study.json").read_text())["runs"]["nano-0"] == {"experiment": "nano-0-def"}


def test_figures_of_ladders_that_a_study_no_longer_has_go(wanted: Study) -> None:
    studies.collect(wanted, Path("cache"), {})
    (wanted.folder / "laws_size.svg").rename(wanted.folder / "laws_former.svg")
    studies.collect(wanted, Path("cache"), {})
    assert {path.name for path in wanted.folder.glob("*.svg")} == {"runs.svg", "laws_size.svg"}


# ---- what the audit says of it ----


@pytest.fixture
def audited(wanted: Study) -> Study:
    """Collected, with findings, and defined where the audit looks."""
    arms = {arm.name: {"encoder": arm.encoder} for arm in wanted.arms}
    ladders = {name: {"x": x, "arms": list(some)} for name, (x, some) in wanted.ladders.items()}
    targets = [target.format("{encoder}") for target in TARGETS]
    defined = {"question": wanted.question, "base": wanted.base, "targets": targets, "arms": arms, "ladders": ladders}
    study.DEFINITIONS.mkdir(parents=True)
    (study.DEFINITIONS / "scaling.yaml").write_text(yaml.safe_dump(defined, sort_keys=False))
    shutil.copytree("cache", audit.CACHE)
    (wanted.folder / "findings.md").write_text("Bigger is better [table: mini pose].\n")
    assert study.read("scaling") == wanted
    assert studies.collect(wanted, audit.CACHE, TOLD) == []
    return wanted


def wrong() -> list[str]:
    return [f"{found.where}: {found.message}" for found in audit.findings() if found.kind == "wrong"]


def test_the_audit_names_a_file_with_a_changed_byte_and_one_that_is_gone(audited: Study) -> None:
    assert wrong() == []
    names = ("runs.csv", "table.csv", "fits.csv", "ranks.csv", "findings.md", "locks/tiny-1.lock", "runs.svg", "study.html")
    for name in names:
        path = audited.folder / name
        before = path.read_bytes()
        at = max(place for place, byte in enumerate(before) if chr(byte).isalnum())
        path.write_bytes(before[:at] + (b"0" if before[at : at + 1] != b"0" else b"1") + before[at + 1 :])
        assert any(line.startswith(f"{path}: reports/studies/scaling/study.json says sha256 ") for line in wrong()), name
        path.unlink()
        assert any(line.startswith(f"{path}: ") and "it is not there: take it from git again" in line for line in wrong()), name
        path.write_bytes(before)


def test_the_audit_names_what_is_changed_in_study_json(audited: Study) -> None:
    path = audited.folder / "study.json"
    before = path.read_text()
    for was, now, key in (
        ("Does it scale", "Does it grow", "question"),
        ('"seconds": 10.0\n', '"seconds": 10.5\n', "seconds"),
        ('"pocket"', '"packet"', "arms"),
        ('"base": "nano"', '"base": "tiny"', "base"),
    ):
        path.write_text(before.replace(was, now, 1))
        (line,) = wrong()
        assert line.startswith(f"{path}: its {key!r} does not follow from experiments/study and the locks: ")
    path.write_text(before.replace("nano-0-abc", "nano-0-abd"))
    (line,) = wrong()
    assert line.startswith("reports/studies/scaling/runs.csv: the rows of nano, seed 0, are not what ")


def test_the_audit_names_a_run_that_the_definition_asks_for_and_that_is_not_there(audited: Study) -> None:
    path = study.DEFINITIONS / "scaling.yaml"
    path.write_text(path.read_text().replace("arms:\n", "arms:\n  giant: {encoder: mini}\n", 1))
    assert wrong() == [
        f"reports/studies/scaling/locks/giant-{seed}.lock: not there, though experiments/study/scaling.yaml asks for it: "
        "run `scaling4d study scaling --seeds 0,1,2`"
        for seed in (0, 1, 2)
    ]


def test_the_audit_names_rows_of_runs_that_never_were(audited: Study) -> None:
    path, facts = audited.folder / "runs.csv", audited.folder / "study.json"
    text = path.read_text()
    path.write_text(text + re.sub("^mini,2", "giant,2", text.splitlines()[-1]) + "\n")
    rows = studies.read_runs(audited.folder)
    (audited.folder / "table.csv").write_text(study.to_csv(study.TABLE_COLUMNS, study.table(rows, "nano")))
    said = json.loads(facts.read_text())
    for name in ("runs.csv", "table.csv"):
        said["files"][name] = hashlib.sha256((audited.folder / name).read_bytes()).hexdigest()
    facts.write_text(json.dumps(said))
    assert wrong() == ["reports/studies/scaling/runs.csv: it has rows of giant, seed 2, which is no run of this study"]


def test_a_run_is_held_to_a_commit_with_its_code_whatever_settings_came_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before: those of the study may be younger than the code."""
    monkeypatch.chdir(tmp_path)

    def commit(name: str, text: str) -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
        subprocess.run(["git", "add", "-A"], check=True)
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", name], check=True)

    subprocess.run(["git", "init", "-q"], check=True)
    Path("experiments/profile").mkdir(parents=True)
    Path("experiments/profile/pocket.yaml").write_text("# @package _global_\nprofile: pocket\n")
    Path("experiments/config.yaml").write_text("defaults: [_self_, {profile: pocket}, {ablation: null}]\nseed: 0\nwidth: 1\n")
    commit("src/scaling4d/code.py", "pass\n")
    for width in (2, 3):
        commit("experiments/ablation/wide.yaml", f"# @package _global_\nwidth: {width}\n")
    commit("src/scaling4d/code.py", "1\n")
    arm = Arm("wide", "pocket", ("ablation=wide",), "nano", ("pretrain@nano",))
    mine = Study("any", "?", "wide", (1,), (arm,), {})
    source = {"path": "src/scaling4d", "hash": "md5", "md5": history.md5("HEAD~1", "src/scaling4d"), "size": 1}
    mine.lock("wide", 1).parent.mkdir(parents=True)

    def found(width: int) -> list[str]:
        trained = {"cmd": "", "params": {"params.yaml": {"seed": 1, "width": width}}}
        stages = {"code": {"cmd": "", "deps": [source]}, "pretrain@nano": trained}
        mine.lock("wide", 1).write_text(json.dumps({"schema": "2.0", "stages": stages}))
        return [finding.message for finding in audit._settings(mine, arm)]

    assert found(2) == found(3) == []
    (line,) = found(4)
    assert re.match("pretrain@nano ran with width = 4; by the arm and commit [0-9a-f]{7}, which holds its code, 3$", line)
