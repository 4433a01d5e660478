"""Outputs of the official code: in tests/fixtures and in the folders of SCALING4D_FIXTURES, separated by `:`."""

import os
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parents[1] / "fixtures"
ROOTS = [HERE, *(Path(name) for name in os.environ.get("SCALING4D_FIXTURES", "").split(os.pathsep) if name)]
BACKBONE, DEPTH = (HERE / f"4ds_seed0/{name}_params.npz" for name in ("backbone", "depth"))


def named(path: Path) -> str:
    """A test's name for it."""
    return path.name if path.parent == HERE else f"{path.parent.name}/{path.name}"


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path, allow_pickle=False))


def with_head(name: str) -> dict[str, np.ndarray]:
    """The backbone with one of the stand-alone heads, whose 24 input channels are repeated to the backbone's 48."""
    arrays = {key.replace("params/", "params/layers_0/", 1): value for key, value in arrays_of(BACKBONE).items()}
    for key, value in arrays_of(HERE / "4ds_seed0/heads_params.npz").items():
        if key.startswith(f"{name}/"):
            axis = 0 if "LayerNorm_0" in key or "embedding/kernel" in key else -1 if "temporal_posenc" in key else None
            wide = value if axis is None else np.concatenate([value, value], axis)
            arrays[key.replace(f"{name}/params/", "params/layers_2/")] = wide
    return arrays


def official_state() -> dict[str, torch.Tensor]:
    """The state dict of the MAE-ST fixture."""
    arrays = arrays_of(HERE / "mae_st_seed0/released.npz")
    return {key.removeprefix("state/"): torch.from_numpy(value) for key, value in arrays.items() if key.startswith("state/")}
