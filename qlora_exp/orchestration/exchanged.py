"""A sampler or pruner that the command line chooses in place of the one in a file of sweeps/, with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora_exp.config.compose import compose_raw
from qlora_exp.config.overrides import override_key, override_value
from qlora_exp.config.schema import SweepConfig


def without_options_of_another(settings: SweepConfig, overrides: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """Return the settings without the options of a sampler or pruner that ``overrides`` replace, and one line for each.

    Example: ``sweep.pruner=median`` over a file with ``pruner: asha`` and its ``min_resource``. Options among the
    ``overrides`` stay: if they are the other's, the command is refused as before.
    """
    lines = []
    for kind in ("sampler", "pruner"):
        key, options_key = f"sweep.{kind}", f"sweep.{kind}_options"
        options = getattr(settings, f"{kind}_options")
        if not options or all(override_key(text) != key for text in overrides):
            continue
        others = [text for text in overrides if override_key(text).partition("_options")[0] != key]
        before, now = compose_raw(others).sweep[kind], getattr(settings, kind)
        if before is now:
            continue
        kept = _named(overrides, options_key)
        dropped = [name for name in options if name not in kept]
        if dropped:
            remaining: Any = {f"{kind}_options": {name: options[name] for name in kept}}
            settings = replace(settings, **remaining)
            lines.append(f"{key}={now} replaces {before}, so {before}'s options are left out: {', '.join(dropped)}")
    return settings, lines


def _named(overrides: Sequence[str], key: str) -> list[str]:
    """Return the options that ``overrides`` name: ``key.NAME=…`` or ``key={NAME: …}``."""
    names = []
    for text in overrides:
        first, _, name = override_key(text).partition(f"{key}.")
        if name and not first:
            names.append(name)
        elif override_key(text) == key and isinstance(value := override_value(text), Mapping):
            names += map(str, value)
    return names
