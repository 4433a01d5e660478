"""Settings: Hydra composes `experiments/` into params.yaml, a stage reads its declared part, gin hands it to constructors.

This is the only door to Hydra and to gin. A key or a type that no group knows is an error, so a typo cannot pass silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import gin

from scaling4d.records import UserError

PARAMS = Path("params.yaml")
EXPERIMENTS = Path("experiments")

T = TypeVar("T", bound=Callable)


def configurable(constructor: T) -> T:
    """Register a class or function; its parameters are then set by the section that carries its name."""
    return gin.configurable(constructor, module="scaling4d")


def read(path: Path = PARAMS) -> dict[str, Any]:
    """The settings in params.yaml.

    Raises:
        UserError: there is no such file, or it does not hold a mapping.
    """
    import yaml

    if not path.is_file():
        raise UserError(f"no {path} in {Path.cwd()}; run inside the project, or write it with `scaling4d compose`")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}; write it anew with `scaling4d compose`") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, needed settings; write it anew with `scaling4d compose`")
    return values


def section(settings: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, `section(settings, "points.nano")`.

    Raises:
        UserError: the key is not there; the message lists what is.
    """
    value: Any = settings
    for depth, word in enumerate(key.split(".")):
        if not isinstance(value, Mapping) or word not in value:
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else "nothing"
            where = ".".join(key.split(".")[:depth]) or "params.yaml"
            raise UserError(f"no setting {key!r}: {where} has no {word!r}, it has {known}")
        value = value[word]
    return value


def declared(settings: Mapping[str, Any], keys: list[str]) -> dict[str, Any]:
    """The part of the settings that a stage declares, by dotted key."""
    return {key: section(settings, key) for key in keys}


def bind(*sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Give each section's values to the constructor that carries the section's name, and to nothing else.

    Raises:
        UserError: a section or a parameter that no constructor has.
    """
    gin.clear_config()
    for values in sections:
        for name, parameters in values.items():
            if not isinstance(parameters, Mapping):
                raise UserError(f"setting {name} = {parameters!r}: needed a constructor's name with its parameters below it")
            for parameter, value in parameters.items():
                try:
                    gin.bind_parameter(f"{name}.{parameter}", _plain(value))
                except ValueError as error:
                    raise UserError(f"unknown setting {name}.{parameter} = {value!r}: {str(error).splitlines()[0]}") from error


def build(constructor: Callable[..., T], **given: Any) -> T:
    """Call a registered constructor with its bound settings and what only the caller can know.

    Raises:
        UserError: a setting is missing.
    """
    try:
        return constructor(**given)
    except TypeError as error:
        if "missing" in str(error) and "required" in str(error):
            raise UserError(f"{constructor.__name__}: {str(error).splitlines()[0]}; set it in experiments/") from error
        raise


def operative() -> str:
    """Every setting that was in force for the constructors called so far, defaults included, as gin text."""
    return gin.operative_config_str()


def compose(overrides: list[str]) -> dict[str, Any]:
    """The composition of `experiments/` with Hydra overrides such as `profile=smoke` or `seed=1`.

    Raises:
        UserError: a group or key that does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not (EXPERIMENTS / "config.yaml").is_file():
        raise UserError(f"no {EXPERIMENTS}/config.yaml in {Path.cwd()}; run inside the project")
    try:
        with initialize_config_dir(str(EXPERIMENTS.resolve()), version_base=None):
            composed = hydra_compose("config", overrides=overrides)
        OmegaConf.resolve(composed)
        return OmegaConf.to_container(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"cannot compose {' '.join(overrides) or 'the defaults'}: {' '.join(str(error).split())}") from error


def write(overrides: list[str], path: Path = PARAMS) -> None:
    """Write the composition the way `dvc exp run` does, to the byte."""
    from dvc.utils.hydra import compose_and_dump

    compose(overrides)  # says what is wrong before anything is written
    compose_and_dump(str(path.resolve()), str(EXPERIMENTS.resolve()), None, "config", str(EXPERIMENTS.resolve()), overrides)


def overrides(settings: Mapping[str, Any], keys: list[str] | None = None) -> dict[str, Any]:
    """Dotted keys whose values differ from the composition of the settings' profile; with `keys`, only at or below those.

    Raises:
        UserError: a key that no group knows, a key that is missing, or a value of another type.
    """
    composed = _pinned(section(settings, "profile"), EXPERIMENTS.resolve())
    found = dict(_leaves(settings))
    if keys is not None:
        composed, found = ({k: v for k, v in leaves.items() if _below(k, keys)} for leaves in (composed, found))
    for key in sorted(found.keys() - composed.keys()):
        raise UserError(f"params.yaml has {key} = {found[key]!r}, which no group in experiments/ knows; correct or remove it")
    for key in sorted(composed.keys() - found.keys()):
        raise UserError(f"params.yaml lacks {key}; write it anew with `scaling4d compose profile={settings['profile']}`")
    for key, value in found.items():
        if not _same_type(value, composed[key]):
            kind, needed = type(value).__name__, type(composed[key]).__name__
            raise UserError(f"{key} = {value!r} is a {kind}; needed a {needed} such as {composed[key]!r}")
    return {key: value for key, value in sorted(found.items()) if value != composed[key]}


@cache
def _pinned(profile: str, experiments: Path) -> dict[str, Any]:
    """What a profile says, by dotted key, as it was when this was first asked: `experiments` may be edited under way."""
    return dict(_leaves(compose([f"profile={profile}"])))


def _below(key: str, parents: list[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _same_type(value: Any, example: Any) -> bool:
    number = (int, float)
    if isinstance(value, bool) or isinstance(example, bool):
        return type(value) is type(example)
    if isinstance(example, int):
        return isinstance(value, int)
    return isinstance(value, type(example)) or (isinstance(value, number) and isinstance(example, number))


def _plain(value: Any) -> Any:
    """Lists become tuples: settings do not change under way."""
    return tuple(_plain(item) for item in value) if isinstance(value, list) else value
