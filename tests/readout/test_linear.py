"""Linear probes in closed form."""

import nearness
import numpy as np
import pytest
import torch

from scaling4d import seeds
from scaling4d.readout.linear import PENALTIES, LinearProbe, RegressionSums, fit_probes, pooled
from scaling4d.readout.tasks.depth import Depth
from scaling4d.training.distributed import run

P, D, OUT = 3, 6, 2


def samples(count: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, targets, which count; a target is a linear function of features and place."""
    rng = seeds.numpy(0, "linear", count)
    weight, offset = seeds.numpy(0, "truth").normal(size=(D, OUT)), np.arange(P * OUT).reshape(P, OUT)
    x = rng.normal(size=(count, P, D)) * 10.0 ** np.arange(-2, 4)
    y = x / 10.0 ** np.arange(-2, 4) @ weight + offset + noise * rng.normal(size=(count, P, OUT))
    return torch.from_numpy(x).float(), torch.from_numpy(y).float(), torch.ones(count, P, dtype=torch.bool)


def solved(*parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> LinearProbe:
    sums = RegressionSums(P, D, OUT)
    for part in parts:
        sums.add(*part)
    return sums.solve()


def test_a_linear_function_of_features_of_any_scale_is_learned_with_an_offset_for_each_place() -> None:
    probe = solved(samples(200, 0.0))
    x, y, _ = samples(50, 0.0)
    assert nearness.near(probe(x), y, 1e-3)


def test_samples_that_do_not_count_change_nothing_and_parts_add_up() -> None:
    x, y, counts = samples(100, 0.3)
    whole = solved((x, y, counts))
    bad = (torch.full_like(x, torch.nan), torch.full_like(y, torch.nan), torch.zeros_like(counts))
    parts = solved((x[:40], y[:40], counts[:40]), bad, (x[40:], y[40:], counts[40:]))
    assert nearness.near(parts(x), whole(x))


def test_probes_of_growing_parts_are_those_of_each_part_alone_and_the_trivial_answer_is_the_mean() -> None:
    first, second = samples(100, 0.3), samples(60, 0.3)

    def probes(*, rank: int, ranks: int) -> list[torch.Tensor]:
        mean, fitted = fit_probes([[first], [second]])
        return [probe(first[0]) for probe in (mean, *fitted)]

    mean, of_first, of_both = run(probes, ranks=1)
    assert nearness.near(of_first, solved(first)(first[0])) and nearness.near(of_both, solved(first, second)(first[0]))
    assert nearness.near(mean[0], torch.cat([first[1], second[1]]).mean(0)) and torch.equal(mean[0], mean[1])


def test_few_noisy_samples_get_a_larger_penalty_than_many() -> None:
    def length(count: int) -> float:
        x, y, counts = samples(count, 20.0)
        return float((solved((x, y, counts)).weight * 10.0 ** torch.arange(-2, 4)[:, None]).norm())

    exact = float(np.linalg.norm(seeds.numpy(0, "truth").normal(size=(D, OUT))))
    assert length(4) < 2 * exact and length(20000) == pytest.approx(exact, rel=0.3)
    assert PENALTIES[0] < 1e-3 and PENALTIES[-1] > 10


def test_with_fewer_samples_than_features_the_penalty_is_chosen_by_what_it_predicts() -> None:
    """Interpolation of the samples is not taken for a perfect fit."""
    rng = seeds.numpy(0, "wide")
    truth = rng.normal(size=(60, 1)) / np.sqrt(60)
    x = rng.normal(size=(250, 1, 60))
    y = x @ truth + 2.0 * rng.normal(size=(250, 1, 1))
    errors = {}
    for count in (50, 200):
        sums = RegressionSums(1, 60, 1)
        sums.add(torch.from_numpy(x[:count]), torch.from_numpy(y[:count]), torch.ones(count, 1, dtype=torch.bool))
        predicted = sums.solve()(torch.from_numpy(x[200:]).float()).numpy()
        errors[count] = np.square(predicted - x[200:] @ truth).mean()
    assert errors[200] < errors[50] < 2  # without features: 1; with the least penalty: 15


def test_pooled_features_are_means_of_cells_in_the_order_of_channels() -> None:
    features = torch.arange(8 * 16 * 3, dtype=torch.float32).reshape(1, 8, 16, 3)  # t, 4 x 4 places
    cells = features.reshape(4, 2, 2, 2, 2, 2, 3).mean((1, 3, 5))  # t h w D
    assert torch.equal(pooled(features)[0, 0], cells.permute(3, 0, 1, 2).flatten())
    assert pooled(torch.ones(1, 2, 1, 5)).shape == (1, 1, 10)  # fewer cells than the grid


def test_depth_of_a_token_is_that_of_its_own_patch_and_counts_where_all_of_it_is_valid() -> None:
    task = Depth(rate_hz=4.0, views=("plain",))
    depth, valid = torch.arange(4 * 8 * 8.0).reshape(1, 4, 8, 8), torch.ones(1, 4, 8, 8, dtype=torch.bool)
    valid[0, 3, 7, 7] = False
    features = torch.zeros(1, 2, 4, 5)  # 2 steps, 2 x 2 places
    x, y, counts = task.regression(features, {"depth_m": depth, "valid": valid})
    assert x.shape == (1, 8, 5) and y.shape == (1, 8, 2 * 4 * 4)
    assert counts[0].tolist() == [True] * 7 + [False]
    perfect = LinearProbe(torch.zeros(5, 32), y[0])
    assert torch.equal(task.predict_linear(perfect, features, {"depth_m": depth}), depth)
