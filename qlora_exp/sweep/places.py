"""Settings that name a place relative to the folder that the command was given in, as the same place from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qlora_exp import compose, study
from qlora_exp.config import absolute_path, absolute_store
from qlora_exp.overrides import hydra_value
from qlora_exp.study.types import Axis

FILES, STORES = ("task.path", "model.path", "model.chat_template"), ("tracking.uri", "sweep.storage")
"""Settings that may name a place relative to the folder that the command was given in."""


def with_absolute_places(fixed: Sequence[str], raw: DictConfig) -> list[str]:
    """``fixed``, and what a file of sweeps/ sets, so that they mean the same places from every folder."""
    places = {key: OmegaConf.select(raw, key) for key in (*FILES, *STORES)}
    changed = {key: absolute(key, value) for key, value in places.items() if value != absolute(key, value)}
    return [*(text for text in fixed if compose.key_of(text) not in changed), *study.overrides_of(changed)]


def with_absolute_places_on(axis: Axis) -> Axis:
    values = tuple(absolute(axis.key, value) for value in axis.values)
    return axis if values == axis.values else replace(axis, values=values, text=",".join(map(hydra_value, values)))


def absolute(key: str, value: Any) -> Any:
    if key in FILES and isinstance(value, str):
        return absolute_path(value)
    return absolute_store(value) if key in STORES and isinstance(value, str) else value
