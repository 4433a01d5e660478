"""Heads, losses and metrics of the readouts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scaling4d import config, seeds
from scaling4d.encoders.features import Standard, stretch
from scaling4d.readout import metrics
from scaling4d.readout.heads import AttentionReadout, Head, cells, fourier
from scaling4d.readout.split import one_by_one, stacked
from scaling4d.readout.tasks.boxes import Boxes
from scaling4d.readout.tasks.depth import Depth
from scaling4d.readout.tasks.points import Points
from scaling4d.readout.tasks.pose import Pose
from scaling4d.readout.tasks.task import pad
from scaling4d.readout.train import TASKS, Probe, Recipe, _parts, result_of
from scaling4d.readout.views import backwards
from scaling4d.records import Sample, UserError
from scaling4d.training import optimizer
from scaling4d.training.distributed import run

CLIP = (4, 16, 16)
VIEWS = ("plain", "mirrored")


def sample(seed: int = 0) -> Sample:
    """One that has the labels of every task."""
    rng = seeds.numpy(seed, "sample")
    T, H, W = CLIP
    corner = rng.uniform(0, 0.5, (3, T, 2)).astype(np.float32)
    return Sample(
        id=f"s{seed}",
        video=f"v{seed}",
        pixels=rng.integers(0, 256, (T, H, W, 3), dtype=np.uint8),
        labels={
            "action": np.int64(seed % 3),
            "action_mirrored": np.int64((seed + 1) % 3),
            "boxes": np.concatenate([corner, corner + 0.3], axis=-1),
            "depth_m": rng.uniform(1, 5, (T, H, W)).astype(np.float32),
            "points": rng.uniform(0, 1, (5, T, 2)).astype(np.float32),
            "camera_to_world": np.stack([np.eye(4) + 0.1 * i for i in range(T)]),
        },
        valid={
            "boxes": np.ones((3, T), bool),
            "depth_m": rng.uniform(size=(T, H, W)) < 0.9,
            "points": rng.uniform(size=(5, T)) < 0.8,
            "camera_to_world": np.ones(T, bool),
        },
    )


def bind_head(**changes: object) -> None:
    shape = {"width": 32, "heads": 4, "fourier_bases": 4, "query_width": 24}
    start = {"query_std": 1.0, "time_init": "sincos", "out_scale": 1.0, "stretched": True, "sharpness": [1.0, 100.0]}
    config.bind({"Head": shape | start | changes})


TASK = {
    "actions": TASKS["actions"](classes=3, rate_hz=8.0, views=VIEWS, test_views=(1, 1)),
    "boxes": Boxes(objects=4, rate_hz=8.0, views=VIEWS, beta=0.05, relative=False),
    "depth": Depth(rate_hz=8.0, views=VIEWS, offset_m=3.0),
    "points": Points(tracks=6, tiles=2, rate_hz=8.0, views=VIEWS, certain=True, relative=True, queries="frame_0"),
    "pose": Pose(rate_hz=8.0, views=VIEWS, unit_translation=False),
}


def batch(task: str, seeds_: range = range(3)) -> dict[str, torch.Tensor]:
    targets = [TASK[task].target(sample(seed)) for seed in seeds_]
    return {name: torch.from_numpy(np.stack([t[name] for t in targets])) for name in targets[0]}


@pytest.mark.parametrize("task", list(TASK))
def test_a_head_learns_three_clips_by_heart(task: str) -> None:
    bind_head()
    head = TASK[task].head(features_width=24, clip=CLIP)
    head.initialise(0)
    features = torch.randn(3, 2, 4, 24, generator=seeds.stream(0, "features"))
    target = batch(task)
    adam = torch.optim.Adam(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        loss = TASK[task].loss(TASK[task].predict(head, features, target), target)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("task", "mask", "label"), [("boxes", "present", "boxes"), ("depth", "valid", "depth_m"), ("points", "visible", "points")]
)
def test_what_is_not_valid_does_not_reach_loss_or_metric(task: str, mask: str, label: str) -> None:
    bind_head()
    head = TASK[task].head(features_width=24, clip=CLIP)
    head.initialise(0)
    features = torch.randn(3, 2, 4, 24, generator=seeds.stream(0, "features"))
    target = batch(task)
    other = {name: value.clone() for name, value in target.items()}
    hidden = ~other[mask]
    if task != "depth":
        hidden[:, :, 0] = False  # queries are asked at the first frame
    other[label][hidden] = 0.123
    predicted = TASK[task].predict(head, features, target).detach()
    assert TASK[task].loss(predicted, target) == TASK[task].loss(predicted, other)
    one = lambda t: {name: value[0].numpy() for name, value in t.items()}  # noqa: E731
    assert TASK[task].measure(predicted[0].numpy(), one(target)) == TASK[task].measure(predicted[0].numpy(), one(other))


def test_perfect_predictions_score_perfectly() -> None:
    for task, perfect in (("boxes", 1.0), ("depth", 0.0), ("pose", 0.0)):
        target = {name: np.asarray(value) for name, value in TASK[task].target(sample()).items()}
        label = {"boxes": "boxes", "depth": "depth_m", "pose": "pose"}[task]
        total, count = TASK[task].measure(target[label], target)[TASK[task].primary.metric]
        assert abs(total / count - perfect) < 1e-6
    target = TASK["points"].target(sample())
    shown = np.where(target["visible"], 9.0, -9.0)
    predicted = np.concatenate([target["points"], shown[..., None], np.full((*shown.shape, 1), 9.0)], axis=-1)
    measured = TASK["points"].measure(predicted, target)
    assert measured["average_jaccard"] == (1.0, 1.0) and measured["delta_avg"] == (1.0, 1.0)
    right, all_of_them = measured["occlusion_accuracy"]
    assert right == all_of_them == 15  # five tracks, three frames after the query's


@pytest.mark.parametrize("task", ["boxes", "points"])
def test_a_batch_in_which_nothing_is_asked_costs_nothing(task: str) -> None:
    """The last frames of all its clips show none of what is followed, and they are run backwards."""
    bind_head()
    head = TASK[task].head(features_width=24, clip=CLIP)
    head.initialise(0)
    plain = sample()
    nothing = {
        name: np.concatenate([mask[:, :-1], np.zeros_like(mask[:, :1])], 1) for name, mask in plain.valid.items() if name == task
    }
    view = backwards(Sample("s", "v", plain.pixels, {task: plain.labels[task]}, nothing))
    target = {name: torch.from_numpy(np.asarray(value))[None] for name, value in TASK[task].target(view).items()}
    features = torch.randn(1, 2, 4, 24, generator=seeds.stream(0, "features"))
    assert TASK[task].loss(TASK[task].predict(head, features, target), target) == 0


def measured_points(points: np.ndarray, seen: np.ndarray, shown: np.ndarray) -> dict[str, tuple[float, float]]:
    """Of tracks that are followed without error, and said to be visible where `shown`."""
    target = TASK["points"].target(Sample("s", "v", sample().pixels, {"points": points}, {"points": seen}))
    said = np.zeros((6, 4), bool)
    said[: len(shown)] = shown
    logits = np.where(said, 9.0, -9.0)
    predicted = np.concatenate([target["points"], logits[..., None], np.full((6, 4, 1), 9.0)], -1)
    return TASK["points"].measure(predicted, {name: np.asarray(value) for name, value in target.items()})


def test_the_query_frame_and_empty_places_for_tracks_are_not_measured() -> None:
    """Both would be right: a track's first frame is given, and nobody says that a track that is not there is visible."""
    points = np.full((2, 4, 2), 0.5, np.float32)
    seen = np.ones((2, 4), bool)
    found = measured_points(points, seen, np.array([[True, False, False, False]] * 2))
    assert found["average_jaccard"] == (0.0, 1.0) and found["occlusion_accuracy"] == (0.0, 6.0)


