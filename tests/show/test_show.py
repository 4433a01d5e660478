"""Pictures of predictions: drawn at the right places, the same bytes twice, and refusals."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from damage import REFUSED, SIZES, files_below
from nearness import near
from PIL import Image

from scaling4d import artifacts, checkpoint, config, seeds, video
from scaling4d.checkpoint import Checkpoint
from scaling4d.mae.encoder import PixelTokens, PixelTokensConfig
from scaling4d.readout import metrics
from scaling4d.readout.heads import Head, HeadConfig
from scaling4d.readout.protocols import HEAD, EvaluationConfig
from scaling4d.readout.tasks import TASKS
from scaling4d.readout.whitening import Whitening
from scaling4d.records import Result, Sample, UserError, write_json
from scaling4d.show import draw, stage
from scaling4d.show.predict import write_features
from scaling4d.show.trained import load_trained_readout
from scaling4d.studies.words import WORDS

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
    valid = {"boxes": (1, T), "depth_m": (T, SIDE, SIDE), "points": (1, T), "camera_to_world": (T,)}
    return Sample(
        id="s",
        video="v",
        pixels=np.full((T, SIDE, SIDE, 3), 90, np.uint8),
        labels={name: changes.get(name, value) for name, value in labels.items()},
        valid={name: changes.get(f"{name}_valid", np.ones(shape, bool)) for name, shape in valid.items()},
    )


def where(picture: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """bool `H W`: pixels of exactly this colour."""
    return (picture == colour).all(-1)


def extent(mask: np.ndarray) -> list[float]:
    """x1 y1 x2 y2 in 0..1 of the true pixels."""
    y, x = np.nonzero(mask)
    return [x.min() / mask.shape[1], y.min() / mask.shape[0], (x.max() + 1) / mask.shape[1], (y.max() + 1) / mask.shape[0]]


def pictures_of(panels: list[draw.Panel], name: str) -> np.ndarray:
    return next(panel.pictures for panel in panels if panel.name == name)


def test_a_clip_is_enlarged_pixel_by_pixel() -> None:
    pixels = seeds.numpy_rng(0, "pixels").integers(0, 256, (T, SIDE, SIDE, 3), dtype=np.uint8)
    large = draw.enlarge(pixels)
    assert large.shape == (T, 192, 192, 3)
    assert (large[:, ::12, ::12] == pixels).all() and (large[:, 11::12, 11::12] == pixels).all()
    assert draw.enlarge(np.zeros((T, 224, 224, 3), np.uint8)).shape == (T, 224, 224, 3)


def test_boxes_are_drawn_at_their_places() -> None:
    clip, moved = sample(), np.full((1, T, 4), [0.0625, 0.0, 0.25, 0.2], np.float32)
    panels = draw.boxes(clip, {"a": moved})
    for t in range(T):
        assert np.allclose(extent(where(pictures_of(panels, "truth")[t], draw.hue(0, 1))), clip.labels["boxes"][0, t], atol=0.02)
    predicted = pictures_of(panels, "a")
    assert np.allclose(extent(where(predicted[2], draw.hue(0, 1))), moved[0, 2], atol=0.02)
    assert np.allclose(extent((predicted[2] > 160).all(-1)), clip.labels["boxes"][0, 2], atol=0.03)  # dashes
    assert not where(predicted[0], draw.hue(0, 1)).any()  # the first box is given, not predicted


def test_boxes_without_label_are_not_drawn_and_padded_or_inverted_ones_do_no_harm() -> None:
    labelled = np.array([[True, False, True, True]])
    panels = draw.boxes(sample(boxes_valid=labelled), {"a": sample().labels["boxes"]})
    assert (pictures_of(panels, "truth")[1] == 90).all() and (pictures_of(panels, "a")[1] == 90).all()
    assert not (pictures_of(panels, "truth")[2] == 90).all()
    padded = np.concatenate([sample().labels["boxes"], np.zeros((3, T, 4), np.float32)])
    one, other = (pictures_of(draw.boxes(sample(), {"a": given}), "a") for given in (padded, padded[:1]))
    assert (one == other).all()
    draw.boxes(sample(), {"a": np.full((1, T, 4), [0.9, 0.9, 0.1, np.float32(0.2)], np.float32)})


def test_a_perfect_depth_has_no_error_and_the_colours_of_the_truth() -> None:
    clip = sample()
    clip.labels["depth_m"][:, :8] = 4.0
    panels = draw.depth(clip, {"a": clip.labels["depth_m"]}, near_m=1.0, far_m=5.0)
    assert where(pictures_of(panels, "a: error"), draw.coloured("inferno", np.zeros(1))[0]).all()
    assert (pictures_of(panels, "a") == pictures_of(panels, "true depth")).all()
    assert (pictures_of(panels, "a")[0, 0, 0] == draw.coloured("turbo", np.array([0.75]))[0]).all()


def test_depth_errors_are_relative_and_unmeasured_pixels_are_grey() -> None:
    known = np.ones((T, SIDE, SIDE), bool)
    known[:, 3, 5] = False
    wrong = sample().labels["depth_m"] * 1.25
    error = pictures_of(draw.depth(sample(depth_m_valid=known), {"a": wrong}, near_m=1.0, far_m=5.0), "a: error")
    assert (error[:, 3 * 12, 5 * 12] == draw.UNKNOWN).all()
    none, quarter = draw.coloured("inferno", np.array([0.0, 0.25 / draw.WORST]))
    assert (error[:, 0, 0] == quarter).all() and (none != quarter).any()


def test_points_are_discs_where_visible_and_rings_where_hidden() -> None:
    clip = sample()
    truth, visible = clip.labels["points"], np.array([[True, True, True, False]])
    panels = draw.points(clip, {"a": (truth, visible)})
    colour = draw.hue(0, 1)
    for t in range(T):
        x, y = (192 * truth[0, t]).astype(int)
        assert where(pictures_of(panels, "truth")[t], colour)[y, x]
        assert where(pictures_of(panels, "a")[t], colour)[y, x - 3 : x + 4].any()
    ring = pictures_of(draw.points(clip, {"a": (truth + 0.2, visible)}), "a")[3]
    x, y = (192 * (truth[0, 3] + 0.2)).astype(int)
    assert not where(ring, colour)[y + 1, x + 1] and where(ring, colour)[y - 5 : y + 6, x - 5 : x + 6].any()


def test_a_point_leaves_a_trail_and_a_line_leads_to_the_truth() -> None:
    clip, visible = sample(), np.ones((1, T), bool)
    aside = clip.labels["points"] + np.array([0, 0.25], np.float32)
    picture = pictures_of(draw.points(clip, {"a": (aside, visible)}), "a")[3]
    left, _, right, _ = extent(where(picture, draw.hue(0, 1)))
    assert left < 0.27 and right > 0.62  # from the given place in the first frame to the last
    x1, y1, x2, y2 = extent((picture > 160).all(-1))  # the line is thinner than two pixels
    assert abs(x1 - 0.625) < 0.02 and abs(x2 - 0.625) < 0.02 and abs(y1 - 0.5) < 0.02 and y2 > 0.7
    hidden = sample(points_valid=np.array([[True, True, True, False]]))
    assert not (pictures_of(draw.points(hidden, {"a": (aside, visible)}), "a")[3] > 160).all(-1).any()


def pose(*, forward: float = 0.0, right: float = 0.0) -> np.ndarray:
    """`3 4`: a camera that looks along z."""
    return np.concatenate([np.eye(3), [[right], [0], [forward]]], 1)


def test_a_camera_that_moves_forward_goes_up_from_above_and_right_from_the_side() -> None:
    panels = draw.pose(sample(), {"a": pose(forward=T - 1)})
    for name, axis in (("from above", 0), ("from the side", 1)):
        first, last = (where(pictures_of(panels, name)[t], draw.TRUE) for t in (0, -1))
        y, x = np.nonzero(last)
        assert np.ptp((y, x)[axis]) > 2 * np.ptp((x, y)[axis])
        start, end = np.argwhere(first).mean(0)[axis], np.argwhere(last & ~first).mean(0)[axis]
        assert end < start if axis == 0 else end > start


def test_a_predicted_camera_covers_the_true_one_where_it_is_right_and_lies_beside_it_where_not() -> None:
    right, wrong = pose(forward=T - 1), pose(forward=T - 1, right=2.0)
    exact, aside = (pictures_of(draw.pose(sample(), {"a": end}), "from above")[-1] for end in (right, wrong))
    assert where(exact, draw.COLOURS[0]).sum() < 0.2 * where(aside, draw.COLOURS[0]).sum()  # the true one is drawn over it
    assert np.argwhere(where(aside, draw.COLOURS[0]))[:, 1].max() > np.argwhere(where(aside, draw.TRUE))[:, 1].max()


def test_the_true_path_may_have_no_length() -> None:
    still = sample(camera_to_world=np.tile(np.eye(4), (T, 1, 1)))
    assert where(pictures_of(draw.pose(still, {"a": pose()}), "from above")[-1], draw.TRUE).any()


def test_bars_are_as_long_as_probabilities_and_the_true_class_is_never_left_out() -> None:
    classes = [f"Doing something of kind {i}" for i in range(9)]
    logits = np.array([5.0, -9, 4, 3, 2, 1, 0, -1, -2])
    panel = next(p for p in draw.actions(sample(), {"a": logits}, classes=classes) if p.name == "a")
    assert panel.still
    green, grey = where(panel.pictures[0], draw.COLOURS[2]), where(panel.pictures[0], (150, 150, 150))
    assert green.any() and np.nonzero(green)[1].max() <= 1  # true, and next to impossible
    longest, next_ = (grey[top + 6, :190].sum() for top in (0, round(192 / draw.CLASSES)))
    assert next_ / longest == pytest.approx(np.exp(-1), abs=0.02)


def test_the_likeliest_class_is_marked_right_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[tuple]] = []
    monkeypatch.setattr(draw, "_bars", lambda given, side: rows.append(given) or np.zeros((side, side, 3), np.uint8))
    draw.actions(sample(), {"a": np.array([2.0, 3, 1]), "b": np.array([3.0, 2, 1])}, classes=["x", "y", "z"])  # y is true
    assert [[(name, mark) for name, _, _, mark in one] for one in rows] == [
        [("y", "right"), ("x", ""), ("z", "")],
        [("x", "wrong"), ("y", "true"), ("z", "")],
    ]


def test_a_long_class_name_is_wrapped_inside_its_panel() -> None:
    font = draw._font(11)
    name = "Putting something that cannot actually stand upright upright on the table, so it falls on its side"
    lines = draw._wrapped(name, 288, font, lines=2)
    assert len(lines) == 2 and all(font.getlength(line) <= 288 for line in lines) and lines[-1].endswith("side")
    assert draw._wrapped("short", 288, font, lines=2) == ["short"]
    cut = draw._wrapped(name, 150, font, lines=2)
    assert cut[-1].endswith("…") and all(font.getlength(line) <= 150 for line in cut)


def test_no_text_is_cut_off_at_the_edge_of_a_page() -> None:
    small = np.zeros((10, 10, 3), np.uint8)
    words = "a long line that is much wider than the picture below it " * 3
    page = draw.page(words, [words], [draw.block(words, [[(words, small)]])], [words], [(words, small)])
    assert page.shape[0] % 2 == 0 and page.shape[1] % 2 == 0
    assert (page[:, -draw.MARGIN + 2 :] == 255).all() and (page[:, draw.MARGIN + 400] != 255).any()


# ---- the stage, and predictions of trained readouts ----


@pytest.fixture(scope="module")
def drawn_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two encoders of raw pixels, and untrained readouts of all tasks."""
    folder = tmp_path_factory.mktemp("project")
    with contextlib.chdir(folder):
        Path("experiments").symlink_to(ROOT / "experiments")
        Path("data").mkdir()
        Path("data/benchmarks").symlink_to(ROOT / "experiments/pocket/benchmarks")
        config.write(["profile=smoke"])
        encoder = PixelTokensConfig(clip=(8, SIDE, SIDE), patch=(2, 8, 8), pixel_mean=0.45, pixel_scale=4.0)
        for seed, name in enumerate(("pixels", "other")):
            (HOME / "pretrain" / name).mkdir(parents=True)
            Checkpoint(name, "PixelTokens", asdict(encoder), 0, 0, 0).write(HOME / "pretrain" / name, {})
            for task in TASKS:
                write_readout(readout(task, name), name, task, PixelTokens(encoder), seed)
    return folder


