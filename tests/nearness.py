"""Comparison of results of the same sums in another order, by another kernel or on another kind of CPU."""

from numpy import ndarray
from torch import Tensor


def near(one: Tensor | ndarray, other: Tensor | ndarray, share: float = 1e-5) -> bool:
    """Whether no value differs by more than a share of the largest: a sum's error grows with the size of its terms."""
    return one.shape == other.shape and bool(abs(one - other).max() <= share * abs(other).max())
