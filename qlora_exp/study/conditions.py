"""Conditional axes, for example ``lora.alpha_policy == fixed and lora.r > 8``: the axis is searched only if this
holds."""

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

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
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
    """One comparison of a condition, for example ``lora.r > 8``."""

    key: str
    sign: str
    value: Any

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Return whether the clause holds for ``params``, the values of the active axes; over an inactive axis it
        doesn't."""
        return self.key in params and bool(OPERATORS[self.sign](params[self.key], self.value))


def check_conditions(axes: Sequence[Axis], narrowed: Collection[str] = ()) -> list[QloraExpError]:
    """Return the problems in the axes' conditions: grammar, unknown axes, impossible values, cycles.

    ``narrowed``: axes that the command searches over less than the sweep's file declares. A condition over one of them
    may never hold; that is no problem.
    """
    by_key = {axis.key: axis for axis in axes}
    errors: list[QloraExpError] = []
    for axis in axes:
        try:
            errors += [error for clause in clauses(axis) if (error := _clause_problem(clause, axis, by_key, narrowed))]
        except ConfigError as error:
            errors.append(error)
    if not errors:
        try:
            topological_order(axes)
        except CycleError as error:
            around = " → ".join(error.args[1])
            what = f"the conditions depend on each other in a cycle: {around}"
            errors.append(ConfigError(what, "sweep.conditions", "remove one of them"))
    return errors


def topological_order(axes: Sequence[Axis]) -> list[Axis]:
    """Return the axes sorted so that each comes after the axes that its condition names."""
    by_key = {axis.key: axis for axis in axes}
    named_keys = {axis.key: [clause.key for clause in clauses(axis)] for axis in axes}
    return [by_key[key] for key in TopologicalSorter(named_keys).static_order()]


def is_active(axis: Axis, params: Mapping[str, Any]) -> bool:
    """Return whether ``axis`` is searched, given the values of the axes before it."""
    return all(clause.holds(params) for clause in clauses(axis))


def active_values(axes: Sequence[Axis], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of ``values`` (one per axis) whose axes are active, in the order of ``axes``."""
    params: dict[str, Any] = {}
    for axis in topological_order(axes):
        if is_active(axis, params):
            params[axis.key] = values[axis.key]
    return {axis.key: params[axis.key] for axis in axes if axis.key in params}


def clauses(axis: Axis) -> tuple[Clause, ...]:
    """Return the clauses of the axis's condition; empty if it has none."""
    return _parse(axis.condition, f"sweep.conditions.{axis.key}: {axis.condition}") if axis.condition else ()


@lru_cache
def _parse(text: str, where: str) -> tuple[Clause, ...]:
    clauses, position = [], 0
    while True:
        match = CLAUSE.match(text, position)
        if match is None:
            raise ConfigError("the condition can't be parsed", where, CONDITION_HINT)
        try:
            value = OverridesParser.create().parse_override(f"value={match['value']}").value()
        except (HydraException, ValueError):
            raise ConfigError(f"{match['value']} is not a value", where, CONDITION_HINT) from None
        clauses.append(Clause(match["key"], match["sign"], value))
        conjunction = AND.match(text, match.end())
        if conjunction is None:
            break
        position = conjunction.end()
    if match.end() != len(text):
        raise ConfigError(f"the condition can't be parsed from {text[match.end() :]!r} on", where, CONDITION_HINT)
    return tuple(clauses)


def _clause_problem(
    clause: Clause, axis: Axis, by_key: Mapping[str, Axis], narrowed: Collection[str]
) -> ConfigError | None:
    where = f"sweep.conditions.{axis.key}: {axis.condition}"
    if clause.key not in by_key:
        others = [key for key in by_key if key != axis.key]
        return ConfigError(f"{clause.key} is not an axis of this search", where, nearest(clause.key, others))
    if (clause.sign == "in") != isinstance(clause.value, list):
        return ConfigError(f"{clause.sign} can't be used with {clause.value}", where, CONDITION_HINT)
    referenced = by_key[clause.key]
    if clause.sign in ("<", "<=", ">", ">=") and not all(map(_is_number, [clause.value, *referenced.values])):
        return ConfigError(f"{clause.sign} compares numbers only", where, CONDITION_HINT)
    can_hold = referenced.low is not None or referenced.key in narrowed
    if not can_hold and not any(clause.holds({referenced.key: value}) for value in referenced.values):
        return ConfigError("the condition never holds", where, f"{referenced.key} is searched over {referenced.text}")
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
