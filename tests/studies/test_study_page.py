"""From synthetic locks and a synthetic DVC cache to a study's tables, figures and page, and the audit of them."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import commit_here
from nearness import contents

from scaling4d import seeds
from scaling4d.provenance import DVC_CACHE, read_lock, to_csv
from scaling4d.records import UserError
from scaling4d.studies import page, study
from scaling4d.studies.run import StudyRun, save_locks
from scaling4d.studies.study import Arm, Study

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SIZES = {"nano": 1e5, "micro": 3e5, "tiny": 1e6, "small": 3e6, "mini": 1e7}
TARGETS = ("readout_frozen@{}-actions", "readout_frozen@{}-pose", "reconstruct@{}")
ARMS = tuple(Arm(name, "pocket", (), name, tuple(target.format(name) for target in TARGETS)) for name in SIZES)
LADDERS = {"size": ("parameters", tuple(SIZES))}
RUN_FACTS = {"nano-0": {"experiment": "nano-0-abc", "seconds": 10.0, "cpu_seconds": 30.0}}


def cache_out(path: str, name: str, content: dict, settings: dict | None = None) -> dict:
    """Put a folder with a result, and its provenance, into DVC's cache. Returns its entry in a lock."""

    def store(content: bytes, suffix: str = "") -> str:
        md5 = hashlib.md5(content).hexdigest() + suffix
        file = DVC_CACHE / "files/md5" / md5[:2] / md5[2:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return md5

    files = {name: content, "provenance.json": {"settings": settings or {}}}
    listing = json.dumps([{"md5": store(json.dumps(file).encode()), "relpath": path} for path, file in files.items()]).encode()
    return {"path": path, "hash": "md5", "md5": store(listing, ".dir"), "size": 1}


def write_lock(scaling: Study, arm: Arm, seed: int) -> None:
    """Loss and tasks fall and rise by power laws, with a little noise."""
    size, rng = SIZES[arm.encoder], seeds.numpy_rng(seed, arm.name)
    error = 0.3 * (size / 1e5) ** -0.3 * (1 + 0.01 * rng.standard_normal())
    result = {"encoder": arm.encoder, "parameters": int(size), "protocol": "frozen", "unit": "", "seed": seed}
    result |= {"checkpoint_sha256": hashlib.sha256(f"{arm.name} {seed}".encode()).hexdigest()}
    actions = {"task": "actions", "metric": "top1", "value": 1 - error, "higher_is_better": True}
    pose = {"task": "pose", "metric": "epe", "value": 1 + error, "higher_is_better": False}
    results = [result | actions, result | pose, result | {"masked_mse": error / 10, "moving_mse": error / 5}]
    outs = {name: ("result.json", content) for name, content in zip(arm.targets, results, strict=True)}
    summary = {"method": "SimpleMAE", "parameters": int(size), "flops": 100 * size, "clips_seen": 800, "val_loss": 0.08 + error}
    outs[f"pretrain@{arm.encoder}"] = ("summary.json", summary)
    params = {"params.yaml": {"seed": seed, f"points.{arm.encoder}": {"width": int(size)}}}
    code = {"path": "artifacts/code/pretrain.json", "hash": "md5", "md5": "0", "size": 1}
    shared = {"cmd": "", "params": params, "deps": [code]}
    made = {"settings": params["params.yaml"]}
    stages = {name: shared | {"outs": [cache_out(f"artifacts/{name}", *content, **made)]} for name, content in outs.items()}
    path = scaling.lock(f"{arm.name}-{seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": "2.0", "stages": {"code": {"cmd": "code", "outs": [code]}, **stages}}))


