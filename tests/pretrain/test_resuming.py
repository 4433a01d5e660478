"""A run that was interrupted ends as one that was not, to the bit."""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interrupted import a_rank, a_worker, all_at_once, attempt, politely, politely_for_slurm, the_parent, written

from scaling4d.pretrain.loop import pretrain
from scaling4d.records import AGAIN, UserError

NANO = Path("artifacts/smoke/pretrain/nano")


@pytest.fixture
def short(changed: Callable) -> Iterator[Callable]:
    """Settings of a run with a line a step and a state every other step; nothing is left of runs before."""

    def make(steps: int, **more: object) -> dict:
        for folder in (".resume", ".runs"):
            shutil.rmtree(folder, ignore_errors=True)
        small = {"Training.ranks": 2, "Training.batch": 8, "Training.log_every": 1, "Running.save_every": 2}
        for key, value in (small | {"Training.steps": steps} | more).items():
            settings = changed(f"pretrain.{key}", value)
        return settings

    yield make
    shutil.rmtree(".resume", ignore_errors=True)


def states() -> list[Path]:
    return sorted(Path(".resume").glob("pretrain-*/step-*"))


def interrupted_run(settings: dict, ways: list[Callable], rng: random.Random, steps: int) -> list[int]:
    """Exit codes of a run that is interrupted in these ways, each after some steps more; the last one is left alone."""
    return [attempt(settings, interrupt=way, after=rng.randint(1, steps)) for way in ways] + [attempt(settings)]


def test_killed_in_three_ways_it_ends_with_the_same_bytes(short: Callable) -> None:
    settings = short(24)
    undisturbed = written(pretrain("nano", settings))
    settings = short(24)
    codes = interrupted_run(settings, [all_at_once, the_parent, a_rank], random.Random(0), 7)
    assert codes == [-9, -9, 1, 0]
    assert written(NANO) == undisturbed
    assert not list(Path(".resume").glob("pretrain-*"))  # success removes the state


@pytest.mark.slow
@pytest.mark.parametrize("ways", [(all_at_once, the_parent, a_rank), (politely, politely_for_slurm)])
def test_interrupted_twenty_times_at_random_it_ends_with_the_same_bytes(short: Callable, ways: tuple) -> None:
    four = {"Training.ranks": 4, "Training.batch": 32}
    undisturbed = written(pretrain("nano", short(160, **four)))
    settings, rng = short(160, **four), random.Random(1)
    codes = interrupted_run(settings, [rng.choice(ways) for _ in range(20)], rng, 8)
    assert len(codes) == 21 and codes[-1] == 0 and set(codes[:-1]) <= {-9, 1, AGAIN}
    assert written(NANO) == undisturbed


def test_asked_to_stop_it_saves_and_says_run_me_again(short: Callable) -> None:
    settings = short(12)
    undisturbed = written(pretrain("nano", settings))
    settings = short(12, **{"Running.save_every": 1000})
    assert attempt(settings, interrupt=politely, after=3) == AGAIN
    assert len(states()) == 1  # it was not due
    assert attempt(settings, interrupt=politely_for_slurm, after=2) == AGAIN
    assert attempt(settings) == 0
    assert written(NANO) == undisturbed


def test_written_behind_the_computing_it_is_the_same_state(short: Callable) -> None:
    settings = short(12)
    undisturbed = written(pretrain("nano", settings))
    settings = short(12, **{"Running.asynchronous": True})
    assert attempt(settings, interrupt=all_at_once, after=7) == -9
    assert states() and attempt(settings) == 0
    assert written(NANO) == undisturbed


