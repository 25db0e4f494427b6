"""Overrides in, typed configuration out: every mistake in them found at once, before anything expensive."""

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
from qlora_exp.config.interpolations import unresolved
from qlora_exp.config.override_values import has_interpolation
from qlora_exp.config.overrides import choices_of, is_ours, override_key, parse, parsed, without_globs
from qlora_exp.config.problems import problems_of
from qlora_exp.config.schema import Config, register, typed
from qlora_exp.config.search_path import SEARCH_PATH, search_folders, search_path
from qlora_exp.errors import ConfigError, QloraExpError, nearest, raise_all
from qlora_exp.paths import CONF

GRID_CHECK_LIMIT = 256
"""Configurations of a multirun that are composed and checked before its first run; the rest are checked by axis."""


def compose(overrides: Sequence[str]) -> Config:
    """One configuration from conf/ and ``overrides`` (``group=choice``, ``key.path=value``).

    Raises:
        ConfigError, Problems: a misspelt key or choice, a wrong type, an impossible combination; all together.
    """
    raise_all(problems_of(overrides, multirun=False))
    check_hydra(overrides)
    return _compose_checked(overrides)


def check_hydra(overrides: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a wrong setting of Hydra's own (``hydra.launcher.njobs=2``): Hydra tells of it in
    its own way, and where nothing is launched not at all."""
    theirs = [text for text in overrides if not is_ours(parse(text)) and override_key(text) != SEARCH_PATH]
    theirs.sort(key=lambda text: "/" not in override_key(text))  # as Hydra: choices first, which bring the keys
    for number, text in enumerate(theirs):
        try:
            _composed_by_hydra(theirs[: number + 1])
        except (HydraException, OmegaConfBaseException) as error:
            key = override_key(text)
            parent, _, name = key.rpartition(".")
            node = OmegaConf.select(_composed_by_hydra(theirs[:number]), parent) if parent else None
            hint = nearest(name, map(str, node)) if isinstance(node, DictConfig) and name not in node else None
            what = str(error.__cause__ or error).splitlines()[0]
            raise ConfigError(what, text, hint or f"{key}=VALUE, or leave it out") from None


def _composed_by_hydra(overrides: Sequence[str]) -> DictConfig:
    """Its own settings included."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides), return_hydra_config=True)


def check_multirun(overrides: Sequence[str]) -> None:
    """Raise for any wrong point of a grid (``lora.r=8,16``) before its first run starts."""
    raise_all(problems_of(overrides, multirun=True))
    listed = without_globs(overrides, overrides)
    axes = [choices_of(override) for override in parsed(listed) if is_ours(override)]
    check_candidates(itertools.islice(itertools.product(*axes), GRID_CHECK_LIMIT))


def check_candidates(points: Iterable[Sequence[str]]) -> None:
    """Compose each of ``points`` (overrides) and raise what is wrong with any of them, each problem once."""
    errors: dict[str, QloraExpError] = {}
    composer = Composer()
    for point in points:
        try:
            checked(composer.raw(point))
        except QloraExpError as error:
            for one in getattr(error, "errors", (error,)):
                errors.setdefault(str(one), one)
    raise_all(list(errors.values()))


class Composer:
    """Composes one configuration after the other. Hydra, which takes a tenth of a second, composes each combination of
    group choices once only; the values are set on a copy of it: Hydra sets them last, too."""

    def __init__(self) -> None:
        self._groups = frozenset(groups())
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> Config:
        """As :func:`compose`."""
        raise_all(problems_of(overrides, multirun=False))
        return checked(self.raw(overrides))

    def raw(self, overrides: Sequence[str]) -> DictConfig:
        """As :func:`compose_raw`."""
        chosen: list[str] = []
        values: list[Override] = []
        for text in overrides:
            override = parse(text)
            plain = override.type is OverrideType.CHANGE and is_ours(override)
            if plain and override.key_or_group not in self._groups:
                values.append(override)
            else:
                chosen.append(text)
        if tuple(chosen) not in self._composed:
            self._composed[tuple(chosen)] = compose_raw(chosen)
        config = copy.deepcopy(self._composed[tuple(chosen)])
        try:
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return compose_raw(overrides)  # which says what is wrong
        return config


def _compose_checked(overrides: Sequence[str]) -> Config:
    return checked(compose_raw(overrides))


def compose_raw(overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes, unchecked: values may still be missing, and interpolations are not resolved.

    Raises:
        ConfigError: it can't be composed.
    """
    register()
    own = [text for text in overrides if is_ours(parse(text))]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("config", overrides=[search_path(search_folders(overrides)), *own])
    except (HydraException, OmegaConfBaseException) as error:
        raise _not_composed(error, own) from None


def _not_composed(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    refused = re.match(r"Could not override '([\w.]+)'", str(error))
    for text in overrides if refused else ():
        # Overrides are checked against the schema before: what Hydra still refuses is a new entry of a mapping.
        if refused and override_key(text) == refused[1]:
            return ConfigError(
                f"{refused[1]} isn't there yet", text, f"a + in front adds it: {shlex.quote(f'+{text}')}"
            )
    return ConfigError(str(error).splitlines()[0], " ".join(overrides) or "conf/", "qlora-exp validate …")


def _missing(error: MissingMandatoryValue) -> ConfigError:
    key = str(getattr(error, "full_key", None) or "a key")
    return ConfigError(f"{key} must be given", "command line", f"{key}=VALUE")


def checked(config: Any) -> Config:
    """The same checks for a configuration that Hydra composed itself."""
    result = built(config)
    raise_all(check(result))
    return result


def _without_search(config: Any) -> Any:
    """``config`` without its sweep's axes where they hold interpolations: only the sweep can say what those name, and
    a trial is composed on machines where an environment variable may not be set."""
    search = config.get("sweep")
    if search is None:
        return config
    plain = OmegaConf.to_container(search, resolve=False)
    assert isinstance(plain, dict)
    empty: dict[str, Any] = {"params": {}, "conditions": {}, "enqueue": []}
    changed = {key: value for key, value in empty.items() if has_interpolation(plain.get(key))}
    if not changed:
        return config
    config = copy.deepcopy(config)
    for key, value in changed.items():
        OmegaConf.update(config, f"sweep.{key}", value, merge=False)
    return config


def built(config: Any) -> Config:
    """A composed configuration as dataclasses; what must hold between its keys is not looked at.

    Raises:
        ConfigError: a value is missing, or an interpolation names nothing.
    """
    try:
        return typed(_without_search(config))
    except MissingMandatoryValue as error:
        raise _missing(error) from None
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "the configuration")
        raise unresolved(error, key) from None
