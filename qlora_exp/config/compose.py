"""From overrides to a typed configuration. All mistakes are found at once, before anything expensive."""

from __future__ import annotations

import copy
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from qlora_exp.config.checks import check
from qlora_exp.config.groups import groups
from qlora_exp.config.interpolations import unresolved_error
from qlora_exp.config.override_errors import problems_of
from qlora_exp.config.override_values import has_interpolation
from qlora_exp.config.overrides import choices_of, is_ours, override_key, parse, parse_all, without_globs
from qlora_exp.config.schema import Config, register, typed
from qlora_exp.config.search_path import SEARCH_PATH, search_folders, search_path
from qlora_exp.errors import ConfigError, QloraExpError, nearest, raise_all
from qlora_exp.paths import CONF

GRID_CHECK_LIMIT = 256
"""Configurations of a multirun that are composed and checked before its first run. The others are checked by axis."""


def compose(overrides: Sequence[str]) -> Config:
    """Return the configuration of conf/ with ``overrides`` (``group=choice``, ``key.path=value``).

    Raises:
        ConfigError, Problems: a misspelt key or choice, a wrong type, an impossible combination; all together.
    """
    raise_all(problems_of(overrides, multirun=False))
    check_hydra(overrides)
    return _compose_checked(overrides)


def check_hydra(overrides: Sequence[str]) -> None:
    """Check Hydra's own settings (``hydra.launcher.njobs=2``). Hydra reports an error in its own format, and only if
    something is launched.

    Raises:
        ConfigError: a setting is wrong.
    """
    hydra_overrides = [text for text in overrides if not is_ours(parse(text)) and override_key(text) != SEARCH_PATH]
    # Choices first, as in Hydra: they define the keys.
    hydra_overrides.sort(key=lambda text: "/" not in override_key(text))
    for number, text in enumerate(hydra_overrides):
        try:
            _composed_by_hydra(hydra_overrides[: number + 1])
        except (HydraException, OmegaConfBaseException) as error:
            key = override_key(text)
            parent, _, name = key.rpartition(".")
            node = OmegaConf.select(_composed_by_hydra(hydra_overrides[:number]), parent) if parent else None
            hint = nearest(name, map(str, node)) if isinstance(node, DictConfig) and name not in node else None
            what = str(error.__cause__ or error).splitlines()[0]
            raise ConfigError(what, text, hint or f"{key}=VALUE, or leave it out") from None


def _composed_by_hydra(overrides: Sequence[str]) -> DictConfig:
    """Return what Hydra composes, its own settings included."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides), return_hydra_config=True)


def check_multirun(overrides: Sequence[str]) -> None:
    """Raise every problem of a grid's points (``lora.r=8,16``) before its first run starts."""
    raise_all(problems_of(overrides, multirun=True))
    listed = without_globs(overrides, overrides)
    axes = [choices_of(override) for override in parse_all(listed) if is_ours(override)]
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


class Composer:
    """Composes many configurations. Hydra takes a tenth of a second, so it composes each combination of group choices
    once. The values are set on a copy of it: Hydra sets them last, too."""

    def __init__(self) -> None:
        self._groups = frozenset(groups())
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> Config:
        """Return the configuration; see :func:`compose`."""
        raise_all(problems_of(overrides, multirun=False))
        return as_checked_config(self.raw(overrides))

    def raw(self, overrides: Sequence[str]) -> DictConfig:
        """Return the unchecked configuration; see :func:`compose_raw`."""
        group_overrides: list[str] = []
        values: list[Override] = []
        for text in overrides:
            override = parse(text)
            is_change = override.type is OverrideType.CHANGE and is_ours(override)
            if is_change and override.key_or_group not in self._groups:
                values.append(override)
            else:
                group_overrides.append(text)
        if tuple(group_overrides) not in self._composed:
            self._composed[tuple(group_overrides)] = compose_raw(group_overrides)
        config = copy.deepcopy(self._composed[tuple(group_overrides)])
        try:
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return compose_raw(overrides)  # raises with a message that says what is wrong
        return config


def _compose_checked(overrides: Sequence[str]) -> Config:
    return as_checked_config(compose_raw(overrides))


def compose_raw(overrides: Sequence[str]) -> DictConfig:
    """Return what Hydra composes, unchecked: values may be missing, and interpolations are unresolved.

    Raises:
        ConfigError: it can't be composed.
    """
    register()
    our_overrides = [text for text in overrides if is_ours(parse(text))]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("config", overrides=[search_path(search_folders(overrides)), *our_overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise _compose_error(error, our_overrides) from None


def _compose_error(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    refused = re.match(r"Could not override '([\w.]+)'", str(error))
    for text in overrides if refused else ():
        # The overrides fit the schema (checked before), so Hydra can only refuse a new entry of a mapping.
        if refused and override_key(text) == refused[1]:
            return ConfigError(
                f"{refused[1]} doesn't exist yet", text, f"a + in front adds it: {shlex.quote(f'+{text}')}"
            )
    return ConfigError(str(error).splitlines()[0], " ".join(overrides) or "conf/", "qlora-exp validate …")


def _missing_error(error: MissingMandatoryValue) -> ConfigError:
    key = str(getattr(error, "full_key", None) or "a key")
    return ConfigError(f"{key} must be given", "command line", f"{key}=VALUE")


def as_checked_config(config: Any) -> Config:
    """Return a composed configuration as :class:`Config`, or raise all its problems."""
    result = as_config(config)
    raise_all(check(result))
    return result


def _without_search(config: Any) -> Any:
    """Return ``config`` without those axes of its sweep that hold interpolations.

    Only the sweep can resolve them, and a trial may be composed on a machine where an environment variable isn't set.
    """
    search = config.get("sweep")
    if search is None:
        return config
    plain = OmegaConf.to_container(search, resolve=False)
    assert isinstance(plain, dict)
    empty: dict[str, Any] = {"params": {}, "conditions": {}, "enqueue": []}
    cleared = {key: value for key, value in empty.items() if has_interpolation(plain.get(key))}
    if not cleared:
        return config
    config = copy.deepcopy(config)
    for key, value in cleared.items():
        OmegaConf.update(config, f"sweep.{key}", value, merge=False)
    return config


def as_config(config: Any) -> Config:
    """Return a composed configuration as dataclasses, without the checks between its keys.

    Raises:
        ConfigError: a value is missing, or an interpolation can't be resolved.
    """
    try:
        return typed(_without_search(config))
    except MissingMandatoryValue as error:
        raise _missing_error(error) from None
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "the configuration")
        raise unresolved_error(error, key) from None
