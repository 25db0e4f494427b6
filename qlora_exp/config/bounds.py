"""Checks of one value."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qlora_exp.errors import ConfigError, nearest


def config_error(what: str, key: str, value: object, hint: str) -> ConfigError:
    return ConfigError(what, f"{key} = {'null' if value is None else value}", hint)


def at_least(key: str, value: float | None, least: float) -> Iterator[ConfigError]:
    """A number that may be null but not below ``least``, and never NaN or infinite."""
    if value is not None and not (math.isfinite(value) and value >= least):
        finite = "" if math.isfinite(value) else " and finite"
        yield config_error(f"{key} must be at least {least:g}{finite}", key, value, f"try {key}={least:g} or more")


def above_zero(key: str, value: float | None) -> Iterator[ConfigError]:
    if value is not None and not (math.isfinite(value) and value > 0):
        finite = "" if math.isfinite(value) else " and finite"
        yield config_error(f"{key} must be above 0{finite}", key, value, f"give {key} a positive number")


def within(key: str, value: float, low: float, high: float, open_end: bool = False) -> Iterator[ConfigError]:
    inside = low <= value < high if open_end else low <= value <= high
    if not inside:
        upto = f"below {high:g}" if open_end else f"{high:.10g}"
        yield config_error(f"{key} must lie between {low:g} and {upto}", key, value, f"e.g. {key}={low:g}")


def one_of(key: str, value: str, valid: tuple[str, ...]) -> Iterator[ConfigError]:
    if value not in valid:
        yield config_error(f"{key} has no choice called {value}", key, value, nearest(value, valid))
