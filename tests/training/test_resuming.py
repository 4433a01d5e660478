"""A run that was interrupted ends as an uninterrupted one, to the bit; damaged, foreign and unreadable states."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from interrupting import ask_to_stop, ask_to_stop_as_slurm_does, kill_a_rank, kill_all, kill_the_parent
from torch.distributed.checkpoint import filesystem
from torch.distributed.tensor import Shard, distribute_tensor
from toy import PLAIN, RESULT, Toy, attempt, steps_computed, train, written

from scaling4d import artifacts
from scaling4d.records import AGAIN, UserError
from scaling4d.training import resume
from scaling4d.training.distributed import WatchdogConfig, end_start, run, stop_watchdog
from scaling4d.training.resume import FINGERPRINT, CheckpointManager, acquire_lock, remove_state

pytestmark = pytest.mark.integration

LONG = Toy(steps=24, asynchronous=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Result of a run that nothing interrupts."""
    with contextlib.chdir(tmp_path_factory.mktemp("undisturbed")):
        return train(Toy())


def states(toy: Toy) -> list[int]:
    """Steps of the saved states."""
    return [int(path.name.removeprefix("step-")) for path in sorted(toy.folder.glob("step-*"))]


def test_killed_in_three_ways_it_ends_with_the_same_bytes_and_repeats_no_saved_step(undisturbed: dict) -> None:
    codes = [attempt(Toy(), at=at, interrupt=kill) for at, kill in ((3, kill_all), (4, kill_the_parent), (7, kill_a_rank))]
    assert codes == [-9, -9, 1] and attempt(Toy()) == 0
    assert written() == undisturbed
    assert steps_computed() == [1, 2, 3, 3, 4, 5, 6, 7, 7, 8]
    assert not list(Path(".resume").glob("*toy-*"))  # success removes the state


def test_asked_to_stop_it_saves_and_ends_with_run_me_again(undisturbed: dict) -> None:
    toy = Toy(save_every=1000)
    assert attempt(toy, at=2, interrupt=ask_to_stop) == AGAIN
    assert states(toy) == [4]  # none was due; a request counts a step later
    assert attempt(toy, at=5, interrupt=ask_to_stop_as_slurm_does) == AGAIN
    assert attempt(toy) == 0
    assert written() == undisturbed and steps_computed() == list(range(1, 9))


