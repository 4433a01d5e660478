"""Named random streams: a draw depends on the seed and on the stream's name, never on earlier draws."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def number(seed: int, *names: object) -> int:
    """A 63-bit number for (seed, names): `number(0, "mask", 17)`. Names are words and whole numbers."""
    text = "\x1f".join([str(int(seed)), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_rng(seed: int, *names: object) -> np.random.Generator:
    """NumPy generator of the stream (seed, names)."""
    return np.random.Generator(np.random.PCG64(number(seed, *names)))


def torch_rng(seed: int, *names: object) -> torch.Generator:
    """Torch CPU generator of the stream (seed, names)."""
    import torch

    return torch.Generator().manual_seed(number(seed, *names))
