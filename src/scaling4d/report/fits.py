"""Trends over size: Spearman's correlation and the power law L = E + A * N^-alpha."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + scale * (x / unit)^-exponent; unit: the geometric mean of the x that it was fitted to."""

    floor: float
    scale: float
    exponent: float
    unit: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.floor + self.scale * (np.asarray(x, dtype=float) / self.unit) ** -self.exponent


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Least squares fit with floor, scale and exponent >= 0; None with fewer than four points or where nothing converges.

    A fit that ends at the largest exponent allowed (4), or whose curve is flat, tells nothing and counts as none.
    """
    from scipy.optimize import curve_fit

    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(set(x.tolist())) < 4:
        return None
    unit, size = float(np.exp(np.log(x).mean())), float(np.abs(y).max())
    try:
        found, _ = curve_fit(
            lambda n, floor, scale, exponent: floor + scale * n**-exponent,
            x / unit,
            y / size,
            p0=(0.9 * y.min() / size, max(np.ptp(y) / size, 1e-6), 0.3),
            bounds=((0, 0, 0), (np.inf, np.inf, 4)),
            maxfev=10_000,
        )
    except RuntimeError:  # scipy: no convergence
        return None
    floor, scale, exponent = map(float, found)
    if not 1e-4 < exponent < 3.99 or scale < 1e-9:
        return None
    return PowerLaw(floor * size, scale * size, exponent, unit)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None with fewer than three points or where all values are equal."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    a, b = _ranks(x), _ranks(y)
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]
