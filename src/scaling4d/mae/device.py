"""Tensors of the CPU on the device of a model."""

from torch import Tensor


def to_device(value: Tensor, device: str) -> Tensor:
    """A tensor of the CPU on a device. The copy to a GPU waits for nothing."""
    return (value.pin_memory() if device == "cuda" else value).to(device, non_blocking=True)
