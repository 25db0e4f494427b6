"""Interpolations (``${…}``). Those that read from outside the configuration are replaced by their values, once.

``${oc.env:LR}`` may differ in another shell, on another machine or on another day, so a study keeps the value from its
start. ``${lora.r}`` reads the configuration, so it stays: each trial has its own value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Transformer
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.choices import groups
from qlora_exp.config.override_errors import typed_value
from qlora_exp.config.overrides import (
    escape_interpolations,
    has_interpolation,
    hydra_value,
    is_hydra,
    override_value,
    parse,
    values_of,
)
from qlora_exp.errors import ConfigError, QloraExpError, raise_all
from qlora_exp.formatting import flatten

OUTSIDE_RESOLVERS = ("oc.decode", "oc.create", "now", "python_version")
"""Resolvers whose value depends only on their arguments, or on the time. ``oc.env`` is handled separately."""

RESOLVER = re.compile(r"\s*([A-Za-z_][\w.]*)\s*:(.*)", re.DOTALL)
HYDRA_SETTING = re.compile(r"\s*hydra\s*[:.]")


@dataclass(frozen=True)
class Constant:
    """The value of a resolved part of a text."""

    value: Any


def unresolved_error(error: Exception, key: str) -> ConfigError:
    """Return the error for an interpolation in ``key`` that has no value."""
    what = str(error).splitlines()[0]
    variable = re.search(r"Environment variable '(.*)' not found", what)
    if variable:
        return _not_set_error(variable[1], key)
    if "HydraConfig was not set" in what or re.search(r"Interpolation key 'hydra\.", what):
        return _hydra_setting_error("${hydra:…}", key)
    return ConfigError(what, key, f"{key}=VALUE, without ${{…}}")


def _not_set_error(name: str, where: str) -> ConfigError:
    hint = f"export {name}=VALUE, or ${{oc.env:{name},DEFAULT}}"
    return ConfigError(f"the environment variable {name} is not set", where, hint)


def _hydra_setting_error(part: str, where: str) -> ConfigError:
    return ConfigError(
        f"{part} reads a setting of Hydra, which a run doesn't have",
        where,
        "write the value, or read one of our settings: ${model.family}, ${quantization.mode}, ${lora.r}",
    )


def unresolved_texts(node: Any, key: str) -> Any:
    """Return what ``node`` holds at ``key``, as it was written. Reading it from OmegaConf would resolve it, with values
    that an axis may still change."""
    plain: Any = OmegaConf.to_container(node, resolve=False, enum_to_str=True)
    return plain[key]


def resolve_outside(overrides: Sequence[str]) -> list[str]:
    """Return ``overrides`` with each ``${oc.env:…}`` and the like replaced by its value. Hydra's own overrides are
    unchanged.

    Raises:
        ConfigError, Problems: an environment variable is not set, or a setting of Hydra's is named.
    """
    replaced, errors = [], []
    for text in overrides:
        try:
            replaced.append(_override_without_outside(text))
        except QloraExpError as error:
            errors.append(error)
            replaced.append(text)
    raise_all(errors)
    return replaced


def _override_without_outside(text: str) -> str:
    if "${" not in text:
        return text
    try:
        override = parse(text)
        if override.is_delete() or is_hydra(override.key_or_group):
            return text
        swept = override.value() if override.is_sweep_override() else None
        if swept is not None and not isinstance(swept, ChoiceSweep):
            return text
        key, entries = override.key_or_group, [] if swept is None else map(Transformer.str, swept.list)
        values = [override_value(f"{key}={entry}") for entry in entries] if swept is not None else values_of(override)
    except (ConfigError, HydraException):  # reported later, with the other problems
        return text
    resolved = [resolve_value(value, text) for value in values]
    if resolved == values:
        return text
    listed = ",".join(hydra_value(_typed(override.key_or_group, entry_value)) for entry_value in resolved)
    return f"{override.get_key_element()}={f'shuffle({listed})' if swept is not None and swept.shuffle else listed}"


def _typed(key: str, value: Any) -> Any:
    """Return ``value`` typed by the schema, if it is known already: the text ``8`` of an environment variable becomes a
    number."""
    if has_interpolation(value) or key in groups():
        return value
    typed = typed_value(key, value)
    return escape_interpolations(getattr(typed, "name", typed))


def resolve_value(value: Any, where: str) -> Any:
    """Return ``value`` (JSON types) with its outside interpolations replaced by their values.

    Raises:
        ConfigError: an environment variable is not set, or a setting of Hydra's is named.
    """
    if isinstance(value, str):
        parts = [_resolve_interpolation(part, where) if part.startswith("${") else part for part in _parts(value)]
        if len(parts) == 1 and isinstance(parts[0], Constant):
            return escape_interpolations(parts[0].value)  # of any type
        return "".join(escape_interpolations(str(part.value)) if isinstance(part, Constant) else part for part in parts)
    if isinstance(value, Mapping):
        return {key: resolve_value(entry, where) for key, entry in value.items()}
    return [resolve_value(entry, where) for entry in value] if isinstance(value, list | tuple) else value


def settings_from_outside(raw: DictConfig, others: Collection[str] = ()) -> dict[str, Any]:
    """Return key → value of each setting in ``raw`` that reads something outside the configuration, except ``others``
    and the keys below them.

    Raises:
        as :func:`resolve_outside`.
    """
    settings, errors = {}, []
    for key, value in flatten(OmegaConf.to_container(raw, resolve=False, enum_to_str=True)):
        is_excluded = any(key == other or key.startswith(f"{other}.") for other in others)
        if is_excluded or not has_interpolation(value):
            continue
        try:
            resolved = resolve_value(value, key)
            if resolved != value:
                settings[key] = _typed(key, resolved)
        except QloraExpError as error:
            errors.append(error)
    raise_all(errors)
    return settings


def depends_on(raw: DictConfig, value: Any, keys: Collection[str]) -> bool:
    """Return whether ``value``, an interpolated setting of ``raw``, depends on a setting or group among ``keys``; True
    also if that can't be determined."""
    return _depends(OmegaConf.to_container(raw, resolve=False, enum_to_str=True), value, keys, set())


