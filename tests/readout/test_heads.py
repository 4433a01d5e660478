"""Attention readouts: queries, positions in time, distances; whitening of their features; when they stop to learn."""

from types import SimpleNamespace

import pytest
import torch
from nearness import near
from small_tasks import HEAD, TASK, features_of, head_of, targets_of

from scaling4d import seeds
from scaling4d.readout.heads import AttentionReadout, HeadConfig, cell_centres, stretch_time
from scaling4d.readout.protocols import CHECKS, EarlyStopping, Frozen, FrozenConfig, ReadoutConfig, ReadoutModel
from scaling4d.readout.whitening import Whitening
from scaling4d.training.distributed import run
from scaling4d.training.fit import StepResult
from scaling4d.training.optimizer import build_adamw

SIZES = {"features_width": 24, "query_width": 5, "width": 32, "heads": 4, "out": 6}
RECIPE = {"batch": 3, "learning_rate": 0.01, "weight_decay": 0.0, "warmup_steps": 0, "clip_norm": 1.0, "shrinkage": 1.0}


def reader(*, given: bool, std: float = 0.3, **changes: object) -> AttentionReadout:
    """With random weights. given: queries are given, with places."""
    readout = AttentionReadout(**SIZES | {"frames": 4, "queries": 0 if given else 3, "biased": given} | changes)
    rng = seeds.torch_rng(0, "weights")
    for name, weight in readout.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name and name.endswith("weight")), std=std, generator=rng)
    return readout


def features_and_queries(*, given: bool, coordinates: int = 2) -> tuple:
    rng = seeds.torch_rng(0, "features")
    features = torch.randn(2, 2, 9, 24, generator=rng)
    if not given:
        return features, None, None
    return features, torch.randn(2, 3, 5, generator=rng), torch.rand(2, 3, coordinates, generator=rng)


@pytest.mark.parametrize("coordinates", [0, 2, 3])
def test_attention_of_few_queries_is_that_of_many_in_another_order(coordinates: int) -> None:
    given = coordinates > 0
    readout = reader(given=given)
    features, queries, places = features_and_queries(given=given, coordinates=coordinates)
    x, q = stretch_time(features, 4), readout.query_in(queries) if given else readout.query.expand(2, -1, -1)
    assert near(readout._attend_few(x, q, places), readout._attend(x, q, places))


@pytest.mark.parametrize("given", [False, True])
def test_features_that_are_not_stretched_are_read_at_the_mean_position_of_their_frames(given: bool) -> None:
    features, queries, places = features_and_queries(given=given)
    readout, same = reader(given=given, stretched=False), reader(given=given, frames=2)
    positions = readout.temporal_positions.detach().unflatten(0, (2, 2)).mean(1)
    same.load_state_dict(readout.state_dict() | {"temporal_positions": positions})
    answers = readout(features, queries, places)
    assert near(answers, same(features, queries, places))
    assert not near(answers, readout(features.flip(1), queries, places), 1e-3)


@pytest.mark.parametrize("coordinates", [2, 3])
def test_attention_falls_by_the_squared_distance(coordinates: int) -> None:
    readout = reader(given=True, frames=1, std=1.0)
    places, centres = (
        torch.rand(2, 5, coordinates, generator=seeds.torch_rng(0, "places")),
        cell_centres(2, 9, torch.device("cpu")),
    )
    of_queries, of_tokens = readout._distance_terms(places, centres)
    squared = (places[:, :, None] - centres[:, :coordinates]).square().sum(-1)[:, :, None]  # B Q 1 n
    expected = -readout.distance_bias.exp()[:, None] * squared
    assert near((of_queries @ of_tokens.T).softmax(-1), expected.softmax(-1))


def test_the_strongest_bias_reads_only_the_token_at_the_querys_place() -> None:
    readout = reader(given=True, frames=1)
    torch.nn.init.constant_(readout.distance_bias, 9.0)
    places = torch.tensor([[[0.5 / 3, 2.5 / 3], [0.6, 0.4]]])  # of a grid of 3 x 3: left below, the middle
    of_queries, of_tokens = readout._distance_terms(places, cell_centres(1, 9, places.device))
    shares = (of_queries @ of_tokens.T).softmax(-1).transpose(1, 2)  # 1 heads 2 9
    assert shares.argmax(-1)[0].tolist() == [[6, 4]] * 4
    assert shares.amax(-1).min() > 0.99


def test_a_query_of_depth_attends_to_the_part_of_the_clip_that_it_answers_for() -> None:
    head = head_of(TASK["depth"], stretched=False, distance_bias=(1e4, 1e4))  # four steps of 2 x 2 tokens, and as many queries
    features = features_of(1)
    changed = features.clone()
    changed[0, 1, 2] = -changed[0, 1, 2]
    differs = (head(features) - head(changed)).abs().amax(-1)[0] > 1e-6
    assert differs.nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize(("width", "at_width", "share"), [(24, 24, 1), (96, 24, 1 / 4), (12, 24, 2), (96, 0, 1)])
