"""Average precision against hand-worked cases and a slow version that one can read."""

import numpy as np
import pytest

from scaling4d.reproduce.average_precision import average_precision, class_average_precisions


def slow_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Lower the threshold from score to score."""
    total, before, area = labels.sum(), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = scores >= threshold
        recall = (taken & labels).sum() / total
        area += (recall - before) * (taken & labels).sum() / taken.sum()
        before = recall
    return area


def test_a_hand_worked_ranking() -> None:
    """Hits at places 1, 3 and 4 of 5: (1/1 + 2/3 + 3/4) / 3."""
    scores, labels = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([True, False, True, True, False])
    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


def test_equal_scores_share_a_threshold_in_whichever_order_they_come() -> None:
    """One hit of two at the first threshold, then the second hit: 1/2 * 1/2 + 1/2 * 2/3."""
    scores = np.array([0.5, 0.5, 0.1])
    for labels in ([True, False, True], [False, True, True]):
        assert average_precision(scores, np.array(labels)) == pytest.approx(1 / 4 + 1 / 3)
    assert average_precision(np.zeros(4), np.array([True, False, False, False])) == 0.25


def test_scikit_learns_documented_example() -> None:
    """Of its page on average_precision_score: 0.83... for these four, 0.77... for the mean of these three classes."""
    assert average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == pytest.approx(5 / 6)
    labels = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]) > 0
    scores = np.array([[0.7, 0.2, 0.1], [0.4, 0.3, 0.3], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7]])
    assert class_average_precisions(scores, labels).mean() == pytest.approx(7 / 9)


def test_it_is_the_slow_version_with_and_without_ties() -> None:
    rng = np.random.default_rng(0)
    for levels in (5, 10_000):
        scores, labels = rng.integers(0, levels, (300, 7)).astype(np.float32), rng.random((300, 7)) < 0.2
        slow = [slow_average_precision(s, one) for s, one in zip(scores.T, labels.T, strict=True)]
        assert np.allclose(class_average_precisions(scores, labels), slow, atol=1e-12)
