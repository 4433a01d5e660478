"""The figure of linear probes over the number of labelled clips."""

from dataclasses import replace

import pytest

from scaling4d import report
from scaling4d.report import figures
from scaling4d.report.run_results import RunResults

METRICS = {"actions": "top1", "depth": "abs_rel"}


@pytest.fixture
def run(pocket: dict) -> RunResults:
    """With linear probes at two tasks, of all labelled clips, of 300 and of 1000."""
    run, results = report.read_run_results(pocket), []
    for r in run.results:
        worse = -1 if r.higher_is_better else 1
        metric = METRICS.get(r.task)
        probes = {f"{metric}_linear{suffix}": r.value + worse * loss for suffix, loss in (("", 0), ("_1000", 0.1), ("_300", 0.2))}
        results.append(replace(r, others=r.others | probes) if metric and r.protocol == "frozen" else r)
    return replace(run, results=tuple(results))


def test_linear_probes_are_drawn_from_few_to_all_labelled_clips(run: RunResults) -> None:
    svg = figures.label_efficiency(run)
    places = [svg.index(f">{words}</text>") for words in ("300", "1,000", "all")]
    assert places == sorted(places)
    for words in (*run.ladder, "untrained mini", "raw pixels", "actions", "depth"):
        assert f">{words}</text>" in svg
    assert "pose" not in svg and "mae_st" not in svg and svg == figures.label_efficiency(run)


def test_a_profile_without_linear_probes_says_so(pocket: dict) -> None:
    assert "no readout with linear probes" in figures.label_efficiency(report.read_run_results(pocket))
