"""Average precision, as scikit-learn defines it."""

from __future__ import annotations

import numpy as np


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Sum over thresholds of precision times the rise in recall, 0..1. Equal scores share a threshold.

    Args:
        scores: `N`, of any scale. labels: bool `N`, at least one true.
    Source: scikit-learn's average_precision_score, which scivid calls. No interpolation.
    """
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(labels[order])
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each threshold's clips
    hits = hits[last]
    return float((hits / (last + 1) * np.diff(hits, prepend=0)).sum() / hits[-1])


def class_average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """scores `N C`, labels bool `N C` -> float64 `C`."""
    return np.array([average_precision(*column) for column in zip(scores.T, labels.T, strict=True)])
