"""The search space: parse override texts into axes, build grids of them, and convert values back to overrides."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    RangeSweep,
    Sweep,
    Transformer,
)
from hydra.errors import HydraException

from qlora_exp.config.overrides import hydra_value
from qlora_exp.errors import ConfigError, QloraExpError, nearest, raise_all
from qlora_exp.study.conditions import active_values, check_conditions
from qlora_exp.study.types import Axis, AxisKind

GRAMMAR = "lora.r=8,16 · choice(8,16) · range(1,10,3) · interval(0,0.2) · tag(log, int(interval(1,64)))"


def parse_axes(
    params: Mapping[str, str],
    conditions: Mapping[str, str],
    group_choices: Callable[[str], list[str]] | None = None,
    narrowed: Collection[str] = (),
) -> tuple[Axis, ...]:
    """Return the axes of the search, in the order of ``params`` (key → text in Hydra's override grammar).

    * Lists (``8,16``, ``choice(8,16)``, ``glob(*)``) and single values are choices.
    * ``interval(0,0.2)`` is continuous, ``int(interval(1,64))`` has integers only.
    * ``range(1,4)``: a grid has 1, 2, 3 as in Hydra; a sampler draws from 1 to 4, both included, as the official
      Optuna sweeper does.
    * ``shuffle(…)`` always gives the same order, so that a reopened study has the same axes.

    Args:
        group_choices: returns the files of a configuration group, for ``glob``.
        narrowed: keys that are searched over less than was declared, so that a condition over them may never hold.

    Raises:
        ConfigError, or Problems for several: an invalid text or condition.
    """
    axes: list[Axis] = []
    errors: list[QloraExpError] = []
    for key, text in params.items():
        try:
            axes.append(_axis(key, str(text), conditions.get(key), group_choices))
        except ConfigError as error:
            errors.append(error)
    for key in conditions:
        if key not in params:
            what = "a condition for a key that isn't searched"
            errors.append(ConfigError(what, f"sweep.conditions.{key}", nearest(key, params)))
    if not errors:
        errors += check_conditions(axes, narrowed)
    raise_all(errors)
    return tuple(axes)


def is_grid(axes: Sequence[Axis]) -> bool:
    """Return whether every axis is a list, so that all points can be tried."""
    return all(axis.values for axis in axes)


def grid(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Return every point of the grid; the last axis varies fastest.

    Inactive axes are left out, and points that are then equal appear once.

    Raises:
        ConfigError: an axis is an interval.
    """
    what, hint = "a grid needs lists, and this is an interval", "list the values, e.g. 1e-4,3e-4,1e-3"
    hint += ", or use another sampler, e.g. sweep.sampler=tpe"
    raise_all([_axis_error(axis.key, axis.text, what, hint) for axis in axes if not axis.values])
    keys = [axis.key for axis in axes]
    points: dict[tuple[str, ...], dict[str, Any]] = {}
    for values in itertools.product(*(axis.values for axis in axes)):
        point = active_values(axes, dict(zip(keys, values, strict=True)))
        points.setdefault(point_overrides(point), point)
    return list(points.values())


def point_overrides(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Return ``params`` (axis → value) as Hydra overrides, quoted so that Hydra reads back the same values."""
    return tuple(f"{key}={hydra_value(value)}" for key, value in params.items())


def _axis(key: str, text: str, condition: str | None, group_choices: Callable[[str], list[str]] | None) -> Axis:
    override = _parsed(key, text)
    value: Any = override.value()
    tags = tuple(sorted(value.tags)) if isinstance(value, Sweep) else ()
    if unknown := [tag for tag in tags if tag != "log"]:
        hint = "tag(log, interval(lo,hi)) searches on a log scale"
        raise _axis_error(key, text, f"there is no tag {unknown[0]!r}", hint)
    axis = Axis(override.get_key_element(), AxisKind.CHOICE, text, condition=condition, tags=tags)
    if isinstance(value, IntervalSweep):
        return _interval(axis, value)
    if "log" in tags:
        raise _axis_error(key, text, "a log scale needs an interval", "tag(log, interval(lo,hi))")
    if isinstance(value, RangeSweep):
        return _range(axis, value)
    if isinstance(value, Glob):
        names = group_choices(override.key_or_group) if group_choices else []
        if not (matches := value.filter(names)):
            raise _axis_error(axis.key, text, "nothing in this group matches", nearest(text, names))
        return _choice(axis, matches)
    if isinstance(value, ChoiceSweep):
        return _choice(axis, [_parsed(axis.key, Transformer.str(entry)).value() for entry in value.list], value.shuffle)
    return _choice(axis, [value])


def _parsed(key: str, text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except (HydraException, ValueError) as error:
        raise _axis_error(key, text, f"can't be read: {str(error).splitlines()[0]}", GRAMMAR) from None
    if override.is_delete():
        raise _axis_error(key, text, "a deletion can't be searched", "search a value instead, e.g. null")
    return override


def _choice(axis: Axis, values: Sequence[Any], shuffle: bool = False) -> Axis:
    shuffled = list(values)
    if shuffle:
        random.Random(repr(shuffled)).shuffle(shuffled)
    distinct = {hydra_value(value): value for value in shuffled}
    if not distinct:
        raise _axis_error(axis.key, axis.text, "there is nothing to choose from", GRAMMAR)
    return replace(axis, values=tuple(distinct.values()))


def _range(axis: Axis, value: RangeSweep) -> Axis:
    assert value.start is not None
    assert value.stop is not None
    if not value.step or not all(map(math.isfinite, (value.start, value.stop, value.step))):
        raise _axis_error(axis.key, axis.text, "a range needs finite numbers and a step other than 0", "range(1,10,3)")
    points = list(value.range())
    if not points:
        raise _axis_error(axis.key, axis.text, "an empty range", "range(start,stop,step): stop comes after start")
    if value.shuffle or value.step < 0:
        return _choice(axis, points, value.shuffle)
    is_integer = all(isinstance(number, int) for number in (value.start, value.stop, value.step))
    start, stop, step = (Decimal(str(number)) for number in (value.start, value.stop, value.step))
    last = start + (stop - start) // step * step
    return replace(
        axis,
        kind=AxisKind.INT if is_integer else AxisKind.FLOAT,
        values=tuple(points if is_integer else (float(start + index * step) for index in range(len(points)))),
        low=value.start,
        high=int(last) if is_integer else float(last),
        step=value.step,
    )


def _interval(axis: Axis, value: IntervalSweep) -> Axis:
    low, high = value.start, value.end
    assert low is not None
    assert high is not None
    log = "log" in axis.tags
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise _axis_error(axis.key, axis.text, "an interval goes from a number to a larger one", "interval(0,0.2)")
    if log and low <= 0:
        raise _axis_error(axis.key, axis.text, "a log scale begins above 0", "tag(log, interval(1e-5,1e-2))")
    is_integer = isinstance(low, int) and isinstance(high, int)
    return replace(axis, kind=AxisKind.INT if is_integer else AxisKind.FLOAT, low=low, high=high, log=log)


def _axis_error(key: str, text: str, what: str, hint: str) -> ConfigError:
    return ConfigError(what, f"sweep.params.{key}: {text}", hint)
