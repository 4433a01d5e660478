"""The joint law of size and data, L(N, D) = E + A (N / n)^-alpha + B (D / d)^-beta; its intervals and its optimum.

N: encoder parameters. D: clips seen. n, d: geometric means of the fitted runs'. Source: Hoffmann et al.,
arXiv:2203.15556, approach 3. Ours: the intervals, and training FLOPs that are counted for every run instead of 6 N D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import OptimizeResult, least_squares, nnls

from scaling4d import seeds
from scaling4d.studies.fits import WIDEST, bootstrap_errors

HUBER = 1e-3  # of log losses; arXiv:2203.15556
LIMITS = (1e-2, 4.0)  # smallest and largest exponent
STARTS = (0.2, 0.6, 1.5)  # first exponents of a search; ours
DRAWS = 500
RUN_DRAWS, RUN_START = 100, 0.6  # of runs with replacement; first exponents of their second search
QUANTILES = (0.05, 0.95)
NAMES = ("floor", "size_scale", "size_exponent", "data_scale", "data_exponent")
MIN_RUNS = 8  # for five numbers; ours
SIZES = 512  # that are tried for an optimum
SLACK = 0.01  # relative, of FLOPs that count as a fitted budget: runs of one differ, since steps are integers


@dataclass(frozen=True)
class LossLaw:
    """A fitted law. values: in the order of NAMES. draws: `draws 5`, of a parametric bootstrap, see `bootstrap_errors`.

    errors: `draws`, of a new run's log loss. parameters, clips, flops, losses: of the fitted runs, `runs`.
    """

    values: np.ndarray
    draws: np.ndarray
    errors: np.ndarray
    parameters: np.ndarray
    clips: np.ndarray
    flops: np.ndarray
    losses: np.ndarray

    def loss(self, parameters: np.ndarray, clips: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """values: of a draw; default: the fit's."""
        n, d = parameters / _middle(self.parameters), clips / _middle(self.clips)
        return np.exp(_log_loss(self.values if values is None else values, n, d))

    def prediction(self, parameters: float, clips: float) -> tuple[float, float, float]:
        """The loss of a new run, and its 90 % interval: of the law, and of a run's own deviation."""
        size, seen = np.array([parameters]), np.array([clips])
        curves = np.array([self.loss(size, seen, draw)[0] for draw in self.draws])
        return (float(self.loss(size, seen)[0]), *np.quantile(curves * np.exp(self.errors), QUANTILES).tolist())

    def interval(self, name: str) -> tuple[float, float, float]:
        """A number of NAMES, and its 90 % interval."""
        column = NAMES.index(name)
        return (float(self.values[column]), *np.quantile(self.draws[:, column], QUANTILES).tolist())

    @cached_property
    def draws_of_runs(self) -> np.ndarray:
        """`RUN_DRAWS 5`: fits to as many runs, drawn from them with replacement. Equal in every call.

        Draws with fewer than three sizes or numbers of clips are drawn again.
        """
        rng, fits = seeds.numpy_rng(0, "drawn runs"), []
        while len(fits) < RUN_DRAWS:
            rows = rng.integers(0, len(self.losses), len(self.losses))
            if min(len(set(values[rows])) for values in (self.parameters, self.clips)) >= 3:
                fits.append(self.fit_to(rows))
        return np.array(fits)

    def fit_to(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of a fit to some of the runs, with n and d of all."""
        n, d = ((values / _middle(values))[rows] for values in (self.parameters, self.clips))
        return _values(_best(n, d, self.losses[rows], (RUN_START,), (_searched(self.values),)))

    def interval_of_runs(self, name: str) -> tuple[float, float]:
        """The 90 % interval of a number of NAMES by `draws_of_runs`."""
        return tuple(np.quantile(self.draws_of_runs[:, NAMES.index(name)], QUANTILES).tolist())

    def identified(self, name: str) -> bool:
        """Whether both intervals fix the floor or an exponent: to a factor of WIDEST, an exponent within LIMITS."""
        intervals = (self.interval(name)[1:], self.interval_of_runs(name))
        narrow = all(high <= WIDEST * low for low, high in intervals)
        return narrow and (name == "floor" or all(1.01 * LIMITS[0] < low and high < 0.99 * LIMITS[1] for low, high in intervals))

    def inside(self, parameters: float, clips: float) -> bool:
        """Whether a size, a number of clips and their training FLOPs lie within those of the fitted runs."""
        flops = clips * float(self.flops_per_clip(np.array([parameters]))[0])
        ranges = ((parameters, self.parameters), (clips, self.clips), (flops, self.flops))
        return all(fitted.min() * (1 - SLACK) <= value <= fitted.max() * (1 + SLACK) for value, fitted in ranges)

    def flops_per_clip(self, parameters: np.ndarray) -> np.ndarray:
        """Between the fitted sizes: interpolated in the logarithms of both; beyond them: along the last pieces."""
        sizes, first = np.unique(self.parameters, return_index=True)
        x, y, at = np.log(sizes), np.log((self.flops / self.clips)[first]), np.log(parameters)
        piece = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
        slope = (y[piece + 1] - y[piece]) / (x[piece + 1] - x[piece])
        return np.exp(y[piece] + slope * (at - x[piece]))

    @property
    def sizes(self) -> np.ndarray:
        """Those that are tried for an optimum."""
        return np.geomspace(self.parameters.min() / 4, self.parameters.max() * 4, SIZES)

    def optimum(self, flops: np.ndarray, values: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The size with the lowest loss for every budget, within a quarter to four times the fitted ones; its loss.

        flops: `budgets`, of a whole training. values: of a draw; default: the fit's.
        """
        sizes = self.sizes
        losses = self.loss(sizes, np.asarray(flops, dtype=float)[:, None] / self.flops_per_clip(sizes), values)
        best = losses.argmin(1)
        return sizes[best], losses[np.arange(len(best)), best]

    def optimum_interval(self, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """90 % interval of the size of `optimum`."""
        return tuple(np.quantile([self.optimum(flops, draw)[0] for draw in self.draws], QUANTILES, axis=0))


def fit_loss_law(
    parameters: Sequence[float], clips: Sequence[float], flops: Sequence[float], losses: Sequence[float], *, draws: int = DRAWS
) -> LossLaw | None:
    """Fit the law to runs by a Huber loss in log space, and again to `draws` samples of a parametric bootstrap.

    Args:
        parameters, clips, flops, losses: of each run. Runs of several seeds count one by one.
    Returns:
        None with fewer than MIN_RUNS runs, or fewer than three sizes or numbers of clips.
    """
    size, seen, work, loss = (np.asarray(values, dtype=float) for values in (parameters, clips, flops, losses))
    if len(loss) < MIN_RUNS or min(len(np.unique(size)), len(np.unique(seen))) < 3:
        return None
    n, d, y = size / _middle(size), seen / _middle(seen), np.log(loss)
    best = _best(n, d, loss, STARTS)
    curve = _log_loss(_values(best), n, d)
    *errors, of_a_new_run = bootstrap_errors(y - curve, len(NAMES), draws).T
    fits = [_values(_search(n, d, curve + drawn, best).x) for drawn in np.transpose(errors)]
    return LossLaw(_values(best), np.array(fits), of_a_new_run, size, seen, work, loss)


def _best(
    n: np.ndarray, d: np.ndarray, losses: np.ndarray, exponents: Sequence[float], starts: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """The best of the searches from every pair of exponents, and from more starts."""
    starts = [*starts, *(_start(n, d, losses, alpha, beta) for alpha in exponents for beta in exponents)]
    return min((_search(n, d, np.log(losses), start) for start in starts), key=lambda search: search.cost).x


def _search(n: np.ndarray, d: np.ndarray, log_losses: np.ndarray, start: np.ndarray) -> OptimizeResult:
    """Least Huber loss from a start on: logarithms of floor and scales, and exponents, in the order of NAMES."""
    low, high = (np.array([-np.inf, -np.inf, limit, -np.inf, limit]) for limit in LIMITS)
    high[[0, 1, 3]] = np.inf

    def errors(x: np.ndarray) -> np.ndarray:
        return _log_loss(_values(x), n, d) - log_losses

    def slopes(x: np.ndarray) -> np.ndarray:
        floor, size, alpha, data, beta = _values(x)
        of_size, of_data = size * n**-alpha, data * d**-beta
        rows = [np.full_like(n, floor), of_size, -of_size * np.log(n), of_data, -of_data * np.log(d)]
        return np.stack(rows, 1) / (floor + of_size + of_data)[:, None]

    return least_squares(errors, np.clip(start, low + 1e-6, high - 1e-6), slopes, (low, high), loss="huber", f_scale=HUBER)


def _start(n: np.ndarray, d: np.ndarray, losses: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Floor and scales, none below 0, nearest to the losses with these exponents."""
    basis = np.stack([np.ones_like(n), n**-alpha, d**-beta], 1) / losses[:, None]
    floor, size, data = np.log(np.maximum(nnls(basis, np.ones_like(n))[0], 1e-4 * losses.min()))
    return np.array([floor, size, alpha, data, beta])


def _searched(values: np.ndarray) -> np.ndarray:
    """The inverse of `_values`."""
    floor, size, alpha, data, beta = values
    return np.array([*np.log(np.maximum([floor, size], 1e-12)), alpha, np.log(max(data, 1e-12)), beta])


def _values(x: np.ndarray) -> np.ndarray:
    return np.array([np.exp(x[0]), np.exp(x[1]), x[2], np.exp(x[3]), x[4]])


def _log_loss(values: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    floor, size, alpha, data, beta = values
    return np.log(floor + size * n**-alpha + data * d**-beta)


def _middle(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))
