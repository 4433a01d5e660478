"""Trends over size: Spearman's correlation, and the power law L = E + A * N^-alpha with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling4d import seeds

EXPONENTS = (1e-2, 4.0)  # smallest and largest that are tried
GRID, ROUNDS = 32, 5  # exponents tried at a time; every round searches between the neighbours of the best one
DRAWS = 1000
NUMBERS = 3  # of a law over one size: floor, scale, exponent
QUANTILES = (0.025, 0.975)
WIDEST = 4.0  # high over low of the interval of a number that counts as identified; ours


@dataclass(frozen=True)
class Trend:
    """y = floor + scale * (x / unit)^-exponent. unit: geometric mean of the fitted x. floor: the irreducible term.

    draws: `draws 3` of a parametric bootstrap: floor, scale, exponent.
    """

    floor: float
    scale: float
    exponent: float
    unit: float
    draws: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.floor + self.scale * (np.asarray(x, dtype=float) / self.unit) ** -self.exponent

    def interval(self, name: str) -> tuple[float, float]:
        """95 % interval of `floor`, `scale` or `exponent`."""
        return tuple(np.quantile(self.draws[:, ("floor", "scale", "exponent").index(name)], QUANTILES).tolist())

    @property
    def identified(self) -> bool:
        """Whether the interval fixes the exponent: to a factor of WIDEST, and not at an end of EXPONENTS."""
        low, high = self.interval("exponent")
        return 1.1 * EXPONENTS[0] < low and high < 0.99 * EXPONENTS[1] and high <= WIDEST * low

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Low and high of the curve at every x, pointwise 95 %."""
        n = np.asarray(x, dtype=float) / self.unit
        floor, scale, exponent = (column[:, None] for column in self.draws.T)
        return tuple(np.quantile(floor + scale * n**-exponent, QUANTILES, axis=0))


@dataclass(frozen=True)
class HeldOut:
    """The largest size, and its value predicted by the law of the smaller ones; low .. high: 95 %."""

    x: float
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high


def trend(x: Sequence[float], y: Sequence[float]) -> Trend | None:
    """Least squares fit with floor, scale and exponent >= 0, and its parametric bootstrap, see `bootstrap_errors`.

    A draw that ends at a limit stays in, so that an interval is wide where the points do not fix a number.

    Returns:
        None with fewer than four sizes, for a flat curve, and for a fit that ends at the smallest or largest exponent.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(set(x.tolist())) < 4:
        return None
    unit = float(np.exp(np.log(x).mean()))
    floor, scale, exponent = _fit(x / unit, y[None])[0].tolist()
    if not 1.1 * EXPONENTS[0] < exponent < 0.99 * EXPONENTS[1] or scale < 1e-9 * float(np.abs(y).max()):
        return None
    curve = floor + scale * (x / unit) ** -exponent
    return Trend(floor, scale, exponent, unit, _fit(x / unit, curve + bootstrap_errors(y - curve, NUMBERS)[:, :-1]))


def held_out(x: Sequence[float], y: Sequence[float]) -> HeldOut | None:
    """Fit without the largest size and predict the mean of its values. None where the smaller sizes give no law."""
    order = np.argsort(x, kind="stable")
    x, y = np.asarray(x, dtype=float)[order], np.asarray(y, dtype=float)[order]
    left = int((x < x[-1]).sum())
    smaller = trend(x[:left], y[:left])
    if smaller is None:
        return None
    floor, scale, exponent = smaller.draws.T
    curves = floor + scale * (x[-1] / smaller.unit) ** -exponent
    noise = bootstrap_errors(y[:left] - smaller(x[:left]), NUMBERS)[:, -1] / np.sqrt(len(x) - left)
    low, high = np.quantile(curves + noise, QUANTILES).tolist()
    return HeldOut(float(x[-1]), float(y[left:].mean()), float(smaller(x[-1])), low, high)


def left_out_error(x: Sequence[float], y: Sequence[float]) -> float:
    """Root mean square over the points of the error of a straight line through the others. At least three points."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    errors = []
    for left in range(len(x)):
        others = np.arange(len(x)) != left
        _, height = np.polyfit(x[others] - x[left], y[others], 1)
        errors.append(height - y[left])
    return float(np.sqrt(np.mean(np.square(errors))))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank. None with fewer than three points, or where all values are equal."""
    from scipy.stats import spearmanr

    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(spearmanr(x, y).statistic)


def _fit(n: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rows of y `draws points` -> `draws 3`: floor, scale, exponent. Floor and scale have a closed form."""
    low, high = (np.full(len(y), limit) for limit in EXPONENTS)
    rows = np.arange(len(y))
    for _ in range(ROUNDS):
        exponents = np.geomspace(low, high, GRID, axis=1)
        floor, scale, error = _linear(n ** -exponents[..., None], y[:, None])
        best = error.argmin(1)
        low, high = (exponents[rows, at] for at in (np.maximum(best - 1, 0), np.minimum(best + 1, GRID - 1)))
    return np.stack([floor[rows, best], scale[rows, best], exponents[rows, best]], axis=1)


def _linear(basis: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Floor and scale >= 0 nearest to y = floor + scale * basis over the last axis, and the sum of squared errors."""
    middle, centre = basis.mean(-1), y.mean(-1)
    variance = ((basis - middle[..., None]) ** 2).sum(-1)
    scale = ((basis - middle[..., None]) * y).sum(-1) / np.maximum(variance, 1e-300)
    floor = centre - scale * middle
    through_zero = (basis * y).sum(-1) / (basis**2).sum(-1)
    scale = np.maximum(np.where(floor < 0, through_zero, scale), 0.0)
    floor = np.where(floor < 0, 0.0, np.where(scale == 0, centre, floor))
    return floor, scale, ((floor[..., None] + scale[..., None] * basis - y) ** 2).sum(-1)


def bootstrap_errors(errors: np.ndarray, numbers: int, draws: int = DRAWS) -> np.ndarray:
    """`draws points+1`: normal errors of a parametric bootstrap, for the points and one more. Equal in every call.

    Their deviation is that of the errors, with so many numbers fitted. It is drawn anew for every draw, as in Student's
    t, because so few points do not fix it. In simulations the 95 % intervals held the truth in 91 to 97 % of the cases.
    """
    rng = seeds.numpy_rng(0, "scatter")
    deviation = np.sqrt((errors**2).sum() / rng.chisquare(len(errors) - numbers, (draws, 1)))
    return deviation * rng.standard_normal((draws, len(errors) + 1))
