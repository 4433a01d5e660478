"""Attention: every path gives the plain answer, and the one that is taken is one that works."""

import subprocess
import sys

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


@pytest.fixture(params=["absent", "broken"])
def no_xformers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A xformers that does not import, or whose library does not load."""
    if request.param == "absent":
        return monkeypatch.setitem(sys.modules, "xformers", None)
    _cpp_lib = pytest.importorskip("xformers._cpp_lib", reason="xformers is installed on Linux alone")
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", RuntimeError("xFormers can't load C++/CUDA extensions."))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_where_xformers_does_not_work_a_gpu_runs_torchs_attention(packed: bool, compiled: bool, no_xformers: None) -> None:
    inputs = queries_keys_values(batch=3, heads=2, width=4)
    function = torch.compile(attention, backend="eager", fullgraph=True) if compiled else attention
    out = function(*(x.as_subclass(OnGPU) for x in inputs), packed=packed)
    assert torch.equal(out.as_subclass(torch.Tensor), attention(*inputs))


def test_where_the_library_of_xformers_loads_a_gpu_runs_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    _cpp_lib = pytest.importorskip("xformers._cpp_lib", reason="xformers is installed on Linux alone")
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", None)
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", lambda q, k, v, attn_bias, scale: q + 1)
    q, k, v = (x.as_subclass(OnGPU) for x in queries_keys_values(batch=3, heads=2, width=8))
    for packed in (False, True):
        assert torch.equal(attention(q, k, v, packed=packed), q + 1)


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
