"""Command `doctor`: versions, the device, and the attention that a model would run."""

from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from scaling4d import cli
from scaling4d.pipeline import environment

_cpp_lib = pytest.importorskip("xformers._cpp_lib", reason="xformers is installed on Linux alone")
WARNING = "warning: the library of xformers does not load, so a GPU has no attention; run `make install-cuda` there: "


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU."""
    zeros = torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: zeros)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_doctor_names_the_attention_of_the_cpu() -> None:
    shown = CliRunner().invoke(cli.app, ["doctor"]).output.splitlines()
    assert shown[0].startswith("python ") and any(line.startswith("torch ") for line in shown)
    assert "attention: torch's scaled_dot_product_attention" in shown


def test_the_attention_of_a_gpu_is_what_xformers_chooses_for_each_type(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from xformers.ops import fmha

    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", None)
    monkeypatch.setattr(fmha, "_dispatch_fw", lambda inputs, gradient: SimpleNamespace(NAME="fa2F@torch"))
    kernels = [f"attention in {dtype}: fa2F@torch of xformers" for dtype in ("bfloat16", "float32")]
    assert [*environment.describe_attention()] == kernels


def test_a_library_of_xformers_that_does_not_load_is_a_warning(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from xformers.ops import fmha

    def refuse(inputs: object, gradient: bool) -> None:
        raise NotImplementedError

    built = "xFormers was built for:\n    PyTorch 2.10.0 (you have 2.13.0)\n"
    error = f"xFormers can't load C++/CUDA extensions. {built}  Please reinstall xformers\n"
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", RuntimeError(error))
    monkeypatch.setattr(fmha, "_dispatch_fw", refuse)
    *kernels, warning = environment.describe_attention()
    assert kernels == ["attention in bfloat16: none of xformers", "attention in float32: none of xformers"]
    assert warning == f"{WARNING}xFormers was built for: PyTorch 2.10.0 (you have 2.13.0)"