def table_of(*videos: tuple[str, dict[str, tuple[float, float]]]) -> dict[str, np.ndarray]:
    names = sorted({name for name, _ in videos})
    table = {metric: np.zeros((len(names), 2)) for metric in videos[0][1]}
    for name, measured in videos:
        for metric, pair in measured.items():
            table[metric][names.index(name)] += pair
    return metrics.tracks_by_video(table)


def test_clips_of_one_video_make_one_jaccard_and_each_video_weighs_the_same(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    points, seen = np.full((2, 4, 2), 0.5, np.float32), np.ones((2, 4), bool)
    right = measured_points(points, seen, seen)
    wrong = measured_points(points[:1], seen[:1], ~seen[:1])
    saved = SimpleNamespace(name="e", parameters=1)
    result = result_of(saved, tmp_path, "points", "frozen", TASK["points"], ["a", "a", "b"], [right, wrong, wrong], 0, 10)
    assert result.value == pytest.approx((6 / 9 + 0) / 2)  # and not the mean of three clips, 1 / 3
    assert set(result.others) == {"delta_avg", "occlusion_accuracy", "distance_px256", "distance_px256_standing_still"}


def test_a_video_in_which_nothing_is_measured_has_no_weight() -> None:
    points, seen = np.full((1, 4, 2), 0.5, np.float32), np.array([[True, False, False, False]])
    table = table_of(("a", measured_points(points, seen, seen)), ("b", measured_points(points, seen, ~seen)))
    assert table["average_jaccard"].tolist() == [[0, 0], [0, 1]]  # in b, what is hidden is said to be visible
    assert table["delta_avg"].tolist() == [[0, 0], [0, 0]] and table["occlusion_accuracy"].tolist() == [[1, 1], [0, 1]]


def test_a_metric_without_anything_to_measure_is_no_number_and_the_primary_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    saved = SimpleNamespace(name="e", parameters=1)
    for pair, expected in (((0.0, 0.0), None), ((1.0, 2.0), 0.5)):
        measured = [{"mean_iou": pair, "mean_iou_per_object": (0.0, 0.0)}]
        if expected is None:
            with pytest.raises(UserError, match="boxes: nothing in the val split can be measured; mean_iou has no clip"):
                result_of(saved, tmp_path, "boxes", "frozen", TASK["boxes"], ["v"], measured, 0, 10)
        else:
            result = result_of(saved, tmp_path, "boxes", "frozen", TASK["boxes"], ["v"], measured, 0, 10)
            assert result.value == expected and result.others == {}


def test_depth_that_is_right_but_for_its_scale_is_wrong() -> None:
    target = {name: np.asarray(value) for name, value in TASK["depth"].target(sample()).items()}
    total, count = TASK["depth"].measure(2 * target["depth_m"], target)["abs_rel"]
    assert abs(total / count - 1) < 1e-5


def test_pose_is_that_of_the_last_camera_in_the_first() -> None:
    """A camera that turns left by 90 degrees and then goes on: seen from the first, it went to the left."""
    to_world = np.tile(np.eye(4), (4, 1, 1))
    to_world[:, :3, 3] = [5.0, 0.0, 7.0]  # the path starts anywhere
    left = np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]])
    to_world[1:, :3, :3] = left
    to_world[2:, :3, 3] += left @ [0, 0, 2.0]
    one = Sample("s", "v", sample().pixels, {"camera_to_world": to_world})
    pose = TASK["pose"].target(one)["pose"]
    assert np.allclose(pose[:, :3], left) and np.allclose(pose[:, 3], [-2, 0, 0])
    doubled = to_world.copy()
    doubled[:, :3, 3] *= 2
    other = Sample("s", "v", sample().pixels, {"camera_to_world": doubled})
    unit = Pose(rate_hz=8.0, views=VIEWS, unit_translation=True)
    assert np.allclose(unit.target(one)["pose"], unit.target(other)["pose"]) and np.allclose(
        unit.target(one)["pose"][:, 3], [-1, 0, 0]
    )


