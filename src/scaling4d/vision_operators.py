"""What lets torchvision be imported beside a CPU build of torch, with which its own library does not load."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch


@cache
def declare() -> torch.library.Library | None:
    """Call it before anything that imports torchvision (torch-fidelity, transformers); the cache keeps the declaration alive."""
    library = Path(importlib.util.find_spec("torchvision").origin).parent / "_C.so"
    try:
        torch.ops.load_library(library)
        return None
    except OSError:
        declared = torch.library.Library("torchvision", "DEF")
        declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return declared
