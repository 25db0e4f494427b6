"""How many training steps each limit of a budget is enough for, from the predicted cost of one step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qlora_exp.errors import ConfigError
from qlora_exp.estimate.duration import Interval
from qlora_exp.estimate.flops import Workload

UNTIL_MEASURED = (
    " until qlora-exp calibrate has measured this machine, or a run with this base and quantization has ended on it"
)
"""Calibration and run must have used the same number of threads."""
LIMIT_UNITS = {"seconds": "s", "tokens": "tokens", "usd": "usd", "kwh": "kWh"}


@dataclass(frozen=True)
class Affordable:
    """How many of ``of`` steps or trials one limit of a budget is enough for: ``minimum`` ≤ ``about`` ≤ ``maximum``;
    ``None`` is unknown. The last field is the sentence for the user."""

    limit: str
    amount: float
    """In the limit's unit: seconds, tokens, US dollars, kilowatt-hours."""
    unit: str
    """``steps`` of a run, ``trials`` of a sweep."""
    about: int | None
    minimum: int | None
    maximum: int | None
    of: int | None
    message: str


@dataclass(frozen=True)
class StepCost:
    """The predicted cost of one training; ``None`` is unknown.

    ``seconds``: of all its steps. ``least_seconds``: a lower bound from this machine's calibration alone, because
    something may have slowed earlier runs. ``before_seconds``: from loading on, without training and the last scoring.
    """

    extent: Workload
    shortest_row_tokens: float
    seconds: Interval | None
    least_seconds: float | None
    before_seconds: float | None


class BudgetTooSmall(ConfigError):
    """A limit of the budget is too small for one step. ``times``: the lower bound of a step's cost, divided by the
    limit."""

    def __init__(self, what: str, where: str, hint: str, times: float) -> None:
        super().__init__(what, where, hint)
        self.times = times


def check_covers_a_step(limits: Mapping[str, float], usd_per_hour: float | None, pace: StepCost) -> None:
    """Check each limit against the lower bound of one step's cost: the shortest rows at the fastest calibrated rate.

    Raises:
        BudgetTooSmall: a limit is too small for one step.
    """
    steps = pace.extent.steps
    for name, limit in limits.items():
        step = _cost_of_a_step(name, usd_per_hour, pace.extent, pace.least_seconds, pace.shortest_row_tokens)
        if step is not None and step > limit:
            what = f"the budget is too small for one training step, which needs at least {step:.3g} {LIMIT_UNITS[name]}"
            hint = f"about budget.{name}={step * steps:.3g} for {steps} step{'s' if steps != 1 else ''}"
            raise BudgetTooSmall(what, f"budget.{name} = {limit:.12g}", hint, step / limit)


def affordable_steps(limits: Mapping[str, float], usd_per_hour: float | None, pace: StepCost) -> Iterator[Affordable]:
    """Yield one :class:`Affordable` per limit. A training ends after the step that reaches the limit."""
    extent = pace.extent
    slow, middle, fast = (pace.seconds.high, pace.seconds.middle, pace.seconds.low) if pace.seconds else (None,) * 3
    for name, limit in limits.items():
        minimum, about, maximum = (_steps(limit, name, usd_per_hour, pace, seconds) for seconds in (slow, middle, fast))
        message = f"budget.{name}={limit:.12g}"
        if minimum is None or about is None or maximum is None:
            message = f"{message}: the cost of a step is unknown{'' if name == 'kwh' else UNTIL_MEASURED}"
            yield Affordable(name, limit, "steps", None, None, None, extent.steps, message)
            continue
        message = f"{message} is enough for about {about} of {extent.steps} steps"
        if name == "tokens" or pace.seconds is None:
            message = f"{message}, from the mean row length"
        else:
            without_overhead = "" if pace.before_seconds is not None else ", not counting the time before training"
            message = f"{message} ({minimum}–{maximum}, from {pace.seconds.basis}){without_overhead}"
        yield Affordable(name, limit, "steps", about, minimum, maximum, extent.steps, message)


def _steps(
    limit: float, name: str, usd_per_hour: float | None, pace: StepCost, train_seconds: float | None
) -> int | None:
    """Return how many steps the limit is enough for: at least one, at most all; ``None`` is unknown."""
    step = _cost_of_a_step(name, usd_per_hour, pace.extent, train_seconds, pace.extent.row.tokens)
    if step is None:
        return None
    remaining = limit - (_in_units(name, usd_per_hour, pace.before_seconds or 0.0) or 0.0)
    return min(pace.extent.steps, max(1, math.ceil(remaining / step)))


def _cost_of_a_step(
    name: str, usd_per_hour: float | None, extent: Workload, train_seconds: float | None, row_tokens: float
) -> float | None:
    """Return the cost of one step in the unit of the limit ``name``; ``None`` is unknown."""
    if name == "tokens":
        return extent.step_rows * row_tokens
    return _in_units(name, usd_per_hour, train_seconds / extent.steps) if train_seconds is not None else None


def _in_units(name: str, usd_per_hour: float | None, seconds: float) -> float | None:
    """Return ``seconds`` in the unit of the limit ``name``; ``None`` if the limit isn't about time."""
    match name:
        case "seconds":
            return seconds
        case "usd" if usd_per_hour:
            return seconds * usd_per_hour / 3600.0
        case _:
            return None
