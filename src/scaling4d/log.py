"""Step lines on the terminal: fixed columns, at most one line an interval. No code parses them."""

from __future__ import annotations

import sys
import time


class StepLog:
    """Prints a line at most every `interval_s` seconds, and always the last one.

    Args:
        name: of the run. start: steps done before.
    """

    def __init__(self, name: str, total: int, *, start: int = 0, interval_s: float = 10.0, out=sys.stderr) -> None:
        self.name, self.total, self.start, self.interval_s, self.out = name, total, start, interval_s, out
        self.started = self.printed = time.monotonic()

    def print(self, step: int, *, loss: float, lr: float, grad: float, clips: int, more: str = "") -> None:
        """clips: seen since `start`. more: further columns."""
        now = time.monotonic()
        if now - self.printed < self.interval_s and step < self.total:
            return
        self.printed = now
        elapsed = now - self.started
        eta = elapsed / (step - self.start) * (self.total - step)
        print(
            f"{self.name}  step {step:05d}/{self.total}  loss {loss:.4f}  lr {lr:.2e}  grad {grad:.2e}  "
            f"{clips / elapsed:.0f} clips/s  {more}eta {int(eta // 60)}m{int(eta % 60):02d}",
            file=self.out,
            flush=True,
        )
