"""The verdict at the top of the page, and the strips of filled-in clips."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_run import OTHERS, conclusion_text, verdict_rows, verdict_text

from scaling4d import video
from scaling4d.report.page import Page
from scaling4d.report.pictures import draw_strips
from scaling4d.report.run_results import RunResults, read_run_results
from scaling4d.report.verdict import NO, NOISE, TRIVIAL, YES, better, beyond, falls_beyond_noise, rules, trivial_answer


@pytest.fixture
def run(pocket: dict) -> RunResults:
    return read_run_results(pocket)


def changed(run: RunResults, task: str, **values: tuple[float, float, float]) -> RunResults:
    """The run with other numbers of frozen readouts: by encoder, value and interval."""
    names, results = ("value", "low", "high"), []
    for r in run.results:
        numbers = values.get(r.encoder) if (r.task, r.protocol) == (task, "frozen") else None
        results.append(replace(r, **dict(zip(names, numbers, strict=True))) if numbers else r)
    return replace(run, results=tuple(results))


def test_a_result_is_better_where_its_interval_is_apart_on_the_better_side(run: RunResults) -> None:
    low = replace(run.result("nano", "pose", "frozen"), value=1.0, low=0.9, high=1.1)  # an error: less is better
    high = replace(low, value=2.0, low=1.9, high=2.1)
    assert (better(low, high), better(high, low), better(low, low)) == (YES, NO, NOISE)
    share = {"higher_is_better": True}
    assert better(replace(high, **share), replace(low, **share)) == YES


def test_the_trivial_answer_is_compared_as_if_its_interval_were_as_wide_as_the_results(run: RunResults) -> None:
    r = replace(run.result("nano", "pose", "frozen"), value=1.0, low=0.9, high=1.1)
    assert (beyond(r, 1.5), beyond(r, 0.5), beyond(r, 1.15), beyond(r, 0.85)) == (YES, NO, NOISE, NOISE)
    text = verdict_text(run)
    assert text.index("as wide as that of the largest point") < text.index("<table>")


def test_the_answer_stands_beside_the_measure(run: RunResults) -> None:
    heads = re.findall("<th>(.*?)</th>", verdict_text(run))
    assert heads[:4] == ["measure", "better with size", "nano, smallest", "mini, largest"]


def test_the_conclusion_names_every_measure_by_its_answer(run: RunResults) -> None:
    run = changed(changed(run, "pose", mini=(0.5, 0.4, 0.6)), "depth", mini=(0.5, 0.4, 0.6))
    text = conclusion_text(run)
    assert "camera" in re.search(r"^<p>Better with size \(from .*? parameters\): (.*?)\. ", text)[1]
    assert "Not better with size: relative error of depth, AbsRel. " in text
    assert all(name.rsplit(" ", 1)[0] in text for name in verdict_rows(run))


def test_the_conclusion_names_what_does_not_work(run: RunResults) -> None:
    small = {"mini": (0.5, 0.4, 0.6), "untrained_mini": (0.55, 0.45, 0.65)}
    run = changed(run, "pose", **small, pixels=(0.9, 0.8, 1.0), nano=(0.9, 0.8, 1.0))
    text = conclusion_text(run)
    assert re.search(r"mini, the largest, is better than untrained mini, raw pixels, .*pose \(untrained mini[,)]", text)
    assert re.search(r"nano is worse than untrained mini at [^.]*pose", text)


def test_the_page_says_of_every_measure_whether_size_and_training_help(run: RunResults) -> None:
    small = {"mini": (0.5, 0.4, 0.6), "untrained_mini": (0.55, 0.45, 0.65)}
    run = changed(run, "pose", **small, nano=(0.9, 0.8, 1.0), pixels=(0.3, 0.2, 0.35))
    table = verdict_rows(run)
    assert len(table) == 3 + len(run.tasks)
    (pose,) = (cells for name, cells in table.items() if "camera" in name)
    assert pose[0].startswith(YES) and pose[3].startswith(NOISE) and pose[4].startswith(NO)
    loss = table["validation loss of pretraining ↓"]
    losses = [run.summaries[point]["val_loss"] for point in run.ladder]
    assert losses == sorted(set(losses), reverse=True)
    assert loss[0] == f"{YES} {losses[-1] / losses[0] - 1:+.1%} Spearman -1.00"


def test_means_of_a_loss_have_to_fall_at_every_step_and_in_all_beyond_the_noise() -> None:
    assert falls_beyond_noise([3.0, 2.0, 1.0], 1.9) == YES
    assert falls_beyond_noise([3.0, 2.0, 1.0], 2.0) == falls_beyond_noise([3.0, 2.0, 1.0], None) == NOISE
    assert falls_beyond_noise([3.0, 1.0, 4.0], 1.0) == NOISE
    assert falls_beyond_noise([3.0, 3.5, 1.0], 1.0) == falls_beyond_noise([1.0, 2.0, 3.0], 1.0) == NO


def test_a_loss_that_rises_at_one_step_of_size_is_not_better_with_size(run: RunResults) -> None:
    summaries = {name: dict(summary) for name, summary in run.summaries.items()}
    summaries["tiny"]["val_loss"] = summaries["nano"]["val_loss"] + 1
    assert verdict_rows(replace(run, summaries=summaries))["validation loss of pretraining ↓"][0].startswith(NO)


def test_every_task_has_a_trivial_answer_where_it_was_measured(run: RunResults) -> None:
    trivial = {task: OTHERS[task][metric] for task, metric in TRIVIAL.items()}
    assert trivial.keys() == {*run.tasks}
    shown = [cells[-1] for cells in verdict_rows(run).values()][-len(run.tasks) :]
    assert [float(cell.split()[-1]) for cell in shown] == [trivial[task] for task in run.tasks]
    assert trivial_answer(run, replace(run.result("mini", "depth", "frozen"), others={})) is None


def test_one_size_alone_has_no_verdict(run: RunResults) -> None:
    run, page = replace(run, points=("nano",), students=()), Page(Path("out"))
    assert "nothing can be said" in conclusion_text(run) and verdict_text(run) == rules(run, page) == ""


def test_strips_and_video_show_every_row_and_the_difference_of_the_ends(tmp_path: Path) -> None:
    pictures = {}
    for name, level in (("nano", 100), ("mini", 110)):
        picture = np.full((2 * 3 * 16, 4 * 16, 3), 50, np.uint8)
        picture[2 * 16 : 3 * 16] = level  # filled in, of the first clip
        pictures[name] = tmp_path / f"{name}.png"
        Image.fromarray(picture).save(pictures[name])
    out = tmp_path / "out"
    out.mkdir()
    draw_strips(pictures, 16, ["nano", "mini"], out)
    strips = {path.stem: np.asarray(Image.open(path)) for path in out.glob("*.png")}
    assert strips.keys() == {f"clip_{n}_{row}" for n in (0, 1) for row in ("input", "masked", "nano", "mini", "difference")}
    assert {strip.shape for strip in strips.values()} == {(16, 64, 3)}
    assert (strips["clip_0_difference"] == 30).all() and not strips["clip_1_difference"].any()
    _, frames = video.decode_all(out / "clip_0.webm")
    assert frames.shape == (4, 32, 5 * 32, 3)
    assert abs(int(frames[0, 16, 2 * 32 + 16, 0]) - 100) < 6 and abs(int(frames[0, 16, 3 * 32 + 16, 0]) - 110) < 6
