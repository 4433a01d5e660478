"""Targets, losses, predictions and metrics of the five tasks, and results over a split."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nearness import near
from small_encoder import learn
from small_tasks import CLIP, TASK, features_of, head_of, sample, targets_of
from torch.nn import functional as F

from scaling4d import seeds
from scaling4d.readout import metrics
from scaling4d.readout.protocols import ReadoutConfig
from scaling4d.readout.stage import result_of
from scaling4d.readout.tasks.boxes import SMOOTH_L1_BETA
from scaling4d.readout.tasks.task import collate, pad
from scaling4d.records import Result, Sample, UserError

T = CLIP[0]
MORE = {"points": (replace(TASK["points"], tracks=2), "queried", 5), "boxes": (replace(TASK["boxes"], objects=2), "present", 3)}


def arrays(target: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in target.items()}


@pytest.mark.integration
@pytest.mark.parametrize("task", list(TASK))
def test_a_head_learns_three_clips_by_heart(task: str) -> None:
    head, features, target = head_of(TASK[task]), features_of(3), targets_of(TASK[task], 3)
    losses = learn(head, lambda: TASK[task].loss(TASK[task].predict(head, features, target), target), steps=100)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("task", "mask", "label"), [("boxes", "present", "boxes"), ("depth", "valid", "depth_m"), ("points", "visible", "points")]
)
def test_labels_that_are_not_valid_do_not_reach_loss_or_metric(task: str, mask: str, label: str) -> None:
    target = targets_of(TASK[task], 3)
    other = {name: value.clone() for name, value in target.items()}
    hidden = ~other[mask]
    if task != "depth":
        hidden[:, :, 0] = False  # queries are given in the first frame
    other[label][hidden] = 0.123
    predicted = TASK[task].predict(head_of(TASK[task]), features_of(3), target).detach()
    assert TASK[task].loss(predicted, target) == TASK[task].loss(predicted, other)
    one, same = ({name: value[0].numpy() for name, value in some.items()} for some in (target, other))
    assert TASK[task].measure(predicted[0].numpy(), one) == TASK[task].measure(predicted[0].numpy(), same)


@pytest.mark.parametrize(("task", "label", "best"), [
    ("boxes", "boxes", 1.0), ("depth", "depth_m", 0.0), ("pose", "pose", 0.0), ("points", "points", 1.0)
])  # fmt: skip
def test_perfect_predictions_score_perfectly(task: str, label: str, best: float) -> None:
    target = arrays(TASK[task].target(sample()))
    predicted = target[label]
    if task == "points":
        shown = np.where(target["visible"], 9.0, -9.0)
        predicted = np.concatenate([predicted, shown[..., None], np.full((*shown.shape, 1), 9.0)], axis=-1)
    measured = TASK[task].measure(predicted, target)
    total, count = measured[TASK[task].metric.name]
    assert abs(total / count - best) < 1e-6
    assert task != "points" or measured["occlusion_accuracy"] == (35.0, 35.0)  # five tracks, all frames after the query's


@pytest.mark.parametrize("task", ["boxes", "points"])
def test_a_batch_without_a_query_costs_nothing(task: str) -> None:
    plain = sample()
    empty = Sample("s", "v", plain.pixels, {task: plain.labels[task][:0]}, {task: plain.valid[task][:0]})
    target = collate([TASK[task].target(empty)])
    assert TASK[task].loss(TASK[task].predict(head_of(TASK[task]), features_of(1), target), target) == 0


def boxes_loss(weight: float, predicted: torch.Tensor, boxes: list, present: list) -> torch.Tensor:
    target = {"boxes": torch.tensor(boxes)[None, None], "present": torch.tensor(present)[None, None]}
    return replace(TASK["boxes"], giou_weight=weight).loss(predicted, target)


def test_the_loss_of_boxes_adds_generalised_iou_of_present_objects() -> None:
    predicted = torch.tensor([[[[0.0, 0.0, 0.2, 0.2], [0.0, 0.0, 0.2, 0.2], [0.5, 0.5, 0.5, 0.5]]]], requires_grad=True)
    case = [[0.1, 0.1, 0.3, 0.3], [0.0, 0.0, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0]], [True, True, False]  # B Q T 4, B Q T
    smooth = (0.1 - 0.05 / 2) / 2  # of two boxes; every corner of the first is 0.1 off, above SMOOTH_L1_BETA
    giou = 1 - (1 / 7 - 2 / 9)
    assert boxes_loss(0.0, predicted, *case).item() == pytest.approx(smooth)
    loss = boxes_loss(0.5, predicted, *case)
    assert loss.item() == pytest.approx(smooth + 0.5 * giou / 2)
    loss.backward()
    assert predicted.grad.isfinite().all() and predicted.grad[0, 0, 0].any() and not predicted.grad[0, 0, 2].any()


def graph_of(value: torch.Tensor) -> list[str]:
    """Names of the operations behind a value."""
    waiting, names = [value.grad_fn], []
    while waiting:
        node = waiting.pop()
        names.append(node.name())
        waiting += [inner for inner, _ in node.next_functions if inner]
    return names


def test_boxes_without_generalised_iou_have_the_loss_and_the_graph_of_smooth_l1_alone() -> None:
    predicted = torch.rand(1, 1, 3, 4, generator=seeds.torch_rng(0, "boxes"), requires_grad=True)
    true, present = torch.rand(3, 4, generator=seeds.torch_rng(0, "true")), torch.tensor([True, False, True])
    error = F.smooth_l1_loss(predicted, true[None, None], reduction="none", beta=SMOOTH_L1_BETA).mean(-1)
    alone = (error * present).sum() / 2
    losses = [boxes_loss(weight, predicted, true.tolist(), present.tolist()) for weight in (0.0, 0.5)]
    assert torch.equal(losses[0], alone) and losses[1] != alone
    assert graph_of(losses[0]) == graph_of(alone) and len(graph_of(losses[1])) > len(graph_of(alone))


def test_a_weight_of_generalised_iou_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match="giou_weight is -0.5; needed 0 or more"):
        replace(TASK["boxes"], giou_weight=-0.5)


def measured_points(points: np.ndarray, seen: np.ndarray, shown: np.ndarray) -> dict[str, tuple[float, float]]:
    """Of tracks that are followed without error, and predicted visible where `shown`."""
    target = arrays(TASK["points"].target(Sample("s", "v", sample().pixels, {"points": points}, {"points": seen})))
    logits = np.where(pad(shown, 6), 9.0, -9.0)
    return TASK["points"].measure(np.concatenate([target["points"], logits[..., None], np.full((6, T, 1), 9.0)], -1), target)


def test_a_point_is_certain_within_six_pixels_of_the_clip() -> None:
    task, far = TASK["points"], 9.0
    target = {name: torch.as_tensor(value)[None] for name, value in task.target(sample()).items()}
    logits = torch.full((*target["visible"].shape, 2), far)

    def loss(pixels: float) -> float:
        moved = target["points"] + torch.tensor([pixels / target["side_px"].item(), 0.0])
        certain, doubting = (torch.cat([moved, logits[..., :1], sign * logits[..., 1:]], -1) for sign in (1, -1))
        return float(task.loss(certain, target) - task.loss(doubting, target))

    assert loss(5.9) < 0 < loss(6.1)


@pytest.mark.parametrize(("grid", "suits"), [((2, 4, 4), True), ((2, 3, 3), False), ((3, 4, 4), False)])
def test_a_linear_probe_of_depth_needs_tokens_of_whole_pixels(grid: tuple, suits: bool) -> None:
    encoder = SimpleNamespace(clip=(4, 64, 64), grid=grid)
    assert TASK["depth"].suits_probe(encoder) == suits and TASK["actions"].suits_probe(encoder)


def test_given_points_and_boxes_and_padded_tracks_are_not_measured() -> None:
    """They would be right: a track's first frame is given, and no padded track is predicted visible."""
    first = np.arange(T) == 0
    measured = measured_points(np.full((2, T, 2), 0.5, np.float32), np.ones((2, T), bool), np.array([first] * 2))
    assert measured["average_jaccard"] == (0.0, 1.0) and measured["occlusion_accuracy"] == (0.0, 2.0 * (T - 1))
    present = TASK["boxes"].target(sample())["present"]
    assert not present[:, 0].any() and present[:3, 1:].all()


