"""Make relative paths in settings absolute, so that they mean the same place from every folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_exp.config.interpolations import unresolved_texts
from qlora_exp.config.overrides import has_interpolation, hydra_value, override_key
from qlora_exp.config.schema import absolute_path, absolute_store
from qlora_exp.study.space import point_overrides
from qlora_exp.study.types import Axis

FILES, STORES = ("task.path", "model.path", "model.chat_template"), ("tracking.uri", "sweep.storage")
"""Settings that may name a place relative to the command's working directory."""


def with_absolute_paths(fixed: Sequence[str], raw: DictConfig) -> list[str]:
    """Return ``fixed`` with absolute paths, including those that a file of sweeps/ sets."""
    places = {key: _text_as_written(raw, key) for key in (*FILES, *STORES)}
    changed = {key: absolute_value(key, value) for key, value in places.items() if value != absolute_value(key, value)}
    return [*(text for text in fixed if override_key(text) not in changed), *point_overrides(changed)]


def _text_as_written(raw: DictConfig, key: str) -> Any:
    """Return the setting's text as written, since an axis may change what an interpolation in it refers to.

    If it begins with an interpolation that gives a relative path, ``./`` is put before it.
    """
    section, _, name = key.rpartition(".")
    value = unresolved_texts(raw[section], name) if raw[section] is not None else None
    if isinstance(value, str) and value.startswith("${") and key in FILES:
        try:
            resolved = OmegaConf.select(raw, key)
        except OmegaConfBaseException:
            return value
        return value if resolved == absolute_value(key, resolved) else f"./{value}"
    return value


def with_absolute_values(axis: Axis) -> Axis:
    """Return the axis with absolute paths as values."""
    values = tuple(absolute_value(axis.key, value) for value in axis.values)
    return axis if values == axis.values else replace(axis, values=values, text=",".join(map(hydra_value, values)))


def absolute_value(key: str, value: Any) -> Any:
    """Return ``value`` of the setting ``key`` as an absolute path. A path that begins with an interpolation stays as it
    is."""
    if not isinstance(value, str) or value.startswith("${"):
        return value
    if key in FILES and has_interpolation(value):
        return os.path.join(os.getcwd(), os.path.expanduser(value.removeprefix("./")))
    if key in FILES:
        return absolute_path(value)
    return absolute_store(value) if key in STORES else value
