"""What the pipeline runs on: versions, the device and its attention, missing packages."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from scaling4d.records import UserError


def describe_environment() -> Iterator[str]:
    """Lines for people. Raises UserError after the last one where a package is missing."""
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    missing = []
    for requirement in map(Requirement, metadata.requires("scaling4d") or []):
        core = not requirement.marker or requirement.marker.evaluate({"extra": ""})  # else of an extra, which may be absent
        try:
            yield f"{requirement.name} {metadata.version(requirement.name)}"
        except metadata.PackageNotFoundError:
            missing += [requirement.name] if core else []
    import torch

    yield f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}, {torch.get_num_threads()} threads"
    yield from describe_attention()
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; run `make install`")
    yield "nothing is missing"


def describe_attention() -> Iterator[str]:
    """The kernel of mae.attention on this device, and a warning where xformers, its choice on a GPU, does not load."""
    import torch

    on_gpu = torch.cuda.is_available()
    logging.getLogger("xformers").setLevel(logging.ERROR)  # its own warnings repeat ours
    try:
        from xformers import _cpp_lib
        from xformers.ops import fmha
    except ImportError:
        yield "attention: torch's scaled_dot_product_attention"
        return
    error = _cpp_lib._cpp_library_load_exception
    for dtype in (torch.bfloat16, torch.float32) if on_gpu else ():
        x = torch.empty(1, 64, 4, 64, dtype=dtype, device="cuda")  # B N heads d
        try:
            kernel = fmha._dispatch_fw(fmha.Inputs(query=x, key=x, value=x), True).NAME
        except NotImplementedError:
            kernel = "none"
        yield f"attention in {str(dtype).removeprefix('torch.')}: {kernel} of xformers"
    if not on_gpu:
        yield "attention: torch's scaled_dot_product_attention"
    if error is not None:
        reason = " ".join(str(error).partition("Please")[0].rpartition("extensions. ")[2].split())
        remedy = "run `make install-cuda` there"
        yield f"warning: the library of xformers does not load, so a GPU has no attention; {remedy}: {reason}"
