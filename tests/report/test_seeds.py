"""The study of seeds: whether it belongs to a run, and its means in the verdict and the figures."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from statistics import fmean, stdev

import published_numbers
import pytest
import yaml
from synthetic_run import BUILT, verdict_rows, verdict_text, write_seed_study, write_tables

from scaling4d import config
from scaling4d.audit.report_numbers import _value_at
from scaling4d.records import write_json
from scaling4d.report import figures, layout, tables
from scaling4d.report.page import Page
from scaling4d.report.run_results import RunResults, read_run_results
from scaling4d.report.seeds import FOLDER, noise_of_seeds
from scaling4d.report.verdict import NO, NOISE, YES, conclusion, encoder_better, measure_rows, rules, verdict
from scaling4d.studies.study import loss_task
from scaling4d.studies.words import METRIC_LABELS

STUDY, RUNS = FOLDER / "study.json", FOLDER / "runs.csv"


@pytest.fixture
def with_study(pocket: dict) -> Callable[..., RunResults]:
    """Write a study of seeds of the run, and read the run with it."""

    def write(**properties: object) -> RunResults:
        write_seed_study(read_run_results(pocket), **properties)
        return read_run_results(pocket)

    return write


@pytest.fixture
def run(with_study: Callable[..., RunResults]) -> RunResults:
    return with_study()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_every_number_has_its_values_mean_and_deviation_over_seeds(run: RunResults) -> None:
    measured = run.fresh_seed_study.numbers["mini", "pose", "epe"]
    assert measured.values[0] == run.result("mini", "pose", "frozen").value and list(measured.values) == [0, 1, 2]
    assert measured.mean == pytest.approx(fmean(measured.values.values()))
    assert measured.deviation == pytest.approx(stdev(measured.values.values()))
    assert len(run.fresh_seed_study.numbers) == 10 * 5 + 7 + 2 * 6  # frozen readouts, losses, errors of pixels


def test_a_study_of_other_code_counts_where_it_gave_the_numbers_of_the_runs_seed(run: RunResults, pocket: dict) -> None:
    def with_code(package: str) -> RunResults:
        facts = json.loads(STUDY.read_text())
        facts["code"][f"artifacts/code/{package}.json"] = "0" * 32
        write_json(STUDY, facts)
        return read_run_results(pocket)

    told = "The study of seeds is of other code (readout); it gave the same weights and numbers of this run&#x27;s seed."
    assert "other code" not in rules(with_code("show"), Page(Path("out")))  # it makes no number
    run = with_code("readout")
    assert run.fresh_seed_study and "±" in verdict_text(run) and told in rules(run, Page(Path("out")))
    edit(RUNS, run.result("tiny", "boxes", "frozen").checkpoint_sha256, "0" * 64)
    run = read_run_results(pocket)
    text = verdict_text(run) + rules(run, Page(Path("out")))
    assert run.fresh_seed_study is None and "±" not in text
    svg = figures.headline(run)
    assert "standard deviation" not in svg and "this run" not in svg
    assert ">frozen, 95 % interval over videos</text>" in svg and ">trivial answer</text>" in svg
    assert "our points with 95 % intervals over validation videos" in layout.figure(run, "headline")
    assert "The study of seeds is of other code (readout) and has other numbers of tiny at " in text
    assert "run <code>scaling4d study seeds --seeds 0,1,2</code>." in text


def test_a_study_of_other_numbers_encoders_or_another_profile_is_left_out(run: RunResults, pocket: dict) -> None:
    before = RUNS.read_text()
    edit(RUNS, run.result("tiny", "boxes", "frozen").checkpoint_sha256, "0" * 64)
    stale = read_run_results(pocket).seed_study.stale
    assert re.match("The study of seeds has other numbers of tiny at .* with seed 0, so other settings, data or machines", stale)
    RUNS.write_text(re.sub("^small,0,small,depth.*\n", "", before, flags=re.MULTILINE))
    stale = read_run_results(pocket).seed_study.stale
    assert stale.startswith("The study of seeds lacks small at depth with seed 0: ")
    edit(STUDY, '"profile": "test"', '"profile": "desk"')
    assert read_run_results(pocket).seed_study is None


@pytest.mark.parametrize(("seeds_", "reason"), [
    ((0,), "has one seed alone: run `scaling4d study seeds`."),
    ((1, 2), "lacks this run's seed, 0: run `scaling4d study seeds --seeds 0,1,2`."),
])  # fmt: skip
def test_a_study_of_too_few_seeds_is_stale(with_study: Callable[..., RunResults], seeds_: tuple, reason: str) -> None:
    assert with_study(seeds_=seeds_).seed_study.stale == f"The study of seeds {reason}"


def test_the_verdict_compares_means_beyond_the_noise_of_seeds(run: RunResults) -> None:
    table = verdict_rows(run)
    assert len(table) == 3 + len(run.tasks)
    (pose,) = (cells for name, cells in table.items() if "camera" in name)
    numbers = run.fresh_seed_study.numbers
    nano, mini = (numbers[point, "pose", "epe"] for point in ("nano", "mini"))
    assert pose[1] == f"{nano.mean:.4f} ± {nano.deviation:.4f}" and nano.mean > mini.mean
    assert pose[0].startswith(YES)
    noise = noise_of_seeds(run.fresh_seed_study.of_task("pose"), mini, nano)
    assert f"{mini.mean - nano.mean:+.4f}" in pose[0] and f"noise {noise:.4f}" in pose[0]
    assert all(cell.startswith(YES) for cell in pose[3:])  # untrained nano and mini, pixels, standing still


def test_two_encoders_are_compared_both_ways(run: RunResults) -> None:
    base = "untrained_mini"
    answers = encoder_better(run, "pose", base, "mini"), encoder_better(run, "pose", "mini", base)
    assert sorted(answers) == sorted([YES, NO])


def test_a_difference_within_the_noise_of_seeds_is_no_answer(with_study: Callable[..., RunResults]) -> None:
    noisy = verdict_rows(with_study(deviation=0.4))
    for metric in ("top1", "mean_iou", "abs_rel", "epe", "val_loss"):
        assert noisy[escape(METRIC_LABELS[metric])][0].startswith(NOISE)


def test_a_mean_loss_that_rises_at_one_step_of_size_is_not_better_with_size(run: RunResults, pocket: dict) -> None:
    loss = run.fresh_seed_study.numbers["small", "pretrain", "val_loss"].mean
    edit(FOLDER / "table.csv", f"small,pretrain,val_loss,3,{loss}", f"small,pretrain,val_loss,3,{loss * 2}")
    table = verdict_rows(read_run_results(pocket))
    cells = table["validation loss of pretraining ↓"]
    assert cells[0].startswith(NO) and "Spearman" in cells[0] and "noise" in cells[0]
    assert table["squared error of hidden pixels ↓"][0].startswith(YES)


def test_the_noise_of_a_loss_is_of_the_points_that_differ_in_size_alone(run: RunResults) -> None:
    tasks = {point: loss_task(run.summaries[point]["method"]) for point in run.trained}
    measured = {point: run.fresh_seed_study.of(point, task, "val_loss") for point, task in tasks.items()}
    for point in measured.keys() - {*run.ladder}:
        noisy = {seed: value * (1 + seed) for seed, value in measured[point].values.items()}
        measured[point] = run.fresh_seed_study.numbers[point, tasks[point], "val_loss"] = replace(measured[point], values=noisy)
    ends = measured["nano"], measured["mini"]
    noise, of_all = (noise_of_seeds(some, *ends) for some in ([measured[point] for point in run.ladder], [*measured.values()]))
    assert noise != pytest.approx(of_all)
    smallest, largest = measured["nano"].mean, measured["mini"].mean
    shown = verdict_rows(run)["validation loss of pretraining ↓"][0]
    assert shown.startswith(f"{YES} {largest / smallest - 1:+.1%} noise {noise / smallest:.1%} Spearman")


def test_every_number_of_the_verdict_stands_in_its_source(run: RunResults) -> None:
    page = Page(Path("out"))
    rows = measure_rows(run, page)
    text = conclusion(run, page, rows) + verdict(run, page, rows) + rules(run, page)
    page.write_json(Path())
    shown = re.sub(r'<span class="number".*?</span>|<[^>]+>|95 %|top-1', "", unescape(text))
    assert not re.search(r"\d", shown), shown
    references = [(number["source"], number["key"], number["value"]) for number in page.numbers]
    assert any(source.endswith("table.csv") for source, _, _ in references)
    for source, key, value in references:
        path = Path(source.removeprefix("out/"))
        assert _value_at(source, path.read_text(), key) in (value, str(value))
    for entry in page.derived.values():
        assert entry["from"]
        for source, key in entry["from"]:
            _value_at(source, Path(source).read_text(), key)


def test_the_headline_shows_means_and_this_run(run: RunResults) -> None:
    svg = figures.headline(run)
    for words in (
        "frozen, mean of 3 seeds, standard deviation",
        "seed 0, this run",
        "untrained mini",
        "raw pixels",
        "trivial answer",
    ):
        assert f">{words}</text>" in svg
    assert svg == figures.headline(run)
    caption = layout.figure(run, "headline")
    assert "means and standard deviations over seeds, this run&#x27;s values as crosses" in caption


def readme_results(settings: dict, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[list[str]]]:
    """The sentences and the cells of the rows that README should have."""
    write_tables(settings)
    (BUILT / "reconstruct.csv").write_text(tables.reconstruct_csv(read_run_results(settings)))
    monkeypatch.setattr(published_numbers, "ROOT", Path.cwd())
    sentences, *lines = published_numbers._results()
    return sentences, [[cell.strip() for cell in row.strip("|").split("|")] for row in lines]


def test_the_readmes_table_has_means_of_the_runs_study(run: RunResults, pocket: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences, (head, *table) = readme_results(pocket, monkeypatch)
    assert sentences.startswith("Results of the pocket: means ± standard deviations over 3 seeds. ")
    assert "exceeds the noise" in sentences and "one run" not in sentences and "earlier" not in sentences
    assert head[0] == "" and [row[0].split(",")[0].rstrip(" ↓") for row in table] == [
        *("validation loss", "squared error of hidden pixels that move", "actions", "boxes", "depth", "points", "camera motion")
    ]
    pose, mini = table[-1], run.fresh_seed_study.of("mini", "pose", "epe")
    assert pose[3] == f"{mini.mean:.3f}±{mini.deviation:.3f}" and pose[6] == "1.300" and pose[7] == YES
    assert verdict_rows(run)[escape(METRIC_LABELS["epe"])][0].startswith(pose[8])


def test_the_table_of_the_readme_has_the_one_run_where_the_study_is_stale(
    with_study: Callable[..., RunResults], pocket: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_study(seeds_=(0,))
    sentences, (_, *table) = readme_results(pocket, monkeypatch)
    assert sentences.startswith("Results of the pocket: one run, one seed. ") and "do not overlap" in sentences
    assert len(table) == 7 and table[-1][3] == f"{run.result('mini', 'pose', 'frozen').value:.3f}"
    assert "±" not in str(table) and "earlier" not in sentences
    pocket["points"]["nano"]["model"]["SimpleMAE"]["width"] += 8
    config.PARAMS.write_text(yaml.safe_dump(pocket))
    assert published_numbers.EARLIER in next(published_numbers._results())
