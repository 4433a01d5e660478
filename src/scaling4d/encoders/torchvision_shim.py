"""Import of torchvision beside a CPU build of torch, with which torchvision's own library does not load."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch


@cache
def declare_operators() -> torch.library.Library | None:
    """Declare torchvision's operators where its library does not load. The cache keeps the declaration alive.

    Call it before an import of torchvision or of a package that imports it (torch-fidelity, transformers).
    """
    package = importlib.util.find_spec("torchvision")
    if package is None:
        return None
    library = Path(package.origin).parent / "_C.so"
    try:
        torch.ops.load_library(library)
        return None
    except OSError:
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return operators
