"""The joint law of size and data is recovered from synthetic runs, with honest intervals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import invoke, refused_command

from scaling4d import seeds
from scaling4d.provenance import to_csv
from scaling4d.studies import law
from scaling4d.studies.loss_law import NAMES, LossLaw, fit_loss_law
from scaling4d.studies.study import RUN_COLUMNS

SIZES = np.array([24_400, 73_376, 146_928, 245_056, 738_720.0])
FLOPS_PER_CLIP = np.array([2.88e7, 7.37e7, 1.35e8, 2.12e8, 5.3e8])
BUDGETS = np.array([1e12, 2e12, 4e12, 8e12])
FLOPS, N = (grid.ravel() for grid in np.meshgrid(BUDGETS, SIZES, indexing="ij"))
D = FLOPS / np.tile(FLOPS_PER_CLIP, len(BUDGETS))
TRUTH = (0.045, 0.006, 0.45, 0.008, 0.5)


def true_loss(parameters: np.ndarray, clips: np.ndarray) -> np.ndarray:
    floor, size, alpha, data, beta = TRUTH
    n, d = parameters / np.exp(np.log(N).mean()), clips / np.exp(np.log(D).mean())
    return floor + size * n**-alpha + data * d**-beta


def noisy_law(name: object, level: float, draws: int) -> LossLaw:
    noise = level * seeds.numpy_rng(0, "noise", name).standard_normal(len(N))
    return fit_loss_law(N, D, FLOPS, true_loss(N, D) * np.exp(noise), draws=draws)


def test_the_fit_recovers_the_five_numbers_of_a_law() -> None:
    fitted = noisy_law("none", 1e-7, 5)
    assert fitted.values == pytest.approx(TRUTH, rel=1e-2)
    assert fitted.loss(SIZES, SIZES) == pytest.approx(true_loss(SIZES, SIZES), rel=1e-3)


def test_the_best_size_of_a_budget_is_that_of_the_true_law() -> None:
    fitted = noisy_law("none", 1e-7, 5)
    grid = np.geomspace(SIZES[0], SIZES[-1], 400)
    clips = 3e12 / fitted.flops_per_clip(grid)
    (size,), (loss,) = fitted.optimum(np.array([3e12]))
    assert size == pytest.approx(grid[true_loss(grid, clips).argmin()], rel=0.05)
    assert loss == pytest.approx(true_loss(grid, clips).min(), rel=1e-3)


def test_flops_of_a_clip_are_those_of_the_runs_and_follow_their_trend_beyond_them() -> None:
    fitted = noisy_law("none", 1e-7, 5)
    assert fitted.flops_per_clip(SIZES) == pytest.approx(FLOPS_PER_CLIP, rel=1e-6)
    slope = np.log(5.3e8 / 2.12e8) / np.log(738_720 / 245_056)
    assert fitted.flops_per_clip(np.array([1e7]))[0] == pytest.approx(5.3e8 * (1e7 / 738_720) ** slope, rel=1e-6)


@pytest.mark.slow
def test_nine_of_ten_intervals_hold_the_truth() -> None:
    held = dict.fromkeys([*NAMES, "new run"], 0)
    for draw in range(100):
        fitted = noisy_law(draw, 0.005, 100)
        for name, truth in zip(NAMES, TRUTH, strict=True):
            _, low, high = fitted.interval(name)
            held[name] += low <= truth <= high
        _, low, high = fitted.prediction(SIZES[-1], 16e12 / FLOPS_PER_CLIP[-1])
        deviation = 0.005 * seeds.numpy_rng(0, "new", draw).standard_normal()
        held["new run"] += low <= true_loss(SIZES[-1], 16e12 / FLOPS_PER_CLIP[-1]) * np.exp(deviation) <= high
    assert all(85 <= count <= 95 for count in held.values()), held


def test_an_exponent_without_a_visible_trend_is_not_identified() -> None:
    flat = fit_loss_law(N, D, FLOPS, 0.05 * np.exp(0.01 * seeds.numpy_rng(0, "flat").standard_normal(len(N))), draws=40)
    assert not flat.identified("size_exponent")
    seen = noisy_law("seen", 0.0005, 40)
    assert seen.identified("size_exponent") and seen.identified("floor")


def test_an_interval_wider_than_a_factor_of_four_identifies_nothing() -> None:
    fitted = noisy_law("wide", 0.01, 100)
    _, low, high = fitted.interval("size_exponent")
    assert low > 0.01 and 4 * low < high < 4 and not fitted.identified("size_exponent")


def test_fits_to_other_draws_of_the_runs_lie_about_the_truth_and_some_runs_can_be_left_out() -> None:
    fitted = noisy_law("runs", 0.002, 5)
    low, high = fitted.interval_of_runs("data_exponent")
    assert low < TRUTH[4] < high and fitted.draws_of_runs is fitted.draws_of_runs
    none, shortest, lowest, highest = law.left_out_rows(fitted)
    assert (none["runs"], shortest["runs"], shortest["left_out"], lowest["runs"]) == (20, 18, "the 2 shortest", 19)
    assert lowest["data_exponent"] < none["data_exponent"] < highest["data_exponent"]
    assert lowest["best_size"] <= none["best_size"] <= highest["best_size"]


def test_a_size_and_clips_are_outside_where_their_flops_are() -> None:
    fitted = noisy_law("none", 1e-7, 5)
    assert fitted.inside(146_928, 50_000) and fitted.inside(SIZES[0], 8e12 / FLOPS_PER_CLIP[0])
    assert not fitted.inside(738_720, 50_000)  # 2.7e13 FLOPs
    assert not fitted.inside(24_400, 10_000)  # 2.9e11
    assert law.law_text(fitted, parameters=None, clips=None, flops=2e13).endswith("; outside the fitted range")


def test_few_runs_or_one_budget_give_no_law() -> None:
    assert fit_loss_law(N[:5], D[:5], FLOPS[:5], true_loss(N[:5], D[:5])) is None
    same = np.full(len(N), 5e4)
    assert fit_loss_law(N, same, FLOPS, true_loss(N, same)) is None


@pytest.mark.integration
@pytest.mark.usefixtures("in_the_project")
def test_the_plan_of_a_point_quotes_the_law_and_says_where_it_is_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, columns = (
        ("parameters", "clips_seen", "flops", "value"),
        zip(N.astype(int), D.astype(int), FLOPS, true_loss(N, D), strict=True),
    )
    runs = [{"arm": "a", "seed": 0, "task": "pretrain", **dict(zip(keys, values, strict=True))} for values in columns]
    (tmp_path / "runs.csv").write_text(to_csv(RUN_COLUMNS, runs))
    monkeypatch.setattr(law, "FITTED", tmp_path)
    monkeypatch.setattr(law, "fit_loss_law", lambda *runs, draws: fit_loss_law(*runs, draws=min(draws, 10)))
    small, large = (invoke("plan", point).output for point in ("tiny", "j"))
    assert "146,928 parameters, 50,000 clips: loss " in small and "outside the fitted range" not in small
    command = small.splitlines()[-1].partition("its interval: scaling4d ")[2]
    assert invoke(*command.split()).output.splitlines()[-1].startswith("146,928 parameters, 50,000 clips: loss ")
    assert "outside the fitted range" in large
    assert json.loads(invoke("plan", "tiny", "--json").output)["law"] in small.splitlines()
    (tmp_path / "runs.csv").write_text("task\npretrain\n")
    without = invoke("plan", "tiny")
    assert without.exit_code == 0 and f"no prediction of the loss: {tmp_path} cannot be read: " in without.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--clips 100", "--clips 100: needed --parameters with --clips or --flops, --flops alone, or none of them"),
        ("--predict desk --parameters 5", "--predict writes the losses of all arms of desk; leave out --parameters 5"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(words: str, message: str) -> None:
    assert refused_command("law", "any", *words.split()) == message
