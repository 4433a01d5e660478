"""Predictions are committed before their results, do not change later, and follow from the runs that they name."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import commit_here

from scaling4d import artifacts
from scaling4d.audit import predictions
from scaling4d.audit.run import NOTE, WRONG
from scaling4d.provenance import parse_csv, to_csv
from scaling4d.records import UserError
from scaling4d.studies import law, page
from scaling4d.studies.study import REPORTS, RUN_COLUMNS, Arm, Study, read_runs

pytestmark = pytest.mark.integration

SIZES, FLOPS_PER_CLIP = (24_400, 146_928, 738_720), (2.88e7, 1.35e8, 5.3e8)
PREDICTION = law.PREDICTIONS / "larger.json"


def write_runs(name: str, budgets: tuple[float, ...]) -> None:
    rows = []
    for budget in budgets:
        for size, flops in zip(SIZES, FLOPS_PER_CLIP, strict=True):
            clips = round(budget / flops)
            loss = 0.04 + 0.01 * (size / 1e5) ** -0.4 + 0.01 * (clips / 1e4) ** -0.5
            row = {"arm": f"{size}_{budget:.0e}", "seed": 0, "task": "pretrain", "metric": "val_loss", "value": loss}
            rows.append(row | {"parameters": size, "clips_seen": clips, "flops": clips * flops})
    (REPORTS / name).mkdir(parents=True, exist_ok=True)
    (REPORTS / name / "runs.csv").write_text(to_csv(RUN_COLUMNS, rows))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A repository with a fitted study, and a study that is to be predicted."""
    monkeypatch.chdir(tmp_path)
    law.PREDICTIONS.mkdir(parents=True)
    write_runs("small", (1e12, 2e12, 4e12))
    commit_here("fitted runs")
    arms = tuple(Arm(f"{size}_8e+12", "pocket", (), f"{size}", ()) for size in SIZES)
    others = (Arm("untrained", "pocket", (), "u", ()), Arm("mae_st", "pocket", (), "m", ()))
    models = {arm.encoder: {"model": {"SimpleMAE": {}}} for arm in arms} | {"m": {"model": {"MAEST": {}}}}
    clips = {str(size): round(8e12 / flops) for size, flops in zip(SIZES, FLOPS_PER_CLIP, strict=True)}
    monkeypatch.setattr(law, "_sizes", lambda point, settings: (int(point), clips[point]))
    monkeypatch.setattr(law.config, "compose", lambda overrides: {"points": models})
    monkeypatch.setattr(law, "fit_loss_law", partial(law.fit_loss_law, draws=40))  # a tenth of the time
    return Study("larger", "?", arms[0].name, (0,), (*arms, *others), {}, law=True)


def test_a_prediction_before_its_results_is_right_and_stands_beside_them(project: Study) -> None:
    assert law.write_prediction(project, REPORTS / "small") == PREDICTION
    assert [row["parameters"] for row in json.loads(PREDICTION.read_text())["arms"]] == [*SIZES]
    commit_here("prediction")
    write_runs("larger", (8e12,))
    commit_here("results")
    assert [*predictions.findings()] == []
    rows = [*law.outcome_rows(law.read_prediction("larger"), law.read_trained_runs(REPORTS / "larger"))]
    assert [row["measured"] for row in rows] == pytest.approx([row["predicted"] for row in rows], rel=5e-3)
    assert {row["inside"] for row in rows} == {"1 of 1"}
    files = page.tables(project, read_runs(REPORTS / "larger"))
    laws = ("law", "optimum", "sensitivity")
    assert [*files] == ["table.csv", *(f"{name}.csv" for name in laws), "predicted.csv", *(f"{name}_after.csv" for name in laws)]
    assert files["optimum.csv"].count("\n") == 4 and files["optimum_after.csv"].count("\n") == 5  # the budget of the outcome too
    rows = parse_csv(files["predicted.csv"])
    assert all(abs(float(row["miss_percent"])) < 0.5 < abs(float(row["unchanged_percent"])) for row in rows)
    assert all(abs(float(row["by_a_line_percent"])) < 3 for row in rows)
    svg = law.law_figure(*page.fitted_law(project, read_runs(REPORTS / "larger")))
    assert all(
        words in svg for words in (">predicted before the run, 90 %<", ">its outcome<", ">8e+12 FLOPs<", ">the same, beyond the")
    )


