"""What a budget buys of a training: steps, by what one is predicted to take of each limit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qlora_exp.errors import ConfigError
from qlora_exp.estimate.duration import Interval
from qlora_exp.estimate.flops import Workload

UNTIL = " until qlora-exp calibrate has measured this machine, or a run of this base in this mode has ended here"
"""Both with as many threads."""
LIMIT_UNITS = {"seconds": "s", "tokens": "tokens", "usd": "usd", "kwh": "kWh"}


@dataclass(frozen=True)
class Affordable:
    """What one limit of a budget buys: ``least`` ≤ ``about`` ≤ ``most`` of ``of`` steps or trials; ``None`` is
    unknown."""

    limit: str
    amount: float
    """In the limit's unit: seconds, tokens, US dollars, kilowatt-hours."""
    unit: str
    """``steps`` of a run, ``trials`` of a sweep."""
    about: int | None
    least: int | None
    most: int | None
    of: int | None
    told: str


@dataclass(frozen=True)
class StepCost:
    """What one training is predicted to take; ``None`` is unknown. ``seconds`` are of all its steps, ``least_seconds``
    by the machine's calibration alone (earlier runs may have been slowed by something), ``before_seconds`` what passes
    from loading on beside training and the last scoring."""

    extent: Workload
    shortest_row_tokens: float
    seconds: Interval | None
    least_seconds: float | None
    before_seconds: float | None


class BudgetTooSmall(ConfigError):
    """A limit of the budget is spent before a step is made. ``times``: how many times more a step takes at the
    least."""

    def __init__(self, what: str, where: str, hint: str, times: float) -> None:
        super().__init__(what, where, hint)
        self.times = times


def check_buys_a_step(limits: Mapping[str, float], usd_per_hour: float | None, pace: StepCost) -> None:
    """By the shortest rows and the fastest that this machine is calibrated to be, where it is.

    Raises:
        BudgetTooSmall: it doesn't.
    """
    steps = pace.extent.steps
    for name, limit in limits.items():
        step = _of_a_step(name, usd_per_hour, pace.extent, pace.least_seconds, pace.shortest_row_tokens)
        if step is not None and step > limit:
            what = f"the budget doesn't buy one step, which takes {step:.3g} {LIMIT_UNITS[name]} at the least"
            hint = f"budget.{name}={step * steps:.3g} or so, for {steps} step{'s' if steps != 1 else ''}"
            raise BudgetTooSmall(what, f"budget.{name} = {limit:.12g}", hint, step / limit)


def affordable_steps(limits: Mapping[str, float], usd_per_hour: float | None, pace: StepCost) -> Iterator[Affordable]:
    """One for each limit; a training ends after the step that reaches it."""
    extent = pace.extent
    slow, middle, fast = (pace.seconds.high, pace.seconds.middle, pace.seconds.low) if pace.seconds else (None,) * 3
    for name, limit in limits.items():
        least, about, most = (_steps(limit, name, usd_per_hour, pace, seconds) for seconds in (slow, middle, fast))
        told = f"budget.{name}={limit:.12g}"
        if least is None or about is None or most is None:
            told = f"{told}: what a step takes of it isn't known{'' if name == 'kwh' else UNTIL}"
            yield Affordable(name, limit, "steps", None, None, None, extent.steps, told)
            continue
        told = f"{told} buys about {about} of {extent.steps} steps"
        if name == "tokens" or pace.seconds is None:
            told = f"{told}, by the mean row"
        else:
            before = "" if pace.before_seconds is not None else ", less what passes before training"
            told = f"{told} ({least} to {most}, by {pace.seconds.basis}){before}"
        yield Affordable(name, limit, "steps", about, least, most, extent.steps, told)


def _steps(
    limit: float, name: str, usd_per_hour: float | None, pace: StepCost, train_seconds: float | None
) -> int | None:
    step = _of_a_step(name, usd_per_hour, pace.extent, train_seconds, pace.extent.row.tokens)
    if step is None:
        return None
    left = limit - (_in_units(name, usd_per_hour, pace.before_seconds or 0.0) or 0.0)
    return min(pace.extent.steps, max(1, math.ceil(left / step)))


def _of_a_step(
    name: str, usd_per_hour: float | None, extent: Workload, train_seconds: float | None, row_tokens: float
) -> float | None:
    """What one step takes of the limit ``name``; ``None`` is unknown."""
    if name == "tokens":
        return extent.step_rows * row_tokens
    return _in_units(name, usd_per_hour, train_seconds / extent.steps) if train_seconds is not None else None


def _in_units(name: str, usd_per_hour: float | None, seconds: float) -> float | None:
    """Seconds in the unit of the limit ``name``; ``None``: they aren't what it limits."""
    match name:
        case "seconds":
            return seconds
        case "usd" if usd_per_hour:
            return seconds * usd_per_hour / 3600.0
        case _:
            return None
