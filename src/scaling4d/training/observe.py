"""Metrics and progress of a training.

`TrainingLog.lines` becomes losses.jsonl and `train_loss`, which are results. Step lines, timings, TensorBoard events
and pictures go to the terminal and to `.runs/<name>/`, by rank 0 alone; no result depends on them.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from scaling4d.log import StepLog
from scaling4d.training.fit import Callback, FitConfig, StepResult
from scaling4d.training.gpus import GPUS


class TrainingLog(Callback):
    """Mean losses, a line every `log_every` steps, and their speed.

    Args:
        folder: for timings, events and pictures; None: none are written. peak_s_per_clip: seconds that a clip's model
            FLOPs take at the peak of all devices together; 0: unknown.
    Attributes:
        lines: so far, each {"step", "clips_seen", "loss", "lr", "grad"}; the loss is the mean over ranks and over the
            steps since the line before whose loss is finite; grad: norm of the gradient before clipping. A step
            without a finite gradient gets no line.
    """

    def __init__(
        self, config: FitConfig, *, folder: Path | None = None, peak_s_per_clip: float = 0.0, tensorboard: bool = False
    ) -> None:
        self.config, self.rank, self.ranks = config, dist.get_rank(), dist.get_world_size()
        self.folder = folder if self.rank == 0 else None
        self.peak_s_per_clip, self.tensorboard = peak_s_per_clip, tensorboard
        self.lines: list[dict[str, Any]] = []
        self.recent: list[Tensor] = []
        self.events: Any = None

    def begin(self, start: int) -> None:
        self.waited_s = 0.0
        self.first = self.shown = (start, time.monotonic(), self.waited_s)  # at the start, and at the last line
        self.terminal = StepLog(self.config.name, self.config.steps, start=start) if self.rank == 0 else None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(str(self.folder), purge_step=start)

    def after_step(self, result: StepResult) -> None:
        self.recent.append(result.loss)
        self.waited_s += result.waited_s
        if not result.last and result.step % self.config.log_every:
            return
        losses = torch.stack(self.recent)
        mean, self.recent = losses[losses.isfinite()].mean(), []
        dist.all_reduce(mean)
        values = {"loss": mean.item() / self.ranks, "lr": result.learning_rate, "grad": result.grad_norm.item()}
        line = {"step": result.step, "clips_seen": result.step * self.config.batch, **values}
        if not all(map(math.isfinite, line.values())):
            return
        self.lines.append(line)
        if self.rank == 0:
            self._show(line)

    def _show(self, line: dict[str, Any]) -> None:
        step, before, self.shown = line["step"], self.shown, (line["step"], time.monotonic(), self.waited_s)
        speed, values = self._speed(before), {name: line[name] for name in ("loss", "lr", "grad")}
        more = f"mfu {speed['mfu']:.0%}  data {speed['data_wait']:.0%}  " if self.peak_s_per_clip else ""
        self.terminal.print(step, **values, clips=(step - self.first[0]) * self.config.batch, more=more)
        if self.folder is not None:
            with (self.folder / "timings.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **speed}) + "\n")
        for name, value in (values | speed).items() if self.events else ():
            self.events.add_scalar(name, value, step)

    def _speed(self, since: tuple[int, float, float]) -> dict[str, float]:
        steps, seconds, waited_s = (now - then for now, then in zip(self.shown, since, strict=True))
        clips_per_s = steps * self.config.batch / seconds
        mfu, data_wait = clips_per_s * self.peak_s_per_clip, waited_s / seconds
        return {"seconds": seconds, "clips_per_s": clips_per_s, "mfu": mfu, "data_wait": data_wait}

    def state_dict(self) -> dict[str, Any]:
        recent: list[list[float]] = [[]] * self.ranks
        dist.all_gather_object(recent, [loss.item() for loss in self.recent])
        return {"lines": self.lines, "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """With another number of ranks, each continues with the mean over the former ones."""
        self.lines, recent = state["lines"], state["recent"]
        losses = recent[self.rank] if len(recent) == self.ranks else [sum(s) / len(s) for s in zip(*recent, strict=True)]
        self.recent = [torch.tensor(loss, device=self.config.device) for loss in losses]

    def validation(self, step: int, measures: Mapping[str, float], picture: Tensor | None) -> None:
        """Write a validation's measures by name, and its picture, float `H W C` in 0..1."""
        if self.rank == 0:
            words = "  ".join(f"{name} {value:.4g}" for name, value in measures.items())
            print(f"{self.config.name}  step {step:05d}/{self.config.steps}  {words}", file=sys.stderr, flush=True)
        if self.folder is None:
            return
        if picture is not None:
            Image.fromarray((picture * 255).round().byte().numpy()).save(self.folder / f"filled-{step:08d}.png")
        if self.events:
            for name, value in measures.items():
                self.events.add_scalar(name, value, step)
            if picture is not None:
                self.events.add_image("filled", picture, step, dataformats="HWC")

    def close(self) -> dict[str, float]:
        """Speed of this process up to its last line."""
        if self.events:
            self.events.close()
        if self.shown is self.first:  # all steps were done before
            return {"from_step": self.first[0]}
        speed = self._speed(self.first)
        return {name: speed[name] for name in ("clips_per_s", "mfu", "data_wait")} | {"from_step": self.first[0]}


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s: the maker's bfloat16 figure of a known GPU, else measured on a matrix product."""
    if device == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        if known := [gpu.bf16_flop_per_s for gpu in GPUS.values() if gpu.name.split()[0] in name]:
            return known[0]
    seconds, flops = matrix_product(torch.device(device), dtype, side=1024)
    return flops / min(seconds() for _ in range(3))


def matrix_product(device: torch.device, dtype: torch.dtype, *, side: int) -> tuple[Callable[[], float], int]:
    """The seconds of one product of square matrices, measured at every call, and its FLOPs."""
    rng = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, dtype=dtype, generator=rng) for _ in range(2))
    out = torch.empty_like(a)

    def seconds() -> float:
        started = time.perf_counter()
        torch.mm(a, b, out=out)[0, 0].item()  # waits for a GPU
        return time.perf_counter() - started

    return seconds, 2 * side**3
