"""All mistakes that single overrides show, found at once."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Glob, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.choices import choice_names, groups
from qlora_exp.config.model_choice import model_choice_hint
from qlora_exp.config.other_tools import counterpart, has_key, setting_text, suggestion
from qlora_exp.config.other_values import value_here
from qlora_exp.config.overrides import first_choice, glob_matches, is_hydra, parse, search_folders, values_of
from qlora_exp.config.schema import Config
from qlora_exp.errors import ConfigError, QloraExpError, nearest
from qlora_exp.paths import CONF

UNSAFE_KEYS = ("_target_", "trust_remote_code")

PLUGIN_GROUPS = ("hydra/launcher", "hydra/sweeper")
LAUNCHER_PACKAGES = {
    "joblib": "hydra-joblib-launcher",
    "ray": "hydra-ray-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
"""Launchers that are in separate packages."""
LAUNCHER_PRESETS = {"local": "joblib", "ray_cluster": "ray", "slurm": "submitit_slurm"}
"""Our file in conf/hydra/launcher → the launcher that it configures."""

OWN_SWEEPER_KEYS = ("_target_", "params")
"""The keys that ``hydra/sweeper=qlora_optuna`` has."""
OFFICIAL_SWEEPER_REPLACEMENTS = {
    "n_trials": "sweep.n_trials={value}",
    "storage": "sweep.storage={value}",
    "study_name": "sweep.name={value}",
    "n_jobs": "workers.count={value}",
    "direction": "sweep.objectives='[{value} scores.after.accuracy]'",
    "max_failure_rate": "sweep.max_failures={value}",
    "sampler": "sweep.sampler=tpe, random, grid, … and sweep.seed; its other options: sweep.sampler_options",
    "search_space": "KEY=choice(…) or KEY=interval(…) on the command line, or sweep.params={{KEY: '…'}}",
    "custom_search_space": "sweep.conditions, which says when an axis is searched",
}
"""Option of Hydra's official Optuna sweeper → what to write here instead."""


def problems_of(overrides: Sequence[str], multirun: bool) -> list[QloraExpError]:
    """Return every problem that single overrides show."""
    problems: list[QloraExpError] = []
    try:
        folders = search_folders(overrides)
    except ConfigError as error:
        return [error]
    others = _settings_of_other_tools(overrides)
    for text in overrides:
        try:
            override = parse(text)
            if is_hydra(override.key_or_group):
                problems.extend(_problems_of_hydras_own(override, text))
            else:
                problems.extend(_problems_of_ours(override, text, multirun, folders, others))
        except ConfigError as error:
            problems.append(error)
        except HydraException as error:  # a sweep whose values can't be listed
            what = f"{text} can't be listed value by value: {str(error).splitlines()[0]}"
            problems.append(ConfigError(what, "command line", "name the values: key=a,b,c or key=range(1,4)"))
    return problems


