"""Pictures of what readouts say: drawn where it is said, the same bytes twice, and refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scaling4d import artifacts, benchmarks, checkpoint, config, seeds, video
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.features import Standard
from scaling4d.mae.build import ENCODERS
from scaling4d.readout import metrics
from scaling4d.readout.train import HEAD, TASKS
from scaling4d.records import Result, Sample, UserError, write_json
from scaling4d.show import draw, show, trained

ROOT = Path(__file__).parents[2]
T, SIDE = 4, 16
HOME = Path("artifacts/smoke")


def sample(**changes: np.ndarray) -> Sample:
    """A grey clip with the labels of every task: a box and a point that move right, a camera that moves forward."""
    time = np.arange(T)
    left = 0.25 + 0.125 * time
    poses = np.tile(np.eye(4), (T, 1, 1))
    poses[:, 2, 3] = time
    labels = {
        "action": np.int64(1),
        "boxes": np.stack([left, 0 * left + 0.25, left + 0.25, 0 * left + 0.75], -1)[None].astype(np.float32),
        "depth_m": np.full((T, SIDE, SIDE), 2.0, np.float32),
        "points": np.stack([left, 0 * left + 0.5], -1)[None].astype(np.float32),
        "camera_to_world": poses,
    }
    valid = {
        "boxes": np.ones((1, T), bool),
        "depth_m": np.ones((T, SIDE, SIDE), bool),
        "points": np.ones((1, T), bool),
        "camera_to_world": np.ones(T, bool),
    }
    return Sample(
        id="s",
        video="v",
        pixels=np.full((T, SIDE, SIDE, 3), 90, np.uint8),
        labels=labels | {name: value for name, value in changes.items() if name in labels},
        valid=valid | {name.removesuffix("_valid"): value for name, value in changes.items() if name.endswith("_valid")},
    )


def where(picture: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """bool `H W`: pixels of exactly this colour."""
    return (picture == colour).all(-1)


def span(mask: np.ndarray) -> list[float]:
    """x1 y1 x2 y2 in 0..1 of what is set."""
    y, x = np.nonzero(mask)
    return [x.min() / mask.shape[1], y.min() / mask.shape[0], (x.max() + 1) / mask.shape[1], (y.max() + 1) / mask.shape[0]]


def one(panels: list[draw.Panel], name: str) -> np.ndarray:
    return next(panel.pictures for panel in panels if panel.name == name)


def test_a_clip_is_enlarged_pixel_by_pixel() -> None:
    pixels = seeds.numpy(0, "pixels").integers(0, 256, (T, SIDE, SIDE, 3), dtype=np.uint8)
    large = draw.enlarge(pixels)
    assert large.shape == (T, 192, 192, 3)
    assert (large[:, ::12, ::12] == pixels).all() and (large[:, 11::12, 11::12] == pixels).all()
    assert draw.enlarge(np.zeros((T, 224, 224, 3), np.uint8)).shape == (T, 224, 224, 3)


def test_boxes_are_drawn_where_they_lie() -> None:
    clip, moved = sample(), np.full((1, T, 4), [0.0625, 0.0, 0.25, 0.2], np.float32)
    panels = draw.boxes(clip, {"a": moved})
    for t in range(T):
        assert np.allclose(span(where(one(panels, "truth")[t], draw.hue(0, 1))), clip.labels["boxes"][0, t], atol=0.02)
    assert np.allclose(span(where(one(panels, "a")[2], draw.hue(0, 1))), moved[0, 2], atol=0.02)
    assert np.allclose(span((one(panels, "a")[2] > 160).all(-1)), clip.labels["boxes"][0, 2], atol=0.03)  # dashes
    assert not where(one(panels, "a")[0], draw.hue(0, 1)).any()  # the first box is given, not predicted


def test_a_thing_without_label_in_a_frame_is_not_drawn() -> None:
    there = np.array([[True, False, True, True]])
    panels = draw.boxes(sample(boxes_valid=there), {"a": sample().labels["boxes"]})
    assert (one(panels, "truth")[1] == 90).all() and (one(panels, "a")[1] == 90).all()
    assert not (one(panels, "truth")[2] == 90).all()


def test_boxes_that_were_padded_or_turned_inside_out_do_no_harm() -> None:
    padded = np.concatenate([sample().labels["boxes"], np.zeros((3, T, 4), np.float32)])
    assert (one(draw.boxes(sample(), {"a": padded}), "a") == one(draw.boxes(sample(), {"a": padded[:1]}), "a")).all()
    draw.boxes(sample(), {"a": np.full((1, T, 4), [0.9, 0.9, 0.1, np.float32(0.2)], np.float32)})


def test_a_perfect_depth_has_no_error_and_the_colours_of_the_truth() -> None:
    clip = sample()
    clip.labels["depth_m"][:, :8] = 4.0
    panels = draw.depth(clip, {"a": clip.labels["depth_m"]}, near_m=1.0, far_m=5.0)
    assert where(one(panels, "a: error"), draw.errors(np.zeros(1))[0]).all()
    assert (one(panels, "a") == one(panels, "true depth")).all()
    assert (one(panels, "a")[0, 0, 0] == draw.metres(np.array([4.0]), 1.0, 5.0)[0]).all()


def test_depth_errors_are_relative_and_the_unmeasured_is_grey() -> None:
    known = np.ones((T, SIDE, SIDE), bool)
    known[:, 3, 5] = False
    off = sample().labels["depth_m"] * 1.25
    error = one(draw.depth(sample(depth_m_valid=known), {"a": off}, near_m=1.0, far_m=5.0), "a: error")
    assert (error[:, 3 * 12, 5 * 12] == draw.UNKNOWN).all()
    assert (error[:, 0, 0] == draw.errors(np.array([0.25]))[0]).all()
    assert not (draw.errors(np.array([0.25]))[0] == draw.errors(np.zeros(1))[0]).all()


def test_points_are_discs_where_visible_and_rings_where_hidden() -> None:
    clip = sample()
    truth, seen = clip.labels["points"], np.array([[True, True, True, False]])
    panels = draw.points(clip, {"a": (truth, seen)})
    colour = draw.hue(0, 1)
    for t in range(T):
        x, y = (192 * truth[0, t]).astype(int)
        assert where(one(panels, "truth")[t], colour)[y, x]
        assert where(one(panels, "a")[t], colour)[y, x - 3 : x + 4].any()
    ring = one(draw.points(clip, {"a": (truth + 0.2, seen)}), "a")[3]
    x, y = (192 * (truth[0, 3] + 0.2)).astype(int)
    assert not where(ring, colour)[y + 1, x + 1] and where(ring, colour)[y - 5 : y + 6, x - 5 : x + 6].any()


def test_a_point_leaves_a_trail_and_a_line_leads_to_the_truth() -> None:
    clip = sample()
    aside = clip.labels["points"] + np.array([0, 0.25], np.float32)
    picture = one(draw.points(clip, {"a": (aside, np.ones((1, T), bool))}), "a")[3]
    left, _, right, _ = span(where(picture, draw.hue(0, 1)))
    assert left < 0.27 and right > 0.62  # from the given place in the first frame to the last
    x1, y1, x2, y2 = span((picture > 160).all(-1))  # the line is thinner than two pixels
    assert abs(x1 - 0.625) < 0.02 and abs(x2 - 0.625) < 0.02 and abs(y1 - 0.5) < 0.02 and y2 > 0.7
    hidden = sample(points_valid=np.array([[True, True, True, False]]))
    assert not (one(draw.points(hidden, {"a": (aside, np.ones((1, T), bool))}), "a")[3] > 160).all(-1).any()


def test_a_camera_that_moves_forward_goes_up_from_above_and_right_from_the_side() -> None:
    forward = np.eye(3, 4)
    forward[2, 3] = T - 1
    panels = draw.pose(sample(), {"a": forward}, true=forward)
    for name, axis in (("from above", 0), ("from the side", 1)):
        black = where(one(panels, name)[-1], draw.TRUE)
        y, x = np.nonzero(black)
        assert np.ptp((y, x)[axis]) > 2 * np.ptp((x, y)[axis])
        start = np.argwhere(where(one(panels, name)[0], draw.TRUE)).mean(0)[axis]
        end = np.argwhere(where(one(panels, name)[-1], draw.TRUE) & ~where(one(panels, name)[0], draw.TRUE)).mean(0)[axis]
        assert end < start if axis == 0 else end > start


def test_a_predicted_camera_lies_on_the_true_one_where_it_is_right_and_beside_it_where_not() -> None:
    right, wrong = np.eye(3, 4), np.eye(3, 4)
    right[2, 3] = wrong[2, 3] = T - 1
    wrong[0, 3] = 2.0
    exact = one(draw.pose(sample(), {"a": right}, true=right), "from above")[-1]
    aside = one(draw.pose(sample(), {"a": wrong}, true=right), "from above")[-1]
    assert where(exact, draw.COLOURS[0]).sum() < 0.2 * where(aside, draw.COLOURS[0]).sum()  # the true one is drawn over it
    assert np.argwhere(where(aside, draw.COLOURS[0]))[:, 1].max() > np.argwhere(where(aside, draw.TRUE))[:, 1].max()


def test_the_true_path_has_the_scale_of_the_answer() -> None:
    """A readout that learned directions alone is right where it ends after a way of length 1."""
    unit = np.eye(3, 4)
    unit[2, 3] = 1.0
    panels = draw.pose(sample(), {"a": unit}, true=unit)
    whole = draw.pose(sample(), {"a": np.concatenate([np.eye(3), [[0], [0], [T - 1]]], 1)}, true=(T - 1) * unit)
    assert (
        np.abs(one(panels, "from above")[-1][:160].astype(int) - one(whole, "from above")[-1][:160]).max() < 60
    )  # all but its unit


def test_a_camera_that_stands_still_can_be_drawn() -> None:
    still = np.tile(np.eye(4), (T, 1, 1))
    assert where(
        one(draw.pose(sample(camera_to_world=still), {"a": np.eye(3, 4)}, true=np.eye(3, 4)), "from above")[-1], draw.TRUE
    ).any()


def test_bars_are_as_long_as_probabilities_and_the_true_class_is_never_left_out() -> None:
    classes = [f"Doing something of kind {i}" for i in range(9)]
    logits = np.array([5.0, -9, 4, 3, 2, 1, 0, -1, -2])
    panel = next(p for p in draw.actions(sample(), {"a": logits}, classes=classes) if p.name == "a")
    assert panel.still
    green, grey = where(panel.pictures[0], draw.COLOURS[2]), where(panel.pictures[0], (150, 150, 150))
    assert green.any() and np.nonzero(green)[1].max() <= 1  # true, and next to impossible
    longest, next_ = (grey[top + 6, :190].sum() for top in (0, round(192 / draw.CLASSES)))
    assert next_ / longest == pytest.approx(np.exp(-1), abs=0.02)


def test_a_long_class_name_is_wrapped_and_never_runs_out_of_its_panel() -> None:
    font = draw._font(11)
    name = "Putting something that cannot actually stand upright upright on the table, so it falls on its side"
    lines = draw._wrapped(name, 288, font, lines=2)
    assert len(lines) == 2 and all(font.getlength(line) <= 288 for line in lines)
    assert draw._wrapped("short", 288, font, lines=2) == ["short"]
    assert draw._wrapped(name, 150, font, lines=2)[-1].endswith("…")


def test_no_text_is_cut_off_at_the_edge_of_a_page() -> None:
    small = np.zeros((10, 10, 3), np.uint8)
    words = "a long line that is much wider than the picture below it " * 3
    page = draw.page(words, [words], [draw.block(words, [[draw.Cell(words, small)]])], [words], [draw.Cell(words, small)])
    assert page.shape[0] % 2 == 0 and page.shape[1] % 2 == 0
    assert (page[:, -draw.MARGIN + 2 :] == 255).all() and (page[:, draw.MARGIN + 400] != 255).any()


# ---- the command ----


@pytest.fixture(scope="module")
def drawn_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two encoders of raw pixels and readouts of all tasks with weights as drawn, never trained."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("experiments").symlink_to(ROOT / "experiments")
        Path("data").mkdir()
        Path("data/benchmarks").symlink_to(ROOT / "experiments/pocket/benchmarks")
        config.write(["profile=smoke"])
        settings = config.read()
        made = {"clip": [8, SIDE, SIDE], "patch": [2, 8, 8], "pixel_mean": 0.45, "pixel_scale": 4.0}
        model = ENCODERS["PixelTokens"](**made)
        for seed, encoder in enumerate(("pixels", "other")):
            weights = HOME / "pretrain" / encoder
            weights.mkdir(parents=True)
            Checkpoint(encoder, "PixelTokens", made, 0, 0, 0).write(weights, model.state_dict())
            for task in TASKS:
                write_readout(HOME / "readout" / encoder / task / "frozen", encoder, task, settings, model, seed)
    return folder


@pytest.fixture
def project(drawn_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder."""
    folder = tmp_path / "project"
    shutil.copytree(drawn_once, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def write_readout(folder: Path, encoder: str, task: str, settings: dict, model: object, seed: int) -> None:
    folder.mkdir(parents=True)
    keys = ["profile", "readout.shared", f"readout.tasks.{task}"]
    mine = config.declared(settings, keys)
    config.bind(mine["readout.shared"], mine[f"readout.tasks.{task}"])
    asked = config.build(TASKS[task])
    head = asked.head(features_width=model.width, clip=model.clip)
    head.initialise(seed)
    standard = Standard.none(model.width)
    tensors = head.state_dict() | {"standard.matrix": standard.matrix, "standard.offset": standard.offset}
    checkpoint.save_tensors(folder / HEAD, tensors)
    write_json(folder / "provenance.json", {"settings": mine})
    primary = asked.primary
    sha = checkpoint.weights_sha256(HOME / "pretrain" / encoder)
    numbers = {"value": 0.5, "low": 0.4, "high": 0.6, "examples": 28, "seed": 0, "parameters": 0}
    Result(
        **numbers,
        encoder=encoder,
        task=task,
        protocol="frozen",
        metric=primary.metric,
        unit=primary.unit,
        higher_is_better=primary.higher_is_better,
        checkpoint_sha256=sha,
    ).write(folder / "result.json")


def readout(task: str, encoder: str = "pixels") -> Path:
    return HOME / "readout" / encoder / task / "frozen"


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_gives_a_sheet_and_a_video_and_the_same_bytes_twice(project: Path, task: str) -> None:
    both = [readout(task), readout(task, "other") / "result.json"]
    for name in ("a", "b"):
        show.show(both, Path("shown") / name, clips=2, ids=[], frames=3)
    names = {path.name for path in Path("shown/a").iterdir()}
    assert names == {"sheet.png", "clips.mp4", "provenance.json", "operative_config.gin"}
    assert artifacts.sha256(Path("shown/a")) == artifacts.sha256(Path("shown/b"))
    _, pictures = video.read(Path("shown/a/clips.mp4"))
    assert len(pictures) == 8 and pictures[0].std() > 10 and (pictures[0] != pictures[-1]).any()
    assert np.asarray(Image.open("shown/a/sheet.png")).std() > 10
    made = json.loads(Path("shown/a/provenance.json").read_text())
    assert made["inputs"][f"readout/other/{task}/frozen"] == artifacts.sha256(readout(task, "other"))
    assert set(made["inputs"]) >= {"pretrain/pixels", "pretrain/other", "benchmark"}
    assert f"{task.title()}.rate_hz" in Path("shown/a/operative_config.gin").read_text()


def test_the_value_beside_a_clip_is_the_metric_of_what_is_drawn(project: Path) -> None:
    one = trained.read(readout("pose"))
    samples = list(benchmarks.read("pose", Path("data/benchmarks"), "val", frames=8, rate_hz=8.0, side_px=SIDE))[:5]
    spoken = show._speak(one, samples)
    for clip, predicted, (total, count) in zip(samples, spoken.predicted, spoken.measured, strict=True):
        true = metrics.relative_pose(clip.labels["camera_to_world"], source=0, target=-1)
        assert total / count == pytest.approx(metrics.pose_end_point_error(predicted.astype(float), true), rel=1e-5)


def test_clips_are_drawn_by_the_seed_and_may_be_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    write = show._write
    monkeypatch.setattr(
        show, "_write", lambda out, samples, *rest: drawn.append([s.id for s in samples]) or write(out, samples, *rest)
    )
    show.show([readout("depth")], Path("a"), clips=3, ids=[], frames=2)
    show.show([readout("depth", "other")], Path("b"), clips=3, ids=[], frames=2)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3
    show.show([readout("depth")], Path("c"), clips=3, ids=drawn[0][::-1], frames=2)
    assert drawn[2] == drawn[0][::-1]
    with pytest.raises(UserError, match="^no clip 'nobody' in depth val; there are 28, such as scene"):
        show.show([readout("depth")], Path("d"), clips=3, ids=["nobody"], frames=2)
    assert not Path("d").exists()


def test_pictures_go_to_a_folder_named_after_what_they_show_unless_told(project: Path) -> None:
    made = show.show([readout("pose"), readout("pose", "other")], None, clips=1, ids=[], frames=1)
    assert made == Path("shown/pixels-other-pose") and (made / "sheet.png").is_file()


def change(folder: Path, **values: object) -> None:
    result = asdict(Result.read(folder / "result.json")) | values
    write_json(folder / "result.json", result)


def forget(section: str, key: str) -> None:
    path = readout("depth") / "provenance.json"
    made = json.loads(path.read_text())
    del made["settings"]["readout.shared"][section][key]
    write_json(path, made)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: change(readout("depth"), protocol="finetune"), ".* was fine-tuned, and the tuned encoder is not kept; take .*"),
        (
            lambda: change(readout("depth"), checkpoint_sha256="0" * 64),
            ".* trained on an encoder pixels that is no longer at .*",
        ),
        (lambda: (readout("depth") / HEAD).write_bytes(b"no"), ".*head.safetensors is damaged: .*"),
        (lambda: (readout("depth") / "result.json").write_text("{"), ".* is not the folder of a readout: .*"),
        (
            lambda: forget("Evaluation", "ranks"),
            ".* was made by another version, with other settings (.*ranks.*); run `dvc repro`",
        ),
        (lambda: shutil.rmtree(readout("depth")), ".* is not the folder of a readout: .*"),
        (lambda: Path("out").mkdir(), "out exists; choose another name or remove it"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(project: Path, spoil: Callable[[], object], message: str) -> None:
    spoil()
    there = Path("out").exists()
    with pytest.raises(UserError) as caught:
        show.show([readout("depth")], Path("out"), clips=1, ids=[], frames=2)
    assert re.fullmatch(message, str(caught.value)) and "\n" not in str(caught.value)
    assert Path("out").exists() == there


def test_readouts_that_answer_different_questions_are_not_shown_together(project: Path) -> None:
    for other in (readout("pose"), readout("depth")):
        with pytest.raises(UserError, match="show them one by one$|name each once$"):
            show.show([readout("depth"), other], Path("out"), clips=1, ids=[], frames=2)


def test_every_listed_clip_may_be_drawn_whatever_a_result_counts(project: Path) -> None:
    """A video in which points are asked about in several frames counts as several examples; damaged ones as none."""
    one = trained.read(readout("depth"))
    for examples in (1, 5000):
        counted = replace(one, result=replace(one.result, examples=examples))
        assert len(show._chosen(counted, 8, SIDE, 28, [])) == 28
        assert [s.id for s in show._chosen(counted, 8, SIDE, 3, [])] == [s.id for s in show._chosen(one, 8, SIDE, 3, [])]
