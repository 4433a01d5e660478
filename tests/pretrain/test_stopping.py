"""A pretraining that was killed or asked to stop ends with the same bytes. What the trainer does: tests/training."""

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from interrupting import ask_to_stop, kill_a_rank, kill_all, kill_the_parent, press_ctrl_c_twice, send_to_the_parent
from nano import NANO, attempt, steps_shown, written

from scaling4d.pretrain import stage
from scaling4d.pretrain.settings import bind_pretrain
from scaling4d.pretrain.stage import pretrain, pretrain_fingerprint, provenance_of
from scaling4d.records import AGAIN, UserError

pytestmark = pytest.mark.integration

COMPUTING = ("Validation.finish", "save_weights", "artifacts.write_run")  # at the end of a run


def states_left() -> list[Path]:
    return list(Path(".resume").glob("*pretrain-*"))


def test_killed_and_asked_to_stop_while_processes_decode_it_ends_with_the_same_bytes(short: Callable) -> None:
    pretrain("nano", short(6))
    undisturbed, settings = written(), short(6, **{"Runtime.workers": 1, "Runtime.cached_clips": 0})
    assert attempt(settings, at=3, interrupt=kill_all) == -9
    assert attempt(settings, at=4, interrupt=ask_to_stop) == AGAIN
    assert attempt(settings) == 0 and written() == undisturbed
    assert steps_shown() == [1, 2, 3, 3, 4, 5, 6]
    assert not states_left()  # success removes the state


def test_ctrl_c_while_processes_decode_saves_the_state_and_a_second_one_changes_nothing(short: Callable) -> None:
    settings = short(6, **{"Runtime.workers": 1, "Runtime.cached_clips": 0, "Runtime.save_every": 1000})
    assert attempt(settings, at=2, interrupt=press_ctrl_c_twice) == AGAIN
    assert attempt(settings) == 0
    assert steps_shown() == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("ways", [(kill_all, kill_the_parent, kill_a_rank), (send_to_the_parent,)])
def test_interrupted_twenty_times_at_random_it_ends_with_the_same_bytes(short: Callable, ways: tuple) -> None:
    four = {"Training.ranks": 4, "Training.batch": 32}
    pretrain("nano", short(160, **four))
    undisturbed, rng, settings = written(), random.Random(1), short(160, **four)
    for _ in range(20):
        soon = threading.Timer(rng.uniform(0, 0.3), rng.choice(ways))  # at any moment of a step or of a save
        assert attempt(settings, at=max(steps_shown(), default=0) + rng.randint(0, 6), interrupt=soon.start) in (-9, 1, AGAIN)
    assert attempt(settings) == 0
    assert written() == undisturbed


@pytest.mark.parametrize(("where", "interrupt", "code"), [
    ("_write", kill_a_rank, 1),
    *(pytest.param(name, kill_a_rank, 1, marks=pytest.mark.slow) for name in COMPUTING),
    *(pytest.param(name, ask_to_stop, AGAIN, marks=pytest.mark.slow) for name in (*COMPUTING, "_write")),
    pytest.param("remove_state", kill_a_rank, -9, marks=pytest.mark.slow),
])  # fmt: skip
def test_stopped_or_killed_at_its_end_it_leaves_no_part_and_then_repeats_no_step(
    short: Callable, monkeypatch: pytest.MonkeyPatch, where: str, interrupt: Callable, code: int
) -> None:
    pretrain("nano", short(4))
    undisturbed, settings = written(), short(4, **{"Runtime.save_every": 1000})
    shutil.rmtree(NANO)  # as dvc does before it runs a stage again
    with monkeypatch.context() as patch:
        patch.setattr(f"scaling4d.pretrain.stage.{where}", lambda *_, **__: interrupt())
        assert attempt(settings) == code
    assert NANO.exists() == (where in ("artifacts.write_run", "remove_state"))  # whole, or not at all
    assert attempt(settings) == 0
    assert steps_shown() == [1, 2, 3, 4] and written() == undisturbed
    assert not states_left()


def test_a_full_disk_at_its_end_is_one_line_and_repeats_no_step(short: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, full = short(2), OSError(28, "No space left on device", "artifacts/out")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_write", Mock(side_effect=full))
        with pytest.raises(UserError, match="^artifacts/out: No space left on device; needed room on its disk; repair .+"):
            pretrain("nano", settings)
    pretrain("nano", settings)
    assert steps_shown() == [1, 2]


@pytest.mark.parametrize(("key", "value", "same"), [
    ("pretrain.Training.ranks", 4, True),
    ("points.nano.Sharding.accumulate", 2, True),
    ("points.nano.Launch.hours", 7, True),
    ("pretrain.Runtime.save_every", 7, True),
    ("pretrain.Runtime.cached_clips", 1, True),
    ("pretrain.Runtime.workers", 1, True),
    ("pretrain.Training.clip_norm", 0.5, False),
    ("points.nano.model.SimpleMAE.mask_ratio", 0.9, False),
    ("seed", 1, False),
])  # fmt: skip
def test_a_state_belongs_to_all_settings_of_the_result_but_the_layout_of_ranks(
    short: Callable, changed: Callable, key: str, value: object, same: bool
) -> None:
    before, after = (bind_pretrain("nano", settings) for settings in (short(6), changed(key, value)))
    fingerprints = [pretrain_fingerprint(pretraining, provenance_of(pretraining)) for pretraining in (before, after)]
    assert (fingerprints[0] == fingerprints[1]) == same
