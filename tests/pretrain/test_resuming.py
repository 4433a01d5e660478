"""A run that was interrupted ends as one that was not, to the bit."""

import errno
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interrupted import (
    a_rank,
    a_worker,
    all_at_once,
    attempt,
    politely,
    politely_for_slurm,
    politely_to_all,
    steps_shown,
    the_parent,
    written,
)

from scaling4d import artifacts, config
from scaling4d.pretrain import loop
from scaling4d.pretrain.loop import made_of, prepare, pretrain, train
from scaling4d.records import AGAIN, UserError
from scaling4d.training import resume as states_of
from scaling4d.training.distributed import run as in_ranks

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
    (folder / "about.json").write_text(json.dumps(about | {"run": "mini"}))
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


@pytest.mark.parametrize("shards", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_in_parts_goes_on_with_the_same_bytes(short: Callable, changed: Callable, shards: int) -> None:
    def make() -> dict:
        short(6)
        changed("points.nano.Sharding.shards", shards)
        return changed("points.nano.Sharding.accumulate", 2)

    undisturbed = written(pretrain("nano", make()))
    settings = make()
    assert attempt(settings, interrupt=politely, after=2) == AGAIN
    assert attempt(settings) == 0
    assert written(NANO) == undisturbed


def killed(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("validate", marks=pytest.mark.slow),
        pytest.param("_weights", marks=pytest.mark.slow),
        "_write",
        pytest.param("artifacts.write_run", marks=pytest.mark.slow),
        "remove",
    ],
)
def test_killed_at_its_end_it_ends_with_the_same_bytes_and_no_step_again(
    short: Callable, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    settings = short(4)
    undisturbed = written(pretrain("nano", settings))
    settings = short(4, **{"Running.save_every": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(f"scaling4d.pretrain.loop.{where}", killed)
        assert attempt(settings) in (-9, 1)
    shutil.rmtree(NANO)  # as dvc does before it runs a stage again
    assert attempt(settings) == 0
    assert steps_shown() == 4 and written(NANO) == undisturbed
    assert not list(Path(".resume").glob("*pretrain-*"))


def test_asked_to_stop_at_its_end_it_ends_with_the_same_bytes_and_no_step_again(
    short: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = short(4)
    undisturbed = written(pretrain("nano", settings))
    settings = short(4, **{"Running.save_every": 1000, "Running.asynchronous": True})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", lambda *_, **__: signal.pause())
        assert attempt(settings, interrupt=politely, after=4) == AGAIN
    assert attempt(settings) == 0
    assert steps_shown() == 4 and written(NANO) == undisturbed


def test_a_state_is_gone_at_one_stroke_and_what_is_left_of_it_goes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pretrain-0"
    states_of.claim(folder, {"run": "nano", "profile": "smoke"}).close()
    with monkeypatch.context() as patch:
        patch.setattr(states_of.shutil, "rmtree", lambda path, ignore_errors=False: None)  # as if it were killed before
        states_of.remove(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["removed-pretrain-0"]
    states_of.claim(folder, {"run": "nano", "profile": "smoke"}).close()
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain-0"]


def test_a_run_that_another_process_is_at_is_refused(short: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = short(2)
    run = prepare("nano", settings)
    folder = loop.state_of(run, made_of(run))
    monkeypatch.setattr(states_of, "PATIENCE_S", 0.0)
    with states_of._locked(folder):
        with pytest.raises(UserError, match=rf"^{folder} is in use by another process that trains the same; wait until .+$"):
            pretrain("nano", settings)
        states_of.remove(folder)
        assert folder.is_dir()
    pretrain("nano", settings)
    assert not folder.is_dir()


def test_a_damaged_description_of_a_state_blocks_no_run(short: Callable, capfd: pytest.CaptureFixture) -> None:
    settings = short(6)
    undisturbed = written(pretrain("nano", settings))
    settings = short(6)
    assert attempt(settings, interrupt=politely, after=3) == AGAIN
    (mine,) = Path(".resume").glob("pretrain-*")
    done = steps_shown()
    other = Path(".resume/pretrain-0123456789abcdef")
    other.mkdir()
    for folder in (mine, other):
        (folder / "about.json").write_text('{"run": ')
    capfd.readouterr()
    assert attempt(settings) == 0
    said = capfd.readouterr().err
    assert all(f"warning: {folder}/about.json is damaged and passed over" in said for folder in (mine, other))
    assert steps_shown() == 6 and done < 6 and written(NANO) == undisturbed


def loaded_elsewhere(*, rank: int, ranks: int, folder: Path) -> list[Path]:
    """Which states the ranks look at, where a folder has not appeared yet on the machine of rank 1."""
    state = states_of.State(folder if rank == 0 else folder / "late", keep=1, asynchronous=False, rank=rank, ranks=ranks)
    found: list = [None] * ranks
    states_of.dist.all_gather_object(found, state._newest_first())
    assert found[0] == found[1]
    return found[0]


def test_all_ranks_go_on_from_the_state_that_the_first_one_sees(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert in_ranks(loaded_elsewhere, ranks=2, folder=tmp_path) == [tmp_path / "step-00000004", tmp_path / "step-00000002"]


def test_a_state_that_may_not_be_read_is_no_damaged_one(short: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = short(6)
    assert attempt(settings, interrupt=politely, after=3) == AGAIN
    before, sha256 = states(), artifacts.sha256

    def refused(path: Path) -> str:
        if path.name.startswith("__1_"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return sha256(path)

    monkeypatch.setattr(artifacts, "sha256", refused)
    with pytest.raises(
        UserError, match=r"^the training state .+ cannot be read: .*Permission denied.+; mend that, or remove .+$"
    ):
        pretrain("nano", settings)
    assert states() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_what_cannot_be_written_elsewhere_is_one_clear_line_too(
    short: Callable, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number), "artifacts/out")

    settings = short(2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_write", full)
        with pytest.raises(UserError, match=rf"^artifacts/out: {os.strerror(number)}; mend that, and the same .+"):
            pretrain("nano", settings)
    before = steps_shown()
    assert attempt(settings) == 0 and steps_shown() == before


def flushed(*, rank: int, ranks: int, folder: Path) -> tuple[list[str], list[str]]:
    """What was on the disk when a state got its name, and what it holds."""
    synced, when = [], []
    fsync, rename = os.fsync, Path.rename

    def noted(opened: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{opened}")).name)
        fsync(opened)

    def renamed(path: Path, new: Path) -> Path:
        when.extend(synced if new.name.startswith("step-") else [])
        return rename(path, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted)
        patch.setattr(Path, "rename", renamed)
        state = states_of.State(folder, keep=1, asynchronous=False, rank=rank, ranks=ranks)
        state.save(1, {"step": 1}, {"weight.a": states_of.torch.ones(3)})
    return when, [path.name for path in (folder / "step-00000001").iterdir()]


def test_a_state_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    when, files = in_ranks(flushed, ranks=1, folder=tmp_path)
    assert len(files) == 4 and {*files, "partial-00000001"} <= set(when)


def test_how_a_run_is_fed_watched_and_launched_changes_neither_its_state_nor_its_result(
    short: Callable, changed: Callable
) -> None:
    folder = pretrain("nano", short(6))
    undisturbed = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert attempt(short(6), interrupt=politely, after=3) == AGAIN
    changed("points.nano.Launch.hours", 7)
    changed("pretrain.Running.kept_clips", 1)
    assert attempt(changed("pretrain.Running.keep", 1)) == 0
    assert steps_shown() == 6
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == undisturbed
    (told, *_) = sorted(Path(".runs").glob("pretrain-nano-*.json"), key=lambda path: -path.stat().st_mtime)
    found = json.loads(told.read_text())
    assert (found["running"]["kept_clips"], found["launch"]["hours"]) == (1, 7)


def test_a_run_is_what_it_was_when_it_began_whatever_happens_to_the_files_of_its_settings(short: Callable) -> None:
    settings = short(2)
    run = prepare("nano", settings)
    made = made_of(run)
    config.PARAMS.unlink()  # the project's fixture puts it back
    folder = train(run, made)
    assert json.loads((folder / "provenance.json").read_text()) == json.loads(json.dumps(made))
    assert made["inputs"]["clips"] == artifacts.sha256(Path("artifacts/smoke/clips/croissant.json"))


@pytest.mark.slow
def test_a_request_to_stop_sent_to_every_process_leaves_those_that_decode_to_their_rank(
    short: Callable, capfd: pytest.CaptureFixture
) -> None:
    undisturbed = written(pretrain("nano", short(60)))
    settings = short(60, **{"Running.workers": 1, "Running.kept_clips": 0})
    assert attempt(settings, interrupt=politely_to_all, after=4) == AGAIN
    assert "error" not in capfd.readouterr().err
    assert attempt(settings) == 0 and written(NANO) == undisturbed