def test_the_given_first_box_is_not_measured() -> None:
    target = TASK["boxes"].target(sample())
    assert not target["present"][:, 0].any() and target["present"][:3, 1:].all()


def test_depth_patches_land_where_they_belong() -> None:
    bind_head()
    depth = TASK["depth"]
    head = depth.head(features_width=24, clip=CLIP)
    head.initialise(0)
    features = torch.randn(1, 2, 4, 24, generator=seeds.stream(0, "f"))
    raw = head(features)[0]  # Q 128, queries over t h w
    predicted = depth.predict(head, features, batch("depth", range(1)))[0]
    token, patch = 1 * 4 + 0 * 2 + 1, raw[1 * 4 + 0 * 2 + 1].reshape(2, 8, 8)
    assert token == 5
    assert torch.equal(predicted[2:4, 0:8, 8:16], patch + 3.0)


def test_iou_of_known_boxes() -> None:
    box = np.array([0.0, 0.0, 2.0, 2.0])
    assert metrics.box_iou(box, np.array([1.0, 1.0, 3.0, 3.0])) == pytest.approx(1 / 7)
    assert metrics.box_iou(np.array([2.0, 2.0, 0.0, 0.0]), box) == 0


def test_intervals_hold_the_mean_and_shrink_with_more_videos() -> None:
    widths = []
    for videos in (20, 2000):
        sums = seeds.numpy(0, "sums").uniform(size=videos)
        low, high = metrics.interval(sums, np.ones(videos), seeds.numpy(0, "draws"), draws=500)
        assert low < sums.mean() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def standardised(*, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    whole = 3 + 2 * torch.randn(40, 2, 4, 5, generator=seeds.stream(0, "whole"))
    whole = whole @ torch.randn(5, 5, generator=seeds.stream(0, "mixing"))  # channels go together
    return Standard.of(whole[rank::ranks], flattening=0.0, place_deviation=0.5)(whole), Standard.none(5)(whole) - whole


def test_standard_features_are_white_between_clips_and_differ_by_the_set_share_between_places_whatever_the_ranks() -> None:
    one, three = run(standardised, ranks=1), run(standardised, ranks=3)
    place = one[0].mean(0)
    assert torch.allclose(place.std((0, 1), correction=0), torch.full((5,), 0.5), atol=1e-4)
    assert place.mean((0, 1)).abs().max() < 1e-5
    about = (one[0] - place).flatten(0, 2)
    assert torch.allclose(about.T @ about / len(about), torch.eye(5), atol=1e-4)
    assert torch.allclose(one[0], three[0], atol=1e-5)
    assert not one[1].any()


def test_stretching_keeps_a_constant_and_the_order_of_time() -> None:
    x = torch.arange(8.0)[None, :, None, None]
    y = stretch(x, 16)[0, :, 0, 0]
    assert (y.diff() > 0).all()
    assert torch.allclose(stretch(torch.ones(1, 8, 1, 1), 16), torch.ones(1, 16, 1, 1))


def test_fourier_is_sines_then_cosines_of_doubling_frequency() -> None:
    found = fourier(torch.tensor([[0.25, 0.5]]), 2)
    wanted = torch.tensor([[0.25, 0.5], [0.5, 1.0]]).flatten() * torch.pi
    assert torch.allclose(found[0], torch.cat([wanted.sin(), wanted.cos()]), atol=1e-6)


def test_padding_fills_and_never_cuts() -> None:
    assert pad(np.array([1, 2, 3]), 2).tolist() == [1, 2, 3]
    assert pad(np.array([1]), 3).tolist() == [1, 0, 0]


FEW = {"points": (replace(TASK["points"], tracks=2), "asked", 5), "boxes": (replace(TASK["boxes"], objects=2), "present", 3)}


@pytest.mark.parametrize("task", list(FEW))
def test_more_is_judged_than_is_learned_and_each_thing_by_itself(task: str) -> None:
    bind_head()
    few, mask, things = FEW[task]
    head = few.head(features_width=24, clip=CLIP)
    head.initialise(0)
    features = torch.randn(1, 2, 4, 24, generator=seeds.stream(0, "features"))
    whole = few.target(sample())
    assert whole[mask].reshape(things, -1).any(1).all() and len(few.lesson(whole)[mask]) == 2
    said = few.predict(head, features, stacked([whole]))
    assert said.shape[1] == things
    at_once = TASK[task].predict(head, features, batch(task, range(1)))[:, :things]
    assert torch.allclose(said, at_once, atol=1e-6)
    found, wanted = (few.measure(raw[0].detach().numpy(), whole) for raw in (said, at_once))
    only_learned = few.measure(said[0, :2].detach().numpy(), few.lesson(whole))
    for metric, (_, count) in found.items():
        assert found[metric] == pytest.approx(wanted[metric], abs=1e-5)
        assert count >= only_learned[metric][1]
    assert found != only_learned


def test_a_batch_of_clips_with_few_and_many_things_measures_each_as_if_it_were_alone() -> None:
    bind_head()
    few, _, _ = FEW["points"]
    head = few.head(features_width=24, clip=CLIP)
    head.initialise(0)
    features = torch.randn(2, 2, 4, 24, generator=seeds.stream(0, "features"))
    plain = sample(1)
    one = replace(
        plain, labels=plain.labels | {"points": plain.labels["points"][:1]}, valid={"points": plain.valid["points"][:1]}
    )
    both = stacked([few.target(sample()), few.target(one)])
    said = few.predict(head, features, both)
    for n, (target, alone) in enumerate(zip(one_by_one(both), (sample(), one), strict=True)):
        single = few.predict(head, features[n : n + 1], stacked([few.target(alone)]))[0].detach().numpy()
        found, wanted = few.measure(said[n].detach().numpy(), target), few.measure(single, few.target(alone))
        assert found.keys() == wanted.keys() and all(np.allclose(found[name], wanted[name], atol=1e-5) for name in found)


def test_a_given_query_is_answered_whatever_the_others_ask() -> None:
    bind_head()
    head = config.build(Head, features_width=24, frames=4, learned=0, out=8, coordinates=2, tiles=2)
    head.initialise(0)
    features, queries = (
        torch.randn(1, 2, 4, 24, generator=seeds.stream(0, "f")),
        torch.rand(1, 3, 2, generator=seeds.stream(0, "q")),
    )
    whole = head(features, queries)
    assert whole.shape == (1, 3, 4, 4)
    assert torch.allclose(whole[:, 1:2], head(features, queries[:, 1:2]), atol=1e-6)


@pytest.mark.parametrize("coordinates", [0, 2, 3])
def test_attention_of_few_queries_is_that_of_many_in_another_order(coordinates: int) -> None:
    rng, given = seeds.stream(0, "few"), coordinates > 0
    reader = AttentionReadout(
        features_width=24, frames=4, queries=0 if given else 3, query_width=5, width=32, heads=4, out=6, near=given
    )
    for name, weight in reader.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name and name.endswith("weight")), std=0.3, generator=rng)
    features = torch.randn(2, 2, 9, 24, generator=rng)
    queries = torch.randn(2, 3, 5, generator=rng) if given else None
    x, q = stretch(features, 4), reader.query_in(queries) if given else reader.query.expand(2, -1, -1)
    places = torch.rand(2, 3, coordinates, generator=rng) if given else None
    assert torch.allclose(reader._read_by_few(x, q, places), reader._read(x, q, places), atol=1e-5)


