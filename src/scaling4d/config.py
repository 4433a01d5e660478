"""Settings: Hydra composes `experiments/` into params.yaml, a stage declares its part, gin builds its configs of that.

No other module imports Hydra or gin, and this one does so at first use, since encoders alone need neither. An unknown
key or a wrong type is an error, so a typo cannot pass silently. A config is a frozen dataclass that checks itself; its
section in params.yaml has the class's name without `Config`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher, get_close_matches
from functools import cache, reduce
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from scaling4d.provenance import flatten, is_below
from scaling4d.records import UserError, did_you_mean, shortened

PARAMS = Path("params.yaml")
EXPERIMENTS = Path("experiments")
RENAMED = (  # former names of settings, as patterns of dotted keys; a table in experiments/LOG.md
    (r"^((points|distilled|continued)\.\w+)\.(SimpleMAE|MAEST|Distilled)\.", r"\1.model.\3."),
    (r"^pretrain\.Running\.", "pretrain.Runtime."),
    (r"^clips\.Curation\.workers$", "clips.Workers.processes"),
    (r"^clips\.Curation\.cluster$", "clips.Workers.cluster"),
    (r"^readout\.shared\.", "readout."),
    (r"^readout\.tuning\.(Tuning|Compute)\.", "readout.Compute."),
    (r"^readout\.tuning\.Sharding\.", "readout.Sharding."),
    (r"^(readout\.frozen\.\w+)\.Recipe\.", r"\1.Frozen."),
    (r"^(readout\.finetune\.\w+)\.Recipe\.", r"\1.Finetune."),
    (r"\.flattening$", ".shrinkage"),
    (r"\.keep$", ".keep_latest_k"),
    (r"\.kept_clips$", ".cached_clips"),
    (r"\.every$", ".save_every"),
    (r"\.standardise$", ".whiten"),
    (r"\.place_deviation$", ".position_std"),
    (r"\.sharpness$", ".distance_bias"),
    (r"\.Points\.queries$", ".Points.queries_at"),
)

PROTOCOLS = ("frozen", "finetune", "classifier")  # of readouts; lists of encoders below `encoders`
POINTS = ("points", "distilled", "continued")  # groups of points: from random weights, with a teacher, from a checkpoint
MOST_SIZE = 2**20  # of any side, width or count of a model
LARGEST_INT, LARGEST_FLOAT = 2**63, 1e300  # larger numbers overflow somewhere

T = TypeVar("T")


def read(path: Path = PARAMS) -> dict[str, Any]:
    """The settings in params.yaml.

    Raises:
        UserError: no such file, or not a mapping.
    """
    import yaml

    if not path.is_file():
        raise UserError(f"no {path} in {Path.cwd()}; run inside the project, or write it with `scaling4d compose`")
    try:
        values = yaml.safe_load(path.read_text())
        dict(flatten(values if isinstance(values, dict) else {}))  # an alias may lead back into itself
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that is none
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}; write it anew with `scaling4d compose`") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, needed settings; write it anew with `scaling4d compose`")
    return values


def section(settings: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, `section(settings, "points.nano")`.

    Raises:
        UserError: no such key; the message lists the keys beside it.
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
    """The part of the settings that a stage declares in dvc.yaml, by dotted key."""
    return {key: section(settings, key) for key in keys}


@dataclass(frozen=True)
class StageConfig:
    """The settings of a stage, bound once.

    declared: by dotted key, as dvc.yaml declares them. overrides: those that differ from the profile. operative: gin's
    text of all values in force, class defaults included. configs: by class, with those that are not recorded.
    """

    declared: Mapping[str, Any]
    overrides: Mapping[str, Any]
    operative: str
    configs: Mapping[type, Any]

    def __getitem__(self, kind: type[T]) -> T:
        """The config of a class."""
        return self.configs[kind]


def bind(
    settings: Mapping[str, Any], keys: list[str], *classes: type, unrecorded: Mapping[str, type] = MappingProxyType({})
) -> StageConfig:
    """Build one config of each class from the declared settings; a later key wins over an earlier one.

    Args:
        keys: dotted keys of sections that hold classes (`clips`: {Curation: {...}}), of a class itself
            (`pretrain.Training`), or of plain values (`seed`).
        unrecorded: classes by dotted key, on which no result depends. Their configs are built too; `declared`,
            `overrides` and `operative` leave them out.
    Raises:
        UserError: an unknown section or parameter, a missing one, or a value that the class refuses.
    """
    values, overridden = declared(settings, keys), overrides(settings, keys)
    bound = replace(build(values, *classes), overrides=overridden)
    if unrecorded:
        configs = bind(settings, [*unrecorded], *unrecorded.values()).configs
        bound = replace(bound, configs={**bound.configs, **configs})
    return bound


def build(values: Mapping[str, Any], *classes: type) -> StageConfig:
    """Build one config of each class from sections by dotted key, such as those that a provenance.json recorded.

    Raises:
        UserError: as `bind`.
    """
    import gin

    known, origin = {section_of(cls): cls for cls in classes}, {}
    gin.clear_config()
    for key, value in values.items():
        *parents, last = key.split(".")
        sections = {last: value} if last in known else value if isinstance(value, Mapping) else {}
        for name, parameters in sections.items():
            where = key if name == last else f"{key}.{name}"
            if name not in known or not isinstance(parameters, Mapping):
                needed = f"needed {', '.join(known) or 'nothing'} there{did_you_mean(name, known)}"
                raise UserError(f"unknown setting {where} = {parameters!r}; {needed}")
            origin[name] = where
            _registered(known[name])
            try:
                check_types(known[name], parameters, f"{where}.")
            except ValueError as error:
                raise UserError(str(error)) from error
            for parameter, item in parameters.items():
                gin.bind_parameter(f"{name}.{parameter}", _to_tuples(item))
    configs = {}
    for name, cls in known.items():
        try:
            configs[cls] = _registered(cls)()
        except TypeError as error:
            if "missing" not in str(error):
                raise
            raise UserError(f"{origin.get(name, name)}: {str(error).splitlines()[0]}; set it in experiments/") from error
        except ValueError as error:
            raise UserError(f"{origin.get(name, name)}: {str(error).splitlines()[0]}") from error
    operative = gin.operative_config_str()
    gin.clear_config()
    return StageConfig(values, {}, operative, configs)


def section_of(cls: type) -> str:
    """The name of a class's section in params.yaml: `Curation` of `CurationConfig`."""
    return cls.__name__.removesuffix("Config")


