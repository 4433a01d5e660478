"""Short pretrainings of the point nano, and what they wrote."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interrupting import exit_code

from scaling4d.pretrain import stage

NANO = Path("artifacts/smoke/pretrain/nano")
TIMINGS = Path(".runs/pretrain-nano/timings.jsonl")


def steps_shown() -> list[int]:
    """Steps of all attempts that a line was written of (log_every is 1)."""
    return [json.loads(line)["step"] for line in TIMINGS.read_text().splitlines()] if TIMINGS.is_file() else []


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def written() -> dict[str, bytes]:
    """What of the Checkpoint folder must be equal to the byte."""
    return {name: (NANO / name).read_bytes() for name in ("model.safetensors", "losses.jsonl")}


def attempt(settings: dict, *, at: int = 0, interrupt: Callable[[], None] | None = None) -> int:
    """Exit code of a pretraining in a process of its own; rank 0 calls `interrupt` before it computes step `at`."""
    batches = stage._batches

    def interrupted(pretraining: object, model: object, rank: int, ranks: int, start: int) -> Iterator[object]:
        for step, batch in enumerate(batches(pretraining, model, rank, ranks, start), start):
            if interrupt and step == at and rank == 0:
                interrupt()
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_batches", interrupted)
        return exit_code(lambda: stage.pretrain("nano", settings))