@pytest.fixture
def project(drawn_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder."""
    folder = tmp_path / "project"
    shutil.copytree(drawn_once, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def write_readout(folder: Path, encoder: str, name: str, model: PixelTokens, seed: int) -> None:
    folder.mkdir(parents=True)
    keys = ["profile", "readout.Head", "readout.Evaluation", f"readout.tasks.{name}"]
    bound = config.bind(config.read(), keys, HeadConfig, EvaluationConfig, TASKS[name])
    task, whitening = bound[TASKS[name]], Whitening.identity(model.width)
    head = Head(bound[HeadConfig], task.queries(model.clip), features_width=model.width, frames=model.clip[0])
    head.initialise(seed)
    tensors = head.state_dict() | {"whitening.matrix": whitening.matrix, "whitening.offset": whitening.offset}
    checkpoint.save_tensors(folder / HEAD, tensors)
    write_json(folder / "provenance.json", {"settings": bound.declared})
    sha256, metric = checkpoint.weights_sha256(HOME / "pretrain" / encoder), task.metric
    words = (encoder, 0, name, "frozen", metric.name, 0.5, 0.4, 0.6, metric.unit, metric.higher_is_better)
    Result(*words, examples=28, seed=0, checkpoint_sha256=sha256).write(folder / "result.json")


def readout(task: str, encoder: str = "pixels") -> Path:
    return HOME / "readout" / encoder / task / "frozen"


@pytest.mark.integration
@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_gives_a_sheet_and_a_video_and_the_same_bytes_twice(project: Path, task: str) -> None:
    both = [readout(task), readout(task, "other") / "result.json"]
    shown = config.read()["show"]
    named, default = stage.show(both, Path("shown/a"), clips=shown["clips"], frames=shown["frames"]), stage.show(both, None)
    assert default == Path(f"shown/pixels-other-{task}") and artifacts.sha256(named) == artifacts.sha256(default)
    assert {path.name for path in named.iterdir()} == {"sheet.png", "clips.mp4", "provenance.json", "operative_config.gin"}
    _, pictures = video.decode_all(Path("shown/a/clips.mp4"))
    assert len(pictures) == 8 and pictures[0].std() > 10 and (pictures[0] != pictures[-1]).any()
    assert np.asarray(Image.open("shown/a/sheet.png")).std() > 10
    provenance = json.loads(Path("shown/a/provenance.json").read_text())
    assert provenance["inputs"][f"readout/other/{task}/frozen"] == artifacts.sha256(readout(task, "other"))
    assert set(provenance["inputs"]) >= {"pretrain/pixels", "pretrain/other", "benchmark"} and provenance["settings"] == {}
    assert f"{task.title()}.rate_hz" in Path("shown/a/operative_config.gin").read_text()


def test_the_value_beside_a_clip_is_the_metric_of_the_drawn_prediction(project: Path) -> None:
    loaded = load_trained_readout(readout("pose"))
    for clip in stage.choose_samples(loaded, 5):
        predicted, (total, count) = stage.predict(loaded, clip)
        true = metrics.relative_pose(clip.labels["camera_to_world"], source=0, target=-1)
        assert total / count == pytest.approx(metrics.pose_end_point_error(predicted.astype(float), true), rel=1e-5)


@pytest.mark.parametrize("task", list(TASKS))
def test_a_page_has_words_for_metrics_and_drawn_clips(project: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    empty = np.zeros((2, 2, 3), np.uint8)
    monkeypatch.setattr(stage.draw, "page", lambda title, lines, *rest: texts.extend([title, *lines]) or empty)
    monkeypatch.setattr(stage.draw, "block", lambda heading, rows: texts.append(heading))
    monkeypatch.setattr(stage.video, "encode", lambda *arguments, **options: None)
    loaded = load_trained_readout(readout(task))
    (clip,) = stage.choose_samples(loaded, 1)
    stage.write_pictures(Path(), [clip], {"raw pixels": loaded}, 2)
    heading, title, line, *_ = texts
    assert WORDS[loaded.result.metric][0] in title and loaded.result.metric not in title.split() + line.split()
    assert "drawn by the seed" in title and line.startswith("raw pixels: 0.500 [")
    assert heading.startswith("clip 1   raw pixels ")
    assert (heading.split()[-1] in ("right", "wrong")) == (task == "actions")


@pytest.mark.parametrize("task", list(TASKS))
def test_features_of_a_trained_readout_come_with_its_predictions(project: Path, task: str) -> None:
    loaded = load_trained_readout(readout(task))
    (clip,) = stage.choose_samples(loaded, 1)
    np.save("clip.npy", clip.pixels[None])
    numbers = {"points": 2, "boxes": 4}.get(task)
    queries = Path("queries.npy") if numbers else None
    if numbers:
        np.save(queries, clip.labels[task][:, 0])
        needed = f"^readouts of {task} need objects of the first frame, Q {numbers}; correct --queries"
        with pytest.raises(UserError, match=needed):
            write_features(readout(task), Path("clip.npy"), Path("none.npz"), side_px=None, queries=None)
    else:
        np.save("given.npy", np.zeros((1, 2)))
        with pytest.raises(UserError, match="has no readout that takes queries; leave out --queries$"):
            write_features(readout(task), Path("clip.npy"), Path("none.npz"), side_px=None, queries=Path("given.npy"))
    names = write_features(readout(task), Path("clip.npy"), Path("out.npz"), side_px=None, queries=queries)
    assert names == ["layer_00", "last_hidden_state", "output"]
    predicted, _ = stage.predict(loaded, clip)
    output = np.load("out.npz")["output"][0]
    assert near(output, predicted[: len(output)])


def test_a_trained_readout_sees_a_video_at_the_rate_of_its_task(project: Path) -> None:
    loaded = load_trained_readout(readout("depth"))
    frames, height, width = loaded.encoder.clip
    pixels = np.zeros((4 * frames, height, width, 3), np.uint8) + (5 * np.arange(4 * frames, dtype=np.uint8))[:, None, None, None]
    stage.video.encode(Path("a.mp4"), pixels, rate_hz=4 * loaded.model.task.rate_hz, crf=1, gop=4)
    assert write_features(readout("depth"), Path("a.mp4"), Path("of_video.npz")) == ["layer_00", "last_hidden_state", "output"]
    np.save("shown.npy", pixels[None, ::4])
    write_features(readout("depth"), Path("shown.npy"), Path("of_array.npz"))
    of_video, of_array = (np.load(name)["layer_00"] for name in ("of_video.npz", "of_array.npz"))
    assert np.abs(of_video - of_array).max() < 3 / 255 * loaded.encoder.pixel_scale


def test_a_readout_below_another_name_of_its_encoder_is_loaded(project: Path) -> None:
    (HOME / "pretrain/best").symlink_to((HOME / "pretrain/pixels").resolve())
    shutil.copytree(readout("depth"), readout("depth", "best"))
    assert load_trained_readout(readout("depth", "best")).result.encoder == "pixels"


def test_clips_are_drawn_by_the_seed(project: Path) -> None:
    one, other = (load_trained_readout(readout("depth", encoder)) for encoder in ("pixels", "other"))
    ids = [sample.id for sample in stage.choose_samples(one, 3)]
    reseeded = replace(one, result=replace(one.result, seed=1))
    assert ids != [sample.id for sample in stage.choose_samples(reseeded, 3)]
    assert ids == [sample.id for sample in stage.choose_samples(other, 3)] and len(set(ids)) == 3
    for examples in (1, 5000):  # a video with queries in several frames counts as several examples, a damaged one as none
        counted = replace(one, result=replace(one.result, examples=examples))
        assert [sample.id for sample in stage.choose_samples(counted, 160)][:3] == ids


def change_result(**values: object) -> None:
    result = asdict(Result.read(readout("depth") / "result.json")) | values
    write_json(readout("depth") / "result.json", result)


def remove_setting(section: str, key: str) -> None:
    path = readout("depth") / "provenance.json"
    content = json.loads(path.read_text())
    del content["settings"][section][key]
    write_json(path, content)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda: change_result(protocol="finetune"), ".* was fine-tuned, and the tuned encoder is not kept; take .*"),
    (lambda: change_result(checkpoint_sha256="0" * 64), ".* trained on an encoder pixels that is no longer at .*"),
    (lambda: (readout("depth") / HEAD).write_bytes(b"no"), ".*head.safetensors is damaged: .*"),
    ((readout("depth") / HEAD).unlink, ".* is not the folder of a readout: it has no head.safetensors"),
    (lambda: (readout("depth") / "result.json").write_text("{"), ".* is not the folder of a readout: .*"),
    (lambda: remove_setting("readout.Evaluation", "ranks"), ".* made by another version, .*ranks.*; run `dvc repro`"),
    (lambda: shutil.rmtree(readout("depth")), ".* is not the folder of a readout: no result.json; needed one such as .*"),
    (lambda: Path("out").mkdir(), "out exists; choose another name or remove it"),
])  # fmt: skip
def test_readouts_that_cannot_be_shown_are_refused_in_one_line(project: Path, spoil: Callable[[], object], message: str) -> None:
    spoil()
    existed = Path("out").exists()
    with pytest.raises(UserError) as caught:
        stage.show([readout("depth")], Path("out"), clips=1, frames=2)
    assert re.fullmatch(message, str(caught.value)) and "\n" not in str(caught.value)
    assert Path("out").exists() == existed


def test_readouts_that_answer_different_questions_are_not_shown_together(project: Path) -> None:
    for other in (readout("pose"), readout("depth")):
        with pytest.raises(UserError, match="show them one by one$|name each once$"):
            stage.show([readout("depth"), other], Path("out"), clips=1, frames=2)


@SIZES
def test_a_damaged_readout_is_loaded_or_refused(project: Path, endures: Callable, copies: int) -> None:
    folders = [readout("depth"), readout("points")]

    def read(path: Path) -> None:
        load_trained_readout(path.parent if path.parent in folders else folders[0])

    counts = endures("trained readouts", files_below(*folders, HOME / "pretrain/pixels"), read, copies)
    assert counts[REFUSED]
