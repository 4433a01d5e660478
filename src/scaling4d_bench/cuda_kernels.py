"""The attention kernel that xformers chooses on a GPU of a given compute capability, asked on a machine without one.

`python -m scaling4d_bench.cuda_kernels` prints the choice for every head size and compute type of the profiles' points
and attention readouts.
xformers itself chooses, for the inputs that `attention` gives it. Assumed is only what a CPU build of torch lacks and
tests/fixtures/cuda_wheels.json shows of the locked wheels: flash attention is in torch, and xformers' library loads.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from scaling4d import config
from scaling4d.mae.attention import attention
from scaling4d.pretrain.settings import points_of
from scaling4d.readout.heads import HeadConfig
from scaling4d.readout.protocols import Frozen
from scaling4d.readout.stage import bind_task
from scaling4d.training.parallelize import DTYPES

PROFILES = Path("experiments/profile")
CAPABILITIES = {"sm80": (8, 0), "sm90": (9, 0)}  # A100; H100 and H200
SHAPE = (2, 16, 4)  # B N heads: the choice does not depend on them


class _OnGPU(Tensor):
    """A tensor without values that says that it lies on a GPU."""

    device = property(lambda self: torch.device("cuda"))
    is_cuda = property(lambda self: True)


def head_sizes(profiles: Path = PROFILES) -> dict[int, list[str]]:
    """Head size -> points of all profiles that have it, in the encoder or in MAE-ST's decoder, and `profile/task`."""
    models: dict[str, dict[str, Any]] = {}
    sizes: dict[int, set[str]] = {}
    for path in profiles.glob("*.yaml"):
        settings = config.compose([f"profile={path.stem}"])
        models |= {name: next(iter(point["model"].values())) for name, point in points_of(settings).items()}
        for task in settings["readout"]["tasks"]:
            head = bind_task(task, Frozen, settings)[HeadConfig]
            for added in (0, 3, 4) if head.distance_bias else (0,):  # see CrossAttention._distance_terms
                sizes.setdefault(head.width // head.heads + added, set()).add(f"{path.stem}/{task}")
    for point, model in models.items():
        for part in ("", "decoder_"):
            if f"{part}heads" in model:
                sizes.setdefault(model[f"{part}width"] // model[f"{part}heads"], set()).add(point)
    return {size: sorted(sizes[size]) for size in sorted(sizes)}


def chosen_kernels(size: int, dtype: torch.dtype, capability: tuple[int, int], *, packed: bool) -> dict[str, Any]:
    """Names of the operators of the forward and the backward pass, and the head size after padding.

    Call it in a process that imports no xformers otherwise: xformers keeps what it finds at its import.
    """
    chosen: dict[str, Any] = {}

    def choose(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, scale: float) -> Tensor:
        inputs = fmha.Inputs(query=query, key=key, value=value, attn_bias=attn_bias, scale=scale)
        forward = fmha._dispatch_fw(inputs, True)
        backward = fmha._dispatch_bw(inputs, forward.VARLEN_LSE_PACKED if packed else None)
        chosen.update(forward=forward.NAME.split("@")[0], backward=backward.NAME.split("@")[0], padded=query.shape[-1])
        return value

    with mock.patch("torch.backends.cuda.is_flash_attention_available", lambda: True):
        from xformers.ops import fmha
    assumed = {"torch.version.cuda": "12.8", "xformers.ops.fmha.common._built_with_cuda": True}
    assumed |= {"torch.cuda.get_device_capability": lambda *_: capability}
    assumed |= {"xformers.ops.memory_efficient_attention": choose, "scaling4d.mae.attention.runs_xformers": lambda *_: True}
    inputs = [torch.empty(*SHAPE, size, dtype=dtype, device="meta").as_subclass(_OnGPU) for _ in range(3)]
    with ExitStack() as patches:
        for name, value in assumed.items():
            patches.enter_context(mock.patch(name, value))
        attention(*inputs, packed=packed)
    return chosen


def table(sizes: Mapping[int, list[str]]) -> list[dict[str, Any]]:
    return [
        {"size": size, "of": names, "compute": name, "device": device, "packed": packed}
        | chosen_kernels(size, dtype, capability, packed=packed)
        for size, names in sizes.items()
        for name, dtype in DTYPES.items()
        for device, capability in CAPABILITIES.items()
        for packed in (False, True)
    ]


if __name__ == "__main__":
    print(json.dumps(table(head_sizes())))
