"""Predictions are committed before their results, do not change later, and follow from the runs that they name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import git

from scaling4d.audit import predictions
from scaling4d.audit.run import NOTE, WRONG
from scaling4d.provenance import to_csv
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
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: Callable) -> Study:
    """A repository with a fitted study, and a study that is to be predicted."""
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    law.PREDICTIONS.mkdir(parents=True)
    write_runs("small", (1e12, 2e12, 4e12))
    commit("fitted runs")
    arms = tuple(Arm(f"{size}_8e+12", "pocket", (), f"{size}", ()) for size in SIZES) + (Arm("untrained", "pocket", (), "u", ()),)
    clips = {str(size): round(8e12 / flops) for size, flops in zip(SIZES, FLOPS_PER_CLIP, strict=True)}
    monkeypatch.setattr(law, "_sizes", lambda point, settings: (int(point), clips[point]))
    monkeypatch.setattr(law.config, "compose", lambda overrides: {"points": {arm.encoder: {} for arm in arms[:-1]}})
    monkeypatch.setattr(law, "fit_loss_law", partial(law.fit_loss_law, draws=40))  # a tenth of the time
    return Study("larger", "?", arms[0].name, (0,), arms, {}, law=True)


def test_a_prediction_before_its_results_is_right_and_stands_beside_them(project: Study, commit: Callable) -> None:
    assert law.write_prediction(project, REPORTS / "small") == PREDICTION
    assert [row["parameters"] for row in json.loads(PREDICTION.read_text())["arms"]] == [*SIZES]
    commit("prediction")
    write_runs("larger", (8e12,))
    commit("results")
    assert [*predictions.findings()] == []
    rows = [*law.outcome_rows(law.read_prediction("larger"), law.read_trained_runs(REPORTS / "larger"))]
    assert [row["measured"] for row in rows] == pytest.approx([row["predicted"] for row in rows], rel=5e-3)
    files = page.law_files(project, read_runs(REPORTS / "larger"))
    assert [*files] == ["law.csv", "optimum.csv", "predicted.csv", "law.svg"]
    assert all(words in files["law.svg"] for words in (">predicted before the run, 90 %<", ">its outcome<", ">8e+12 FLOPs<"))
    assert files == page.law_files(project, read_runs(REPORTS / "larger"))


def test_a_prediction_after_its_results_is_wrong(project: Study, commit: Callable) -> None:
    law.write_prediction(project, REPORTS / "small")
    late = PREDICTION.read_text()
    PREDICTION.unlink()
    write_runs("larger", (8e12,))
    commit("results")
    PREDICTION.write_text(late)
    commit("prediction")
    (finding,) = predictions.findings()
    assert finding.kind == WRONG and "measures already" in finding.message
    with pytest.raises(UserError, match="has the results already; a prediction is made before them"):
        law.write_prediction(project, REPORTS / "small")


def test_a_prediction_in_the_commit_of_its_results_is_wrong(project: Study, commit: Callable) -> None:
    law.write_prediction(project, REPORTS / "small")
    (finding,) = predictions.findings()
    assert finding.kind == NOTE and "commit it before `scaling4d study larger`" in finding.message
    write_runs("larger", (8e12,))
    commit("both")
    assert [finding.kind for finding in predictions.findings()] == [WRONG]


def test_a_prediction_that_was_changed_later_is_wrong(project: Study, commit: Callable) -> None:
    law.write_prediction(project, REPORTS / "small")
    commit("prediction")
    content = json.loads(PREDICTION.read_text())
    content["arms"][1]["predicted"] *= 1.01
    PREDICTION.write_text(json.dumps(content))
    commit("change")
    changed, other = predictions.findings()
    assert changed.kind == other.kind == WRONG
    assert "was changed after commit" in changed.message and "the law of reports/studies/small/runs.csv predicts" in other.message


def test_other_runs_than_those_of_the_prediction_are_noted(project: Study, commit: Callable) -> None:
    law.write_prediction(project, REPORTS / "small")
    write_runs("small", (1e12, 2e12, 3e12))
    commit("prediction")
    assert [finding.kind for finding in predictions.findings()] == [NOTE]


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
    assert len(law.law_of(tmp_path).flops) == 9
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"method": "MAEST"}))
    with pytest.raises(UserError, match="results of MAEST and SimpleMAE, whose losses do not compare"):
        law.law_of(tmp_path)
    with pytest.raises(UserError, match="no runs.csv and no summary.json"):
        law.law_of(tmp_path / "pretrain/absent")
