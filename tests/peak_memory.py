"""The peak of the memory that work takes, measured in a process of its own."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
needs_proc = pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux's peak of resident memory")


def in_a_new_process(work: Callable[..., Any], *arguments: object) -> Any:
    """What a function of a module returns in a process that holds nothing of this one's memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def grown(work: Callable[[], object]) -> int:
    """Bytes of resident memory that work takes at its peak, beyond those before."""
    CLEAR.write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """VmRSS: bytes now. VmHWM: the most bytes until now."""
    return 1024 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))
