"""From overrides to a typed configuration. All mistakes are found at once, before anything expensive."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import re
import shlex
import typing
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from qlora_exp.config.checks import check
from qlora_exp.config.choices import groups
from qlora_exp.config.enums import Method
from qlora_exp.config.interpolations import unresolved_error
from qlora_exp.config.model_choice import completed, teacher_run_id
from qlora_exp.config.override_errors import problems_of
from qlora_exp.config.overrides import (
    SEARCH_PATH,
    has_interpolation,
    is_hydra,
    is_swept,
    override_key,
    parse,
    search_folders,
    search_path,
    with_target_modules,
    without_globs,
)
from qlora_exp.config.schema import Config, default_alpha_policy, register, typed
from qlora_exp.errors import ConfigError, QloraExpError, nearest, raise_all
from qlora_exp.paths import CONF, SWEEPS

GRID_CHECK_LIMIT = 256
"""Configurations of a multirun that are composed and checked before its first run. The others are checked by axis."""
KEPT_COMPOSITIONS = 16
"""Each takes Hydra a tenth of a second, and a copy of it three milliseconds."""


def compose(overrides: Sequence[str]) -> Config:
    """Return the configuration of conf/ with ``overrides`` (``group=choice``, ``key.path=value``).

    Raises:
        ConfigError, Problems: a misspelt key or choice, a wrong type, an impossible combination; all together.
    """
    overrides = with_target_modules(overrides)
    raise_all(problems_of(overrides, multirun=False))
    check_hydra(overrides)
    return as_checked_config(compose_raw(overrides))


def compose_run(overrides: Sequence[str]) -> Config:
    """Return the configuration of a single run: :func:`compose`, and settings are refused that the run doesn't read:
    ``lora.*`` of a method without LoRA, ``distillation.*`` without a teacher. In a sweep, ``lora.r=8`` may be for one
    method of several.

    Raises:
        ConfigError, Problems: as :func:`compose`.
    """
    config = compose(overrides)
    unread = [text for text in overrides if override_key(text).partition(".")[0] == "distillation"]
    if unread and config.distillation.teacher is None and config.distillation != read_choice("distillation", "default"):
        what = "without a teacher these settings have no effect"
        raise ConfigError(what, " ".join(unread), "distillation.teacher=RUN or model:NAME, or leave them out")
    if config.method.kind is not Method.lora:
        what, hint = f"method={config.method.kind.value} has no LoRA adapters", "method=lora, or leave it out"
        defaults = read_choice("lora", "default")
        keys = {text: override_key(text).removeprefix("lora.") for text in overrides if "lora." in override_key(text)}
        raise_all(
            [
                ConfigError(what, text, hint)
                for text, key in keys.items()
                if getattr(config.lora, key, None) != getattr(defaults, key, None)
            ]
        )
    return config


def check_multirun(overrides: Sequence[str]) -> None:
    """Raise every problem of a grid's points (``lora.r=8,16``) before its first run starts."""
    raise_all(problems_of(overrides, multirun=True))
    axes = []
    for override in map(parse, without_globs(_ours(overrides), overrides)):
        texts = override.sweep_string_iterator() if override.is_sweep_override() else None
        key = override.get_key_element()
        axes.append([str(override.input_line)] if texts is None else [f"{key}={text}" for text in texts])
    check_candidates(itertools.islice(itertools.product(*axes), GRID_CHECK_LIMIT))


def check_candidates(points: Iterable[Sequence[str]]) -> None:
    """Compose each of ``points`` (overrides), and raise all their problems, each once."""
    errors: dict[str, QloraExpError] = {}
    composer = Composer()
    for point in points:
        try:
            as_checked_config(composer.raw(point))
        except QloraExpError as error:
            for problem in getattr(error, "errors", (error,)):
                errors.setdefault(str(problem), problem)
    raise_all(list(errors.values()))


def check_hydra(overrides: Sequence[str]) -> None:
    """Check Hydra's own settings (``hydra.launcher.njobs=2``). Hydra reports an error in its own format, and only if
    something is launched.

    Raises:
        ConfigError: a setting is wrong.
    """
    ours = _ours(overrides)
    hydras = [text for text in overrides if text not in ours and override_key(text) != SEARCH_PATH]
    # Choices first, as in Hydra: they define the keys.
    hydras.sort(key=lambda text: "/" not in override_key(text))
    for number, text in enumerate(hydras):
        try:
            _composed_by_hydra(hydras[: number + 1], with_hydra=True)
        except (HydraException, OmegaConfBaseException) as error:
            key = override_key(text)
            parent, _, name = key.rpartition(".")
            before = _composed_by_hydra(hydras[:number], with_hydra=True)
            node = OmegaConf.select(before, parent) if parent else None
            hint = nearest(name, map(str, node)) if isinstance(node, DictConfig) and name not in node else None
            what = str(error.__cause__ or error).splitlines()[0]
            raise ConfigError(what, text, hint or f"{key}=VALUE, or leave it out") from None


