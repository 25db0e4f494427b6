"""When an axis is searched: ``lora.alpha_policy == fixed and lora.r > 8``, over other axes of the same space."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from qlora_exp.errors import ConfigError, QloraExpError, nearest
from qlora_exp.study.types import Axis

CLAUSE = re.compile(
    r"""\s*(?P<key>[\w./+@-]+)\s*(?P<sign>==|!=|<=|>=|<|>|\bin\b)\s*
        (?P<value>'[^']*'|"[^"]*"|\[[^\]]*\]|[^\s\[\]'"]+)\s*""",
    re.VERBOSE,
)
AND = re.compile(r"and\b")
CONDITION_HINT = "e.g. lora.alpha_policy == fixed, lora.r > 8, lora.r in [8,16], joined by and"

SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, options: value in options,
}


@dataclass(frozen=True)
class Clause:
    key: str
    sign: str
    value: Any

    def holds(self, params: Mapping[str, Any]) -> bool:
        """``params``: the values of the active axes; a clause over an inactive one doesn't hold."""
        return self.key in params and bool(SIGNS[self.sign](params[self.key], self.value))


def check_conditions(axes: Sequence[Axis], narrowed: Collection[str] = ()) -> list[QloraExpError]:
    """What is wrong with the axes' conditions: grammar, names, values that can't be, cycles.

    ``narrowed``: axes that search less than was declared; that a condition over one never holds is then meant.
    """
    by_key = {axis.key: axis for axis in axes}
    errors: list[QloraExpError] = []
    for axis in axes:
        try:
            errors += [error for clause in clauses(axis) if (error := _wrong(clause, axis, by_key, narrowed))]
        except ConfigError as error:
            errors.append(error)
    if not errors:
        try:
            in_order(axes)
        except CycleError as error:
            around = " → ".join(error.args[1])
            what = f"conditions that wait for each other: {around}"
            errors.append(ConfigError(what, "sweep.conditions", "take one of them out"))
    return errors


def in_order(axes: Sequence[Axis]) -> list[Axis]:
    """Axes such that each comes after those that its condition names."""
    by_key = {axis.key: axis for axis in axes}
    needs = {axis.key: [clause.key for clause in clauses(axis)] for axis in axes}
    return [by_key[key] for key in TopologicalSorter(needs).static_order()]


def is_active(axis: Axis, params: Mapping[str, Any]) -> bool:
    """Whether ``axis`` is searched, given the values of the axes before it."""
    return all(clause.holds(params) for clause in clauses(axis))


def active_part(axes: Sequence[Axis], values: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``values`` (one per axis) those whose condition holds, in the order of ``axes``."""
    params: dict[str, Any] = {}
    for axis in in_order(axes):
        if is_active(axis, params):
            params[axis.key] = values[axis.key]
    return {axis.key: params[axis.key] for axis in axes if axis.key in params}


def clauses(axis: Axis) -> tuple[Clause, ...]:
    return _parse(axis.condition, f"sweep.conditions.{axis.key}: {axis.condition}") if axis.condition else ()


@lru_cache
def _parse(text: str, where: str) -> tuple[Clause, ...]:
    found, position = [], 0
    while True:
        match = CLAUSE.match(text, position)
        if match is None:
            raise ConfigError("a condition that can't be read", where, CONDITION_HINT)
        found.append(Clause(match["key"], match["sign"], _value(match["value"], where)))
        joined = AND.match(text, match.end())
        if joined is None:
            break
        position = joined.end()
    if match.end() != len(text):
        raise ConfigError(f"a condition that can't be read from {text[match.end() :]!r} on", where, CONDITION_HINT)
    return tuple(found)


def _value(text: str, where: str) -> Any:
    try:
        return OverridesParser.create().parse_override(f"value={text}").value()
    except (HydraException, ValueError):
        raise ConfigError(f"{text} is no value", where, CONDITION_HINT) from None


def _wrong(clause: Clause, axis: Axis, by_key: Mapping[str, Axis], narrowed: Collection[str]) -> ConfigError | None:
    where = f"sweep.conditions.{axis.key}: {axis.condition}"
    if clause.key not in by_key:
        others = [key for key in by_key if key != axis.key]
        return ConfigError(f"{clause.key} is no axis of this search", where, nearest(clause.key, others))
    if (clause.sign == "in") != isinstance(clause.value, list):
        return ConfigError(f"{clause.sign} doesn't go with {clause.value}", where, CONDITION_HINT)
    other = by_key[clause.key]
    if clause.sign in ("<", "<=", ">", ">=") and not all(map(_is_number, [clause.value, *other.values])):
        return ConfigError(f"{clause.sign} compares numbers", where, CONDITION_HINT)
    can_hold = other.low is not None or other.key in narrowed
    if not can_hold and not any(clause.holds({other.key: value}) for value in other.values):
        return ConfigError("a condition that never holds", where, f"{other.key} is searched over {other.text}")
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
