"""Values in Hydra's override grammar."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString


def hydra_value(value: Any) -> str:
    """Return ``value`` (JSON types) in Hydra's override grammar, quoted so that Hydra reads the same value back.

    Example: ``[1, "a b"]`` gives ``[1,'a b']``.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(hydra_value(entry) for entry in value) + "]"
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./-]+", text) and not _needs_quotes(text):
        return text
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def has_interpolation(value: Any) -> bool:
    """Return whether a text in ``value`` (JSON types) holds an interpolation: ``${lora.r}``, but not
    ``\\${lora.r}``."""
    if isinstance(value, str):
        return any(len(match[1]) % 2 == 0 for match in re.finditer(r"(\\*)\$\{", value))
    if isinstance(value, Mapping):
        return any(has_interpolation(entry) for entry in value.values())
    return isinstance(value, list | tuple) and any(has_interpolation(entry) for entry in value)


def escape_interpolations(value: Any) -> Any:
    """Return ``value`` (JSON types) with ``${`` escaped in its texts, so that OmegaConf reads it literally."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: f"{match[1]}{match[1]}\\${{", value)
    if isinstance(value, Mapping):
        return {key: escape_interpolations(entry) for key, entry in value.items()}
    return [escape_interpolations(entry) for entry in value] if isinstance(value, list | tuple) else value


def _needs_quotes(text: str) -> bool:
    """Return whether Hydra would read an unquoted ``text`` as a number, a boolean or null."""
    if text.lower() in ("null", "true", "false", "none"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