class Composer:
    """Composes many configurations, each combination of group choices once: the files of its first composition count,
    also if they change later."""

    def __init__(self) -> None:
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> Config:
        """Return the configuration; see :func:`compose`."""
        raise_all(problems_of(overrides, multirun=False))
        return as_checked_config(self.raw(overrides))

    def raw(self, overrides: Sequence[str]) -> DictConfig:
        """Return the unchecked configuration; see :func:`compose_raw`."""
        others, values = _split(overrides)
        if others not in self._composed:
            self._composed[others] = _compose_unchanged(others)
        config = _with_values(self._composed[others], values)
        return compose_raw(overrides) if config is None else _completed(config, overrides)


def compose_raw(overrides: Sequence[str]) -> DictConfig:
    """Return what Hydra composes, unchecked: values may be missing, and interpolations are unresolved.

    Only ``lora.alpha_policy`` has its value already where nothing sets it.

    Raises:
        ConfigError: it can't be composed.
    """
    return _completed(_compose_unchanged(overrides), overrides)


def _completed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the composed ``config`` with what its settings imply of each other."""
    return with_alpha_policy(with_one_length(config, overrides))


def with_one_length(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the composed ``config`` without ``training.max_steps``, if ``training.epochs`` replaces its default.

    A length that ``overrides`` name stays: two of them are refused later, and so is one of a file with another one of
    ``overrides``.
    """
    training = config.get("training")
    if training is None or OmegaConf.is_missing(training, "epochs") or training.get("epochs") is None:
        return config
    named = {override_key(text) for text in overrides if not text.endswith("=null")}
    if "training.max_steps" in named or training.get("max_steps") is None:
        return config
    config = copy.deepcopy(config)
    OmegaConf.update(config, "training.max_steps", None)
    return config


def with_alpha_policy(config: DictConfig) -> DictConfig:
    """Set ``lora.alpha_policy`` in a composed configuration, if nothing else does: an alpha alone is a fixed one."""
    plain: Any = OmegaConf.to_container(config.lora, resolve=False)
    if plain["alpha_policy"] is None:
        config.lora.alpha_policy = default_alpha_policy(plain["alpha"])
    return config


def policy_of_searched_alpha(overrides: Sequence[str], axes: Collection[str]) -> list[str]:
    """Return the override that makes alpha fixed, if ``lora.alpha`` is among the axes and nothing sets its policy; else
    an empty list."""
    if "lora.alpha" not in axes or "lora.alpha_policy" in axes:
        return []
    return ["lora.alpha_policy=fixed"] if _compose_unchanged(overrides).lora.alpha_policy is None else []


def _compose_unchanged(overrides: Sequence[str]) -> DictConfig:
    ours = _ours(overrides)
    folders = search_folders(overrides)
    others, values = _split(ours)
    # A user's folder may hold any file of any group, and an environment variable may name a choice.
    if folders == [SWEEPS.parent] and not has_interpolation(list(others)) and not any(map(is_swept, others)):
        with contextlib.suppress(HydraException, OmegaConfBaseException):
            kept = _kept_composition(others, _conf_files(CONF, SWEEPS))
            if (config := _with_values(kept, values)) is not None:
                return config
    try:
        return _composed_by_hydra([search_path(folders), *ours])
    except (HydraException, OmegaConfBaseException) as error:
        refused = re.match(r"Could not override '([\w.]+)'", str(error))
        # The overrides fit the schema (checked before), so Hydra can only refuse a new entry of a mapping.
        for text in ours:
            if refused and override_key(text) == refused[1]:
                hint = f"a + in front adds it: {shlex.quote(f'+{text}')}"
                raise ConfigError(f"{refused[1]} doesn't exist yet", text, hint) from None
        where = " ".join(ours) or "conf/"
        raise ConfigError(str(error).splitlines()[0], where, "qlora-exp validate …") from None


@functools.lru_cache(maxsize=KEPT_COMPOSITIONS)
def _kept_composition(overrides: tuple[str, ...], _files: Any) -> DictConfig:
    """Return what Hydra composes from the package's files alone; it must not be changed."""
    return _composed_by_hydra([search_path([SWEEPS.parent]), *overrides])