def require_minima(values: Any, minima: Mapping[str, float]) -> None:
    """Check fields of a config, for its `__post_init__`. Raises ValueError: a field is below its minimum."""
    for name, least in minima.items():
        if getattr(values, name) < least:
            raise ValueError(f"{name} is {getattr(values, name)}; needed {least} or more")


def require_positive(values: Any, *names: str) -> None:
    """Check fields of a config, for its `__post_init__`. Raises ValueError: a field is 0 or less."""
    for name in names:
        if getattr(values, name) <= 0:
            raise ValueError(f"{name} is {getattr(values, name)}; needed more than 0")


def require_sizes(values: Any, *names: str, least: int = 1, most: int = MOST_SIZE) -> None:
    """Check sizes of a model, for its config's `__post_init__`. Raises ValueError: one is not in least .. most.

    A size may be a tuple. No model in sight has a larger one, and it would only be noticed when memory runs out.
    """
    for name in names:
        size = getattr(values, name)
        sizes, needed = (size, "numbers") if isinstance(size, tuple) else ([size], "a number")
        if not all(least <= one <= most for one in sizes):
            raise ValueError(f"{name} = {size}; needed {needed} from {least} to {most:,}")


def require_words(values: Any, words: Mapping[str, Sequence[str]]) -> None:
    """Check fields of a config, for its `__post_init__`. Raises ValueError: a field is none of its known words."""
    for name, known in words.items():
        if (word := getattr(values, name)) not in known:
            needed = " or ".join([", ".join(known[:-1]), known[-1]] if known[1:] else known)
            raise ValueError(f"{name} = {word!r}; needed {needed}{did_you_mean(word, known)}")


def check_types(cls: type, values: Mapping[str, Any], where: str = "") -> None:
    """Check values for the fields of a dataclass by its annotations: a list does for a tuple, an int for a float.

    where: before a field's name in messages.
    Raises ValueError: an unknown field, a value of another type, or a number that is infinite, NaN or absurdly large.
    """
    kinds, known = _kinds(cls), [field.name for field in fields(cls)]
    for name, value in values.items():
        if name not in known:
            hint = did_you_mean(name, known) or f"; {section_of(cls)} has {', '.join(known)}"
            raise ValueError(f"unknown setting {where}{name} = {value!r}{hint}")
        if not _fits(value, kinds[name]):
            raise ValueError(f"{where}{name} = {value!r} is a {type(value).__name__}; needed {_words(kinds[name])}")


_kinds = cache(get_type_hints)


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple and parts[1:] == (...,):
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, parts[1]) for item in value.values())
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) < LARGEST_FLOAT  # false for NaN
    if kind is int:
        return isinstance(value, int) and abs(value) < LARGEST_INT
    return isinstance(value, origin or kind)


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, parts))
    if origin is tuple:
        return f"a list of {_words(parts[0])} each" if parts[1:] == (...,) else f"[{', '.join(map(_words, parts))}]"
    if origin is Mapping:
        return f"{_words(parts[1])} by name"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word", NoneType: "nothing"}
    words |= {Mapping: "a mapping"}
    return words.get(kind, f"a {getattr(kind, '__name__', kind)}")


@cache
def _registered(cls: type[T]) -> type[T]:
    import gin

    return gin.external_configurable(cls, name=section_of(cls), module="scaling4d")