def test_what_is_measured_already_is_not_predicted(project: Study) -> None:
    law.write_prediction(project, REPORTS / "small")
    every = PREDICTION.read_text()
    write_runs("other", (8e12,))
    with pytest.raises(UserError, match="every size of study larger is measured with as many clips"):
        law.write_prediction(project, REPORTS / "small")
    rows = (REPORTS / "other/runs.csv").read_text().splitlines(keepends=True)
    (REPORTS / "other/runs.csv").write_text("".join(rows[:2]))
    law.write_prediction(project, REPORTS / "small")
    assert [row["parameters"] for row in json.loads(PREDICTION.read_text())["arms"]] == [*SIZES[1:]]
    PREDICTION.write_text(every)
    commit_here("other runs, and a prediction of the first of them")
    (finding,) = predictions.findings()
    assert (
        finding.kind == WRONG and "24400_8e+12 is predicted by commit " in finding.message and "other/runs.csv" in finding.message
    )


def test_results_of_a_former_study_of_the_name_and_a_withdrawn_prediction_do_not_count(project: Study) -> None:
    write_runs("larger", (3e12,))
    commit_here("results")
    (REPORTS / "larger/runs.csv").unlink()
    commit_here("they are gone")
    law.write_prediction(project, REPORTS / "small")
    commit_here("prediction")
    assert [*predictions.findings()] == []
    with pytest.raises(UserError, match="a commit has .*larger.json; a prediction is made once"):
        law.write_prediction(project, REPORTS / "small")
    PREDICTION.unlink()
    (finding,) = predictions.findings()
    assert finding.kind == NOTE and finding.where == PREDICTION.as_posix() and "is gone" in finding.message
    Path(law.PREDICTIONS, "a name.json").write_text("{}")
    commit_here("a name with a space")
    Path(law.PREDICTIONS, "a name.json").unlink()
    assert {finding.where for finding in predictions.findings()} == {PREDICTION.as_posix(), f"{law.PREDICTIONS}/a name.json"}
    commit_here("withdrawn")
    write_runs("small", (1e12, 2e12, 3e12))
    law.write_prediction(project, REPORTS / "small")
    commit_here("another prediction")
    _, finding = predictions.findings()
    assert finding.kind == NOTE and finding.message.startswith("an earlier prediction, of commit ")


def test_an_arm_that_did_not_run_stays_in_the_table(project: Study) -> None:
    law.write_prediction(project, REPORTS / "small")
    runs = law.read_trained_runs(REPORTS / "small")
    assert [row.get("measured") for row in law.outcome_rows(law.read_prediction("larger"), runs)] == [None] * 3


def test_a_result_that_a_commit_had_before_the_prediction_is_found_though_it_was_removed(project: Study) -> None:
    facts = json.dumps({"runs": {f"{SIZES[0]}_8e+12-0": {"experiment": "0123456789abcdef"}}})
    write_runs("larger", (8e12,))
    (REPORTS / "larger/study.json").write_text(facts)
    commit_here("results")
    for name in ("runs.csv", "study.json"):
        (REPORTS / "larger" / name).unlink()
    commit_here("hidden")
    law.write_prediction(project, REPORTS / "small")
    commit_here("prediction")
    notes = [*predictions.findings()]  # other code may have made them
    assert [finding.kind for finding in notes] == [NOTE] * 3
    assert all("larger/runs.csv of commit " in f.message and " had a run of the size and clips of " in f.message for f in notes)
    write_runs("larger", (8e12,))
    (REPORTS / "larger/study.json").write_text(facts)
    commit_here("results again")
    finding, *rest = predictions.findings()
    assert rest == notes and finding.kind == WRONG and f" predicts {SIZES[0]}_8e+12-0, whose result commit " in finding.message


def test_seeds_inside_the_interval_are_counted_and_longer_runs_make_no_line(project: Study) -> None:
    law.write_prediction(project, REPORTS / "small")
    prediction = json.loads(PREDICTION.read_text())
    row = prediction["arms"][0]
    run = law.TrainedRun(row["arm"], 0, row["parameters"], row["clips_seen"], 8e12, row["predicted"])
    outside = replace(run, seed=1, loss=1.1 * row["high"])
    assert next(law.outcome_rows(prediction, [run, outside]))["inside"] == "1 of 2"
    row["clips_seen"] = 1
    first = next(law.outcome_rows(prediction, [replace(run, clips_seen=1)]))
    assert "by_a_line_percent" not in first


