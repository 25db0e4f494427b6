"""What a run's budget will buy of its training, by what is predicted before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qlora_exp.budget import limits_of
from qlora_exp.config import Config
from qlora_exp.errors import ConfigError
from qlora_exp.one_run.predicting import row_lengths
from qlora_exp.one_run.preparing import Prepared

UNTIL = " until qlora-exp calibrate has measured this machine, or a run of this base in this mode has ended here"
"""Both with as many threads."""


def check_budget_buys_a_step(config: Config, prepared: Prepared) -> None:
    """By the shortest rows and the fastest that this machine is calibrated to be, where it is.

    Raises:
        ConfigError: it doesn't.
    """
    fastest, steps = prepared.predicted.least_train_seconds, prepared.predicted.extent.steps
    for name, limit in limits_of(config.budget).items():
        step = _of_a_step(name, config, prepared, fastest, min(row_lengths(prepared.splits)))
        if step is not None and step > limit:
            what = f"the budget doesn't buy one step, which takes {step:.3g} at the least"
            raise ConfigError(what, f"budget.{name} = {limit:g}", f"budget.{name}={step * steps:.3g} or so")


def what_it_buys(config: Config, prepared: Prepared) -> Iterator[str]:
    """A sentence for each limit; a training ends after the step that reaches it."""
    planned = prepared.plan
    row = prepared.predicted.extent.row_tokens
    slow, fast = planned.predicted_train_seconds_high, planned.predicted_train_seconds_low
    for name, limit in limits_of(config.budget).items():
        paces = (slow, planned.predicted_train_seconds, fast)
        least, about, most = (_steps(limit, name, config, prepared, pace, row) for pace in paces)
        if least is None or about is None or most is None:
            yield f"budget.{name}={limit:g}: what a step takes of it isn't known{'' if name == 'kwh' else UNTIL}"
            continue
        told = f"budget.{name}={limit:g} buys about {about} of {prepared.predicted.extent.steps} steps"
        if name == "tokens":
            yield f"{told}, by the mean row"
        else:
            before = "" if prepared.predicted.before_seconds is not None else ", less what passes before training"
            yield f"{told} ({least} to {most}, by {planned.predicted_train_seconds_basis}){before}"


def _steps(
    limit: float, name: str, config: Config, prepared: Prepared, train_seconds: float | None, row_tokens: float
) -> int | None:
    step = _of_a_step(name, config, prepared, train_seconds, row_tokens)
    if step is None:
        return None
    left = limit - (_in_units(name, config, prepared.predicted.before_seconds or 0.0) or 0.0)
    return min(prepared.predicted.extent.steps, max(1, math.ceil(left / step)))


def _of_a_step(
    name: str, config: Config, prepared: Prepared, train_seconds: float | None, row_tokens: float
) -> float | None:
    """What one step takes of the limit ``name``; ``None`` is unknown."""
    extent = prepared.predicted.extent
    if name == "tokens":
        return extent.step_rows * row_tokens
    return _in_units(name, config, train_seconds / extent.steps) if train_seconds is not None else None


def _in_units(name: str, config: Config, seconds: float) -> float | None:
    """Seconds in the unit of the limit ``name``; ``None``: they aren't what it limits."""
    match name:
        case "seconds":
            return seconds
        case "usd" if config.budget.usd_per_hour:
            return seconds * config.budget.usd_per_hour / 3600.0
        case _:
            return None
