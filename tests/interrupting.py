"""A run in a process of its own, interrupted by its rank 0: killed, or asked to stop. A port for its ranks."""

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable

from scaling4d.records import AGAIN, Preempted, UserError


def exit_code(work: Callable[[], object], *, most_bytes: int | None = None) -> int:
    """Exit code of `work` in a process group of its own. most_bytes: no file may become larger."""
    child = multiprocessing.get_context("fork").Process(target=_exit_after, args=(work, most_bytes))
    child.start()
    child.join()
    return child.exitcode


def _exit_after(work: Callable[[], object], most_bytes: int | None) -> None:
    os.setpgid(0, 0)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        work()
    except Preempted:
        os._exit(AGAIN)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def kill_all() -> None:
    os.killpg(0, signal.SIGKILL)


def kill_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)  # ranks end when they miss it


def kill_a_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def send_to_the_parent(number: int = signal.SIGTERM) -> None:
    os.kill(os.getppid(), number)


def ask_to_stop(number: int = signal.SIGTERM) -> None:
    """Ask the parent, and wait until it has forwarded the request to this rank."""
    handler, received = signal.getsignal(number), []
    if callable(handler):
        signal.signal(number, lambda *arguments: (handler(*arguments), received.append(number)))
    send_to_the_parent(number)
    while not received:
        time.sleep(0.01)


def ask_to_stop_as_slurm_does() -> None:
    ask_to_stop(signal.SIGUSR1)


def press_ctrl_c_twice() -> None:
    """As in a terminal, which sends the signal to the command and to all processes below it."""
    for _ in range(2):
        os.killpg(0, signal.SIGINT)
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
