"""Command `doctor`: versions, the device, and the attention that a model would run."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import invoke

from scaling4d.pipeline import environment

pytestmark = pytest.mark.usefixtures("asked_anew")
_cpp_lib = pytest.importorskip("xformers._cpp_lib", reason="xformers is installed on Linux alone")
TORCH = "torch's scaled_dot_product_attention"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU."""
    zeros = torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: zeros)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """An xformers that was built for another torch."""
    built = "xFormers was built for:\n    PyTorch 2.10.0 (you have 2.13.0)\n"
    error = f"xFormers can't load C++/CUDA extensions. {built}  Please reinstall xformers\n"
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", RuntimeError(error))


def test_doctor_names_the_attention_of_the_cpu(no_gpu: None) -> None:
    shown = invoke("doctor").output.splitlines()
    assert shown[0].startswith("python ") and any(line.startswith("torch ") for line in shown)
    assert f"attention: {TORCH}" in shown


def test_the_attention_of_a_gpu_is_what_xformers_chooses_for_each_type(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from xformers.ops import fmha

    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", None)
    monkeypatch.setattr(fmha, "_dispatch_fw", lambda inputs, gradient: SimpleNamespace(NAME="fa2F@torch"))
    kernels = [f"attention in {dtype}: fa2F@torch of xformers" for dtype in ("bfloat16", "float32")]
    assert [*environment.describe_attention()] == kernels


def test_a_gpu_beside_a_broken_xformers_has_torchs_attention(gpu: None, broken: None) -> None:
    problem = "the library of xformers does not load: xFormers was built for: PyTorch 2.10.0 (you have 2.13.0)"
    shown = f"attention: {TORCH}; {problem}; for xformers run `make install-cuda`"
    assert [*environment.describe_attention()] == [shown]


def test_a_gpu_without_xformers_has_torchs_attention(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    (shown,) = environment.describe_attention()
    assert re.fullmatch(f"attention: {TORCH}; xformers does not import: .+; for xformers run `make install-cuda`", shown)


def test_a_machine_without_a_gpu_names_the_attention_of_one(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", None)
    assert [*environment.describe_attention()][1:] == ["attention on a GPU: xformers, whose library loads"]


def test_a_machine_without_a_gpu_says_why_one_would_not_use_xformers(no_gpu: None, broken: None) -> None:
    problem = "the library of xformers does not load: xFormers was built for: PyTorch 2.10.0 (you have 2.13.0)"
    shown = f"attention on a GPU: {TORCH}; {problem}; for xformers run `make install-cuda` there"
    assert [*environment.describe_attention()][1:] == [shown]
