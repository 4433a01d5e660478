"""MAE-ST's fine-tuning classifier."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import small_encoder
import torch
from nearness import near
from small_encoder import learn
from small_tasks import TASK

from scaling4d import config, seeds
from scaling4d.encoders.stage import baseline
from scaling4d.mae.encoder import initialise
from scaling4d.readout.classifier import ClassifierModel, MeanPoolClassifier, layer_decay_groups, mix_clips, random_rectangle
from scaling4d.readout.protocols import Classifier, ClassifierConfig, ReadoutConfig
from scaling4d.readout.stage import readout
from scaling4d.records import UserError

pytestmark = pytest.mark.integration

ACTIONS = torch.tensor([0, 3, 4, 1])
RECIPE = ClassifierConfig(
    steps=8,
    batch=4,
    learning_rate=1e-3,
    warmup_steps=1,
    repeats=1,
    randaugment=0.0,
    crop=(1.0, 1.0),
    aspect=(1.0, 1.0),
    erasing=0.0,
    dropout=0.5,
    layer_decay=0.75,
    drop_path=0.2,
    per_encoder={},
)
SHAPE = {"clip": (4, 16, 16), "patch": (2, 8, 8), "pixel_mean": 0.0, "pixel_scale": 1.0}


def small_model() -> ClassifierModel:
    head = MeanPoolClassifier(width=24, classes=5, dropout=0.0)
    model = ClassifierModel(small_encoder.model("Backbone", **SHAPE), head)
    initialise(model, seed=0)
    return model


def clips() -> torch.Tensor:
    return torch.randint(0, 256, (4, 4, 16, 16, 3), dtype=torch.uint8, generator=seeds.torch_rng(0, "clips"))


class SameBatch(list):
    """A training set whose batches are all alike."""

    def batch(self, indices: list[int], epochs: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return clips(), {"action": ACTIONS}


def test_smoothing_gives_every_class_its_share() -> None:
    _, labels = mix_clips(clips(), torch.zeros(4, dtype=torch.long), 5, seeds.numpy_rng(0, "mix"))
    assert torch.allclose(labels, torch.tensor([0.92, 0.02, 0.02, 0.02, 0.02]).expand(4, 5))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_classes_are_mixed_as_the_pixels_are(kind: str) -> None:
    black_and_white = torch.cat([torch.zeros(1, 4, 16, 16, 3), torch.full((1, 4, 16, 16, 3), 255.0)]).to(torch.uint8)
    only, lams = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0} | {kind: 1.0}, set()
    for draw in range(20):
        x, labels = mix_clips(black_and_white, torch.tensor([0, 1]), 2, seeds.numpy_rng(0, "mix", draw), **only)
        assert near(x.mean((1, 2, 3, 4)), labels[:, 1])
        assert torch.equal(x, x[:, :1].expand_as(x))  # all frames alike
        assert (kind == "cutmix") == bool(((x == 0) | (x == 1)).all())
        lams.add(round(labels[0, 0].item(), 3))
    assert len(lams) > 10


def test_clips_are_mixed_anew_for_every_rank_and_step_and_alike_when_a_step_is_repeated() -> None:
    protocol, train_set = protocol_of(), SameBatch([None] * 4)
    mixed = [protocol.batch(train_set, rank, step).inputs[0] for rank, step in ((0, 3), (0, 3), (0, 4), (1, 3))]
    assert [torch.equal(mixed[0], other) for other in mixed[1:]] == [True, False, False]


class Windows(list):
    """A training set that notes which windows are read."""

    def batch(self, indices: list[int], epochs: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.read = list(zip(indices, epochs, strict=True))
        pixels = torch.randint(0, 256, (len(indices), 4, 16, 16, 3), dtype=torch.uint8, generator=seeds.torch_rng(0, "clips"))
        return pixels, {"action": torch.tensor(indices) % 5}


def protocol_of(**changes: object) -> Classifier:
    task, recipe = replace(TASK["actions"], classes=5), replace(RECIPE, **changes)
    return Classifier(ReadoutConfig(None, "actions", task, 0, SimpleNamespace(ranks=1), recipe))


def test_copies_of_a_video_follow_one_another_in_windows_that_no_other_epoch_shows() -> None:
    protocol, train_set, seen = protocol_of(batch=6, repeats=3), Windows([None] * 4), []
    for step in range(4):  # two passes over four videos
        protocol.batch(train_set, 0, step)
        pairs = [train_set.read[:3], train_set.read[3:]]
        assert all(len({index for index, _ in pair}) == 1 for pair in pairs)
        seen += train_set.read
    assert sorted(seen) == [(index, window) for index in range(4) for window in range(6)]


def test_each_clip_is_augmented_by_its_own_draw_of_rank_step_and_place() -> None:
    changes = {"randaugment": 7.0, "crop": (0.08, 1.0), "aspect": (0.75, 1.3333), "erasing": 0.25}
    augmented, train_set = protocol_of(**changes), Windows([None] * 4)
    mixed = [augmented.batch(train_set, rank, step).inputs[0] for rank, step in ((0, 3), (0, 3), (0, 4), (1, 3))]
    assert [torch.equal(mixed[0], other) for other in mixed[1:]] == [True, False, False]
    assert not torch.equal(mixed[0], protocol_of().batch(train_set, 0, 3).inputs[0])


def test_a_rectangle_lies_in_the_picture_and_has_about_its_share_when_inside() -> None:
    areas = []
    for draw in range(200):
        (top, left), (bottom, right) = random_rectangle(40, 60, 0.25, seeds.numpy_rng(0, "cut", draw))
        assert 0 <= top <= bottom <= 40 and 0 <= left <= right <= 60
        areas.append((bottom - top) * (right - left) / 2400)
    assert 0.22 < max(areas) < 0.28 and min(areas) < 0.15


def test_learning_rates_fall_from_the_head_to_the_patches_and_no_parameter_is_left_out() -> None:
    model = small_model()
    groups = layer_decay_groups(model, 1e-3, 0.75)
    assert list(groups) == ["head", "block_2", "block_1", "block_0", "embedding"]
    assert np.allclose([rate / 1e-3 for _, rate in groups.values()], [0.75**n for n in range(5)])
    assert sum(p.numel() for named, _ in groups.values() for _, p in named) == sum(p.numel() for p in model.parameters())


def test_an_encoder_has_its_own_layer_decay_and_drop_path() -> None:
    recipe = replace(RECIPE, per_encoder={"small": {"layer_decay": 0.5, "drop_path": 0.1}})
    assert Classifier.recipe_of(recipe, "other") == replace(RECIPE, layer_decay=0.75, drop_path=0.2)
    protocol = protocol_of(**vars(Classifier.recipe_of(recipe, "small")))
    model = protocol.build(small_model().encoder, [])
    assert [block.drop_path for block in model.encoder.blocks] == [0.0, 0.05, 0.1]
    rates = [rate for _, rate in protocol.param_groups(model).values()]
    assert np.allclose(rates, [1e-3 * 0.5**n for n in range(5)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_decay": 1.5}, "per_encoder.small: layer_decay is 1.5; needed 0 to 1"),
        ({"drop_paths": 0.1}, "unknown setting per_encoder.small.drop_paths = 0.1; did you mean drop_path?"),
    ],
)
def test_a_recipe_of_an_encoder_that_does_not_fit_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(RECIPE, per_encoder={"small": changes})


def test_a_dropped_branch_is_left_out_for_some_clips_in_training_only_and_the_others_make_up_for_it() -> None:
    block, x = small_model().encoder.blocks[0], torch.randn(4000, 2, 24, generator=seeds.torch_rng(0, "x"))
    block.drop_path = 0.25
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(block.eval()._drop_path(x), x)
        dropped = block.train()._drop_path(x)
    left_out = (dropped == 0).all(-1).all(-1)
    assert 0.22 < left_out.float().mean() < 0.28
    assert torch.allclose(dropped[~left_out], x[~left_out] / 0.75)


def test_the_classifier_starts_from_the_encoders_last_norm_and_nearly_equal_scores() -> None:
    head = MeanPoolClassifier(width=24, classes=5, dropout=0.5)
    encoder = small_encoder.model("MAESTEncoder", depth=1, **SHAPE)
    torch.nn.init.normal_(encoder.norm.weight, generator=seeds.torch_rng(0, "norm"))
    head.initialise(encoder, 0)
    assert torch.equal(head.norm.weight, encoder.norm.weight)
    assert 1e-5 < head.linear.weight.std() < 3e-5 and not head.linear.bias.any()


@pytest.mark.parametrize(("task", "protocol", "message"), [
    ("actions", "classifier", "^pixels is a PixelTokens, which this protocol cannot fine-tune; take it out of encoders."),
    ("depth", "classifier", "^unknown readout 'depth' 'classifier'; tasks: .+, pose; .+ .classifier: actions alone.$"),
    ("actions", "finetune", "^no .+/frozen/head.safetensors; fine-tuning starts from the frozen readout: run .scaling4d"),
])  # fmt: skip
def test_a_readout_that_cannot_be_is_refused(project: object, task: str, protocol: str, message: str) -> None:
    baseline("pixels", config.read())
    with pytest.raises(UserError, match=message):
        readout("pixels", task, protocol, config.read())


def test_a_step_of_the_recipe_of_profile_mae_st_fine_tunes_a_tiny_mae_st(project: object, actions: None) -> None:
    sizes = {"width": 24, "depth": 2, "heads": 2, "mlp": 48, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    few = {"steps": 1, "warmup_steps": 0, "batch": 4, "learning_rate": 4.8e-3 * 4 / 512}
    changes = [f"points.mae_st_L.model.MAEST.{name}={size}" for name, size in sizes.items()]
    changes += [f"readout.classifier.Classifier.{name}={value}" for name, value in few.items()]
    changes += [
        "readout.classifier.Classifier.per_encoder.untrained_mae_st_L.steps=1",
        "clip.side_px=32",
        "readout.tasks.actions.Actions.classes=8",
        "readout.Evaluation.ranks=1",
        "readout.Evaluation.val_items=2",
    ]
    changes += ["launch@readout.Launch=here", "readout.Launch.nodes=1", "readout.Compute.device=cpu", "readout.Sharding.shards=1"]
    settings = config.compose(["profile=mae_st", *changes])
    recipe = settings["readout"]["classifier"]["Classifier"]
    assert (recipe["repeats"], recipe["randaugment"], recipe["erasing"], recipe["dropout"]) == (2, 7.0, 0.25, 0.3)
    baseline("untrained_mae_st_L", settings)
    result = readout("untrained_mae_st_L", "actions", "classifier", settings)
    assert (result.examples, result.metric) == (2, "top1")  # videos, of 7 x 3 views each


def test_a_classifier_learns_a_few_clips_by_heart() -> None:
    model, x = small_model(), clips()
    learn(model, lambda: model(x / 255, torch.nn.functional.one_hot(ACTIONS, 5).float()), steps=60)
    assert model.eval().scores(x).argmax(1).tolist() == ACTIONS.tolist()