def result(folder: Path, task: str, videos: list[str], sums: list[dict]) -> Result:
    (folder / "model.safetensors").write_bytes(b"")
    config = ReadoutConfig(folder, task, TASK[task], 0, None, None)
    return result_of(SimpleNamespace(name="e", parameters=1), config, "frozen", videos, sums)


def test_clips_of_one_video_make_one_jaccard_and_each_video_weighs_the_same(tmp_path: Path) -> None:
    points, seen = np.full((2, T, 2), 0.5, np.float32), np.ones((2, T), bool)
    right, wrong = measured_points(points, seen, seen), measured_points(points[:1], seen[:1], ~seen[:1])
    table = result(tmp_path, "points", ["a", "a", "b"], [right, wrong, wrong])
    assert table.value == pytest.approx((2 / 3 + 0) / 2)  # and not the mean of three clips, 1 / 3
    names = {"delta_avg", "occlusion_accuracy", "distance_px256"}
    assert set(table.others) == names | {f"{name}_standing_still" for name in (*names, "average_jaccard")}


def test_the_trivial_answer_to_points_is_that_they_stay_and_are_visible() -> None:
    points, seen = np.full((2, T, 2), 0.5, np.float32), np.ones((2, T), bool)
    points[1, 1:] = 0.9  # the second one moves far
    measured = measured_points(points, seen, ~seen)
    table = metrics.average_tracks_by_video({name: np.array([value]) for name, value in measured.items()})
    assert table["average_jaccard_standing_still"][0].tolist() == [pytest.approx(1 / 3), 1]  # one of two right, one wrong place
    assert table["average_jaccard"][0].tolist() == [0, 1]  # predicted right, and hidden