@pytest.mark.parametrize("given", [False, True])
def test_features_that_are_not_stretched_are_read_at_the_mean_position_of_their_frames(given: bool) -> None:
    rng = seeds.stream(0, "own steps")
    queries, places = (torch.randn(2, 3, 5, generator=rng), torch.rand(2, 3, 2, generator=rng)) if given else (None, None)
    sizes = {"features_width": 24, "queries": 0 if given else 3, "query_width": 5, "width": 32, "heads": 4, "out": 6}
    reader = AttentionReadout(**sizes, near=given, frames=4, stretched=False)
    for weight in reader.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=rng)
    features = torch.randn(2, 2, 9, 24, generator=rng)
    same = AttentionReadout(**sizes, near=given, frames=2)
    positions = reader.temporal_positions.detach().unflatten(0, (2, 2)).mean(1)
    same.load_state_dict(reader.state_dict() | {"temporal_positions": positions})
    found = reader(features, queries, places)
    assert torch.allclose(found, same(features, queries, places), atol=1e-6)
    assert not torch.allclose(found, reader(features.flip(1), queries, places), atol=1e-3)


@pytest.mark.parametrize(("width", "at_width", "share"), [(24, 24, 1), (96, 24, 1 / 4), (12, 24, 2), (96, 0, 1)])
def test_keys_and_values_of_wider_features_learn_as_much_slower(width: int, at_width: int, share: float) -> None:
    """AdamW's first step moves a weight by its learning rate, whatever the gradient."""
    rates = {"learning_rate": 0.01, "rate_at_width": at_width, "encoder_learning_rate": 0.0, "weight_decay": 0.0}
    recipe = Recipe(steps=1, batch=3, betas=(0.9, 0.999), warmup_steps=0, clip_norm=1.0, flattening=1.0, **rates)
    bind_head()
    head = TASK["actions"].head(features_width=width, clip=CLIP)
    head.initialise(0)
    before = {name: weight.detach().clone() for name, weight in head.named_parameters()}
    probe = Probe(None, Standard.none(width), head, TASK["actions"], 0.95)
    adamw, peaks = optimizer.adamw(_parts(probe, recipe), betas=recipe.betas, weight_decay=recipe.weight_decay)
    optimizer.set_rate(adamw, peaks, 1.0)
    probe(torch.randn(3, 2, 4, width, generator=seeds.stream(0, "rates")), batch("actions")).backward()
    adamw.step()
    moved = {name: (weight - before[name]).abs().median().item() for name, weight in head.named_parameters()}
    for name, rate in {"key": 0.01 * share, "value": 0.01 * share, "project": 0.01, "mlp_in": 0.01}.items():
        assert moved[f"readout.{name}.weight"] == pytest.approx(rate, rel=0.05), name


