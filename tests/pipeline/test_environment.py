"""Command `doctor`: versions, the device, and the attention that a model would run."""

import sys
from types import SimpleNamespace

import pytest
import torch
from commands import invoke

from scaling4d.pipeline import environment

pytestmark = pytest.mark.usefixtures("asked_anew")
_cpp_lib = pytest.importorskip("xformers._cpp_lib", reason="xformers is installed on Linux alone")
TORCH = "torch's scaled_dot_product_attention"


REMEDY = "for xformers run `make install-cuda`"
BUILT = "xFormers was built for:\n    PyTorch 2.10.0 (you have 2.13.0)\n"
LOADS_NOT = f"{TORCH}; the library of xformers does not load: {' '.join(BUILT.split())}; {REMEDY}"
IMPORTS_NOT = f"{TORCH}; xformers does not import: import of xformers halted; None in sys.modules; {REMEDY}"
NONE = [f"xformers has no kernel for heads of {size} in torch.{{}}: it is made up" for size in (112, 128)]
KERNELS = "; ".join(["fa2F@torch of xformers for heads of 32, 64, 80, 104", f"{TORCH} for heads of 112, 128", *NONE])


def kernel_of(inputs: SimpleNamespace, needs_gradient: bool) -> SimpleNamespace:
    if inputs.query.shape[-1] > 112:
        raise NotImplementedError("it is made up")
    return SimpleNamespace(NAME="fa2F@torch")


def backward_kernel_of(inputs: SimpleNamespace, varlen_lse_packed: None) -> None:
    if inputs.query.shape[-1] > 104:
        raise NotImplementedError("it is made up")


@pytest.mark.parametrize(("gpu", "xformers", "shown"), [
    (True, "works", [f"attention in {dtype}: {KERNELS.format(dtype, dtype)}" for dtype in ("bfloat16", "float32")]),
    (True, "broken", [f"attention: {LOADS_NOT}"]),
    (True, "absent", [f"attention: {IMPORTS_NOT}"]),
    (False, "works", [f"attention: {TORCH}", "attention on a GPU: xformers, whose library loads"]),
    (False, "broken", [f"attention: {TORCH}", f"attention on a GPU: {LOADS_NOT} there"]),
])  # fmt: skip
def test_the_attention_is_named_with_what_keeps_a_gpu_from_xformers(
    gpu: bool, xformers: str, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: an xformers that was built for another torch."""
    from xformers.ops import fmha

    error = f"xFormers can't load C++/CUDA extensions. {BUILT}  Please reinstall xformers\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: torch.zeros(shape))
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", RuntimeError(error) if xformers == "broken" else None)
    monkeypatch.setattr(fmha, "_dispatch_fw", kernel_of)
    monkeypatch.setattr(fmha, "_dispatch_bw", backward_kernel_of)
    if xformers == "absent":
        monkeypatch.setitem(sys.modules, "xformers", None)
    assert [*environment.describe_attention()] == shown


def test_doctor_names_versions_and_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shown = invoke("doctor").output.splitlines()
    assert shown[0].startswith("python ") and any(line.startswith("torch ") for line in shown)
    assert f"attention: {TORCH}" in shown