def _conf_files(*folders: Path) -> tuple[tuple[str, int, int], ...]:
    """Return path, time of change and size of each file that a composition may read."""
    stats = [(str(path), path.stat()) for folder in folders for path in folder.rglob("*.yaml")]
    return tuple(sorted((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats))


def _split(overrides: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return the overrides that Hydra has to compose, such as group choices, and those that set an existing value:
    Hydra sets them last, on what it has composed. Those before a ``+key=`` or ``~key`` stay in its order."""
    ours = list(map(parse, _ours(overrides)))
    first = max((n + 1 for n, one in enumerate(ours) if one.type is not OverrideType.CHANGE), default=0)
    names = groups()
    values = [
        str(one.input_line)
        for one in ours[first:]
        if one.key_or_group not in names and not one.is_sweep_override()  # Hydra refuses several values
    ]
    return tuple(text for text in overrides if text not in values), values


def _with_values(config: DictConfig, values: Sequence[str]) -> DictConfig | None:
    """Return a copy of ``config`` with the overrides ``values``; ``None``: only Hydra says what is wrong with them."""
    copied = copy.deepcopy(config)
    try:
        for text in values:
            OmegaConf.update(copied, override_key(text), parse(text).value(), merge=True)
    except OmegaConfBaseException:
        return None
    return copied


def _ours(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of the configuration, without those of Hydra's own settings."""
    return [text for text in overrides if not is_hydra(override_key(text))]


def _composed_by_hydra(overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """Return what Hydra composes; ``with_hydra``: its own settings included."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides), return_hydra_config=with_hydra)


def as_checked_config(config: Any) -> Config:
    """Return a composed configuration as :class:`Config`, or raise all its problems."""
    result = as_config(config)
    raise_all(check(result))
    return result


def as_config(config: Any) -> Config:
    """Return a composed configuration as dataclasses, without the checks between its keys.

    Raises:
        ConfigError: a value is missing, or an interpolation can't be resolved.
    """
    try:
        result = typed(_without_search(config))
    except MissingMandatoryValue as error:
        key = str(getattr(error, "full_key", None) or "a key")
        raise ConfigError(f"{key} must be given", "command line", f"{key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise unresolved_error(error, str(getattr(error, "full_key", None) or "the configuration")) from None
    result.model = completed(result.model, result.output_root)
    result.distillation.teacher = teacher_run_id(result.distillation.teacher, result.output_root)
    return result


def _without_search(config: Any) -> Any:
    """Return ``config`` without those axes of its sweep that hold interpolations.

    Only the sweep can resolve them, and a trial may be composed on a machine where an environment variable isn't set.
    """
    search = config.get("sweep")
    plain: Any = OmegaConf.to_container(search, resolve=False) if search is not None else {}
    empty: dict[str, Any] = {"params": {}, "conditions": {}, "enqueue": []}
    cleared = {key: value for key, value in empty.items() if has_interpolation(plain.get(key))}
    if not cleared:
        return config
    config = copy.deepcopy(config)
    for key, value in cleared.items():
        OmegaConf.update(config, f"sweep.{key}", value, merge=False)
    return config


def default_choices() -> dict[str, str]:
    """Return group → choice, as in conf/config.yaml."""
    raw: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)
    entries = [entry for entry in raw["defaults"] if isinstance(entry, dict)]
    names = groups()
    return {key: name for entry in entries for key, name in entry.items() if key in names and key != "sweeps"}


def read_choice(group: str, name: str) -> Any:
    """Return the file ``conf/GROUP/NAME.yaml`` typed by the schema, with its folder's shared parts; ``None`` if only
    Hydra can compose it: other defaults, interpolations, missing values. The caller may change the result."""
    return copy.deepcopy(_kept_choice(group, name, _conf_files(CONF / group)))


@functools.lru_cache(maxsize=128)
def _kept_choice(group: str, name: str, _files: Any) -> Any:
    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    parts = node.pop("defaults", ["_self_"])
    if any(not isinstance(part, str) or not part.startswith("_") for part in parts):
        return None
    schema = typing.get_type_hints(Config)[group]
    schema = next((kind for kind in typing.get_args(schema) if kind is not type(None)), schema)
    files = [node if part == "_self_" else OmegaConf.load(CONF / group / f"{part}.yaml") for part in parts]
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *files))
    except OmegaConfBaseException:
        return None