def test_keys_and_values_of_wider_features_learn_as_much_slower(width: int, at_width: int, share: float) -> None:
    """AdamW's first step moves a weight by its learning rate, whatever the gradient."""
    recipe = FrozenConfig(**RECIPE, steps=1, rate_at_width=at_width, patience=0)
    task, head = TASK["actions"], head_of(TASK["actions"], width=width)
    before = {name: weight.detach().clone() for name, weight in head.named_parameters()}
    model = ReadoutModel(None, Whitening.identity(width), head, task)
    groups = Frozen(ReadoutConfig(None, "actions", task, 0, None, recipe)).param_groups(model)
    adamw = build_adamw(groups, betas=(0.9, 0.999), weight_decay=0.0)
    model(features_of(3, width=width), targets_of(task, 3)).backward()
    adamw.step()
    moved = {name: (weight - before[name]).abs().median().item() for name, weight in head.named_parameters()}
    for name, rate in {"key": 0.01 * share, "value": 0.01 * share, "project": 0.01, "mlp_in": 0.01}.items():
        assert moved[f"readout.{name}.weight"] == pytest.approx(rate, rel=0.05), name


@pytest.mark.parametrize(("setting", "norm"), [(0.0, 5.0), (1.0, 1.0), (9.0, 5.0)])
def test_gradients_are_clipped_at_the_recipes_norm_or_not_at_all(setting: float, norm: float) -> None:
    recipe = FrozenConfig(**RECIPE | {"clip_norm": setting}, steps=1, rate_at_width=0, patience=0)
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    protocol = Frozen(ReadoutConfig(None, "actions", TASK["actions"], 0, None, recipe))
    torch.nn.utils.clip_grad_norm_([weight], protocol.clip_norm)
    assert weight.grad.norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"time_init": "zero"}, "time_init = 'zero'; needed normal or sincos"),
    ({"distance_bias": (1.0,)}, r"distance_bias = \[1.0\]; needed two numbers above 0, or none"),
    ({"distance_bias": (0.0, 1.0)}, r"distance_bias = \[0.0, 1.0\]; needed two numbers above 0, or none"),
    ({"heads": 5}, "width 32 does not divide into 5 heads"),
])  # fmt: skip
def test_a_head_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        HeadConfig(**vars(HEAD) | changes)


def whitened(*, rank: int, ranks: int) -> torch.Tensor:
    features = 3 + 2 * torch.randn(40, 2, 4, 5, generator=seeds.torch_rng(0, "all"))
    features = features @ torch.randn(5, 5, generator=seeds.torch_rng(0, "mixing"))  # channels go together
    share = features[rank::ranks]
    assert not (Whitening.identity(5)(features) - features).any()
    return Whitening.fit(lambda indices: share[list(indices)], len(share), shrinkage=0.0, position_std=0.5)(features)


@pytest.mark.integration
def test_whitened_features_vary_alike_in_all_directions_and_by_the_set_deviation_between_places_on_any_ranks() -> None:
    one, three = run(whitened, ranks=1), run(whitened, ranks=3)
    place = one.mean(0)
    assert torch.allclose(place.std((0, 1), correction=0), torch.full((5,), 0.5), atol=1e-4)
    assert place.mean((0, 1)).abs().max() < 1e-5
    centred = (one - place).flatten(0, 2)
    assert torch.allclose(centred.T @ centred / len(centred), torch.eye(5), atol=1e-4)
    assert near(one, three)


def early_stopping(patience: int) -> FrozenConfig:
    return FrozenConfig(**RECIPE, steps=1000, rate_at_width=0, patience=patience)


def stopped(losses: list[float], *, patience: int) -> tuple[int, float, list[dict]]:
    """The step at which a training with these held-out losses ends, the step whose weights it keeps, and its lines."""
    head = torch.nn.Linear(1, 1)
    rule = EarlyStopping(SimpleNamespace(head=head), None, early_stopping(patience))
    values = iter(losses)
    rule.held_out_loss = lambda: next(values)
    for step in range(1, 1001):
        torch.nn.init.constant_(head.weight, step)
        if rule.after_step(StepResult(step, step == 1000, torch.zeros(()), 0.0, 0.0, 0.0)):
            break
    rule.restore()
    return step, head.weight.item(), rule.lines


def test_a_head_stops_after_its_patience_and_keeps_the_weights_of_the_lowest_loss() -> None:
    step, kept, lines = stopped([5.0, 3.0, 4.0, *[3.5] * 100], patience=10 * CHECKS)
    assert (step, kept) == (20 + 10 * CHECKS, 20.0)
    assert lines[:2] == [{"step": 10, "held_out_loss": 5.0}, {"step": 20, "held_out_loss": 3.0}] and len(lines) == 2 + CHECKS


def test_a_head_that_gets_better_trains_to_the_end_and_the_last_step_is_measured() -> None:
    step, kept, lines = stopped([1 / n for n in range(1, 200)], patience=7 * CHECKS)
    assert (step, kept, lines[-1]["step"]) == (1000, 1000.0, 1000)


def test_a_patience_of_fewer_steps_than_measurements_is_refused() -> None:
    with pytest.raises(ValueError, match=f"^patience = 3; needed 0 or at least {CHECKS} steps$"):
        early_stopping(3)
