"""Memory and speed of GPUs, as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass

# Clips of 16 frames at 224 px, encoded at that size, that a process decodes, crops and flips a second: 37 to 41
# measured on a core of an AMD EPYC (clips.loader.train_batches, crop 0.5 to 1; without crop and flip 60 to 63).
# That a GPU's machine does the same is ours. There the GPU crops and flips; the lower figure is kept.
WORKER_CLIPS_PER_S = 40.0
STORAGE_GB_PER_S = 5.0  # ours: speed of writing checkpoints and reading features that a plan assumes, all GPUs together


@dataclass(frozen=True)
class Gpu:
    """One GPU in a machine of eight.

    memory_bytes: as sold (decimal). bf16_flop_per_s: dense (without sparsity). node_bytes_per_s: to GPUs of the same
    machine, one direction. network_bytes_per_s: to other machines, one direction, a GPU's share of the adapters.
    memory_bytes_per_s: of the GPU's own. host_bytes_per_s: from the machine's. processors: streaming multiprocessors.
    cpu_cores: a GPU's share.
    """

    name: str
    memory_bytes: int
    bf16_flop_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    memory_bytes_per_s: float
    host_bytes_per_s: float
    processors: int
    cpu_cores: int
    source: str


NODE = 8  # GPUs of a machine, in all sources below

GPUS = {
    "h100": Gpu(
        *("H100 SXM 80 GB", 80 * 10**9, 989.4e12, 450e9, 50e9, 3.35e12, 64e9, 132, 14),
        "nvidia.com/en-us/data-center/h100 (1979 TFLOP/s sparse, NVLink 900, PCIe 128 GB/s both ways); "
        "DGX H100: 8 adapters of 400 Gb/s, 112 cores",
    ),
    "h200": Gpu(
        *("H200 SXM 141 GB", 141 * 10**9, 989.4e12, 450e9, 50e9, 4.8e12, 64e9, 132, 14),
        "nvidia.com/en-us/data-center/h200 (1979 TFLOP/s sparse, NVLink 900, PCIe 128 GB/s both ways); "
        "DGX H200: 8 adapters of 400 Gb/s, 112 cores",
    ),
    "a100": Gpu(
        *("A100 SXM 80 GB", 80 * 10**9, 312e12, 300e9, 25e9, 2.039e12, 32e9, 108, 16),
        "nvidia.com/en-us/data-center/a100 (312 TFLOP/s, NVLink 600, PCIe 64 GB/s both ways); "
        "DGX A100 80 GB: 8 adapters of 200 Gb/s, 128 cores",
    ),
    "a100_40": Gpu(
        *("A100 SXM 40 GB", 40 * 10**9, 312e12, 300e9, 25e9, 1.555e12, 32e9, 108, 16),
        "nvidia.com/en-us/data-center/a100 (312 TFLOP/s, NVLink 600, PCIe 64 GB/s both ways); "
        "DGX A100: 8 adapters of 200 Gb/s, 128 cores",
    ),
}
