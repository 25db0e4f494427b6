"""Conversion of axes to Optuna's distributions, and of values in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from qlora_exp.config.overrides import hydra_value
from qlora_exp.errors import ConfigError, nearest
from qlora_exp.study.conditions import is_active, topological_order
from qlora_exp.study.types import Axis, AxisKind


def distribution(axis: Axis) -> BaseDistribution:
    """Return the Optuna distribution of an axis."""
    if axis.kind is AxisKind.CHOICE:
        return CategoricalDistribution([encode_value(value) for value in axis.values])
    assert axis.low is not None
    assert axis.high is not None
    if axis.kind is AxisKind.INT:
        return IntDistribution(int(axis.low), int(axis.high), axis.log, int(axis.step or 1))
    return FloatDistribution(float(axis.low), float(axis.high), axis.log, axis.step)


def encode_value(value: Any) -> Any:
    """Return ``value`` as Optuna stores it: scalars unchanged, lists and mappings as override text."""
    return hydra_value(value) if isinstance(value, list | tuple | Mapping) else value


def decode_value(axis: Axis, stored: Any) -> Any:
    """Return the axis's value for a value stored by Optuna."""
    for value in axis.values if axis.kind is AxisKind.CHOICE else ():
        if encode_value(value) == stored and isinstance(stored, bool) == isinstance(value, bool):
            return value
    return stored


def decode_params(axes: Sequence[Axis], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the axes' values for the parameters stored by Optuna."""
    return {axis.key: decode_value(axis, stored[axis.key]) for axis in axes if axis.key in stored}


def suggest(axes: Sequence[Axis], trial: Trial) -> dict[str, Any]:
    """Return a value for every active axis, as suggested by the trial; a value that the trial already has stays."""
    params: dict[str, Any] = {}
    for axis in topological_order(axes):
        if is_active(axis, params):
            params[axis.key] = decode_value(axis, _suggest(axis, trial))
    return {axis.key: params[axis.key] for axis in axes if axis.key in params}


def contains(axis: Axis, value: Any) -> bool:
    """Return whether ``value`` lies on the axis."""
    space = distribution(axis)
    try:
        return space._contains(space.to_internal_repr(encode_value(value)))
    except ValueError:
        return False


def check_enqueued(axes: Sequence[Axis], points: Sequence[Mapping[str, Any]]) -> list[ConfigError]:
    """Return the problems in the enqueued configurations."""
    by_key = {axis.key: axis for axis in axes}
    errors = []
    for index, point in enumerate(points):
        for key, value in point.items():
            where = f"sweep.enqueue[{index}].{key}: {value}"
            if key not in by_key:
                errors.append(ConfigError(f"{key} is not an axis of this search", where, nearest(key, by_key)))
            elif not contains(by_key[key], value):
                errors.append(ConfigError(f"{value} is outside the search", where, f"searched: {by_key[key].text}"))
    return errors


def _suggest(axis: Axis, trial: Trial) -> Any:
    space = distribution(axis)
    if isinstance(space, CategoricalDistribution):
        return trial.suggest_categorical(axis.key, space.choices)
    if isinstance(space, IntDistribution):
        return trial.suggest_int(axis.key, space.low, space.high, step=space.step, log=space.log)
    assert isinstance(space, FloatDistribution)
    return trial.suggest_float(axis.key, space.low, space.high, step=space.step, log=space.log)