def test_a_video_in_which_nothing_is_measured_has_no_weight() -> None:
    points, seen = np.full((1, T, 2), 0.5, np.float32), (np.arange(T) == 0)[None]
    clips = measured_points(points, seen, seen), measured_points(points, seen, ~seen)  # in the second, hidden ones are shown
    table = metrics.average_tracks_by_video({name: np.array([clip[name] for clip in clips]) for name in clips[0]})
    assert table["average_jaccard"].tolist() == [[0, 0], [0, 1]]
    assert table["delta_avg"].tolist() == [[0, 0], [0, 0]] and table["occlusion_accuracy"].tolist() == [[1, 1], [0, 1]]


def test_a_metric_of_no_clip_is_left_out_and_the_primary_one_is_an_error(tmp_path: Path) -> None:
    nothing = (0.0, 0.0)
    with pytest.raises(UserError, match="^boxes: no clip of the val split can be measured by mean_iou$"):
        result(tmp_path, "boxes", ["v"], [{"mean_iou": nothing, "mean_iou_per_object": nothing}])
    measured = result(tmp_path, "boxes", ["v"], [{"mean_iou": (1.0, 2.0), "mean_iou_per_object": nothing}])
    assert (measured.value, measured.low, measured.high, measured.others) == (0.5, 0.5, 0.5, {})


def test_intervals_hold_the_mean_and_shrink_with_more_videos() -> None:
    widths = []
    for videos in (20, 2000):
        sums = seeds.numpy_rng(0, "sums").uniform(size=videos)
        low, high = metrics.interval(sums, np.ones(videos), seeds.numpy_rng(0, "draws"), draws=500)
        assert low < sums.mean() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_pose_is_that_of_the_last_camera_in_the_first() -> None:
    """A camera that turns left by 90 degrees and then moves on: seen from the first, it moved to the left."""
    to_world = np.tile(np.eye(4), (T, 1, 1))
    to_world[:, :3, 3] = [5.0, 0.0, 7.0]  # the path starts anywhere
    left = np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]])
    to_world[1:, :3, :3] = left
    to_world[2:, :3, 3] += left @ [0, 0, 2.0]
    pose = TASK["pose"].target(Sample("s", "v", sample().pixels, {"camera_to_world": to_world}))["pose"]
    assert np.allclose(pose[:, :3], left) and np.allclose(pose[:, 3], [-2, 0, 0])
    measured = TASK["pose"].measure(np.eye(3, 4), {"pose": pose})
    assert measured["translation_error"] == (2.0, 1.0) and measured["epe"] == measured["epe_standing_still"]


def test_depth_patches_land_where_they_belong() -> None:
    head, features = head_of(TASK["depth"]), features_of(1)
    patch = head(features)[0, 1 * 4 + 0 * 2 + 1].reshape(2, 8, 8)  # Q 128, queries over t h w
    predicted = TASK["depth"].predict(head, features, targets_of(TASK["depth"], 1))[0]
    assert torch.equal(predicted[2:4, 0:8, 8:16], patch + 3.0)


@pytest.mark.parametrize("name", list(MORE))
def test_more_objects_are_evaluated_than_learned_and_each_by_itself(name: str) -> None:
    task, mask, objects = MORE[name]
    head, features, target = head_of(task), features_of(1), task.target(sample())
    assert target[mask].reshape(objects, -1).any(1).all() and len(task.train_target(sample())[mask]) == 2
    chunks = task.predict(head, features, collate([target])).detach()
    at_once = TASK[name].predict(head, features, targets_of(TASK[name], 1))[:, :objects].detach()
    assert chunks.shape[1] == objects and near(chunks, at_once)
    measured, expected = (task.measure(predicted[0].numpy(), target) for predicted in (chunks, at_once))
    learned = task.measure(chunks[0, :2].numpy(), task.train_target(sample()))
    for metric, (_, count) in measured.items():
        assert measured[metric] == pytest.approx(expected[metric], rel=1e-5) and count >= learned[metric][1]
    assert measured != learned


def test_a_batch_of_clips_with_few_and_many_objects_measures_each_as_if_it_were_alone() -> None:
    task, head, features, many = MORE["points"][0], head_of(MORE["points"][0]), features_of(2), sample(1)
    few = replace(many, labels={"points": many.labels["points"][:1]}, valid={"points": many.valid["points"][:1]})
    batch = collate([task.target(clip) for clip in (many, few)])
    predicted = task.predict(head, features, batch).detach().numpy()
    for n, clip in enumerate((many, few)):
        alone = task.predict(head, features[n : n + 1], collate([task.target(clip)]))[0].detach().numpy()
        measured = task.measure(predicted[n], {name: value[n].numpy() for name, value in batch.items()})
        assert measured == {name: pytest.approx(pair, rel=1e-5) for name, pair in task.measure(alone, task.target(clip)).items()}
