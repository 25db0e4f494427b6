"""A study's objectives and constraints, which are paths into the run's record, and what each axis explains of them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from qlora_exp.errors import ConfigError, nearest
from qlora_exp.records.types import RunRecord
from qlora_exp.study.types import Outcome, StudySpec

if TYPE_CHECKING:
    import optuna

MODEL_STATE = "memory.model_state_bytes"
"""A property of the record, not a field: memory that training needs besides activations."""

MIN_TRIALS = 4
"""Importances need trials that differ; with fewer they mean nothing."""

Direction = Literal["minimize", "maximize"]
DIRECTIONS: dict[str, Direction] = {"minimize": "minimize", "maximize": "maximize"}


@dataclass(frozen=True)
class Objective:
    """A field of the record, to minimize or maximize."""

    direction: Direction
    field: str


@dataclass(frozen=True)
class Constraint:
    """A bound on a field of the record."""

    field: str
    sign: str
    """``<=`` or ``>=``."""
    bound: float


def parse_objective(text: str) -> Objective:
    """Return the objective for ``minimize FIELD`` or ``maximize FIELD``; FIELD is a path to a number in the record.

    Raises:
        ConfigError: another form, or no such field.
    """
    direction, _, field = text.strip().partition(" ")
    where = f"sweep.objectives: {text}"
    if direction not in DIRECTIONS:
        raise ConfigError("an objective must begin with minimize or maximize", where, "minimize FIELD")
    return Objective(DIRECTIONS[direction], _checked_field(field.strip(), where))


def parse_constraint(text: str) -> Constraint:
    """Return the constraint for ``FIELD <= NUMBER`` or ``FIELD >= NUMBER``.

    Raises:
        ConfigError: another form, or no such field.
    """
    where = f"sweep.constraints: {text}"
    match = re.fullmatch(r"\s*(?P<field>\S+?)\s*(?P<sign><=|>=)\s*(?P<bound>\S+)\s*", text)
    try:
        bound = float(match["bound"]) if match else math.nan
    except ValueError:
        bound = math.nan
    if match is None or not math.isfinite(bound):
        raise ConfigError("the constraint can't be parsed", where, "FIELD <= NUMBER, or FIELD >= NUMBER")
    return Constraint(_checked_field(match["field"], where), match["sign"], bound)


def objective_value(record: RunRecord, field: str) -> float | None:
    """Return the number at ``field``; ``None`` if it is unknown or not finite."""
    value: Any = record
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def violation_of(record: RunRecord, constraint: Constraint) -> float:
    """Return by how much the record violates the constraint, in the field's unit; at most 0 if it is satisfied.

    An unknown value counts as satisfied (0): a missing measurement must not make a whole study infeasible.
    """
    value = objective_value(record, constraint.field)
    if value is None:
        return 0.0
    return value - constraint.bound if constraint.sign == "<=" else constraint.bound - value


def outcome_of(record: RunRecord, spec: StudySpec) -> Outcome:
    """Return the outcome of an ended run, with the values of objectives and constraints."""
    return Outcome(
        status=record.status,
        values=tuple(objective_value(record, parse_objective(text).field) for text in spec.objectives),
        violations=tuple(violation_of(record, parse_constraint(text)) for text in spec.constraints),
        seconds=record.speed.total_seconds,
        failure=record.failure,
    )


def importances(study: optuna.Study, spec: StudySpec) -> dict[str, dict[str, float]]:
    """Return objective → axis → share of its variance (fANOVA with a fixed seed), largest first.

    Objectives and axes without a computable share are left out.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances  # imports scikit-learn

    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    by_objective = {}
    for number, text in enumerate(spec.objectives):
        has_variance = len({trial.values[number] for trial in trials}) > 1
        if len(trials) >= MIN_TRIALS and has_variance:
            evaluator = FanovaImportanceEvaluator(seed=0)
            target = partial(_value, number=number)
            with contextlib.suppress(ValueError, RuntimeError):  # conditional axes, and no trial has all of them
                shares = get_param_importances(study, evaluator=evaluator, target=target)
                by_objective[parse_objective(text).field] = dict(shares)
    return {field: shares for field, shares in by_objective.items() if shares}


def _value(trial: optuna.trial.FrozenTrial, number: int) -> float:
    return float(trial.values[number])


@cache
def numeric_fields() -> tuple[str, ...]:
    """Return the paths of all numbers in a record. ``….*`` means that any name may follow."""
    return (MODEL_STATE, *_numeric_paths(RunRecord, ""))


def _checked_field(field: str, where: str) -> str:
    fields = numeric_fields()
    prefixes = (prefix.removesuffix("*") for prefix in fields if prefix.endswith("*"))
    if field in fields or any(field.startswith(prefix) and len(field) > len(prefix) for prefix in prefixes):
        return field
    raise ConfigError(f"a record has no numeric field {field!r}", where, nearest(field, fields))


def _numeric_paths(kind: Any, path: str) -> Iterator[str]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            yield from _numeric_paths(option, path)
    elif dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            yield from _numeric_paths(hints[item.name], f"{path}.{item.name}" if path else item.name)
    elif typing.get_origin(kind) is dict and typing.get_args(kind)[1] in (Any, int, float):
        yield f"{path}.*"
    elif kind in (int, float):
        yield path
