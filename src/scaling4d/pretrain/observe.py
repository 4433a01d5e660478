"""What is seen of a run while it goes on: step lines, timings, TensorBoard events, pictures, a profiler's trace.

All of it lies in `.runs/<name>/`, outside the outs, and is rank 0's; results do not depend on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from scaling4d import log
from scaling4d.pretrain.plan.gpus import GPUS

SIDE = 1024  # of the matrices whose product shows what a device can do


class Observer:
    """Says how a run goes on: one call a step, one an interval."""

    def __init__(
        self,
        folder: Path | None,
        *,
        steps: int,
        start: int,
        batch: int,
        flops_per_clip: int,
        peak: float,
        tensorboard: bool,
        profile: tuple[int, ...],
    ) -> None:
        """
        Args:
            folder: to write to; None: this rank shows nothing. steps: of the whole run; start: those done before.
            batch: clips a step, over all ranks. flops_per_clip: of the model, without recompute. peak: FLOP/s of all devices.
            profile: `[first step, how many]`, or nothing.
        """
        self.folder, self.batch, self.flops_per_clip, self.peak = folder, batch, flops_per_clip, peak
        self.start = self.shown = start
        self.began = self.since = time.monotonic()
        self.waited_s = self.waited_before_s = 0.0
        self.profile, self.profiler, self.events = profile if folder else (), None, None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.lines = log.Steps(folder.name.removeprefix("pretrain-"), steps, start=start)
            self.events = _events(folder, start) if tensorboard else None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        started = time.monotonic()
        yield
        self.waited_s += time.monotonic() - started

    def step(self, step: int) -> None:
        """At the start of a step: the profiler begins or ends its window."""
        if self.profile and step == self.profile[0]:
            self.profiler = torch.profiler.profile(with_flops=True).__enter__()
        if self.profiler is not None and step == sum(self.profile):
            self.profiler.__exit__(None, None, None)
            self.profiler.export_chrome_trace(str(self.folder / f"trace-{self.profile[0]:08d}.json"))
            self.profiler = None

    def line(self, line: dict[str, Any]) -> None:
        """After the steps of an interval: their line, as in losses.jsonl, and how fast they were."""
        if self.folder is None:
            return
        step = line["step"]
        speed = self._speed(step - self.shown, time.monotonic() - self.since, self.waited_s)
        self.since, self.shown = time.monotonic(), step
        self.waited_s, self.waited_before_s = 0.0, self.waited_before_s + self.waited_s
        shown = {name: line[name] for name in ("loss", "lr", "grad")}
        more = f"mfu {speed['mfu']:.0%}  data {speed['data_wait']:.0%}  "
        self.lines.line(step, **shown, clips=(step - self.start) * self.batch, more=more)
        with (self.folder / "timings.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **speed}) + "\n")
        for name, value in (shown | speed).items() if self.events else ():
            self.events.add_scalar(name, value, step)

    def _speed(self, steps: int, seconds: float, waited_s: float) -> dict[str, float]:
        clips_per_s = steps * self.batch / seconds
        mfu = clips_per_s * self.flops_per_clip / self.peak
        return {"seconds": seconds, "clips_per_s": clips_per_s, "mfu": mfu, "data_wait": waited_s / seconds}

    def validation(self, step: int, val_loss: float, picture: Tensor | None) -> None:
        """picture: float `H W C` in 0..1, of pretrain.validate."""
        if self.folder is None:
            return
        if picture is not None:
            Image.fromarray((picture * 255).round().byte().numpy()).save(self.folder / f"filled-{step:08d}.png")
        if self.events:
            self.events.add_scalar("val_loss", val_loss, step)
            if picture is not None:
                self.events.add_image("filled", picture, step, dataformats="HWC")

    def close(self) -> dict[str, float]:
        """How fast the training of this process was, up to the last line."""
        if self.events:
            self.events.close()
        if self.shown == self.start:  # all steps were done before
            return {"from_step": self.start}
        speed = self._speed(self.shown - self.start, self.since - self.began, self.waited_before_s)
        return {name: speed[name] for name in ("clips_per_s", "mfu", "data_wait")} | {"from_step": self.start}


def _events(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start)


def peak_flops(device: str, compute: torch.dtype) -> float:
    """Floating-point operations a second: a known GPU's as its maker says it for bfloat16; else measured, of a matrix product."""
    if device == "cuda" and compute == torch.bfloat16:
        name = torch.cuda.get_device_name()
        known = [gpu.bf16_flop_per_s for gpu in GPUS.values() if gpu.name.split()[0] in name]
        if known:
            return known[0]
    left = torch.ones(SIDE, SIDE, dtype=compute, device=device)
    best = min(_seconds(left) for _ in range(3))
    return 2 * SIDE**3 / best


def _seconds(left: Tensor) -> float:
    started = time.monotonic()
    (left @ left)[0, 0].item()  # waits for a GPU
    return time.monotonic() - started
