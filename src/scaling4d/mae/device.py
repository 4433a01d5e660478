"""Tensors of the CPU on the device of a model."""

from functools import cache
from typing import Any

import torch
from torch import Tensor


def to_device(value: Tensor, device: str) -> Tensor:
    """A tensor of the CPU on a device. A copy to a GPU goes on beside the work issued before it."""
    if device in ("cpu", value.device.type):
        return value.to(device)
    gpu, copies = torch.get_device_module(device), _copies(device)
    with gpu.stream(copies):
        copy = (value.pin_memory() if device == "cuda" else value).to(device, non_blocking=True)
    gpu.current_stream().wait_stream(copies)
    copy.record_stream(gpu.current_stream())  # its memory is free when the work there is done
    return copy


@cache
def _copies(device: str) -> Any:
    """The stream of all copies to a device."""
    return torch.get_device_module(device).Stream()
