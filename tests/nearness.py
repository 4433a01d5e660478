"""Comparison of results: of the same sums in another order, by another kernel or CPU; and of folders, to the byte."""

from pathlib import Path

from numpy import ndarray
from torch import Tensor


def near(one: Tensor | ndarray, other: Tensor | ndarray, share: float = 1e-5) -> bool:
    """Whether no value differs by more than a share of the largest: a sum's error grows with the size of its terms."""
    return one.shape == other.shape and bool(abs(one - other).max() <= share * abs(other).max())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