def _depends(plain: Any, value: Any, keys: Collection[str], seen: set[str]) -> bool:
    for name in _names_read(value):
        if name is None or any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for key in keys):
            return True
        if name not in seen:
            seen.add(name)
            setting = plain
            for part in name.split("."):
                setting = setting.get(part) if isinstance(setting, Mapping) else None
            if _depends(plain, setting, keys, seen):
                return True
    return False


def _names_read(value: Any) -> Iterator[str | None]:
    """Yield the settings that the texts of ``value`` name; ``None`` for one that can't be determined."""
    if not isinstance(value, str):
        entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for entry in entries:
            yield from _names_read(entry)
        return
    for inner in (part[2:-1] for part in _parts(value) if part.startswith("${")):
        resolver = RESOLVER.fullmatch(inner)
        if resolver is None or resolver[1] == "oc.select":
            name = (resolver[2] if resolver else inner).partition(",")[0].strip()
            yield name if re.fullmatch(r"\w+(\.\w+)*", name) else None
            continue
        yield from _names_read(resolver[2])
        if resolver[1] not in ("oc.env", *OUTSIDE_RESOLVERS):
            yield None


def _parts(text: str) -> list[str]:
    """Return ``text`` split before and after each interpolation. Nested interpolations stay inside theirs.

    Example: ``r${lora.r}-x`` gives ``["r", "${lora.r}", "-x"]``.
    """
    parts, begin, position = [], 0, 0
    while (position := text.find("${", position)) >= 0:
        escaped = (len(text[:position]) - len(text[:position].rstrip("\\"))) % 2 == 1
        end = None if escaped else _end(text, position)
        if end is None:
            position += 2
            continue
        parts += [text[begin:position]] if position > begin else []
        parts.append(text[position:end])
        begin = position = end
    return [*parts, text[begin:]] if begin < len(text) or not parts else parts


def _end(text: str, place: int) -> int | None:
    """Return the index after the interpolation that begins at ``place``; ``None``: it isn't closed."""
    depth, quote = 0, ""
    for index in range(place, len(text)):
        character = text[index]
        if quote:
            quote = "" if character == quote and text[index - 1] != "\\" else quote
        elif character in "'\"" and depth:
            quote = character
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return index + 1
    return None


def _resolve_interpolation(part: str, where: str) -> Constant | str:
    """Return the value of one interpolation if it doesn't read the configuration, else its text."""
    inner = part[2:-1]
    if HYDRA_SETTING.match(inner):
        raise _hydra_setting_error(part, where)
    resolver = RESOLVER.fullmatch(inner)
    if resolver is None:
        return f"${{{_resolve_nested(inner, where, quoted=False)}}}"
    name, arguments = resolver.groups()
    if name == "oc.env":
        return _resolve_variable(part, arguments, where)
    arguments = _resolve_nested(arguments, where, quoted=True)
    text = f"${{{name}:{arguments}}}"
    return Constant(_resolved(text, where)) if name in OUTSIDE_RESOLVERS and not has_interpolation(arguments) else text


def _resolve_variable(part: str, arguments: str, where: str) -> Constant | str:
    name, comma, default = arguments.partition(",")
    name = _resolve_nested(name, where, quoted=False).strip()
    if has_interpolation(name):
        return part
    if name in os.environ:
        return Constant(os.environ[name])
    if not comma:
        raise _not_set_error(name, where)
    default = _resolve_nested(default, where, quoted=True).strip()
    return default if has_interpolation(default) else Constant(_resolved(f"${{oc.env:{name},{default}}}", where))


def _resolve_nested(text: str, where: str, quoted: bool) -> str:
    """Return the inside of an interpolation with nested ones resolved; ``quoted``: it is the argument of a resolver."""
    parts: list[Constant | str] = []
    for part in _parts(text) if text else []:
        parts.append(_resolve_interpolation(part, where) if part.startswith("${") else part)
    constants = [part for part in parts if isinstance(part, Constant)]
    joined = "".join(str(part.value) if isinstance(part, Constant) else part for part in parts)
    if not quoted or not constants:
        return joined
    literals = [part for part in parts if isinstance(part, str)]
    if literals and all(re.fullmatch(r"[\w.+/-]*", part) for part in literals):  # several parts form one argument
        return _quoted(joined)
    return "".join(_quoted(part.value) if isinstance(part, Constant) else part for part in parts)


def _quoted(value: Any) -> str:
    """Return a value as an argument; texts are always quoted, because ``oc.decode`` accepts only texts."""
    if not isinstance(value, str):
        return hydra_value(value)
    escaped = re.sub(r"(\\*)'", lambda match: f"{match[1]}{match[1]}\\'", escape_interpolations(value))
    return f"'{escaped}'"


def _resolved(text: str, where: str) -> Any:
    from hydra.core.utils import setup_globals

    setup_globals()  # Hydra's resolvers: now, python_version
    try:
        value = OmegaConf.create({"value": text}).value
    except OmegaConfBaseException as error:
        raise ConfigError(f"{text} can't be read: {str(error).splitlines()[0]}", where, "write the value") from None
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