def compose(overrides: list[str]) -> dict[str, Any]:
    """The composition of `experiments/` with Hydra overrides such as `profile=smoke` or `seed=1`.

    Raises:
        UserError: a group or key that does not exist.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not (EXPERIMENTS / "config.yaml").is_file():
        raise UserError(f"no {EXPERIMENTS}/config.yaml in {Path.cwd()}; run inside the project")
    try:
        return _hydra_compose(overrides)
    except YAMLError as error:
        raise UserError(f"a file in {EXPERIMENTS}/ is not YAML: {' '.join(str(error).split())}; correct it") from error
    except (HydraException, OmegaConfBaseException, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        given = " ".join(overrides) or "the defaults"
        raise UserError(f"cannot compose {given}: {_why_not_composed(error, overrides)}") from error


def _hydra_compose(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(EXPERIMENTS.resolve()), version_base=None):
        composed = hydra_compose("config", overrides=overrides)
    OmegaConf.resolve(composed)
    return OmegaConf.to_container(composed, throw_on_missing=True)


def _why_not_composed(error: Exception, overrides: list[str]) -> str:
    """Hydra's reason in our words: the nearest known names in place of its advice to add an unknown key."""
    if options := getattr(error, "options", None):
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"no {group} {name!r}; needed one of {', '.join(options)}{did_you_mean(name, options)}"
    text = shortened(str(error).partition("\nSee https://hydra.cc")[0])
    if not (match := re.match(r"Could not override '([^']*)'", text)):
        return text
    key = match[1]
    if (new := renamed(key)) != key:
        return f"unknown setting; {key} is {new} now"
    chosen = [one for one in overrides if "@" in one or (EXPERIMENTS / one.lstrip("+~").partition("=")[0]).is_dir()]
    try:
        known = [key for key, _ in flatten(_hydra_compose(chosen))]
    except (type(error), ValueError):  # one of those is wrong, too
        return text
    return f"unknown setting {key!r}{_near_keys(key, known)}"


def _near_keys(key: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown dotted key: up to three known ones, of the same last word if there are."""
    same_end = [one for one in known if f".{one}".endswith(f".{key}")]
    words = {one.rpartition(".")[2] for one in known}
    ends = [key.rpartition(".")[2]] if key.rpartition(".")[2] in words else get_close_matches(key.rpartition(".")[2], words, 3)
    ratios = {one: SequenceMatcher(None, one, key).ratio() for one in known if one.rpartition(".")[2] in ends}
    near = same_end or sorted((one for one in ratios if ratios[one] > max(ratios.values()) - 0.1), key=ratios.get, reverse=True)
    return f"; did you mean {' or '.join(near[:3])}?" if near else "; experiments/config.yaml lists the settings"


def write(overrides: list[str], path: Path = PARAMS, check: Callable[[Mapping[str, Any]], object] = dict) -> None:
    """Write the composition the way `dvc exp run` does, to the byte.

    check: raises UserError for settings that some stage would refuse; nothing is written then.
    """
    from dvc.utils.hydra import compose_and_dump

    check(compose(overrides))
    compose_and_dump(str(path.resolve()), str(EXPERIMENTS.resolve()), None, "config", str(EXPERIMENTS.resolve()), overrides)


def overrides(settings: Mapping[str, Any], keys: list[str] | None = None) -> dict[str, Any]:
    """Dotted keys whose values differ from the composition of the settings' profile; `keys`: only at or below those.

    Raises:
        UserError: a key that no group knows, a key that is missing, or a value of another type.
    """
    if not isinstance(profile := section(settings, "profile"), str):
        raise UserError(f"params.yaml has profile = {profile!r}; needed a word")
    composed = _pinned(profile, EXPERIMENTS.resolve())
    given = dict(flatten(settings))
    if keys is not None:
        composed, given = ({k: v for k, v in leaves.items() if is_below(k, keys)} for leaves in (composed, given))
    for key in sorted(given.keys() - composed.keys()):
        reason, new = f"which no group in experiments/ knows; correct or remove it{did_you_mean(key, composed)}", renamed(key)
        raise UserError(f"params.yaml has {key} = {given[key]!r}, {f'which is {new} now' if new in composed else reason}")
    for key in sorted(composed.keys() - given.keys()):
        raise UserError(f"params.yaml lacks {key}; write it anew with `scaling4d compose profile={settings['profile']}`")
    for key, value in given.items():
        if not _same_type(value, composed[key]):
            needed = _words(type(composed[key]))
            raise UserError(f"{key} = {value!r} is a {type(value).__name__}; needed {needed} such as {composed[key]!r}")
    return {key: value for key, value in sorted(given.items()) if value != composed[key]}


def renamed(key: str) -> str:
    """The name today of a setting by a former name, or the key itself."""
    return reduce(lambda new, rule: re.sub(*rule, new), RENAMED, key)


@cache
def _pinned(profile: str, experiments: Path) -> dict[str, Any]:
    """A profile's settings by dotted key, as they were at the first call: `experiments` may be edited during a run."""
    return dict(flatten(compose([f"profile={profile}"])))


def _same_type(value: Any, example: Any) -> bool:
    number = (int, float)
    if isinstance(value, bool) or isinstance(example, bool):
        return type(value) is type(example)
    if isinstance(example, int):
        return isinstance(value, int)
    return isinstance(value, type(example)) or (isinstance(value, number) and isinstance(example, number))


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(item) for item in value) if isinstance(value, list) else value