def test_an_arm_that_changes_more_than_its_steps_is_not_predicted(project: Study) -> None:
    change = f"{law.STEPS}=7"
    arms = (replace(project.arms[0], overrides=(change,)), replace(project.arms[1], overrides=(change, "ablation=mask_50")))
    assert law.write_prediction(replace(project, arms=arms[:1]), REPORTS / "small") == PREDICTION
    with pytest.raises(UserError, match="^arm 146928_8e.12 changes ablation=mask_50; a law of size and clips predicts arms"):
        law.write_prediction(replace(project, arms=arms), REPORTS / "small")


def test_folders_are_fitted_together_and_a_training_counts_once(project: Study) -> None:
    write_runs("larger", (8e12,))
    write_runs("again", (4e12, 8e12))
    assert len(law.law_of(REPORTS / "small", REPORTS / "larger").flops) == 12
    assert len(law.law_of(REPORTS / "small", REPORTS / "again", REPORTS / "larger").flops) == 12
    with pytest.raises(UserError, match="^reports/studies/larger has 3 runs of 3 sizes with 3 numbers"):
        law.law_of(REPORTS / "larger")


def test_two_seeds_of_a_predicting_run_are_one_point_of_the_line(project: Study) -> None:
    path = REPORTS / "small/runs.csv"
    law.write_prediction(project, REPORTS / "small")
    one_seed = parse_csv(path.read_text())
    write_runs("larger", (8e12,))
    runs = law.read_trained_runs(REPORTS / "larger")
    before = [*law.outcome_rows(json.loads(PREDICTION.read_text()), runs)]
    path.write_text(to_csv(RUN_COLUMNS, [row | {"seed": seed} for row in one_seed for seed in (0, 1)]))
    prediction = json.loads(PREDICTION.read_text()) | {"source_sha256": artifacts.sha256(path)}
    assert [row["by_a_line_percent"] for row in law.outcome_rows(prediction, runs)] == pytest.approx(
        [row["by_a_line_percent"] for row in before]
    )


def test_a_run_of_another_size_than_predicted_is_refused(project: Study) -> None:
    law.write_prediction(project, REPORTS / "small")
    write_runs("larger", (9e12,))
    names = {f"{size}_9e+12": f"{size}_8e+12" for size in SIZES}
    path = REPORTS / "larger/runs.csv"
    for name, other in names.items():
        path.write_text(path.read_text().replace(name, other))
    with pytest.raises(
        UserError, match="24400_8e.12 was predicted for 24400 with 277778, and ran as 24400 parameters with 312500 clips"
    ):
        page.tables(project, read_runs(REPORTS / "larger"))


def test_results_that_are_gone_are_named(project: Study) -> None:
    law.write_prediction(project, REPORTS / "small")
    commit_here("prediction")
    write_runs("larger", (8e12,))
    commit_here("results")
    (REPORTS / "larger/runs.csv").unlink()
    commit_here("hidden")
    (finding,) = predictions.findings()
    assert finding.kind == NOTE and finding.message.startswith("reports/studies/larger/runs.csv, which commit ")


def test_a_prediction_after_its_results_is_wrong_also_where_they_are_made_again(project: Study) -> None:
    law.write_prediction(project, REPORTS / "small")
    late = PREDICTION.read_text()
    PREDICTION.unlink()
    write_runs("larger", (8e12,))
    commit_here("results")
    PREDICTION.write_text(late)
    commit_here("prediction")
    (finding,) = predictions.findings()
    assert finding.kind == WRONG and "measures already" in finding.message
    with pytest.raises(UserError, match="has the results already; a prediction is made before them"):
        law.write_prediction(project, REPORTS / "small")
    results = REPORTS / "larger/runs.csv"
    text = results.read_text()
    results.unlink()
    commit_here("results are gone")
    results.write_text(text)
    commit_here("results of other code")
    wrong = [*predictions.findings()]
    assert [finding.kind for finding in wrong] == [WRONG] * 3
    assert all("in which reports/studies/larger/runs.csv has a run of its size and clips already" in f.message for f in wrong)


def test_a_prediction_in_the_commit_of_its_results_is_wrong(project: Study) -> None:
    law.write_prediction(project, REPORTS / "small")
    (finding,) = predictions.findings()
    assert finding.kind == NOTE and "commit it before `scaling4d study larger`" in finding.message
    write_runs("larger", (8e12,))
    commit_here("both")
    assert [finding.kind for finding in predictions.findings()] == [WRONG]


