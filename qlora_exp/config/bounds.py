"""Checks of single values. Each yields an error if the value is invalid."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qlora_exp.errors import ConfigError, nearest


def config_error(what: str, key: str, value: object, hint: str) -> ConfigError:
    return ConfigError(what, f"{key} = {'null' if value is None else value}", hint)


def at_least(key: str, value: float | None, minimum: float) -> Iterator[ConfigError]:
    """Yield an error unless the number is null, or finite and at least ``minimum``."""
    if value is not None and not (math.isfinite(value) and value >= minimum):
        finite = "" if math.isfinite(value) else " and finite"
        yield config_error(f"{key} must be at least {minimum:g}{finite}", key, value, f"try {key}={minimum:g} or more")


def above_zero(key: str, value: float | None) -> Iterator[ConfigError]:
    """Yield an error unless the number is null, or finite and above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        finite = "" if math.isfinite(value) else " and finite"
        yield config_error(f"{key} must be above 0{finite}", key, value, f"give {key} a positive number")


def within(key: str, value: float, low: float, high: float, open_end: bool = False) -> Iterator[ConfigError]:
    """Yield an error unless ``low`` ≤ ``value`` ≤ ``high``; with ``open_end``, unless ``value`` < ``high``."""
    inside = low <= value < high if open_end else low <= value <= high
    if not inside:
        upper = f"below {high:g}" if open_end else f"{high:.10g}"
        yield config_error(f"{key} must lie between {low:g} and {upper}", key, value, f"e.g. {key}={low:g}")


def one_of(key: str, value: str, valid: tuple[str, ...]) -> Iterator[ConfigError]:
    if value not in valid:
        yield config_error(f"{key} has no choice called {value}", key, value, nearest(value, valid))
