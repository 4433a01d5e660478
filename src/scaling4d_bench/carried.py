"""What GPU tests and benches need where torch and numpy are, and no network is: `python -m scaling4d_bench.carried` prints it.

A line name==version for every distribution, as installed here; `make wheels` fetches them.
"""

from __future__ import annotations

import re
from importlib import metadata

NEEDED = ("av", "distributed", "gin-config", "hydra-core", "imagehash", "pyarrow", "pytest", "rich", "safetensors")
NEEDED += ("scenedetect-headless", "torchdata", "transformers", "typer", "xformers")
THERE = {"torch", "torchvision", "numpy"}


def carried() -> dict[str, str]:
    """Name -> version of what is needed, and of what that needs in turn, but for what comes with torch."""
    found: dict[str, str] = {}
    waiting = list(NEEDED)
    while waiting:
        name = _plain(waiting.pop())
        if name in THERE or name in found:
            continue
        found[name] = metadata.version(name)
        waiting += [name for name in map(_unconditional, metadata.requires(name) or []) if name]
    return dict(sorted(found.items()))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _unconditional(requirement: str) -> str:
    """The name that is required; nothing if only an extra, another system or another Python asks for it."""
    what, _, condition = requirement.partition(";")
    name = re.match(r"[\w.-]+", what)[0]
    return "" if condition and not _installed(name) or "extra" in condition else name


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in carried().items()))
