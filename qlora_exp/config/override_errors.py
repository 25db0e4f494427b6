"""All mistakes that single overrides show, found at once."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Glob, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.groups import groups
from qlora_exp.config.official_sweeper import official_sweeper_problem
from qlora_exp.config.overrides import glob_matches, is_ours, parse, values_of
from qlora_exp.config.schema import Config
from qlora_exp.config.search_path import search_folders
from qlora_exp.errors import ConfigError, QloraExpError, nearest

UNSAFE_KEYS = ("_target_", "trust_remote_code")


KEY_ALIASES = {
    "lr": "training.learning_rate",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "bs": "training.batch_size",
    "steps": "training.max_steps",
    "target_modules": "targets.modules",
    "quant": "quantization",
    "dataset": "task",
    "data": "task",
    "most_seeds": "sweep.ladder.max_seeds",
}
"""Other tools' names, and those of earlier versions → our keys."""

PLUGIN_GROUPS = ("hydra/launcher", "hydra/sweeper")
LAUNCHER_PACKAGES = {
    "joblib": "hydra-joblib-launcher",
    "ray": "hydra-ray-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
"""Launchers that are in separate packages."""


def problems_of(overrides: Sequence[str], multirun: bool) -> list[QloraExpError]:
    """Return every problem that single overrides show."""
    problems: list[QloraExpError] = []
    try:
        folders = search_folders(overrides)
    except ConfigError as error:
        return [error]
    for text in overrides:
        try:
            override = parse(text)
            if is_ours(override):
                problems.extend(_problems_of_one(override, text, multirun, folders))
            elif sweeper_problem := official_sweeper_problem(override.key_or_group, _text_as_typed(override), text):
                problems.append(sweeper_problem)
            elif override.is_sweep_override():
                what = f"{override.key_or_group} configures how runs are launched, and takes one value"
                problems.append(ConfigError(what, text, "choose one of them"))
            elif override.key_or_group in PLUGIN_GROUPS:
                problems.extend(_problems_of_plugin(override, text))
        except ConfigError as error:
            problems.append(error)
        except HydraException as error:  # a sweep whose values can't be listed
            what = f"{text} can't be listed value by value: {str(error).splitlines()[0]}"
            problems.append(ConfigError(what, "command line", "name the values: key=a,b,c or key=range(1,4)"))
    return problems


def _text_as_typed(override: Override) -> object:
    """Return the value as the user typed it, without quotes."""
    return None if override.is_delete() else str(override.input_line).partition("=")[2].strip("'\"")


def _problems_of_one(override: Override, text: str, multirun: bool, folders: Sequence[Path]) -> Iterable[QloraExpError]:
    key = override.key_or_group
    if any(name in key.split(".") for name in UNSAFE_KEYS):
        yield ConfigError(f"{key} can't be set", text, "remote code and object construction are disabled on purpose")
        return
    if isinstance(override.value(), Glob) and multirun:
        if not glob_matches(override):
            yield ConfigError(
                f"{text} matches no choice", "command line", f"a glob works for a group: {', '.join(groups())}"
            )
        return
    if override.is_sweep_override() and not multirun:
        yield ConfigError(
            f"{key} has several values, but this is a single run",
            text,
            f"python -m qlora_exp -m {text} runs them all; in a list use brackets: {key}=[a,b]",
        )
        return
    if not key:
        yield ConfigError("an override without a key", text, "write key=value")
        return
    choices = groups(folders)
    if key in choices:
        yield from _problems_of_choice(override, text, choices[key])
        return
    if override.is_delete():
        yield ConfigError(f"{key} can't be deleted", text, "set it to null where it may be unknown")
        return
    kind = _schema_type(key)
    if isinstance(kind, ConfigError):
        yield kind
        return
    for value in values_of(override):
        problem = _problem_of_value(key, value, kind, text)
        if problem is not None:
            yield problem


def _problems_of_choice(override: Override, text: str, valid: list[str]) -> Iterable[ConfigError]:
    key = override.key_or_group
    if override.is_delete():
        yield ConfigError(
            f"the group {key} can't be left out", text, f"choose one: {' '.join(f'{key}={choice}' for choice in valid)}"
        )
        return
    for value in values_of(override):
        name = str(value)
        if name not in valid:
            hint = nearest(name, valid)
            if key == "model" and Path(name).expanduser().exists():
                hint = f"model=local model.path={name}"
            yield ConfigError(
                f"{key} has no choice {name!r}", f"{text} ({'sweeps' if key == 'sweeps' else f'conf/{key}'}/)", hint
            )


def _problems_of_plugin(override: Override, text: str) -> Iterable[ConfigError]:
    """Yield an error for a plugin that isn't installed. Hydra alone reports it only when a sweep starts, and never for
    a single run."""
    Plugins.instance()  # imports the installed plugins, which register themselves
    valid = [name.removesuffix(".yaml") for name in ConfigStore.instance().list(override.key_or_group)]
    for value in values_of(override):
        if value not in valid:
            package = LAUNCHER_PACKAGES.get(str(value))
            hint = f"pip install {package}" if package else nearest(str(value), valid)
            yield ConfigError(f"{override.key_or_group} has no choice {value!r}", text, hint)


def _schema_type(key: str) -> Any:
    """Return the type of ``a.b.c`` in the schema, or the error that names the nearest keys."""
    current: Any = Config
    prefix: list[str] = []
    for part in key.split("."):
        if not dataclasses.is_dataclass(current):
            if typing.get_origin(current) is dict:
                return typing.get_args(current)[1]
            return ConfigError(f"{'.'.join(prefix)} holds a single value", key, f"{'.'.join(prefix)}=VALUE")
        hints = _hints(current)
        if part not in hints:
            where = ".".join(prefix) or "the configuration"
            return ConfigError(f"there is no key {key!r}", where, _nearest_key(part, prefix, hints))
        prefix.append(part)
        current = hints[part]
    return current


def _hints(kind: Any) -> dict[str, Any]:
    """Return a schema's keys and types; a group that may be null counts as the group."""
    return {name: _without_null(hint) for name, hint in typing.get_type_hints(kind).items()}


def _without_null(hint: Any) -> Any:
    return next((kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)), hint)


