"""Pretraining a point, alone or with a teacher."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from nano import losses_of
from nearness import near
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scaling4d import artifacts, checkpoint, config
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.load import load_model
from scaling4d.mae.encoder import Method
from scaling4d.mae.masking import draw_masks
from scaling4d.mae.models import encoder_of
from scaling4d.pretrain import stage
from scaling4d.pretrain.settings import PretrainConfig, bind_point, bind_pretrain
from scaling4d.pretrain.stage import param_groups, pretrain, provenance_of
from scaling4d.pretrain.validate import picture
from scaling4d.records import UserError
from scaling4d.training import distributed
from scaling4d.training.optimizer import build_adamw
from scaling4d.training.parallelize import DTYPES

pytestmark = pytest.mark.integration


def start(pretraining: PretrainConfig) -> Method:
    """The model before its first step, with its teacher."""
    model = pretraining.build()
    model.to_empty(device="cpu")
    model.initialise(pretraining.seed)
    return model


def test_training_lowers_the_loss_and_writes_what_made_it(short: Callable) -> None:
    settings = short(60)
    folder = pretrain("nano", settings)
    lines, losses = (folder / "losses.jsonl").read_text().splitlines(), losses_of(folder)
    assert losses[-1] < 0.7 * losses[0]
    assert json.loads(lines[-1])["clips_seen"] == 60 * settings["pretrain"]["Training"]["batch"]
    saved, summary = Checkpoint.read(folder), json.loads((folder / "summary.json").read_text())
    assert saved.rate_hz == settings["clip"]["rate_hz"] and "60 steps" in (folder / "README.md").read_text()
    assert saved.step == 60 and saved.parameters == sum(p.numel() for p in encoder_of(load_model(folder)).parameters())
    assert summary["val_loss"] < losses[0] and summary["ranks"] == [[0, 2]]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["overrides"]["pretrain.Training.steps"] == 60 and len(provenance["inputs"]["clips"]) == 64
    operative = (folder / "operative_config.gin").read_text()
    assert "SimpleMAE.width = 16" in operative and "Runtime" not in operative and "Launch" not in operative
    (facts,) = Path(".runs").glob("pretrain-nano-*.json")
    assert {"runtime", "launch", "clips_per_s"} <= json.loads(facts.read_text()).keys()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(short: Callable, changed: Callable) -> None:
    short(4)
    shas = [checkpoint.weights_sha256(pretrain("nano", changed("seed", seed))) for seed in (0, 0, 1)]
    assert shas[0] == shas[1] != shas[2]


@pytest.mark.parametrize("compute", DTYPES)
def test_it_validates_under_way_and_draws_a_picture(short: Callable, compute: str) -> None:
    watched = {"Training.validate_every": 1, "Runtime.tensorboard": True}
    folder = pretrain("nano", short(3, **watched, **{"Training.compute": compute}))
    assert Checkpoint.read(folder).model == "SimpleMAE"
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]  # the last step's is the summary's
    assert all(Path(f".runs/pretrain-nano/filled-0000000{step}.png").is_file() for step in (1, 2, 3))
    last = json.loads((folder / "summary.json").read_text())["val_loss"]
    assert lines[0]["val_loss"] > last
    events = EventAccumulator(".runs/pretrain-nano").Reload()
    shown = {event.step: event.value for event in events.Scalars("val_loss")}
    assert shown == pytest.approx({line["step"]: line["val_loss"] for line in lines} | {3: last})
    assert {"loss", "lr", "grad", "rankme"} <= {*events.Tags()["scalars"]}


def test_events_without_their_package_are_refused_before_the_training(short: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = short(3, **{"Runtime.tensorboard": True})
    monkeypatch.setattr("scaling4d.pretrain.settings.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^pretrain.Runtime.tensorboard = true, and tensorboard is not installed; needed"):
        pretrain("nano", settings)


def test_a_student_learns_its_teachers_features_and_keeps_no_teacher(changed: Callable) -> None:
    teacher = pretrain("nano", changed("pretrain.Training.steps", 4))
    folder = pretrain("nano_distilled", changed("pretrain.Training.steps", 60))
    losses = losses_of(folder)
    assert losses[-1] < 0.8 * losses[0]
    student, pretraining = load_model(folder), bind_pretrain("nano_distilled", config.read())
    taught = start(pretraining)  # with its teacher, which a loaded student has not
    pixels, masked = next(stage._batches(replace(pretraining, seed=1), taught, 0, 1, 0)).inputs
    with torch.no_grad():
        predicted, target = student.predict(pixels, masked), taught.target(pixels, masked)
        others = taught.target(pixels.roll(1, 0), masked)  # the same places in other clips
    assert (predicted - target).square().mean() < 0.9 * (predicted - others).square().mean()
    assert not [name for name in student.state_dict() if "teacher_encoder" in name]
    shapes, teacher_shapes = (
        {name: p.shape for name, p in encoder_of(model).named_parameters()} for model in (student, load_model(teacher))
    )
    assert shapes == teacher_shapes
    inputs = json.loads((folder / "provenance.json").read_text())["inputs"]
    assert inputs["teacher"] == artifacts.sha256(teacher)


def test_the_target_is_the_teachers_feature_of_the_same_token_in_sight_of_the_whole_clip(changed: Callable) -> None:
    teacher = encoder_of(load_model(pretrain("nano", changed("pretrain.Training.steps", 4))))
    model = start(bind_pretrain("nano_distilled", config.read()))
    clip = torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8)
    masked = draw_masks(model.mask_generator(), 0, 0, first=0, count=2)
    target, layer = model.target(clip, masked), teacher.features(clip)[model.config.teacher_layer]
    for b in range(2):
        for k, token in enumerate(masked.ids_keep[b].tolist()):
            x = layer[b, token]
            assert near(target[b, k], (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt())


def test_a_teacher_computes_in_the_dtype_of_the_run(short: Callable, changed: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain("nano", short(4))
    parallelize, dtypes = stage.parallelize, Path("dtypes")

    def note(model: Method, *arguments: object, **named: object) -> None:
        dtypes.write_text(str({p.dtype for teacher in model.teacher_encoder for p in teacher.parameters()}))
        parallelize(model, *arguments, **named)

    monkeypatch.setattr(stage, "parallelize", note)
    folder = pretrain("nano_distilled", changed("pretrain.Training.compute", "bfloat16"))
    assert dtypes.read_text() == str({DTYPES["bfloat16"]})
    assert json.loads((folder / "summary.json").read_text())["val_loss"] < 2


def test_a_teacher_that_is_missing_or_does_not_fit_is_refused(short: Callable, changed: Callable) -> None:
    key = "distilled.nano_distilled.model.Distilled"
    with pytest.raises(UserError, match="nobody is not a checkpoint"):
        pretrain("nano_distilled", changed(f"{key}.teacher", "nobody"))
    pretrain("nano", short(2))
    changed(f"{key}.teacher", "nano")
    with pytest.raises(UserError, match=r"teacher nano has width 16, grid \(8, 8, 8\), 3 layers; needed width 288, grid"):
        pretrain("nano_distilled", changed(f"{key}.teacher_width", 288))


def test_a_picture_shows_the_clip_its_visible_patches_and_the_model_of_all_of_it(project: Path) -> None:
    pretraining = bind_pretrain("nano", config.read())
    true, visible, filled = picture(start(pretraining), pretraining).split(64)
    shown = visible != 0
    assert torch.equal(visible[shown], true[shown]) and 0.01 < shown.float().mean() < 0.2
    assert filled.shape == true.shape == (64, 4 * 64, 3) and not torch.equal(filled, true)


@pytest.mark.parametrize(("ranks", "clips"), [(1, 24), (2, 24), (4, 24), (3, 9), (8, 8)])
def test_masks_do_not_depend_on_the_ranks(project: Path, ranks: int, clips: int) -> None:
    model, share = bind_pretrain("nano", config.read()).build(), clips // ranks
    parts = [draw_masks(model.mask_generator(), 7, 3, first=rank * share, count=share).ids_keep for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), draw_masks(model.mask_generator(), 7, 3, first=0, count=clips).ids_keep)
    rows = {tuple(row) for part in parts for row in part.tolist()}
    assert len(rows) == clips
    assert not rows & {tuple(row) for row in draw_masks(model.mask_generator(), 7, 4, first=0, count=clips).ids_keep.tolist()}


def test_rates_of_matrices_fall_with_the_width() -> None:
    pretraining = bind_point("nano", config.compose(["profile=smoke"]))
    training, groups = pretraining.training, param_groups(pretraining.build(), pretraining)
    (matrices, matrix_rate), (embeddings, embedding_rate) = groups["matrices"], groups["embeddings"]
    assert matrix_rate == pytest.approx(training.rate_times_width / 16)
    assert embedding_rate == training.embedding_rate
    assert pretraining.fit.rate_setting == "pretrain.Training.rate_times_width"
    assert {name for name, _ in matrices} >= {"encoder.blocks.0.qkv.weight", "decoder.weight"}
    assert {name for name, _ in embeddings} >= {"encoder.patch_embedding.weight", "encoder.positions", "decoder.bias"}
    assert all(p.ndim == 2 for _, p in matrices)
    assert len(matrices) + len(embeddings) == len(list(pretraining.build().parameters()))


def test_one_rate_for_all_parameters_is_a_setting() -> None:
    one_rate = "pretrain.Training.rate_times_width=0.0"
    pretraining = bind_point("nano", config.compose(["profile=smoke", one_rate]))
    groups = param_groups(pretraining.build(), pretraining)
    assert [rate for _, rate in groups.values()] == [pretraining.training.embedding_rate] * 2
    assert pretraining.fit.rate_setting == "pretrain.Training.embedding_rate"


@pytest.mark.parametrize("decay_positions", [False, True])
def test_positions_and_tokens_decay_where_the_setting_says_so(decay_positions: bool) -> None:
    settings = config.compose(["profile=pocket", f"pretrain.Training.decay_positions={str(decay_positions).lower()}"])
    pretraining = bind_point("mae_st_tiny", settings)
    model, fit = pretraining.build().to_empty(device="cpu"), pretraining.fit
    groups, recipe = param_groups(model, pretraining), {"betas": fit.betas, "weight_decay": fit.weight_decay}
    adamw = build_adamw(groups, decay_positions=fit.decay_positions, **recipe)
    decayed = {id(p) for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1 and name.endswith("weight")}
    positions = ("temporal", "spatial", "class_token")
    places = {f"{where}.{name}" for where in ("encoder.positions", "decoder_positions") for name in positions}
    places |= {"encoder.class_token", "mask_token", "decoder_class_token"}
    assert names == matrices | (places if decay_positions else set())
    assert {name for name, p in model.named_parameters() if p.ndim == 1}.isdisjoint(names)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("points.nano.model.MAEST", {}, "points.nano.model has SimpleMAE, MAEST; needed exactly one of SimpleMAE, MAEST"),
    ("points.nano.Sharding.shards", 3, "points.nano, .+: 2 ranks do not divide into copies of 3 shards; set Sharding.+"),
    ("points.nano.Sharding.recompute", "some", "points.nano.Sharding: recompute = 'some'; needed none or block"),
    ("points.nano.Sharding.accumulate", 3, "points.nano, .+: a batch of 16 clips .+ 2 ranks in 3 microbatches each; .+"),
    ("pretrain.Training.batch", 7, "pretrain.Training: .*batch.* 7 .*does not divide among 2 ranks.+"),
    ("pretrain.Training.compute", "float8", "pretrain.Training: compute = 'float8'; needed .+; did you mean float32[?]"),
    ("pretrain.Training.log_every", 0, "pretrain.Training: log_every is 0; needed 1 or more"),
    ("pretrain.Training.probe_tasks", ["boxes"], "pretrain.Training: probe_tasks has 'boxes'; needed some of actions, depth"),
    ("pretrain.Training.probe_items", [-1, 4], r"pretrain.Training: probe_items = \[-1, 4\]; needed 0 or more each"),
    ("pretrain.Training.keep_best", "loss", "pretrain.Training: keep_best = 'loss'; needed , val_loss or rankme.*"),
    ("pretrain.Training.keep_best", "top1_linear", "pretrain.Training: keep_best = 'top1_linear'; needed .+"),
    ("pretrain.Training.short_side_px", -1, "pretrain.Training: short_side_px is -1; needed 0 or more"),
    ("pretrain.Training.short_side_px", 64,
     r"pretrain.Training.short_side_px = 64 crops whole pictures, and .+/clips holds encoded squares; "
     r"set clips.Curation.encode to false, or it to 0"),
    ("pretrain.Training.validate_every", 0,
     "pretrain.Training: keep_best is set and validate_every is 0; needed validate_every of 1 .+"),
    ("pretrain.Runtime.start_s", 0.0, "pretrain.Runtime: start_s is 0.0; needed more than 0"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused_in_one_line_before_a_rank_starts(
    changed: Callable, monkeypatch: pytest.MonkeyPatch, key: str, value: object, message: str
) -> None:
    monkeypatch.setattr(distributed, "run", lambda *_, **__: pytest.fail("a rank was started"))
    with pytest.raises(UserError, match=f"^{message}$"):
        pretrain("nano", changed(key, value))
    assert not list(Path(".resume").glob("*.partial-*"))


@pytest.mark.parametrize(("absent", "message"), [("clips.parquet", "no .+/clips.parquet"), ("shards", "clip .+: .+")])
def test_clips_that_are_not_there_are_named_with_what_to_do(short: Callable, absent: str, message: str) -> None:
    settings, path = short(2), Path("artifacts/smoke/clips") / absent
    aside = path.rename(path.with_name("aside"))
    try:
        with pytest.raises(UserError, match=f"^{message}; run `dvc repro clips`$"):
            pretrain("nano", settings)
    finally:
        aside.rename(path)


def test_a_run_is_what_it_was_when_it_began_whatever_happens_to_the_file_of_its_settings(short: Callable) -> None:
    pretraining = bind_pretrain("nano", short(2))
    provenance = provenance_of(pretraining)
    config.PARAMS.unlink()  # the project's fixture writes it again
    stage.start_ranks(pretraining, provenance)
    assert json.loads((pretraining.folder / "provenance.json").read_text()) == json.loads(json.dumps(provenance))
    assert provenance["inputs"]["clips"] == artifacts.sha256(pretraining.clips / "croissant.json")


def test_weights_without_space_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.+model.safetensors cannot be written: .+; free space there, and run the same .+$"):
        checkpoint.save_tensors(tmp_path / "nowhere/model.safetensors", {"a": torch.ones(1)})


def test_a_worker_that_draws_masks_imports_no_training(project: Path) -> None:
    masks = partial(draw_masks, bind_pretrain("nano", config.read()).build().mask_generator(), 7, first=0, count=2)
    code = "import pickle, sys; from scaling4d.clips import loader; masks = pickle.load(sys.stdin.buffer)(3)\n"
    code += "heavy = ('scaling4d.training', 'torch._inductor')\n"
    code += "print(masks.ids_keep.tolist(), [name for name in sys.modules if name.startswith(heavy)])"
    worker = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(masks), capture_output=True, check=True)
    assert worker.stdout.decode() == f"{masks(3).ids_keep.tolist()} []\n"
