"""PYTHON CALLABLE -> ENCODER: an encoder that is code, named by the user as `module:function` or by an entry point.

Its code runs because the user names it on the command line. A folder never causes that: `FunctionEncoder` is among the
models that a Checkpoint folder may name only in a process that has built the callable.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaling4d import artifacts, seeds
from scaling4d.config import require_sizes
from scaling4d.encoders import published
from scaling4d.records import UserError

GROUP = "scaling4d.encoders"  # of entry points
REFERENCE = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"
FIXED_CLIPS = 2
BUILT: dict[str, Callable[[Tensor], Any]] = {}  # by reference, what this process has built


@dataclass(frozen=True)
class FunctionEncoderConfig:
    """function: its reference, of BUILT. clip: T H W, with H = W. grid, width: t h w and D of its features."""

    function: str
    clip: tuple[int, int, int]
    grid: tuple[int, int, int]
    width: int

    def __post_init__(self) -> None:
        require_sizes(self, "clip", "grid", "width")


class FunctionEncoder(nn.Module):
    """A callable with the interface of this project's encoders. Its only layer is what it returns.

    Raises UserError: this process has not built the callable.
    """

    config_class, depth = FunctionEncoderConfig, 0

    def __init__(self, config: FunctionEncoderConfig) -> None:
        super().__init__()
        if config.function not in BUILT:
            raise UserError(f"{config.function} is code, which no folder may start; name it to `scaling4d evaluate`")
        self.name, self.function = config.function, BUILT[config.function]
        self.clip, self.grid, self.width = config.clip, config.grid, config.width

    def load_state_dict(self, *_: Any, **__: Any) -> None:
        """Nothing: the callable has its weights; those of the folder are features that identify it."""

    def resize(self, clip: tuple[int, int, int]) -> None:
        """Raises UserError: clips of another size. The callable's own `clip` decides."""
        if tuple(clip) != self.clip:
            problem = f"{self.name} is shown clips of T H W = {self.clip}, and readout.Evaluation asks for {tuple(clip)}"
            raise UserError(f"{problem}; leave out frames and side_px, and set its attribute clip")

    def features(self, pixels: Tensor, layers: int | None = None) -> list[Tensor]:
        """uint8 `B T H W C` -> one entry, `B N D`."""
        return [torch.as_tensor(self.function(pixels)).to(pixels.device).flatten(1, 2)]


def names_function(model: str) -> bool:
    """Whether the name of a model is `module:function`, or that of an entry point of GROUP."""
    return bool(re.fullmatch(REFERENCE, model)) or bool(metadata.entry_points(group=GROUP, name=model))


def build_function(model: str, clip: tuple[int, int, int]) -> tuple[FunctionEncoderConfig, Tensor, int, dict[str, str]]:
    """Call the named function once, without arguments. It returns the encoder: uint8 `B T H W 3` -> `B t n D`.

    Args:
        clip: T H W that the encoder is shown, unless it has an attribute `clip`.
    Returns:
        config; its features of FIXED_CLIPS fixed clips, which identify it; number of its parameters, 0 if it is no
        `torch.nn.Module`; sha256 by name of the file that defines the function.
    Raises:
        UserError: no such module or function, a package that it lacks, a clip that is not square, or what it returns
            are no such features.
    """
    function = _find(model)
    with _needed_packages(model):
        encoder = function()
    if not callable(encoder):
        problem = f"{model} returned a {type(encoder).__name__}"
        raise UserError(f"{problem}; needed an encoder to call: a function that returns one, or a class")
    parameters = 0
    if isinstance(encoder, nn.Module):
        encoder.eval().requires_grad_(False)
        parameters = sum(weight.numel() for weight in encoder.parameters())
    if torch.cuda.is_initialized():
        problem = f"{model} uses the GPU, which the ranks of an evaluation cannot share with this process"
        raise UserError(f"{problem}; leave the encoder on the CPU: -S readout.Compute.device=cuda moves it")
    clip = tuple(getattr(encoder, "clip", clip))
    if len(clip) != 3 or not all(isinstance(size, int) and size > 0 for size in clip) or clip[1] != clip[2]:
        raise UserError(f"{model} has clip = {clip}; needed whole numbers T H W, with H = W")
    pixels = torch.from_numpy(seeds.numpy_rng(0, "fixed clips").integers(0, 256, (FIXED_CLIPS, *clip, 3), dtype="uint8"))
    with torch.no_grad(), _needed_packages(model):
        returned = encoder(pixels)
    try:
        features = torch.as_tensor(returned)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{model}: the encoder returned a {type(returned).__name__}; needed one tensor B t n D") from error
    _check_features(model, features, clip)
    BUILT[model] = encoder
    published.MODELS[FunctionEncoder.__name__] = FunctionEncoder
    _, t, n, width = features.shape
    try:
        path = inspect.getsourcefile(inspect.unwrap(getattr(function, "func", function)))  # of a functools.partial
    except TypeError:  # an object without source
        path = None
    sources = {Path(path).name: artifacts.sha256(Path(path))} if path else {}
    config = FunctionEncoderConfig(model, clip, (t, math.isqrt(n), math.isqrt(n)), width)
    return config, features.float().contiguous(), parameters, sources


def _find(model: str) -> Callable[[], Any]:
    """The function of a reference or of an entry point. The current folder is searched first, as by `python FILE`."""
    if (folder := os.getcwd()) not in sys.path[:1]:
        sys.path.insert(0, folder)
    if not re.fullmatch(REFERENCE, model):
        model = next(iter(metadata.entry_points(group=GROUP, name=model))).value
    module, _, name = model.partition(":")
    with _needed_packages(model):
        try:
            value = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # one that the module imports
            needed = f"needed one that is installed, or {module}.py in {folder}"
            raise UserError(f"{model}: no module {error.name}; {needed}") from error
    for word in name.split("."):
        if not hasattr(value, word):
            raise UserError(f"{model}: {module} has no {name}; needed a function or class that makes the encoder")
        value = getattr(value, word)
    if not callable(value):
        raise UserError(f"{model} is a {type(value).__name__}; needed a function or class that makes the encoder")
    return value


@contextmanager
def _needed_packages(model: str) -> Iterator[None]:
    """Raises UserError: the user's code imports a package that is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        absent = f"the package {error.name}, which is not installed" if error.name else f"a package: {error}"
        raise UserError(f"{model.partition(':')[0]} needs {absent}") from error


def _check_features(model: str, features: Tensor, clip: tuple[int, int, int]) -> None:
    shape, problem = tuple(features.shape), ""
    if features.ndim != 4 or shape[0] != FIXED_CLIPS or 0 in shape:
        problem = f"needed B t n D with B = {FIXED_CLIPS}"
    elif math.isqrt(shape[2]) ** 2 != shape[2]:
        problem = f"n = {shape[2]} is no square; needed the h x w tokens of the picture alone, row by row"
    elif clip[0] % shape[1]:
        problem = f"t = {shape[1]}; needed a divisor of the {clip[0]} frames"
    elif not features.is_floating_point() or not torch.isfinite(features).all():
        problem = f"{features.dtype} with {int((~torch.isfinite(features)).sum())} infinite or NaN; needed finite floats"
    if problem:
        raise UserError(f"{model}: of clips {(FIXED_CLIPS, *clip, 3)} it makes features {shape}; {problem}")
