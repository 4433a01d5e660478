"""Models by the names that settings and Checkpoint folders use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from scaling4d.config import check_types
from scaling4d.mae.distilled import Distilled
from scaling4d.mae.encoder import Backbone, Method, PixelTokens
from scaling4d.mae.mae_st import MAEST, MAESTEncoder
from scaling4d.mae.simple_mae import SimpleMAE
from scaling4d.records import UserError

METHODS: dict[str, type[Method]] = {cls.__name__: cls for cls in (SimpleMAE, MAEST, Distilled)}
MODELS: dict[str, type[nn.Module]] = METHODS | {cls.__name__: cls for cls in (Backbone, MAESTEncoder, PixelTokens)}


def method_of(section: Mapping[str, Any], key: str, *, with_teacher: bool = False) -> type[Method]:
    """The method of a point's settings: the one key below `model`.

    Args:
        key: of the section, for messages. with_teacher: whether the point has a teacher.
    Raises:
        UserError: not exactly one known method.
    """
    known = [name for name in METHODS if (name == "Distilled") == with_teacher]
    if len(section) != 1 or not section.keys() <= set(known):
        raise UserError(f"{key} has {', '.join(section) or 'nothing'}; needed exactly one of {', '.join(known)}")
    return METHODS[next(iter(section))]


def config_of(model: type[nn.Module], settings: Mapping[str, Any]) -> Any:
    """A model class's config; lists become tuples.

    Raises:
        TypeError: a parameter is missing.
        ValueError: a parameter is unknown or of another type, or the config refuses a value.
    """
    check_types(model.config_class, settings)
    return model.config_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


def encoder_of(model: nn.Module) -> nn.Module:
    """The part that readouts use: `features(pixels)`, `width`, `depth`, `grid`, `clip`."""
    return getattr(model, "encoder", model)