def test_a_prediction_that_was_changed_later_is_wrong(project: Study) -> None:
    law.write_prediction(project, REPORTS / "small")
    commit_here("prediction")
    content = json.loads(PREDICTION.read_text())
    content["arms"][1]["predicted"] *= 1.01
    PREDICTION.write_text(json.dumps(content))
    commit_here("change")
    changed, other = predictions.findings()
    assert changed.kind == other.kind == WRONG
    assert "was changed after commit" in changed.message and "the law of reports/studies/small/runs.csv predicts" in other.message


def test_the_runs_of_the_prediction_are_found_in_the_commits_and_others_are_wrong(project: Study) -> None:
    law.write_prediction(project, REPORTS / "small")
    commit_here("prediction")
    write_runs("small", (1e12, 2e12, 3e12))
    commit_here("other runs")
    assert [*predictions.findings()] == []
    PREDICTION.unlink()
    commit_here("withdrawn")
    law.write_prediction(project, REPORTS / "small")
    content = json.loads(PREDICTION.read_text())
    PREDICTION.write_text(json.dumps(content | {"source_sha256": "0" * 64}))
    commit_here("of no runs")
    note, *wrong = predictions.findings()
    assert note.kind == NOTE
    assert [finding.kind for finding in wrong] == [WRONG, WRONG]
    assert all("no reports/studies/small/runs.csv of sha256 000000000000" in finding.message for finding in wrong)


def test_runs_that_came_after_the_prediction_are_wrong(project: Study) -> None:
    before = (REPORTS / "small/runs.csv").read_text()
    write_runs("small", (1e12, 2e12, 3e12))
    law.write_prediction(project, REPORTS / "small")
    later = (REPORTS / "small/runs.csv").read_text()
    (REPORTS / "small/runs.csv").write_text(before)
    commit_here("prediction")
    (REPORTS / "small/runs.csv").write_text(later)
    commit_here("its runs")
    (finding,) = predictions.findings()
    assert finding.kind == WRONG and "has no reports/studies/small/runs.csv of sha256 " in finding.message


def test_an_optimum_at_a_limit_of_the_search_says_so(project: Study) -> None:
    fitted = law.law_of(REPORTS / "small")
    assert "at a limit of the search, so not identified" in law.law_text(fitted, parameters=None, clips=None, flops=1e24)
    assert "limit" not in law.law_text(fitted, parameters=None, clips=None, flops=3e12)


def test_the_law_of_a_folder_says_where_it_is_asked_beyond_its_runs(project: Study) -> None:
    fitted = law.law_of(REPORTS / "small")
    inside = law.law_text(fitted, parameters=100_000, clips=20_000, flops=None)
    outside = law.law_text(fitted, parameters=10_000_000, clips=None, flops=8e12)
    assert "outside the fitted range" not in inside and outside.endswith("outside the fitted range")
    assert "best size for 3e+12 FLOPs" in law.law_text(fitted, parameters=None, clips=None, flops=3e12)


def test_a_folder_of_artifacts_has_a_law_where_one_method_made_them(tmp_path: Path) -> None:
    for number, size in enumerate(np.repeat(SIZES, 3)):
        clips = 10_000 * (number % 3 + 1)
        summary = {"point": f"p{number}", "seed": 0, "parameters": int(size), "clips_seen": clips, "flops": clips * 1e8}
        summary |= {"val_loss": 0.05 + 1 / size + 1 / clips, "method": "SimpleMAE"}
        folder = tmp_path / "pretrain" / f"p{number}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/runs").symlink_to(tmp_path / "pretrain")
    assert len(law.law_of(tmp_path / "pretrain").flops) == len(law.law_of(tmp_path / "linked").flops) == 9
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"method": "MAEST"}))
    with pytest.raises(UserError, match="results of MAEST and SimpleMAE, whose losses do not compare"):
        law.law_of(tmp_path)
    with pytest.raises(UserError, match="has no runs.csv; --predict needs the folder of a study"):
        law.write_prediction(Study("any", "?", "a", (0,), (), {}), tmp_path)
    with pytest.raises(UserError, match="no runs.csv and no summary.json"):
        law.law_of(tmp_path / "pretrain/absent")