def _settings_of_other_tools(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings whose keys only other tools have, by the last part of the key; a batch size needs two."""
    settings = {}
    for text in overrides:
        key, sign, value = text.lstrip("+").partition("=")
        if sign and counterpart(key) is not None and not has_key(Config, key):
            settings[key.rpartition(".")[2]] = value
    return settings


def _problems_of_ours(
    override: Override, text: str, multirun: bool, folders: Sequence[Path], others: Mapping[str, Any]
) -> Iterable[QloraExpError]:
    key = override.key_or_group
    if any(name in key.split(".") for name in UNSAFE_KEYS):
        raise ConfigError(f"{key} can't be set", text, "remote code and object construction are disabled on purpose")
    if isinstance(override.value(), Glob) and multirun:
        if not glob_matches(override):
            hint = f"a glob works for a group: {', '.join(groups())}"
            raise ConfigError(f"{text} matches no choice", "command line", hint)
        return
    if override.is_sweep_override() and not multirun:
        raise ConfigError(f"{key} has several values, but this is a single run", text, _hint_for_several(key, text))
    if not key:
        raise ConfigError("an override without a key", text, "write key=value")
    valid = groups(folders).get(key)
    if valid is not None:
        if override.is_delete():
            hint = f"choose one: {' '.join(f'{key}={choice}' for choice in valid)}"
            raise ConfigError(f"the group {key} can't be left out", text, hint)
        wrong = [name for name in map(str, values_of(override)) if name not in valid]
        if key == "targets" and len(wrong) > 1:
            wrong = [",".join(wrong)]
        for name in wrong:
            hint = _choice_hint(key, name, valid)
            where = f"{text} ({'sweeps' if key == 'sweeps' else f'conf/{key}'}/)"
            yield ConfigError(f"{key} has no choice {name!r}", where, hint)
        return
    if override.is_delete():
        raise ConfigError(f"{key} can't be deleted", text, "set it to null where it may be unknown")
    values = values_of(override)
    kind = _schema_type(key, (text.partition("=")[2], next(iter(values), None), others))
    for value in values:
        # Hydra resolves an interpolation later; any other value must have the right type now.
        if not (isinstance(value, str) and "${" in value):
            try:
                _typed_node(key, value, kind, text)
            except ConfigError as error:
                yield error


def _problems_of_hydras_own(override: Override, text: str) -> Iterable[QloraExpError]:
    key = override.key_or_group
    value_text = None if override.is_delete() else text.partition("=")[2].strip("'\"")
    if problem := _official_sweeper_problem(key, value_text, text):
        raise problem
    if override.is_sweep_override():
        raise ConfigError(f"{key} configures how runs are launched, and takes one value", text, "choose one of them")
    if key in PLUGIN_GROUPS:
        # Hydra alone reports a plugin that isn't installed only when a sweep starts, and never for a single run.
        Plugins.instance()  # imports the installed plugins, which register themselves
        valid = [name.removesuffix(".yaml") for name in ConfigStore.instance().list(key)]
        presets = choice_names(CONF / key)
        for value in map(str, values_of(override)):
            plugin = LAUNCHER_PRESETS.get(value, value) if value in presets else value
            package = LAUNCHER_PACKAGES.get(plugin)
            if plugin in valid:
                continue
            if package:
                yield ConfigError(f"the launcher {value!r} isn't installed", text, f"pip install {package}")
            else:
                yield ConfigError(f"{key} has no choice {value!r}", text, nearest(value, [*valid, *presets]))


def _official_sweeper_problem(key: str, value: str | None, text: str) -> ConfigError | None:
    """Return the error for an option of the official sweeper, with what to write instead; ``None``: it isn't one."""
    if key == "hydra/sweeper" and value == "optuna":
        hint = "leave it out: python -m qlora_exp -m … searches with Optuna"
        return ConfigError("the official Optuna sweeper is not used here", text, hint)
    if key.startswith("hydra/sweeper/"):
        return _replacement_error(key.split("/")[2], value, text)
    section, _, option = key.removeprefix("hydra.").partition(".")
    name, _, rest = option.partition(".")
    if section != "sweeper":
        return None
    if name == "params" and rest:
        hint = f"{rest}=VALUES on the command line, or in a file of sweeps/ sweep.params: {{{rest}: 'VALUES'}}"
        return ConfigError("an axis of the official Optuna sweeper", text, hint)
    return _replacement_error(name, value, text) if name in OFFICIAL_SWEEPER_REPLACEMENTS else None


def official_sweeper_problems(options: Collection[str]) -> list[ConfigError]:
    """Return the errors for ``options`` that a file of sweeps/ sets under ``hydra.sweeper``."""
    own = OWN_SWEEPER_KEYS
    return [_replacement_error(name, "VALUE", f"hydra.sweeper.{name}") for name in options if name not in own]


def _replacement_error(name: str, value: str | None, text: str) -> ConfigError:
    replacement = OFFICIAL_SWEEPER_REPLACEMENTS.get(name, "python -m qlora_exp --cfg job -p sweep shows ours")
    what = f"{name} is an option of the official Optuna sweeper, which is not used here"
    return ConfigError(what, text, replacement.format(value="VALUE" if value is None else value))


def typed_value(key: str, value: Any) -> Any:
    """Return ``value`` typed by the schema at ``key``: ``nf4`` as its enum, ``1`` as a float if the key is a float.

    Raises:
        ConfigError: there is no such key, or the value has the wrong type.
    """
    node: Any = OmegaConf.to_object(_typed_node(key, value, _schema_type(key), f"{key}={value}"))
    return node.value


def _typed_node(key: str, value: Any, kind: Any, text: str) -> Any:
    """Return an OmegaConf node whose ``value`` is typed by ``kind``, or raise the error of the override ``text``."""
    try:
        node = OmegaConf.structured(dataclasses.make_dataclass("Holder", [("value", kind)]))
        node.value = value
    except (OmegaConfBaseException, ValueError, TypeError):
        hint = f"give it {_describe(kind)}{_example(key, value)}"
        if isinstance(kind, type) and issubclass(kind, Enum):
            hint = _choice_hint(key, str(value), list(kind.__members__))
        raise ConfigError(f"{key} must be {_describe(kind)}, not {value!r}", text, hint) from None
    return node


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        inner = next(option for option in typing.get_args(kind) if option is not type(None))
        return f"{_describe(inner)} or null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    if dataclasses.is_dataclass(kind):
        return "a group of keys"
    if origin is list:
        return f"a list, e.g. [{'a,b' if typing.get_args(kind)[0] is str else '1,2'}]"
    if origin is dict:
        return "a mapping, e.g. {a: b}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, str(kind))


def _schema_type(key: str, written: tuple[str, Any, Mapping[str, Any]] | None = None) -> Any:
    """Return the type of ``a.b.c`` in the schema, or raise the error that names the nearest keys.

    ``written``: the value as text and as read, and the settings of other tools in the same command.
    """
    current: Any = Config
    prefix: list[str] = []
    for part in key.split("."):
        if not dataclasses.is_dataclass(current):
            if typing.get_origin(current) is dict:
                return typing.get_args(current)[1]
            raise ConfigError(f"{'.'.join(prefix)} holds a single value", key, f"{'.'.join(prefix)}=VALUE")
        hints = _hints(current)
        if part not in hints:
            where = ".".join(prefix) or "the configuration"
            raise ConfigError(f"there is no key {key!r}", where, _key_hint(key, part, prefix, hints, written))
        prefix.append(part)
        current = hints[part]
    return current


def _hints(kind: Any) -> dict[str, Any]:
    """Return a schema's keys and types; a group that may be null counts as the group."""
    return {
        name: next((option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)), hint)
        for name, hint in typing.get_type_hints(kind).items()
    }


