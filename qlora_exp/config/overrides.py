"""Parsing of Hydra's overrides: the key of an override, and its values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from qlora_exp.config.groups import groups
from qlora_exp.config.override_values import hydra_value
from qlora_exp.errors import ConfigError


def override_key(text: str) -> str:
    """Return the key or group of an override."""
    return parse(text).key_or_group


def override_value(text: str) -> Any:
    """Return the value of an override with a single value."""
    [value] = values_of(parse(text))
    return value


def is_swept(text: str) -> bool:
    """Return whether an override has several values: ``lora.r=4,8``, ``training.learning_rate=interval(1e-4,1e-2)``."""
    return parse(text).is_sweep_override()


def first_choice(text: str) -> str:
    """Return the override with the first of its values; for an interval, with its lower end."""
    override = parse(text)
    value = next(iter(values_of(override)), None) if override.is_sweep_override() else None
    return text if value is None else f"{override.get_key_element()}={hydra_value(value)}"


def is_hydra(key: str) -> bool:
    """Return whether a key or group is Hydra's own: how a configuration is launched, not what it contains."""
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def is_ours(override: Override) -> bool:
    return not is_hydra(override.key_or_group)


def parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        first = str(error).splitlines()[0]
        what = f"{text!r} is not a valid override: {first}"
        raise ConfigError(what, "command line", _in_quotes(text) or "write key=value") from None


def parse_all(overrides: Sequence[str]) -> list[Override]:
    return [parse(text) for text in overrides]


def _in_quotes(text: str) -> str | None:
    """Return ``key=value`` with the value quoted for Hydra, and all of it quoted for a shell; ``None`` without a
    key."""
    key, sign, value = text.partition("=")
    if not (sign and re.fullmatch(r"\+{0,2}\w+(\.\w+)*", key)):
        return None
    return shlex.quote(f"{key}={QuotedString(text=value, quote=Quote.double).with_quotes()}")


def choices_of(override: Override) -> list[str]:
    """Return the override once per value that it sweeps over."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def values_of(override: Override) -> list[Any]:
    """Return the values of an override; for an interval, both ends."""
    if not override.is_sweep_override():
        value = override.value()
        return [value.text if isinstance(value, QuotedString) else value]
    swept: Any = override.value()
    if isinstance(swept, IntervalSweep):
        return [swept.start, swept.end]
    if isinstance(swept, Glob):
        return glob_matches(override)
    return [_plain(text) for text in override.sweep_string_iterator()]


def _plain(text: str) -> Any:
    value = OverridesParser.create().parse_override(f"key={text}").value()
    return value.text if isinstance(value, QuotedString) else value


def without_globs(texts: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return ``texts`` with each glob among the ``overrides`` expanded: ``lora=glob(*)`` becomes every choice of the
    group.

    Hydra's own expansion would include the groups' shared parts (``_mode.yaml``), which aren't choices.
    """
    return [_without_glob(text) if text in overrides else text for text in texts]


def _without_glob(text: str) -> str:
    override = parse(text)
    matches = glob_matches(override)
    return f"{override.get_key_element()}={','.join(matches)}" if matches else text


def glob_matches(override: Override) -> list[str]:
    """Return the choices that match a ``glob(…)``; an empty list for any other override."""
    value = override.value()
    return value.filter(groups().get(override.key_or_group, [])) if isinstance(value, Glob) else []
