"""Points that start from the weights of a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nano import losses_of

from scaling4d import artifacts
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.load import load_model
from scaling4d.mae.encoder import Backbone, BackboneConfig
from scaling4d.mae.models import config_of
from scaling4d.mae.simple_mae import SimpleMAE
from scaling4d.pretrain.settings import bind_pretrain
from scaling4d.pretrain.stage import pretrain
from scaling4d.pretrain.start import start_weights
from scaling4d.records import UserError

pytestmark = pytest.mark.integration
NAME = "nano_continued"


@pytest.fixture
def continued(changed: Callable) -> Callable[..., dict]:
    """Settings of a point that starts from a folder, with changes of its model."""

    def make(start_from: Path, **model: object) -> dict:
        for key, value in model.items():
            changed(f"continued.{NAME}.model.SimpleMAE.{key}", value)
        return changed(f"continued.{NAME}.start_from", str(start_from))

    return make


def test_it_goes_on_where_the_checkpoint_is_and_says_from_which_one(short: Callable, continued: Callable, capfd) -> None:
    donor = pretrain("nano", short(40, **{"Training.warmup": 0.1}))
    losses = losses_of(donor)
    folder = pretrain(NAME, continued(donor))
    assert f"starts from {donor}; at random: nothing" in capfd.readouterr().err
    first = losses_of(folder)[0]  # before the first step
    assert abs(first - losses[-1]) < 0.1 * abs(losses[0] - losses[-1])
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["inputs"]["start_from"] == artifacts.sha256(donor)
    assert provenance["settings"][f"continued.{NAME}.start_from"] == str(donor)
    assert Checkpoint.read(folder).name == NAME


def test_positions_are_resized_and_a_released_encoder_gives_no_decoder(short: Callable, continued: Callable) -> None:
    donor = pretrain("nano", short(2))
    model = bind_pretrain(NAME, continued(donor, clip=[4, 64, 64])).build()
    weights, theirs = start_weights(model, donor), load_model(donor)
    assert torch.equal(weights["encoder.blocks.0.qkv.weight"], theirs.encoder.blocks[0].qkv.weight)
    assert weights["encoder.positions"].shape == (4 * 8 * 8, 16)
    assert "coarse_tokens" not in weights and "decoder.weight" in weights
    theirs.encoder.resize((4, 64, 64))
    assert torch.equal(weights["encoder.positions"], theirs.encoder.positions)
    saved = Checkpoint.read(donor)
    sizes = {key: value for key, value in saved.settings.items() if key in BackboneConfig.__dataclass_fields__}
    alone = Path("encoder_alone")
    alone.mkdir()
    state = load_model(donor).encoder.state_dict()
    Checkpoint("released", Backbone.__name__, sizes, saved.parameters, 0, 0).write(alone, state)
    weights = start_weights(model, Path(alone))
    assert weights and all(name.startswith("encoder.") for name in weights)


def test_a_checkpoint_of_another_kind_or_size_is_refused_before_a_step(
    short: Callable, continued: Callable, changed: Callable
) -> None:
    with pytest.raises(UserError, match="nobody is not a checkpoint: needed config.json"):
        pretrain(NAME, continued(Path("nobody")))
    donor = pretrain("nano", short(2))
    for changes, message in (
        ({"width": 32, "pixel_mean": 0.0}, "has width 16, here 32; pixel_mean 0.45, here 0.0; a point that starts from it needs"),
        ({"width": 16, "pixel_mean": 0.45, "heads": 2}, "has heads 1, here 2; a point"),
        ({"heads": 1, "mlp": 32}, "has no weights of this shape for encoder.blocks.0.mlp_in.bias, of 6 in all"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain(NAME, continued(donor, **changes))
    saved = Checkpoint.read(donor)
    plain, normed = (SimpleMAE(config_of(SimpleMAE, saved.settings | {"qk_norm": norm})) for norm in (False, True))
    normed.initialise(0)
    Path("normed").mkdir()
    Checkpoint("normed", saved.model, saved.settings | {"qk_norm": True}, 0, 0, 0).write(Path("normed"), normed.state_dict())
    with pytest.raises(UserError, match="normed also has blocks.0.[a-z_.]*norm.*, which the point lacks; needed the same"):
        start_weights(plain, Path("normed"))