def _nearest_key(part: str, parents: list[str], hints: dict[str, Any]) -> str:
    prefix = "".join(f"{name}." for name in parents)
    known = KEY_ALIASES.get(part)
    same_name = [path for path in _all_keys(Config) if path.rsplit(".", 1)[-1] == part]
    if known is not None:
        return f"did you mean {known}?"
    if same_name:
        return f"did you mean {' or '.join(same_name[:3])}?"
    suggestion = nearest(part, hints)
    return (
        suggestion
        if suggestion.startswith("valid")
        else nearest(f"{prefix}{part}", [f"{prefix}{name}" for name in hints])
    )


def _all_keys(kind: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in _hints(kind).items():
        path = f"{prefix}{name}"
        keys.extend(_all_keys(hint, f"{path}.") if dataclasses.is_dataclass(hint) else [path])
    return keys


def _problem_of_value(key: str, value: Any, kind: Any, text: str) -> ConfigError | None:
    holder = dataclasses.make_dataclass("Holder", [("value", kind)])
    try:
        node = OmegaConf.structured(holder)
        # Hydra resolves an interpolation later; any other value must have the right type now.
        if not (isinstance(value, str) and "${" in value):
            node.value = value
    except (OmegaConfBaseException, ValueError, TypeError):
        return ConfigError(f"{key} must be {_describe(kind)}, not {value!r}", text, _hint_for(kind, value))
    return None


def typed_value(key: str, value: Any) -> Any:
    """Return ``value`` typed by the schema at ``key``: ``nf4`` as its enum, ``1`` as a float if the key is a float.

    Raises:
        ConfigError: there is no such key, or the value has the wrong type.
    """
    kind = _schema_type(key)
    problem = kind if isinstance(kind, ConfigError) else _problem_of_value(key, value, kind, f"{key}={value}")
    if problem is not None:
        raise problem
    node = OmegaConf.structured(dataclasses.make_dataclass("Holder", [("value", kind)]))
    node.value = value
    return typing.cast(Any, OmegaConf.to_object(node)).value


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        inner = [option for option in typing.get_args(kind) if option is not type(None)]
        return f"{_describe(inner[0])} or null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    if dataclasses.is_dataclass(kind):
        return "a group of keys"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if origin is list:
        return f"a list, e.g. [{'a,b' if typing.get_args(kind)[0] is str else '1,2'}]"
    if origin is dict:
        return "a mapping, e.g. {a: b}"
    return names.get(kind, str(kind))


def _hint_for(kind: Any, value: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return nearest(str(value), kind.__members__)
    return f"give it {_describe(kind)}"
