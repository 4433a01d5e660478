"""A pretraining in a process of its own, to be killed."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scaling4d.pretrain.loop import pretrain
from scaling4d.records import AGAIN, Preempted, UserError

TIMINGS = Path(".runs/pretrain-nano/timings.jsonl")


def steps_shown() -> int:
    """Steps of all attempts that a line was written of (log_every is 1)."""
    return len(TIMINGS.read_text().splitlines()) if TIMINGS.is_file() else 0


def attempt(
    settings: dict, *, interrupt: Callable[[int], None] | None = None, after: int = 1, most_bytes: int | None = None
) -> int:
    """Exit code of a pretraining to which `interrupt(pid)` happens after so many steps; no file may be larger than so."""
    before = steps_shown()
    child = multiprocessing.get_context("fork").Process(target=_pretrain, args=(settings, most_bytes))
    child.start()
    while interrupt and child.is_alive() and steps_shown() < before + after:
        time.sleep(0.002)
    if interrupt and child.is_alive():
        interrupt(child.pid)
    child.join()
    return child.exitcode


def _pretrain(settings: dict, most_bytes: int | None) -> None:
    os.setpgid(0, 0)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    try:
        pretrain("nano", settings)
    except Preempted:
        os._exit(AGAIN)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def all_at_once(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)


def the_parent(pid: int) -> None:
    """Its ranks end when they miss it."""
    os.kill(pid, signal.SIGKILL)
    while _children(pid):
        time.sleep(0.01)


def a_rank(pid: int) -> None:
    found = _children(pid)
    if found:
        os.kill(found[-1], signal.SIGKILL)


def a_worker(pid: int) -> None:
    """A process that decodes for a rank."""
    found: list[int] = []
    while not found:
        found = [child for child in _children(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(found[0], signal.SIGKILL)


def politely(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def politely_for_slurm(pid: int) -> None:
    os.kill(pid, signal.SIGUSR1)


def politely_to_all(pid: int) -> None:
    """To every process of the job, as Slurm does, once all of them are there."""
    while not any(b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes() for child in _children(pid)):
        time.sleep(0.01)
    os.killpg(pid, signal.SIGTERM)


def _children(group: int) -> list[int]:
    """Processes of a group, without its leader."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(words[2]) == group and int(stat.parent.name) != group and words[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def written(folder: Path) -> dict[str, bytes | list]:
    """What of a Checkpoint folder must be equal to the byte."""
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return {"weights": (folder / "model.safetensors").read_bytes(), "losses": lines}