@pytest.mark.parametrize("coordinates", [2, 3])
def test_attention_falls_by_the_squared_distance(coordinates: int) -> None:
    reader = AttentionReadout(features_width=24, frames=1, queries=0, query_width=5, width=32, heads=4, out=6, near=True)
    torch.nn.init.normal_(reader.nearness_bias, generator=seeds.stream(0, "bias"))
    places, centres = torch.rand(2, 5, coordinates, generator=seeds.stream(0, "places")), cells(2, 9, torch.device("cpu"))
    at, where = reader._near(places, centres)
    squared = (places[:, :, None] - centres[:, :coordinates]).square().sum(-1)[:, :, None]  # B Q 1 n
    expected = -reader.nearness_bias.exp()[:, None] * squared
    assert torch.allclose((at @ where.T).softmax(-1), expected.softmax(-1), atol=1e-6)


def test_a_query_of_depth_looks_at_the_part_of_the_clip_that_it_answers_for() -> None:
    bind_head(stretched=False, sharpness=[1e4, 1e4])
    head = TASK["depth"].head(features_width=24, clip=(4, 16, 16))  # two steps of 2 x 2 tokens, and as many queries
    head.initialise(0)
    features = torch.randn(1, 2, 4, 24, generator=seeds.stream(0, "clip"))
    changed = features.clone()
    changed[0, 1, 2] = -changed[0, 1, 2]
    differs = (head(features) - head(changed)).abs().amax(-1)[0] > 1e-6
    assert differs.tolist() == [False] * 6 + [True, False]


def test_the_sharpest_head_reads_only_the_token_that_is_asked_about() -> None:
    reader = AttentionReadout(features_width=24, frames=1, queries=0, query_width=5, width=32, heads=4, out=6, near=True)
    torch.nn.init.constant_(reader.nearness_bias, 9.0)
    places = torch.tensor([[[0.5 / 3, 2.5 / 3], [0.6, 0.4]]])  # of a grid of 3 x 3: left below, the middle
    at, where = reader._near(places, cells(1, 9, places.device))
    shares = (at @ where.T).softmax(-1).transpose(1, 2)  # 1 heads 2 9
    assert shares.argmax(-1)[0].tolist() == [[6, 4]] * 4
    assert shares.amax(-1).min() > 0.99
