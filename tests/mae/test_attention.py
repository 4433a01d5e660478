"""Attention: every path gives the plain answer, and the one that is taken is one that works."""

import importlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from nearness import near
from torch.nn import functional as F

from scaling4d import seeds
from scaling4d.mae.attention import align, attention

pytestmark = pytest.mark.usefixtures("asked_anew")


class OnGPU(torch.Tensor):
    """A tensor of the CPU whose `is_cuda` is true."""

    is_cuda = property(lambda self: True)


def queries_keys_values(*, batch: int, heads: int, width: int) -> list[torch.Tensor]:
    return [torch.randn(batch, n, heads, width, generator=seeds.torch_rng(0, str(n))) for n in (5, 7, 7)]


def test_packed_clips_are_a_batch_without_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = queries_keys_values(batch=3, heads=2, width=4)
    plain, shapes, torchs = attention(q, k, v), [], F.scaled_dot_product_attention

    def note(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: object) -> torch.Tensor:
        shapes.append(q.shape)
        return torchs(q, k, v, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    assert torch.equal(attention(q, k, v, packed=True), plain)
    assert shapes == [(3, 2, 5, 4)]


@pytest.fixture(params=["absent", "broken", "OSError", "RuntimeError", "AttributeError", "TypeError"])
def no_xformers(request: pytest.FixtureRequest, make_xformers: Callable, monkeypatch: pytest.MonkeyPatch) -> str:
    """A xformers that does not import, or whose library does not load. Returns the reason."""
    if request.param == "absent":
        monkeypatch.setitem(sys.modules, "xformers", None)
        return "xformers does not import: import of xformers halted; None in sys.modules"
    if request.param == "broken":
        make_xformers()
        _cpp_lib = importlib.import_module("xformers._cpp_lib")
        error = RuntimeError("xFormers can't load C++/CUDA extensions. It was built for another torch.\n  Please reinstall")
        monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", error)
        return "the library of xformers does not load: It was built for another torch."
    make_xformers(f"raise {request.param}('libcudart.so.12:\\n no such file')")
    return "xformers does not import: libcudart.so.12: no such file"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_where_xformers_does_not_work_a_gpu_runs_torchs_attention(
    packed: bool, compiled: bool, no_xformers: str, capsys: pytest.CaptureFixture
) -> None:
    inputs = queries_keys_values(batch=3, heads=2, width=4)
    torch.compiler.reset()  # answers are constants of compiled code
    function = torch.compile(attention, backend="eager", fullgraph=True) if compiled else attention
    for _ in range(2):
        out = function(*(x.as_subclass(OnGPU) for x in inputs), packed=packed)
        assert torch.equal(out.as_subclass(torch.Tensor), attention(*inputs))
    assert capsys.readouterr().err == f"warning: attention is torch's scaled_dot_product_attention: {no_xformers}\n"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpu_runs_xformers_where_it_has_a_kernel_and_asks_once(
    packed: bool, compiled: bool, make_xformers: Callable, capsys: pytest.CaptureFixture
) -> None:
    make_xformers()
    torch.compiler.reset()
    function = torch.compile(attention, backend="eager", fullgraph=True, dynamic=False) if compiled else attention
    for width, dtype in ((8, torch.float32), (72, torch.float32), (8, torch.float64)) * 2:
        inputs = [x.to(dtype) for x in queries_keys_values(batch=3, heads=2, width=width)]
        out = function(*(x.as_subclass(OnGPU) for x in inputs), packed=packed).as_subclass(torch.Tensor)
        assert torch.equal(out, inputs[0] + 1 if (width, dtype) == (8, torch.float32) else attention(*inputs))
    assert len(sys.modules["xformers.ops.fmha"].dispatched) == 3
    assert capsys.readouterr().err.splitlines() == [
        f"warning: attention is torch's scaled_dot_product_attention: xformers has no kernel for heads of {heads}: "
        "`cutlassF` is not supported because: it is made up"
        for heads in ("72 in torch.float32", "8 in torch.float64")
    ]


def test_attention_on_a_cpu_imports_no_xformers() -> None:
    code = "import sys, torch; from scaling4d.mae.attention import attention; attention(*[torch.ones(1, 2, 1, 8)] * 3)\n"
    code += "assert 'xformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_queries_of_any_width_are_padded_as_a_gpus_kernels_need_them() -> None:
    q, k, v = queries_keys_values(batch=2, heads=3, width=19)
    padded = align(q, k, v)
    assert {x.shape[-1] for x in padded} == {24}
    assert near(attention(*padded, scale=19**-0.5)[..., :19], attention(q, k, v))
    assert align(k[..., :16])[0].shape[-1] == 16
