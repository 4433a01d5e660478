"""Packages for GPU tests and benchmarks on a machine with torch, numpy and no network.

`python -m scaling4d_bench.gpu_wheels` prints a line name==version for each; `make wheels` downloads them.
"""

import re
from importlib import metadata

from packaging.requirements import Requirement

NEEDED = ("av", "distributed", "gin-config", "hydra-core", "imagehash", "pyarrow", "pytest", "rich", "safetensors")
NEEDED += ("scenedetect-headless", "torchdata", "transformers", "typer", "xformers")
PRESENT = {"torch", "torchvision", "numpy"}


def wheels() -> dict[str, str]:
    """Name -> version of the needed distributions and of their requirements, except those that come with torch.

    A requirement with a condition counts if it is installed here and no extra asks for it.
    """
    installed = {_normalise(distribution.name) for distribution in metadata.distributions()}
    versions, waiting = {}, list(NEEDED)
    while waiting:
        name = _normalise(waiting.pop())
        if name not in PRESENT | versions.keys():
            versions[name] = metadata.version(name)
            for requirement in map(Requirement, metadata.requires(name) or []):
                condition = str(requirement.marker or "")
                if not condition or ("extra" not in condition and _normalise(requirement.name) in installed):
                    waiting.append(requirement.name)
    return dict(sorted(versions.items()))


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in wheels().items()))