@pytest.fixture
def scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of five sizes and three seeds whose runs are in the cache."""
    monkeypatch.chdir(tmp_path)
    scaling = Study("scaling", "Does it scale?", "nano", (0, 1, 2), ARMS, LADDERS)
    for arm in scaling.arms:
        for seed in scaling.seeds:
            write_lock(scaling, arm, seed)
    return scaling


def test_a_study_follows_from_its_locks_and_the_cache_and_is_the_same_bytes_again(scaling: Study) -> None:
    page.write_study(scaling, DVC_CACHE, RUN_FACTS)
    before = contents(study.REPORTS)
    names = ("runs.csv", "table.csv", "fits.csv", "tasks.csv", "runs.svg", "laws_size.svg", "study.html", "study.json")
    assert {"index.html", *(f"scaling/{name}" for name in names)} <= before.keys()
    rows = list(csv.DictReader((scaling.folder / "runs.csv").open()))
    assert len(rows) == 5 * 3 * 5 and rows[0]["experiment"] == "nano-0-abc"
    page.write_study(scaling, DVC_CACHE, {})
    assert contents(study.REPORTS) == before


def test_hidden_pixels_that_move_have_their_own_row_and_none_where_nothing_was_measured(scaling: Study) -> None:
    arm = replace(scaling.arms[0], targets=("reconstruct@nano",))
    weights = {"checkpoint_sha256": "0"}

    def rows(measured: dict) -> list[tuple]:
        out = cache_out("artifacts/reconstruct/nano", "result.json", weights | measured)
        lock = scaling.lock("nano-0")
        lock.write_text(json.dumps({"schema": "2.0", "stages": {"reconstruct@nano": {"cmd": "", "outs": [out]}}}))
        numbers = study.run_numbers(arm, 0, read_lock(lock), DVC_CACHE, "")
        return [(row["task"], row["metric"], row["value"]) for row in numbers]

    all_hidden, moving = ("reconstruct", "masked_mse", 0.1), ("reconstruct_moving", "moving_mse", 0.3)
    assert rows({"masked_mse": 0.1, "moving_mse": 0.3}) == [all_hidden, moving]
    assert rows({"masked_mse": 0.1, "moving_mse": None}) == rows({"masked_mse": 0.1}) == [all_hidden]
    assert rows({"true_patch_statistics": True}) == []


def test_the_loss_of_another_method_is_another_task_and_has_no_panel_alone(scaling: Study) -> None:
    arm, lock = replace(scaling.arms[0], targets=()), scaling.lock("nano-0")
    summary = {"method": "MAEST", "parameters": 1, "flops": 2, "clips_seen": 3, "val_loss": 0.5}
    out = cache_out("artifacts/pretrain/nano", "summary.json", summary)
    lock.write_text(json.dumps({"schema": "2.0", "stages": {"pretrain@nano": {"cmd": "", "outs": [out]}}}))
    (row,) = study.run_numbers(arm, 0, read_lock(lock), DVC_CACHE, "")
    assert (row["task"], row["metric"], row["value"]) == ("pretrain_MAEST", "val_loss", 0.5)
    write_lock(scaling, scaling.arms[0], 0)
    page.write_study(scaling, DVC_CACHE, {})
    rows = study.read_runs(scaling.folder)
    others = [r | {"task": "pretrain_MAEST"} if r["arm"] == "mini" and r["task"] == "pretrain" else r for r in rows]
    svg = page.runs_figure(scaling, others, study.study_table(others, "nano"))
    assert "pretrain MAEST" not in svg and ">pretrain<" in svg


def test_rows_without_results_in_the_cache_stay_as_long_as_their_lock_does(scaling: Study) -> None:
    page.write_study(scaling, DVC_CACHE, RUN_FACTS)
    before, message = contents(study.REPORTS), "^DVC's cache lacks results that .*nano-0.lock names; run `scaling4d study scaling"
    shutil.rmtree(DVC_CACHE)
    page.write_study(scaling, DVC_CACHE, {})
    assert contents(study.REPORTS) == before
    lock = scaling.lock("nano-0")
    text = lock.read_text()
    lock.write_text(text.replace('"seed": 0', '"seed": 7'))
    with pytest.raises(UserError, match=message):
        page.write_study(scaling, DVC_CACHE, {})
    lock.write_text(text)
    runs = scaling.folder / "runs.csv"
    runs.write_text(runs.read_text().replace("0.2", "0.1", 1))
    with pytest.raises(UserError, match=message):
        page.write_study(scaling, DVC_CACHE, {})
    (scaling.folder / "runs.csv").unlink()
    with pytest.raises(UserError, match=message):
        page.write_study(scaling, DVC_CACHE, {})


def test_a_damaged_result_in_the_cache_is_refused(scaling: Study) -> None:
    for path in DVC_CACHE.rglob("*"):
        if path.is_file() and path.suffix != ".dir" and b"masked_mse" in path.read_bytes():
            path.write_bytes(path.read_bytes().replace(b"0.0", b"0.1"))
    with pytest.raises(UserError, match="does not hold the bytes of its name; remove it"):
        page.write_study(scaling, DVC_CACHE, {})


def test_laws_predictors_and_the_prediction_of_the_largest_size(scaling: Study) -> None:
    page.write_study(scaling, DVC_CACHE, {})
    fits = {row["task"]: row for row in csv.DictReader((scaling.folder / "fits.csv").open())}
    for task in ("pretrain", "actions"):
        assert float(fits[task]["exponent_low"]) < 0.3 < float(fits[task]["exponent_high"])
        assert fits[task]["points"] == "15" and fits[task]["inside"] == "True" and float(fits[task]["largest"]) == 1e7
    assert fits["actions"]["metric"] == "1 - top1"
    for row in csv.DictReader((scaling.folder / "tasks.csv").open()):
        assert float(row["spearman_of_loss"]) == pytest.approx(1) == float(row["lowest_of_a_seed"])
        assert row["better_with_size"] == "yes" and row["better_predictor"] == "loss"  # errors are linear in the loss


def test_a_task_that_does_not_rise_says_so_and_has_no_better_predictor(scaling: Study) -> None:
    page.write_study(scaling, DVC_CACHE, {})
    rows = study.read_runs(scaling.folder)
    wobble = {"nano": 0.0, "micro": 0.02, "tiny": -0.02, "small": 0.01, "mini": 0.0}
    of_seed = {"0": 0.01, "1": -0.01, "2": 0.0}
    flat = [
        row | {"value": str(0.5 + wobble[row["arm"]] + of_seed[row["seed"]] * (row["arm"] == "mini"))}
        for row in rows
        if row["task"] == "actions"
    ]
    falling = [row | {"value": str(1 - float(row["value"]))} for row in rows if row["task"] == "actions"]
    losses = [row for row in rows if row["task"] == "pretrain"]
    (within,), (worse,) = (list(page.task_rows(scaling, [*losses, *some])) for some in (flat, falling))
    assert within["better_with_size"] == "within noise" and within["better_predictor"] is None
    assert worse["better_with_size"] == "no" and worse["better_predictor"] is None
    (one_seed,) = page.task_rows(replace(scaling, seeds=(0,)), [row for row in [*losses, *falling] if row["seed"] == "0"])
    assert one_seed["better_with_size"] is None


def test_no_predictor_is_better_where_seeds_disagree_or_the_mean_of_other_arms_is_as_good() -> None:
    means = [0.5, 0.4, 0.35, 0.3]
    assert page._better_predictor([0.02, 0.02, 0.03], [0.01, 0.01, 0.01], means) == "loss"
    assert page._better_predictor([0.01, 0.01, 0.01], [0.02, 0.02, 0.03], means) == "size"
    assert page._better_predictor([0.02, 0.02, 0.01], [0.01, 0.01, 0.03], means) == "not told"
    assert page._better_predictor([0.3, 0.3, 0.3], [0.2, 0.2, 0.2], means) == "not told"


def test_an_arm_without_the_size_of_its_ladder_is_named(scaling: Study) -> None:
    page.write_study(replace(scaling, ladders={}), DVC_CACHE, {})
    rows = [row | {"flops": ""} if row["arm"] == "tiny" else row for row in study.read_runs(scaling.folder)]
    of_compute = replace(scaling, ladders={"compute": ("flops", tuple(SIZES))})
    message = "ladder compute of study scaling has arm tiny, which has no flops; take it from the ladder"
    with pytest.raises(UserError, match=f"^{message}$"):
        list(page.fit_rows(of_compute, rows))


def test_the_page_shows_question_findings_and_table_and_links_its_figures(scaling: Study) -> None:
    scaling.folder.joinpath("findings.md").write_text(
        "# Findings\n\nBigger is better, [.4, .8],\nby far [table: mini].\n\nNo doubt & < none.\n"
    )
    page.write_study(scaling, DVC_CACHE, {})
    text = (scaling.folder / "study.html").read_text()
    assert "Again: <code>scaling4d study scaling --seeds 0,1,2</code>" in text
    assert "<td>size</td><td>val_loss</td><td>15</td>" in text and re.search(r"<br>\(-0\.02\d\d ± 0\.00\d+\) \*<", text)
    assert re.findall(r'<img [^>]*src="([^"]+)"', text) == ["runs.svg", "laws_size.svg"]
    assert f"The baseline is the arm {scaling.base};" in text and text.count("<figcaption>") == 2
    assert "<svg" not in text and "Does it scale?" in text
    assert "<th>pretrain<br>validation loss of pretraining ↓</th>" in text
    assert not [head for head in re.findall("<th>(.*?)</th>", text) if "_" in head]
    svg = (scaling.folder / "laws_size.svg").read_text()
    assert all(f">{line}</text>" in svg for line in ("reconstruct moving", "squared error of hidden pixels", "that move"))
    assert not [line for line in re.findall("<text[^>]*>([^<]*)</text>", svg) if "_" in line]
    assert "<li>Bigger is better, [.4, .8], by far.</li><li>No doubt &amp; &lt; none.</li>" in text


def test_the_page_of_one_seed_speaks_of_no_spread(scaling: Study) -> None:
    page.write_study(replace(scaling, seeds=(0,)), DVC_CACHE, {})
    text = (scaling.folder / "study.html").read_text()
    assert page.ONE_SEED in text and "standard deviation" not in text and "seed noise" not in text


def test_the_index_has_question_finding_seeds_and_code_of_every_study(scaling: Study) -> None:
    findings = "# Three seeds\n\nBigger is better, by 0.1. [table: mini pretrain]\n\nBy far.\n"
    scaling.folder.joinpath("findings.md").write_text(findings)
    page.write_study(scaling, DVC_CACHE, {})
    index = (study.REPORTS / "index.html").read_text()
    assert "<p>Does it scale?</p>\n<p><b>Bigger is better, by 0.1.</b></p>" in index and "By far" not in index
    assert "<small>Seeds 0, 1, 2; 15 runs; code: pretrain 0</small>" in index


def test_the_audit_notes_the_packages_of_other_code_than_that_of_the_lock(scaling: Study) -> None:
    from scaling4d.audit import studies as audit

    def notes(md5: str) -> list[str]:
        hashes = {"pretrain": md5, "readout": "1"}  # no run depends on readout
        outs = [{"path": f"artifacts/code/{name}.json", "hash": "md5", "md5": value, "size": 1} for name, value in hashes.items()]
        Path("dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {"code": {"cmd": "code", "outs": outs}}}))
        return [finding.message for finding in audit.findings() if "other code" in finding.message]

    page.write_study(scaling, DVC_CACHE, {})
    assert notes("0") == []
    assert notes("4") == [f"it was made with other code than dvc.lock names (pretrain); `{scaling.command}` makes it anew"]
    lock = scaling.lock("nano-0")
    for path in (Path("dvc.lock"), lock):
        stages = json.loads(path.read_text())["stages"]
        del stages["code"]
        path.write_text(json.dumps({"schema": "2.0", "stages": stages}))
    messages = [finding.message for finding in audit.findings() if finding.where == str(lock)]
    assert messages[-1] == f"it has no stage `code`: run `{scaling.command}`"


def test_a_run_is_recorded_where_a_study_has_its_lock_and_its_numbers(scaling: Study, tmp_path: Path) -> None:
    facts = {run: {"experiment": f"{run}-abc"} for run in scaling.runs}
    assert study.recorded_run("nano-0-abc") is None
    page.write_study(scaling, DVC_CACHE, facts)
    lock, rows = study.recorded_run("nano-0-abc")
    assert lock == scaling.lock("nano-0") and {row["task"] for row in rows} >= {"pretrain", "actions"} and len(rows) == 5
    assert study.recorded_run("nano-0-def") is None
    scaling.lock("nano-1").write_text(scaling.lock("nano-1").read_text() + " ")
    assert study.recorded_run("nano-1-abc") is None


def test_a_study_takes_the_recorded_runs_of_another_one_without_the_cache(
    scaling: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page.write_study(scaling, DVC_CACHE, {run: {"experiment": f"{run}-abc"} for run in scaling.runs})
    monkeypatch.setattr("scaling4d.studies.run.experiments", dict)
    arms = (replace(ARMS[0], name="smallest"), replace(ARMS[-1], name="largest"))
    other = Study("other", "Ends?", "smallest", (0, 1), arms, {})
    names = {"smallest": ARMS[0].name, "largest": ARMS[-1].name}
    runs = [StudyRun(arm, seed, f"{names[arm.name]}-{seed}-abc") for arm, seed in other.runs.values()]
    page.write_study(other, tmp_path / "empty", save_locks(other, runs))
    value = {(row["arm"], row["seed"], row["task"]): row["value"] for row in study.read_runs(scaling.folder)}
    copied = study.read_runs(other.folder)
    assert {row["arm"] for row in copied} == {"smallest", "largest"} and len(copied) == 4 * 5
    assert all(row["value"] == value[names[row["arm"]], row["seed"], row["task"]] for row in copied)


def test_the_findings_of_every_study_begin_with_one_line() -> None:
    folders = [path.parent for path in sorted((ROOT / study.REPORTS).glob("*/study.json"))]
    for folder in folders:
        lines = folder.joinpath("findings.md").read_text().splitlines()
        assert lines[0].startswith("# ") and lines[1] == lines[3] == "", folder
        cited = re.search(r"\d.*\. \[(table|fits|tasks|predicted): ([^]]+)\]$", lines[2])
        assert cited and len(page.REFERENCES.sub("", lines[2])) <= 200, folder
        rows = folder.joinpath(f"{cited[1]}.csv").read_text().splitlines()
        assert {*cited[2].split("; ")} <= {row.partition(",")[0] for row in rows}, folder
    assert folders


def test_locks_and_figures_that_a_study_no_longer_has_are_removed(scaling: Study) -> None:
    scaling.lock("giant-0").write_text("{}")
    (scaling.folder / "laws_former.svg").write_text("<svg/>")
    page.write_study(scaling, DVC_CACHE, {})
    assert not scaling.lock("giant-0").exists()
    assert {path.name for path in scaling.folder.glob("*.svg")} == {"runs.svg", "laws_size.svg"}


def test_the_times_of_a_run_stay_until_another_experiment_replaces_it(scaling: Study) -> None:
    scaling = replace(scaling, ladders={})
    page.write_study(scaling, DVC_CACHE, RUN_FACTS)
    before = contents(study.REPORTS)
    page.write_study(scaling, DVC_CACHE, {"nano-0": {"experiment": "nano-0-abc"}})
    assert contents(study.REPORTS) == before
    page.write_study(scaling, DVC_CACHE, {"nano-0": {"experiment": "nano-0-def"}})
    assert json.loads((scaling.folder / "study.json").read_text())["runs"]["nano-0"] == {"experiment": "nano-0-def"}


# ---- the audit of a study ----


@pytest.fixture
def wrong(scaling: Study) -> Callable[[], list[str]]:
    """Write the study, its definition and findings. Returns the audit of them, without unchecked inputs of locks."""
    from scaling4d.audit import studies as audit

    arms = {arm.name: {"encoder": arm.encoder} for arm in scaling.arms}
    ladders = {name: {"x": x, "arms": list(names)} for name, (x, names) in scaling.ladders.items()}
    targets = [target.format("{encoder}") for target in TARGETS]
    definition = {"question": scaling.question, "base": scaling.base, "targets": targets, "arms": arms, "ladders": ladders}
    study.DEFINITIONS.mkdir(parents=True)
    (study.DEFINITIONS / "scaling.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    (scaling.folder / "findings.md").write_text("Bigger is better.\n")
    assert study.read_study("scaling") == scaling
    page.write_study(scaling, DVC_CACHE, RUN_FACTS)
    return lambda: [f"{finding.where}: {finding.message}" for finding in audit.findings() if finding.kind == "wrong"]


def test_the_audit_names_a_file_with_a_changed_byte_and_one_that_is_gone(scaling: Study, wrong: Callable[[], list[str]]) -> None:
    assert wrong() == []
    names = ("runs.csv", "table.csv", "fits.csv", "tasks.csv", "findings.md", "locks/tiny-1.lock", "runs.svg", "study.html")
    for name in names:
        path = scaling.folder / name
        before = path.read_bytes()
        at = max(place for place, byte in enumerate(before) if chr(byte).isalnum())
        path.write_bytes(before[:at] + (b"0" if before[at : at + 1] != b"0" else b"1") + before[at + 1 :])
        assert any(line.startswith(f"{path}: sha256 ") for line in wrong()), name
        path.unlink()
        assert any(line.startswith(f"{path}: ") and "absent on disk: take it from git again" in line for line in wrong()), name
        path.write_bytes(before)


def test_the_audit_names_a_table_that_does_not_follow_from_the_runs(scaling: Study, wrong: Callable[[], list[str]]) -> None:
    facts = scaling.folder / "study.json"
    for name in ("table.csv", "fits.csv", "tasks.csv", "study.html"):
        path, before = scaling.folder / name, facts.read_text()
        text = path.read_text()
        at = re.search(r"\d\.\d", text).start()
        path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
        shas = [hashlib.sha256(content.encode()).hexdigest() for content in (text, path.read_text())]
        facts.write_text(before.replace(*shas))
        assert (
            f"{path}: it does not follow from {'the tables and findings.md' if name == 'study.html' else 'runs.csv'}" in wrong()
        )
        path.write_text(text)
        facts.write_text(before)
    assert wrong() == []


def test_tables_of_a_search_may_differ_a_little_and_others_in_the_last_digits_alone() -> None:
    from scaling4d.audit.studies import _same_table

    law = "number,value,low,high\nfloor,0.04,{},0.05\nexponent,0.6,0.3,0.9\n"
    assert _same_table(law.format(3e-8), law.format(2e-5), searched=True)  # of a floor of 0.05
    assert not _same_table(law.format(0.01), law.format(0.011), searched=True)
    lowest = "left_out,runs,floor\nno run,20,0.03\nlowest,19,{}\n"
    assert _same_table(lowest.format(3e-8), lowest.format(2e-5), searched=True)
    fits = "task,points,largest,measured,predicted,predicted_low,predicted_high\npose,{},{},{},{},0.1,0.4\n"
    expected = fits.format(15, 1e6, 0.25, 0.3)
    assert _same_table(fits.format(15, 1e6, 0.2500000001, 0.3001), expected, searched=True)
    for other in ((16, 1e6, 0.25, 0.3), (15, 1.001e6, 0.25, 0.3), (15, 1e6, 0.2501, 0.3), (15, 1e6, 0.25, 0.31)):
        assert not _same_table(fits.format(*other), expected, searched=True)
    assert not _same_table("arm,predicted\na,0.0501\n", "arm,predicted\na,0.0500\n", searched=False)


def test_the_audit_names_an_absent_study_json_and_an_absent_index(scaling: Study, wrong: Callable[[], list[str]]) -> None:
    (study.REPORTS / "index.html").unlink()
    assert wrong() == ["reports/studies/index.html: absent; take it from git again, or run `scaling4d study --collect`"]
    (scaling.folder / "study.json").unlink()
    (line,) = wrong()
    assert line.startswith("reports/studies/scaling/study.json: absent beside runs.csv; take it from git again, or run ")


def test_files_that_macos_leaves_are_no_files_of_a_study(scaling: Study, wrong: Callable[[], list[str]]) -> None:
    (scaling.folder / ".DS_Store").write_bytes(b"\0")
    assert wrong() == []


def test_the_audit_names_a_changed_key_of_study_json(scaling: Study, wrong: Callable[[], list[str]]) -> None:
    path = scaling.folder / "study.json"
    before = path.read_text()
    for old, new, key in (
        ('"seconds": 10.0\n', '"seconds": 10.5\n', "seconds"),
        ('"points.micro.width"', '"points.micro.depth"', "arms"),
    ):
        assert old in before
        path.write_text(before.replace(old, new, 1))
        (line,) = wrong()
        assert line.startswith(f"{path}: its {key!r} does not follow from the locks: ")
    path.write_text(before.replace("Does it scale", "Does it grow", 1))
    question, *_ = wrong()  # the index and the page show the question too
    assert question.startswith(f"{path}: its 'question' is not that of experiments/study, nor of a commit of it: ")
    path.write_text(before.replace('"base": "nano"', '"base": "tiny"', 1))
    assert "reports/studies/scaling/table.csv: it does not follow from runs.csv" in wrong()
    path.write_text(before.replace("nano-0-abc", "nano-0-abd"))
    (line,) = wrong()
    assert line.startswith("reports/studies/scaling/runs.csv: the rows of nano, seed 0, are not those of ")


def test_the_audit_names_an_index_with_a_changed_number(scaling: Study, wrong: Callable[[], list[str]]) -> None:
    index = study.REPORTS / "index.html"
    changed = f"{index}: it does not follow from the studies; take it from git again, or run `scaling4d study --collect`"
    before = index.read_text()
    assert "15 runs" in before and wrong() == []
    index.write_text(before.replace("15 runs", "16 runs"))
    assert wrong() == [changed]
    index.write_text(before.replace("</p>", " 3 of 3.</p>", 1))
    assert wrong() == [changed]


def test_an_edited_question_is_of_other_arms_or_that_of_a_commit(scaling: Study, wrong: Callable[[], list[str]]) -> None:
    path = study.DEFINITIONS / "scaling.yaml"
    text = path.read_text()
    edited = text.replace("scale?", "grow?")
    path.write_text(edited.replace("arms:\n", "arms:\n  giant: {encoder: mini}\n", 1))
    assert wrong() == []
    path.write_text(text)
    commit_here("definition", str(study.DEFINITIONS))
    path.write_text(edited)
    assert wrong() == []


def test_the_audit_names_missing_runs_and_rows_of_unknown_runs(scaling: Study, wrong: Callable[[], list[str]]) -> None:
    path, facts = scaling.folder / "runs.csv", scaling.folder / "study.json"
    text, before = path.read_text(), contents(scaling.folder)
    path.write_text(text + re.sub("^mini,2", "giant,2", text.splitlines()[-1]) + "\n")
    table = study.study_table(study.read_runs(scaling.folder), "nano")
    (scaling.folder / "table.csv").write_text(to_csv(study.TABLE_COLUMNS, table))
    changed = json.loads(facts.read_text())
    for name in ("runs.csv", "table.csv"):
        changed["files"][name] = hashlib.sha256((scaling.folder / name).read_bytes()).hexdigest()
    facts.write_text(json.dumps(changed))
    assert "reports/studies/scaling/runs.csv: it has rows of giant, seed 2, which is no run of this study" in wrong()
    for name, text in before.items():
        (scaling.folder / name).write_bytes(text)
    scaling.lock("tiny-1").unlink()
    assert f"{scaling.lock('tiny-1')}: absent, though {facts} needs it: run `{scaling.command}`" in wrong()


def test_an_outcome_of_another_definition_is_noted(scaling: Study, wrong: Callable[[], list[str]]) -> None:
    from scaling4d.audit import studies as audit

    notes = lambda: [finding.message for finding in audit.findings() if finding.kind == "note"]  # noqa: E731
    assert notes() == []
    path = study.DEFINITIONS / "scaling.yaml"
    path.write_text(path.read_text().replace("arms:\n", "arms:\n  giant: {encoder: mini}\n", 1))
    assert notes() == [f"experiments/study now defines it otherwise, with arms giant; `{scaling.command}` makes it anew"]
    page.write_study(study.read_finished_study(scaling.folder), DVC_CACHE, {})
    path.unlink()
    assert notes() == ["experiments/study no longer has this study"] and wrong() == []


def test_a_lock_of_another_run_s_results_of_two_versions_or_of_other_code_is_wrong(
    scaling: Study, wrong: Callable[[], list[str]]
) -> None:
    lock, other = scaling.lock("nano-0"), scaling.lock("nano-1")
    text, of_other = lock.read_text(), other.read_text()
    assert wrong() == []
    lock.write_text(of_other)
    page.write_study(scaling, DVC_CACHE, {})
    lock.write_text(of_other.replace('"seed": 1', '"seed": 0'))
    page.write_study(scaling, DVC_CACHE, {})
    messages = [message for message in wrong() if message.startswith(f"{lock}: ")]
    assert messages == [f"{lock}: the result of {target.format('nano')} was made with seed = 1, not 0" for target in TARGETS]
    stages = json.loads(text)["stages"]
    stages[TARGETS[0].format("nano")]["deps"] = [stages["code"]["outs"][0] | {"md5": "1"}]
    lock.write_text(json.dumps({"schema": "2.0", "stages": stages}))
    page.write_study(scaling, DVC_CACHE, {})
    assert f"{lock}: it contradicts itself about artifacts/code/pretrain.json: md5 0 and 1" in wrong()
    assert f"{lock}: it is of other code than study.json names: pretrain" in wrong()
    kinds = {"code": {}, "pretrain": {"matrix": {}}, "reconstruct": {"matrix": {}}, "readout_frozen": {}}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": kinds}))  # the stage is one that DVC kept of earlier settings
    assert wrong() == []


def test_a_study_without_a_seed_of_its_definition_says_so(scaling: Study, wrong: Callable[[], list[str]]) -> None:
    from scaling4d.audit import studies as audit

    page.write_study(replace(scaling, seeds=(0, 1)), DVC_CACHE, {})
    (note,) = (finding.message for finding in audit.findings() if finding.kind == "note")
    assert note == f"it lacks seeds 2 of its definition; `{scaling.command}` makes them" and wrong() == []


def test_an_outcome_names_the_study_that_it_was_made_of(scaling: Study) -> None:
    page.write_study(scaling, DVC_CACHE, {})
    assert study.read_finished_study(scaling.folder) == scaling
    with pytest.raises(UserError, match="^no reports/studies/none/study.json; run `scaling4d study none`$"):
        study.read_finished_study(study.REPORTS / "none")
