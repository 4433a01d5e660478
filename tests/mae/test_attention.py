"""Attention: packed clips and widths of a GPU's kernels give the plain answer."""

import torch
from nearness import near

from scaling4d import seeds
from scaling4d.mae.attention import align, attention


def queries_keys_values(*, batch: int, heads: int, width: int) -> list[torch.Tensor]:
    return [torch.randn(batch, n, heads, width, generator=seeds.torch_rng(0, str(n))) for n in (5, 7, 7)]


def test_packed_clips_do_not_see_each_other() -> None:
    q, k, v = queries_keys_values(batch=3, heads=2, width=4)
    assert near(attention(q, k, v, packed=True), attention(q, k, v))


def test_queries_of_any_width_are_padded_as_a_gpus_kernels_need_them() -> None:
    q, k, v = queries_keys_values(batch=2, heads=3, width=19)
    padded = align(q, k, v)
    assert {x.shape[-1] for x in padded} == {24}
    assert near(attention(*padded, scale=19**-0.5)[..., :19], attention(q, k, v))
    assert align(k[..., :16])[0].shape[-1] == 16
