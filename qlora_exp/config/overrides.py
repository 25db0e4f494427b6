"""Hydra's grammar of overrides: what one override is for, and which values it has."""

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
    """The key or group that an override is for."""
    return parse(text).key_or_group


def override_value(text: str) -> Any:
    """The value of an override that has one."""
    [value] = values_of(parse(text))
    return value


def is_swept(text: str) -> bool:
    """Whether an override has several values: ``lora.r=4,8``, ``training.learning_rate=interval(1e-4,1e-2)``."""
    return parse(text).is_sweep_override()


def first_choice(text: str) -> str:
    """The override with the first of its values; with its lower end, of an interval."""
    override = parse(text)
    value = next(iter(values_of(override)), None) if override.is_sweep_override() else None
    return text if value is None else f"{override.get_key_element()}={hydra_value(value)}"


def is_hydra(key: str) -> bool:
    """Whether a key or group is Hydra's own: how a configuration is launched, not what it is."""
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def is_ours(override: Override) -> bool:
    return not is_hydra(override.key_or_group)


def parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        first = str(error).splitlines()[0]
        what = f"{text!r} can't be read as an override: {first}"
        raise ConfigError(what, "command line", _in_quotes(text) or "write key=value") from None


def parsed(overrides: Sequence[str]) -> list[Override]:
    return [parse(text) for text in overrides]


def _in_quotes(text: str) -> str | None:
    """``key=value`` with its value as a text that Hydra reads, itself quoted for a shell; ``None`` without a key."""
    key, sign, value = text.partition("=")
    if not (sign and re.fullmatch(r"\+{0,2}\w+(\.\w+)*", key)):
        return None
    return shlex.quote(f"{key}={QuotedString(text=value, quote=Quote.double).with_quotes()}")


def choices_of(override: Override) -> list[str]:
    """The override once per value that it sweeps over."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def values_of(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        value = override.value()
        return [value.text if isinstance(value, QuotedString) else value]
    swept: Any = override.value()
    if isinstance(swept, IntervalSweep):
        return [swept.start, swept.end]
    if isinstance(swept, Glob):
        return globbed(override)
    return [_plain(text) for text in override.sweep_string_iterator()]


def _plain(text: str) -> Any:
    value = OverridesParser.create().parse_override(f"key={text}").value()
    return value.text if isinstance(value, QuotedString) else value


def without_globs(texts: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """``texts`` with each glob among the ``overrides`` spelt out: ``lora=glob(*)`` names every choice of that group.

    Hydra would count the groups' shared parts (``_mode.yaml``), which are no choices, too.
    """
    return [_without_glob(text) if text in overrides else text for text in texts]


def _without_glob(text: str) -> str:
    override = parse(text)
    fitting = globbed(override)
    return f"{override.get_key_element()}={','.join(fitting)}" if fitting else text


def globbed(override: Override) -> list[str]:
    """The choices of its group that a ``glob(…)`` means; none for every other override."""
    value = override.value()
    return value.filter(groups().get(override.key_or_group, [])) if isinstance(value, Glob) else []
