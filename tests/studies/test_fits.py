import numpy as np
import pytest
from scipy.optimize import curve_fit

from scaling4d import seeds
from scaling4d.studies import fits

SIZES = np.geomspace(2e5, 8e6, 6)


def law(x: np.ndarray) -> np.ndarray:
    return 0.014 + 0.002 * (x / 1e6) ** -0.35


def noisy(name: object, level: float) -> np.ndarray:
    return law(SIZES) + level * seeds.numpy_rng(0, "noise", name).standard_normal(len(SIZES))


def test_no_other_curve_lies_nearer_to_noisy_points() -> None:
    y = noisy("fit", 1e-4)
    fit = fits.trend(SIZES, y)
    best, _ = curve_fit(lambda n, floor, scale, power: floor + scale * n**-power, SIZES / fit.unit, y, p0=(0.01, 0.002, 0.3))
    assert (fit.floor, fit.scale, fit.exponent) == pytest.approx(tuple(best), rel=1e-3)


@pytest.mark.parametrize("y", [[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.5]])
def test_flat_rising_and_too_few_values_give_no_power_law(y: list[float]) -> None:
    assert fits.trend([1e5, 1e6, 1e7, 1e8][: len(y)], y) is None


@pytest.mark.integration
def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    trends = [fits.trend(SIZES, noisy(draw, 2e-5)) for draw in range(40)]
    for name, truth in (("floor", 0.014), ("exponent", 0.35)):
        held = sum(low <= truth <= high for low, high in (one.interval(name) for one in trends))
        assert held >= 34, name  # of 40; 95 % would be 38, six points make it less sure


def test_intervals_grow_with_the_scatter_and_are_the_same_twice() -> None:
    calm, wild = (fits.trend(SIZES, noisy("grow", level)) for level in (1e-5, 1e-4))
    assert np.ptp(wild.interval("exponent")) > 3 * np.ptp(calm.interval("exponent"))
    low, high = wild.band(SIZES)
    assert (low < wild(SIZES)).all() and (wild(SIZES) < high).all()
    assert fits.trend(SIZES, noisy("grow", 1e-4)).interval("exponent") == wild.interval("exponent")


def test_the_largest_point_is_predicted_without_being_seen() -> None:
    y = noisy("held out", 1e-5)
    tested = fits.held_out(SIZES, y)
    assert tested.inside and tested.predicted == pytest.approx(law(SIZES[-1]), rel=0.02)
    moved = y.copy()
    moved[-1] += 0.002
    again = fits.held_out(SIZES[::-1], moved[::-1])
    assert not again.inside and again.measured == moved[-1]
    assert again.predicted == pytest.approx(tested.predicted, rel=1e-4)
    assert fits.held_out(SIZES[:4], y[:4]) is None  # three points do not give three numbers


def test_rank_correlation_takes_ties_at_their_mean_rank_and_needs_three_points_that_differ() -> None:
    x, y = [1, 2, 2, 5, 9], [3.0, 2.5, 2.5, 1.0, 2.0]
    ranks = np.corrcoef([1, 2.5, 2.5, 4, 5], [5, 3.5, 3.5, 1, 2])[0, 1]
    assert fits.spearman(x, y) == pytest.approx(ranks, abs=1e-12)
    assert fits.spearman([1, 2], [1, 2]) is None and fits.spearman([1, 2, 3], [4, 4, 4]) is None


def test_a_straight_line_predicts_the_points_that_lie_on_it_and_misses_a_bent_one() -> None:
    assert fits.left_out_error([1.0, 2.0, 4.0, 7.0], [3.0, 5.0, 9.0, 15.0]) == pytest.approx(0, abs=1e-12)
    assert fits.left_out_error([0.0, 1.0, 2.0], [0.0, 1.0, 0.0]) == pytest.approx(np.sqrt((4 + 1 + 4) / 3))
