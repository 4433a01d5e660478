"""What the pipeline runs on: versions, the device and its attention, missing packages."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from scaling4d.records import LOCK, UserError, pip_install

EXTRA = re.compile(r"extra == .(\w+)")
TORCH_ATTENTION = "torch's scaled_dot_product_attention"
HEAD_SIZES = (32, 64, 80, 104, 112, 128)  # of the published sizes and of MAE-ST's decoder


def describe_environment() -> Iterator[str]:
    """Lines for people. Raises UserError after the last one where a package of the core is missing."""
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    versions, missing = {}, {}
    for requirement in map(Requirement, metadata.requires("scaling4d") or []):
        extra = match[1] if (match := EXTRA.search(str(requirement.marker))) else ""  # "": the core
        if requirement.name == "scaling4d" or requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            versions[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.setdefault(extra, []).append(requirement.name)
    yield from map(" ".join, versions.items())
    import torch

    yield f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}, {torch.get_num_threads()} threads"
    yield from describe_attention()
    if core := missing.pop("", []):
        install = "make install" if Path(LOCK).is_file() else "pip install scaling4d"
        raise UserError(f"not installed: {', '.join(core)}; run `{install}`")
    for extra, names in missing.items():
        yield f"extra {extra} lacks {', '.join(names)}; where you need it, run `{pip_install(extra)}`"
    yield "the core is complete" if missing else "nothing is missing"


def describe_attention() -> Iterator[str]:
    """What mae.attention runs on this device, and on a GPU, with the reason where that is not xformers."""
    import torch

    from scaling4d.mae.attention import xformers_problem

    logging.getLogger("xformers").setLevel(logging.ERROR)  # its own warnings repeat ours
    on_gpu, problem = torch.cuda.is_available(), xformers_problem()
    if not on_gpu:
        yield f"attention: {TORCH_ATTENTION}"
    if problem:
        remedy = "for xformers run `make install-cuda`" + ("" if on_gpu else " there")
        yield f"attention{'' if on_gpu else ' on a GPU'}: {TORCH_ATTENTION}; {problem}; {remedy}"
    elif on_gpu:
        yield from _kernels()
    else:
        yield "attention on a GPU: xformers, whose library loads"


def _kernels() -> Iterator[str]:
    """Of this GPU, by type, with the head sizes that each takes."""
    import torch

    from scaling4d.mae.attention import xformers_kernel

    for dtype in (torch.bfloat16, torch.float32):
        sizes: dict[str, list[str]] = {}
        problems = []
        for size in HEAD_SIZES:
            kernel, problem = xformers_kernel(size, dtype, torch.device("cuda"))
            sizes.setdefault(f"{kernel} of xformers" if kernel else TORCH_ATTENTION, []).append(str(size))
            problems += [problem] if problem else []
        shown = "; ".join([*(f"{name} for heads of {', '.join(taken)}" for name, taken in sizes.items()), *problems])
        yield f"attention in {str(dtype).removeprefix('torch.')}: {shown}"