def _key_hint(
    key: str,
    part: str,
    parents: list[str],
    hints: Mapping[str, Any],
    written: tuple[str, Any, Mapping[str, Any]] | None,
) -> str:
    """Return what to write instead of a key that doesn't exist: our name for another tool's, the same key in another
    group, or the nearest ones."""
    text, value, others = written or ("VALUE", None, {})
    row = counterpart(key)
    # A setting that this version lacks would be no help.
    if row is not None and all(has_key(Config, name) for name in (row.key,) if name is not None):
        return str(suggestion(key, text, value, others))
    ending = f"={text}" if written else ""
    name = key.rpartition(".")[2]
    same_name = [path for path in _all_keys(Config) if path.rpartition(".")[2] == name]
    if same_name:
        return f"did you mean {' or '.join(f'{path}{ending}' for path in same_name[:3])}?"
    prefix = "".join(f"{parent}." for parent in parents)
    ending = ending.replace("{", "{{").replace("}", "}}") if key.endswith(part) else ""
    return nearest(part, hints, template=f"{prefix}{{}}{ending}")


def _choice_hint(key: str, name: str, valid: Sequence[str]) -> str:
    """Return what to write instead of a choice that doesn't exist. Another tool's name for it comes first: by its
    letters alone, ``4bit`` would be nearest to ``int8``."""
    known = value_here(key, name)
    if known is not None and known in valid:
        return f"did you mean {key}={known}?"
    if key == "sweeps" and Path(name).is_file():
        return f"a sweep has a name in sweeps/ (qlora-exp ls sweeps); a file of settings goes behind --from {name}"
    if key == "sweeps":
        return nearest(name.removesuffix(".yaml"), valid, template="qlora-exp sweep {}")
    if key == "targets" and name == "[]":
        return f"choose one: {' '.join(f'targets={choice}' for choice in valid)}, or modules: targets=[q_proj,v_proj]"
    if key == "targets":
        modules = setting_text("targets.modules", re.findall(r"[\w.]+", name))
        return f"{nearest(name, valid, template='targets={}')} If it is a module: {modules}"
    if key == "model":
        return model_choice_hint(name, list(valid))
    if key == "tracking" and name in ("wandb", "tensorboard", "trackio"):
        return f"did you mean tracking.also=[{name}]? MLflow records every run as well"
    return nearest(name, valid, template=f"{key}={{}}")


def _hint_for_several(key: str, text: str) -> str:
    """Return how to run several values, or to write them as one list where the key has a list."""
    kind = None if key in groups() else _schema_type(key, (text.partition("=")[2], None, {}))
    options = (kind, *typing.get_args(kind))
    if any(typing.get_origin(option) is list for option in options):
        return f"as one list: {key}=[{text.partition('=')[2]}]"
    return f"qlora-exp run -m {text} runs them all; for one run, e.g. {first_choice(text)}"


def _example(key: str, wrong: Any) -> str:
    """Return ``, e.g. lora.r=8``: the key with its default; empty: the default is null. A whole number that was written
    as another one (``4e9``) is its own example."""
    if isinstance(wrong, float) and wrong.is_integer():
        return f", e.g. {key}={int(wrong)}"
    group, _, rest = key.partition(".")
    file = CONF / group / "default.yaml"
    value = yaml.safe_load(file.read_text(encoding="utf-8")) if rest and file.is_file() else None
    for part in rest.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return f", e.g. {setting_text(key, value)}" if isinstance(value, bool | int | float | str) else ""


def _all_keys(kind: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in _hints(kind).items():
        path = f"{prefix}{name}"
        keys.extend(_all_keys(hint, f"{path}.") if dataclasses.is_dataclass(hint) else [path])
    return keys
