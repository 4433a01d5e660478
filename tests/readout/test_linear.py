"""Linear probes in closed form."""

import nearness
import numpy as np
import pytest
import torch

from scaling4d import seeds
from scaling4d.readout.linear import LinearProbe, RegressionBatch, fit_probe, fit_probes, pooled
from scaling4d.readout.tasks.depth import Depth
from scaling4d.training.distributed import run

P, D, OUT = 3, 6, 2


def samples(count: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, targets, which count; a target is a linear function of features and place."""
    rng = seeds.numpy_rng(0, "linear", count)
    weight, offset = seeds.numpy_rng(0, "truth").normal(size=(D, OUT)), np.arange(P * OUT).reshape(P, OUT)
    x = rng.normal(size=(count, P, D)) * 10.0 ** np.arange(-2, 4)
    y = x / 10.0 ** np.arange(-2, 4) @ weight + offset + noise * rng.normal(size=(count, P, OUT))
    return torch.from_numpy(x).float(), torch.from_numpy(y).float(), torch.ones(count, P, dtype=torch.bool)


def probes(*groups: tuple[list[RegressionBatch], list[RegressionBatch]]) -> list[LinearProbe]:
    """The trivial answer, and a probe after each group of batches to fit and to choose the penalty."""

    def fit(*, rank: int, ranks: int) -> list[LinearProbe]:
        mean, fitted = fit_probes(groups, "cpu")
        return [mean, *fitted]

    return run(fit, ranks=1)


def test_a_linear_function_of_features_of_any_scale_is_learned_with_an_offset_for_each_place() -> None:
    x, y, counts = samples(250, 0.0)
    part = [(x[:200], y[:200], counts[:200])]
    assert nearness.near(probes((part, part))[1](x[200:]), y[200:], 1e-3)


def test_samples_that_do_not_count_change_nothing_and_parts_add_up() -> None:
    x, y, counts = samples(100, 0.3)
    bad = (torch.full_like(x, torch.nan), torch.full_like(y, torch.nan), torch.zeros_like(counts))
    whole, parts = (x, y, counts), [(x[:40], y[:40], counts[:40]), bad, (x[40:], y[40:], counts[40:])]
    assert nearness.near(probes((parts, [bad, whole]))[1](x), probes(([whole], [whole]))[1](x))


def test_probes_of_growing_parts_are_those_of_each_part_alone_and_the_trivial_answer_is_the_mean() -> None:
    first, second = samples(100, 0.3), samples(60, 0.3)
    mean, of_first, of_both = probes(([first], [first]), ([second], [first]))
    assert torch.equal(of_first.weight, probes(([first], [first]))[1].weight)
    assert torch.equal(of_both.weight, probes(([first, second], [first]))[1].weight)
    assert nearness.near(mean(first[0])[0], torch.cat([first[1], second[1]]).mean(0)) and not mean.weight.any()


def test_with_fewer_samples_than_features_held_out_samples_choose_a_penalty_that_predicts() -> None:
    """Interpolation of the samples is not taken for a perfect fit."""
    rng = seeds.numpy_rng(0, "wide")
    truth, x = rng.normal(size=(60, 1)) / np.sqrt(60), rng.normal(size=(350, 1, 60))
    y = x @ truth + 2.0 * rng.normal(size=(350, 1, 1))
    samples = (torch.from_numpy(x).float(), torch.from_numpy(y).float(), torch.ones(350, 1, dtype=torch.bool))
    errors = {}
    for count in (50, 200):
        fitted, held_out = (tuple(value[part] for value in samples) for part in (slice(count), slice(200, 250)))
        predicted = probes(([fitted], [held_out]))[1](samples[0][250:]).numpy()
        errors[count] = np.square(predicted - x[250:] @ truth).mean()
    assert errors[200] < errors[50] < 2  # without features: 1; with the least penalty: 15


@pytest.mark.parametrize(("count", "places"), [(40, 1), (200, 1), (40, 3)])
def test_one_probe_is_the_same_in_its_dual_form_and_where_a_rank_has_no_samples(count: int, places: int) -> None:
    """The dual form takes fewer clips than features, of one place."""
    rng = seeds.numpy_rng(0, "one probe", count, places)
    x, weight = rng.normal(size=(count + 20, places, 60)) * 10.0 ** rng.integers(-2, 4, 60), rng.normal(size=(60, OUT))
    x[:, :, 0] = 3.0  # a constant feature
    y = 0.1 * x @ (weight / x.std((0, 1)).clip(1)[:, None]) + rng.normal(size=(count + 20, places, OUT))
    batch = (torch.from_numpy(x).float(), torch.from_numpy(y).float(), torch.ones(count + 20, places, dtype=torch.bool))
    fitted, held_out = (tuple(value[part] for value in batch) for part in (slice(count), slice(count, None)))

    def fit(*, rank: int, ranks: int) -> LinearProbe:
        return fit_probe([fitted] if rank == 0 else [], [held_out] if rank == 0 else [], "cpu")

    expected = probes(([fitted], [held_out]))[1](batch[0])
    for ranks in (1, 2):
        assert nearness.near(run(fit, ranks=ranks)(batch[0]), expected, 1e-3)


def test_pooled_features_are_means_of_cells_in_the_order_of_channels() -> None:
    features = torch.arange(8 * 16 * 3, dtype=torch.float32).reshape(1, 8, 16, 3)  # t, 4 x 4 places
    cells = features.reshape(4, 2, 2, 2, 2, 2, 3).mean((1, 3, 5))  # t h w D
    assert torch.equal(pooled(features)[0, 0], cells.permute(3, 0, 1, 2).flatten())
    assert pooled(torch.ones(1, 2, 1, 5)).shape == (1, 1, 10)  # fewer cells than the grid
    widths = {1024: 16, 1025: 4, 4096: 4, 4097: 1}  # the number of cells falls, so that sums fit into memory
    assert {width: pooled(torch.ones(1, 8, 16, width)).shape[2] // width for width in widths} == widths


def test_depth_of_a_token_is_that_of_its_own_patch_and_counts_where_all_of_it_is_valid() -> None:
    task = Depth(rate_hz=4.0, views=("plain",), offset_m=3.0)
    depth, valid = torch.arange(4 * 8 * 8.0).reshape(1, 4, 8, 8), torch.ones(1, 4, 8, 8, dtype=torch.bool)
    valid[0, 3, 7, 7] = False
    features = torch.zeros(1, 2, 4, 5)  # 2 steps, 2 x 2 places
    x, y, counts = task.regression(features, {"depth_m": depth, "valid": valid})
    assert x.shape == (1, 8, 5) and y.shape == (1, 8, 2 * 4 * 4)
    assert counts[0].tolist() == [True] * 7 + [False]
    perfect = LinearProbe(torch.zeros(5, 32), y[0])
    assert torch.equal(task.predict_linear(perfect, features, {"depth_m": depth}), depth)
