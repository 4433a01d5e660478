"""Memory and speed of GPUs, as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass

UTILISATION = 0.4  # ours: share of a GPU's peak that a plan assumes
WRITE_GB_PER_S = 5.0  # ours: speed of writing checkpoints that a plan assumes, all GPUs together


@dataclass(frozen=True)
class Gpu:
    """One GPU in a machine of eight.

    memory_bytes: as sold (decimal). bf16_flop_per_s: dense (without sparsity). node_bytes_per_s: to GPUs of the same
    machine, one direction. network_bytes_per_s: to other machines, one direction, a GPU's share of the adapters.
    """

    name: str
    memory_bytes: int
    bf16_flop_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    source: str


NODE = 8  # GPUs of a machine, in all sources below

GPUS = {
    "h100": Gpu(
        *("H100 SXM 80 GB", 80 * 10**9, 989.4e12, 450e9, 50e9),
        "nvidia.com/en-us/data-center/h100 (1979 TFLOP/s sparse, NVLink 900 GB/s both ways); DGX H100: 8 adapters of 400 Gb/s",
    ),
    "h200": Gpu(
        *("H200 SXM 141 GB", 141 * 10**9, 989.4e12, 450e9, 50e9),
        "nvidia.com/en-us/data-center/h200 (1979 TFLOP/s sparse, NVLink 900 GB/s both ways); DGX H200: 8 adapters of 400 Gb/s",
    ),
    "a100": Gpu(
        *("A100 SXM 80 GB", 80 * 10**9, 312e12, 300e9, 25e9),
        "nvidia.com/en-us/data-center/a100 (312 TFLOP/s, NVLink 600 GB/s both ways); DGX A100 80 GB: 8 adapters of 200 Gb/s",
    ),
    "a100_40": Gpu(
        *("A100 SXM 40 GB", 40 * 10**9, 312e12, 300e9, 25e9),
        "nvidia.com/en-us/data-center/a100 (312 TFLOP/s, NVLink 600 GB/s both ways); DGX A100: 8 adapters of 200 Gb/s",
    ),
}