def test_a_damaged_newest_state_is_passed_over_with_a_warning(short: Callable, capfd: pytest.CaptureFixture) -> None:
    settings = short(12)
    undisturbed = written(pretrain("nano", settings))
    settings = short(12)
    assert attempt(settings, interrupt=politely, after=7) == AGAIN
    older, newest = states()
    (shard,) = newest.glob("__1_*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capfd.readouterr()
    assert attempt(settings) == 0
    assert f"warning: {newest} is damaged ({shard.name}) and passed over" in capfd.readouterr().err
    assert written(NANO) == undisturbed


@pytest.mark.parametrize("missing", ["sha256.json", ".metadata", "progress.json"])
def test_a_state_that_lacks_a_file_is_passed_over(short: Callable, missing: str) -> None:
    settings = short(4)
    undisturbed = written(pretrain("nano", settings))
    settings = short(4)
    assert attempt(settings, interrupt=politely, after=2) == AGAIN
    for path in states():
        (path / missing).unlink()
    assert attempt(settings) == 0 and written(NANO) == undisturbed


def test_it_goes_on_with_another_number_of_ranks_and_says_so(short: Callable, changed: Callable) -> None:
    settings = short(12)
    undisturbed = written(pretrain("nano", settings))
    settings = short(12)
    assert attempt(settings, interrupt=politely, after=5) == AGAIN
    done = int(states()[-1].name.removeprefix("step-"))
    assert attempt(changed("pretrain.Training.ranks", 4)) == 0
    ended = written(NANO)
    assert ended["losses"][:done] == undisturbed["losses"][:done]
    for line, wanted in zip(ended["losses"], undisturbed["losses"], strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert json.loads((NANO / "summary.json").read_text())["ranks"] == [[0, 2], [done, 4]]


def test_a_changed_setting_starts_at_0_and_says_which(short: Callable, changed: Callable, capfd: pytest.CaptureFixture) -> None:
    settings = short(6)
    assert attempt(settings, interrupt=politely, after=3) == AGAIN
    (left,) = Path(".resume").glob("pretrain-*")
    settings = changed("pretrain.Training.clip_norm", 0.5)
    capfd.readouterr()
    folder = pretrain("nano", settings)
    assert f"{left} is not gone on from: settings.pretrain.Training.clip_norm was 1.0, is 0.5" in capfd.readouterr().err
    assert [line["step"] for line in written(folder)["losses"]] == list(range(1, 7)) and left.is_dir()


def test_the_state_of_another_point_is_refused(short: Callable) -> None:
    settings = short(6)
    assert attempt(settings, interrupt=politely, after=3) == AGAIN
    (folder,) = Path(".resume").glob("pretrain-*")
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"point": "mini"}))
    with pytest.raises(
        UserError, match=r"holds the training state of mini of profile smoke, needed that of nano of smoke .*remove"
    ):
        pretrain("nano", settings)


def test_a_full_disk_is_one_clear_line_and_costs_only_the_state_that_found_no_room(
    short: Callable, capfd: pytest.CaptureFixture
) -> None:
    settings = short(8)
    undisturbed = written(pretrain("nano", settings))
    settings = short(8)
    assert attempt(settings, interrupt=politely, after=2) == AGAIN
    before = states()
    capfd.readouterr()
    assert attempt(settings, most_bytes=100_000) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.match(
        r"error: the training state of step \d cannot be written to .resume/pretrain-.+ free space there, or", errors[0]
    )
    assert states() == before
    assert attempt(settings) == 0 and written(NANO) == undisturbed


@pytest.mark.slow
def test_a_killed_process_that_decodes_is_one_clear_line_and_the_next_run_goes_on(
    short: Callable, capfd: pytest.CaptureFixture
) -> None:
    undisturbed = written(pretrain("nano", short(60)))
    settings = short(60, **{"Running.workers": 1, "Running.kept_clips": 0})
    assert attempt(settings, interrupt=a_worker, after=4) == 1
    assert re.search(
        r"error: step \d+: a process that decodes clips ended .+ lower pretrain.Running.workers", capfd.readouterr().err
    )
    assert attempt(settings) == 0 and written(NANO) == undisturbed


def test_as_many_states_stay_as_are_to_be_kept(short: Callable) -> None:
    settings = short(20, **{"Running.keep": 3, "Running.save_every": 1})
    assert attempt(settings, interrupt=politely, after=8) == AGAIN
    kept = [int(path.name.removeprefix("step-")) for path in states()]
    assert kept == [kept[-1] - 2, kept[-1] - 1, kept[-1]]