def test_a_damaged_newest_state_is_passed_over_with_a_warning(undisturbed: dict, capfd: pytest.CaptureFixture) -> None:
    toy = Toy(save_every=1, keep_latest_k=3)
    assert attempt(toy, at=4, interrupt=ask_to_stop) == AGAIN
    assert states(toy) == [4, 5, 6]
    (shard,) = toy.folder.glob("step-00000006/__1_*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capfd.readouterr()
    assert attempt(toy) == 0
    assert f"warning: {shard.parent} is damaged ({shard.name}) and passed over" in capfd.readouterr().err
    assert written() == undisturbed and steps_computed() == [*range(1, 7), *range(6, 9)]


def fill_the_disk() -> None:
    """From now on this process cannot write a state."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    filesystem.FileSystem.create_stream = refuse


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_32_ranks_killed_slowed_and_without_space_end_with_the_bytes_of_an_undisturbed_run(tmp_path: Path) -> None:
    """Eight copies of four shards."""
    toy = Toy(steps=6, ranks=32, batch=32, sharding=replace(PLAIN, shards=4))
    with contextlib.chdir(tmp_path):
        undisturbed = train(toy)
    assert attempt(replace(toy, who=17), at=3, interrupt=kill_a_rank) == 1 and states(toy) == [2]
    assert attempt(toy, at=3, interrupt=fill_the_disk) == 1 and states(toy) == [2]
    assert attempt(replace(toy, slow_s=0.2), at=5, interrupt=kill_all) == -signal.SIGKILL and states(toy) == [2, 4]
    assert attempt(replace(toy, slow_s=0.2)) == 0
    assert written() == undisturbed and not list(Path(".resume").glob("*toy-*"))


@pytest.mark.parametrize("missing", ["sha256.json", ".metadata", "progress.json"])
def test_a_state_that_lacks_a_file_is_passed_over(undisturbed: dict, missing: str) -> None:
    toy = Toy()
    assert attempt(toy, at=2, interrupt=ask_to_stop) == AGAIN
    for path in toy.folder.glob("step-*"):
        (path / missing).unlink()
    assert attempt(toy) == 0 and written() == undisturbed


def test_a_changed_setting_starts_at_0_and_is_named(capfd: pytest.CaptureFixture) -> None:
    assert attempt(Toy(), at=3, interrupt=ask_to_stop) == AGAIN
    capfd.readouterr()
    assert attempt(Toy(clip_norm=0.5)) == 0
    assert f"the state in {Toy().folder} is not used: settings.clip_norm was 1.0, is 0.5" in capfd.readouterr().err
    assert steps_computed()[5:] == list(range(1, 9)) and states(Toy()) == [4, 5]


def test_the_state_of_another_run_is_refused() -> None:
    toy = Toy()
    assert attempt(toy, at=3, interrupt=ask_to_stop) == AGAIN
    path = toy.folder / FINGERPRINT
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": "mini"}))
    with pytest.raises(UserError, match=r"holds the training state of mini, needed that of toy with these settings .*remove"):
        train(toy)


def test_a_full_disk_is_one_line_and_costs_only_the_state_without_space(undisturbed: dict, capfd: pytest.CaptureFixture) -> None:
    toy = Toy()
    assert attempt(toy, at=2, interrupt=ask_to_stop) == AGAIN
    before = states(toy)
    capfd.readouterr()
    assert attempt(toy, most_bytes=20_000) == 1
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: the training state of step 6 cannot be written to .resume/toy-.+: .+; free space there, or", error)
    assert states(toy) == before
    assert attempt(toy) == 0 and written() == undisturbed


@pytest.mark.parametrize("shards", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_in_parts_continues_with_the_same_bytes(shards: int) -> None:
    toy = Toy(sharding=replace(PLAIN, shards=shards, accumulate=2))
    uninterrupted = train(toy)
    assert attempt(toy, at=3, interrupt=ask_to_stop) == AGAIN
    assert attempt(toy) == 0
    assert written() == uninterrupted


def test_a_state_is_gone_at_one_stroke_and_what_is_left_of_it_goes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, content = Path("toy-0"), {"run": "toy", "profile": "smoke"}
    acquire_lock(folder, content).close()
    with monkeypatch.context() as patch:
        patch.setattr(resume.shutil, "rmtree", lambda path, ignore_errors=False: None)  # as if it were killed before
        remove_state(folder)
    assert [path.name for path in Path().iterdir()] == ["removed-toy-0"]
    acquire_lock(folder, content).close()
    assert [path.name for path in Path().iterdir()] == ["toy-0"]


def test_a_run_that_another_process_trains_is_refused_and_its_state_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(steps=2)
    monkeypatch.setattr(resume, "LOCK_WAIT_S", 0.0)
    with acquire_lock(toy.folder, toy.fingerprint):
        with pytest.raises(UserError, match=rf"^{toy.folder} is in use by another process that trains the same; wait until .+$"):
            train(toy)
        remove_state(toy.folder)
        assert toy.folder.is_dir()
    train(toy)
    assert not toy.folder.is_dir()


def test_a_damaged_fingerprint_blocks_no_run(undisturbed: dict, capfd: pytest.CaptureFixture) -> None:
    toy, other = Toy(), Path(".resume/toy-0123456789abcdef")
    assert attempt(toy, at=3, interrupt=ask_to_stop) == AGAIN
    other.mkdir()
    for folder in (toy.folder, other):
        (folder / FINGERPRINT).write_text('{"run": ')
    capfd.readouterr()
    assert attempt(toy) == 0
    printed = capfd.readouterr().err
    assert all(f"warning: {folder}/{FINGERPRINT} is damaged and passed over" in printed for folder in (toy.folder, other))
    assert steps_computed() == list(range(1, 9)) and written() == undisturbed


def loaded_step(*, rank: int, ranks: int) -> list[int]:
    """The step that each rank loads where the folder of the last one has not appeared yet on the machine of rank 1."""
    manager = CheckpointManager("late", {"run": "late", "profile": "smoke"}, keep_latest_k=2, asynchronous=False)
    for step in (2, 4):
        manager.save(step, {"step": step}, {"a": torch.full((3,), float(step))})
    if rank == 1:
        glob, late = Path.glob, "step-00000004"
        Path.glob = lambda path, pattern: [entry for entry in glob(path, pattern) if entry.name != late]
    steps: list = [None] * ranks
    dist.all_gather_object(steps, manager.load({"a": torch.zeros(3)})["step"])
    return steps


def test_all_ranks_continue_from_the_state_that_the_first_one_sees() -> None:
    assert run(loaded_step, ranks=2) == [4, 4]


def test_a_state_that_may_not_be_read_is_no_damaged_one(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, sha256 = Toy(), artifacts.sha256
    assert attempt(toy, at=3, interrupt=ask_to_stop) == AGAIN
    before = states(toy)

    def refuse(path: Path) -> str:
        if path.name.startswith("__1_"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return sha256(path)

    monkeypatch.setattr(artifacts, "sha256", refuse)
    with pytest.raises(UserError, match=r"^the training state .+ cannot be read: .*Permission denied.+; repair that, or remove "):
        train(toy)
    assert states(toy) == before


def synced_files(*, rank: int, ranks: int) -> tuple[list[str], list[str]]:
    """Files that were on the disk when a state got its name, and the files of the state."""
    synced, before_rename = [], []
    fsync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(path: Path, new: Path) -> Path:
        before_rename.extend(synced if new.name.startswith("step-") else [])
        return rename(path, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", note)
        patch.setattr(Path, "rename", note_rename)
        manager = CheckpointManager("disk", {"run": "x", "profile": "y"}, keep_latest_k=1, asynchronous=False)
        manager.save(1, {"step": 1}, {"weight.a": torch.ones(3)})
    return before_rename, [path.name for path in (manager.folder / "step-00000001").iterdir()]


def test_a_state_is_on_the_disk_before_it_has_its_name() -> None:
    synced, files = run(synced_files, ranks=1)
    assert len(files) == 4 and {*files, "partial-00000001"} <= set(synced)


def staged_steps(*, rank: int, ranks: int) -> tuple[list[int], list[float]]:
    """Sizes of tensors that a rank pins in three states, as if they lay on a GPU, and its part of the last state."""
    pinned, mesh = [], dist.init_device_mesh("cpu", (ranks,))
    weight, bias = distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]), torch.zeros(3)
    manager = CheckpointManager("pinned", {"run": "pinned", "profile": "y"}, keep_latest_k=1, asynchronous=True)
    manager.stager = resume.pinned_stager()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.numel()) or tensor)  # there is no GPU
        for step in (1, 2, 3):
            weight.to_local().fill_(step + rank)
            manager.save(step, {}, {"weight": weight, "bias": bias.fill_(10 * step)})
            weight.to_local().zero_()  # the training goes on
            bias.zero_()
    manager.wait()
    manager.load({"weight": weight, "bias": bias})
    manager.close()
    return pinned, [*weight.to_local().flatten().tolist(), *bias.tolist()]


def test_states_of_gpus_are_copied_to_the_same_pinned_memory() -> None:
    pinned, state = run(staged_steps, ranks=2)
    assert pinned == [4, 3] and state == [3.0] * 4 + [30.0] * 3


def hold_writes() -> None:
    """From now on this rank writes no state until a file `go` is there."""
    create_stream = filesystem.FileSystem.create_stream

    def hold(*arguments: object) -> object:
        wait_for(Path("go"))
        return create_stream(*arguments)

    filesystem.FileSystem.create_stream = hold


def wait_for(*paths: Path) -> None:
    """Wait until one of them is there."""
    while not any(path.exists() for path in paths):
        time.sleep(0.01)


def test_a_state_that_takes_long_stops_no_step_and_is_there_before_the_next_save() -> None:
    toy = replace(LONG, save_every=12)

    def watch(rank: int, step: int) -> None:
        if (rank, step) == (1, 0):
            hold_writes()
        if (rank, step) == (0, 15):
            assert states(toy) == []
            Path("go").touch()
            wait_for(toy.folder / "partial-00000012/.metadata")  # rank 0 writes it when all have written
        if step > 15:
            time.sleep(0.1)
        assert step != 23 or states(toy) == [12]

    assert attempt(replace(toy, each_step=watch)) == 0 and written() == train(LONG)


def test_killed_while_it_writes_a_run_continues_from_the_state_before() -> None:
    toy = replace(LONG, save_every=8)

    def hold(rank: int, step: int) -> None:
        if (rank, step) == (1, 9):
            wait_for(*(toy.folder / name for name in ("partial-00000008/.metadata", "step-00000008")))
        if (rank, step) == (1, 12):
            hold_writes()

    assert attempt(replace(toy, each_step=hold), at=18, interrupt=kill_all) == -signal.SIGKILL and states(toy) == [8]
    assert attempt(toy) == 0 and steps_computed() == [*range(1, 19), *range(9, 25)]
    assert written() == train(LONG)


def write_slowly(*, rank: int, ranks: int, seconds: float) -> None:
    """A state that rank 1 needs long for, in a training whose standstill is watched."""
    end_start()
    manager = CheckpointManager("slow", {"run": "slow", "profile": "y"}, keep_latest_k=1, asynchronous=True)
    if rank == 1:
        threading.Timer(seconds, Path("go").touch).start()
        hold_writes()
    manager.save(2, {}, {"a": torch.full((3,), float(rank))})
    manager.wait()
    stop_watchdog()


def test_waiting_for_a_write_is_no_standstill_unless_it_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = WatchdogConfig(60, 2, Path())
    run(write_slowly, ranks=2, watchdog=watchdog, seconds=5)
    Path("go").unlink()
    monkeypatch.setattr(resume, "MOST_WRITE_S", 1)
    with pytest.raises(UserError, match="^ranks 0, 1 of 2 hang at writing the state of step 2 for 0 s; if it is only slow"):
        run(write_slowly, ranks=2, watchdog=watchdog, seconds=60)


@pytest.mark.parametrize("at", [pytest.param(at, marks=[pytest.mark.slow] if at % 3 else []) for at in range(8)])
@pytest.mark.parametrize("interrupt", [ask_to_stop, kill_all])
def test_interrupted_at_any_step_it_ends_with_the_same_bytes(undisturbed: dict, interrupt: Callable, at: int) -> None:
    assert attempt(Toy(asynchronous=True), at=at, interrupt=interrupt) in (AGAIN, -signal.SIGKILL)
    shutil.rmtree(RESULT, ignore_errors=True)
    assert attempt(Toy(asynchronous=True)) == 0 and written() == undisturbed
